"""What happens to runs on a shared cluster, made to happen to small ones.

A reference run is never disturbed. Every other one is killed, starved of disk, damaged or misused,
and resumed until it ends: its metrics, samples, weights and optimizer must be the reference's, bit
for bit. `make faults` tries each fault WD1_FAULTS times and prints how often work was lost.
"""

import itertools
import math
import os
import random
import resource
import shutil
import sys
import threading
import time
import traceback
from signal import SIGINT, SIGKILL, SIGTERM, alarm, raise_signal

import pytest
import torch
from tqdm import tqdm

import rewards
import wd1
from extras.tests.program import FAST, arguments, call, even_characters, few_problems

tqdm.set_lock(threading.RLock())  # its own is shared among forks, and one that is killed keeps it
tqdm.monitor_interval = 0  # nor may a thread have it at the moment of a fork
ROUNDS = int(os.environ.get("WD1_FAULTS", 2))
SETTINGS = dict(
    FAST, micro_batch_size=2, max_steps=4, eval_every=2, eval_size=2, lora_rank=2, save_every=2,
    warmup_steps=1, temperature=1.0, likelihood="elbo",
)  # fmt: skip


class Run:
    """A run in `directory`, in a fork of this process; what it prints is in DIRECTORY.log."""

    def __init__(self, directory):
        self.directory, self.log = directory, directory.with_suffix(".log")

    def start(self, prepare=lambda: None):
        """Begins it, or goes on with it, and calls `prepare` in the fork first."""
        options = {"resume": True} if (self.directory / "config.json").exists() else SETTINGS
        self.process = os.fork()
        if self.process:
            return self
        code = 70
        alarm(100)  # rather than wait for ever
        try:
            os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
            wd1.plot = lambda path: None  # it takes a second
            rewards.Sudoku.reward, rewards.Sudoku.problems = even_characters, few_problems
            prepare()
            code = call(arguments(output_dir=self.directory, **options))
        except BaseException:
            traceback.print_exc()
        finally:  # whatever happens, no second pytest
            os._exit(code)

    def wait(self):
        """Its exit code, or minus the signal that ended it, and all that it has ever said."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        said = self.log.read_text()
        assert "Traceback" not in said, said
        return code, said

    def content(self, pattern="**/*"):
        """The bytes of its files."""
        files = sorted(self.directory.glob(pattern))
        return [file.read_bytes() for file in files if file.is_file()]

    def survives(self, reference):
        """Resumed, it ends, and as the reference did."""
        code, said = self.start().wait()
        assert code == 0, said
        self.assert_same(reference)

    def assert_same(self, reference):
        newest = f"checkpoint/step-{SETTINGS['max_steps']:07}*/*.safetensors"
        for pattern in ("metrics.jsonl", "samples.jsonl", "model/*.safetensors", newest):
            want, found = set(reference.content(pattern)), set(self.content(pattern))
            if not want or want - found:
                raise AssertionError(f"{self.directory}: {pattern} differs")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that nothing happens to."""
    run = Run(tmp_path_factory.mktemp("faults") / "reference")
    run.survives(run)
    yield run
    print("\n| what happens | tried | lost |\n|---|---|---|", *TABLE, sep="\n")


# Each fault happens to a run; afterwards it is resumed, and has to end as the reference did.


def killed_at_random(run, reference, draw):
    """SIGKILL at random moments, three times"""
    for _ in range(3):
        run.start()
        time.sleep(draw.uniform(0, 1))
        os.kill(run.process, SIGKILL)
        run.wait()


def killed_at_changes(run, reference, draw):
    """SIGKILL just before it opens a file for writing, or makes, renames or removes one"""
    left = itertools.count(draw.randrange(100), -1)

    def die(event, arguments):
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if writes or event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}:
            if next(left) <= 0:
                os.kill(os.getpid(), SIGKILL)

    run.start(lambda: sys.addaudithook(die)).wait()


def at_some_reward(draw, act):
    """In a run's fork: one of its first twenty rewards calls `act`, and is what that returns."""
    left = itertools.count(draw.randrange(20), -1)

    def reward(*answer):
        return next(left) == 0 and act() or even_characters(*answer)

    rewards.Sudoku.reward = reward


def asked_to_stop(run, reference, draw):
    """Ctrl-C and SIGTERM at a random moment: it leaves a checkpoint and says how to go on"""
    ask = lambda: raise_signal(SIGTERM) or raise_signal(SIGINT)
    later = lambda: threading.Timer(draw.uniform(0, 0.3), ask).start()
    code, said = run.start(lambda: at_some_reward(draw, later)).wait()
    assert run.content("summary.json") or code == 1 and "--resume" in said, said
    assert run.content("checkpoint/step-*/state.json"), said


