"""What a run would cost, before it is run: behind `python wd1.py --dry_run`.

    python -m extras.plan          # the README's table: LLaDA-8B's shape with prompts of 200 tokens

Memory is not guessed from a formula: the sampler's and the update's own functions run once on tensors without data, and
what they would have held at a time is counted (extras/memory.py).
"""

import dataclasses
import json
import math
import tempfile
from pathlib import Path

import torch

from extras.cache import KeyValueCache
from extras.memory import CountMemory, without_data
from extras.settings import check
from rewards import InputError
from wd1 import Config, autocast, chunked_log_probs, encode, hidden_states, predict_logits, propose, set_up

NF4 = 4.127 / 8  # bytes of a weight in 4 bits with its scales (QLoRA, arXiv 2305.14314)


def arithmetic(config):
    """wd1.autocast for tensors without data, which pass for the CPU's."""
    return autocast(dataclasses.replace(config, device="cpu"))


def update_peak(model, mode, config, prompt_length):
    """Bytes that an update holds at most besides the weights and AdamW's moments; its gradients are included."""
    rows, columns = config.micro_batch_size, prompt_length + config.gen_length
    model.train()
    with mode, CountMemory() as memory, arithmetic(config):
        for _ in range(1 if config.batch_size == rows and config.mc_samples == 1 else 2):  # gradients accumulate
            canvas = torch.zeros(rows, columns, dtype=torch.long)
            states = hidden_states(model, canvas, None, torch.arange(prompt_length, columns)).flatten(0, 1)
            target = torch.zeros(len(states), dtype=torch.long)
            chunked_log_probs(model.get_output_embeddings(), states, target).sum().backward()
            del states
    return memory.peak


def sampling_peak(model, mode, config, prompt_length):
    """Bytes that a denoising step of `rollout_batch_size` rows holds at most, with keys and values if they are cached."""
    rows, columns = config.rollout_batch_size, prompt_length + config.gen_length
    model.eval()
    with mode, CountMemory() as memory, arithmetic(config), torch.no_grad():
        cache = None if config.cache == "none" else KeyValueCache((prompt_length, columns))
        canvas = torch.zeros(rows, columns, dtype=torch.long)
        block = torch.arange(config.gen_length if config.objective == "wd1++" else config.block_length) + prompt_length
        propose(predict_logits(model, canvas, None, block, cache), config.temperature, None)
    return memory.peak


def plan(config, prompt_length=None):
    """What a run would cost, counted on a model without data: a dict. Memory in GB of 10^9 bytes, of one process.

    prompt_length: in tokens; by default that of the longest prompt.
    """
    config.dry_run = True
    check(config)
    if config.shard:
        raise InputError("--dry_run counts the memory of one process that holds all weights: leave out --shard")
    model, reference, tokenizer, train_set, _ = set_up(config)
    prompt_length = prompt_length or encode(tokenizer, train_set[:]["prompt"]).input_ids.shape[1]
    weights = [weight for network in {model, reference} - {None} for weight in network.parameters()]
    trained = sum(weight.numel() for weight in weights if weight.requires_grad and weight.dtype == torch.float32)
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    if config.load_in_4bit:
        for module in model.get_decoder().modules():
            if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad:
                size -= module.weight.numel() * (module.weight.element_size() - NF4)
    mode = without_data(model)
    update, sampling = update_peak(model, mode, config, prompt_length), sampling_peak(model, mode, config, prompt_length)
    step = (4 + 4) * trained  # gradients, and what AdamW makes of them before it writes
    chunks, parts = (math.ceil(config.batch_size / size) for size in (config.rollout_batch_size, config.micro_batch_size))
    mixture = bool(config.beta) and config.objective != "diffu-grpo"
    views = config.mc_samples
    if config.objective == "diffu-grpo":
        views = 1 + 1 + bool(config.beta)  # current, old, reference
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "trainable_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "prompt_tokens": prompt_length,
        "dtype": config.dtype,
        "weights_GB": size / 1e9,
        "adam_GB": 8 * trained / 1e9,
        "update_GB": max(update, step) / 1e9,
        "sampling_GB": sampling / 1e9,
        "estimated_memory_GB": (size + 8 * trained + max(update, step, sampling)) / 1e9,
        "samples_per_step": config.batch_size,
        "sampling_forward_passes_per_step": config.diffusion_steps * chunks * (1 + mixture),
        "update_forward_passes_per_step": config.num_iterations * views * parts,  # at most: see learn
    }


def main():
    from extras.bench import shape_config

    checkpointed, four_bits = dict(gradient_checkpointing=True), dict(load_in_4bit=True)
    cases = {
        "default": {},
        "`--gradient_checkpointing`": checkpointed,
        "`--load_in_4bit --micro_batch_size 2`": four_bits | dict(micro_batch_size=2),
        "`--load_in_4bit --gradient_checkpointing`": four_bits | checkpointed,
        "the same with `--cache dual`": four_bits | checkpointed | dict(cache="dual"),
        "all weights: `--lora_rank 0 --gradient_checkpointing`": dict(lora_rank=0) | checkpointed,
    }
    print("| LLaDA-8B, prompts of 200 tokens, GB | weights | Adam | update | sampling | in all |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.json"
        file.write_text(json.dumps(shape_config("LLaDA-8B")))
        for name, options in cases.items():
            found = plan(Config(model=str(file), device="cpu", dtype="bfloat16", **options), 200)
            parts = ("weights", "adam", "update", "sampling", "estimated_memory")
            print(f"| {name} | " + " | ".join(f"{found[f'{part}_GB']:.1f}" for part in parts) + " |", flush=True)


if __name__ == "__main__":
    main()
