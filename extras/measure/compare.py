"""The paper's claims on the tiny models: wd1 against baselines, its estimates against each other.

    make compare            # finished runs in runs/compare are not repeated: stop it, go on later
    make compare-quick      # the same on less of everything: shows that it works, not who wins

Every method starts from the same base models and problems and draws equally many samples. Its
learning rate is found by one search, the same for all: from the middle of RATES to the better
neighbour for as long as that is better, one run a rate, on seed 0's base and with draws of its own;
better is more accurate on held-out problems, in the mean of all evaluations after the first. (For
countdown these problems are among those that seed 0 is reported on.) Seconds are the processor's,
of one thread, without the evaluations, which are the same for all; at equal seconds rates are those
found for equal steps. A verdict needs p < 0.05 at equal samples in a paired t test, after Holm's
correction for all claims and tasks.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

import wd1
from extras.measure.harness import HELD_OUT, SECONDS, draw, grid, holm, mean_error, paired, table
from extras.watch.pictures import figure, save

RATES = "3e-5", "1e-4", "3e-4", "1e-3", "3e-3"
SETTINGS = """--batch_size 128 --max_steps 24 --eval_every 3 --eval_size 150 --warmup_steps 3
    --rollout_batch_size 150 --lr_scheduler constant_with_warmup"""
QUICK = "--max_steps 4 --eval_every 2 --eval_size 50 --batch_size 64"
ONE_STEP = "--likelihood one_step --mc_samples 1"
METHODS = {  # the first five are one picture, the first and the fifth to the ninth another
    "wd1, one-step": ONE_STEP,
    "diffu-GRPO": f"{ONE_STEP} --objective diffu-grpo",
    "wd1-positive, one-step": f"{ONE_STEP} --objective wd1-positive",
    "wd1++": "--objective wd1++ --mc_samples 2",
    "wd1, ELBO 2": "--mc_samples 2",
    "wd1, ELBO 1": "--mc_samples 1",
    "wd1, ELBO 4": "--mc_samples 4",
    "wd1, ELBO 2, complementary": "--mc_samples 2 --complementary",
    "wd1, ELBO 4, complementary": "--mc_samples 4 --complementary",
    "wd1, one-step, whole prompt": f"{ONE_STEP} --prompt_mask_prob 0",
    "wd1, one-step, shared": f"{ONE_STEP} --shared_masks",
    "wd1, ELBO 1, shared": "--mc_samples 1 --shared_masks",
    "wd1, ELBO 2, shared": "--mc_samples 2 --shared_masks",
    "wd1, ELBO 4, shared": "--mc_samples 4 --shared_masks",
    "wd1, ELBO 2, both": "--mc_samples 2 --shared_masks --complementary",
    "wd1, ELBO 4, both": "--mc_samples 4 --shared_masks --complementary",
}
CLAIMS = {
    "wd1's paper: better than diffu-GRPO": "wd1, one-step against diffu-GRPO",
    "wd1's paper: better than without w-": "wd1, one-step against wd1-positive, one-step",
    "wd1's paper: wd1++ needs fewer samples": "wd1++ against wd1, one-step",
    "wd1's paper, by its choice: one-step is enough": "wd1, one-step against wd1, ELBO 1",
    "masking the prompt is needed": "wd1, one-step against wd1, one-step, whole prompt",
    "more draws are better": "wd1, ELBO 4 against wd1, ELBO 1",
    "DiffuCoder: complementary masks are better (than two levels)":
        "wd1, ELBO 2, complementary against wd1, ELBO 2",
    "a group should share its masks": "wd1, ELBO 2, shared against wd1, ELBO 2",
}


OVER = "over the run", "over the run, equal seconds"


def over_the_run(runs):
    """The mean accuracy of each run's evaluations but the first: a series by case and seed."""
    return runs[HELD_OUT].drop(0, level="line").groupby(["case", "seed"], sort=False).mean()


