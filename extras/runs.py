"""A run's directory: claimed by one process at a time, whole at every moment, and resumed only as what it was.

Nothing in it is ever half-written under its own name. Files and checkpoints are written beside their place and renamed
into it; what is appended (metrics, samples) is cut back to the checkpoint that a resumed run starts from. And because
every draw of a step depends on the settings and the step's number alone, the resumed run then repeats what was lost, bit
for bit: no generator's state needs saving.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from extras.card import model_card
from extras.health import advice
from extras.parallel import RANK, WORLD, barrier, everywhere, full_weights, is_lost_connection, spread
from extras.pictures import plot_runs
from extras.track import open_tracker
from rewards import InputError, refusing

# What a resumed run may set anew, though draws or the schedule may then differ; anything else would make it another run.
MAY_CHANGE = "max_steps resume track device shard compile output_dir save_every eval_every".split()
MAY_CHANGE += ["rollout_batch_size", "micro_batch_size"]
LOGS = "metrics.jsonl", "samples.jsonl", "timings.jsonl"
SUMS = "SHA256SUMS"  # of a checkpoint's files; sha256sum -c reads it as well


@contextmanager
def writing(path):
    """Whatever cannot be written inside is an OSError that says where and why."""
    try:
        yield
    except filelock.Timeout:  # an OSError
        raise
    except (OSError, NotImplementedError, SafetensorError, CheckpointException) as error:  # the last is not an Exception
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise OSError(f"{path} cannot be written ({reason}); what was there before is as it was") from None


@contextmanager
def replacing(path):
    """A temporary path to write a file or a directory to. On success it takes the place of `path`; on failure `path` stays."""
    unfinished, old = (path.with_name(path.name + suffix) for suffix in (".unfinished", ".old"))
    try:
        with writing(path):
            remove(unfinished)
            yield unfinished
            if RANK == 0:
                if path.is_dir():  # which os.replace does not replace
                    remove(old)
                    os.replace(path, old)
                os.replace(unfinished, path)
    finally:
        with suppress(OSError):  # there is something else to say
            remove(unfinished)
            remove(old)


def remove(path):
    if RANK == 0:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def tensors(parameters, optimizer):
    """All tensors of a checkpoint: a flat dict, whose entries dcp.load overwrites in place. Some may be sharded.

    Gives AdamW its state, if it has taken no step yet.
    """
    flat = {}
    for name, weight in parameters.items():
        if not optimizer.state[weight]:  # as AdamW begins
            empty = {moment: torch.zeros_like(weight, requires_grad=False) for moment in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {"step": torch.zeros(()), **empty}
        flat[f"weights.{name}"] = weight.detach()
        flat |= {f"{moment}.{name}": tensor for moment, tensor in optimizer.state[weight].items()}
    return flat


def checksums(checkpoint):
    """A line of SHA256SUMS, or an error, for each file of a checkpoint; each rank reads its share of them."""

    def line(file):
        try:
            with file.open("rb") as content:
                return f"{hashlib.file_digest(content, 'sha256').hexdigest()}  {file.name}\n"
        except OSError as error:
            return f"{error}  {file.name}\n"

    files = sorted(file for file in checkpoint.iterdir() if file.name != SUMS)
    return spread(line, files) if files else []


def damage(checkpoint):
    """The names of the files of a checkpoint that are not what was written; files that others put there are not looked at."""
    found = checksums(checkpoint)
    try:
        written = (checkpoint / SUMS).read_text().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError):
        written = []
    name = lambda line: line.split("  ")[-1].strip()
    listed, wrong = {name(line) for line in written}, {name(line) for line in set(written) ^ set(found)}
    wrong = {file for file in wrong if file in listed or file.endswith(".safetensors")}  # all of those would be loaded
    return sorted(wrong) if written else [SUMS]


class RunDirectory:
    """Decides, before anything is computed or written, if config.output_dir can be used; raises InputError if not.

    A checkpoint is a directory, checkpoint/step-N: state.json, safetensors files, one a rank, which any number of ranks
    reads again, and the checksums of all. It is renamed into place when it is whole, and the one before it kept. A
    damaged one is noticed and passed over. Rank 0 writes all else. While a process has the directory it holds `.lock`.
    """

    def __init__(self, config):
        self.config, self.path, self.saved, self.history, self.signals = config, Path(config.output_dir), None, [], []
        self.lock = filelock.FileLock(self.path / ".lock", timeout=0)  # the system drops it when the process ends
        there = next(parent for parent in [self.path, *self.path.absolute().parents] if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise InputError(f"--output_dir {self.path} cannot be written: {there} is no directory, or read-only")
        if not config.resume:
            self.refuse_another_run()
            return
        with refusing(f"--resume: {self.path} holds no run to go on with"):
            before = json.loads((self.path / "config.json").read_text())
        for name, value in asdict(config).items():
            if name not in MAY_CHANGE and before.get(name) != value:
                raise InputError(f"--resume: --{name} was {before.get(name)} and now is {value}: start a new run to change it")
        self.claim()
        self.choose_checkpoint()

    def refuse_another_run(self):
        there = {file.name for file in self.path.iterdir()} if self.path.exists() else set()
        if there - {".lock", "config.json.unfinished"}:  # which a run leaves that died as it began
            sentence = f"--output_dir {self.path} holds another run: --resume goes on with it, or choose another directory"
            raise InputError(sentence)

    def claim(self):
        if RANK == 0:
            try:
                with writing(self.path / ".lock"):
                    self.lock.acquire()
            except filelock.Timeout:
                raise InputError(f"--output_dir {self.path}: another process is writing there; let it end first") from None

    def choose_checkpoint(self):
        """Sets `saved` to the newest checkpoint that is whole, and says which newer ones are not."""
        checkpoints = sorted(self.path.glob("checkpoint/step-*[0-9]"), reverse=True)
        for checkpoint in checkpoints:
            damaged = damage(checkpoint)
            if everywhere(not damaged):
                self.saved = checkpoint
                return
            if RANK == 0:
                print(f"wd1: {checkpoint} is damaged ({', '.join(damaged)}), passed over", file=sys.stderr)
        if checkpoints:
            raise InputError(f"no checkpoint in {self.path}/checkpoint is whole: put one back, or delete all to begin again")

    def restore(self, state, parameters, optimizer):
        """Puts the checkpoint, if there is one, into what is given and returns its state, else `state`."""
        if not self.saved:
            return state
        with refusing(f"{self.saved} cannot be read or does not fit the model"):
            reader = HuggingFaceStorageReader(self.saved)
            dcp.load(tensors(parameters, optimizer), storage_reader=reader, no_dist=WORLD == 1)
            saved = json.loads((self.saved / "state.json").read_text())
        if saved["problems"] != state["problems"]:
            raise InputError(f"--resume: the problems are not those that {self.path} began with: was a data file changed?")
        return saved

    def save(self, state, parameters, optimizer):
        """Writes a checkpoint, and drops all but the one before it."""
        final = self.path / "checkpoint" / f"step-{state['steps']:07}"
        if final == self.saved:
            return
        with writing(self.path):
            for name in LOGS if RANK == 0 else ():  # a machine that fails must not remember the checkpoint and not its metrics
                with (self.path / name).open("a") as file:
                    os.fsync(file.fileno())
        with replacing(final) as unfinished:
            barrier()  # until rank 0 has made room
            writer = HuggingFaceStorageWriter(unfinished, save_distributed=True)
            dcp.save(tensors(parameters, optimizer), storage_writer=writer, no_dist=WORLD == 1)
            if RANK == 0:
                (unfinished / "state.json").write_text(json.dumps(state))
            barrier()
            sums = checksums(unfinished)
            if RANK == 0:
                (unfinished / SUMS).write_text("".join(sums))
        if RANK == 0:
            for other in set(final.parent.glob("step-*")) - {final, self.saved}:
                remove(other)
        self.saved = final
        barrier()

    @contextmanager
    def catching_signals(self):
        """A first Ctrl-C or SIGTERM asks the loop to stop where it can; another, a second later, ends the process at once.

        Within that second it counts as the same: schedulers signal every process, and torchrun passes on what it gets. An
        exception gives the lock back, for callers that go on living.
        """

        def ask(number, _):
            self.signals.append(time.monotonic())
            if self.signals[-1] > self.signals[0] + 1:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            if RANK == 0 and len(self.signals) == 1:
                try:
                    os.write(2, b"\nstopping as soon as the run can go on from there; once more stops at once\n")
                except OSError:  # whoever read this is gone, as `| tee` is after Ctrl-C; nor must the progress bar fail
                    for output in (1, 2):
                        os.dup2(os.open(os.devnull, os.O_WRONLY), output)

        previous = {}
        if threading.current_thread() is threading.main_thread():
            previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except BaseException:
            self.lock.release(force=True)
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def stop_if_asked(self, state, parameters, optimizer):
        """After a signal to any rank: leaves a checkpoint of `state` and raises SystemExit, which says how to go on."""
        if not everywhere(not self.signals):
            self.save(state, parameters, optimizer)
            command = f"python wd1.py --resume --output_dir {shlex.quote(str(self.path))}"
            raise SystemExit(1 if RANK else f"stopped after step {state['steps']}; to go on: {command}")

    def start(self, step):
        """Claims the directory, creating it, and writes config.json. Of a resumed run it loads the metrics so far, cuts off
        what came after its checkpoint, which is about to recur, and sets damaged checkpoints aside."""
        barrier()  # nobody finds another's new files where nothing should be
        if RANK == 0:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            self.claim()
            if not self.config.resume:
                self.refuse_another_run()  # that began in the meantime
            self.log, self.close = open_tracker(self.config, self.path, step)
            self.write_json("config.json", asdict(self.config))
        barrier()
        if not everywhere((self.path / "config.json").exists()):
            raise InputError(f"--output_dir {self.path} must be on a file system that all nodes share")
        if RANK:
            return
        (self.path / "checkpoint").mkdir(exist_ok=True)
        for later in self.path.glob("checkpoint/step-*[0-9]"):
            if later.name > self.saved.name:  # only damaged ones are; the next that is written removes them
                remove(later.with_name(later.name + ".damaged"))
                later.rename(later.with_name(later.name + ".damaged"))
        for name in LOGS:
            file, kept = self.path / name, []
            if self.saved and file.exists():
                with refusing(f"{file} cannot be read"):
                    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
                    kept = [line for line in lines if json.loads(line)["step"] <= step]
            if name == "metrics.jsonl":
                self.history = [json.loads(line) for line in kept]
                if self.saved and [line["step"] for line in self.history] != list(range(step + 1)):
                    raise InputError(f"{file} does not hold each step up to {step} once: put it back, or start a new run")
            with replacing(file) as unfinished:
                unfinished.write_text("".join(kept))

    def record(self, step, metrics, timings=None, prompt=None, samples=()):
        """Appends a line to metrics.jsonl, where two equal runs are equal, and to timings.jsonl, where they never are; and
        to samples.jsonl one for each (completion, reward) of a prompt. Warns, once, when the run seems to go wrong."""
        if RANK:
            return
        self.history.append(metrics)
        if not any("warning" in line for line in self.history) and (warning := advice(self.history)):
            metrics["warning"] = warning
            print(f"\nwd1: step {step}: {warning}", file=sys.stderr)
        lines = {
            "samples.jsonl": [dict(prompt=prompt, completion=text, reward=reward) for text, reward in samples],
            "timings.jsonl": [timings] if timings else [],
            "metrics.jsonl": [metrics],
        }
        for name, entries in lines.items():
            with writing(self.path / name), (self.path / name).open("a") as file:
                file.write("".join(json.dumps({"step": step, **entry}) + "\n" for entry in entries))
        try:
            self.log(step, metrics | (timings or {}))
        except Exception as error:  # what goes wrong there is no reason to end a run
            print(f"\nwd1: --track {self.config.track} has stopped: {error}", file=sys.stderr)
            self.log = lambda *_: None

    def progress(self, metrics, timings, evaluation):
        """The figures that stand behind the progress bar."""
        shown = {name: metrics[name] for name in ("reward", "accuracy", "loss")} | {"held-out": evaluation["accuracy"]}
        figures = {name: "-" if value is None else f"{value:.2f}" for name, value in shown.items()}
        return figures | {"tokens/s": f"{timings['tokens_per_second']:.0f}"}

    def write_json(self, name, content):
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name, content):
        with replacing(self.path / name) as unfinished:
            unfinished.write_text(content, encoding="utf-8")

    def finish(self, model, tokenizer, summary):
        """Writes the trained model, which load_model and plain transformers (peft, after LoRA) read, the summary and a card."""
        weights = full_weights(model)
        if hasattr(model, "peft_config"):  # or peft would save embeddings if config.json has another vocab_size, as LLaDAs' may
            weights["save_embedding_layers"] = False
        if RANK == 0:
            with replacing(self.path / "model") as unfinished:
                model.save_pretrained(unfinished, **weights)
                tokenizer.save_pretrained(unfinished)
            self.write_json("summary.json", summary)
            plot_runs([self.path], self.path / "curve.png")
            try:
                self.write_text("model/README.md", model_card(self.path))
            except InputError as error:  # nor is a card
                print(f"wd1: no model card: {error}", file=sys.stderr)
            with suppress(Exception):
                self.close()
        barrier()


def problems_of(step, config, size):
    """Indices of the N problems of a step: epoch after epoch, each in a random order of its own."""
    count = config.batch_size // config.num_generations
    places = [divmod(position, size) for position in range(step * count, (step + 1) * count)]
    orders = {epoch: np.random.default_rng([config.seed, epoch]).permutation(size) for epoch, _ in places}
    return [int(orders[epoch][place]) for epoch, place in places]


def exit_code(error, say=lambda sentence: print(f"wd1: {sentence}", file=sys.stderr)):
    """Says in a sentence why a program could not go on; the code to exit with. Raises what should never happen again."""
    if isinstance(error, RuntimeError) and not is_lost_connection(error):
        raise error
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, RuntimeError):
        reason = str(error).splitlines()[0]
        error = f"rank {RANK} cannot go on: {reason}\n--resume goes on from the last checkpoint"
    say(error)
    return 2 if isinstance(error, InputError) else 1
