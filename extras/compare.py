"""The paper's claims on the tiny models: wd1 against its baselines, and its estimates of the likelihood against each other.

    make compare            # finished runs in runs/compare are not repeated: stop it and go on whenever you like
    make compare-quick      # the same on less of everything: shows that it works, not who wins

Every method starts from the same base models and problems and draws equally many samples. Its learning rate is found by
one search, the same for all: from the middle of RATES to the better neighbour for as long as that is better, one run a
rate, on seed 0's base and with draws of its own; better is more accurate on held-out problems, in the mean of all
evaluations after the first. (For countdown these problems are among those that seed 0 is reported on.) Seconds are the
processor's, of one thread, without the evaluations, which are the same for all; at equal seconds rates are those found for
equal steps. A verdict needs p < 0.05 at equal samples in a paired t test, after Holm's correction for all claims and tasks.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import re
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev

import mpmath
import numpy as np
import torch

import wd1
from extras.card import table
from extras.pictures import panels, save
from extras.runs import replacing
from extras.settings import eval_steps, quiet
from extras.tiny import tiny_base

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
SETTINGS = dict(
    wd1.PRESETS["tiny"], batch_size=128, max_steps=24, eval_every=3, eval_size=150, rollout_batch_size=150,
    lr_scheduler="constant_with_warmup", warmup_steps=3, save_every=10**6, device="cpu",
)  # fmt: skip
QUICK = dict(max_steps=4, eval_every=2, eval_size=50, batch_size=64)
ONE_STEP = dict(likelihood="one_step", mc_samples=1)
METHODS = {
    "wd1, one-step": ONE_STEP,
    "wd1-positive, one-step": dict(ONE_STEP, objective="wd1-positive"),
    "diffu-GRPO": dict(ONE_STEP, objective="diffu-grpo"),
    "wd1++": dict(objective="wd1++", mc_samples=2),
    "wd1, one-step, shared": dict(ONE_STEP, shared_masks=True),
    "wd1, one-step, whole prompt": dict(ONE_STEP, prompt_mask_prob=0.0),
    **{f"wd1, ELBO {k}": dict(mc_samples=k) for k in (1, 2, 4)},
    **{f"wd1, ELBO {k}, shared": dict(mc_samples=k, shared_masks=True) for k in (1, 2, 4)},
    **{f"wd1, ELBO {k}, complementary": dict(mc_samples=k, complementary=True) for k in (2, 4)},
    **{f"wd1, ELBO {k}, both": dict(mc_samples=k, shared_masks=True, complementary=True) for k in (2, 4)},
}
CLAIMS = [  # (who says what, the better method, the other)
    ("wd1's paper: better than diffu-GRPO", "wd1, one-step", "diffu-GRPO"),
    ("wd1's paper: better than without w-", "wd1, one-step", "wd1-positive, one-step"),
    ("wd1's paper: wd1++ needs fewer samples", "wd1++", "wd1, one-step"),
    ("wd1's paper, by its choice: one-step is enough", "wd1, one-step", "wd1, ELBO 1"),
    ("masking the prompt is needed", "wd1, one-step", "wd1, one-step, whole prompt"),
    ("more draws are better", "wd1, ELBO 4", "wd1, ELBO 1"),
    ("DiffuCoder: complementary masks are better (than two levels)", "wd1, ELBO 2, complementary", "wd1, ELBO 2"),
    ("a group should share its masks", "wd1, ELBO 2, shared", "wd1, ELBO 2"),
]


# ------------------------------------------------------------------------------------------------------------- runs


def quietly():
    """Sets up a process that makes runs, one thread each."""
    torch.set_num_threads(1)
    quiet()
    for output in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)


def run(directory, settings):
    """A run, made now if it is not there: at each evaluation its accuracy, the steps, samples, seconds and forward passes."""
    file = directory / "result.json"
    if file.exists():
        made_with = json.loads((directory / "config.json").read_text())
        if all(made_with[name] == value for name, value in settings.items()):
            return json.loads(file.read_text())
    shutil.rmtree(directory, ignore_errors=True)
    evaluate, marks, paused, accuracy = wd1.evaluate_model, [], [], []

    def timed(*arguments):  # stops the clock
        arrived = time.process_time()
        marks.append(arrived)
        accuracy.append((result := evaluate(*arguments))["accuracy"])
        paused.append(time.process_time() - arrived)
        return result

    wd1.evaluate_model = timed
    config = wd1.Config(**settings, output_dir=str(directory))
    with contextlib.suppress(FloatingPointError):  # no finite gradient any more: it stays what it was
        wd1.train(config)
    wd1.evaluate_model = evaluate
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = range(0, config.max_steps + 1, config.eval_every)
    stopped = len(accuracy) < len(steps)
    accuracy += accuracy[-1:] * (len(steps) - len(accuracy))
    passes = [lines[step].get("forward_passes", eval_steps(config.gen_length)) for step in steps if step < len(lines)]
    result = {
        "accuracy": accuracy,
        "stopped": stopped,
        "steps": list(steps),
        "samples": [step * config.batch_size for step in steps],
        "seconds": [mark - marks[0] - sum(paused[:i]) for i, mark in enumerate(marks)],
        "passes": [count - (i + 1) * eval_steps(config.gen_length) for i, count in enumerate(passes)],
    }
    for name in ("seconds", "passes"):  # of a run that could not go on
        result[name] += result[name][-1:] * (len(steps) - len(result[name]))
    for leftover in ("checkpoint", "model"):
        shutil.rmtree(directory / leftover, ignore_errors=True)
    with replacing(file) as unfinished:
        unfinished.write_text(json.dumps(result))
    return result


def score(result):
    """How good a run is: its mean accuracy over all evaluations but the first."""
    return fmean(result["accuracy"][1:])


def compare(root, tasks, methods, seeds, rates, changes, pretraining):
    """{task: {method: (learning rate, [a result of `run` for each seed])}}, with every base and every run that is missing."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(int(os.environ.get("JOBS", 2)), context, quietly) as pool, ThreadPoolExecutor(64) as threads:
        made = {(t, s): pool.submit(tiny_base, t, s, SETTINGS["blanks"], pretraining) for t in tasks for s in seeds}
        bases = {key: base.result() for key, base in made.items()}

        def submit(task, method, rate, base, seed):
            name = re.sub("[^a-z0-9+]+", "-", method.lower())
            settings = dict(SETTINGS, **changes, task=task, model=bases[task, base], learning_rate=rate, seed=seed)
            if task == "countdown":
                settings["data"] = f"{bases[task, base]}/problems.jsonl"
            return pool.submit(run, root / task / name / f"{rate:g}-seed{seed}", settings | METHODS[method])

        def search(task, method):
            found, at = {}, len(rates) // 2
            while len(found) < len(rates):
                near = range(max(at - 1, 0), min(at + 2, len(rates)))
                missing = {i: submit(task, method, rates[i], seeds[0], 1000 + seeds[0]) for i in near if i not in found}
                found |= {i: score(result.result()) for i, result in missing.items()}
                best = max(found, key=lambda i: (found[i], i == at))
                if best == at:
                    break
                at = best
            runs = [submit(task, method, rates[at], seed, seed) for seed in seeds]
            print(f"{task}: {method}: learning rate {rates[at]:g} of {sorted(rates[i] for i in found)}", flush=True)
            return rates[at], [result.result() for result in runs]

        jobs = {task: {method: threads.submit(search, task, method) for method in methods} for task in tasks}
        return {task: {method: job.result() for method, job in row.items()} for task, row in jobs.items()}


