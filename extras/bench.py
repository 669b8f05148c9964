"""How fast, and in how much memory: wd1.py beside a plain implementation of the published sampler and update.

    make bench                                         # about 25 minutes on two cores
    python -m extras.bench --peer DIR                  # and beside the `generate` of a checkout of LLaDA's repository
    python -m extras.bench --only step --rounds 4      # one part of it

One run on one machine; what is compared takes turns, so that a busy machine slows all of it; medians, with the fastest and
slowest. Weights are random: time and memory do not depend on them, except for a threshold's, which is said where it matters.
Writes a JSON file and a picture.
"""

import argparse
import copy
import functools
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

import wd1
from extras.memory import measured_peak
from rewards import TASKS

ROOT = Path(__file__).resolve().parents[1]
# hidden size, layers, heads, MLP size, vocabulary. In `mid` as in LLaDA-8B the head has 7.4% of the layers' weights.
SHAPES = {
    "tiny": (64, 3, 2, 128, 128), "small": (256, 4, 4, 768, 1976), "mid": (512, 8, 8, 1536, 3952),
    "LLaDA-8B": (4096, 32, 32, 12288, 126464),
}  # fmt: skip
BARS = {  # what: (at least, or at most if negative)
    "exact sampling, full-length completions": 1.1, "exact sampling, completions that end in their first quarter": 2.0,
    "dual cache": 5.0, "peak memory of the update, of the plain one's": -0.5, "update, against diffu-GRPO": 1.5,
}  # fmt: skip


def shape_config(shape):
    """The LLaDA-style config.json of a shape."""
    hidden, layers, heads, mlp, vocabulary = SHAPES[shape]
    return json.loads((ROOT / "tiny_config.json").read_text()) | dict(
        d_model=hidden, n_layers=layers, n_heads=heads, n_kv_heads=heads, mlp_hidden_size=mlp, vocab_size=vocabulary,
        embedding_size=vocabulary, weight_tying=False, max_sequence_length=4096,
    )  # fmt: skip


def build(shape, device="cpu", dtype=torch.float32, **changes):
    """A model with random weights of a shape, and its tokenizer."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.json"
        file.write_text(json.dumps(shape_config(shape) | changes))
        return wd1.load_model(file, device=device, dtype=dtype)


# ------------------------------------------------------------------------- the published sampler and update, written plainly


@torch.no_grad()
def plain_generate(model, prompt, gen_length, steps, block_length, temperature):
    """The reverse process with logits, softmax and noise over the whole canvas, and a loop over rows."""
    mask_id, length = model.config.mask_token_id, prompt.shape[1]
    canvas = torch.cat([prompt, torch.full((len(prompt), gen_length), mask_id, device=prompt.device)], 1)
    blocks = gen_length // block_length
    per_block = steps // blocks
    for block in range(blocks):
        end = length + (block + 1) * block_length
        for step in range(per_block):
            count = block_length // per_block + (step < block_length % per_block)
            logits = model(canvas).logits
            logits[..., mask_id] = -torch.inf
            noise = -(-torch.rand_like(logits, dtype=torch.float64).log()).log()
            proposal = (logits.double() / temperature + noise).argmax(-1) if temperature else logits.argmax(-1)
            confidence = logits.float().softmax(-1).gather(-1, proposal[..., None])[..., 0]
            confidence[:, end:] = -torch.inf
            confidence = confidence.masked_fill(canvas != mask_id, -torch.inf)
            for row in range(len(canvas)):
                chosen = confidence[row].topk(count).indices
                canvas[row, chosen] = proposal[row, chosen]
    return canvas[:, length:]


def plain_update(model, prompt, completion, gap):
    """One wd1 update with the one-step estimate: float32 logits of the whole canvas, all rows at once."""
    canvas = torch.cat([prompt, torch.full_like(completion, model.config.mask_token_id)], 1)
    log_probs = model(canvas).logits.float().log_softmax(-1)[:, prompt.shape[1] :]
    log_p = log_probs.gather(-1, completion[..., None])[..., 0].sum(-1)
    (-(gap * log_p).sum()).backward()


def peer_generate(directory):
    """The `generate` of LLaDA's generate.py in a local checkout, called with our model, whose logits it takes as its own."""
    [file, *_] = [*Path(directory).rglob("generate.py")] or [None]
    if file is None:
        raise SystemExit(f"--peer {directory}: there is no generate.py")
    spec = importlib.util.spec_from_file_location("peer", file)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)

    def run(model, prompt, gen_length, steps, block_length, temperature):
        options = dict(steps=steps, gen_length=gen_length, block_length=block_length, temperature=temperature)
        return peer.generate(model, prompt, **options, mask_id=model.config.mask_token_id)[:, prompt.shape[1] :]

    return run


