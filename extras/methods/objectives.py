"""Other objectives: wd1-positive, wd1++ and diffu-GRPO. For each a `collect` and a `learn`, which
wd1.train takes, and which leave the work to wd1.collect and wd1.learn.
"""

import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import wd1
from extras.methods.views import shared_noise
from rewards import get_task

# ============================================================================ wd1-positive
# Imitates good completions and leaves the bad ones alone, the paper's ablation. It can only sharpen
# its own samples, and a group of equally bad ones is imitated too. Whether it is that which matters
# tell two variants: one leaves out such groups, the other pushes all of a group down alike.


def collect_positive(*arguments):
    """wd1.collect, without w-."""
    batch = wd1.collect(*arguments)
    return replace(batch, w_minus=torch.zeros_like(batch.w_minus))


def collect_uneven(*arguments):
    """The same, without groups of equal rewards."""
    batch = collect_positive(*arguments)
    uneven = ~wd1.degenerate(batch.rewards).repeat_interleave(batch.rewards.shape[1])
    return replace(batch, w_plus=batch.w_plus * uneven)


def collect_centred(*arguments):
    """wd1.collect with w- = 1/G, whose sum over a group is that of w+."""
    batch = wd1.collect(*arguments)
    return replace(batch, w_minus=torch.full_like(batch.w_minus, 1 / batch.rewards.shape[1]))


# ============================================================================ wd1++
# wd1 learns from finished completions alone. But before each of its T steps the sampler has a guess
# at the whole: x0_t, the canvas x_t with every mask filled in. wd1++ decodes and rewards them all.
# The G T guesses of a prompt are one group, whose advantages and weights follow as in wd1, and each
# is trained on as it was made, S_t being the masks of x_t:
#
#     log p(x0_t | q, x_t) ≈ L/|S_t| * sum_{k in S_t} c_k log p(x0_t[k] | q, x_t) / |S_t|
#
# c_k is the probability that the sampler gave the token. (The authors' code has that factor, their
# equation has not: `confidence_factor`.) To wd1.learn a guess is a row like any other.


GUESSES = {
    "guess": Tensor,  # long [B, T, L]: x0_t
    "confidence": Tensor,  # float [B, T, L]: c, of tokens that were masked in x_t; else 0
}
# A Rollout that kept all guesses. Of a row that was done they are its completion.
Guesses = NamedTuple("Guesses", [*(wd1.Rollout.__annotations__ | GUESSES).items()])


def generate_guesses(
    generate, model, prompt, *, gen_length, steps, temperature=0.0, generator=None,
    policy=wd1.predict_logits, **options,
):  # fmt: skip
    """What generate(model, prompt, ...) returns, as Guesses: each step fills in all masks."""
    logits, shape = None, (len(prompt), steps, gen_length)
    guesses, sureness = prompt.new_full(shape, -1), torch.zeros(shape, device=prompt.device)

    def predict_onward(model, canvas, attention_mask, positions):
        nonlocal logits
        onward = torch.arange(positions[0], canvas.shape[1], device=canvas.device)
        logits = policy(model, canvas, attention_mask, onward)
        return logits[:, : len(positions)]

    def record(step, rows, canvas, proposal, confidence):
        further = logits[:, proposal.shape[1] :]  # right of the block
        further[..., model.config.mask_token_id] = -torch.inf
        further_proposal, further_confidence = wd1.propose(further, temperature, generator)
        first = gen_length - logits.shape[1]  # of the current block; all is written left of it
        shown = canvas[:, -logits.shape[1] :]
        masked = shown == model.config.mask_token_id
        guess = torch.cat([proposal, further_proposal], 1)
        guesses[rows, step] = canvas[:, prompt.shape[1] :]
        guesses[rows, step, first:] = guess.where(masked, shown)
        sureness[rows, step, first:] = torch.cat([confidence, further_confidence], 1) * masked

    options |= dict(gen_length=gen_length, steps=steps, temperature=temperature)
    options |= dict(generator=generator, policy=predict_onward, watch=record)
    rollout = generate(model, prompt, **options)
    guesses = guesses.where(guesses >= 0, rollout.completion[:, None])  # where nothing was guessed
    return Guesses(*rollout, guesses, sureness)


@dataclass
class GuessBatch(wd1.Batch):
    """A Batch, and another whose B T rows are the guesses, those of a completion on end."""

    guesses: wd1.Batch


def collect_guesses(generate, *arguments):
    """wd1.collect, with all guesses as a second Batch. generate: one that returns Guesses."""
    model, _, tokenizer, problems, config = arguments[:5]
    batch = wd1.collect(*arguments[:-1], generate)
    *rollout, guess, confidence = batch.rollout
    batch.rollout = wd1.Rollout(*rollout)
    rows = [tensor.repeat_interleave(config.diffusion_steps, 0) for tensor in rollout]
    rows = wd1.Rollout(*rows)._replace(completion=guess.flatten(0, 1))  # [B T, L]
    rows = rows._replace(probability=confidence.flatten(0, 1))
    texts, reward = wd1.decode(model, tokenizer, rows.completion), get_task(config.task).reward
    problems = [problem for problem in problems for _ in range(config.diffusion_steps)]
    rewards = wd1.judged(reward, texts, problems)
    rewards = torch.tensor(rewards, device=guess.device).view(len(batch.rewards), -1)  # [N, G T]
    weights = wd1.group_weights(rewards, psi=1 / (config.lam + config.beta))
    guesses = wd1.Batch(problems, rows, texts, rewards, *(w.flatten() for w in weights))
    return GuessBatch(**vars(batch), guesses=guesses)


