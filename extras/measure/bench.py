"""How fast, and in how much memory: wd1.py beside a plain implementation of the published sampler
and update.

    make bench                                            # 20 minutes on two cores
    python -m extras.measure.bench --rounds 5             # medians of more

One run on one machine; what is compared takes turns, so that a busy machine slows all of it.
Weights are random: time and memory do not depend on them. Memory is that of the tensors alive at a
time, counted as they come and go. Writes assets/bench.json; table and picture are made from it.
"""

import argparse
import copy
import tempfile
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

import wd1
from extras import train
from extras.measure.harness import race, settings, table
from extras.methods.objectives import RatioBatch, learn_grpo
from extras.scale.plan import CountMemory, write_config
from extras.watch.pictures import figure, save

OUT = Path("assets/bench.json")
# As in LLaDA-8B the head has 7.4% of the layers' weights, with the first of the vocabularies.
SHAPE = dict(d_model=512, n_layers=8, n_heads=8, n_kv_heads=8, mlp_hidden_size=1536)
VOCABULARIES = 3952, 31616, 126464
BARS = {
    "exact": "speed at least 1.1",
    "dual cache": "speed at least 5",
    "exact, ends in the first block": "speed at least 2",
    "wd1 update": "speed at least 1.5",
    "wd1 update, row by row": "memory at most 0.5 of plain",
}


def build(vocabulary=VOCABULARIES[0], **shape):
    """A model with random weights."""
    sizes = SHAPE | shape | dict(vocab_size=vocabulary, embedding_size=vocabulary)
    with tempfile.TemporaryDirectory() as directory:
        path = write_config(directory, weight_tying=False, max_sequence_length=4096, **sizes)
        return wd1.load_model(path)[0]


# ------------------------------------------------ the published sampler and update, written plainly


@torch.no_grad()
def plain_generate(model, prompt, gen_length, steps, block_length, temperature=0.0):
    """The reverse process with logits, softmax and noise over the whole canvas, row by row."""
    mask_id, length = model.config.mask_token_id, prompt.shape[1]
    canvas = F.pad(prompt, (0, gen_length), value=mask_id)
    for end in range(length + block_length, canvas.shape[1] + 1, block_length):
        for _ in range(steps * block_length // gen_length):
            logits = model(canvas).logits
            logits[..., mask_id] = -torch.inf
            noise = -(-torch.rand_like(logits, dtype=torch.float64).log()).log()
            proposal = (logits + temperature * noise).argmax(-1)
            confidence = logits.softmax(-1).gather(-1, proposal[..., None])[..., 0]
            confidence[:, end:] = -torch.inf
            confidence[canvas != mask_id] = -torch.inf
            for row, sure in enumerate(confidence):
                chosen = sure.topk(gen_length // steps).indices
                canvas[row, chosen] = proposal[row, chosen]
    return canvas[:, length:]


def plain_update(model, prompt, completion, gap):
    """The gradient of wd1 with the one-step estimate: logits of all tokens, all rows at once."""
    model.zero_grad()
    canvas = torch.cat([prompt, torch.full_like(completion, model.config.mask_token_id)], 1)
    logits = model(canvas).logits[:, prompt.shape[1] :]
    nats = F.cross_entropy(logits.transpose(1, 2), completion, reduction="none")
    (gap * nats.sum(1)).sum().backward()


# --------------------------------------------------------------------------------------- measuring


def sampling(model, rounds, batch=4, prompt_length=128, **shape):
    """A frame of the seconds that samplers take for the same tokens."""
    prompt = torch.randint(3, 100, (batch, prompt_length))
    samplers = {"plain": plain_generate, "exact": wd1.generate}
    for kind in ("prefix", "dual"):
        samplers[f"{kind} cache"] = train.sampler(settings("--cache", kind))
    functions = {
        name: partial(generate, model, prompt, temperature=0.9, **shape)
        for name, generate in samplers.items()
    }
    vocabulary, parts = model.config.vocab_size, []
    # EOS is a token that is never sampled, and then every fourth of those that are.
    never, often = model.config.mask_token_id, list(range(0, vocabulary, 4))
    for ending, eos in ("", never), (", ends in the first block", often):
        model.config.eos_token_id = eos
        parts.append(race(functions, rounds).rename(f"{{}}{ending}".format))
    return pd.concat(parts)


def updates(model, rows=6, prompt_length=64, gen_length=128):
    """{name: a function that computes the gradient of one update}, of the same samples."""
    torch.manual_seed(0)
    canvas = torch.randint(3, 100, (rows, prompt_length + gen_length))
    prompt, completion = canvas.tensor_split([prompt_length], 1)
    rollout = wd1.Rollout(prompt, None, completion, completion, torch.ones(completion.shape))
    rewards = torch.rand(1, rows)
    w_plus, w_minus = (weights[0] for weights in wd1.group_weights(rewards))
    batch = wd1.Batch([], rollout, [], rewards, w_plus, w_minus)
    with_reference = RatioBatch(**vars(batch), reference=copy.deepcopy(model))
    words = "--likelihood one_step --mc_samples 1 --num_iterations 1 --objective diffu-grpo"
    words = f"{words} --num_generations {rows} --batch_size {rows} --micro_batch_size"
    whole, one = (settings(*f"{words} {size}".split()) for size in (rows, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # AdamW's step is the same for all
    return {
        "diffu-GRPO update": partial(learn_grpo, model, optimizer, with_reference, whole),
        "plain update": partial(plain_update, model, prompt, completion, w_plus - w_minus),
        "wd1 update": partial(wd1.learn, model, optimizer, batch, whole),
        "wd1 update, row by row": partial(wd1.learn, model, optimizer, batch, one),
    }


def peaks(functions):
    """The most memory, in MB, that each function's tensors take at a time."""
    found = {}
    for name, function in functions.items():
        with CountMemory() as counted:
            function()
        found[name] = counted.peak / 1e6
    return pd.Series(found)


def report(found):
    """Prints the table of what was found, a row each, and draws it."""
    shown = found.map("{:.3g}".format).assign(bar=found.index.map(BARS))
    print(table(shown.replace("nan", "").fillna("")))
    sheet, places = figure(1, 2, size=(7, 4))
    left, right = places.flat
    found.speed[::-1].plot.barh(ax=left, title="speed, as a multiple of the first of its kind")
    left.bar_label(left.containers[0], fmt=" %.2f")
    memory = found.filter(like="MB").dropna().T
    memory.plot(ax=right, title="memory of an update above the weights", style="o-")
    save(sheet, OUT.with_suffix(".png"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    samplers = sampling(build(), rounds, gen_length=192, steps=96, block_length=32)
    found = pd.concat([samplers, race(updates(build()), rounds)])
    for size in VOCABULARIES:
        found[f"MB, V {size:,}"] = peaks(updates(build(size)))
    found.to_json(OUT, orient="index", indent=1)
    report(pd.read_json(OUT, orient="index"))


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
