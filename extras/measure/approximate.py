"""What approximate sampling costs and saves, on the demo: speed, agreement, accuracy after RL.

    make approximate          # half an hour on two cores; finished runs are not repeated

Every variant trains on its own samples, from the same bases; each trained model is then evaluated
by exact sampling. Speed and agreement with exact sampling are those on a base and on the model that
was trained exactly, at temperature 0.
"""

from functools import partial
from pathlib import Path

import wd1
from extras import train
from extras.demo.base import tiny_base
from extras.measure.harness import grid, place, race, settings, table

SEEDS, ROOT = range(3), Path("runs/approximate")
VARIANTS = {
    "exact": "",
    "cache": "--cache dual",
    "threshold 0.9": "--threshold 0.9",
    "cache, threshold 0.9": "--cache dual --threshold 0.9",
}


def beside_exact(source, when):
    """A frame of each variant's speed, share of tokens equal to exact ones, and mean steps."""
    base = settings("--model", source, "--eval_only")
    model, _, tokenizer, _, problems = wd1.set_up(base)
    ids = wd1.encode(tokenizer, problems["prompt"]).input_ids
    samplers, lengths = {}, dict(gen_length=19, steps=10, block_length=19)
    for name, words in VARIANTS.items():
        samplers[name] = partial(train.sampler(settings(*words.split())), model, ids, **lengths)
    found = race(samplers, 5)[["speed"]]
    exact = samplers["exact"]().completion
    for name, sampler in samplers.items():
        rollout = sampler()
        found.loc[name, "as exact"] = (rollout.completion == exact).float().mean().item()
        found.loc[name, "steps"] = 1 + rollout.written_at.amax(1).float().mean().item()
    return found.round(3).add_suffix(f", {when} RL")


def main():
    """Makes the runs that are not there, and prints the table."""
    grid(ROOT, VARIANTS, SEEDS)
    trained = str(place(ROOT, "exact", 0) / "model")
    found = beside_exact(tiny_base(), "before").join(beside_exact(trained, "after"))
    for seed in SEEDS:
        sources = [str(place(ROOT, name, seed) / "model") for name in VARIANTS]
        configs = [settings("--model", source, "--seed", str(seed)) for source in sources]
        found[f"accuracy, seed {seed}"] = [wd1.evaluate(config)["accuracy"] for config in configs]
    print(table(found.rename_axis("sampling")))


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
