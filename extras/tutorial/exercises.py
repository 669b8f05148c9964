"""The exercises of exercises.md: lists them, or does them and says whether the document is right.

    python -m extras.tutorial.exercises              # their titles
    python -m extras.tutorial.exercises 3            # the third, without and with the change
    python -m extras.tutorial.exercises all          # or `make exercises`: all, in some minutes

Nothing is changed in place: each runs in a temporary copy of the repository. A ```check block is a
command, and below it what must come of it: `fails:` names the tests, without their parameters,
that fail with the change and only with it ("none": all pass both ways); `before:` and `after:` are
regular expressions for the output without and with it.
"""

import argparse
import contextlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Exercise(NamedTuple):
    title: str
    removed: str  # a line of wd1.py
    added: str  # what stands there instead
    checks: list  # [(command, {"fails" or "before" and "after": what is expected})]


def exercises():
    """All of exercises.md."""
    found = []
    for text in re.split("(?m)^## ", Path(__file__).with_suffix(".md").read_text())[1:]:
        removed, added = re.search(r"```diff\n-(.*)\n\+(.*)\n```", text).groups()
        checks = []
        for command, results in re.findall(r"```check\n(.*)\n((?s:.*?))```", text):
            checks.append((command, dict(re.findall("(fails|before|after): (.*)", results))))
        found.append(Exercise(text.split("\n")[0], removed, added, checks))
    return found


def changed(source, exercise):
    """The text of wd1.py with an exercise's change; ValueError unless it has the line just once."""
    removed, added = f"\n{exercise.removed}\n", f"\n{exercise.added}\n"
    if (count := source.count(removed)) != 1:
        raise ValueError(f"{exercise.title}: wd1.py has {count} lines {exercise.removed!r}")
    return source.replace(removed, added)


def run(command):
    """What a shell command prints, with this Python's programs and a thread."""
    programs = shlex.quote(str(Path(sys.executable).parent))
    return subprocess.getoutput(f"export PATH={programs}:$PATH OMP_NUM_THREADS=1; {command}")


def as_said(expected, when, output):
    """Whether a command printed what is expected, or of pytest whether just those tests failed."""
    if "fails" not in expected:
        return re.search(expected[when], output) is not None
    failed = set(re.findall(r"(?m)^(?:FAILED|ERROR) \S*?::(\w+)", output))
    wanted = re.findall(r"test_\w+", expected["fails"]) if when == "after" else []
    return failed == set(wanted) and re.search(r"(?m)^\d+ (passed|failed)", output) is not None


def verify(exercise):
    """Does an exercise and prints how it comes out; whether that is what it says."""
    print(f"\n{exercise.title}\n- {exercise.removed.strip()}\n+ {exercise.added.strip()}")
    right = True
    with tempfile.TemporaryDirectory() as copy, contextlib.chdir(copy):
        ignored = shutil.ignore_patterns(".*", "runs", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored, dirs_exist_ok=True)
        source = Path("wd1.py").read_text()
        for command, expected in exercise.checks:
            print(f"$ {command}")
            for when, text in dict(before=source, after=changed(source, exercise)).items():
                Path("wd1.py").write_text(text)
                output = run(command)
                fine = as_said(expected, when, output)
                right = right and fine
                verdict = "as it says" if fine else f"NOT as it says, {expected}:\n{output}"
                print(f"  {when}: {output.splitlines()[-1:]} {verdict}", flush=True)
    return right


def main(argv=None):
    found = {str(number): exercise for number, exercise in enumerate(exercises(), 1)}
    parser = argparse.ArgumentParser(description="Does what exercises.md tells a student to do.")
    parser.add_argument("number", nargs="?", choices=[*found, "all"])
    number = parser.parse_args(argv).number
    if number is None:
        print(*(exercise.title for exercise in found.values()), sep="\n")
        return 0
    chosen = found.values() if number == "all" else [found[number]]
    wrong = [exercise.title for exercise in chosen if not verify(exercise)]
    right = len(chosen) - len(wrong)
    print(f"\n{right} of {len(chosen)} came out as they say", *wrong, sep="\nnot: ")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
