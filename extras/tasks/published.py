"""The published protocol: their file to train on and their file to test on, both as they are.

    python wd1.py --task extras/tasks/published.py:Sudoku --data 4x4_sudoku_unique_puzzles.csv \
        --test_data 4x4_test_sudoku.csv ...

What leaks: the public sudoku files share all but a few of the 288 solved grids, so a model that
remembers the grids of its training puzzles is given the answers of the test. `--task sudoku` with
the same two files leaves such puzzles out of training, and says how many; without `--test_data` it
splits one file by solved grid, or makes puzzles of its own, which is the better measure.
"""

import rewards


class Sudoku(rewards.Sudoku):
    keep_apart = False


class Countdown(rewards.Countdown):
    keep_apart = False


class Countdown01(Countdown):
    """With the reward of the authors' wd1++: nothing for an answer that is wrong."""

    def reward(self, completion, example):
        return float(self.correct(completion, example))
