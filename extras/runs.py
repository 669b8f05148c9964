"""A run's directory: claimed once, written so that a crash at any moment leaves it whole, and resumed only as it was."""

import json
import os
import shutil
import signal
import threading
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from rewards import InputError, refusing

# What a resumed run may set anew; anything else would make it another run.
MAY_CHANGE = "max_steps resume device output_dir save_every eval_every rollout_batch_size micro_batch_size".split()


def replace(path, write):
    """Calls `write(a temporary path)`, then renames it: the file is whole, or as it was."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


@contextmanager
def signals_caught():
    """A list that the first Ctrl-C or SIGTERM fills, so that the loop can finish its step; a second one ends at once."""
    stop, previous = [], {}

    def ask(number, _):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class RunDirectory:
    """Decides, before anything is computed or written, if config.output_dir can be used; raises InputError if not.

    `saved` is the checkpoint to go on from, or None: a dict of tensors and numbers (never unpickled as code).
    """

    def __init__(self, config):
        self.config, self.path, self.saved = config, Path(config.output_dir), None
        self.checkpoint = self.path / "checkpoint" / "state.pt"
        there = next(parent for parent in [self.path, *self.path.absolute().parents] if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise InputError(f"--output_dir {self.path} cannot be written: {there} is no directory, or read-only")
        if not config.resume:
            if self.path.exists() and any(self.path.iterdir()):
                raise InputError(
                    f"--output_dir {self.path} holds another run: --resume goes on with it, or choose another directory"
                )
            return
        with refusing(f"--resume: {self.path} holds no run to go on with"):
            before = json.loads((self.path / "config.json").read_text())
        for name, value in asdict(config).items():
            if name not in MAY_CHANGE and before.get(name) != value:
                raise InputError(f"--resume: --{name} was {before.get(name)} and now is {value}: start a new run to change it")
        if self.checkpoint.exists():
            with refusing(f"{self.checkpoint} cannot be read; delete it to start the run anew"):
                self.saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)

    def restore(self, state, parameters, optimizer):
        """Puts the checkpoint, if there is one, into what is given and returns its state, else `state`."""
        if not self.saved:
            return state
        with refusing(f"{self.checkpoint} does not fit the model"):
            optimizer.load_state_dict(self.saved["optimizer"])
            for name, weight in parameters.items():
                weight.data.copy_(self.saved["weights"][name])
        return self.saved["state"]

    def start(self, step):
        """Creates the directory; of a resumed run it drops what was logged after its checkpoint: it is about to recur."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self.write_json("config.json", asdict(self.config))
        for name in ("metrics.jsonl", "samples.jsonl"):
            file = self.path / name
            lines = file.read_text().splitlines(keepends=True) if self.saved and file.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            replace(file, lambda path: path.write_text("".join(kept)))  # noqa: B023

    def log(self, name, **line):
        """Appends a line to metrics.jsonl or samples.jsonl."""
        with (self.path / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def save(self, **parts):
        """Replaces the checkpoint."""
        replace(self.checkpoint, lambda path: torch.save(parts, path))

    def write_json(self, name, content):
        replace(self.path / name, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))

    def finish(self, model, tokenizer, summary):
        """Writes the trained model, which load_model and plain transformers (peft, after LoRA) read, and the summary."""
        shutil.rmtree(self.path / "model", ignore_errors=True)
        model.save_pretrained(self.path / "model")
        tokenizer.save_pretrained(self.path / "model")
        self.write_json("summary.json", summary)
