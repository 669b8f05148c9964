"""Everything that only a GPU can tell, in one command under 8 minutes: with LLaDA-8B's shape and random weights.

    python -m extras.gpu                                       # one CUDA GPU with 80 GB
    python -m extras.gpu --device cpu --shape small --lora_rank 4      # a rehearsal without a GPU

Prints tables and writes them to --out as JSON: agreement of the GPU with the CPU, sampling, one update, one RL step, peak
memory beside what --dry_run estimates, 4-bit weights (if bitsandbytes is installed), torch.compile.
"""

import argparse
import functools
import importlib.util
import json
import tempfile
import time
from pathlib import Path

import torch

import wd1
from extras.bench import (
    SHAPES,
    alternate,
    bench_sampling,
    bench_step,
    bench_update,
    build,
    full_length,
    make_batch,
    one_update,
    row,
    settings,
    shape_config,
    show,
)
from extras.lora import add_adapters
from extras.memory import measured_peak
from extras.plan import plan

KINDS = "weights_GB", "update_GB", "sampling_GB"


def agreement(device):
    """The largest relative error of logits and of the ELBO's gradient against the CPU, and whether greedy samples are equal."""
    found = []
    for place in ("cpu", device):
        model, _ = wd1.load_model("tiny", seed=0)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(2.0)  # opinions strong enough for greedy samples to be well defined
        model, draws = model.to(place), torch.Generator().manual_seed(0)
        prompt = torch.randint(3, 100, (8, 20), generator=draws)
        prompt, real = prompt.to(place), (torch.arange(20) >= torch.arange(8)[:, None]).long().to(place)
        logits = wd1.predict_logits(model, prompt, real)
        rollout = wd1.generate(model, prompt, attention_mask=real, gen_length=16, steps=8, block_length=8)
        hidden = torch.zeros(8, 36, dtype=torch.bool, device=place)
        hidden[:, 20::2] = True
        target = torch.randint(3, 100, (8, 16), generator=draws).to(place)
        view = wd1.View(hidden, target, hidden[:, 20:].float())
        gradient = torch.autograd.grad(wd1.log_likelihood(model, prompt, [view], real).sum(), list(model.parameters()))
        flat = torch.cat([part.flatten() for part in gradient])
        found.append([logits[real.bool()].cpu(), flat.cpu(), rollout.completion.cpu()])
    (logits, gradient, tokens), (logits2, gradient2, tokens2) = found
    errors = {"logits": (logits, logits2), "gradient": (gradient, gradient2)}
    errors = {name: ((a - b).norm() / a.norm()).item() for name, (a, b) in errors.items()}
    return errors | {"same_tokens": torch.equal(tokens, tokens2)}


def four_bit(model):
    """Replaces the frozen linear layers by 4-bit ones, in place; for checkpoints from_pretrained does it."""
    import bitsandbytes as bnb

    for module in list(model.get_decoder().modules()):
        for name, linear in list(module.named_children()):
            if type(linear) is torch.nn.Linear and not linear.weight.requires_grad:
                options = dict(bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True)
                new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, **options)
                new.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                setattr(module, name, new.to(linear.weight.device))
    return model


