"""What a run would cost, before it is run: memory, forward passes, hours.

    python -m extras.scale.plan --model GSAI-ML/LLaDA-8B-Instruct [options of wd1.py]
    python -m extras.scale.plan                 # the README's table: LLaDA-8B's shape

Memory is not guessed from a formula: the functions of the sampler and of the update run once on
tensors that have shapes and no data, and the bytes that would be alive at a time are counted. It
needs neither a GPU nor the weights. Meant is one process that holds them all.
"""

import json
import math
import tempfile
import weakref
from pathlib import Path
from typing import ClassVar, Optional

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wd1

WITHOUT_DATA = FakeTensorMode(allow_non_fake_inputs=True)  # tensors made in it have shapes alone
NF4 = 4.127 / 8  # bytes of a weight in 4 bits with its scales (QLoRA, arXiv 2305.14314)
LLADA_8B = dict(
    d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288,
    embedding_size=126464, weight_tying=False,
)  # fmt: skip
TABLE = """\
--dtype bfloat16
--gradient_checkpointing
--load_in_4bit --micro_batch_size 2
--load_in_4bit --gradient_checkpointing
--lora_rank 0 --gradient_checkpointing"""


class PlanConfig(wd1.Config):
    """The settings of a run, and what else its cost depends on. Its GPU may be elsewhere."""

    model: Optional[wd1.Text] = None  # hub id, directory, or config.json; without: the README's table
    # the machine (LLaDA-8B on an H100: measured by extras/scale/gpu.py)
    prompt_length: wd1.Size = 200  # tokens of a prompt
    tokens_per_second: wd1.Strength = 27e3  # that a forward pass takes in, of all GPUs

    program: ClassVar[str] = "python -m extras.scale.plan"

    def check(self):
        self.device = "cpu"  # for which tensors without data are taken
        self.dtype = self.dtype.replace("auto", "bfloat16")
        super().check()


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
    return {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


def without_data(config):
    """The model of a run, adapters included, with shapes and no data."""
    dtype = getattr(torch, config.dtype) if config.lora_rank else torch.float32
    model, _ = wd1.load_model(config.model, device="meta", dtype=dtype)
    if config.lora_rank:
        model = wd1.add_adapters(model, config.lora_rank)
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
    block = torch.arange(config.block_length)
    wd1.propose(wd1.predict_logits(model.eval(), canvas, None, block), config.temperature, None)


def memory(config):
    """What a run holds on its GPU, part by part, in GB of 10^9 bytes: a dict."""
    model, weights, moments, peaks = without_data(config), 0, 0, []
    for name, weight in model.named_parameters():
        in_4bit = config.load_in_4bit and "_proj.weight" in name.replace(".base_layer", "")
        weights += (weight.numel() * NF4 if in_4bit else weight.nbytes) / 1e9
        moments += 2 * weight.nbytes * weight.requires_grad / 1e9
    weights *= 1 + (config.beta > 0 and not config.lora_rank)  # the reference is a second model
    columns = config.prompt_length + config.gen_length
    for function, rows in (update, config.micro_batch_size), (denoise, config.rollout_batch_size):
        with WITHOUT_DATA, CountMemory() as counted, wd1.autocast(config):
            function(model, torch.zeros(rows, columns, dtype=torch.long), config)
        peaks.append(counted.peak / 1e9)
    learning, sampling = peaks
    found = dict(weights=weights, adam=moments, update=learning - moments, sampling=sampling)
    return found | {"in all": weights + max(learning, moments + sampling)}


def work(config):
    """The forward passes of a run and, at `tokens_per_second`, its hours: a dict.

    At most: rows that end early are sampled no further, rows that teach nothing are left out. A
    backward pass takes as long as two forward passes; gradient checkpointing adds a third.
    """
    rows = config.max_steps * config.batch_size
    sampled = rows * config.diffusion_steps  # counted in rows, as are `learned` and `evaluated`
    sampled *= 1 + (config.beta > 0)  # the reference has its say
    learned = rows * config.num_iterations * config.mc_samples
    tokens = sampled + learned * (3 + config.gradient_checkpointing)
    tokens *= config.prompt_length + config.gen_length
    evaluations = 1 + math.ceil(config.max_steps / (config.eval_every or config.max_steps))
    evaluated = 0
    for length in config.eval_lengths:
        part = evaluations * config.eval_size * ((length + 1) // 2)
        evaluated += part
        tokens += part * (config.prompt_length + length)
    passes = (sampled + evaluated) / config.rollout_batch_size + learned / config.micro_batch_size
    return {"passes": round(passes), "hours": tokens / config.tokens_per_second / 3600}


def write_config(directory, **changes):
    """Writes a LLaDA-style config.json, tiny_config.json with changes: its path."""
    path = Path(directory, "config.json")
    path.write_text(json.dumps(wd1.read_json(wd1.TINY) | changes))
    return str(path)


def main(argv=None):
    config = wd1.parse_arguments(argv, PlanConfig)
    if config.model:
        print(json.dumps({"GB": memory(config), **work(config)}, indent=2))
        return
    print("| LLaDA-8B, prompts of 200 tokens, GB | weights | Adam | update | sampling | in all |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        model = ["--model", write_config(directory, **LLADA_8B)]
        for options in TABLE.splitlines():
            found = memory(wd1.parse_arguments(model + options.split(), PlanConfig))
            print(f"| `{options}` |", *(f"{size:.1f} |" for size in found.values()), flush=True)


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
