"""What a run measures, sent to a tracker besides metrics.jsonl: `--track tensorboard`, `wandb` or `trackio`.

Each is a package of its own, needed only when asked for. Where wandb and trackio send things is up to their own settings
(WANDB_MODE=offline keeps all on this machine; trackio does so by default).
"""

import importlib.util
import uuid
from dataclasses import asdict

from rewards import InputError, refusing

PROJECT = "wd1"


def check_tracker(kind):
    """Refuses a tracker that is not installed."""
    spec = importlib.util.find_spec(kind) if kind else None
    if kind and (spec is None or spec.origin is None):  # a folder of that name is no package
        raise InputError(f"--track {kind} needs a package: pip install {kind}")


def flat(metrics, prefix=""):
    """{"eval": {"accuracy": 1}} as {"eval/accuracy": 1}: the numbers alone."""
    numbers = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            numbers[prefix + name] = value
    return numbers


def open_tracker(config, path, step):
    """(log, close) for a run in `path` that goes on after `step`: log(step, metrics) sends the numbers in a dict."""
    if not config.track:
        return lambda *_: None, lambda: None
    with refusing(f"--track {config.track}: cannot begin"):
        if config.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(path / "tensorboard", purge_step=step + 1 if step else None)

            def log(step, metrics):
                for name, value in flat(metrics).items():
                    writer.add_scalar(name, value, step)
                writer.flush()

            return log, writer.close
        tracker = importlib.import_module(config.track)
        options = dict(project=PROJECT, name=path.resolve().name, config=asdict(config))
        if config.track == "wandb":
            name = path / "wandb-id"
            if not (step and name.exists()):
                name.write_text(uuid.uuid4().hex)
            options |= dict(dir=path, id=name.read_text(), resume="allow")
        else:
            options |= dict(resume="allow" if step else "never")
        tracker.init(**options)
        return lambda step, metrics: tracker.log(flat(metrics), step=step), tracker.finish