def measure_memory(model, config, device, prompt_length):
    """Bytes at most in use above the weights, in an update and in a denoising step of `rollout_batch_size` rows."""
    groups = config.batch_size // config.num_generations
    batch = make_batch(model, device, groups, config.num_generations, prompt_length, config.gen_length, config)
    update = measured_peak(one_update(model, device, config, batch), device)
    model.zero_grad(set_to_none=True)
    model.eval()
    prompt = torch.randint(3, 100, (config.rollout_batch_size, prompt_length), device=device)
    shape = dict(gen_length=config.gen_length, steps=config.gen_length // config.block_length, block_length=config.block_length)

    def sample():
        with wd1.autocast(config), full_length(model):
            wd1.generate(model, prompt, **shape, temperature=config.temperature)

    return update, measured_peak(sample, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="LLaDA-8B", choices=SHAPES)
    parser.add_argument("--lora_rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no_compile", action="store_true", help="leave out torch.compile, which takes minutes on a CPU")
    parser.add_argument("--out", default="runs/gpu.json")
    arguments = parser.parse_args()
    device, rounds = arguments.device, arguments.rounds
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA GPU; --device cpu --shape small rehearses the script")
    small = arguments.shape != "LLaDA-8B"
    dtype = "float32" if device == "cpu" else "bfloat16"
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    result, begin = {"device": name, "torch": torch.__version__, "shape": arguments.shape, "dtype": dtype}, time.time()

    def note(key, value):
        result[key] = value
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")  # a run that is cut short leaves what it has
        print(f"[{time.time() - begin:.0f} s] {key}", flush=True)

    note("agreement", agreement(device))
    print(result["agreement"])
    base, tokenizer = build(arguments.shape, device, getattr(torch, dtype))
    model = add_adapters(base, arguments.lora_rank, 0, "random weights")
    autocast = functools.partial(wd1.autocast, settings(device, dtype))
    size = dict(batch=6, prompt_length=128, gen_length=128, steps=64, block_length=32)
    if small:
        size |= dict(batch=2, prompt_length=16, gen_length=32, steps=16, block_length=16)
    with autocast():
        note("sampling", bench_sampling(model, device, **size, rounds=rounds))
    show(f"sampling, {size}", result["sampling"], "plain")
    lengths = dict(prompt_length=size["prompt_length"], gen_length=2 * size["gen_length"])
    note("update", bench_update(model, device, rounds, dtype, **lengths, group=6, reference=model))
    show(f"one gradient step, 6 rows, {lengths}", result["update"], "diffu-GRPO")
    step = dict(gen_length=size["gen_length"], diffusion_steps=size["steps"], block_length=size["block_length"], batch_size=12,
                num_generations=6, micro_batch_size=6, rollout_batch_size=12)  # fmt: skip
    note("step", bench_step(model, tokenizer, device, 1, dtype, reference=model, lora_rank=arguments.lora_rank, **step))
    show("one RL step, 2 x 6 completions", result["step"], "diffu-GRPO")

    # Peak memory beside the dry run's estimate; the published micro-batch, then what a 24 GB GPU can do.
    memory, length = {}, 2 * size["gen_length"]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.json"
        file.write_text(json.dumps(shape_config(arguments.shape)))
        cases = {"LoRA": {}, "LoRA, gradient checkpointing": dict(gradient_checkpointing=True)}
        if importlib.util.find_spec("bitsandbytes"):
            cases["4 bits, LoRA, gradient checkpointing"] = dict(gradient_checkpointing=True, load_in_4bit=True)
        for case, options in cases.items():
            config = settings(device, dtype, batch_size=6, num_generations=6, micro_batch_size=6, rollout_batch_size=12,
                              gen_length=length, block_length=32, lora_rank=arguments.lora_rank, model=str(file),
                              diffusion_steps=length // 2, eval_lengths=[length], **options)  # fmt: skip
            config.task = "sudoku"
            estimate = plan(config)
            if config.load_in_4bit:
                four_bit(model)
            if config.gradient_checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            update, sampling = measure_memory(model, config, device, estimate["prompt_tokens"])
            weights = sum(weight.untyped_storage().nbytes() for weight in model.parameters())
            measured = dict(zip(KINDS, (weights / 1e9, update / 1e9, sampling / 1e9)))
            memory[case] = {kind: (measured[kind], estimate[kind]) for kind in KINDS}
            if config.load_in_4bit:
                with autocast():
                    run = one_update(model, device, config, make_batch(model, device, 1, 6, 128, length, config))
                    note("4-bit update", [row("wd1, 4 bits", *[alternate({"x": run}, rounds, device)["x"]] * 2)])
    note("memory", memory)
    print("\n| peak memory, GB: measured (estimated) | weights | update | sampling |\n|---|---|---|---|")
    for case, line in memory.items():
        cells = (f"{line[kind][0]:.2f} ({line[kind][1]:.2f})" for kind in KINDS)
        print(f"| {case} | " + " | ".join(cells) + " |")

    if not arguments.no_compile:
        del model, base
        model, _ = build(arguments.shape, device, getattr(torch, dtype))
        prompt = torch.randint(3, 100, (size["batch"], size["prompt_length"]), device=device)
        shape = {key: size[key] for key in ("gen_length", "steps", "block_length")}
        sample = lambda: wd1.generate(model, prompt, **shape)
        with full_length(model):
            seconds = alternate({"eager": sample}, rounds, device)
            model.get_decoder().compile()
            seconds |= alternate({"compiled": sample}, rounds, device)
        tokens = size["batch"] * size["gen_length"]
        note("compile", [row(name, taken, seconds["eager"], tokens=tokens) for name, taken in seconds.items()])
        show("sampling without adapters", result["compile"], "eager")
    note("seconds", time.time() - begin)


if __name__ == "__main__":
    main()
