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
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from extras.parallel import RANK, WORLD, barrier, everywhere, full_weights
from rewards import InputError, refusing

# What a resumed run may set anew; anything else would make it another run.
MAY_CHANGE = "max_steps resume device shard compile output_dir save_every eval_every".split()
MAY_CHANGE += ["rollout_batch_size", "micro_batch_size"]


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


def tensors(parameters, optimizer):
    """All tensors of a checkpoint: a flat dict, whose entries dcp.load overwrites in place. Some may be sharded."""
    flat = {}
    for name, weight in parameters.items():
        if not optimizer.state[weight]:  # as AdamW begins
            empty = {moment: torch.zeros_like(weight, requires_grad=False) for moment in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {"step": torch.zeros(()), **empty}
        flat[f"weights.{name}"] = weight.detach()
        flat |= {f"{moment}.{name}": tensor for moment, tensor in optimizer.state[weight].items()}
    return flat


class RunDirectory:
    """Decides, before anything is computed or written, if config.output_dir can be used; raises InputError if not.

    A checkpoint is a directory, checkpoint/step-N: state.json and safetensors files, one a rank, which any number of ranks
    reads again. It is renamed into place when it is whole, and the one before it kept. Rank 0 writes all else.
    """

    def __init__(self, config):
        self.config, self.path, self.saved = config, Path(config.output_dir), None
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
        if checkpoints := self.checkpoints():
            self.saved = checkpoints[-1]

    def checkpoints(self):
        """The directories of all whole checkpoints, the newest last."""
        return sorted(file.parent for file in self.path.glob("checkpoint/step-*[0-9]/state.json"))

    def restore(self, state, parameters, optimizer):
        """Puts the newest checkpoint, if there is one, into what is given and returns its state, else `state`."""
        if not self.saved:
            return state
        with refusing(f"{self.saved} cannot be read or does not fit the model; delete it to go on from an earlier one"):
            try:
                reader = HuggingFaceStorageReader(self.saved)
                dcp.load(tensors(parameters, optimizer), storage_reader=reader, no_dist=WORLD == 1)
            except CheckpointException as error:  # not an Exception
                raise OSError(str(next(iter(error.failures.values()))[0])) from None
            return json.loads((self.saved / "state.json").read_text())

    def save(self, state, parameters, optimizer):
        """Writes a checkpoint, and drops all but the one before it."""
        final = self.path / "checkpoint" / f"step-{state['steps']:07}"
        unfinished = final.with_name("unfinished")
        if RANK == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        barrier()
        writer = HuggingFaceStorageWriter(unfinished, save_distributed=True)
        dcp.save(tensors(parameters, optimizer), storage_writer=writer, no_dist=WORLD == 1)
        if RANK == 0:
            (unfinished / "state.json").write_text(json.dumps(state))
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            for old in self.checkpoints()[:-2]:
                shutil.rmtree(old)
        barrier()

    def start(self, step):
        """Creates the directory; of a resumed run it drops what was logged after its checkpoint: it is about to recur."""
        barrier()  # nobody finds another's new files where nothing should be
        if RANK == 0:
            (self.path / "checkpoint").mkdir(parents=True, exist_ok=True)
            self.write_json("config.json", asdict(self.config))
        barrier()
        if not everywhere((self.path / "config.json").exists()):
            raise InputError(f"--output_dir {self.path} must be on a file system that all nodes share")
        if RANK:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            file = self.path / name
            lines = file.read_text().splitlines(keepends=True) if self.saved and file.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            replace(file, lambda path: path.write_text("".join(kept)))  # noqa: B023

    def record(self, step, metrics, prompt=None, samples=()):
        """Appends a line to metrics.jsonl, and to samples.jsonl one for each (completion, reward)."""
        if RANK == 0:
            samples = [dict(step=step, prompt=prompt, completion=text, reward=reward) for text, reward in samples]
            for name, lines in (("samples.jsonl", samples), ("metrics.jsonl", [{"step": step, **metrics}])):
                with (self.path / name).open("a") as file:
                    file.write("".join(json.dumps(line) + "\n" for line in lines))

    def progress(self, metrics, evaluation):
        """The figures that stand behind the progress bar."""
        shown = {name: metrics[name] or 0.0 for name in ("reward", "accuracy", "loss")} | {"held-out": evaluation["accuracy"]}
        return {name: f"{value:.2f}" for name, value in shown.items()} | {"tokens/s": f"{metrics['tokens_per_second']:.0f}"}

    def write_json(self, name, content):
        replace(self.path / name, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))

    def finish(self, model, tokenizer, summary):
        """Writes the trained model, which load_model and plain transformers (peft, after LoRA) read, and the summary."""
        weights = full_weights(model)
        if RANK == 0:
            shutil.rmtree(self.path / "model", ignore_errors=True)
            model.save_pretrained(self.path / "model", **weights)
            tokenizer.save_pretrained(self.path / "model")
            self.write_json("summary.json", summary)
        barrier()
