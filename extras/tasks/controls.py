"""Two sudokus that tell what RL has taught: skill, the wish to answer as asked, or neither.

    python wd1.py --task extras/tasks/controls.py:Noise --model runs/tiny-demo/model --blanks 10
    python wd1.py --task extras/tasks/controls.py:EitherWay --model runs/tiny-demo/model --eval_only
"""

import zlib

from rewards import Sudoku, result


class Noise(Sudoku):
    """Its reward knows nothing of the answer: a number that looks random, the same each time."""

    def reward(self, completion, example):
        return zlib.crc32(f"{example['puzzle']} {completion}".encode()) / 2**32


class EitherWay(Sudoku):
    """Right is also an answer in letters, abcd for 1234, which the demo's base often writes."""

    def correct(self, completion, example):
        digits = result(completion).translate(str.maketrans("abcd", "1234"))
        return super().correct(f"<answer>{digits}</answer>", example)
