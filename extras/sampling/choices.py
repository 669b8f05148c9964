"""Which tokens a denoising step writes, and guidance of what it proposes."""

import torch

import wd1


def threshold(probability, choose=wd1.most_certain):
    """A `choose` for wd1.generate: also every token that is surer than `probability`. Approximate,
    since what is written together does not know of each other; and fast (arXiv 2505.22618)."""

    def choose_more(confidence, masked, count):
        return choose(confidence, masked, count) | (confidence > probability)

    return choose_more


def random(generator=None):
    """A `choose` for wd1.generate: any of the masked tokens, as the ELBO has it."""

    def choose(confidence, masked, count):
        options = dict(generator=generator, device=confidence.device)
        return wd1.most_certain(torch.rand(confidence.shape, **options), masked, count)

    return choose


def guided(scale, prompt_length, shown=wd1.predict_logits, hidden=wd1.predict_logits):
    """Classifier-free guidance, a policy for wd1.generate: logits u + (1 + scale)(c - u).

    c are those of the policy `shown`, u those of `hidden`, which sees the prompt masked: the first
    `prompt_length` columns. (Two policies, since a CachedPolicy serves one canvas.)"""

    def policy(model, canvas, *others):
        blind = canvas.clone()
        blind[:, :prompt_length] = model.config.mask_token_id
        return hidden(model, blind, *others).lerp(shown(model, canvas, *others), 1 + scale)

    return policy