def compare(root, task, methods, seeds, rates, more="", **options):
    """Searches the rates, makes the runs: (a frame as `grid` returns, {method: learning rate})."""
    best, score = dict.fromkeys(methods, rates[len(rates) // 2]), {}

    def command(method, rate):
        return f"{SETTINGS} {more} {METHODS[method]} --learning_rate {rate}"

    def near(rate):
        return rates[max(rates.index(rate) - 1, 0) : rates.index(rate) + 2]

    def order(method, rate):
        return score[f"{method}, {rate}"], rate == best[method]

    while missing := {
        f"{method}, {rate}": f"{command(method, rate)} --seed 1000"
        for method in methods
        for rate in near(best[method])
        if f"{method}, {rate}" not in score
    }:
        runs = grid(root / "search", missing, seeds[:1], task, **options)
        score |= over_the_run(runs).groupby("case").mean()
        for method, rate in best.items():
            best[method] = max(near(rate), key=partial(order, method))
    cases = {method: command(method, rate) for method, rate in best.items()}
    return grid(root, cases, seeds, task, **options), best


def until(seconds, accuracy, end):
    """A run as if it had been stopped at `end` seconds: accuracy then, and its mean until then."""
    curve = np.interp(np.linspace(0, end, 101), seconds, accuracy)
    return curve[-1], curve.mean()


def outcomes(runs):
    """The accuracy of each run, by case and seed: [at equal samples, and at equal seconds; at the
    end, and over the run]. The seconds are those that the fastest case took."""
    groups = runs.dropna(subset=HELD_OUT).groupby(["case", "seed"], sort=False)
    budget = groups[SECONDS].last().groupby("case").median().min()
    stopped = {name: until(run[SECONDS], run[HELD_OUT], budget) for name, run in groups}
    whole = {"at the end": groups[HELD_OUT].last(), OVER[0]: over_the_run(runs)}
    early = pd.DataFrame(stopped, ["at the end, equal seconds", OVER[1]]).T
    return pd.DataFrame(whole).join(early.rename_axis(["case", "seed"]))


def against(found, better, worse):
    """The `paired` test of two methods over the run, at equal samples and at equal seconds."""
    return [paired(found.loc[better, column], found.loc[worse, column]) for column in OVER]


def tables(results):
    """In Markdown: what every method reached, a table for each task, and the claims beside it."""
    parts, tests = [], []
    for task, (runs, rates) in results.items():
        found, seconds = outcomes(runs), runs[SECONDS].groupby(["case", "seed"]).last()
        reached = found.groupby("case", sort=False).agg(mean_error)
        reached["p"] = [against(found, method, next(iter(rates)))[0][1] for method in rates]
        reached["learning rate"] = rates.values()
        reached["seconds"] = seconds.groupby("case").mean()
        parts.append(table(reached.round(3).rename_axis(task)))
        for claim, pair in CLAIMS.items():
            methods = pair.split(" against ")
            if {*methods} <= {*rates}:
                tests.append([claim, pair, task, *itertools.chain(*against(found, *methods))])
    heads = "claim", "compared", "task", "points", "p", "points, equal seconds", "p, equal seconds"
    claims = pd.DataFrame(tests, columns=heads)
    verdict = np.where(claims.points > 0, "agrees", "contradicts")
    claims["seen"] = np.where(holm(claims.p) < 0.05, verdict, "open")
    return "\n\n".join([*parts, table(claims.round(3).set_index("claim"))])


def plot(results, methods, out):
    """Accuracy against steps, processor seconds and forward passes, a row a task."""
    sheet, places = figure(len(results), 3)
    names = "step", SECONDS, "forward_passes"
    for axes, (task, name) in zip(places.flat, itertools.product(results, names)):
        runs = results[task][0]
        draw(axes, runs[runs.index.isin(methods, "case")], name, HELD_OUT)
        axes.set(title=task, ylabel="accuracy")
    sheet.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save(sheet, out)


def main():
    parser = argparse.ArgumentParser("python -m extras.measure.compare", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    root, pictures, order = Path("runs/compare"), Path("assets"), list(METHODS)
    less = dict(methods=order, seeds=range(5), rates=RATES)
    if parser.parse_args().quick:
        root = pictures = Path("runs/compare-quick")
        less = dict(methods=order[:3], seeds=range(2), rates=RATES[1:4], more=QUICK, steps=100)
    results = {task: compare(root / task, task, **less) for task in ("sudoku", "countdown")}
    (root / "tables.md").write_text(tables(results))
    plot(results, order[:5], pictures / "compare.png")
    plot(results, order[:1] + order[4:9], pictures / "estimates.png")
    print(f"{tables(results)}\n\nThey are also in {root}/tables.md, the curves in {pictures}")


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
