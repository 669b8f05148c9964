"""Where wd1 fails at a high learning rate, on the demo; what that looks like, and what prevents it.

    make collapse          # a quarter of an hour on two cores; finished runs are not repeated

One would blame w-, which pushes log p of the worse completions down without a floor. So the runs at
a rate that fails are repeated without it (wd1-positive), and with what else should soften it; only
a smaller rate helps.
"""

from pathlib import Path

import wd1
from extras.measure.harness import HELD_OUT, curves, grid, outcomes, over_seeds, table

RATES = {rate: f"--learning_rate {rate}" for rate in ("0.0001", "0.0003", "0.001", "0.003")}
REMEDIES = {
    "without w- (wd1-positive)": "--objective wd1-positive",
    "lambda 4 (psi 1/4)": "--lam 4",
    "gradients clipped to norm 0.1": "--max_grad_norm 0.1",
    "one update a batch": "--num_iterations 1",
}
SHOWN = "reward", "entropy", "grad_norm", HELD_OUT


def main():
    remedies = {name: f"{words} --learning_rate 0.001" for name, words in REMEDIES.items()}
    runs = grid(Path("runs/collapse"), RATES | remedies)
    print(table(over_seeds(outcomes(runs)).rename_axis("rate, or what is changed at 0.001")))
    curves({name: runs[name].loc[[*RATES]] for name in SHOWN}, "assets/collapse.png")


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
