"""The demo's base models: they can solve the problems of a task, and rarely answer as asked.

RL on a language model brings out what pretraining left in it. To show that honestly on a laptop we need models like
that: they are pretrained, with the same `elbo` that RL uses, on problems whose answers are written as asked only some of
the time. Sudokus are otherwise written column by column; countdown's expressions, `+3 +9 -5`, otherwise as equations,
`+3 +9 -5 =7`, which are no expressions. The skill is there; the wish is not. Problems of the test split never occur in the
corpus. RL is then told nothing but the reward.

    python -m extras.tiny [countdown]        # pretrains a base, or finds it, and prints where it is

The tiny model does sums of numbers up to 9 only: the directory of its countdown base has problems.jsonl, which a run of it
takes if it is not given other --data.
"""

import ast
import hashlib
import inspect
import json
import os
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import wd1
from extras.checkpoints import character_tokenizer
from rewards import TASKS

RECIPE = dict(steps=1600, batch_size=128, muon_lr=0.02, adam_lr=3e-3, warmup_steps=30)


def sudokus(rng, blanks, size):
    """`size` triples (problem, its answer as asked, the answer in another form): here column by column."""
    for example in TASKS["sudoku"].puzzles("train", rng, blanks, size):
        grid = example["solution"]
        yield example, grid, "".join(grid[column::4] for column in range(4))


def sums(rng, blanks, size, split="train"):
    """The same for countdown: numbers up to 9, which + and - carry to the target; the other form is an equation."""
    while size:
        numbers, signs = rng.integers(1, 10, 3), rng.choice([1, -1], 3)
        example = {"nums": numbers.tolist(), "target": int(numbers @ signs)}
        if example["target"] > 0 and TASKS["countdown"].is_test(example) == (split == "test"):
            expression = "".join(f"{'+' if sign > 0 else '-'}{number:<2} " for sign, number in zip(signs, numbers))
            yield example, f"{expression:<16}", f"{expression}={example['target']:<3}"
            size -= 1


CORPORA = {"sudoku": (sudokus, 0.3), "countdown": (sums, 0.4)}  # and the fraction of answers that are as asked


def corpus(task, rng, blanks, size):
    """`size` pairs (prompt, completion) on training problems."""
    source, as_asked = CORPORA[task]
    for example, answer, other in source(rng, blanks, size):
        prompt = TASKS[task].instruction + TASKS[task].question(example)
        yield prompt, f"<answer>{answer if rng.random() < as_asked else other}</answer><|eos|>"


def pretrain(task, seed, blanks, steps):
    """Masked-diffusion pretraining of the tiny model on a fresh batch of problems a step: (model, tokenizer)."""
    model, tokenizer = wd1.load_model("tiny", seed=seed)
    rng = np.random.default_rng([seed, blanks])
    torch.manual_seed(seed)
    # Muon for the matrices, AdamW for the rest: in two minutes it gets where AdamW alone does not in ten.
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=RECIPE["muon_lr"], weight_decay=0.01),
        torch.optim.AdamW(others, lr=RECIPE["adam_lr"], weight_decay=0.0),
    ]
    schedulers = [transformers.get_scheduler("cosine", part, RECIPE["warmup_steps"], steps) for part in optimizers]
    bar = tqdm(range(steps), f"pretraining the tiny {task} base")
    for step in bar:
        prompts, answers = zip(*corpus(task, rng, blanks, RECIPE["batch_size"]))
        prompt = wd1.encode(tokenizer, prompts)
        completion = tokenizer(list(answers), padding=True, padding_side="right", return_tensors="pt").input_ids
        mask = None if prompt.attention_mask.all() else prompt.attention_mask
        loss = -wd1.elbo(model, prompt.input_ids, completion, attention_mask=mask).mean() / completion.shape[1]
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in optimizers + schedulers:
            part.step()
        if step % 10 == 0:
            bar.set_postfix(nats_per_token=f"{loss.item():.3f}")
    return model, tokenizer


def code(part):
    """The source of a function or class, without what does not run: comments and docstrings."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def tiny_base(task="sudoku", seed=0, blanks=6, steps=None):
    """The directory of a base model, pretrained now if it is not in the cache (~/.cache/wd1, or $XDG_CACHE_HOME/wd1).

    The cache's key is everything the model is made from: recipe, configuration, code, seed and torch version.
    """
    steps = steps or RECIPE["steps"]
    parts = [CORPORA[task][0], type(TASKS[task]), corpus, pretrain, character_tokenizer, wd1.encode, wd1.hidden_states]
    parts += [wd1.chunked_log_probs, wd1.token_log_probs, wd1.log_likelihood, wd1.until_eos, wd1.shared_rand]
    parts += [wd1.elbo_views, wd1.elbo]
    config = Path(__file__).resolve().parents[1].joinpath("tiny_config.json").read_text()
    numbers = [CORPORA[task][1], seed, blanks, steps, torch.__version__]
    made_from = json.dumps([RECIPE, config, [code(part) for part in parts], *numbers])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wd1"
    directory = cache / f"tiny-{task}-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"
    if not directory.exists():
        model, tokenizer = pretrain(task, seed, blanks, steps)
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=cache))
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if task == "countdown":
            rng, sizes = np.random.default_rng([seed, blanks]), {"train": 4000, "test": 500}
            problems = [example for split, size in sizes.items() for example, *_ in sums(rng, blanks, size, split)]
            (unfinished / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
        try:
            unfinished.rename(directory)
        except OSError:  # another run was faster
            shutil.rmtree(unfinished)
    return str(directory)


def demo_base(config):
    """The base that a run of the tiny model begins with. Without --data, countdown's own problems become the run's."""
    for file in filter(None, (config.data, config.test_data)):
        TASKS[config.task].read(file)  # what cannot be read is said before minutes of pretraining
    directory = Path(tiny_base(config.task, config.seed, config.blanks))
    if (directory / "problems.jsonl").exists():
        config.data = config.data or str(directory / "problems.jsonl")
    return str(directory)


if __name__ == "__main__":
    if sys.argv[1:2] not in ([], ["sudoku"], ["countdown"]):
        sys.exit("python -m extras.tiny [sudoku | countdown]")
    print(tiny_base(*sys.argv[1:2]))
