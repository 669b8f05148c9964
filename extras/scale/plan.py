"""What a run would cost, before it is run: memory, forward passes, hours.

    python -m extras.scale.plan --model GSAI-ML/LLaDA-8B-Instruct [options of wd1.py]
    python -m extras.scale.plan                 # the README's table: LLaDA-8B's shape

Memory is not guessed from a formula: the functions of the sampler and of the update run once on
tensors that have shapes and no data, and the bytes that would be alive at a time are counted. It
needs neither a GPU nor the weights. Meant is one process that holds them all.
"""

import json
import math
import sys
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wd1

WITHOUT_DATA = FakeTensorMode(allow_non_fake_inputs=True)  # tensors made in it have shapes alone
NF4 = 4.127 / 8  # bytes of a weight in 4 bits with its scales (QLoRA, arXiv 2305.14314)
LLADA_8B = dict(
    d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288, vocab_size=126464,
    embedding_size=126464, max_sequence_length=4096, weight_tying=False,
)  # fmt: skip
TABLE = (
    "--dtype bfloat16",
    "--gradient_checkpointing",
    "--load_in_4bit --micro_batch_size 2",
    "--load_in_4bit --gradient_checkpointing",
    "--lora_rank 0 --gradient_checkpointing",
)


@dataclass(init=False)
class PlanConfig(wd1.Config):
    """The settings of a run, and what else its cost depends on. Its GPU may be elsewhere."""

    # the machine (2 x 8 billion operations a token, at 40% of an H100's 990 TFLOP/s in bfloat16)
    prompt_length: int = 200  # tokens of a prompt
    tokens_per_second: float = 25e3  # that a forward pass takes in, of all GPUs

    program = "python -m extras.scale.plan"

    def __post_init__(self):
        self.device = "cpu"  # for which tensors without data are taken
        self.dtype = self.dtype.replace("auto", "bfloat16")
        super().__post_init__()


class CountMemory(TorchDispatchMode):
    """A context that counts the bytes of tensors made in it: `peak`, the most alive at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = weakref.WeakSet(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.alive |= storages(out) - storages(args, kwargs)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive))
        return out


def storages(*tree):
    leaves = tree_leaves(tree)
    return {leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)}


def without_data(config):
    """The model of a run, adapters included, with shapes and no data."""
    dtype = getattr(torch, config.dtype) if config.lora_rank else torch.float32
    model, _ = wd1.load_model(config.model, device="meta", dtype=dtype)
    if config.lora_rank:
        model = wd1.add_adapters(model, config.lora_rank, config.model)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with WITHOUT_DATA:
        model.to_empty(device="cpu")
    model.tie_weights()
    return model


def update(model, canvas, config):
    """What wd1.learn does, as far as memory goes: two passes, the second with all that stays."""
    completion = torch.arange(config.prompt_length, canvas.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)  # as on a GPU
    model.train()
    for _ in range(2):
        states = wd1.hidden_states(model, canvas, None, completion).flatten(0, 1)
        target = canvas[:, completion].flatten()
        wd1.chunked_log_probs(model.get_output_embeddings(), states, target).sum().backward()
        optimizer.step()


@torch.no_grad()
def denoise(model, canvas, config):
    """A step of wd1.generate."""
    block = torch.arange(config.block_length) + config.prompt_length
    wd1.propose(wd1.predict_logits(model.eval(), canvas, None, block), config.temperature, None)


def memory(config):
    """What a run holds on its GPU, part by part, in GB of 10^9 bytes: a dict."""
    model = without_data(config)
    weights = sum(weight.nbytes for weight in model.parameters())
    for module in model.get_decoder().modules() if config.load_in_4bit else ():
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad:
            weights += module.weight.numel() * NF4 - module.weight.nbytes
    weights *= 1 + (config.beta > 0 and not config.lora_rank)  # the reference is a second model
    moments = 2 * sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    columns, peaks = config.prompt_length + config.gen_length, []
    for function, rows in (update, config.micro_batch_size), (denoise, config.rollout_batch_size):
        with WITHOUT_DATA, CountMemory() as counted, wd1.autocast(config):
            function(model, torch.zeros(rows, columns, dtype=torch.long), config)
        peaks.append(counted.peak)
    found = dict(weights=weights, adam=moments, update=peaks[0] - moments, sampling=peaks[1])
    found["in_all"] = weights + max(peaks[0], moments + peaks[1])
    return {f"{name}_GB": size / 1e9 for name, size in found.items()}


def work(config):
    """The forward passes of a run and, at `tokens_per_second`, its hours: a dict.

    At most: rows that end early are sampled no further, rows that teach nothing are left out. A
    backward pass takes as long as two forward passes; gradient checkpointing adds a third.
    """
    steps, rows = config.max_steps, config.rollout_batch_size
    sampling = config.diffusion_steps * math.ceil(config.batch_size / rows)
    sampling *= 1 + (config.beta > 0)  # the reference has its say
    updates = math.ceil(config.batch_size / config.micro_batch_size)
    updates *= config.mc_samples * config.num_iterations
    learning = 3 + config.gradient_checkpointing
    evaluation = sum((length + 1) // 2 for length in config.eval_lengths)
    evaluation *= math.ceil(config.eval_size / rows)
    evaluations = 1 + math.ceil(steps / (config.eval_every or steps))
    sampled = steps * sampling + evaluations * evaluation
    full = sampled * rows + steps * updates * learning * config.micro_batch_size  # rows passed on
    tokens = full * (config.prompt_length + config.gen_length)
    return {
        "sampling_passes_a_step": sampling,
        "update_passes_a_step": updates,
        "passes_an_evaluation": evaluation,
        "passes_in_all": sampled + steps * updates,
        "hours": tokens / config.tokens_per_second / 3600,
    }


def write_config(directory, **changes):
    """Writes a LLaDA-style config.json, tiny_config.json with changes: its path."""
    tiny = json.loads(Path(wd1.__file__).with_name("tiny_config.json").read_text())
    path = Path(directory) / "config.json"
    path.write_text(json.dumps(tiny | changes))
    return str(path)


def main(argv=None):
    parse = lambda words: wd1.parse_arguments(words, PlanConfig)
    if argv := argv or sys.argv[1:]:
        config = parse(argv)
        print(json.dumps(memory(config) | work(config), indent=2))
        return
    print("| LLaDA-8B, prompts of 200 tokens, GB | weights | Adam | update | sampling | in all |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        file = write_config(directory, **LLADA_8B)
        for options in TABLE:
            found = memory(parse(["--model", file, *options.split()]))
            print(f"| `{options}` |", *(f"{size:.1f} |" for size in found.values()), flush=True)


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
