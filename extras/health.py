"""Whether a model is what it should be, before the first step; what each step's samples are like; and when to worry."""

import math
import sys
from statistics import fmean, variance

import torch

from extras.parallel import RANK, spread
from rewards import InputError, get_task, judge

WINDOW = 10  # steps that are averaged


@torch.no_grad()
def self_check(model, prompt, attention_mask=None, name="the model", length=16):
    """Finds a model that would train without any error and learn nothing. prompt: long [B, P], padded on the left.

    Raises InputError if logits are not finite, or if a changed token does not reach those left of it. Warns if the model
    restores its own completions hardly better from behind masks than from behind random tokens. Returns by how much, in
    nats a token: over the demo's base models 2.4 to 6.7, and -0.3 to 1.9 with a token that they do not know for the mask
    (that is where the bound of 2 is from; larger models have not been measured).
    """
    from wd1 import generate, predict_logits

    size, mask_id, draw = model.config.vocab_size, model.config.mask_token_id, torch.Generator().manual_seed(0)
    ids = torch.randint(size, (1, 16), generator=draw).repeat(2, 1)
    ids[1, 8] = (ids[1, 8] + 1) % size  # whom does this change reach?
    one, other = predict_logits(model, ids.to(prompt.device))
    reached = (one - other).norm(dim=-1)  # [16]
    if not reached.isfinite().all():
        raise InputError(f"{name}: its logits are not finite numbers")
    if not reached[:8].mean() > 0.01 * reached[10:].mean():  # 0 if causal, else about 1; a shifted model predicts 9 from 8
        raise InputError(f"{name} reads left to right only: it is autoregressive, or was loaded as if it were")
    options = dict(attention_mask=attention_mask, gen_length=length, steps=length // 4, block_length=length)
    text = generate(model, prompt, **options).completion
    hidden = (torch.rand(text.shape, generator=draw) < 0.5).to(text.device)

    columns = torch.arange(prompt.shape[1], prompt.shape[1] + length, device=prompt.device)

    def restored(cover):  # mean log-probability of the hidden tokens
        canvas = torch.cat([prompt, torch.where(hidden, cover, text)], 1)
        log_probs = predict_logits(model, canvas, attention_mask, columns).log_softmax(-1)
        return log_probs.gather(-1, text[..., None])[..., 0][hidden].mean().item()

    noise = torch.randint(size, text.shape, generator=draw).to(text.device)
    gain = restored(torch.full_like(text, mask_id)) - restored(noise)
    if gain < 2 and RANK == 0:
        sentence = f"{name} restores what its mask token (id {mask_id}) hides hardly better than what a random token hides"
        print(f"wd1: warning: {sentence} ({gain:.1f} nats): was it trained to unmask, and from this token?", file=sys.stderr)
    return gain


def describe(config, model_config, rollout, texts, rewards, w_plus, rows):
    """What a step's samples were like: the means that metrics.jsonl records.

    texts: of the B completions; rewards [N, G]; w_plus [B, columns]; rows: the B examples. "degenerate_groups" are those
    whose rewards are all equal (for wd1++, of all guesses); "truncated" completions have no EOS. "entropy" is the mean of
    -log p over their tokens (nats), p the policy's probability of each as it was written, at temperature 1. It is below the
    entropy of a single prediction, because low-confidence remasking writes what the policy is surest of.
    """
    from wd1 import until_eos

    counted = until_eos(rollout.completion, model_config.eos_token_id)  # [B, L]
    ended = torch.isin(rollout.completion, torch.tensor(model_config.eos_token_id, device=config.device)).any(1)
    groups = w_plus.view(len(rewards), -1)  # equal rewards have equal weights
    surprise = -rollout.probability.clamp(min=1e-30).log() * counted
    return {
        "reward": rewards.mean().item(),
        "accuracy": fmean(spread(lambda i: bool(judge(get_task(config.task).correct, texts[i], rows[i])), range(len(rows)))),
        "degenerate_groups": (groups.amax(1) == groups.amin(1)).float().mean().item(),
        "length": counted.sum(1).float().mean().item(),
        "truncated": 1 - ended.float().mean().item(),
        "entropy": (surprise.sum() / counted.sum()).item(),
        "denoising_steps": rollout.steps.float().mean().item(),
    }


def advice(history):
    """What to do, in a sentence, if the metrics of the steps so far say that the run goes wrong; else None.

    Wrong is a reward well below that of earlier steps; and, while most answers are wrong, nothing but groups with equal
    rewards, or an entropy a tenth of the first steps'. All are means of ten steps.
    """
    steps = [line for line in history if "reward" in line]
    if len(steps) < 2 * WINDOW:
        return None
    rewards, first, last = [line["reward"] for line in steps], steps[:WINDOW], steps[-WINDOW:]
    windows = [rewards[i : i + WINDOW] for i in range(len(rewards) - WINDOW + 1)]
    best, now = max(windows[:-WINDOW], key=fmean), windows[-1]
    high, low = fmean(best), fmean(now)
    step_variance = fmean((b - a) ** 2 for a, b in zip(rewards, rewards[1:])) / 2  # whatever the trend
    step_variance = max(step_variance, (variance(best) + variance(now)) / 2)
    standard_error = math.sqrt(2 * step_variance / WINDOW)
    if high - low > max(0.1 * abs(high), 4.5 * standard_error):  # many, because there are many windows to be the best of
        return (
            f"the reward has fallen from {high:.3g} to {low:.3g} (means of {WINDOW} steps): the updates may be too large; "
            "start again with a third of the --learning_rate"
        )
    correct = fmean(line["accuracy"] for line in last)
    if correct < 0.5 and all(line["degenerate_groups"] == 1 for line in last):
        return (
            f"in {WINDOW} steps no group had unequal rewards, and from equal ones nothing is learned: if rewards were higher "
            "before, start again with a third of the --learning_rate; if not, try easier problems or a higher --temperature"
        )
    entropy, entropy_now = (fmean(line["entropy"] for line in lines) for lines in (first, last))
    if correct < 0.5 and entropy_now < 0.1 * entropy:
        return (
            f"the entropy has collapsed to {entropy_now:.2g} nats a token while {correct:.0%} are correct: the samples of a "
            "group hardly differ any more; start again with a higher --temperature or --lam"
        )
    return None
