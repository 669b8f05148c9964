"""What happens to runs on a shared cluster, made to happen to small ones, again and again.

    make faults          # ends in the README's table; the tests do the same with fewer rounds

A reference run is never disturbed. Every other run is killed, starved of disk space, damaged or misused, and resumed until
it ends; it has survived if its metrics, samples, weights and optimizer are those of the reference, bit for bit. Where it must
not go on it has to say so in one sentence, with the right exit code and everything as it was. (What NaN or the loss of a
rank did to a run is not in the reference: there, finite weights and a run that goes on are all that is asked.) Linux only.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import rewards
import wd1
from extras.runs import MAY_CHANGE

HERE = Path(__file__).resolve().parents[1]
SETTINGS = dict(
    model=HERE / "tiny_config.json", device="cpu", gen_length=8, block_length=4, diffusion_steps=4, batch_size=4,
    num_generations=2, micro_batch_size=2, num_iterations=2, max_steps=4, eval_every=2, eval_lengths=8, eval_size=2,
    rollout_batch_size=4, lora_rank=2, learning_rate=1e-3, save_every=1, warmup_steps=1, temperature=1.0, likelihood="elbo",
)  # fmt: skip


def even_characters(task, completion, example):
    """A reward that a model with random weights gets some of."""
    return sum(ord(character) % 2 == 0 for character in completion) / (len(completion) + 1)


def beside(directory, name):
    """A file of the harness: not in a run's directory, nor on a small disk that a run is on."""
    return (directory.parents[1] if directory.parent.name == "disk" else directory.parent) / name


def log(directory):
    """What the last run in `directory` printed is in this file."""
    return beside(directory, f"{directory.name}.log")


