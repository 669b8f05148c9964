"""Whether a model is what it should be, before the first step; and, after each, when to worry.

    python -m extras.watch.health --model GSAI-ML/LLaDA-8B-Instruct --task sudoku
"""

import json
import math
import sys

import numpy as np
import torch

import wd1

WINDOW = 10  # steps that are averaged


@torch.no_grad()
def mask_check(model, prompt, attention_mask=None, name="the model", length=16):
    """Finds a model that would train without any error and learn nothing. prompt: long [B, P],
    padded on the left.

    Warns if the model restores its own completions hardly better from behind masks than from behind
    random tokens. Returns by how much, in nats a token: over the demo's base models 2.4 to 6.7, and
    -0.3 to 1.9 with a token that they do not know for the mask (that is where the bound of 2 is
    from; larger models have not been measured)."""
    draw = torch.Generator().manual_seed(0)
    options = dict(attention_mask=attention_mask, gen_length=length, steps=length // 4)
    text = wd1.generate(model, prompt, block_length=length, **options).completion
    hidden = (torch.rand(text.shape, generator=draw) < 0.5).to(text.device)
    columns = torch.arange(prompt.shape[1], prompt.shape[1] + length, device=prompt.device)

    def restored(cover):  # mean log-probability of the hidden tokens
        canvas = torch.cat([prompt, torch.where(hidden, cover, text)], 1)
        logits = wd1.predict_logits(model, canvas, attention_mask, columns)
        log_probs = logits.log_softmax(-1).gather(-1, text[..., None])[..., 0]
        return log_probs[hidden].mean().item()

    noise = torch.randint(model.config.vocab_size, text.shape, generator=draw).to(text.device)
    mask_id = model.config.mask_token_id
    gain = restored(torch.full_like(text, mask_id)) - restored(noise)
    if not gain >= 2 and wd1.RANK == 0:
        print(
            f"wd1: warning: {name} restores what its mask token (id {mask_id}) hides hardly better "
            f"than what a random token hides ({gain:.1f} nats): was it trained to unmask, and from "
            "this token?",
            file=sys.stderr,
        )
    return gain


def advice(history):
    """What to do, in a sentence, if the metrics of the steps so far say that the run goes wrong;
    else None.

    Wrong is a reward well below that of earlier steps; and, while most answers are wrong, nothing
    but groups with equal rewards, or an entropy a tenth of the first steps'. All are means of ten
    steps."""
    steps = [line for line in history if "reward" in line]
    if len(steps) < 2 * WINDOW:
        return None
    names = "reward", "accuracy", "entropy", "degenerate_groups"
    table = np.array([[step[name] for name in names] for step in steps])
    rewards, accuracy, entropy, equal = table.T
    windows = np.lib.stride_tricks.sliding_window_view(rewards, WINDOW)
    best, now = max(windows[:-WINDOW], key=np.mean), windows[-1]
    # The noise of a step, whatever the trend; or in these two windows, if there is more.
    noise = max((np.diff(rewards) ** 2).mean() / 2, (best.var(ddof=1) + now.var(ddof=1)) / 2)
    standard_error = math.sqrt(2 * noise / WINDOW)
    high, low = best.mean(), now.mean()
    # As many as 4.5 of it, because there are many windows to be the best of.
    if high - low > max(0.1 * abs(high), 4.5 * standard_error):
        return (
            f"the reward has fallen from {high:.3g} to {low:.3g} (means of {WINDOW} steps): the "
            "updates may be too large; start again with a third of the --learning_rate"
        )
    correct = accuracy[-WINDOW:].mean()
    if correct < 0.5 and equal[-WINDOW:].min() == 1:
        return (
            f"in {WINDOW} steps no group had unequal rewards, and from equal ones nothing is "
            "learned: if rewards were higher before, start again with a third of the "
            "--learning_rate; if not, try easier problems or a higher --temperature"
        )
    left = entropy[-WINDOW:].mean()
    if correct < 0.5 and left < 0.1 * entropy[:WINDOW].mean():
        return (
            f"the entropy has collapsed to {left:.2g} nats a token while {correct:.0%} are "
            "correct: the samples of a group hardly differ any more; start again with a higher "
            "--temperature or --lam"
        )
    return None


def warn(run, metrics):
    """A function for `wd1.train(watch=...)`: prints the first advice that a run is in need of."""
    if wd1.RANK or getattr(run, "warned", False):
        return
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    sentence = advice(map(json.loads, lines))
    if sentence:
        run.warned = True
        print(f"\nwd1: warning: step {metrics['step']}: {sentence}", file=sys.stderr)


def main(argv=None):
    """Says how much better a model restores what its mask token hides."""
    config = wd1.parse_arguments(argv)
    config.eval_only = True
    model, _, tokenizer, _, problems = wd1.set_up(config)
    prompt = wd1.encode(tokenizer, problems["prompt"][:8]).to(config.device)
    with wd1.autocast(config):
        gain = mask_check(model, prompt.input_ids, prompt.attention_mask, config.model)
    print(f"what masks hide is restored better than what random tokens hide by {gain:.1f} nats")


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
