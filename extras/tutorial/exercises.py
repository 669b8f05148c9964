"""Does the exercises of exercises.md, and says whether the document is right.

    python -m extras.tutorial.exercises 3            # the third, without and with the change
    python -m extras.tutorial.exercises all          # or `make exercises`: all, in some minutes

Nothing is changed in place: each runs in a temporary copy of the repository. A ```check block is a
command, and below it what must come of it: `fails:` names the tests, without their parameters,
that fail with the change and only with it ("none": all pass both ways); `before:` and `after:` are
regular expressions for the output without and with it.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def exercises():
    """All of exercises.md by number: [title, a line of wd1.py, what stands there instead, text]."""
    pattern = r"(?ms)^## (\d+)\. (.*?)$.*?```diff\n-([^\n]*)\n\+([^\n]*)\n```(.*?)(?=^## |\Z)"
    found = re.findall(pattern, Path(__file__).with_suffix(".md").read_text())
    return {number: exercise for number, *exercise in found}


def as_said(expected, when, output):
    """Whether a command printed what is expected, or of pytest whether just those tests failed."""
    if pattern := re.search(f"{when}: (.*)", expected):
        return bool(re.search(pattern[1], output))
    failed = re.findall(r"(?m)^(?:FAILED|ERROR) \S*?::(\w+)", output)
    wanted = re.findall(r"test_\w+", expected) if when == "after" else []
    return set(failed) == set(wanted) and bool(re.search(r"(?m)^\d+ (passed|failed)", output))


def verify(title, removed, added, text):
    """Does an exercise and prints how it comes out; whether that is what it says."""
    print(f"\n{title}\n-{removed}\n+{added}")
    source, right = (ROOT / "wd1.py").read_text(), True
    with tempfile.TemporaryDirectory() as copy:
        ignored = shutil.ignore_patterns(".*", "runs", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored, dirs_exist_ok=True)
        shell = f"cd '{copy}'; export OMP_NUM_THREADS=1 PATH='{Path(sys.executable).parent}':$PATH"
        for command, expected in re.findall(r"```check\n(.*)\n((?s:.*?))```", text):
            print(f"$ {command}")
            for when, line in dict(before=removed, after=added).items():
                Path(copy, "wd1.py").write_text(source.replace(f"\n{removed}\n", f"\n{line}\n"))
                output = subprocess.getoutput(f"{shell}; {command}")
                fine = as_said(expected, when, output)
                verdict = "as it says" if fine else f"NOT as it says, {expected}\n{output}"
                print(f"  {when}: {output.splitlines()[-1:]} {verdict}", flush=True)
                right = right and fine
    return right


def main(argv=None):
    found = exercises()
    parser = argparse.ArgumentParser(description="Does what exercises.md tells a student to do.")
    parser.add_argument("number", choices=[*found, "all"])
    number = parser.parse_args(argv).number
    results = [verify(*each) for key, each in found.items() if number in (key, "all")]
    print(f"\n{sum(results)} of {len(results)} came out as they say")
    return results.count(False)


if __name__ == "__main__":
    sys.exit(main())