def start(directory, prepare=lambda: None, **options):
    """Begins, in a process of its own, a run in `directory`, or goes on with the one that is there. Returns its id.

    The process is a fork: it need not load torch again. `prepare` is called in it first.
    """
    words = [f"--output_dir={directory}", *(f"--{name}={value}" for name, value in options.items())]
    if (directory / "config.json").exists():
        words.append("--resume")
    else:
        settings = SETTINGS | {"data": beside(directory, "puzzles.csv")}
        words += [f"--{name}={value}" for name, value in settings.items() if name not in options]
    sys.stdout.flush()
    if process := os.fork():
        return process
    try:
        output = os.open(log(directory), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        torch.set_num_threads(1)
        rewards.Sudoku.reward = even_characters
        wd1.plot_runs = lambda runs, out: Path(out).touch()  # a second each
        prepare()
        code = wd1.main(words)
    except SystemExit as stopped:
        print(stopped, file=sys.stderr)
        code = 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    os._exit(code)


def wait(process):
    """Its exit code, or the number of the signal that killed it, negated."""
    status = os.waitpid(process, 0)[1]
    return os.waitstatus_to_exitcode(status)


def kill(process):
    os.kill(process, signal.SIGKILL)
    wait(process)


def await_metrics(directory, seconds):
    """Waits until a run in `directory` is in its loop, or about to be, and `seconds` more."""
    while not (directory / "metrics.jsonl").exists():
        time.sleep(0.001)
    time.sleep(seconds)


def not_said(directory, *words):
    """What a run said whose last sentence should have held `words`, without a traceback; nothing, if it did."""
    said = log(directory).read_text()
    sentences = [line for line in said.splitlines() if line.startswith("wd1: ")]
    if "Traceback" in said or not sentences or not all(word in sentences[-1] for word in words):
        return f"said {said[-300:]!r}"


def content(file):
    """The bytes of a file; of safetensors those of each tensor, because the order of their header is random."""
    if file.suffix != ".safetensors":
        return file.read_bytes()
    return {name: (tensor.shape, tensor.numpy().tobytes()) for name, tensor in load_file(file).items()}


def differs(directory, reference):
    """The name of the first file in which a finished run is not the reference, or nothing."""
    newest = f"checkpoint/step-*{SETTINGS['max_steps']}/*.safetensors"
    for pattern in ("metrics.jsonl", "samples.jsonl", "model/*.safetensors", newest):
        files = [sorted(file.relative_to(run) for file in run.glob(pattern)) for run in (directory, reference)]
        if files[0] != files[1]:
            return f"has {pattern}: {[str(file) for file in files[0]]}"
        for name in files[0]:
            if content(directory / name) != content(reference / name):
                return f"differs in {name}"


def end(directory, reference):
    """Resumes a run until it ends and compares it with the reference: what is wrong, or nothing."""
    code = wait(start(directory))
    return f"exit code {code}: {log(directory).read_text()[-300:]}" if code else differs(directory, reference)


def copy(reference, name):
    directory = reference.with_name(name)
    shutil.rmtree(directory, ignore_errors=True)
    return Path(shutil.copytree(reference, directory))


def fresh(reference, name):
    shutil.rmtree(reference.with_name(name), ignore_errors=True)
    return reference.with_name(name)


def make_reference(scratch):
    """A run that nothing happens to, in `scratch`, and the puzzles of all runs there."""
    splits = [rewards.TASKS["sudoku"].puzzles(split, np.random.default_rng(0), 6, 20) for split in ("train", "test")]
    lines = [f"{example['puzzle']},{example['solution']}" for split in splits for example in split]
    (scratch / "puzzles.csv").write_text("\n".join(["Puzzle,Solution", *lines]))
    if wait(start(scratch / "reference")):
        raise SystemExit((scratch / "reference.log").read_text())
    return scratch / "reference"


# Each fault is a generator: for each time it is tried it yields None, or what was lost.


def killed_at_changes(reference, rounds, draw):
    """SIGKILL just before Python opens a file for writing, or makes, renames or removes one; at every third such moment"""
    changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
    directory, before = fresh(reference, "killed"), draw.randrange(3)
    while True:
        seen = [0]

        def die(event, arguments):
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            in_open_directory = event in changes and isinstance(arguments[-1], int) and arguments[-1] >= 0  # of shutil.rmtree
            if (writes or event in changes) and (in_open_directory or str(directory) in str(arguments[0])):
                seen[0] += 1
                if seen[0] > before:
                    os.kill(os.getpid(), signal.SIGKILL)

        shutil.rmtree(directory, ignore_errors=True)
        code = wait(start(directory, lambda: sys.addaudithook(die)))
        yield end(directory, reference) if code in (0, -signal.SIGKILL) else f"exit code {code}"
        if code == 0:
            return
        before += max(1, 200 // rounds)


def killed_at_random(reference, rounds, draw):
    """SIGKILL at random moments, each run several times"""
    begin = time.time()
    wait(start(fresh(reference, "timed")))
    duration = time.time() - begin
    for _ in range(rounds):
        directory = fresh(reference, "killed")
        for _ in range(3):
            process = start(directory)
            time.sleep(draw.uniform(0, duration))
            kill(process)
        yield end(directory, reference)


def killed_while_saving(reference, rounds, draw):
    """SIGKILL while a checkpoint is written"""
    for _ in range(rounds):
        directory = fresh(reference, "killed")
        process, wanted = start(directory), draw.randint(1, SETTINGS["max_steps"])
        while not list(directory.glob(f"checkpoint/step-*{wanted}.unfinished")) and not (directory / "summary.json").exists():
            pass
        time.sleep(draw.uniform(0, 0.03))
        kill(process)
        yield end(directory, reference)


def asked_to_stop(reference, rounds, draw):
    """Ctrl-C or SIGTERM at random moments"""
    for _ in range(rounds):
        directory = fresh(reference, "stopped")
        process = start(directory)
        await_metrics(directory, draw.uniform(0, 0.6))
        os.kill(process, draw.choice([signal.SIGINT, signal.SIGTERM]))
        code, said = wait(process), log(directory).read_text()
        if (code == 1 and "to go on: python wd1.py --resume" not in said) or code not in (0, 1):
            yield f"exit code {code}: {said[-300:]}"
        else:
            yield end(directory, reference)


def reader_gone(reference, rounds, draw):
    """Ctrl-C that also ends the `tee` that reads the output, or that comes twice at once: a checkpoint all the same"""
    for round in range(rounds):
        directory, (reading, writing) = fresh(reference, "stopped"), os.pipe()

        def pipe():
            os.close(reading)
            for number in (1, 2):
                os.dup2(writing, number)

        process = start(directory, pipe if round % 2 == 0 else lambda: None, save_every=50)
        os.close(writing)
        await_metrics(directory, draw.uniform(0, 0.3))
        os.close(reading)
        for number in [signal.SIGINT] + [signal.SIGTERM] * (round % 2):
            os.kill(process, number)
        code = wait(process)
        kept = list(directory.glob("checkpoint/step-*/state.json"))
        yield (None if kept else f"exit code {code}, no checkpoint") or end(directory, reference)


def asked_twice(reference, rounds, draw):
    """Ctrl-C twice, a second apart: the second ends the process at once"""
    for _ in range(rounds):
        directory = fresh(reference, "stopped")
        process = start(directory, lambda: setattr(wd1, "learn", lambda *_: time.sleep(60)))
        await_metrics(directory, 0.5)
        os.kill(process, signal.SIGINT)
        time.sleep(1.2)
        os.kill(process, draw.choice([signal.SIGINT, signal.SIGTERM]))
        begin = time.time()
        code = wait(process)
        yield end(directory, reference) if code < 0 and time.time() - begin < 5 else f"exit code {code}"


def damaged(reference, rounds, draw, harm):
    for _ in range(rounds):
        directory = copy(reference, "damaged")
        newest = sorted(directory.glob("checkpoint/step-*"))[-1]
        file = draw.choice(sorted(newest.iterdir()))
        harm(file)
        lost = end(directory, reference)
        noticed = f"{newest} is damaged ({file.name}" in log(directory).read_text()
        yield lost or (None if noticed or file.name == "SHA256SUMS" else f"nobody noticed {file.name}")


def bit_flipped(reference, rounds, draw):
    """a bit of the newest checkpoint flipped: noticed, named, the previous one used"""

    def flip(file):
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)

    yield from damaged(reference, rounds, draw, flip)


def truncated(reference, rounds, draw):
    """a file of the newest checkpoint cut or gone: noticed, named, the previous one used"""
    cut = lambda file: os.truncate(file, draw.randrange(file.stat().st_size)) if draw.random() < 0.8 else file.unlink()
    yield from damaged(reference, rounds, draw, cut)


def all_damaged(reference, rounds, draw):
    """every checkpoint damaged: refused, nothing changed"""
    directory = copy(reference, "damaged")
    for file in directory.glob("checkpoint/step-*/*.safetensors"):
        os.truncate(file, 100)
    before = digest(directory)
    code = wait(start(directory))
    kept = digest(directory) == before
    yield not_said(directory, "no checkpoint") or (None if code == 2 and kept else f"exit code {code}, kept {kept}")


def digest(directory):
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return hashlib.sha256(b"".join(str(file).encode() + file.read_bytes() for file in files)).hexdigest()


@contextmanager
def small_disk(directory, size):
    """A file system of `size` bytes on `directory`. Needs the right to mount."""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=True, capture_output=True)
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", directory], check=True)
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def can_mount():
    with tempfile.TemporaryDirectory() as directory:
        try:
            with small_disk(Path(directory), 4096):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def disk_full(reference, rounds, draw):
    """disk full: one sentence, the last checkpoint whole; with room again, the run goes on"""
    needed = sum(file.stat().st_size for file in reference.rglob("*") if file.is_file())
    for _ in range(rounds):
        disk = reference.with_name("disk")
        with small_disk(disk, int(needed * draw.uniform(0.2, 1.0))) as remount:
            directory = disk / "run"
            code = wait(start(directory))
            lost = not_said(directory, "cannot be written", "No space left") if code else None
            remount(f"size={10 * needed}")
            yield lost or (f"exit code {code}" if code not in (0, 1) else end(directory, reference))


