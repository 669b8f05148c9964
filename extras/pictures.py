"""The pictures of a run. `python extras/pictures.py runs/DIR [more runs] --out FILE` draws the curves of one or several."""

import argparse
import json
from pathlib import Path


def plot_runs(runs, out):
    """Draws the reward of training samples and the accuracy on held-out problems, step by step, into the file `out`."""
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), dpi=130, sharex=True)
    for number, run in enumerate(runs):
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        trained = [line for line in lines if "reward" in line]
        tested = [line for line in lines if "eval" in line]
        color, name = f"C{number}", Path(run).name
        left.plot([line["step"] for line in trained], [line["reward"] for line in trained], color=color, label=name)
        right.plot(
            [line["step"] for line in tested], [line["eval"]["accuracy"] for line in tested], "o-", color=color, label=name
        )
    left.set(xlabel="training step", ylabel="reward", title="reward of the training samples")
    right.set(xlabel="training step", ylabel="accuracy", title="accuracy on held-out problems, temperature 0")
    right.set_ylim(-0.02, 1.02)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        right.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    plot_runs(arguments.runs, arguments.out)
