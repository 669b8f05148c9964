"""Our reading of the published evaluation, beside what its own parser says of the same texts.

    python -m extras.measure.published FOLDER

FOLDER holds files TASK_MODEL_LENGTH_STEPS_RANK_generations.json, as d1's evaluation writes them;
those of LLaDA-8B-Instruct are in eval/eval_baselines of github.com/dllm-reasoning/d1, and are not
ours to ship. Prints for each task and length the number of texts, in percent the figure of d1's own
parser, `Task.published_score` and `Task.correct`. (A gold answer of None is one that their reader
of gsm8k has lost, a negative number. Nothing equals it.)
"""

import argparse
import json
import re
from pathlib import Path
from statistics import fmean

import pandas as pd

from extras.measure import harness
from rewards import TASKS, InputError, one_sentence, refusing

# What the parser published with the texts gives each length, 128, 256 and 512 tokens.
PUBLISHED = {
    "countdown": (20.7, 19.5, 16.0),
    "gsm8k": (69.3, 76.4, 78.1),
    "math": (26.0, 32.4, 36.2),
    "sudoku": (11.7, 6.7, 5.5),
}
LENGTHS = 128, 256, 512


def example_of(task: str, record: dict) -> dict:
    """The problem of a published text, as ours are written."""
    gold = record["ground_truth"]
    if task == "sudoku":
        return {"puzzle": re.search("[0-9]{16}", record["question"])[0], "solution": gold}
    if task == "countdown":
        return {"nums": gold[0], "target": gold[1]}
    return {"answer": str(gold)}


def completion_of(record: dict) -> str:
    """The text up to its first EOS, without special tokens, as `wd1.decode` gives it."""
    return record["generations"].split("<|endoftext|>")[0].replace("<|eot_id|>", "")


def scores(folder: str) -> dict:
    """{(task, length): [(published_score, correct), ...]} of all texts of the files in `folder`."""
    found = {}
    for path in sorted(Path(folder).glob("*_generations.json")):
        name, _, length, *_ = path.name.split("_")
        name = name.replace("math500", "math")
        with refusing(f"{path}: not a file of generations"):
            task, cell = TASKS[name], found.setdefault((name, int(length)), [])
            for record in json.loads(path.read_text())["generations"]:
                answer = completion_of(record), example_of(name, record)
                cell.append((task.published_score(*answer), task.correct(*answer)))
    if not found:
        raise InputError(f"{folder}: no *_generations.json there")
    return found


def table(found: dict) -> str:
    """The Markdown table of `scores`."""
    names = ["task", "tokens", "texts", "their parser", "our published_score", "our accuracy"]
    rows = []
    for (name, length), cell in sorted(found.items()):
        theirs = dict(zip(LENGTHS, PUBLISHED[name])).get(length, "-")
        ours, right = (100 * fmean(column) for column in zip(*cell))
        rows.append([name, length, len(cell), theirs, f"{ours:.1f}", f"{right:.1f}"])
    return harness.table(pd.DataFrame(rows, columns=names).set_index("task"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    with one_sentence():
        print(table(scores(parser.parse_args().folder)))