# ------------------------------------------------------------------------------------------------------------ tables


def paired(a, b):
    """The mean of a - b, and the p value of a two-sided paired t test."""
    differences = [x - y for x, y in zip(a, b)]
    mean, degrees = fmean(differences), len(differences) - 1
    if not degrees:
        return mean, math.nan
    spread = stdev(differences)
    if not spread:
        return mean, 1.0 if not mean else 0.0
    t = mean / (spread / math.sqrt(degrees + 1))
    # The tails of Student's t distribution, as an incomplete beta function.
    return mean, float(mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True))


def until(result, seconds):
    """A run as if it had been stopped after `seconds`: accuracy then, and its mean until then, both interpolated."""
    times = np.linspace(0, seconds, 101)
    curve = np.interp(times, result["seconds"], result["accuracy"])
    return float(curve[-1]), float(curve.mean())


def mean_error(values):
    """Mean and standard error, in percent."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{100 * fmean(values):.1f} ± {100 * error:.1f}"


def holm(tests):
    """The p values of several tests, adjusted so that the chance of a single false finding among all stays what it says."""
    order = sorted(range(len(tests)), key=lambda i: tests[i][1])
    adjusted, least = [0.0] * len(tests), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(tests) - rank) * tests[i][1]))
        adjusted[i] = least
    return adjusted


def tables(results):
    """The Markdown of three tables: at equal samples, at equal seconds, and the claims beside both."""
    reference, parts, measures, budgets = next(iter(METHODS)), {}, {}, {}
    for task, row in results.items():
        whole = [runs for _, runs in row.values() if not any(result["stopped"] for result in runs)]
        budgets[task] = min(fmean(result["seconds"][-1] for result in runs) for runs in whole)
        for method, (_, runs) in row.items():  # [(accuracy at the end, its mean over the run) for each seed]
            measures["samples", task, method] = [(result["accuracy"][-1], score(result)) for result in runs]
            measures["seconds", task, method] = [until(result, budgets[task]) for result in runs]

    def difference(by, task, method, other):
        return paired(*([run for _, run in measures[by, task, name]] for name in (method, other)))

    for by in ("samples", "seconds"):
        heads, rows = ["method"], []
        for task in results:
            heads += [f"{task}: learning rate" if by == "samples" else f"{task}: s/step", "at the end", "over the run", "p"]
        for method in next(iter(results.values())):
            rows.append([method])
            for task, row in results.items():
                rate, runs = row[method]
                cost = fmean(result["seconds"][-1] / result["steps"][-1] for result in runs)
                end, mean = zip(*measures[by, task, method])
                p = "" if method == reference else f"{difference(by, task, method, reference)[1]:.3f}"
                rows[-1] += [f"{rate:g}" if by == "samples" else f"{cost:.2f}", mean_error(end), mean_error(mean), p]
        parts[by] = table(heads, *rows)
    known = [claim for claim in CLAIMS if {*claim[1:]} <= set(next(iter(results.values())))]
    asked = [(task, claim) for claim in known for task in results]
    tests = {by: {(task, claim): difference(by, task, *claim[1:]) for task, claim in asked} for by in ("samples", "seconds")}
    adjusted = dict(zip(asked, holm([tests["samples"][one] for one in asked])))
    heads, rows = ["claim", "compared"], [[claim[0], f"{claim[1]} against {claim[2]}"] for claim in known]
    for task in results:
        heads += [f"{task}, equal samples", f"{task}, equal seconds", f"{task}, seen"]
        for claim, cells in zip(known, rows):
            both = [tests[by][task, claim] for by in ("samples", "seconds")]
            agrees = "agrees" if both[0][0] > 0 else "contradicts"
            cells += [f"{100 * mean:+.1f} (p {p:.3f})" for mean, p in both]
            cells.append(agrees if adjusted[task, claim] < 0.05 else "open")
    notes = ", ".join(f"{budget:.1f} s on {task}" for task, budget in budgets.items())
    return f"""At equal samples:\n\n{parts["samples"]}\n\nAt equal processor time ({notes}):\n\n{parts["seconds"]}\n
