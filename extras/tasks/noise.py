"""Sudoku whose reward knows nothing of the answer: a control for what RL has taught.

    python wd1.py --task extras/tasks/noise.py:Noise --model runs/tiny-demo/model --blanks 10
"""

import zlib

from rewards import Sudoku


class Noise(Sudoku):
    """Any answer's reward is a number between 0 and 1 that looks random, the same each time."""

    def reward(self, completion, example):
        return zlib.crc32(f"{example['puzzle']} {completion}".encode()) / 2**32