def draw_guesses(config, model_config, batch):
    """The View of a gradient step: the guesses of a random `mc_samples` of the steps. The sum over
    them is not scaled up to all steps, as published."""
    rollout, T = batch.rollout, config.diffusion_steps
    step = torch.arange(len(rollout.prompt), device=rollout.prompt.device) % T  # [B T]
    hidden = rollout.written_at >= step[:, None]  # [B T, L]
    size, length = hidden.sum(1, keepdim=True).clamp(min=1), hidden.shape[1]
    scored = hidden & wd1.until_eos(rollout.completion, model_config.eos_token_id)
    chosen = torch.isin(step, torch.randperm(T)[: config.mc_samples].to(step.device))
    weight = scored * (chosen & (batch.w_plus != batch.w_minus))[:, None] * length / size**2
    if config.confidence_factor:
        weight = weight * rollout.probability
    hidden = F.pad(hidden, (rollout.prompt.shape[1], 0))
    return [wd1.View(hidden, rollout.completion, weight)]


def learn_guesses(model, optimizer, batch, config, **options):
    """wd1.learn on the guesses. "degenerate_groups" are those in which all are equally good.

    With config.tempered logits are divided by the sampling temperature, as the authors' code has
    it: the head is linear, so what it is given is divided."""
    temperature = config.temperature if config.tempered and config.temperature else 1
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: (given[0] / temperature,))
    degenerate = wd1.degenerate(batch.guesses.rewards).float().mean().item()
    try:
        metrics = wd1.learn(model, optimizer, batch.guesses, config, draw=draw_guesses, **options)
    finally:
        hook.remove()
    return metrics | {"degenerate_groups": degenerate}


# ============================================================================ diffu-GRPO
# The baseline that the paper compares itself with (d1, arXiv 2504.12216): PPO's clipped ratio for
# each token, log p being the one-step estimate, and a penalty on the KL to a reference. It needs
# three forward passes where wd1 needs one: of the old, the reference and the current policy.


class RatioView(NamedTuple):
    """A wd1.View, and what frozen policies think of its target."""

    hidden: Tensor
    target: Tensor
    weight: Tensor
    old: Tensor  # float [B, L]: log-probabilities under the policy that sampled
    reference: Tensor  # float [B, L]


@dataclass
class RatioBatch(wd1.Batch):
    reference: object  # a model, or None


def collect_grpo(model, reference, tokenizer, problems, config, *arguments):
    """wd1.collect from the policy itself: beta weighs a penalty here, not a share of a mixture."""
    plain = copy.copy(config)
    plain.lam, plain.beta = 1.0, 0.0
    batch = wd1.collect(model, None, tokenizer, problems, plain, *arguments)
    return RatioBatch(**vars(batch), reference=reference)


@torch.no_grad()
def draw_ratios(model, config, batch):
    """The RatioView of one gradient step, under a fresh mask of the prompt.

    Its weights make the token mean of each group, and then the mean over the N groups."""
    rollout, (N, G) = batch.rollout, batch.rewards.shape
    options = dict(prompt_mask_prob=config.prompt_mask_prob, uniform=shared_noise(config, rollout))
    [view] = wd1.one_step_views(model.config, rollout.prompt, rollout.completion, **options)
    tokens = view.weight.view(N, -1).sum(1).repeat_interleave(G)  # [B]: of each row's group
    matters = (wd1.advantages(batch.rewards).flatten() != 0) | (config.beta > 0)
    view = view._replace(weight=view.weight * (matters / tokens / N)[:, None])

    def frozen(policy):  # log-probabilities [B, L], of which each rank computes its share
        def score(rows):
            part, mask = wd1.View(*(each[rows] for each in view)), rollout.attention_mask[rows]
            return wd1.token_log_probs(policy, rollout.prompt[rows], part, mask).cpu()

        parts = torch.arange(N * G).split(config.micro_batch_size)
        return torch.cat(wd1.gather(score, parts)).to(view.weight)

    old = frozen(model)
    if not batch.reference:  # then beta is 0, and any reference will do
        return RatioView(*view, old, old)
    with wd1.as_reference(batch.reference):
        return RatioView(*view, old, frozen(batch.reference))


def diffu_grpo_loss(view, log_probs, advantages, epsilon=0.5, beta=0.04):
    """The sum over all tokens, as the view weighs them, of this; k3 estimates KL(pi || ref).

        loss = -min(ratio A, clip(ratio) A) + beta k3
        k3 = ref/pi - log(ref/pi) - 1

    log_probs and all of the RatioView but `hidden`: [B, L]; advantages [B]. Returns a scalar."""
    ratio, advantages = (log_probs - view.old).exp(), advantages[:, None]
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    log_ref_ratio = view.reference - log_probs
    k3 = log_ref_ratio.exp() - log_ref_ratio - 1
    return (view.weight * (beta * k3 - gain)).sum()


def learn_grpo(model, optimizer, batch, config, **options):
    """wd1.learn on diffu-GRPO's loss. All masks are drawn and scored before the first step, since
    that changes the policy which sampled."""
    views = iter([draw_ratios(model, config, batch) for _ in range(config.num_iterations)])
    advantages = wd1.advantages(batch.rewards).flatten()

    def loss(batch, rows, view, log_probs):
        return diffu_grpo_loss(view, log_probs, advantages[rows], config.epsilon, config.beta)

    options |= dict(draw=lambda *_: [next(views)], loss=loss)
    return wd1.learn(model, optimizer, batch, config, **options)
