"""The pictures of the README, each from a finished run (weights needs none).

    python -m extras.watch.pictures curves runs/seed0 runs/seed1 --out FILE    # reward and accuracy
    python -m extras.watch.pictures run runs/seed0 --out FILE       # what else a good run shows
    python -m extras.watch.pictures denoising runs/seed0 --out FILE     # an answer, before and after
    python -m extras.watch.pictures weights --out FILE     # w+ and w- of a group, for several psi

They are transparent, in colours that can be read on white and on black, and large enough for a phone.
"""

import argparse
import sys
from functools import partial
from itertools import islice
from textwrap import fill

import matplotlib
import pandas as pd
import torch
from matplotlib.figure import Figure

import wd1
from extras.train import MoreConfig
from extras.watch.chat import solve, visible
from rewards import get_task, refusing

GREY = "#808080"
GREYS = "text.color axes.edgecolor axes.labelcolor xtick.color ytick.color grid.color".split()
STYLE = {
    **dict.fromkeys(GREYS, GREY),
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "font.size": 12,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.transparent": True,
}
METRICS = "reward eval.accuracy entropy length degenerate_groups grad_norm".split()


def figure(rows, columns, size=(4.2, 3.2), **options):
    """(figure, axes [rows, columns]) on a transparent sheet with a faint grid. size: of a panel."""
    matplotlib.rcParams.update(STYLE)
    sheet = Figure((size[0] * columns, size[1] * rows), layout="constrained")
    return sheet, sheet.subplots(rows, columns, squeeze=False, **options)


def save(sheet, path, axes=None):
    """Writes a picture; under it what the lines of `axes` are."""
    if axes:
        columns = int(sheet.get_figwidth() // 4)
        sheet.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    sheet.savefig(path, dpi=130)


def plot_metrics(names, runs, out):
    """Metrics of the runs, step by step: a panel a metric, a colour a run."""
    sheet, grid = figure(len(names) // 2, 2, sharex=True)
    for run in runs:
        with refusing(f"{run} is no run's directory: its metrics.jsonl cannot be drawn"):
            lines = pd.read_json(f"{run}/metrics.jsonl", lines=True).to_dict("records")
            metrics = pd.json_normalize(lines).set_index("step")
            for axes, name in zip(grid.flat, names):
                axes.plot(metrics[name].dropna(), ".-", label=run)
                axes.set(title=name, xlabel="training step")
    save(sheet, out, axes)


def plot_weights(_, out):
    """w+ and w- against the reward, in a group that got from 0 to 6 of 6 blanks right."""
    rewards = torch.linspace(0, 1, 7)
    sheet, grid = figure(1, 3, size=(3.4, 3.6), sharey=True)
    for axes, psi in zip(grid[0], (0.25, 1, 4)):
        w_plus, w_minus = wd1.group_weights(rewards, psi)
        axes.bar(rewards, w_plus, 0.11, label="w+, pulls up")
        axes.bar(rewards, -w_minus, 0.11, color="C3", label="-w-, pushes down")
        axes.plot(rewards, w_plus - w_minus, "o-", color=GREY, label="w+ - w-, what is left")
        axes.set(title=f"psi = {psi:g}", xlabel="reward")
    grid[0, 0].set_ylabel("weight in the loss")
    save(sheet, out, axes)


def draw_step(axes, tokenizer, length, mask_id, step, rows, canvas, proposal, confidence):
    """A `watch` for generate, but for its first arguments: draws a row of an answer's table."""
    answer, size = canvas[0, -length:], proposal.shape[1]
    hidden = (answer == mask_id).nonzero()[:, 0]
    hidden = hidden[hidden // size == hidden[0] // size]  # those of the current block
    answer[hidden] = proposal[0, hidden % size]
    axes.scatter(
        hidden, [step] * len(hidden), 500, confidence[0, hidden % size], marker="s",
        cmap="summer", vmin=0, vmax=1,
    )  # fmt: skip
    for column, token in enumerate(answer):
        text = visible(tokenizer.decode(token, skip_special_tokens=True))[:3]
        colour = "black" if column in hidden else GREY
        axes.text(column, step, text, color=colour, size=10, ha="center", va="center")


def plot_denoising(runs, out):
    """An answer being written before and after the run: a row a step, a column a token. To the
    first held-out problem that RL made solvable, if there is one among a hundred.

    Coloured cells are masked: the model's guess, and its confidence in it."""
    config = MoreConfig(output_dir=runs[0], resume=True, device="cpu", dtype="float32")
    config.eval_only = True
    base, _, tokenizer, _, problems = wd1.set_up(config)
    models, length = [base, wd1.load_model(f"{runs[0]}/model")[0]], config.gen_length
    for example in islice(problems, 100):
        if [solve(model, tokenizer, example, config)[2] for model in models] == [False, True]:
            break
    sheet, grid = figure(2, 1, size=(0.36 * length + 1, 0.16 * length + 1.2))
    for axes, when, model in zip(grid.flat, ("before", "after"), models):
        watch = partial(draw_step, axes, tokenizer, length, model.config.mask_token_id)
        reward = solve(model, tokenizer, example, config, watch)[1]
        axes.set(title=f"{when} RL: reward {reward:.2f}", ylabel="denoising step", aspect="equal")
        axes.locator_params(integer=True)
        axes.invert_yaxis()
        axes.grid(False)
    puzzle = example["prompt"].removeprefix(get_task(config.task).instruction).strip()
    axes.set_xlabel(fill(f"position in the answer to {visible(puzzle)}", 3 * length))
    sheet.colorbar(axes.collections[0], ax=grid, label="confidence in a guess", fraction=0.03)
    save(sheet, out)


KINDS = {
    "curves": partial(plot_metrics, METRICS[:2]),
    "run": partial(plot_metrics, METRICS),
    "denoising": plot_denoising,
    "weights": plot_weights,
}


def main(argv):
    """The command line."""
    parser = argparse.ArgumentParser("wd1", usage=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("runs", nargs="*", default=["runs/tiny-demo"])
    parser.add_argument("--out", required=True)
    given = parser.parse_args(argv)
    KINDS[given.kind](given.runs, given.out)


if __name__ == "__main__":
    with wd1.one_sentence():
        main(sys.argv[1:])
