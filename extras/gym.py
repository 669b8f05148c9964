"""reasoning-gym's generators as tasks: `--task rg:NAME` (pip install reasoning-gym).

Its own functions score the answers. A few of them would have Python evaluate what the model wrote; those tasks are refused.
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
    """Raises InputError if what is inside would have Python evaluate a text, even if it catches the error."""
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
            raise InputError(f"--task rg:{name}: its score would have Python evaluate texts as code; choose another task")


class ReasoningGym(Task):
    """A generator of reasoning-gym. An example has "question", and "seed" and "index", from which the generator makes it."""

    instruction = "Answer the question. Write the answer alone between <answer> and </answer>.\n\nQuestion: "

    def __init__(self, name):
        try:
            from reasoning_gym import factory
        except ImportError:
            raise InputError("--task rg:NAME needs reasoning-gym: pip install reasoning-gym") from None
        if name not in factory.DATASETS:
            raise InputError(f"--task rg:{name}: unknown; reasoning-gym has {', '.join(sorted(factory.DATASETS))}")
        self.name = name
        self.generator = functools.cache(lambda seed: factory.create_dataset(name, seed=seed, size=POOL))
        self.entry = functools.lru_cache(4096)(lambda seed, index: self.generator(seed)[index])
        with refusing(f"--task rg:{name}: cannot be used"):
            entry = self.entry(0, 0)
            self.generator(0).score_answer(entry["answer"], entry)  # whatever it imports on first use
            for probe in (*PROBES, entry["answer"]):
                with nothing_evaluated(name):
                    try:
                        self.generator(0).score_answer(probe, entry)
                    except Exception:  # an answer that it cannot score; `reward` says what that is worth
                        continue

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
        """reasoning-gym's score of the answer, from 0 to 1; 0 without an answer, or for one that it cannot read."""
        answer = extract_answer(completion)
        if answer is None or len(answer) > 10_000 or re.search(r"\d[eE][+-]?\d{4}", answer):  # 1e999999999 takes hours
            return 0.0
        entry = self.entry(example["seed"], example["index"])
        with nothing_evaluated(self.name):
            try:
                return min(max(float(self.generator(example["seed"]).score_answer(answer.strip(), entry)), 0.0), 1.0)
            except Exception:
                return 0.0
