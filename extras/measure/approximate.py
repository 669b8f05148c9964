"""What approximate sampling costs and saves, on the demo: speed, agreement, accuracy after training.

    make approximate          # half an hour on two cores; finished runs in runs/approximate are kept

Every variant trains on its own samples, from the same bases; each trained model is then evaluated
by exact sampling. Speed and agreement are those on a base, and on the model trained exactly.
"""

from functools import partial
from pathlib import Path

import pandas as pd

import wd1
from extras import train
from extras.demo.base import tiny_base
from extras.measure.harness import HELD_OUT, grid, race, settings, table
from rewards import TASKS

SEEDS, ROOT = range(3), Path("runs/approximate")
VARIANTS = {
    "exact": "",
    "dual cache": "--cache dual",
    "threshold 0.9": "--threshold 0.9",
    "dual cache, threshold 0.9": "--cache dual --threshold 0.9",
}


def beside_exact(source):
    """A frame of each variant's speed, share of tokens equal to exact ones, and steps: greedy."""
    model, tokenizer = wd1.load_model(source)
    prompts = TASKS["sudoku"].test(blanks=6)["prompt"][:256]
    ids = wd1.encode(tokenizer, prompts).input_ids
    lengths = dict(gen_length=19, steps=10, block_length=19)
    samplers = {
        name: partial(train.sampler(settings(*words.split())), model, ids, **lengths)
        for name, words in VARIANTS.items()
    }
    found = race(samplers, 5)[["speed"]].round(2)
    rollouts = {name: sampler() for name, sampler in samplers.items()}
    exact = rollouts["exact"].completion
    alike = {n: (each.completion == exact).float().mean().item() for n, each in rollouts.items()}
    steps = {n: 1 + each.written_at.max().item() for n, each in rollouts.items()}
    return found.assign(alike=pd.Series(alike).map("{:.1%}".format), steps=pd.Series(steps))


def main():
    """Makes the runs that are not there, and prints the table."""
    runs = grid(ROOT, VARIANTS, SEEDS)
    last = runs[HELD_OUT].groupby(["case", "seed"]).last().unstack()
    shown = last.map("{:.1%}".format).add_prefix("accuracy, seed ")
    print(table(beside_exact(tiny_base()).join(shown)))


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
