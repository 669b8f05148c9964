"""The pictures of the README, each from a finished run (weights needs none).

    python -m extras.watch.pictures curves runs/seed0 runs/seed1 --out FILE    # reward and accuracy
    python -m extras.watch.pictures run runs/seed0 --out FILE       # what else a good run shows
    python -m extras.watch.pictures denoising runs/seed0 --out FILE     # an answer, before and after
    python -m extras.watch.pictures weights --out FILE     # w+ and w- of a group, for several psi

They are transparent, in colours that can be read on white and on black, and large enough for a phone.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch

import wd1
from rewards import InputError, get_task, judge, refusing

GREY, COLOURS = "#808080", ["#3b8ed0", "#e0812b", "#3aa655", "#d9534f", "#9a72c7", "#17a2b8"]
PSIS = (0.25, 1, 4)


def figure(rows, columns, size=(4.2, 3.2), **options):
    """(figure, axes [rows, columns]) on a transparent sheet with a faint grid. size: of a panel."""
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    names = "text.color axes.edgecolor axes.labelcolor xtick.color ytick.color grid.color"
    style = dict.fromkeys(names.split(), GREY)
    style |= {"axes.prop_cycle": plt.cycler(color=COLOURS), "font.size": 12}
    plt.rcParams.update(style | {"savefig.transparent": True, "legend.frameon": False})
    shape = dict(figsize=(size[0] * columns, size[1] * rows), squeeze=False, layout="constrained")
    sheet, grid = plt.subplots(rows, columns, **shape, **options)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
    return sheet, grid


def save(sheet, path):
    """Writes a picture."""
    import matplotlib.pyplot as plt

    sheet.savefig(path, dpi=130)
    plt.close(sheet)


def metrics_of(run):
    """(lines of training steps, lines with an evaluation) of a run's metrics.jsonl."""
    with refusing(f"{run} is no run's directory: its metrics.jsonl cannot be read"):
        text = (Path(run) / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        return [line for line in lines if "reward" in line], [line for line in lines if "eval" in line]


def plot_curves(runs, out):
    """Reward of the training samples and accuracy on held-out problems, step by step."""
    sheet, [[left, right]] = figure(1, 2, sharex=True)
    for run in runs:
        trained, tested = metrics_of(run)
        left.plot([line["step"] for line in trained], [line["reward"] for line in trained])
        accuracy = [line["eval"]["accuracy"] for line in tested]
        right.plot([line["step"] for line in tested], accuracy, "o-", label=Path(run).name)
    left.set(xlabel="training step", title="reward of the samples")
    right.set(xlabel="training step", title="accuracy, held out", ylim=(-0.02, 1.02))
    if len(runs) > 1:
        right.legend(loc="lower right")
    save(sheet, out)


def plot_signals(runs, out):
    """What a run shows from within."""
    titles = {
        "reward": "reward", "accuracy": "accuracy (dots: held out)", "entropy": "entropy, nats a token",
        "length": "length, tokens", "degenerate_groups": "groups of equal rewards",
        "grad_norm": "norm of the gradient",
    }  # fmt: skip
    sheet, grid = figure(3, 2, size=(4.2, 2.6), sharex=True)
    for number, run in enumerate(runs):
        trained, tested = metrics_of(run)
        steps, colour = [line["step"] for line in trained], COLOURS[number % len(COLOURS)]
        for axes, (name, title) in zip(grid.flat, titles.items()):
            values = [np.nan if line[name] is None else line[name] for line in trained]
            axes.plot(steps, values, color=colour, linewidth=1.2)
            axes.set_title(title)
        points = [line["step"] for line in tested], [line["eval"]["accuracy"] for line in tested]
        grid[0, 1].plot(*points, "o", color=colour, markersize=4)
    grid[1, 0].set_yscale("log")
    for axes in grid[-1]:
        axes.set_xlabel("training step")
    save(sheet, out)


def plot_weights(out):
    """w+ and w- against the reward, in a group that got from 0 to 6 of 6 blanks right."""
    rewards = torch.linspace(0, 1, 7)
    sheet, grid = figure(1, len(PSIS), size=(3.4, 3.6), sharey=True)
    for axes, psi in zip(grid[0], PSIS):
        w_plus, w_minus = (weights[0] for weights in wd1.group_weights(rewards[None], psi))
        axes.bar(rewards, w_plus, 0.11, color=COLOURS[0], label="w+, pulls up")
        axes.bar(rewards, -w_minus, 0.11, color=COLOURS[3], label="-w-, pushes down")
        left = dict(color=GREY, markersize=6, linewidth=2, label="w+ - w-, what is left")
        axes.plot(rewards, w_plus - w_minus, "o-", **left)
        axes.set(title=f"psi = {psi:g}", xlabel="reward")
    grid[0, 0].set_ylabel("weight in the loss")
    sheet.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(sheet, out)


class Recorder:
    """A `watch` for generate: the guesses and their confidence at every step, of the whole batch."""

    def __init__(self):
        self.steps = []  # (rows, canvas, proposal, confidence)

    def __call__(self, step, rows, canvas, proposal, confidence):
        self.steps.append((rows.tolist(), canvas, proposal, confidence))


def plot_denoising(run, out, problem=None):
    """An answer being written before and after the run: a row a step, a column a token.

    Coloured cells are masked: the model's guess, and its confidence in it. Bold is written by then.
    By default the first held-out problem that RL made solvable."""
    saved = wd1.saved_settings(Path(run), {})
    allowed = {each.name for each in dataclasses.fields(wd1.Config)}
    given = {name: value for name, value in saved.items() if name in allowed}
    given |= dict(resume=False, eval_only=True, device="cpu", dtype="float32")
    config = wd1.Config(**given)
    base, _, tokenizer, _, problems = wd1.set_up(config)
    models = {"before": base, "after": wd1.load_model(Path(run) / "model")[0]}
    task, length = get_task(config.task), config.gen_length
    texts, steps = {}, (length + 1) // 2
    many = problems.select(range(min(100, len(problems))))
    for name, model in models.items():
        rollout = wd1.sample(model, tokenizer, many["prompt"], config, length, steps)
        texts[name] = wd1.decode(model, tokenizer, rollout.completion)
    right = {name: [task.correct(*each) for each in zip(texts[name], many)] for name in texts}
    changed = [i for i, pair in enumerate(zip(right["before"], right["after"])) if pair[1] > pair[0]]
    shown = problem if problem is not None else (changed or [0])[0]
    if not 0 <= shown < len(many):
        raise InputError(f"--problem {shown}: is a number from 0 to {len(many) - 1}")
    sheet, grid = figure(2, 1, size=(0.36 * length + 1, 0.34 * steps + 1.2))
    for axes, (name, model) in zip(grid[:, 0], models.items()):
        recorder = Recorder()
        one = [many[shown]["prompt"]]
        wd1.sample(model, tokenizer, one, config, length, steps, watch=recorder)
        image = draw_steps(axes, recorder.steps, tokenizer, model.config.mask_token_id, length)
        reward = judge(task.reward, texts[name][shown], many[shown])
        axes.set(title=f"{name} RL: reward {reward:.2f}", ylabel="denoising step")
    puzzle = many[shown]["prompt"].removeprefix(task.instruction).strip().replace("\n", "   ")
    grid[1, 0].set_xlabel(f"position in the answer to {puzzle}")
    sheet.colorbar(image, ax=grid, label="confidence in a guess", fraction=0.03, pad=0.01)
    save(sheet, out)


def draw_steps(axes, steps, tokenizer, mask_id, length):
    """One answer's steps as a table of tokens; returns the image behind it."""
    masked = torch.stack([canvas[0, -length:] == mask_id for _, canvas, _, _ in steps])  # [T, L]
    sure, tokens = torch.full(masked.shape, torch.nan), torch.zeros_like(masked, dtype=torch.long)
    for number, (_, canvas, proposal, confidence) in enumerate(steps):
        size = proposal.shape[1]
        start = int(masked[number].float().argmax()) // size * size  # of the current block
        tokens[number] = canvas[0, -length:]
        tokens[number, start : start + size] = proposal[0]
        tokens[number] = tokens[number].where(masked[number], canvas[0, -length:])
        sure[number, start : start + size] = confidence[0]
    sure = sure.masked_fill(~masked, torch.nan)
    image = axes.imshow(sure, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for number, column in itertools.product(range(len(steps)), range(length)):
        text = tokenizer.decode([int(tokens[number, column])]).replace("\n", "⏎")
        text = {"<answer>": "‹", "</answer>": "›", "<|eos|>": "■", "<|mask|>": ""}.get(text, text[:3])
        written = number + 1 == len(steps) or not masked[number + 1, column]
        colour = ("k" if sure[number, column] > 0.6 else "w") if masked[number, column] else GREY
        style = dict(weight="bold" if written else "normal", color=colour, fontsize=11)
        axes.text(column, number, text, ha="center", va="center", **style)
    axes.set(yticks=range(len(steps)), yticklabels=range(1, len(steps) + 1))
    axes.set(xticks=range(1, length, 4), xticklabels=range(2, length + 1, 4))
    axes.grid(False)
    return image


def main(argv):
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = wd1.Parser([], description=__doc__, formatter_class=form)
    parser.add_argument("kind", choices=["curves", "run", "denoising", "weights"])
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--out", required=True)
    parser.add_argument("--problem", type=int, help="denoising: the number of a held-out problem")
    given = parser.parse_args(argv)
    if given.kind == "weights":
        return plot_weights(given.out)
    if not given.runs:
        raise InputError(f"{given.kind} needs a run's directory")
    if given.kind == "denoising":
        return plot_denoising(given.runs[0], given.out, given.problem)
    return {"curves": plot_curves, "run": plot_signals}[given.kind](given.runs, given.out)


if __name__ == "__main__":
    with wd1.one_sentence():
        main(sys.argv[1:])
