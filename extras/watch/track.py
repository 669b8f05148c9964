"""What a run measures, sent to a tracker besides: `--track tensorboard`, `wandb` or `trackio`.

Each is a package of its own, needed only when asked for. Where wandb and trackio send things is up
to their own settings (WANDB_MODE=offline keeps all on this machine; trackio does so by default).
"""

import sys
import uuid
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec

from rewards import InputError
from wd1 import RANK


def flat(metrics, prefix=""):
    """{"eval": {"accuracy": 1}} as {"eval/accuracy": 1}: the numbers alone."""
    numbers = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            numbers[prefix + name] = value
    return numbers


def start(kind, run, step):
    """(log, finish) of a run whose first news is that of `step`, above 0 if it is resumed:
    log(numbers, step) sends a dict."""
    if kind == "tensorboard":
        board = import_module("torch.utils.tensorboard")
        writer = board.SummaryWriter(run.path / "tensorboard", purge_step=step)

        def log(numbers, step):
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)
            writer.flush()

        return log, writer.close
    tracker = import_module(kind)
    options = dict(project="wd1", name=run.path.resolve().name, config=asdict(run.config))
    options |= dict(resume="allow" if step else "never")
    if kind == "wandb":
        name = run.path / "wandb-id"  # by which a resumed run goes on
        if not (step and name.exists()):
            name.write_text(uuid.uuid4().hex)
        options |= dict(dir=run.path, id=name.read_text())
    tracker.init(**options)
    return tracker.log, tracker.finish


def tracker(config):
    """A function for `wd1.train(watch=...)` that sends each step's numbers to config.track.

    Raises InputError if that is not installed. A tracker that fails does not end the run."""
    kind, opened = config.track, []
    if getattr(find_spec(kind), "origin", None) is None:  # a folder of that name is no package
        raise InputError(f"--track {kind} needs a package: pip install {kind}")

    def watch(run, metrics):
        if RANK or opened == [None]:
            return
        try:
            opened[:] = opened or start(kind, run, metrics["step"])
            log, finish = opened
            log(flat(metrics), step=metrics["step"])
            if metrics["step"] == config.max_steps:
                finish()
        except Exception as error:  # whatever a service or its package comes up with
            opened[:] = [None]
            print(f"wd1: --track {kind} has stopped: {error}", file=sys.stderr)

    return watch