The claims, as differences of the mean accuracy over the run, in points:\n\n{table(heads, *rows)}\n"""


def plot(results, methods, out):
    """Accuracy (mean over seeds, with a band of one standard error) against samples, seconds and forward passes."""
    figure, axes_of = panels(3, len(results), size=(3.7, 3.1), sharey="row")
    axis_names = {"samples": "samples", "seconds": "processor seconds", "passes": "forward passes"}
    for places, (task, row) in zip(axes_of, results.items()):
        for axes, (key, label) in zip(places, axis_names.items()):
            for number, method in enumerate(name for name in methods if name in row):
                _, runs = row[method]
                x = np.mean([result[key] for result in runs], axis=0)
                y = 100 * np.array([result["accuracy"] for result in runs])
                error = y.std(axis=0, ddof=1) / math.sqrt(len(y)) if len(y) > 1 else np.zeros(len(x))
                axes.plot(x, y.mean(axis=0), color=f"C{number}", label=method, linewidth=1.6)
                low, high = y.mean(axis=0) - error, y.mean(axis=0) + error
                axes.fill_between(x, low, high, color=f"C{number}", alpha=0.18, linewidth=0)
            axes.set(xlabel=label)
        places[0].set(ylabel="accuracy, %", title=task)
    figure.legend(*axes_of[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    save(figure, out)


def main():
    parser = argparse.ArgumentParser(prog="python -m extras.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less of everything, to see that it works")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method, each on a base model of its own; at least 2")
    arguments, tasks = parser.parse_args(), ("sudoku", "countdown")
    if arguments.seeds < 2:
        parser.error(f"--seeds {arguments.seeds}: one run says nothing of what another would do")
    if arguments.quick:
        root = assets = Path("runs/compare-quick")
        methods = ("wd1, one-step", "diffu-GRPO", "wd1, ELBO 2")
        results = compare(root, tasks, methods, range(2), RATES[1:4], QUICK, pretraining=100)
    else:
        root, assets = Path("runs/compare"), Path("assets")
        results = compare(root, tasks, tuple(METHODS), range(arguments.seeds), RATES, {}, pretraining=None)
    text = tables(results)
    (root / "tables.md").write_text(text)
    objectives, estimates = [*list(METHODS)[:4], "wd1, ELBO 2"], [name for name in METHODS if name.startswith("wd1, ")]
    plot(results, objectives, assets / "compare.png")
    plot(results, [name for name in estimates if "shared" not in name and "both" not in name], assets / "estimates.png")
    print(f"\n{text}\nThe tables are in {root}/tables.md, the curves in {assets}/compare.png and {assets}/estimates.png")


if __name__ == "__main__":
    main()
