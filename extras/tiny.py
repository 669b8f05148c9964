"""The base model of the demo: it can solve sudokus, and rarely answers as asked.

RL on a language model brings out what pretraining left in it. To show that honestly on a laptop we need a model like
that: it is pretrained, with the same `elbo` that RL uses, on 4x4 sudokus whose answers are written row by row, as asked,
only some of the time, and column by column otherwise. The skill is there; the wish is not. The solution grids of the
test split never occur in its corpus. RL is then told nothing but the reward.

    python -m extras.tiny          # pretrains the base, or finds it, and prints where it is
"""

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import wd1
from extras.checkpoints import character_tokenizer
from rewards import TASKS, Sudoku

RECIPE = dict(steps=1600, batch_size=128, as_asked=0.3, muon_lr=0.02, adam_lr=3e-3, warmup_steps=30)


def corpus(rng, blanks, size, as_asked):
    """`size` pairs (prompt, answer) on training grids; a fraction `as_asked` of the answers is row by row."""
    task = TASKS["sudoku"]
    for example in task.puzzles("train", rng, blanks, size):
        grid = example["solution"]
        by_column = "".join(grid[column::4] for column in range(4))
        answer = grid if rng.random() < as_asked else by_column
        yield task.instruction + task.question(example), f"<answer>{answer}</answer><|eos|>"


def pretrain(seed, blanks):
    """Masked-diffusion pretraining of the tiny model on a fresh batch of puzzles a step: (model, tokenizer)."""
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
    warmup, steps = RECIPE["warmup_steps"], RECIPE["steps"]
    schedulers = [transformers.get_scheduler("cosine", optimizer, warmup, steps) for optimizer in optimizers]
    bar = tqdm(range(steps), "pretraining the tiny base")
    for step in bar:
        prompts, answers = zip(*corpus(rng, blanks, RECIPE["batch_size"], RECIPE["as_asked"]))
        prompt = tokenizer(list(prompts), return_tensors="pt").input_ids
        completion = tokenizer(list(answers), return_tensors="pt").input_ids
        loss = -wd1.elbo(model, prompt, completion).mean() / completion.shape[1]
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in optimizers + schedulers:
            part.step()
        if step % 10 == 0:
            bar.set_postfix(nats_per_token=f"{loss.item():.3f}")
    return model, tokenizer


def tiny_base(seed=0, blanks=6):
    """The directory of the base model, pretrained now if it is not in the cache (~/.cache/wd1, or $XDG_CACHE_HOME/wd1).

    The cache's key is everything the model is made from: recipe, configuration, code, seed and torch version.
    """
    parts = [corpus, pretrain, character_tokenizer, Sudoku, wd1.hidden_states, wd1.chunked_log_probs, wd1.token_log_probs]
    parts += [wd1.log_likelihood, wd1.until_eos, wd1.shared_rand, wd1.elbo_views, wd1.elbo]
    code = [inspect.getsource(part) for part in parts]
    config = Path(__file__).resolve().parents[1].joinpath("tiny_config.json").read_text()
    made_from = json.dumps([RECIPE, config, code, seed, blanks, torch.__version__])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wd1"
    directory = cache / f"tiny-base-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"
    if not directory.exists():
        model, tokenizer = pretrain(seed, blanks)
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=cache))
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(directory)
        except OSError:  # another run was faster
            shutil.rmtree(unfinished)
    return str(directory)


if __name__ == "__main__":
    print(tiny_base())
