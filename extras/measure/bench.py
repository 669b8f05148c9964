"""How fast, and in how much memory: wd1.py beside a plain implementation of the published sampler
and update.

    make bench                                            # ten minutes on two cores

One run on one machine; what is compared takes turns, so that a busy machine slows all of it;
medians of three rounds. Weights are random: time and memory do not depend on them. Memory is that
of the tensors alive at a time, counted as they come and go. Prints a table, and draws it in
assets/bench.png.
"""

import tempfile
from functools import partial
from timeit import timeit
from unittest import mock

import pandas as pd
import torch
import torch.nn.functional as F

import wd1
from extras import train
from extras.measure.harness import bars, settings, table
from extras.scale.plan import CountMemory, write_config

# As in LLaDA-8B the head has 7.4% of the layers' weights, with the first of the vocabularies.
SHAPE = dict(
    d_model=512, n_layers=8, n_heads=8, n_kv_heads=8, mlp_hidden_size=1536, weight_tying=False,
)  # fmt: skip
VOCABULARIES = 3952, 31616, 126464


def build(vocabulary):
    """A model with random weights."""
    with tempfile.TemporaryDirectory() as directory:
        return wd1.load_model(write_config(directory, **SHAPE, embedding_size=vocabulary))[0]


# ------------------------------------------------ the published sampler and update, written plainly


@torch.no_grad()
def plain_generate(model, prompt, gen_length, steps, block_length, temperature=0.0):
    """The reverse process with logits, softmax and noise over the whole canvas."""
    mask_id, length, number = model.config.mask_token_id, prompt.shape[1], gen_length // steps
    canvas = F.pad(prompt, (0, gen_length), value=mask_id)
    for written in range(0, gen_length, number):
        logits = model(canvas).logits
        logits[..., mask_id] = -torch.inf
        noise = -(-torch.rand_like(logits, dtype=torch.float64).log()).log()
        proposal = (logits + temperature * noise).argmax(-1)
        confidence = logits.softmax(-1).gather(-1, proposal[..., None])[..., 0]
        confidence[:, length + (written // block_length + 1) * block_length :] = -torch.inf
        confidence[canvas != mask_id] = -torch.inf
        surest = confidence.topk(number).indices
        canvas.scatter_(1, surest, proposal.gather(1, surest))
    return canvas[:, length:]


def plain_update(model, prompt, completion, gap):
    """The gradient of wd1 with the one-step estimate: logits of all tokens, all rows at once."""
    model.zero_grad()
    canvas = torch.cat([prompt, torch.full_like(completion, model.config.mask_token_id)], 1)
    logits = model(canvas).logits[:, prompt.shape[1] :]
    nats = F.cross_entropy(logits.transpose(1, 2), completion, reduction="none")
    (gap * nats.sum(1)).sum().backward()


# --------------------------------------------------------------------------------------- measuring


def race(functions):
    """A frame of the functions' seconds, and of their speed as a multiple of the first one's. They
    take turns, so that a busy machine slows all of them; medians of three rounds."""
    rows = [[timeit(each, number=1) for each in functions.values()] for _ in range(3)]
    seconds = pd.DataFrame(rows, columns=[*functions])
    speed = seconds.rdiv(seconds.iloc[:, 0], axis=0)
    return pd.DataFrame({"seconds": seconds.median(), "speed": speed.median()})


def generate_ending(model, prompt, **options):
    """wd1.generate where completions end early: half of all tokens are EOS."""
    with mock.patch.object(model.config, "eos_token_id", [*range(2, model.config.vocab_size, 2)]):
        return wd1.generate(model, prompt, **options)


def samplers(model):
    """{name: a function that samples}, all for equally many tokens."""
    model.config.eos_token_id = model.config.mask_token_id  # which is never sampled: none ends
    prompt = torch.randint(2, 9, (4, 128))
    shape = dict(gen_length=192, steps=96, block_length=32, temperature=0.9)
    kinds = {"plain": plain_generate, "exact": wd1.generate}
    kinds["exact, ends in the first block"] = generate_ending
    kinds["dual cache"] = train.sampler(settings("--cache", "dual"))
    return {name: partial(kind, model, prompt, **shape) for name, kind in kinds.items()}


def updates(model, rows=6):
    """{name: a function that computes the gradient of one update}, of the same samples."""
    prompt, completion = torch.randint(2, 9, (rows, 192)).tensor_split([64], 1)
    rollout = wd1.Rollout(prompt, prompt != 0, completion, completion, completion)
    rewards = torch.rand(1, rows)
    w_plus, w_minus = (weights[0] for weights in wd1.group_weights(rewards))
    batch = wd1.Batch([], rollout, [], rewards, w_plus, w_minus)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # AdamW's step is the same for all
    found = {"plain update": partial(plain_update, model, prompt, completion, w_plus - w_minus)}
    for name, size in {"wd1 update": rows, "wd1 update, row by row": 1}.items():
        words = f"--num_generations {rows} --batch_size {rows} --micro_batch_size {size}"
        words += " --likelihood one_step --mc_samples 1 --num_iterations 1"
        found[name] = partial(wd1.learn, model, optimizer, batch, settings(*words.split()))
    return found


def peak(function):
    """The most memory, in MB, that a function's tensors take at a time."""
    with CountMemory() as counted:
        function()
    return counted.peak / 1e6


def main():
    model = build(VOCABULARIES[0])
    found = pd.concat([race(samplers(model)), race(updates(model))])
    for size in VOCABULARIES:
        found[f"MB, V {size:,}"] = pd.Series(updates(build(size))).map(peak)
    print(table(found.map("{:.2f}".format).replace("nan", "")))
    bars(found.drop(columns="seconds"), "assets/bench.png")


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