def read_only(reference, rounds, draw):
    """a read-only output directory, for a new run and for one to go on with: refused"""
    for round in range(rounds):
        disk = reference.with_name("disk")
        with small_disk(disk, 2**26) as remount:
            directory = disk / "run"
            if round % 2:
                process = start(directory)
                time.sleep(draw.uniform(0.2, 0.6))
                kill(process)
            remount("ro")
            code = wait(start(directory))
            lost = not_said(directory, "cannot be written") or (None if code == 2 else f"exit code {code}")
            remount("rw")
            yield lost or end(directory, reference)


OTHERS = {"dtype": "bfloat16", "objective": "wd1++", "likelihood": "one_step", "lr_scheduler": "linear", "task": "countdown"}
OTHERS |= {"cache": "dual", "eval_lengths": 4}


def changed(reference, rounds, draw):
    """a setting changed at resume that must not change: refused, and named"""
    config = json.loads((reference / "config.json").read_text())
    for name, value in config.items():
        if name in MAY_CHANGE or name in ("eval_only", "dry_run"):
            continue
        if isinstance(value, bool):
            other = not value
        elif isinstance(value, (int, float)):
            other = value / 2 if name == "threshold" else 2 * value + (value == 0)
        else:
            other = OTHERS.get(name, "1")
        directory = copy(reference, "changed")
        before = digest(directory)
        code = wait(start(directory, **{name: other}))
        kept = digest(directory) == before
        yield not_said(directory, f"--{name}") or (None if code == 2 and kept else f"--{name}: exit code {code}")


def two_at_once(reference, rounds, draw):
    """two runs started on one directory: one goes on, the other is refused"""
    for round in range(rounds):
        directory = fresh(reference, "shared") if round % 2 else copy(reference, "shared")
        options = {} if round % 2 else {"max_steps": 5}
        other = beside(directory, "other.log")

        def apart():  # two that write into one file overwrite each other
            output = os.open(other, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)

        one = start(directory, **options)
        time.sleep(draw.uniform(0, 0.2))
        two = start(directory, apart, **options)
        codes = sorted((wait(one), wait(two)))
        said = log(directory).read_text() + other.read_text()
        if codes == [0, 2] and ("another process is writing" in said or "holds another run" in said):
            yield None if options else differs(directory, reference)
        else:
            yield f"exit codes {codes}: {said[-300:]}"


