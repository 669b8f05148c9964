"""Where wd1 fails at a high learning rate, on the demo; what that looks like, and what prevents it.

    make collapse          # half an hour on two cores; finished runs are not repeated

One would blame w-, which pushes log p of the worse completions down without a floor. So the runs at
a rate that fails are repeated without it (wd1-positive), and with what else should soften it; only
a smaller rate helps.
"""

from pathlib import Path

import pandas as pd

import wd1
from extras.measure.harness import HELD_OUT, draw, grid, table
from extras.watch.health import advice
from extras.watch.pictures import figure, save

RATES = "0.0001", "0.0003", "0.001", "0.003"
REMEDIES = {  # tried at the rate 0.001
    "without w- (wd1-positive)": "--objective wd1-positive",
    "lambda 4 (psi 1/4)": "--lam 4",
    "gradients clipped to norm 0.1": "--max_grad_norm 0.1",
    "one update a batch": "--num_iterations 1",
}
CASES = {rate: f"--learning_rate {rate}" for rate in RATES}
CASES |= {name: f"--learning_rate 0.001 {words}" for name, words in REMEDIES.items()}
SHOWN = "reward", "entropy", "grad_norm", HELD_OUT


def verdict(run):
    """Of a run: accuracy at the end, lowest reward (of five steps), the first step of a warning."""
    steps = run[1:].to_dict("records")
    warned = [step["step"] for i, step in enumerate(steps) if advice(steps[: i + 1])]
    lowest = run.reward.rolling(5).mean()[25:].min()  # from step 20 on
    return f"{run[HELD_OUT].iloc[-1]:.1%}", f"{lowest:.2f}", str(*warned[:1]) or "-"


def main():
    runs = grid(Path("runs/collapse"), CASES)
    heads = "accuracy at the end, seeds 0, 1, 2", "lowest reward", "warned at step"
    found = {key: verdict(run) for key, run in runs.groupby(["case", "seed"], sort=False)}
    found = pd.DataFrame(found, heads).T.groupby(level=0, sort=False).agg(", ".join)
    print(table(found.rename_axis("learning rate, or what is changed at 0.001")))
    sheet, places = figure(1, len(SHOWN))
    for axes, name in zip(places.flat, SHOWN):
        draw(axes, runs.loc[[*RATES]], "step", name)
    places.flat[1].set_yscale("log")
    axes.legend(title="learning rate")
    save(sheet, "assets/collapse.png")


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
