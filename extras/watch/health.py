"""Whether a model is what it should be, before the first step; and, after each, when to worry.

    python -m extras.watch.health --model GSAI-ML/LLaDA-8B-Instruct --task sudoku
"""

import json
import sys

import pandas as pd
import torch
import torch.nn.functional as F

import wd1

WINDOW = 10  # steps that are averaged
WATCHED = ["reward", "accuracy", "entropy", "degenerate_groups"]


@torch.no_grad()
def mask_check(model, prompt, attention_mask=None, length=16):
    """How much better, in nats a token, a model restores half of its own completions from behind
    masks than from behind random tokens. prompt: long [B, P], padded on the left.

    Finds a model that would train without any error and learn nothing: over the demo's base models
    it is 2.4 to 6.7, and -0.3 to 1.9 with a token that they do not know for the mask (measured with
    another half in each row; larger models have not been measured)."""
    text = wd1.generate(
        model, prompt, attention_mask=attention_mask, gen_length=length, steps=length // 4,
        block_length=length,
    ).completion  # fmt: skip
    half = torch.randperm(length)[: length // 2] - length  # columns, from the end
    noise, log_probs = torch.randint_like(text, model.config.vocab_size)[:, half], []
    canvas = torch.cat([prompt, text], 1)
    for cover in (model.config.mask_token_id, noise):
        canvas[:, half] = cover
        logits = wd1.predict_logits(model, canvas, attention_mask)[:, half]
        log_probs.append(-F.cross_entropy(logits.mT, text[:, half]).item())
    return log_probs[0] - log_probs[1]


def advice(history):
    """What to do, in a sentence, if the metrics of the steps so far say that the run goes wrong;
    else None.

    Wrong is a reward well below that of earlier steps; and, while most answers are wrong, nothing
    but groups with equal rewards, or an entropy a tenth of the first steps'. All are means of ten
    steps."""
    steps = pd.DataFrame([line for line in history if "reward" in line], columns=WATCHED)
    if len(steps) < 2 * WINDOW:
        return None
    windows = steps.rolling(WINDOW)
    means, spread = windows.mean(), windows.var().reward
    first, now, best = means.iloc[WINDOW - 1], means.iloc[-1], means.reward[:-WINDOW].idxmax()
    high = means.reward[best]
    # The noise of a step, whatever the trend; or in these two windows, if there is more.
    noise = max(steps.reward.diff().pow(2).mean(), spread[best] + spread.iloc[-1])
    # As many as 4.5 standard errors, because there are many windows to be the best of.
    if high - now.reward > max(0.1 * abs(high), 4.5 * (noise / WINDOW) ** 0.5):
        return (
            f"the reward has fallen from {high:.3g} to {now.reward:.3g} (means of {WINDOW} steps): "
            "the updates may be too large; start again with a third of the --learning_rate"
        )
    if now.accuracy < 0.5 and now.degenerate_groups > 0.9999:
        return (
            f"in {WINDOW} steps no group had unequal rewards, and from equal ones nothing is "
            "learned: if rewards were higher before, start again with a third of the "
            "--learning_rate; if not, try easier problems or a higher --temperature"
        )
    if now.accuracy < 0.5 and now.entropy < 0.1 * first.entropy:
        return (
            f"the entropy has collapsed to {now.entropy:.2g} nats a token while {now.accuracy:.0%} "
            "are correct: the samples of a group hardly differ any more; start again with a higher "
            "--temperature or --lam"
        )
    return None


def warn(run, metrics):
    """A function for `wd1.train(watch=...)`: prints the first advice that a run is in need of."""
    if getattr(run, "warned", None):
        return
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    run.warned = advice(map(json.loads, lines))
    if run.warned:
        print(f"\nwd1: warning: step {metrics['step']}: {run.warned}", file=sys.stderr)


def main(argv):
    """Says how much better a model restores what its mask token hides."""
    config = wd1.parse_arguments([*argv, "--eval_only"])
    model, _, tokenizer, _, problems = wd1.set_up(config)
    prompt = wd1.encode(tokenizer, problems["prompt"][:8]).to(config.device)
    gain = mask_check(model, prompt.input_ids, prompt.attention_mask)
    verdict = "as it should be" if gain >= 2 else "was it trained to unmask, from this mask token?"
    print(f"masked tokens are restored better than replaced ones, by {gain:.1f} nats: {verdict}")


if __name__ == "__main__":
    with wd1.one_sentence():
        main(sys.argv[1:])