def nan_gradients(reference, rounds, draw):
    """NaN in the gradients: steps skipped and counted, weights finite; three in a row stop the run"""
    for round in range(rounds):
        lasting, own = round % 2, random.Random(draw.random())

        def spoil():
            clip, calls = torch.nn.utils.clip_grad_norm_, []

            def sick(weights, norm):
                calls.append(1)
                if lasting or len(calls) % 3 == 1:
                    weights[own.randrange(len(weights))].grad.view(-1)[0] = own.choice([math.nan, math.inf])
                return clip(weights, norm)

            torch.nn.utils.clip_grad_norm_ = sick

        directory = fresh(reference, "nan")
        code = wait(start(directory, spoil))
        skipped = [json.loads(line).get("skipped", 0) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        finite = all(weight.isfinite().all() for weight in newest_tensors(directory).values())
        if lasting:
            yield not_said(directory, "no finite loss") or (None if code == 1 and finite else f"exit code {code}")
        else:
            yield None if code == 0 and finite and sum(skipped) == 3 else f"exit code {code}, skipped {skipped}"


def newest_tensors(directory):
    return load_file(next(sorted(directory.glob("checkpoint/step-*"))[-1].glob("*.safetensors")))


def bad_rewards(reference, rounds, draw):
    """a reward that raises, or is NaN, infinite or no number: one sentence that shows the completion; resumable"""
    for round in range(rounds):
        bad = [math.nan, math.inf, None, "much", 1j, RuntimeError("oops"), KeyError("x")][round % 7]
        when = draw.randrange(12)

        def spoil():
            calls = []

            def reward(task, completion, example):
                calls.append(1)
                if len(calls) > when:
                    if isinstance(bad, Exception):
                        raise bad
                    return bad
                return even_characters(task, completion, example)

            rewards.Sudoku.reward = reward

        directory = fresh(reference, "reward")
        code = wait(start(directory, spoil))
        lost = not_said(directory, "no reward for the completion")
        yield lost or (end(directory, reference) if code == 2 else f"exit code {code}")


def lost_rank(reference, rounds, draw):
    """one of two ranks under torchrun killed: the other says so and ends; one process goes on from the checkpoint"""
    for _ in range(rounds):
        directory = fresh(reference, "ranks")
        settings = {"data": reference.with_name("puzzles.csv"), "output_dir": directory, "max_steps": 300, "eval_every": 0}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", HERE / "wd1.py"]
        command += [f"--{name}={value}" for name, value in (SETTINGS | settings).items()]
        threads = {**os.environ, "OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=threads)
        while launcher.poll() is None and not list(directory.glob("checkpoint/step-*[0-9]")):
            time.sleep(0.01)
        children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
        time.sleep(draw.uniform(0, 0.5))
        os.kill(int(draw.choice(children)), signal.SIGKILL)
        said = launcher.communicate(timeout=120)[0]
        steps = max((int(file.name[5:]) for file in directory.glob("checkpoint/step-*[0-9]")), default=0)
        code = wait(start(directory, max_steps=steps + 1))
        yield None if launcher.returncode and "cannot go on" in said and code == 0 else f"exit code {code}: {said[-500:]}"


FAULTS = {  # how often each is tried by `make faults` and by the tests; those that cannot be drawn are all tried
    killed_at_changes: (60, 12), killed_at_random: (40, 2), killed_while_saving: (40, 2), asked_to_stop: (30, 3),
    reader_gone: (10, 2), asked_twice: (4, 1), bit_flipped: (60, 3), truncated: (40, 2), all_damaged: (1, 1),
    disk_full: (20, 2), read_only: (6, 2), changed: (1, 1), two_at_once: (12, 2), nan_gradients: (10, 2),
    bad_rewards: (14, 3), lost_rank: (3, 1),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[fault.__name__ for fault in FAULTS])
    only = parser.parse_args().only
    print("| what happens | tried | survived | lost |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        reference, failed = make_reference(Path(scratch)), []
        for fault, (rounds, _) in FAULTS.items():
            if only not in (None, fault.__name__):
                continue
            if fault in (disk_full, read_only) and not can_mount():
                print(f"| {fault.__doc__} | 0: no right to mount a small disk | | |", flush=True)
                continue
            results = list(fault(reference, rounds, random.Random(0)))
            lost = [result for result in results if result]
            failed += [f"{fault.__name__}: {result}" for result in lost]
            print(f"| {fault.__doc__} | {len(results)} | {len(results) - len(lost)} | {len(lost)} |", flush=True)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
