"""The exercises of exercises.md: lists them, or does them and says whether the document tells the truth.

    python -m extras.exercises              # their titles
    python -m extras.exercises 3            # the third: its check, without the change and with it
    python -m extras.exercises all          # or `make exercises`: all ten, one after the other, in about five minutes

Nothing is changed in place: each runs in a temporary copy of the repository. A ```check block is a command, and below it
what must come of it: `fails:` names the tests, without their parameters, that fail with the change and only with it ("none":
all pass both ways); `before:` and `after:` are regular expressions for the output without and with it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parents[1]
COPIED = "wd1.py rewards.py test_wd1.py tiny_config.json pyproject.toml extras".split()


class Exercise(NamedTuple):
    number: int
    title: str
    removed: str  # a line of wd1.py
    added: str  # what stands there instead
    checks: list  # [(command, {"fails" or "before" and "after": what is expected})]


def exercises():
    """All of exercises.md."""
    text, found = Path(__file__).with_suffix(".md").read_text(), []
    for number, title, body in re.findall(r"^## (\d+)\. (.*)\n((?s:.*?))(?=^## |\Z)", text, re.MULTILINE):
        [(removed, added)] = re.findall(r"```diff\n-(.*)\n\+(.*)\n```", body)
        blocks = re.findall(r"```check\n((?s:.*?))```", body)
        expected = [dict(re.findall(r"^(fails|before|after): (.*)$", block, re.MULTILINE)) for block in blocks]
        commands = [re.split(r"^(?:fails|before|after): ", block, maxsplit=1, flags=re.MULTILINE)[0] for block in blocks]
        found.append(Exercise(int(number), title, removed, added, list(zip(commands, expected))))
    return found


def changed(source, exercise):
    """The text of wd1.py with an exercise's change; ValueError unless it has the line exactly once."""
    lines = source.splitlines()
    if lines.count(exercise.removed) != 1:
        raise ValueError(f"exercise {exercise.number}: wd1.py has {lines.count(exercise.removed)} lines {exercise.removed!r}")
    return "\n".join(exercise.added if line == exercise.removed else line for line in lines) + "\n"


def run(command, directory):
    """What a shell command prints, with this Python's programs and a thread."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    options = dict(cwd=directory, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}, text=True, stdin=subprocess.DEVNULL)
    return subprocess.run(["bash", "-c", command], **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def essential(output):
    """(the tests that failed, the lines to show) of an output."""
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(\w+)", output, re.MULTILINE)
    lines = [f"failed: {name}" + f" ({failed.count(name)} times)" * (failed.count(name) > 1) for name in dict.fromkeys(failed)]
    return set(failed), lines + [line for line in output.splitlines() if line.strip()][-1:]


def verify(exercise):
    """Does an exercise in a copy of the repository, and prints how it comes out; whether that is what it says."""
    print(f"\n{exercise.number}. {exercise.title}\n- {exercise.removed.strip()}\n+ {exercise.added.strip()}")
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        for name in COPIED:
            copy = shutil.copytree if (HERE / name).is_dir() else shutil.copy
            copy(HERE / name, directory / name)
        source, right = (directory / "wd1.py").read_text(), True
        for command, expected in exercise.checks:
            print(f"$ {command.strip()}")
            for when, text in (("before", source), ("after", changed(source, exercise))):
                (directory / "wd1.py").write_text(text)
                started = time.time()
                output = run(command, directory)
                failed, lines = essential(output)
                if "fails" in expected:
                    wanted = set(re.findall(r"test_\w+", expected["fails"])) if when == "after" else set()
                    as_said = failed == wanted and re.search(r"^\d+ (passed|failed)", output, re.MULTILINE) is not None
                else:
                    as_said = re.search(expected[when], output) is not None
                print(f"  {when} ({time.time() - started:.0f} s): " + "\n    ".join(lines))
                verdict = "as the exercise says" if as_said else f"NOT as the exercise says: {expected}\n{output}"
                print(f"    {verdict}", flush=True)
                right = right and as_said
    return right


def main(words):
    found = {str(exercise.number): exercise for exercise in exercises()}
    if not words:
        print("\n".join(f"{number:>2}  {exercise.title}" for number, exercise in found.items()))
    chosen = list(found) if words == ["all"] else words
    if unknown := [word for word in chosen if word not in found]:
        print(f"no exercise {unknown[0]!r}: give numbers from 1 to {len(found)}, or all", file=sys.stderr)
        return 2
    wrong = [number for number in chosen if not verify(found[number])]
    if chosen:
        print(f"\n{len(chosen) - len(wrong)} of {len(chosen)} came out as they say" + f"; not {', '.join(wrong)}" * bool(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
