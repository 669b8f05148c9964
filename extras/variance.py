"""What each way of drawing masks does to the variance of the ELBO and of wd1's gradient, on the demo's base model.

    make variance          # the table of extras/measured.md, and assets/variance.png

Groups with unequal rewards; the same samples and number of forward passes throughout. Every figure is a ratio to
independent draws; smaller is better.
"""

import torch

from extras.pictures import panels, save
from extras.tiny import tiny_base
from rewards import TASKS
from wd1 import Config, decode, elbo, group_weights, load_model, one_step_log_likelihood, sample, wd1_loss

PROMPTS, GROUP, SAMPLES, DRAWS = 8, 16, 4, 64
OPTIONS = {
    "independent": dict(stratified=False),
    "stratified levels": dict(),
    "complementary masks": dict(complementary=True, stratified=False),
    "shared by a group": dict(group_size=GROUP, stratified=False),
    "all three": dict(complementary=True, group_size=GROUP),
}
ESTIMATES = {f"ELBO, {name}": (elbo, options) for name, options in OPTIONS.items()} | {
    f"one-step, {name}": (one_step_log_likelihood, dict(group_size=size))
    for name, size in (("independent", 1), ("shared by a group", GROUP))
}


def measure(model, prompt, completion, rewards, estimate):
    """Variances over mask draws: of log p(o|q) (mean over rows), of wd1's loss, of its gradient (summed over weights)."""
    weights = group_weights(rewards)
    log_ps, losses, gradients = [], [], []
    for _ in range(DRAWS):
        log_p = estimate(model, prompt, completion)
        loss = wd1_loss(log_p.view(PROMPTS, GROUP), *weights)
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        log_ps.append(log_p.detach())
        losses.append(loss.detach())
        gradients.append(torch.cat([part.flatten() for part in gradient]))
    return [torch.stack(values).var(0).sum().item() for values in (log_ps, losses, gradients)]


def main():
    torch.manual_seed(0)
    model, tokenizer = load_model(tiny_base())
    task, config = TASKS["sudoku"], Config(device="cpu", rollout_batch_size=PROMPTS * GROUP, block_length=19)
    rows = [row for row in task.train(blanks=6).select(range(64)) for _ in range(GROUP)]
    rollout = sample(model, tokenizer, [row["prompt"] for row in rows], config, 19, 10, temperature=1.0)
    texts = decode(model, tokenizer, rollout.completion)
    rewards = torch.tensor([task.reward(text, row) for text, row in zip(texts, rows)]).view(-1, GROUP)
    telling = (rewards.amax(1) > rewards.amin(1)).nonzero().flatten()[:PROMPTS]  # equal rewards teach nothing
    parts = (rollout.prompt, rollout.completion)
    prompt, completion = (part.unflatten(0, (-1, GROUP))[telling].flatten(0, 1) for part in parts)
    rewards = rewards[telling]
    print(f"{SAMPLES} forward passes each, {DRAWS} draws, {PROMPTS} groups of {GROUP}\n")
    print("| masks | log p(o\\|q) | wd1's loss | wd1's gradient |\n|---|---|---|---|")
    base, ratios = None, {}
    for name, (estimate, options) in ESTIMATES.items():
        variances = measure(
            model, prompt, completion, rewards,
            lambda *parts, estimate=estimate, options=options: estimate(*parts, mc_samples=SAMPLES, **options),
        )  # fmt: skip
        base = base or variances
        ratios[name] = [value / reference for value, reference in zip(variances, base)]
        print(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios[name]) + " |", flush=True)
    plot(ratios, "assets/variance.png")


def plot(ratios, out):
    """A bar for each estimate: what its choice of masks makes of the variance of log p, of the loss and of its gradient."""
    figure, [places] = panels(3, size=(3.9, 2.9), sharey=True)
    for axes, values, title in zip(places, zip(*ratios.values()), ("log p(o|q)", "wd1's loss", "wd1's gradient")):
        bars = axes.barh(list(ratios), values, color=["C0"] * len(OPTIONS) + ["C1"] * (len(ratios) - len(OPTIONS)), height=0.6)
        axes.bar_label(bars, fmt=" %.2f", fontsize=8)
        axes.set(xscale="log", title=f"variance of {title}", xlim=(0.3, 600))
        axes.axvline(1, color="k", linewidth=0.8)
        axes.grid(axis="y", alpha=0)
    places[0].invert_yaxis()
    save(figure, out)


if __name__ == "__main__":
    main()
