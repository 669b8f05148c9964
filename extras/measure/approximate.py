"""What approximate sampling costs and saves in RL, on the demo.

    make approximate          # half an hour on two cores; finished runs are not repeated

Every variant trains on its own samples, from the same bases. In a run it is evaluated as it
samples; what it has trained is then evaluated by exact sampling as well.
"""

from pathlib import Path

import wd1
from extras.measure.harness import grid, outcomes, over_seeds, place, settings, table

VARIANTS = {
    "exact": "",
    "cache": "--cache dual",
    "threshold 0.9": "--threshold 0.9",
    "cache, threshold 0.9": "--cache dual --threshold 0.9",
}


def main():
    """Makes the runs that are not there, and prints the table."""
    root = Path("runs/approximate")
    found = outcomes(grid(root, VARIANTS))
    for run in found.index:
        model = str(place(root, *run) / "model")
        found.loc[run, "sampled exactly"] = wd1.evaluate(settings("--model", model))["accuracy"]
    print(table(over_seeds(found).rename_axis("sampling")))


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
