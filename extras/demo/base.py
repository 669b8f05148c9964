"""The demo's base models: they can solve the problems of a task, and rarely answer as asked.

RL on a language model brings out what pretraining left in it. To show that honestly on a laptop we
need models like that: they are pretrained, with the same `elbo` that RL uses, on problems whose
answers are written as asked only some of the time. Sudokus are otherwise written column by column;
countdown's expressions, `+3 +9 -5`, otherwise as equations, `+3 +9 -5 =7`, which are no
expressions. The skill is there; the wish is not. Problems of the test split never occur in the
corpus. RL is then told nothing but the reward.

    python -m extras.demo.base [sudoku | countdown] [--seed K]    # makes or finds it, says where

The tiny model does sums of numbers up to 9 only: the directory of its countdown base has
problems.jsonl, which the demo takes if it is not given other --data.
"""

import argparse
import contextlib
import hashlib
import inspect
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import wd1
from rewards import TASKS, InputError


def sudokus(rng, blanks, size):
    """`size` triples (problem, its answer as asked, the answer in another form, by columns)."""
    for example in TASKS["sudoku"].puzzles("train", rng, blanks, size):
        grid = example["solution"]
        yield example, grid, "".join(grid[column::4] for column in range(4))


def sums(rng, blanks, size, split="train"):
    """The same for countdown: numbers up to 9 that + and - carry to the target; or an equation."""
    while size:
        numbers, signs = rng.integers(1, 10, 3), rng.choice([1, -1], 3)
        example = {"nums": numbers.tolist(), "target": int(numbers @ signs)}
        if example["target"] > 0 and TASKS["countdown"].is_test(example) == (split == "test"):
            terms = [f"{term:<+3} " for term in signs * numbers]
            expression = "".join(terms)
            yield example, f"{expression:<16}", f"{expression}={example['target']:<3}"
            size -= 1


CORPORA = {"sudoku": (sudokus, 0.3), "countdown": (sums, 0.4)}  # the fraction that is as asked


def corpus(task, rng, blanks, size):
    """`size` pairs (prompt, completion) on training problems."""
    source, as_asked = CORPORA[task]
    for example, answer, other in source(rng, blanks, size):
        prompt = TASKS[task].instruction + TASKS[task].question(example)
        yield prompt, f"<answer>{answer if rng.random() < as_asked else other}</answer><|eos|>"


def pretrain(task, seed, blanks, steps):
    """Masked-diffusion pretraining of the tiny model, on 128 new problems a step: as load_model."""
    model, tokenizer = wd1.load_model("tiny", seed=seed)
    rng = np.random.default_rng([seed, blanks])
    torch.manual_seed(seed)
    # Muon for the matrices, AdamW for the rest: in two minutes it gets where AdamW alone does not
    # in ten.
    matrices, others = [], []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and "embed" not in name else others).append(weight)
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0),
    ]
    schedulers = [transformers.get_scheduler("cosine", part, 30, steps) for part in optimizers]
    bar = tqdm(range(steps), f"pretraining the tiny {task} base")
    for _ in bar:
        prompts, answers = zip(*corpus(task, rng, blanks, 128))
        prompt = wd1.encode(tokenizer, prompts)
        completion = wd1.encode(tokenizer, answers).input_ids  # all of one length
        mask = None if prompt.attention_mask.all() else prompt.attention_mask
        bound = wd1.elbo(model, prompt.input_ids, completion, attention_mask=mask)
        loss = -bound.mean() / completion.shape[1]
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in optimizers + schedulers:
            part.step()
        bar.set_postfix(nats_per_token=loss.item(), refresh=False)
    return model, tokenizer


def tiny_base(task="sudoku", seed=0, blanks=6, steps=1600):
    """The directory of a base model, made now if it is not in ~/.cache/wd1 ($XDG_CACHE_HOME/wd1).

    Its name has a hash of everything that the model is made from. Raises InputError for a task that
    has no base."""
    if task not in CORPORA:
        raise InputError(f"--task {task}: the demo has base models for {' and '.join(CORPORA)}")
    source, as_asked = CORPORA[task]
    code = [source, type(TASKS[task]), corpus, pretrain, wd1.character_tokenizer, wd1.encode]
    code += [wd1.elbo, wd1.elbo_views, wd1.log_likelihood, wd1.token_log_probs]
    code += [wd1.chunked_log_probs, wd1.hidden_states, wd1.until_eos]
    config = Path(wd1.__file__).with_name("tiny_config.json").read_text()
    numbers = [as_asked, seed, blanks, steps, torch.__version__]
    made_from = json.dumps([config, [inspect.getsource(part) for part in code], *numbers])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wd1"
    directory = cache / f"tiny-{task}-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"
    if directory.exists():
        return str(directory)
    trained = pretrain(task, seed, blanks, steps)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as unfinished:
        for part in trained:
            part.save_pretrained(unfinished)
        if task == "countdown":
            rng = np.random.default_rng([seed, blanks])
            with Path(unfinished, "problems.jsonl").open("w") as file:
                for split, size in dict(train=4000, test=500).items():
                    for example, *_ in sums(rng, 0, size, split):
                        file.write(json.dumps(example) + "\n")
        with contextlib.suppress(OSError):  # another run was faster
            os.rename(unfinished, directory)
    return str(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", default="sudoku", choices=CORPORA)
    parser.add_argument("--seed", type=int, default=0)
    with wd1.one_sentence():
        print(tiny_base(**vars(parser.parse_args())))