def asked_again(run, reference, draw):
    """Ctrl-C while it is in a step that lasts, and once more: it ends at once"""
    run.start(lambda: setattr(rewards.Sudoku, "reward", lambda *_: time.sleep(99)))
    for _ in range(2):
        time.sleep(1.5)
        os.kill(run.process, SIGINT)
    assert run.wait()[0] == 128 + SIGINT


def reader_gone(run, reference, draw):
    """whoever reads the output goes, as `head` does; by Ctrl-C, as `tee` does: a checkpoint"""
    reading, writing = os.pipe()
    by_signal = draw.random() < 0.5

    def tee():
        os.dup2(writing, 2)
        go = lambda: os.close(reading) or by_signal and raise_signal(SIGINT)
        at_some_reward(draw, go)

    run.start(tee)
    os.close(reading)
    run.wait()
    assert run.content("checkpoint/step-*/state.json") or not by_signal


def disk_full(run, reference, draw):
    """no room for more than the beginning of a file: one sentence"""
    size = draw.randrange(200, 100_000)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    code, said = run.start(limit).wait()
    assert code == 0 or code == 1 and said.splitlines()[-1].startswith("wd1: "), said


def damaged(run, reference, draw):
    """a bit of the newest checkpoint flipped, a file cut or gone: noticed, an older one used"""
    shutil.copytree(reference.directory, run.directory)
    file = draw.choice(sorted(max(run.directory.glob("checkpoint/step-*")).iterdir()))
    data = bytearray(file.read_bytes())
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    file.unlink()
    if left := draw.choice([data, data[:place], b""]):
        file.write_bytes(left)
    assert "is damaged" in run.start().wait()[1], file


def two_at_once(run, reference, draw):
    """two runs at once on one directory: one goes on, the other is refused"""
    run.start()
    time.sleep(draw.uniform(0, 0.3))
    codes = {Run(run.directory).start().wait()[0], run.wait()[0]}
    assert codes == {0, 2}, run.log.read_text()


def bad_rewards(run, reference, draw):
    """a reward that is no finite number: one sentence that shows the completion"""
    bad = draw.choice([math.nan, math.inf, "much", lambda: 1])
    code, said = run.start(lambda: at_some_reward(draw, lambda: bad)).wait()
    assert code == 2 and "no reward for the completion" in said, said


FAULTS = (
    killed_at_random, killed_at_changes, asked_to_stop, asked_again, reader_gone, disk_full,
    damaged, two_at_once, bad_rewards,
)  # fmt: skip
TABLE = []  # rows of Markdown


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_run_survives(reference, fault):
    lost = []
    for number in range(ROUNDS):
        run = Run(reference.directory.with_name(f"{fault.__name__}-{number}"))
        try:
            fault(run, reference, random.Random(number))
            run.survives(reference)
        except AssertionError as error:
            lost.append(f"{number}: {error!s:.2000}")
    TABLE.append(f"| {fault.__doc__} | {ROUNDS} | {len(lost)} |")
    if lost:
        pytest.fail("\n".join(lost))


def test_lost_work_would_be_noticed(reference, tmp_path):
    """A byte that differs is a difference; so is a run whose draws are not its steps' own."""
    for name in ("metrics.jsonl", "samples.jsonl", "model/adapter_model.safetensors"):
        run = Run(shutil.copytree(reference.directory, tmp_path / name))
        run.assert_same(reference)
        (run.directory / name).write_bytes(b"x" + run.content(name)[0])
        with pytest.raises(AssertionError, match="differs"):
            run.assert_same(reference)
    run = Run(tmp_path / "forgetful")
    run.start(lambda: setattr(torch, "manual_seed", lambda number: None)).wait()
    with pytest.raises(AssertionError, match="differs"):
        run.survives(reference)


def test_a_run_without_finite_gradients_ends(tmp_path):
    nan = lambda *_: torch.tensor(math.nan)
    run = Run(tmp_path).start(lambda: setattr(torch.nn.utils, "clip_grad_norm_", nan))
    code, said = run.wait()
    assert code == 1 and "no finite loss" in said, said


def test_what_must_not_go_on_is_refused_and_left_as_it_is(reference, tmp_path):
    """A run whose problems have changed, and one of which no checkpoint is whole."""
    run = Run(shutil.copytree(reference.directory, tmp_path / "run"))
    others = lambda *given: few_problems(*given)[1:]
    for sentence in ("the problems are not", "is whole"):
        before = run.content()
        code, said = run.start(lambda: setattr(rewards.Sudoku, "problems", others)).wait()
        assert code == 2 and sentence in said and run.content() == before, said
        for file in run.directory.glob("checkpoint/*/state.json"):
            file.unlink()
