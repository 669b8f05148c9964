"""What happens to runs on a shared cluster, made to happen to small ones.

A reference run is never disturbed. Every other one is killed, starved of disk, damaged or misused,
and resumed until it ends: its metrics, samples, weights and optimizer must be the reference's, bit
for bit. `make faults` tries each fault WD1_FAULTS times and prints how often work was lost.
"""

import itertools
import math
import multiprocessing
import os
import random
import resource
import shutil
import sys
import threading
import time
from signal import SIGINT, SIGKILL, SIGTERM, alarm, raise_signal

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import rewards
import wd1
from extras.tests.program import FAST, arguments, call, contents, even_characters, few_problems

tqdm.set_lock(threading.RLock())  # its own is shared among forks, and one that is killed keeps it
tqdm.monitor_interval = 0  # nor may a thread have it at the moment of a fork
ROUNDS = int(os.environ.get("WD1_FAULTS", 2))
SETTINGS = dict(
    FAST, micro_batch_size=2, max_steps=4, eval_every=2, eval_size=2, lora_rank=2, save_every=2,
    temperature=1.0, likelihood="elbo",
)  # fmt: skip


class Run:
    """A run in `directory`, in a fork of this process; what it prints is in DIRECTORY.log."""

    def __init__(self, directory, reference=None):
        self.directory, self.reference = directory, reference
        self.log = directory.with_suffix(".log")

    def start(self, *prepare):
        """Begins it or goes on; `prepare`, a function and what it is given, comes first."""
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=self.run, args=prepare)
        self.process.start()
        return self

    def run(self, prepare=lambda: None, *given):
        """What the fork does."""
        alarm(100)  # rather than wait for ever
        log = self.log.open("a")
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = open(2, "w", buffering=1)
        wd1.plot = lambda *_: None  # it takes a second
        rewards.Sudoku.reward, rewards.Sudoku.problems = even_characters, few_problems
        prepare(*given)
        options = {"resume": True} if (self.directory / "config.json").exists() else SETTINGS
        sys.exit(call(arguments(output_dir=self.directory, **options)))

    def wait(self):
        """Its exit code, or minus the signal that ended it, and all that it has ever said."""
        self.process.join()
        said = self.log.read_text()
        assert "Traceback" not in said, said
        return self.process.exitcode, said

    def assert_same(self):
        """It ended as the reference did."""
        for pattern in ("metrics.jsonl", "samples.jsonl", "model/*.safetensors"):
            want, found = (set(contents(run.directory, pattern)) for run in (self.reference, self))
            assert want and want <= found, f"{self.directory}: {pattern} differs"
        last = f"checkpoint/step-{SETTINGS['max_steps']:07}-*"  # its header has the seconds it took
        want, found = (load_file(*run.directory.glob(last)) for run in (self.reference, self))
        torch.testing.assert_close(found, want, rtol=0, atol=0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that nothing happens to."""
    run = Run(tmp_path_factory.mktemp("faults") / "reference")
    assert run.start().wait()[0] == 0
    return run


# Each fault happens to a run; afterwards it is resumed, and has to end as the reference did.


def killed_at_random(run, draw):
    """SIGKILL at random moments, three times"""
    for _ in range(3):
        run.start()
        time.sleep(draw.uniform(0, 1))
        run.process.kill()
        run.wait()


def killed_at_changes(run, draw):
    """SIGKILL just before it opens a file for writing, or makes, renames or removes one"""
    left = itertools.count(draw.randrange(100), -1)
    changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}

    def die(event, arguments):
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in changes) and next(left) <= 0:
            raise_signal(SIGKILL)

    run.start(sys.addaudithook, die).wait()


def at_some_reward(draw, act):
    """In a run's fork: one of its first twenty rewards calls `act`, and is what that returns."""
    left = itertools.count(draw.randrange(20), -1)

    def reward(*answer):
        return next(left) == 0 and act() or even_characters(*answer)

    rewards.Sudoku.reward = reward


def asked_to_stop(run, draw):
    """Ctrl-C and SIGTERM at a random moment: it leaves a checkpoint and says how to go on"""
    ask = lambda: raise_signal(SIGTERM) or raise_signal(SIGINT)
    later = lambda: threading.Timer(draw.uniform(0, 0.3), ask).start()
    code, said = run.start(at_some_reward, draw, later).wait()
    again = f"to go on: python wd1.py --resume --output_dir {run.directory}\n"
    assert contents(run.directory, "summary.json") or code == 1 and again in said
    assert contents(run.directory, "checkpoint/step-*")


def reader_gone(run, draw):
    """whoever reads the output goes, as `head` does: it goes on; or, as `tee`, by Ctrl-C"""
    reading, writing = os.pipe()
    by_signal = draw.random() < 0.5

    def tee():
        os.dup2(writing, 2)
        at_some_reward(draw, lambda: os.close(reading) or by_signal and raise_signal(SIGINT))

    run.start(tee)
    os.close(reading)
    assert run.wait()[0] == int(by_signal)
    assert contents(run.directory, "checkpoint/step-*")


def disk_full(run, draw):
    """no room for more than the beginning of a file: one sentence"""
    size = draw.randrange(200, 100_000)
    code, said = run.start(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size)).wait()
    assert code == 0 or code == 1 and said.splitlines()[-1].startswith("wd1: ")


