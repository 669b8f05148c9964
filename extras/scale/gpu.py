"""What only a GPU can tell, in one command meant for under eight minutes, on one of 80 GB.

    python -m extras.scale.gpu                  # LLaDA-8B's shape, with random weights
    python -m extras.scale.gpu --device cpu     # a rehearsal with a tiny shape, anywhere

Prints, and writes to --out as it goes: how far logits, gradients and greedy samples of a small
model agree with the CPU's, in float32 and bfloat16; then the speed of sampling and of the update,
and their peak memory beside what extras/scale/plan.py estimates. Random weights tell all of that,
since neither time nor memory depends on them; accuracy they do not tell. They are written to a
temporary checkpoint (16 GB), and loaded as any other.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch.utils.benchmark import timer  # waits for the GPU, then says the time
from transformers.utils import is_bitsandbytes_available, logging

import wd1
from extras.scale.plan import LLADA_8B, PlanConfig, memory, write_config
from rewards import InputError

CASES = {
    "LoRA": {},
    "LoRA, checkpointing": dict(gradient_checkpointing=True),
    "LoRA, checkpointing, 4 bits": dict(gradient_checkpointing=True, load_in_4bit=True),
}
ROWS = dict(batch_size=12, rollout_batch_size=12, micro_batch_size=6, num_iterations=1)


def outcome(device, dtype):
    """A small model's logits, the gradient of its log p(o|q), and greedy samples: three tensors."""
    model = wd1.load_model("tiny")[0].to(device)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)  # opinions strong enough for greedy samples to be well defined
    tokens = torch.randint(3, 100, (8, 36), generator=torch.Generator().manual_seed(0)).to(device)
    prompt, completion = tokens.split([20, 16], dim=1)
    real = torch.arange(20, device=device) >= torch.arange(8, device=device)[:, None]
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        logits = wd1.predict_logits(model, tokens, real)[:, 20:]
        options = dict(attention_mask=real, gen_length=16, steps=8, block_length=8)
        sampled = wd1.generate(model, prompt, **options).completion
        options = dict(attention_mask=real, prompt_mask_prob=0.0)  # masks would differ by device
        wd1.one_step_log_likelihood(model, prompt, completion, **options).sum().backward()
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    return [tensor.detach().cpu() for tensor in (logits, gradient, sampled)]


def agreement(device):
    """Relative errors against the CPU in float32, and the share of greedy tokens that are equal."""
    found, expected = {}, outcome("cpu", torch.float32)
    for dtype in torch.float32, torch.bfloat16:
        *pairs, (ours, theirs) = zip(outcome(device, dtype), expected)
        errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
        found[str(dtype)] = [*errors, (ours == theirs).float().mean().item()]
    return found


def random_batch(config):
    """A Batch of random completions whose rewards differ."""
    size = config.batch_size, config.prompt_length + config.gen_length
    tokens = torch.randint(3, 100, size, device=config.device)
    prompt, completion = tokens.tensor_split([config.prompt_length], dim=1)
    rollout = wd1.Rollout(prompt, torch.ones_like(prompt), completion, completion, completion)
    rewards = torch.rand(1, config.batch_size, device=config.device)
    return wd1.Batch([], rollout, [], rewards, *wd1.group_weights(rewards[0]))


def measure(config, device):
    """{"update", "sampling": (tokens a second, GB at most, GB as estimated)} of one case."""
    estimate, found = memory(config), {}
    config.device = device
    model, *_ = wd1.set_up(config)
    model.config.eos_token_id = model.config.mask_token_id  # never sampled: no row ends early
    optimizer, batch = torch.optim.AdamW(model.parameters(), lr=0.0), random_batch(config)
    options = dict(gen_length=config.gen_length, steps=config.diffusion_steps)
    options |= dict(block_length=config.block_length, temperature=config.temperature)
    for name, function in {
        "update": lambda: wd1.learn(model, optimizer, batch, config),
        "sampling": lambda: wd1.generate(model.eval(), batch.rollout.prompt, **options),
    }.items():
        with wd1.autocast(config):
            function()  # makes AdamW's moments, and warms up
            if torch.cuda.is_initialized():
                torch.cuda.reset_peak_memory_stats()
            begin = timer()
            function()
            speed = batch.rollout.completion.numel() / (timer() - begin)
        guess = estimate["weights_GB"] + estimate["adam_GB"] + estimate[f"{name}_GB"]
        found[name] = speed, torch.cuda.max_memory_allocated() / 1e9, guess
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to rehearse")
    parser.add_argument("--out", default="runs/gpu.json", type=Path, help="a file for the figures")
    device, out = vars(parser.parse_args(argv)).values()
    shape, lengths = LLADA_8B, dict(prompt_length=200, gen_length=256, diffusion_steps=32)
    if device == "cpu":
        shape, lengths = {}, dict(prompt_length=16, gen_length=32, diffusion_steps=8)
    elif not torch.cuda.is_available():
        raise InputError("there is no CUDA GPU: --device cpu rehearses")
    logging.disable_progress_bar()
    result = {"torch": torch.__version__, "agreement": agreement(device)}
    for dtype, (logits, gradient, tokens) in result["agreement"].items():
        errors = f"logits {logits:.1e}, gradient {gradient:.1e}"
        print(f"{dtype}: relative error of {errors}; {tokens:.0%} of greedy tokens are the CPU's")
    print("| case | | completion tokens/s | GB at most | estimated |\n|---|---|---|---|---|")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as checkpoint:
        file = write_config(checkpoint, **shape)
        for part in wd1.load_model(file, device=device, dtype=torch.bfloat16):
            part.save_pretrained(checkpoint)
        for case, changes in CASES.items():
            if "load_in_4bit" in changes and not is_bitsandbytes_available():
                continue
            config = PlanConfig(model=checkpoint, **ROWS, **lengths, **changes)
            result[case] = measure(config, device)
            for name, figures in result[case].items():
                cells = " | ".join(f"{figure:.3g}" for figure in figures)
                print(f"| {case} | {name} | {cells} |", flush=True)
            out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
