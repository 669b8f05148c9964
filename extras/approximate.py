"""What approximate sampling costs and saves, on the demo: speed, agreement with exact samples, accuracy after training.

    make approximate          # about half an hour on two cores; finished runs in runs/approximate are not repeated

Every variant trains on its own samples, from the same bases; each trained model is then evaluated by exact sampling.
"""

import json
import time
from pathlib import Path
from statistics import fmean, median

import torch

import wd1
from extras.tiny import tiny_base
from rewards import TASKS

SEEDS, RUNS = (0, 1, 2), Path("runs/approximate")
VARIANTS = {
    "exact": {}, "cache": dict(cache="dual"), "threshold 0.9": dict(threshold=0.9),
    "cache, threshold 0.9": dict(cache="dual", threshold=0.9),
}  # fmt: skip


def train(name, seed):
    """The run directory of a variant, trained now if it is not there."""
    run = RUNS / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    if not (run / "summary.json").exists():
        words = [word for option, value in VARIANTS[name].items() for word in (f"--{option}", str(value))]
        resume = ["--resume"] if (run / "config.json").exists() else []
        if wd1.main(["--output_dir", str(run), *(resume or ["--seed", str(seed), *words])]):
            raise SystemExit(f"{run} failed")
    return run


def exact_accuracy(run):
    """Held-out accuracy of a run's model with exact sampling at temperature 0."""
    config = wd1.parse_arguments(wd1.Config, wd1.PRESETS, ["--eval_only", "--model", str(run / "model")], "")
    config.eval_size, config.rollout_batch_size, config.lora_rank = 500, 250, 0
    return wd1.evaluate(config)["accuracy"]


def compare(model, tokenizer, prompts, options, rounds=5):
    """(speed as a ratio to exact, share of completion tokens equal to exact ones, mean steps) at temperature 0."""
    ids = tokenizer(prompts, return_tensors="pt").input_ids
    sample = lambda **options: wd1.generate(model, ids, gen_length=19, steps=10, block_length=19, **options)
    ratios, exact, other = [], sample(), sample(**options)
    for _ in range(rounds):  # alternating: a busy machine slows both
        begin = time.time()
        sample()
        middle = time.time()
        sample(**options)
        ratios.append((middle - begin) / (time.time() - middle))
    return median(ratios), (exact.completion == other.completion).float().mean().item(), other.steps.float().mean().item()


def main():
    rows = {name: [] for name in VARIANTS}
    for seed in SEEDS:
        for name, options in VARIANTS.items():
            run = train(name, seed)
            summary = json.loads((run / "summary.json").read_text())
            row = {"accuracy": exact_accuracy(run), "minutes": summary["seconds"] / 60}
            for when, source in (("before", tiny_base("sudoku", seed)), ("after", train("exact", seed) / "model")):
                model, tokenizer = wd1.load_model(source)
                prompts = list(TASKS["sudoku"].test(seed=seed, blanks=6)["prompt"])[:256]
                torch.manual_seed(0)
                row[when] = compare(model, tokenizer, prompts, options)
            rows[name].append(row)
    print("\n| sampling | speed, before / after RL | tokens as in exact sampling | steps | accuracy after RL, seeds 0, 1, 2 |")
    print("|---|---|---|---|---|")
    for name, seeds in rows.items():
        speed, agree, steps = ([fmean(row[when][i] for row in seeds) for when in ("before", "after")] for i in range(3))
        accuracy = ", ".join(f"{row['accuracy']:.1%}" for row in seeds)
        print(
            f"| {name} | {speed[0]:.2f}x / {speed[1]:.2f}x | {agree[0]:.1%} / {agree[1]:.1%} | "
            f"{steps[0]:.1f} / {steps[1]:.1f} | {accuracy} |"
        )


if __name__ == "__main__":
    main()
