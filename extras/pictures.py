"""The pictures of the README, each from a finished run (weights needs none).

    python -m extras.pictures curves runs/seed0 runs/seed1 --out FILE     # reward and held-out accuracy of one run or several
    python -m extras.pictures run runs/seed0 --out FILE                   # what else a good run shows: entropy, length, groups
    python -m extras.pictures denoising runs/seed0 --out FILE             # how an answer is written, before and after
    python -m extras.pictures weights --out FILE                          # w+ and w- of a group, for several psi
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

PSIS = (0.25, 1, 4)


def panels(columns, rows=1, size=(5, 3.6), **options):
    """(figure, axes [rows, columns]) for pictures that are read on a page, light or dark: a white sheet, a faint grid."""
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    shape = dict(figsize=(size[0] * columns, size[1] * rows), dpi=130, squeeze=False, layout="constrained")
    figure, grid = plt.subplots(rows, columns, **shape, **options)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def save(figure, out):
    import matplotlib.pyplot as plt

    figure.savefig(out)
    plt.close(figure)


def metrics_of(run):
    """(lines of training steps, lines with an evaluation) of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward" in line], [line for line in lines if "eval" in line]


def plot_runs(runs, out):
    """Draws the reward of training samples and the accuracy on held-out problems, step by step, into the file `out`."""
    figure, [[left, right]] = panels(2, sharex=True)
    for number, run in enumerate(runs):
        trained, tested = metrics_of(run)
        style = dict(color=f"C{number}", label=Path(run).name)
        left.plot([line["step"] for line in trained], [line["reward"] for line in trained], **style)
        right.plot([line["step"] for line in tested], [line["eval"]["accuracy"] for line in tested], "o-", **style)
    left.set(xlabel="training step", ylabel="reward", title="reward of the training samples")
    right.set(xlabel="training step", ylabel="accuracy", title="accuracy on held-out problems, temperature 0")
    right.set_ylim(-0.02, 1.02)
    if len(runs) > 1:
        right.legend(frameon=False)
    save(figure, out)


def plot_signals(runs, out):
    """What a run shows from within: reward, accuracy, entropy, length, groups that teach nothing, the gradient's norm."""
    titles = {
        "reward": "reward", "accuracy": "accuracy (dots: held out)", "entropy": "entropy, nats a token",
        "length": "length, tokens", "degenerate_groups": "groups with equal rewards", "grad_norm": "norm of the gradient",
    }  # fmt: skip
    figure, grid = panels(3, 2, size=(3.6, 2.5), sharex=True)
    for number, run in enumerate(runs):
        trained, tested = metrics_of(run)
        steps = [line["step"] for line in trained]
        for axes, (name, title) in zip(grid.flat, titles.items()):
            values = [np.nan if line[name] is None else line[name] for line in trained]
            axes.plot(steps, values, color=f"C{number}", linewidth=1.2)
            axes.set_title(title, fontsize=10)
        points = [line["step"] for line in tested], [line["eval"]["accuracy"] for line in tested]
        grid[0, 1].plot(*points, "o", color=f"C{number}", markersize=4)
    grid[0, 2].set_yscale("log")
    grid[1, 0].margins(y=0.4)
    for axes in grid[1]:
        axes.set_xlabel("training step")
    save(figure, out)


def plot_weights(out):
    """w+ and w- against the reward, in a group whose completions got from 0 to 6 of 6 blanks right, for several psi."""
    import torch

    from wd1 import group_weights

    rewards = torch.linspace(0, 1, 7)
    figure, grid = panels(len(PSIS), size=(3.6, 2.9), sharey=True)
    for axes, psi in zip(grid[0], PSIS):
        w_plus, w_minus = (weights[0] for weights in group_weights(rewards[None], psi))
        axes.bar(rewards, w_plus, 0.11, color="C0", label="w+, pulls up")
        axes.bar(rewards, -w_minus, 0.11, color="C3", label="-w-, pushes down")
        axes.plot(rewards, w_plus - w_minus, "ko-", markersize=4, linewidth=1, label="w+ - w-, what is left")
        axes.set(title=f"psi = {psi:g}", xlabel="reward")
    grid[0, 0].set_ylabel("weight in the loss")
    grid[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, out)


