"""Our reading of the published evaluation, beside what its own parser says of the same texts.

    python -m extras.measure.published FOLDER

FOLDER holds files TASK_MODEL_LENGTH_STEPS_RANK_generations.json, as d1's evaluation writes them;
those of LLaDA-8B-Instruct are in eval/eval_baselines of github.com/dllm-reasoning/d1, and are not
ours to ship. Prints for each task and length the number of texts, in percent the figure of d1's own
parser, `Task.published_score` and `Task.correct`. (A gold answer of None is one that their reader
of gsm8k has lost, a negative number. Nothing equals it.)
"""

import json
import re
import sys
from pathlib import Path

import pandas as pd

from extras.measure import harness
from rewards import TASKS, InputError, one_sentence, refusing

# What the parser published with the texts gives each length.
PUBLISHED = pd.DataFrame(
    {
        "countdown": (20.7, 19.5, 16.0),
        "gsm8k": (69.3, 76.4, 78.1),
        "math": (26.0, 32.4, 36.2),
        "sudoku": (11.7, 6.7, 5.5),
    },
    index=(128, 256, 512),
)


def example_of(task, record):
    """The problem of a published text, as ours are written."""
    gold = record["ground_truth"]
    if task == "sudoku":
        return {"puzzle": re.search("[0-9]{16}", record["question"])[0], "solution": gold}
    if task == "countdown":
        return {"nums": gold[0], "target": gold[1]}
    return {"answer": str(gold)}


def scores(folder):
    """A row for each text of the files in `folder`."""
    rows = []
    for path in folder.glob("*_generations.json"):
        name, _, length, *_ = path.name.replace("math500", "math").split("_")
        with refusing(f"{path}: not a file of generations"):
            task = TASKS[name]
            for record in json.loads(path.read_text())["generations"]:
                # Up to its first EOS, without special tokens, as `wd1.decode` gives a text.
                text = record["generations"].split("<|endoftext|>")[0].replace("<|eot_id|>", "")
                pair = text, example_of(name, record)
                rows.append([name, int(length), task.published_score(*pair), task.correct(*pair)])
    if not rows:
        raise InputError(f"{folder}: no *_generations.json there")
    return pd.DataFrame(rows, columns=["task", "tokens", "our published_score", "our accuracy"])


def table(found):
    """The Markdown table of `scores`."""
    groups = found.groupby(["task", "tokens"])
    shown = (100 * groups.mean()).map("{:.1f}".format)
    shown.insert(0, "texts", groups.size())
    shown.insert(1, "their parser", PUBLISHED.unstack().reindex(shown.index).fillna("-"))
    return harness.table(shown)


if __name__ == "__main__":
    with one_sentence():
        print(table(scores(Path(*sys.argv[1:]))))
