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
    """Right is also an answer that is written column by column, as the demo's base mostly does."""

    def correct(self, completion, example):
        right, answer = super().correct, result(completion)
        by_columns = "".join(answer[column::4] for column in range(4))
        return any(right(f"<answer>{text}</answer>", example) for text in (answer, by_columns))
