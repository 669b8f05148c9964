"""What each way of drawing masks does to the variance of the ELBO and of wd1's gradient.

    make variance          # the table of extras/measure/measured.md, and assets/variance.png

The same samples of the demo's base model and the same number of forward passes throughout. Every
figure is a ratio to independent draws; smaller is better.
"""

import pandas as pd
import torch

import wd1
from extras.demo.base import tiny_base
from extras.measure.harness import settings, table
from extras.methods.views import draw_views
from extras.watch.pictures import figure, save

PROMPTS, PASSES, DRAWS = 24, 4, 64
ESTIMATES = {  # averaged until they have taken PASSES forward passes
    "ELBO, independent": "--mc_samples 1",
    "ELBO, stratified levels": "--mc_samples 4",
    "ELBO, complementary masks": "--mc_samples 2 --complementary",
    "ELBO, shared by a group": "--mc_samples 1 --shared_masks",
    "ELBO, all three": "--mc_samples 4 --complementary --shared_masks",
    "one-step, independent": "--likelihood one_step --mc_samples 4",
    "one-step, shared by a group": "--likelihood one_step --mc_samples 4 --shared_masks",
}


def variances(model, batch, config, draws=DRAWS):
    """Over draws of masks: of log p(o|q), of wd1's loss, of its gradient; sums over all numbers."""
    found, repeats = [], PASSES // config.mc_samples
    shape, prompt = batch.rewards.shape, batch.rollout.prompt
    weights = batch.w_plus.view(shape), batch.w_minus.view(shape)
    for _ in range(draws):
        views = [draw_views(config, model.config, batch) for _ in range(repeats)]
        log_p = wd1.log_likelihood(model, prompt, sum(views, [])) / repeats
        loss = wd1.wd1_loss(log_p.view(shape), *weights)
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        parts = log_p, loss, torch.cat([part.flatten() for part in gradient])
        found.append([part.detach() for part in parts])
    return [torch.stack(values).var(0).sum().item() for values in zip(*found)]


def main():
    base, found = tiny_base("sudoku", 0), {}
    config = settings("--model", base)
    model, _, tokenizer, problems, _ = wd1.set_up(config)
    few = problems.select(range(PROMPTS))
    problems = [problem for problem in few for _ in range(config.num_generations)]
    batch = wd1.collect(model, None, tokenizer, problems, config, (0,))
    for name, words in ESTIMATES.items():
        torch.manual_seed(0)
        found[name] = variances(model, batch, settings("--model", base, *words.split()))
    ratios = pd.DataFrame(found, ["log p", "wd1's loss", "wd1's gradient"]).T
    ratios /= ratios.iloc[0]
    print(table(ratios.map("{:.2f}".format).rename_axis("masks")))
    sheet, places = figure(1, 3, sharex=True, sharey=True)
    ratios[::-1].plot.barh(subplots=True, ax=places, logx=True, legend=False)
    for axes in places.flat:
        axes.bar_label(axes.containers[0], fmt=" %.2f")
        axes.xaxis.set_visible(False)
    save(sheet, "assets/variance.png")


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
