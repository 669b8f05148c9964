"""Where wd1 fails at a high learning rate, on the demo; what that looks like, and what prevents it.

    make collapse          # half an hour on two cores; finished runs in runs/collapse are not repeated

One would blame w-, which pushes log p of the worse completions down without a floor. So the runs at a rate that fails are
repeated without it (wd1-positive), and with what else should soften it; only a smaller rate helps.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

from extras.health import advice
from extras.pictures import panels, save

SEEDS, RUNS, RATES = (0, 1, 2), Path("runs/collapse"), (1e-4, 3e-4, 1e-3, 3e-3)
FAILING = 1e-3  # where remedies are tried
REMEDIES = {
    "without w- (wd1-positive)": ["--objective", "wd1-positive"], "lambda 4 (psi 1/4)": ["--lam", "4"],
    "gradients clipped to norm 0.1": ["--max_grad_norm", "0.1"], "one update a batch": ["--num_iterations", "1"],
}  # fmt: skip
CASES = {f"{rate:g}": ["--learning_rate", str(rate)] for rate in RATES}
CASES |= {name: ["--learning_rate", str(FAILING), *options] for name, options in REMEDIES.items()}


def run(name, seed):
    """The metrics of each step of a run, which is made now if it is not there."""
    directory = RUNS / f"{name.split(' (')[0].replace(', ', '-').replace(' ', '-')}-seed{seed}"
    if not (directory / "summary.json").exists():
        words = ["--output_dir", str(directory)]
        words += ["--resume"] if (directory / "config.json").exists() else ["--seed", str(seed), *CASES[name]]
        threads = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "wd1.py", *words], env=threads, capture_output=True, text=True)
        if done.returncode and "no finite loss" not in done.stderr:
            raise SystemExit(done.stderr)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def plot(runs, out):
    """Reward, entropy, gradient norm and held-out accuracy of the runs at each learning rate, all seeds."""
    figure, [places] = panels(4, size=(3.25, 3.4))
    titles = {"reward": "reward of the samples", "entropy": "entropy, nats a token", "grad_norm": "norm of the gradient"}
    for number, rate in enumerate(f"{rate:g}" for rate in RATES):
        for seed, lines in enumerate(runs[rate]):
            steps = lines[1:]
            style = dict(color=f"C{number}", alpha=0.75, linewidth=1.1, label=f"learning rate {rate}" if seed == 0 else None)
            for axes, name in zip(places, titles):
                points = [fmean(line[name] or 0.0 for line in steps[max(i - 4, 0) : i + 1]) for i in range(len(steps))]
                axes.plot([line["step"] for line in steps], points, **style)
            tested = [line for line in lines if "eval" in line]
            places[3].plot([line["step"] for line in tested], [line["eval"]["accuracy"] for line in tested], **style)
    for axes, title in zip(places, [*titles.values(), "held-out accuracy"]):
        axes.set(xlabel="training step", title=title)
    places[1].set_yscale("log")
    places[3].legend(frameon=False, fontsize=8)
    save(figure, out)


def main():
    from extras.tiny import tiny_base

    for seed in SEEDS:  # before the runs need them
        tiny_base("sudoku", seed)
    with ThreadPoolExecutor(int(os.environ.get("JOBS", 2))) as pool:
        futures = {name: [pool.submit(run, name, seed) for seed in SEEDS] for name in CASES}
        runs = {name: [future.result() for future in futures[name]] for name in CASES}
    heads = "learning rate, or what is changed at 1e-3", "accuracy at the end, seeds 0, 1, 2", "lowest reward", "warned at step"
    print("\n| " + " | ".join(heads) + " |\n|---|---|---|---|")
    for name, seeds in runs.items():
        accuracy = ", ".join(f"{lines[-1]['eval']['accuracy']:.1%}" if "eval" in lines[-1] else "stopped" for lines in seeds)
        rewards = [[line["reward"] for line in lines[1:]] for lines in seeds]
        lowest = ", ".join(f"{min(fmean(found[i : i + 5]) for i in range(20, len(found) - 4)):.2f}" for found in rewards)
        warnings = [[line["step"] for i, line in enumerate(lines) if advice(lines[: i + 1])] for lines in seeds]
        warned = ", ".join(str(steps[0]) if steps else "-" for steps in warnings)
        print(f"| {name} | {accuracy} | {lowest} | {warned} |")
    plot(runs, "assets/collapse.png")


if __name__ == "__main__":
    main()
