"""A task of your own: `python wd1.py --task extras/tasks/reverse.py:Reverse`. Copy this file, and
change what it asks for.

A file of problems (--data FILE.jsonl) needs no `problems`: its rows are the examples, the column
"question" is what is asked.
"""

import random
import string

from rewards import Task, extract_answer


class Reverse(Task):
    """Write a word backwards."""

    instruction = "Write the word backwards between <answer> and </answer>.\nWord: "
    letters, length = string.ascii_lowercase, 5

    def problems(self, split, seed, blanks):
        """Random words for `split`, "train" or "test": `is_test` tells. (`blanks` is sudoku's.)"""
        rng = random.Random(seed)
        words = ("".join(rng.choices(self.letters, k=self.length)) for _ in range(5000))
        examples = ({"question": word} for word in words)
        return [example for example in examples if self.is_test(example) == (split == "test")]

    def answer(self, example):
        """The text of a right answer, where the task can give one: `python -m extras.demo --task
        ...` then pretrains a tiny model for it, and has wd1 improve it."""
        return example["question"][::-1]

    def reward(self, completion, example):
        """The fraction of the letters in the text `completion` that are right; 1 is correct."""
        answer = (extract_answer(completion) or "").strip()
        right = self.answer(example)
        return sum(a == b for a, b in zip(answer, right)) / max(len(answer), len(right))
