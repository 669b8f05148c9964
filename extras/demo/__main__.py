"""From nothing to a picture: a tiny base model, trained with wd1, before and after.

    python -m extras.demo                                  # 4x4 sudoku: a few minutes on a laptop
    python -m extras.demo --task countdown --seed 1 ...    # any setting of wd1.py
    python -m extras.demo --task FILE.py:CLASS             # yours, if it has an `answer(example)`
    python -m extras.demo --resume                         # goes on, as does python wd1.py --resume
"""

from itertools import islice
from pathlib import Path

import wd1
from extras.demo.base import tiny_base
from extras.watch.chat import show, solve
from extras.watch.health import warn
from rewards import InputError


def prepare(config):
    """Puts the base model's directory into a Config that names no other --model, and the base's own
    problems where it has some. Whatever else is wrong is said before minutes of pretraining."""
    if wd1.WORLD > 1:
        raise InputError("the demo is for one process; train what it has made with wd1.py")
    if config.model == "tiny":
        wd1.set_up(config)
        config.model = tiny_base(
            config.task, config.seed, config.blanks, data=config.data, test_data=config.test_data
        )
    problems = Path(config.model, "problems.jsonl")
    if not config.data and problems.exists():
        config.data = str(problems)


def look(config, model, title, problem=None):
    """Shows the model in a directory at work on a held-out problem, and returns that: the first of
    twenty that it gets wrong, if there is one."""
    config = config.model_copy(update=dict(model=model, resume=False, eval_only=True))
    model, _, tokenizer, _, problems = wd1.set_up(config)
    wrong = (each for each in islice(problems, 20) if not solve(model, tokenizer, each, config)[2])
    problem = problem or next(wrong, problems[0])
    show(model, tokenizer, problem, config, title)
    return problem


def train(config):
    """wd1.train, with a look at the model before and after."""
    wd1.RunDirectory(config)  # refuses a directory that holds another run
    prepare(config)
    problem = look(config, config.model, "before")
    summary = wd1.train(config, watch=warn)
    look(config, f"{config.output_dir}/model", "after", problem)
    return summary


def evaluate(config):
    """wd1.evaluate of the base."""
    prepare(config)
    return wd1.evaluate(config)


if __name__ == "__main__":
    with wd1.one_sentence():
        wd1.main(None, wd1.Config, train, evaluate)
