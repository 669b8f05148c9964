"""What only a GPU can tell, in one command meant for under eight minutes, on one of 80 GB.

    python -m extras.scale.gpu                  # LLaDA-8B's shape, with random weights
    python -m extras.scale.gpu --device cpu     # a rehearsal with a tiny shape, anywhere

Prints, and writes to --out as it goes: how far logits, gradients and greedy samples of a small
model agree with the CPU's, in float32 and bfloat16; then the speed of sampling and of the update,
and their peak memory beside what extras/scale/plan.py estimates. Random weights tell all of that,
since neither time nor memory depends on them; accuracy they do not tell.
"""

import importlib.util
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import wd1
from extras.scale.plan import LLADA_8B, PlanConfig, memory, write_config
from rewards import InputError

CASES = {
    "LoRA": {},
    "LoRA, checkpointing": dict(gradient_checkpointing=True),
    "LoRA, checkpointing, 4 bits": dict(gradient_checkpointing=True, load_in_4bit=True),
}


@dataclass
class Options:
    device: str = wd1.setting("cuda", "where to measure: cuda, or cpu to rehearse")
    out: str = wd1.setting("runs/gpu.json", "where the figures are written")


def outcome(device, dtype):
    """A small model's logits, the gradient of its ELBO, and greedy samples: three tensors."""
    draws = torch.Generator().manual_seed(0)
    uniform = lambda columns: torch.rand(8, columns, generator=draws).to(device)
    model = wd1.load_model("tiny")[0].to(device)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)  # opinions strong enough for greedy samples to be well defined
    tokens = torch.randint(3, 100, (8, 36), generator=draws).to(device)
    prompt, completion = tokens.split([20, 16], dim=1)
    real = torch.arange(20, device=device) >= torch.arange(8, device=device)[:, None]
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        logits = wd1.predict_logits(model, tokens, real)[:, 20:]
        options = dict(gen_length=16, steps=8, block_length=8)
        sampled = wd1.generate(model, prompt, attention_mask=real, **options).completion
        wd1.elbo(model, prompt, completion, attention_mask=real, uniform=uniform).sum().backward()
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


def build(config, device):
    """The model of a run on a device, with random weights, perhaps in 4 bits."""
    model, _ = wd1.load_model(config.model, device=device, dtype=getattr(torch, config.dtype))
    if config.load_in_4bit:  # as from_pretrained does it to a checkpoint
        from bitsandbytes.nn import Linear4bit, Params4bit

        for name, module in [*model.get_decoder().named_modules()]:
            if isinstance(module, torch.nn.Linear):
                kind = dict(bias=False, compute_dtype=module.weight.dtype, quant_type="nf4")
                new = Linear4bit(module.in_features, module.out_features, **kind)
                new.weight = Params4bit(module.weight.data.cpu(), False, quant_type="nf4")
                model.get_decoder().set_submodule(name, new.to(device))
    model = wd1.add_adapters(model, config.lora_rank, config.model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.eos_token_id = model.config.mask_token_id  # never sampled: no row ends early
    return model


def random_batch(config):
    """A Batch of random completions whose rewards differ."""
    draw = lambda columns: torch.randint(3, 100, (config.batch_size, columns), device=config.device)
    prompt, completion = draw(config.prompt_length), draw(config.gen_length)
    rollout = wd1.Rollout(prompt, None, completion, completion, completion)
    rewards = torch.rand(1, config.batch_size, device=config.device)
    w_plus, w_minus = wd1.group_weights(rewards)
    return wd1.Batch([], rollout, [], rewards, w_plus[0], w_minus[0])


def measure(config, device):
    """{"update", "sampling": tokens a second, GB at most, GB as estimated} of one case."""
    estimate, found = memory(config), {}
    config.device = device
    model = build(config, device)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, batch = torch.optim.AdamW(trained, lr=0.0), random_batch(config)
    options = dict(gen_length=config.gen_length, steps=config.diffusion_steps)
    options |= dict(block_length=config.block_length, temperature=config.temperature)
    for name, function in {
        "update": lambda: wd1.learn(model, optimizer, batch, config),
        "sampling": lambda: wd1.generate(model.eval(), batch.rollout.prompt, **options),
    }.items():
        with wd1.autocast(config):
            timed(function, device)  # the first makes AdamW's moments, and warms up
            seconds, peak = timed(function, device)
        guess = estimate["weights_GB"] + estimate["adam_GB"] + estimate[f"{name}_GB"]
        found[name] = batch.rollout.completion.numel() / seconds, peak / 1e9, guess
    return found


def timed(function, device):
    """Seconds that `function()` takes, and the most bytes in use on the GPU meanwhile."""
    begin, on_gpu = time.perf_counter(), device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    function()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated()


def main(argv=None):
    [options] = wd1.Parser(Options, description=__doc__).parse_args_into_dataclasses(argv)
    device = options.device
    shape, lengths = LLADA_8B, dict(prompt_length=200, gen_length=256, diffusion_steps=32)
    if device == "cpu":
        shape, lengths = {}, dict(prompt_length=16, gen_length=32, diffusion_steps=8)
    elif not torch.cuda.is_available():
        raise InputError("there is no CUDA GPU: --device cpu rehearses")
    result = {"torch": torch.__version__, "agreement": agreement(device)}
    for dtype, (logits, gradient, tokens) in result["agreement"].items():
        errors = f"logits {logits:.1e}, gradient {gradient:.1e}"
        print(f"{dtype}: relative error of {errors}; {tokens:.0%} of greedy tokens are the CPU's")
    print("| case | | completion tokens/s | GB at most | estimated |\n|---|---|---|---|---|")
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        file = write_config(directory, **shape)
        for case, changes in CASES.items():
            if "load_in_4bit" in changes and not importlib.util.find_spec("bitsandbytes"):
                continue
            rows = dict(batch_size=12, rollout_batch_size=12, micro_batch_size=6, num_iterations=1)
            config = PlanConfig(model=file, **rows, **lengths, **changes)
            result[case] = measure(config, device)
            for name, figures in result[case].items():
                cells = " | ".join(f"{figure:.3g}" for figure in figures)
                print(f"| {case} | {name} | {cells} |", flush=True)
            Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
