"""The paper's claims on the tiny models: wd1 against baselines, its estimates against each other.

    make compare            # finished runs in runs/compare are not repeated: stop it, go on later
    make compare-quick      # the same on less of everything: shows that it works, not who wins

Every method starts from the same base models and problems and draws equally many samples. Its
learning rate is found by one search, the same for all, on three seeds that are not those of the
comparison: from 3e-4 to a third or to three times as much for as long as that is better. Better is
more accurate on held-out problems, in the mean of all evaluations, which are what is compared as
well. Seconds are those of whole runs, evaluations included. Two methods are told apart by p < 0.05
in a paired t test, after Bonferroni's correction for all claims and tasks.
"""

import sys
from pathlib import Path

import pandas as pd
from scipy import stats

import wd1
from extras.measure.harness import HELD_OUT, curves, grid, outcomes, over_seeds, table

SETTINGS = """--batch_size 128 --max_steps 12 --eval_every 2 --eval_size 150
    --rollout_batch_size 150 --blanks 10"""  # sudokus; their bases are pretrained with 6
QUICK = "--max_steps 4 --eval_size 50 --batch_size 64"
SEEDS, SEARCH_SEEDS = range(101, 106), range(106, 109)
ONE_STEP = "--likelihood one_step --mc_samples 1"
METHODS = {  # the first four are one picture, the first and the others another
    "wd1, one-step": ONE_STEP,
    "diffu-GRPO": f"{ONE_STEP} --objective diffu-grpo",
    "wd1-positive, one-step": f"{ONE_STEP} --objective wd1-positive",
    "wd1++": "--objective wd1++ --mc_samples 2",
    "wd1-positive, uneven groups": f"{ONE_STEP} --objective wd1-uneven",
    "wd1, centred": f"{ONE_STEP} --objective wd1-centred",
    "wd1, one-step, shared": f"{ONE_STEP} --shared_masks",
    "wd1, ELBO 1": "--mc_samples 1",
}
CLAIMS = (
    "wd1, one-step > diffu-GRPO",  # wd1's paper
    "wd1, one-step > wd1-positive, one-step",  # wd1's paper: w- is needed
    "wd1, one-step > wd1-positive, uneven groups",  # not just for groups of equal rewards
    "wd1, one-step > wd1, centred",  # not just to sum up to 0
    "wd1++ > wd1, one-step",  # wd1's paper: it needs fewer samples
    "wd1, one-step > wd1, ELBO 1",  # wd1's paper, by its choice
    "wd1, one-step, shared > wd1, one-step",  # a group should share its masks
)


def tuned(root, task, words, seeds, **pretraining):
    """The words of a method's runs at its best learning rate, a power of the square root of 10."""
    power, better = None, -7
    while better != power:
        power = better
        near = power, power - 1, power + 1  # itself first: it stays if no other is better
        cases = {each: f"{words} --learning_rate {10 ** (each / 2):.0e}" for each in near}
        runs = grid(root, cases, seeds, task, **pretraining)
        better = runs[HELD_OUT].groupby("case", sort=False).mean().idxmax()
    return cases[power]


def tables(results):
    """In Markdown: what every method reached, a table for each task, and the claims beside it."""
    parts, tests = [], []
    for task, runs in results.items():
        found = outcomes(runs)
        parts.append(table(over_seeds(found).rename_axis(task)))
        for claim in CLAIMS:
            better, worse = claim.split(" > ")
            if {better, worse} <= {*found.index.levels[0]}:
                gain = (found.loc[better] - found.loc[worse])["over the run"]
                tests.append([claim, task, gain.mean(), stats.ttest_1samp(gain, 0).pvalue])
    claims = pd.DataFrame(tests, columns=["claim", "task", "gain", "p"])
    claims["told apart"] = claims.p * len(claims) < 0.05
    return "\n\n".join([*parts, table(claims.round(3).set_index("claim"))])


def main(argv):
    root, pictures, names = Path("runs/compare"), Path("assets"), [*METHODS]
    more, seeds, search, pretraining, results = "", SEEDS, SEARCH_SEEDS, {"steps": 800}, {}
    if "--quick" in argv:
        root = pictures = Path("runs/compare-quick")
        names, more, seeds, search, pretraining = names[:3], QUICK, range(2), [5], {"steps": 100}
    for task in "sudoku", "countdown":
        cases = {}
        for name in names:
            words = f"{SETTINGS} {METHODS[name]} {more}"
            cases[name] = tuned(root / task / name, task, words, search, **pretraining)
        results[task] = grid(root / task, cases, seeds, task, **pretraining)
    for picture, shown in ("compare", names[:4]), ("variants", names[:1] + names[4:]):
        panels = {task: runs[HELD_OUT].loc[shown] for task, runs in results.items()}
        curves(panels, pictures / f"{picture}.png")
    print(tables(results))


if __name__ == "__main__":
    with wd1.one_sentence():
        main(sys.argv[1:])
