"""What a run measures, sent to a tracker besides: `--track tensorboard`, `wandb` or `trackio`.

Each is a package of its own, needed only when asked for. Where wandb and trackio send things, and
whether a resumed run goes on in the same place, is up to their own settings (WANDB_MODE=offline
keeps all on this machine, as trackio does by default; WANDB_RUN_ID names a run to go on with).
"""

import atexit
import sys
from functools import cache
from importlib import import_module

import pandas as pd

from rewards import refusing


def start(run, kind, package):
    """A function that sends the numbers of a step: a dict, and which step it is."""
    if kind != "tensorboard":
        package.init(project="wd1", name=run.path.resolve().name, config=run.config.model_dump())
        atexit.register(package.finish)
        return package.log
    board = package.SummaryWriter(run.path / kind)

    def log(numbers, step):
        for name, number in numbers.items():
            board.add_scalar(name, number, step)
        board.flush()

    return log


def tracker(config):
    """A function for `wd1.train(watch=...)` that sends each step's numbers to config.track.

    Raises InputError if that is not installed. A tracker that fails does not end the run."""
    kind, connect, failed = config.track, cache(start), False
    with refusing(f"--track {kind} needs a package: pip install {kind}"):
        package = import_module(f"torch.utils.{kind}" if kind == "tensorboard" else kind)

    def watch(run, metrics):
        nonlocal failed
        if failed:
            return
        try:
            numbers = pd.json_normalize(metrics, sep="/").select_dtypes("number").loc[0]
            connect(run, kind, package)(numbers.to_dict(), step=metrics["step"])
        except Exception as error:  # whatever a service or its package comes up with
            failed = True
            print(f"wd1: --track {kind} has stopped: {error}", file=sys.stderr)

    return watch