def plot_denoising(run, out, problem=None, task=None):
    """An answer being written before and after the run: a row a step, a column a token.

    Coloured cells are still masked: the model's guess, and its confidence in it. Bold is written by then. By default the
    first held-out problem that RL made solvable. A task of your own is a file, and run only if `task` names it.
    """
    import torch

    from extras.settings import check, eval_steps, saved_settings
    from rewards import InputError, get_task, judge, refusing
    from wd1 import Config, decode, load_model, sample, set_up

    with refusing(f"{run}/config.json is not that of a run"):
        config = Config(**saved_settings(run, task) | dict(eval_only=True, resume=False, track=None, device=None))
    check(config)
    base, _, tokenizer, _, problems = set_up(config)
    options = dict(device=config.device, dtype=getattr(torch, config.dtype), seed=config.seed)
    models = {"before": base, "after": load_model(Path(run) / "model", **options)[0]}
    if problem is not None and not 0 <= problem < len(problems):
        raise InputError(f"--problem {problem}: the held-out problems are numbered 0 to {len(problems) - 1}")
    task, length, panel = get_task(config.task), config.gen_length, []
    for model in models.values():
        prompts = problems["prompt"][: max(100, (problem or 0) + 1)]
        rollout = sample(model, tokenizer, prompts, config, length, eval_steps(length), trajectory=True)
        texts = decode(model, tokenizer, rollout.completion)
        panel.append((rollout, texts, [judge(task.correct, *pair) for pair in zip(texts, problems)]))
    changed = [i for i, (old, new) in enumerate(zip(panel[0][2], panel[1][2])) if new > old]
    shown = problem if problem is not None else (changed or [0])[0]
    figure, grid = panels(2, size=(0.29 * length + 0.5, 0.31 * eval_steps(length) + 0.9))
    for axes, name, (rollout, texts, _) in zip(grid[0], models, panel):
        guesses, sure, written = rollout.guesses[shown], rollout.confidence[shown], rollout.written_at[shown]
        steps = int(rollout.steps[shown])
        done = written[None] < torch.arange(steps)[:, None]  # [T, L]: written in an earlier step
        image = axes.imshow(sure[:steps].masked_fill(done, torch.nan), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for step in range(steps):
            for column in range(length):
                text = tokenizer.decode(guesses[step, column]).replace("\n", "⏎")
                text = {"<answer>": "‹", "</answer>": "›", "<|eos|>": "■"}.get(text, text[:3])
                light, bold = done[step, column] or sure[step, column] > 0.6, written[column] <= step
                style = dict(weight="bold" if bold else "normal", color="k" if light else "w", fontsize=8)
                axes.text(column, step, text, ha="center", va="center", **style)
        reward = judge(task.reward, texts[shown], problems[shown])
        axes.set(title=f"{name} RL: reward {reward:.2f}", xlabel="position")
        axes.set(yticks=range(steps), yticklabels=range(1, steps + 1))
        axes.set(xticks=range(1, length, 4), xticklabels=range(2, length + 1, 4))
        axes.grid(False)
    grid[0, 0].set_ylabel("denoising step")
    figure.colorbar(image, ax=grid, label="confidence in a guess", fraction=0.02, pad=0.01)
    save(figure, out)
    print(f"{problems[shown]['prompt'].splitlines()[-1]}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["curves", "run", "denoising", "weights"])
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--out", required=True)
    parser.add_argument("--problem", type=int, help="denoising: the number of a held-out problem")
    parser.add_argument("--task", help="denoising: the run's task, if it is a file of yours")
    arguments = parser.parse_args(argv)
    for run in arguments.runs:
        if not (Path(run) / "metrics.jsonl").is_file():
            parser.error(f"{run} is no run's directory: it has no metrics.jsonl")
    if not arguments.runs and arguments.kind != "weights":
        parser.error(f"{arguments.kind} needs a run's directory")
    draw = {
        "weights": lambda: plot_weights(arguments.out), "curves": lambda: plot_runs(arguments.runs, arguments.out),
        "run": lambda: plot_signals(arguments.runs, arguments.out),
        "denoising": lambda: plot_denoising(arguments.runs[0], arguments.out, arguments.problem, arguments.task),
    }  # fmt: skip
    try:
        draw[arguments.kind]()
    except (ValueError, KeyError, OSError) as error:  # an InputError is a ValueError
        parser.error(str(error).splitlines()[0])


if __name__ == "__main__":
    sys.exit(main())
