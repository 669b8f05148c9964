"""reasoning-gym's generators as tasks: `--task extras/tasks/gym.py:chain_sum` (pip install
reasoning-gym). Any of its names will do: `__getattr__` below makes the class.

Its own functions score the answers. A few of them would have Python evaluate what the model wrote;
those tasks are refused.
"""

import builtins
import functools
import re
from contextlib import contextmanager

from rewards import InputError, Task, extract_answer, refusing

PROBES = ("1", "[1, 2]", "[[1, 2], [3, 4]]", "x + 1", "['a', 'b']", "1 + 2 * 3", "(", "")
POOL = 100_000  # problems that are drawn from


@contextmanager
def nothing_evaluated(name):
    """InputError if what is inside would have Python evaluate a text, even if it hides that."""
    tried, real = [], (builtins.eval, builtins.exec)

    def refuse(*_, **__):
        tried.append(name)
        raise ValueError("nothing that a model writes is executed")

    builtins.eval = builtins.exec = refuse
    try:
        yield
    finally:
        builtins.eval, builtins.exec = real
        if tried:
            raise InputError(f"reasoning-gym's {name} would evaluate texts as code: choose another")


class ReasoningGym(Task):
    """A generator of reasoning-gym. An example has "question", and "seed" and "index", from which
    the generator makes it."""

    name = None
    instruction = "Answer the question. Write the answer between <answer> and </answer>.\n\nQuestion: "

    def __init__(self):
        try:
            from reasoning_gym import factory
        except ImportError:
            raise InputError("it needs reasoning-gym: pip install reasoning-gym") from None
        name = self.name
        if name not in factory.DATASETS:
            raise InputError(f"{name} is not one of {', '.join(sorted(factory.DATASETS))}")
        make = functools.partial(factory.create_dataset, name, size=POOL)
        self.generator = functools.cache(lambda seed: make(seed=seed))
        self.entry = functools.lru_cache(4096)(lambda seed, index: self.generator(seed)[index])
        with refusing(f"reasoning-gym's {name} cannot be used"):
            entry = self.entry(0, 0)
            self.generator(0).score_answer(entry["answer"], entry)  # what it imports at first use
            for probe in (*PROBES, entry["answer"]):
                self.score(probe, entry, 0)

    def score(self, answer, entry, seed):
        """reasoning-gym's score, from 0 to 1; 0 for an answer that it cannot read."""
        with nothing_evaluated(self.name):
            try:
                return min(max(float(self.generator(seed).score_answer(answer, entry)), 0.0), 1.0)
            except Exception:
                return 0.0

    def problems(self, split, seed, blanks):
        """256 problems to test on and 5,000 to train on, fewer if the generator repeats itself."""
        found, wanted = {}, 256 if split == "test" else 5000
        for index in range(10 * wanted):
            question = self.entry(seed, index)["question"]
            if self.is_test({"question": question}) == (split == "test"):
                found.setdefault(question, {"question": question, "seed": seed, "index": index})
            if len(found) == wanted:
                break
        return list(found.values())

    def parse(self, row):
        raise InputError("reasoning-gym's problems are generated: leave out --data")

    def reward(self, completion, example):
        """reasoning-gym's score of the answer; 0 without one. (1e999999999 would take hours.)"""
        answer = extract_answer(completion)
        if answer is None or len(answer) > 10_000 or re.search(r"\d[eE][+-]?\d{4}", answer):
            return 0.0
        entry = self.entry(example["seed"], example["index"])
        return self.score(answer.strip(), entry, example["seed"])


def __getattr__(name):
    """The task class of the generator `name`."""
    if name.startswith("_"):
        raise AttributeError(name)
    return type(name, (ReasoningGym,), {"name": name})
