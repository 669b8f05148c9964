"""What all measurements share: runs that are made once, tables, pictures.

Every run has a directory of its own and is not repeated while its settings stay the same: a
measurement can be stopped, and goes on where it was. As many runs are made at a time as there are
processors, on one thread each.
"""

import functools
import io
import itertools
import json
import multiprocessing
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, suppress

import pandas as pd
from tqdm import tqdm

import wd1
from extras import train
from extras.demo import base
from extras.watch.pictures import figure, save

HELD_OUT = "held-out accuracy"
tiny_base = functools.cache(base.tiny_base)  # which takes seconds to say what is there
OUTCOMES = {  # of a run: the column, and how its lines are summed up
    "accuracy at the end": (HELD_OUT, "last"),
    "over the run": (HELD_OUT, "mean"),
    "learning rate": ("learning_rate", "max"),
    "seconds": ("seconds", "max"),
    "forward passes": ("forward_passes", "max"),
}


def settings(*options):
    """The settings that the options of a command make."""
    return wd1.parse_arguments(["--device", "cpu", *options], train.MoreConfig)


def run(directory, task, seed, words, **pretraining):
    """A line for each step of a run, a frame: its metrics, the seconds until then, and HELD_OUT
    where it was evaluated. It is made now if it is not there."""
    model = tiny_base(task, seed, **pretraining)
    options = ["--task", task, "--seed", str(seed), "--model", model]
    if task == "countdown":  # the tiny models do sums of small numbers only
        options += ["--data", f"{model}/problems.jsonl"]
    config = settings(*options, "--output_dir", str(directory), *words.split())
    finished = directory / "finished"
    mark = json.dumps(config.model_dump())
    if not finished.exists() or finished.read_text() != mark:
        shutil.rmtree(directory, ignore_errors=True)
        with redirect_stderr(io.StringIO()), suppress(FloatingPointError):  # it stays as it was
            train.train(config)
        shutil.rmtree(directory / "checkpoint", ignore_errors=True)
        finished.write_text(mark)
    metrics = pd.read_json(directory / "metrics.jsonl", lines=True)
    seconds = pd.read_json(directory / "timings.jsonl", lines=True).seconds
    metrics[HELD_OUT] = metrics["eval"].str.get("accuracy")
    return metrics.assign(seconds=seconds, learning_rate=config.learning_rate)


@functools.cache
def workers():
    return ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))


def place(root, case, seed):
    """A run's directory. Its name begins as that of a model which has the tiny models' settings."""
    return root / re.sub("[^a-z0-9+.]+", "-", f"tiny {case} seed {seed}".lower())


def grid(root, cases, seeds=range(3), task="sudoku", **pretraining):
    """The metrics of a run for each case {name: words of the command} and each seed, which has a
    base model of its own: a frame indexed by case, seed and step."""
    jobs = {
        (case, seed): (place(root, case, seed), task, seed, words)
        for (case, words), seed in itertools.product(cases.items(), seeds)
    }
    frames = workers().map(functools.partial(run, **pretraining), *zip(*jobs.values()))
    return pd.concat(dict(zip(tqdm(jobs), frames)), names=["case", "seed", "step"])


def outcomes(runs):
    """What came out of each of `grid`'s runs, a frame indexed by case and seed."""
    return runs.groupby(["case", "seed"], sort=False).agg(**OUTCOMES)


def over_seeds(found):
    """What came out of each case, mean ± standard error."""
    shown = lambda values: f"{values.mean():.3g} ± {values.sem():.1g}"
    return found.groupby("case", sort=False).agg(shown)


def table(frame):
    """A frame in Markdown; its index makes the first column."""
    flat = frame.reset_index()
    lines = [flat.columns, ["---"] * len(flat.columns), *flat.values]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def curves(panels, out):
    """A picture of {title: a column of `grid`'s frame}: for each case the mean over seeds at every
    step, with its standard error."""
    sheet, places = figure(1, len(panels))
    for axes, (title, values) in zip(places.flat, panels.items()):
        found = values.dropna().groupby(["step", "case"]).agg(["mean", "sem"]).unstack()
        found["mean"].plot(ax=axes, yerr=found["sem"], title=title, legend=False)
    save(sheet, out, axes)


def bars(frame, out):
    """A picture: a panel for each column of a frame, a bar for each row."""
    sheet, places = figure(1, len(frame.columns), sharey=True)
    frame[::-1].plot.barh(subplots=True, ax=places, legend=False)
    for axes in places.flat:
        axes.bar_label(axes.containers[0], fmt=lambda size: f" {float(f'{size:.3g}'):g}" if size else "")
        axes.margins(x=0.25)  # for the numbers, which no line should cross
        axes.grid(False)
    save(sheet, out)
