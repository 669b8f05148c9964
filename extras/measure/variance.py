"""What each way of drawing masks does to the variance of the ELBO and of wd1's gradient.

    make variance          # the table of extras/measure/measured.md, and assets/variance.png

The same samples of the demo's base model throughout. A variance is that of an estimate times the
forward passes which it takes: its mean over twice the passes has half the variance. Every figure is
a ratio to independent draws; smaller is better.
"""

import pandas as pd
import torch
from torch.nn.utils import parameters_to_vector

import wd1
from extras.demo.base import tiny_base
from extras.measure.harness import bars, settings, table
from extras.methods.views import draw_views

ESTIMATES = {
    "ELBO, independent": "--mc_samples 1",
    "ELBO, stratified levels": "--mc_samples 4",
    "ELBO, complementary masks": "--mc_samples 2 --complementary",
    "ELBO, shared by a group": "--mc_samples 1 --shared_masks",
    "ELBO, all three": "--mc_samples 4 --complementary --shared_masks",
    "one-step, independent": "--likelihood one_step --mc_samples 1",
    "one-step, shared by a group": "--likelihood one_step --mc_samples 1 --shared_masks",
}


def variances(model, batch, config, draws=64):
    """Over draws of masks: of log p(o|q), of wd1's loss, of its gradient; sums over all numbers."""
    found, gap = [], batch.w_minus - batch.w_plus
    for _ in range(draws):
        views = draw_views(config, model.config, batch)
        log_p = wd1.log_likelihood(model, batch.rollout.prompt, views)
        loss = (gap * log_p).sum()
        gradient = parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))
        found.append([log_p, loss, gradient])
    return [config.mc_samples * torch.stack(values).var(0).sum().item() for values in zip(*found)]


def main():
    base = tiny_base()
    config = settings("--model", base, "--batch_size", "384")  # 24 problems
    model, _, tokenizer, train_set, _ = wd1.set_up(config)
    problems = wd1.problems_at(1, train_set, config)
    batch = wd1.collect(model, None, tokenizer, problems, config, (0,))
    found = {
        name: variances(model, batch, settings("--model", base, *words.split()))
        for name, words in ESTIMATES.items()
    }
    ratios = pd.DataFrame(found, ["log p", "wd1's loss", "wd1's gradient"]).T
    ratios /= ratios.iloc[0]
    print(table(ratios.round(2).rename_axis("masks")))
    bars(ratios, "assets/variance.png")


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