def damaged(run, draw):
    """a bit of the newest checkpoint flipped, or its end cut off: noticed, an older one used"""
    shutil.copytree(run.reference.directory, run.directory)
    file = max(run.directory.glob("checkpoint/step-*"))
    data = bytearray(file.read_bytes())
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    file.write_bytes(draw.choice([data, data[:place]]))
    assert "is damaged" in run.start().wait()[1], file


def two_at_once(run, draw):
    """two runs at once on one directory: one goes on, the other is refused"""
    run.start()
    time.sleep(draw.uniform(0, 0.3))
    assert {Run(run.directory).start().wait()[0], run.wait()[0]} == {0, 2}


@pytest.mark.parametrize("number", range(ROUNDS))
@pytest.mark.parametrize("fault", [
    killed_at_random, killed_at_changes, asked_to_stop, reader_gone, disk_full,
    damaged, two_at_once,
])  # fmt: skip
def test_a_run_survives(reference, tmp_path, fault, number):
    run = Run(tmp_path / "run", reference)
    fault(run, random.Random(number))
    code, said = run.start().wait()
    assert code == 0, said
    run.assert_same()


def test_lost_work_would_be_noticed(reference, tmp_path):
    """A byte that differs is a difference; so is a run whose draws are not its steps' own."""
    forgetful = Run(tmp_path / "forgetful", reference)
    forgetful.start(setattr, torch, "manual_seed", lambda number: None).wait()
    with pytest.raises(AssertionError, match="metrics.jsonl differs"):
        forgetful.assert_same()
    run = Run(shutil.copytree(reference.directory, tmp_path / "run"), reference)
    run.assert_same()
    for name in ("model/adapter_model.safetensors", "samples.jsonl", "metrics.jsonl"):
        (run.directory / name).write_bytes((run.directory / name).read_bytes() + b"x")
        with pytest.raises(AssertionError, match="differs"):
            run.assert_same()


def test_a_run_of_which_no_checkpoint_is_whole_is_refused_and_left_as_it_is(reference, tmp_path):
    run = Run(shutil.copytree(reference.directory, tmp_path / "run"))
    for file in run.directory.glob("checkpoint/step-*"):
        file.write_bytes(b"damaged")
    before = contents(run.directory)
    code, said = run.start().wait()
    assert code == 2 and "no whole checkpoint" in said and contents(run.directory) == before


def without_gradients(steps):
    SETTINGS["max_steps"] = steps
    torch.nn.utils.clip_grad_norm_ = lambda *_: torch.tensor(math.nan)


def with_ruined_weights(steps):
    def ruin(optimizer):
        optimizer.param_groups[0]["params"][-1].data[0] = math.inf

    torch.optim.AdamW.step = ruin


@pytest.mark.parametrize("prepare, steps, last", [
    (without_gradients, 9, 3), (without_gradients, 2, 2), (with_ruined_weights, 4, 1),
])  # fmt: skip
def test_a_run_without_finite_gradients_or_weights_is_a_failure(tmp_path, prepare, steps, last):
    """After three steps; or after the last one, rather than with a model that learned nothing. What
    is ruined is saved nowhere, nor are metrics that come of it, which would be no JSON."""
    run = Run(tmp_path / "run")
    code, said = run.start(prepare, steps).wait()
    assert code == 1 and f"step {last}: no finite loss or weights" in said
    assert not (run.directory / "model").exists()
    assert all(path.name < f"step-{last:07}" for path in run.directory.glob("*/step-*"))
    assert "NaN" not in (run.directory / "metrics.jsonl").read_text()
