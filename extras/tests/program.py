"""What many tests share: the program, run quickly in this process, and what it leaves."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rewards
import wd1

torch.set_num_threads(1)  # the models are tiny: more threads only get in each other's way
HERE = Path(wd1.__file__).parent
FAST = dict(
    model=HERE / "tiny_config.json", device="cpu", dtype="float32", gen_length=8, block_length=4,
    diffusion_steps=4, batch_size=4, num_generations=2, micro_batch_size=4, num_iterations=2,
    max_steps=2, eval_lengths=8, eval_size=3, rollout_batch_size=4, lora_rank=0,
    learning_rate=1e-3,
)  # fmt: skip


def cases(table, names="words, expected"):
    """A test for each line of a table, whose columns are divided by ->."""
    rows = [line.split(" -> ") for line in table.strip().splitlines()]
    return pytest.mark.parametrize(names, rows)


def arguments(**options):
    """The words of a command line."""
    return [f"--{name}={value}" for name, value in options.items()]


def call(words, main=wd1.main):
    """Runs a program's main as its command does: the exit code."""
    try:
        with wd1.one_sentence():
            main([str(word) for word in words])
    except SystemExit as stopped:
        if isinstance(stopped.code, int):
            return stopped.code
        print(stopped.code, file=sys.stderr)
        return 1
    return 0


def run(tmp_path, words=(), out="run", main=wd1.main, **options):
    """Runs the program with FAST settings: (exit code, run directory)."""
    options = {**FAST, "output_dir": tmp_path / out, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.Sudoku, "problems", few_problems)
        patch.setattr(wd1, "plot", lambda *_: None)  # it takes a second
        return call([*arguments(**options), *words], main), tmp_path / out


def few_problems(self, split, seed, blanks):
    """Sixty puzzles instead of 20,000, which take a second to make."""
    rng = np.random.default_rng([seed, split == "test"])
    return self.puzzles(split, rng, blanks, 60)


def even_characters(task, completion, example):
    """A reward that a model with random weights gets some of."""
    return sum(ord(character) % 2 == 0 for character in completion) / (len(completion) + 1)


def metrics(directory, name="metrics.jsonl"):
    """The lines of one of a run's logs."""
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def contents(directory, pattern="**/*"):
    """The bytes of its files."""
    files = sorted(file for file in directory.glob(pattern) if file.is_file())
    return [file.read_bytes() for file in files]