# -------------------------------------------------------------------------------------------------------------- measuring


def alternate(functions, rounds, device="cpu", warm_up=True):
    """{name: seconds of each of `rounds` calls}, after one of each that does not count; the functions take turns."""
    seconds = {name: [] for name in functions}
    for turn in range(-warm_up, rounds):
        for name, function in functions.items():
            wait(device)
            begin = time.perf_counter()
            function()
            wait(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def wait(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def row(name, seconds, base, **more):
    """A line of a table: the median, its spread, and the median of the ratios to what was timed just before or after it."""
    ratio = median(b / s for b, s in zip(base, seconds))
    return {"name": name, "seconds": median(seconds), "fastest": min(seconds), "slowest": max(seconds), "speed": ratio, **more}


@contextmanager
def full_length(model):
    """A context in which no completion ends early: EOS is a token that is never sampled."""
    eos, model.config.eos_token_id = model.config.eos_token_id, model.config.mask_token_id
    yield
    model.config.eos_token_id = eos


def ending_in(model, column):
    """A hook that makes the model write EOS from a column of the canvas on, as if completions ended there."""
    head, eos = model.get_output_embeddings().weight, model.config.eos_token_id

    def hook(_, inputs, output):
        if output.last_hidden_state.shape[1] > column:
            output.last_hidden_state[:, column:] = head[eos] * 1e3

    return model.get_decoder().register_forward_hook(hook)


def bench_sampling(model, device, batch, prompt_length, gen_length, steps, block_length, rounds, peer=None, temperature=0.9):
    """Rows of tokens a second: exact sampling, caches, and a threshold that a sharpened model passes about as often as not."""
    torch.manual_seed(0)
    prompt = torch.randint(3, 100, (batch, prompt_length), device=device)
    shape = dict(gen_length=gen_length, steps=steps, block_length=block_length, temperature=temperature)
    def samplers(options):
        return {name: lambda option=option: wd1.generate(model, prompt, **shape, **option) for name, option in options.items()}

    def lines(seconds, base, scale=1.0, **more):
        found = [row(name, taken, seconds[base], tokens=batch * gen_length, **more) for name, taken in seconds.items()]
        return [line | {"speed": line["speed"] * scale} for line in found]

    functions = {"plain": lambda: plain_generate(model, prompt, **shape)}
    functions |= samplers({"exact": {}, "prefix cache": dict(cache="prefix"), "dual cache": dict(cache="dual")})
    if peer:
        functions["peer: LLaDA's generate"] = lambda: peer(model, prompt, **shape)
    norm = model.get_decoder().norm.weight
    blunt = norm.detach().clone()
    once = dict(gen_length=block_length, steps=1, block_length=block_length)
    wd1.generate(model, prompt, **once)  # warm up; a whole sample of each on a CPU would take minutes
    timed = functools.partial(alternate, rounds=rounds, device=device, warm_up=device != "cpu")
    with full_length(model):
        rows = lines(timed(functions), "plain")
        for _ in range(20):  # sharpen the model until a step writes about three tokens instead of two
            norm.data.mul_(1.3)
            taken = wd1.generate(model, prompt, **shape, threshold=0.9, cache="dual").steps.float().mean().item()
            if taken < steps * 2 / 3:
                break
        fast = {"threshold 0.9": dict(threshold=0.9), "dual cache, threshold 0.9": dict(threshold=0.9, cache="dual")}
        sharp = samplers({"exact": {}, **fast})
        rows += lines(timed(sharp), "exact", rows[1]["speed"], denoising_steps=taken)[1:]
        norm.data.copy_(blunt)
    hook = ending_in(model, prompt_length + gen_length // 4 - 1)
    functions = {"plain, ends in a quarter": functions["plain"], "exact, ends in a quarter": functions["exact"]}
    rows += lines(timed(functions), "plain, ends in a quarter")
    hook.remove()
    return rows


def make_batch(model, device, groups, group, prompt_length, gen_length, config):
    """A rollout of random completions with unequal rewards, and its weights: what `learn` takes."""
    torch.manual_seed(0)
    rows = groups * group
    prompt = torch.randint(3, 100, (rows, prompt_length), device=device)
    completion = torch.randint(3, 100, (rows, gen_length), device=device)
    written_at = torch.randint(config.diffusion_steps, (rows, gen_length), device=device)
    steps = torch.full((rows,), config.diffusion_steps, device=device)
    rollout = wd1.Rollout(prompt, None, completion, written_at, torch.ones(rows, gen_length, device=device), steps)
    rewards = torch.rand(groups, group, device=device)
    return rollout, rewards, tuple(weights.view(rows, 1) for weights in wd1.group_weights(rewards))


def settings(device, dtype="float32", **options):
    """A Config for the functions of the loop; beta is 0 unless the objective is diffu-GRPO."""
    grpo = options.get("objective") == "diffu-grpo"
    fixed = dict(device=device, dtype=dtype, task="chance", num_iterations=1, lora_rank=0, beta=0.04 if grpo else 0.0)
    return wd1.Config(**fixed | options)


class Forgetful(torch.optim.SGD):
    """Leaves the weights as they are, so that a call can be repeated; AdamW's own time is the same for every objective."""

    def step(self):
        pass


def one_update(model, device, config, batch, reference=None):
    """A function that runs one gradient step of `learn`."""
    optimizer = Forgetful([weight for weight in model.parameters() if weight.requires_grad])

    def run():
        with wd1.autocast(config):
            wd1.learn(model, reference, optimizer, *batch, config)

    return run


def bench_update(model, device, rounds, dtype="float32", prompt_length=64, gen_length=128, groups=1, group=6, reference=None):
    """Rows of one gradient step on the same samples: plain, wd1, diffu-GRPO (with its old and reference passes).

    reference: None for a copy of the model; a LoRA model is its own.
    """
    reference = reference or copy.deepcopy(model)
    size = dict(batch_size=groups * group, num_generations=group, gen_length=gen_length, micro_batch_size=group)
    wd1_config, grpo = settings(device, dtype, **size), settings(device, dtype, objective="diffu-grpo", **size)
    batch = make_batch(model, device, groups, group, prompt_length, gen_length, wd1_config)
    gap = (batch[2][0] - batch[2][1])[:, 0] / groups

    def plain():
        model.zero_grad()
        with wd1.autocast(wd1_config):
            plain_update(model, batch[0].prompt, batch[0].completion, gap)

    functions = {"plain wd1": plain, "wd1": one_update(model, device, wd1_config, batch),
                 "diffu-GRPO": one_update(model, device, grpo, batch, reference)}  # fmt: skip
    seconds = alternate(functions, rounds, device)
    return [row(name, taken, seconds["diffu-GRPO"]) for name, taken in seconds.items()]


class Chance:
    """A task whose rewards are random: every group has something to learn."""

    def __init__(self):
        self.reward = lambda *_: random.random()


def bench_step(model, tokenizer, device, rounds, dtype="float32", reference=None, **size):
    """Rows of one whole RL step, sampling and one gradient step, with the forward passes counted. reference: as there."""
    TASKS["chance"], passes = Chance(), []
    reference = reference or copy.deepcopy(model)
    hooks = [network.get_decoder().register_forward_pre_hook(lambda *_: passes.append(1)) for network in {model, reference}]
    objectives = {"wd1": {}, "wd1++": dict(mc_samples=4, block_length=size["gen_length"]), "diffu-GRPO": {}}
    functions, counts = {}, {}
    for name, options in objectives.items():
        config = settings(device, dtype, objective=name.lower(), **{**size, **options})
        examples = [{"prompt": f"{i} " * 16} for i in range(config.batch_size // config.num_generations)]
        rows = [example for example in examples for _ in range(config.num_generations)]
        optimizer = Forgetful([weight for weight in model.parameters() if weight.requires_grad])

        def run(config=config, rows=rows, optimizer=optimizer, name=name):
            passes.clear()
            with wd1.autocast(config):
                rollout, _, rewards, weights = wd1.collect(model, tokenizer, None, rows, config, (0,))
                wd1.learn(model, reference if name == "diffu-GRPO" else None, optimizer, rollout, rewards, weights, config)
            counts[name] = len(passes)

        functions[name] = run
    with full_length(model):
        seconds = alternate(functions, rounds, device)
    for hook in hooks:
        hook.remove()
    del TASKS["chance"]
    return [row(name, taken, seconds["diffu-GRPO"], forward_passes=counts[name]) for name, taken in seconds.items()]


def memory_rows(cases, device="cpu"):
    """Peak memory above the weights, in MB, of an update: {name: MB}, each case (shape, changes, plain?, L, rows, options)."""
    found = {}
    for name, (shape, changes, plain, gen_length, rows, options) in cases.items():
        model, _ = build(shape, device, **changes)
        if options.pop("gradient_checkpointing", False):
            model.activation_checkpointing_enable({"use_reentrant": False})
        options = dict(batch_size=rows, num_generations=rows, gen_length=gen_length, micro_batch_size=rows) | options
        config = settings(device, **options)
        batch = make_batch(model, device, 1, rows, 64, gen_length, config)
        model.train()
        with torch.no_grad():
            model(batch[0].prompt[:1])  # what libraries set up once
        gap = (batch[2][0] - batch[2][1])[:, 0]
        update = one_update(model, device, config, batch)
        if plain:
            update = functools.partial(plain_update, model, batch[0].prompt, batch[0].completion, gap)
        found[name] = measured_peak(update, device) / 1e6
    return found


def memory_cases():
    checkpointed = dict(gradient_checkpointing=True)
    cases = {
        "mid: plain": ("mid", {}, True, 128, 6, {}), "mid: wd1": ("mid", {}, False, 128, 6, {}),
        "mid: wd1, micro-batches of 1": ("mid", {}, False, 128, 6, dict(micro_batch_size=1)),
        "mid: wd1, gradient checkpointing": ("mid", {}, False, 128, 6, dict(checkpointed)),
    }  # fmt: skip
    for gen_length in (64, 128, 256, 512):
        for plain in (True, False):
            changes = dict(vocab_size=32000, embedding_size=32000)
            cases[f"L {gen_length}: {'plain' if plain else 'wd1'}"] = ("small", changes, plain, gen_length, 6, {})
    for vocabulary in (1976, 8000, 32000, 126464):
        for plain in (True, False):
            changes = dict(vocab_size=vocabulary, embedding_size=vocabulary)
            cases[f"V {vocabulary}: {'plain' if plain else 'wd1'}"] = ("small", changes, plain, 128, 6, {})
    return cases


def bench_growth(rounds):
    """How time grows, on the small shape: seconds of exact sampling and of an update as L, steps, batch and G grow."""
    model, _ = build("small")
    base, lines = dict(gen_length=64, steps=32, batch=4), []
    for what, values in (("gen_length", (32, 64, 128, 256)), ("steps", (16, 32, 64)), ("batch", (2, 4, 8, 16))):
        for value in values:
            size = {**base, what: value}
            size["steps"] = size["gen_length"] // 2 if what == "gen_length" else size["steps"]
            prompt = torch.randint(3, 100, (size["batch"], 64))
            shape = dict(gen_length=size["gen_length"], steps=size["steps"], block_length=32, temperature=0.9)
            functions = {"plain": lambda: plain_generate(model, prompt, **shape),  # noqa: B023
                         "wd1": lambda: wd1.generate(model, prompt, **shape)}  # noqa: B023  # fmt: skip
            with full_length(model):
                seconds = alternate(functions, rounds)
            lines += [row(name, taken, seconds["plain"], grows=what, value=value) for name, taken in seconds.items()]
    for group in (2, 4, 8, 16):
        for line in bench_update(model, "cpu", rounds, group=group, gen_length=64):
            lines.append(line | {"grows": "G", "value": group})
    return lines


# -------------------------------------------------------------------------------------------------------------- reporting


def show(title, rows, base):
    """Prints a markdown table of rows."""
    extra = [name for name in ("tokens", "denoising_steps", "forward_passes") if any(name in line for line in rows)]
    heads = {"tokens": "tokens/s", "denoising_steps": "denoising steps", "forward_passes": "forward passes"}
    print(f"\n| {title} | seconds (fastest to slowest) | speed, {base} = 1 |" + "".join(f" {heads[name]} |" for name in extra))
    print("|---|---|---|" + "---|" * len(extra))
    for line in rows:
        cells = [f"{line['tokens'] / line['seconds']:.0f}" if name == "tokens" else f"{line[name]:.0f}" if name in line else ""
                 for name in extra]  # fmt: skip
        spread = f"{line['seconds']:.3g} ({line['fastest']:.3g} to {line['slowest']:.3g})"
        print(f"| {line['name']} | {spread} | {line['speed']:.2f} |" + "".join(f" {cell} |" for cell in cells), flush=True)


def draw(result, out):
    """The picture: tokens a second, and memory against L and V."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), dpi=130)
    rows = [line for line in result["sampling"] if "quarter" not in line["name"]]
    left.barh([line["name"] for line in rows][::-1], [line["tokens"] / line["seconds"] for line in rows][::-1], color="C0")
    left.set(title="sampling, tokens per second")
    for axes, key, label in ((middle, "L", "completion length L"), (right, "V", "vocabulary V")):
        for kind, color in (("plain", "C1"), ("wd1", "C0")):
            points = [(int(name.split()[1].rstrip(":")), value) for name, value in result["memory"].items()
                      if name.startswith(f"{key} ") and name.endswith(kind)]  # fmt: skip
            axes.plot(*zip(*points), "o-", label=kind, color=color)
        axes.set(title="peak memory of an update, MB", xlabel=label, ylim=0)
        axes.legend(frameon=False)
    right.set_xscale("log")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out)


def memory_part(result, rounds, peer):
    """In a process of its own, whose allocator gives back at once what is freed."""
    command, environment = [sys.executable, "-m", "extras.bench", "--in_this_process"], {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(done.stderr)
    result["memory"] = json.loads(done.stdout.splitlines()[-1])
    print("| update, peak memory above the weights | MB |\n|---|---|")
    for name, value in result["memory"].items():
        print(f"| {name} | {value:.0f} |")


def sampling_part(result, rounds, peer):
    size = dict(batch=4, prompt_length=128, gen_length=192, steps=96, block_length=32)
    result["sampling"] = bench_sampling(build("mid")[0], "cpu", **size, rounds=rounds, peer=peer)
    show("sampling, mid-size, B 4, P 128, L 192, T 96, blocks of 32", result["sampling"], "plain")


def update_part(result, rounds, peer):
    result["update"] = bench_update(build("mid")[0], "cpu", rounds)
    show("one gradient step, mid-size, 6 rows, P 64, L 128", result["update"], "diffu-GRPO")


def step_part(result, rounds, peer):
    size = dict(gen_length=64, diffusion_steps=32, block_length=32, batch_size=4, num_generations=4, micro_batch_size=4)
    result["step"] = bench_step(*build("mid"), "cpu", rounds, **size)
    show("one RL step, mid-size, a group of 4, L 64, T 32", result["step"], "diffu-GRPO")


def growth_part(result, rounds, peer):
    result["growth"] = bench_growth(rounds)
    for what in dict.fromkeys(line["grows"] for line in result["growth"]):
        lines = [line for line in result["growth"] if line["grows"] == what]
        lines = [line | {"name": f"{what} {line['value']}: {line['name']}"} for line in lines]
        show(f"small shape, as {what} grows", lines, "diffu-GRPO" if what == "G" else "plain")


PARTS = {"memory": memory_part, "sampling": sampling_part, "update": update_part, "step": step_part, "growth": growth_part}


def check_bars(result):
    """Prints what was to be reached beside what was measured."""
    speed, memory = {line["name"]: line["speed"] for part in ("sampling", "update") for line in result[part]}, result["memory"]
    found = (speed["exact"], speed["exact, ends in a quarter"], speed["dual cache"],
             memory["mid: wd1, micro-batches of 1"] / memory["mid: plain"], speed["wd1"])  # fmt: skip
    result["bars"] = dict(zip(BARS, found))
    print("\n| bar, mid-size | needed | measured |\n|---|---|---|")
    for name, bar in BARS.items():
        value = result["bars"][name]
        met = value >= bar if bar > 0 else value <= -bar
        print(f"| {name} | {'at least' if bar > 0 else 'at most'} {abs(bar)} | {value:.2f}{'' if met else ', MISSED'} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a local checkout of LLaDA's repository, to be timed as well")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", default="runs/bench", help="path of the .json and .png, without the ending")
    parser.add_argument("--only", choices=PARTS, help="one part, printed and not written")
    parser.add_argument("--in_this_process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_this_process:
        print(json.dumps(memory_rows(memory_cases())))
        return
    peer, out = peer_generate(arguments.peer) if arguments.peer else None, Path(arguments.out)
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    for part in [arguments.only] if arguments.only else PARTS:
        PARTS[part](result, arguments.rounds, peer)
    if arguments.only:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    check_bars(result)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
