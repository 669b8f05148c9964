"""Log-probabilities of tokens without all of their logits in memory."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**24  # the most held at a time: 64 MB in float32


def chunked_log_probs(head, states, target):
    """log softmax(head(states))[target]: states [n, H], target long [n] -> float [n].

    That is V logits for one number, and backward would keep several copies (LLaDA: 130 MB each for 256 tokens). So they
    are computed a chunk of tokens at a time, and once more in the backward pass.
    """
    def score(states, target):
        return -F.cross_entropy(head(states).float(), target, reduction="none")

    chunk = max(MAX_LOGITS // head.out_features, 1)
    *chunks, last = zip(states.split(chunk), target.split(chunk))
    kept = [checkpoint(score, *part, use_reentrant=False, preserve_rng_state=False) for part in chunks]
    return torch.cat([*kept, score(*last)])  # backward begins with the last chunk, which may as well be kept
