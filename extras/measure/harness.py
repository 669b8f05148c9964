"""What all measurements share: runs that are made once, races, statistics, tables, curves.

Every run has a directory of its own and is not repeated while its settings stay the same: a
measurement can be stopped, and goes on where it was. Two runs are made at a time (JOBS in the
environment says otherwise), each in one thread.
"""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import re
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from timeit import timeit
from unittest import mock

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm import tqdm

import wd1
from extras import train
from extras.demo.base import tiny_base

HELD_OUT, SECONDS = "eval.accuracy", "eval.cpu_seconds"  # of a run's metrics


def settings(*options):
    """The settings that the options of a command make."""
    return wd1.parse_arguments(["--device", "cpu", *options], train.MoreConfig)


def run(directory, *options):
    """The metrics of a run, a frame; made now if they are not there. Evaluations have a time stamp,
    "eval.cpu_seconds": the processor's in all but evaluations until then."""
    config = settings("--output_dir", str(directory), *options)
    finished, evaluate, zero = directory / "finished", wd1.evaluate_model, 0.0

    def stamped(*arguments):
        nonlocal zero
        arrived = time.process_time()
        zero = zero or arrived
        result = evaluate(*arguments) | {"cpu_seconds": arrived - zero}
        zero += time.process_time() - arrived  # the clock stood still
        return result

    made_with = finished.exists() and json.loads((directory / "config.json").read_text())
    if made_with != asdict(config):
        shutil.rmtree(directory, ignore_errors=True)
        with mock.patch.object(wd1, "evaluate_model", stamped):
            with contextlib.suppress(FloatingPointError):  # no finite gradient: it stays as it was
                train.train(config)
        shutil.rmtree(directory / "checkpoint", ignore_errors=True)
        finished.touch()
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return pd.json_normalize([json.loads(line) for line in lines])


def one_quiet_thread():
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what goes wrong is raised where it was asked for


@functools.cache
def workers():
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(int(os.environ.get("JOBS", 2)), context, one_quiet_thread)


def spread(function, jobs):
    """{key: function(*arguments)} of the jobs {key: arguments}, computed by the workers."""
    results = workers().map(function, *zip(*jobs.values()))
    return dict(zip(tqdm(jobs), results))


def place(root, case, seed):
    """A run's directory. Its name begins as that of a model which has the tiny models' settings."""
    return root / re.sub("[^a-z0-9+.]+", "-", f"tiny {case} seed {seed}".lower())


def grid(root, cases, seeds=range(3), task="sudoku", **pretraining):
    """The metrics of a run for each case {name: words of the command} and each seed, which has a
    base model of its own: a frame indexed by case, seed and line."""
    pretrain = functools.partial(tiny_base, **pretraining)
    bases, jobs = spread(pretrain, {seed: (task, seed) for seed in seeds}), {}
    for (case, words), seed in itertools.product(cases.items(), seeds):
        options = ["--task", task, "--seed", str(seed), "--model", bases[seed]]
        if (problems := Path(bases[seed]) / "problems.jsonl").exists():
            options += ["--data", str(problems)]
        jobs[case, seed] = place(root, case, seed), *options, *words.split()
    return pd.concat(spread(run, jobs), names=["case", "seed", "line"])


def race(functions, rounds):
    """A frame of the functions' seconds, and of their speed as a multiple of the first one's. They
    take turns, so that a busy machine slows all of them; medians over rounds."""
    rows = [[timeit(each, number=1) for each in functions.values()] for _ in range(rounds)]
    seconds = pd.DataFrame(rows, columns=[*functions])
    speed = seconds.rdiv(seconds.iloc[:, 0], axis=0).median()
    return seconds.agg(["median", "min", "max"]).T.assign(speed=speed)


def paired(a, b):
    """The mean of a - b, in percent, and the p value of a two-sided paired t test."""
    return 100 * np.mean(a - b), stats.ttest_rel(a, b).pvalue


def holm(p_values):
    """The p values, adjusted so that a false finding among all tests is as rare as each p says."""
    steps = np.sort(p_values) * range(len(p_values), 0, -1)
    return np.maximum.accumulate(steps).clip(max=1)[np.argsort(p_values).argsort()]


def mean_error(values):
    """Mean and standard error, in percent."""
    return f"{100 * np.mean(values):.1f} ± {100 * stats.sem(values):.1f}"


def table(frame):
    """A frame in Markdown; its index makes the first column."""
    flat = frame.reset_index()
    lines = [flat.columns, ["---"] * len(flat.columns), *flat.values]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def draw(axes, runs, x, y):
    """A curve for each case: the mean over seeds, in a band of one standard error."""
    for case, lines in runs.dropna(subset=y).groupby("case", sort=False):
        groups = lines.groupby("line")
        at, mean, error = groups[x].median(), groups[y].mean(), groups[y].sem()
        axes.plot(at, mean, label=case)
        axes.fill_between(at, mean - error, mean + error, alpha=0.2)
    axes.set(xlabel=x.replace("_", " ").replace("eval.", ""), title=y.replace("eval.", "held-out "))
