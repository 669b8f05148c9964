"""Another task of your own, which differs from reverse.py in what it asks for. Both have an
`answer`, so that a laptop is enough: `python -m extras.demo --task extras/tasks/sort.py:Sort`."""

import string

from extras.tasks.reverse import Reverse


class Sort(Reverse):
    """Sort the digits of a number."""

    instruction = "Write the digits in ascending order between <answer> and </answer>.\nDigits: "
    letters, length = string.digits, 8

    def key(self, example):
        """Two numbers of the same digits are one problem: they have the same answer."""
        return self.answer(example)

    def answer(self, example):
        return "".join(sorted(example["question"]))
