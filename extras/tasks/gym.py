"""reasoning-gym's generators as tasks: `--task extras/tasks/gym.py:chain_sum` (pip install
reasoning-gym). Any of its names will do: `__getattr__` below makes the class.

Its own functions score the answers. A few of them would have Python evaluate what the model wrote;
those tasks are refused.
"""

import re
from contextlib import suppress
from functools import cache
from unittest import mock

from rewards import InputError, Task, extract_answer, refusing

PROBES = "1|[1, 2]|[[1, 2], [3, 4]]|x + 1|['a', 'b']|1 + 2 * 3|(|".split("|")
SIZE = 6500  # questions that are asked for: a fifth to test on, the others to train on


class ReasoningGym(Task):
    """A generator of reasoning-gym. An example has "question", and "seed" and "index", from which
    the generator makes it."""

    instruction = (
        "Answer the question. Write the answer between <answer> and </answer>.\n\nQuestion: "
    )

    def __init__(self):
        with refusing(f"reasoning-gym's {self.name} cannot be used; pip install reasoning-gym"):
            from reasoning_gym import create_dataset

            self.generator = cache(lambda seed: create_dataset(self.name, seed=seed, size=SIZE))
            generator = self.generator(0)
            entry = generator[0]
            generator.score_answer(entry["answer"], entry)  # imports what it needs
            for probe in (*PROBES, entry["answer"]):
                self.score(probe, {"seed": 0, "index": 0})

    def score(self, answer, example) -> float:
        """reasoning-gym's score, from 0 to 1; 0 for an answer that it cannot read. InputError if it
        would have Python evaluate a text, even if it hides that."""
        generator, score = self.generator(example["seed"]), 0.0
        entry, refuse = generator[example["index"]], mock.Mock(side_effect=ValueError)
        with mock.patch.multiple("builtins", eval=refuse, exec=refuse), suppress(Exception):
            score = float(generator.score_answer(answer, entry))
        if refuse.called:
            raise InputError(f"reasoning-gym's {self.name} would evaluate texts as code")
        return score

    def problems(self, split, seed, blanks):
        examples = [
            {"question": self.generator(seed)[index]["question"], "seed": seed, "index": index}
            for index in range(SIZE)
        ]
        return [example for example in examples if self.is_test(example) == (split == "test")]

    def parse(self, row):
        raise InputError("reasoning-gym's problems are generated: leave out --data")

    def reward(self, completion, example):
        """reasoning-gym's score of the answer; 0 without one. (1e999999999 would take hours.)"""
        answer = extract_answer(completion)
        if not answer or re.search(r"\d[eE][+-]?\d{4}|[\s\S]{10001}", answer):
            return 0.0
        return self.score(answer.strip(), example)


def __getattr__(name):
    """The task class of the generator `name`."""
    if name.startswith("_"):
        raise AttributeError(name)
    return type(name, (ReasoningGym,), {"name": name})
