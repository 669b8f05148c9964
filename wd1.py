"""wd1: reinforcement learning for diffusion language models, in one file.

A diffusion language model (LLaDA, Dream, ...) writes text by *unmasking*: it starts from a row of mask tokens and, step
by step, fills in the positions it is surest of, in any order. Nobody can compute the probability of the finished text,
because that is a sum over all orders. PPO and GRPO need that probability three times per update (of the old, the
reference and the current policy) and divide one poor estimate by another.

wd1 (arXiv 2507.08838) needs it once and never divides. For every prompt q it samples a group of G completions o_i,
scores them, and *imitates the good ones and un-imitates the bad ones*:

    A_i  = r_i - mean_j r_j                                 how much better than the group
    w+_i = softmax_i(psi A),  w-_i = softmax_i(-psi A)      each one's share of the pull up, of the push down
    loss = - sum_i (w+_i - w-_i) log p(o_i | q)             a weighted log-likelihood

psi = 1 / (lambda + beta) says how greedy: lambda is the strength of a KL penalty that keeps the new policy near the one
that sampled, beta of one that keeps it near a reference.

That is the whole method. The rest of the file makes each symbol concrete, in this order:

    1 configuration   2 the model   3 sampling   4 likelihood   5 weights and losses
    6 the training loop   7 evaluation   8 the command line

A reader who stops after section 5 has read the paper. Shapes stand beside tensors: N prompts, G completions each, B = N G
rows, P prompt tokens, L completion tokens, T denoising steps, V vocabulary entries; b and n are some rows, some columns.

    python wd1.py                                                       the demo: a laptop, a few minutes
    python wd1.py --model GSAI-ML/LLaDA-8B-Instruct --task sudoku       the real thing: one 80 GB GPU
        with --load_in_4bit --gradient_checkpointing                    one 24 GB GPU
    torchrun --nproc_per_node 8 wd1.py ...                              eight GPUs; --shard --lora_rank 0 trains all weights
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 wd1.py --batch_size 96 ...
                                                                        on each of two nodes, which share --output_dir
    python wd1.py --help                                                every setting, with its meaning
"""

import collections
import copy
import json
import math
import sys
import time
import warnings
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal, NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm

from extras import parallel
from extras.cache import KeyValueCache
from extras.checkpoints import LLADA_WEIGHTS, find_checkpoint, four_bits, read_config, read_tokenizer
from extras.chunks import chunked_log_probs
from extras.health import describe, self_check
from extras.runs import RunDirectory, exit_code, problems_of
from extras.settings import autocast, check, check_prompts, eval_steps, parse_arguments, quiet
from extras.vetting import check_finite, check_weights, vetted
from extras.watch import show
from rewards import TASKS, InputError, get_task, judge, refusing

# ================================================================================================== 1. Configuration
# One dataclass holds every setting of a run, and the command line is made from it. PRESETS change some, by what is trained.


def setting(default, help):
    """A dataclass field that carries its line of `--help`."""
    make = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": help}, **make)


@dataclass
class Config:
    """Every setting. The defaults are those of the published LLaDA-8B runs; PRESETS holds what differs from them."""

    model: str = setting("tiny", "'tiny' (the demo's), a directory, a LLaDA config.json (random weights) or a hub id")
    task: str = setting("sudoku", f"{', '.join(TASKS)}, FILE.py:CLASS (a rewards.Task of yours) or rg:NAME (reasoning-gym)")
    data: Optional[str] = setting(None, "a .csv or .jsonl file with the problems, instead of the task's own")
    test_data: Optional[str] = setting(None, "a file with the held-out problems, instead of a fifth of --data")
    blanks: int = setting(8, "sudoku: empty cells of a generated puzzle")
    output_dir: Optional[str] = setting(None, "where the run is written; default runs/<model>-<task>-<objective>")
    track: Optional[Literal["tensorboard", "wandb", "trackio"]] = setting(None, "send the metrics to this tracker as well")
    resume: bool = setting(False, "go on from the checkpoint in output_dir")
    eval_only: bool = setting(False, "evaluate the model and stop")
    dry_run: bool = setting(False, "print what the run would cost and stop")
    seed: int = setting(0, "fixes everything random")
    device: Optional[str] = setting(None, "default: cuda if there is one, else cpu")
    shard: bool = setting(False, "divide the weights among the GPUs of a torchrun, for training all of a large model")
    compile: bool = setting(False, "torch.compile the transformer, which takes minutes at first")
    load_in_4bit: bool = setting(False, "frozen weights in 4 bits (bitsandbytes), for LoRA on a 24 GB GPU")
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "of arithmetic and frozen weights; auto: bfloat16 on cuda")

    # The objective
    objective: Literal["wd1", "wd1-positive", "wd1++", "diffu-grpo"] = setting("wd1", "what is optimised (section 5)")
    likelihood: Literal["one_step", "elbo", "trajectory"] = setting("one_step", "wd1's estimate of log p(o|q) (section 4)")
    mc_samples: int = setting(1, "forward passes per estimate: mask draws, or steps of the trajectory or of wd1++")
    complementary: bool = setting(False, "elbo: score each mask together with its complement")
    shared_masks: bool = setting(False, "elbo, one_step, diffu-grpo: a group shares its mask draws")
    prompt_mask_prob: float = setting(0.15, "one_step, diffu-grpo: probability of masking a prompt token")
    lam: float = setting(1.0, "strength of the KL to the sampling policy, lambda; psi = 1 / (lambda + beta)")
    beta: Optional[float] = setting(None, "strength of the KL to the reference; default 0, for diffu-grpo 0.04")
    epsilon: float = setting(0.5, "diffu-grpo: ratios are clipped to [1 - epsilon, 1 + epsilon]")
    confidence_factor: bool = setting(True, "wd1++: weigh each token with the probability the model gave it")

    # Sampling
    gen_length: int = setting(256, "tokens of a completion, L")
    diffusion_steps: int = setting(128, "denoising steps of a completion, T")
    block_length: int = setting(32, "tokens of a block; blocks are finished left to right")
    temperature: float = setting(0.9, "of sampling in training; evaluation is at temperature 0")
    rollout_batch_size: int = setting(24, "completions sampled at a time; changes memory, speed and the draws")
    cache: Literal["none", "prefix", "dual"] = setting("none", "approximate, fast: reuse keys and values (see generate)")
    threshold: float = setting(1.0, "approximate, fast: also write every token surer than this in a step; 1: exact")

    # The update
    max_steps: int = setting(1000, "training steps; each samples one batch")
    batch_size: int = setting(48, "completions a step, N x G")
    num_generations: int = setting(6, "completions a prompt, G")
    num_iterations: int = setting(12, "gradient steps on each batch, mu")
    micro_batch_size: int = setting(6, "completions a forward and backward pass; changes memory, not the gradient")
    learning_rate: float = setting(3e-6, "AdamW's, at its peak")
    lr_scheduler: Literal["constant_with_warmup", "linear", "cosine"] = setting("constant_with_warmup", "its shape")
    warmup_steps: int = setting(10, "training steps until the peak")
    weight_decay: float = setting(0.1, "AdamW's")
    max_grad_norm: float = setting(0.2, "gradients are clipped to this norm")
    lora_rank: int = setting(128, "rank of new LoRA adapters on all linear layers (alpha half of it, dropout 0.05); 0: none")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: slower, far less memory")

    # Evaluation
    eval_size: int = setting(256, "held-out problems to evaluate on")
    eval_lengths: list[int] = setting([128, 256, 512], "completion lengths to evaluate at, with two tokens a step")
    eval_every: int = setting(100, "training steps between evaluations; 0: only before and after")
    save_every: int = setting(20, "training steps between checkpoints")


PRESETS = {  # what differs from the defaults, by task, objective and model; later ones win
    "sudoku": dict(num_iterations=8),
    "wd1++": dict(  # the published run trained all weights, which takes several GPUs
        mc_samples=16, num_generations=4, gen_length=512, block_length=512, rollout_batch_size=8, temperature=0.1,
        learning_rate=1e-5,
    ),
    "tiny": dict(
        blanks=6, likelihood="elbo", mc_samples=2, gen_length=19, diffusion_steps=10, block_length=19,
        temperature=1.0, rollout_batch_size=256, max_steps=80, batch_size=256, num_generations=16, num_iterations=2,
        micro_batch_size=256, learning_rate=1e-4, lr_scheduler="linear", warmup_steps=5, max_grad_norm=1.0, lora_rank=0,
        eval_lengths=[19], eval_size=500, eval_every=10, save_every=10,
    ),
}  # fmt: skip

# =================================================================================================== 2. The model
# A diffusion language model is a stock transformer without its causal mask. It was trained to restore text of which a random
# part was masked, so every position sees every other, and the output at a masked position i is a distribution over the token
# that belongs there, given all tokens x that are shown:
#
#     p(o_i | q, x) = softmax(logits_i)
#
# (o_i is a token of one completion from here to section 4, and a completion of a group elsewhere.) So real checkpoints load
# into stock classes with `config.is_causal = False`, which transformers 5 heeds; only names differ, and for Dream where a
# prediction is read (extras/checkpoints.py). Nothing would fail if the causal mask were left on: a run would cost as much,
# report finite losses and learn nothing. That is why `self_check` looks at each model before its first step.


def load_model(source, *, device="cpu", dtype=torch.float32, seed=0, load_in_4bit=False):
    """Loads a diffusion language model and its tokenizer. Runs no code of a checkpoint and unpickles nothing.

    source: a LLaDA-style config.json (random weights from `seed`, a character tokenizer), "tiny" (tiny_config.json; `train`
    begins with the demo's base instead), a directory in LLaDA's, Dream's, a2d's or this project's format (full or LoRA), or a
    hub id. On device "meta" the model has shapes and no weights. load_in_4bit: linear layers in 4 bits (bitsandbytes), dtype
    for the rest.

    Returns (model, tokenizer): a stock transformers model in eval mode (a PeftModel for LoRA), with
    `model.config.mask_token_id` (int), `.eos_token_id` (int or list) and `.logit_shift` (bool: the prediction for position
    i is read at i - 1, as in Dream) set. Raises InputError, in one sentence, for anything that cannot be loaded faithfully.
    """
    path = find_checkpoint(source, weights=device != "meta")
    if (path / "adapter_config.json").is_file():
        from extras.lora import load_adapters

        return load_adapters(path, load_model, device=device, dtype=dtype, seed=seed, load_in_4bit=load_in_4bit)
    stock, config = read_config(path)
    tokenizer = read_tokenizer(path, config)
    four_bit = four_bits(path, device, dtype) if load_in_4bit and device != "meta" else {}
    if device != "meta":
        host_bytes = 0 if four_bit else dtype.itemsize  # of a weight; those in 4 bits go straight to the device
        check_weights(path, stock, config, host_bytes, LLADA_WEIGHTS)
    if path.is_file() or device == "meta":
        with refusing(f"{path}: not a valid config"), torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            return stock(config).to(dtype).eval(), tokenizer
    with refusing(f"{path}: the weights cannot be loaded"), vetted(path) as files:
        options = dict(generation_config=transformers.GenerationConfig(), use_safetensors=True)
        options |= dict(config=config, dtype=dtype, key_mapping=LLADA_WEIGHTS, output_loading_info=True, **four_bit)
        model, info = stock.from_pretrained(files, **options)
    for kind in ("missing", "unexpected", "mismatched"):
        if names := sorted(map(repr, info[f"{kind}_keys"])):
            raise InputError(f"{path}: {len(names)} weights are {kind}, the first is {names[0]:.100}")
    model._weight_conversions = None  # or save_pretrained would write LLaDA's names under a Llama config
    model = model if four_bit else model.to(device)
    check_finite(path, model.named_parameters())
    return model.eval(), tokenizer


@parallel.as_forward  # counts as a forward pass of the model, which is when weights divided among GPUs are gathered
def predict_logits(model, canvas, attention_mask=None, positions=None, cache=None):
    """One forward pass: logits of the token at each position, given all unmasked tokens left and right of it.

    canvas: long [B, P+L]. attention_mask: [B, P] or wider, 0 at left padding; columns beyond it, and all if None, are real.
    positions: long [n] or [B, n], the columns to predict, the only ones the output head runs on; None for all.
    cache: a KeyValueCache of earlier passes over this canvas; `positions` must lie in its window, the columns computed anew.
    Returns float32 [B, n, V]. Rows do not depend on their padding: positions are counted from the first real token.
    """
    return model.get_output_embeddings()(hidden_states(model, canvas, attention_mask, positions, cache)).float()


def hidden_states(model, canvas, attention_mask=None, positions=None, cache=None):
    """predict_logits without its output head: the last hidden states from which `positions` are predicted, [B, n, H]."""
    columns = torch.arange(canvas.shape[1], device=canvas.device)
    read_at = columns if positions is None else positions
    read_at = (read_at - 1).clamp(min=0) if model.config.logit_shift else read_at  # Dream's are read one to the left
    position_ids, visible = columns[None], None
    if attention_mask is not None:
        real = F.pad(attention_mask.bool(), (0, canvas.shape[1] - attention_mask.shape[1]), value=True)
        position_ids, visible = (real.cumsum(-1) - 1).clamp(min=0), real[:, None, None]  # [B, head, query, P+L]
    if cache is None:
        states = model.get_decoder()(canvas, visible, position_ids, use_cache=False).last_hidden_state
    else:
        states, read_at = cache.run(model.get_decoder(), canvas, visible, position_ids, read_at)
    return states.take_along_dim(torch.atleast_2d(read_at)[..., None], 1)


def as_reference(model):
    """A context in which a LoRA model is the model it adapts; any other model is its own reference."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


# ========================================================================================= 3. Sampling: the reverse process
# Start from the prompt and a canvas of L masks. At each step t guess every token that is masked in the canvas x_t, write those
# few of the current block that the model is surest of, and leave the rest masked. Blocks go left to right (LLaDA, 2502.09992).
#
#     x0_t[i] ~ p(o_i | q, x_t)     a guess at each masked token, on its own
#     c_i = p(x0_t[i] | q, x_t)     how sure the model is of it
#
# Why the surest first? The guesses of one step do not know of each other: asked for a city, two masks may be filled with
# "New" and "Angeles". Where the model is sure there is little left to choose, and little to get wrong. That guesses are blind
# to each other is also why fewer steps are worse. And p(o | q) has no formula, since o can come about in so many orders.


@dataclass
class Rollout:
    """What `generate` returns: the completions, and how they came to be."""

    prompt: Tensor  # long [B, P], as given
    attention_mask: Optional[Tensor]  # [B, P], as given
    completion: Tensor  # long [B, L]
    written_at: Tensor  # long [B, L]: the step, from 0, that wrote each token; T for EOS filled in. x_t masks written_at >= t
    probability: Tensor  # float [B, L]: the policy's, at temperature 1, of each token as it was written; 1 for EOS filled in
    steps: Tensor  # long [B]: denoising steps taken, at most T
    guesses: Optional[Tensor] = None  # long [B, T, L]: x0_t, the canvas of each step with every mask filled in
    confidence: Optional[Tensor] = None  # float [B, T, L]: the probability of each token of x0_t when proposed, else 0


def unmasking_schedule(gen_length, steps, block_length):
    """For each block, (its first column, [tokens to write in each of its steps]); remainders go to the first in line.

    Raises InputError unless the blocks fill the completion and each has at least a step, and each step a token.
    """
    if not 1 <= block_length <= gen_length <= 2**20 or gen_length % block_length:
        raise InputError(f"gen_length {gen_length} is not a multiple of block_length {block_length}, up to a million")
    blocks = gen_length // block_length
    if not blocks <= steps <= gen_length:
        raise InputError(f"{gen_length} tokens in {blocks} blocks take {blocks} to {gen_length} denoising steps, not {steps}")
    evenly = lambda total, parts: [total // parts + (i < total % parts) for i in range(parts)]
    return [(block * block_length, evenly(block_length, own)) for block, own in enumerate(evenly(steps, blocks))]


def propose(logits, temperature, generator):
    """A token for each position and its probability at temperature 1: logits [..., V] -> long, float [...].

    argmax(logits / temperature + Gumbel noise) is an exact draw from the softmax. The largest noise that float32 can make
    is 16.6, so unlikely tokens would never win (arXiv 2409.02908); float64 reaches 36.
    """
    noisy = logits
    if temperature:
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=torch.float64)
        noisy = logits / temperature - (-uniform.log()).log()
    proposal = noisy.argmax(-1, keepdim=True)
    log_prob = logits.gather(-1, proposal)[..., 0] - logits.logsumexp(-1)
    return proposal[..., 0], log_prob.exp().clamp(max=1)  # rounding must not carry it over a threshold of 1


def most_certain(score, free, count):
    """The `count` places of each row with the highest score, of those that are free: float, bool [b, n] -> bool [b, n]."""
    rank = score.masked_fill(~free, -torch.inf).argsort(stable=True, descending=True).argsort()
    return free & (rank < count)


@torch.no_grad()
def generate(
    model, prompt, *, attention_mask=None, gen_length=256, steps=128, block_length=32, temperature=0.0,
    remasking="low_confidence", cfg_scale=0.0, generator=None, reference=None, reference_weight=0.0, trajectory=False,
    cache="none", refresh_every=None, threshold=1.0,
):  # fmt: skip
    """Samples completions by iterative unmasking. Returns a Rollout, with no mask left in its completions.

    A row with an EOS in a finished block is done: what is right of that block is no part of o and becomes EOS, unsampled.

    prompt: long [B, P], left-padded where attention_mask [B, P] is 0. temperature: 0 takes the likeliest token.
    remasking: "low_confidence" writes the tokens the model is surest of, "random" any.
    cfg_scale s: classifier-free guidance, logits u + (1 + s)(c - u), c with the prompt shown and u with it masked.
    reference, reference_weight b: sample the geometric mixture, logits (1 - b) model + b reference. Passing a LoRA model
    as its own reference means itself with the adapters off.
    trajectory: keep guesses and confidence, of all masked columns at every step (with several blocks the draws then differ).
    generator: a torch.Generator on the prompt's device; it fixes every draw. Raises InputError for impossible options.

    Two approximations, from Fast-dLLM (arXiv 2505.22618), sample several times as fast from a policy slightly off the
    model's; wd1 has no importance ratio that would have to correct for it. cache: "prefix" computes keys and values left of
    the current block once a block only, "dual" those right of it as well; refresh_every=k also every k steps of a block.
    threshold: a step writes, besides its scheduled tokens, every token proposed with more than this probability (1: none).
    """
    schedule, mask_id = unmasking_schedule(gen_length, steps, block_length), model.config.mask_token_id
    eos = torch.tensor(model.config.eos_token_id, device=prompt.device).view(-1)
    if remasking not in ("low_confidence", "random") or cache not in ("none", "prefix", "dual"):
        raise InputError(f"remasking {remasking!r}, cache {cache!r}: must be low_confidence or random; none, prefix or dual")
    P, device, step, path = prompt.shape[1], prompt.device, 0, []  # path: (guess, confidence) of every step
    canvas = F.pad(prompt, (0, gen_length), value=mask_id)  # [B, P+L]
    written_at, probability = torch.full_like(canvas, steps), torch.ones(canvas.shape, device=device)  # T: never written
    taken = torch.zeros_like(canvas[:, 0])

    def policy_logits(x, columns, prompt_shown=True):  # [b, n, V] of the sampling policy; mask and caches are the block's
        logits = predict_logits(model, x, mask, columns, caches["model", prompt_shown])
        if reference_weight:
            with as_reference(reference):
                other = predict_logits(reference, x, mask, columns, caches["reference", prompt_shown])
            logits = logits.lerp(other, reference_weight)
        return logits

    for start, counts in schedule:
        first, last = P + start, P + start + block_length  # the columns of the current block
        done = torch.isin(canvas[:, P:first], eos).any(1)
        canvas = canvas.masked_fill(done[:, None] & (canvas == mask_id), eos[0])
        live = (~done).nonzero().flatten()  # [b], the rows to go on with. In exact sampling the host waits only here
        if parallel.all_done(not len(live), model):
            break
        live = live if len(live) else torch.zeros_like(taken[:1])  # row 0, for show: another rank needs the shared weights
        x, when, sure = canvas[live], written_at[live], probability[live]  # put back when the block is full
        mask = None if attention_mask is None else attention_mask[live]
        end = x.shape[1] if trajectory else last  # of the columns to predict
        window = (max(first - model.config.logit_shift, 0), x.shape[1] if cache == "prefix" else end)
        caches = collections.defaultdict(lambda: None if cache == "none" else KeyValueCache(window))  # noqa: B023
        # The columns still masked, from left to right: [b, n]. Nothing else needs logits. Every row writes `count` of them a
        # step, so n is the same for all rows; only with a threshold do some rows run ahead and hold written ones as well.
        columns = torch.arange(first, end, device=device).expand(len(live), -1)
        for passed, count in enumerate(counts):
            if refresh_every and passed % refresh_every == 0:
                caches.clear()
            logits = policy_logits(x, columns)
            if cfg_scale:
                blind = torch.cat([torch.full_like(x[:, :P], mask_id), x[:, P:]], dim=1)
                logits = torch.lerp(policy_logits(blind, columns, False), logits, 1 + cfg_scale)
            logits[..., mask_id] = -torch.inf  # the mask is no token, and never proposed
            proposal, confidence = propose(logits, temperature, generator)  # [b, n]

            seen = x.gather(1, columns)
            masked = seen == mask_id
            score = confidence if remasking == "low_confidence" else torch.rand(seen.shape, generator=generator, device=device)
            free = masked & (columns < last)
            write = most_certain(score, free, count) | (free & (confidence > threshold))
            if trajectory:
                guess, of_guess = canvas.clone(), torch.zeros(canvas.shape, device=device)
                guess[live] = x.scatter(1, columns, proposal.where(masked, seen))
                of_guess[live] = of_guess[live].scatter(1, columns, confidence * masked)
                path.append((guess[:, P:], of_guess[:, P:]))
            for kept, new in ((x, proposal), (when, step), (sure, confidence)):
                kept.scatter_(1, columns, torch.where(write, new, kept.gather(1, columns)))
            step += 1
            closed, n = write | ~masked, columns.shape[1] - count
            if threshold < 1:
                n = int((~closed).sum(1).max())
                if parallel.all_done(n == end - last, model):  # the block is full
                    break
            columns = columns.gather(1, closed.byte().argsort(stable=True)[:, :n])
        canvas[live], written_at[live], probability[live] = x, when, sure
        taken[live] = torch.where(done[live], taken[live], step)
    if trajectory:  # steps that were not needed
        path += [(canvas[:, P:], torch.zeros(canvas[:, P:].shape, device=device))] * (steps - len(path))
    stacked = [torch.stack(parts, 1) for parts in zip(*path)]  # none without a trajectory
    return Rollout(prompt, attention_mask, *(part[:, P:] for part in (canvas, written_at, probability)), taken, *stacked)


# ========================================================================================= 4. The likelihood log p(o|q)
# Every estimate hides part of the completion, asks the model for it in one forward pass, and weighs the answers:
#
#     log p(o | q) ≈ sum_v sum_i weight_{v,i} log p(o_i | q, x_v)
#
# They differ only in what each canvas x_v hides and how answers are weighed; a View says just that. The ELBO is a lower bound
# (for a model that writes in random order), noisy by its masks; the one-step estimate is biased, noisy by the prompt's; that
# of the path (`trajectory`) is exact, if all steps are scored, for the order a sample was written in. All are linear in log p.
# A completion ends with its first EOS: what the sampler wrote after it is no part of o and never scored, or a model would be
# paid for its padding. The ELBO and the one-step estimate also hide it, so that the model cannot peek.


class View(NamedTuple):
    """One forward pass of an estimate of log p(o|q)."""

    hidden: Tensor  # bool [B, P+L]: what the model sees as masks
    target: Tensor  # long [B, L]: what is scored, the completion or (wd1++) a guess; shown where it is not hidden
    weight: Tensor  # float [B, L]: how much the log-probability of each token counts


@parallel.as_forward
def token_log_probs(model, prompt, view, attention_mask=None):
    """log p(target_i | q, what the view shows) where the view's weight is not 0, elsewhere 0: float [B, L], with gradient."""
    canvas = torch.cat([prompt, view.target], dim=1).masked_fill(view.hidden, model.config.mask_token_id)
    scored = view.weight != 0  # [B, L]
    positions = torch.arange(prompt.shape[1], canvas.shape[1], device=canvas.device)
    states = hidden_states(model, canvas, attention_mask, positions)  # [B, L, H]
    # log softmax(logits)[target], without holding all logits at a time: LLaDA has 126,464 for each token.
    log_probs = chunked_log_probs(model.get_output_embeddings(), states[scored], view.target[scored])
    return torch.zeros(view.weight.shape, device=canvas.device).masked_scatter(scored, log_probs)


def log_likelihood(model, prompt, views, attention_mask=None):
    """The estimate that `views` make of log p(o|q): float [B], with gradient."""
    return sum((view.weight * token_log_probs(model, prompt, view, attention_mask)).sum(-1) for view in views)


def until_eos(completion, eos_token_id):
    """bool [B, L]: the tokens up to and including the first EOS (an id, or several)."""
    is_eos = torch.isin(completion, torch.tensor(eos_token_id, device=completion.device))
    return is_eos.cumsum(-1) - is_eos.long() == 0  # no EOS strictly before


def shared_rand(rows, columns, group_size, generator, device):
    """Uniform noise [rows, columns], drawn once for each `group_size` consecutive rows."""
    if rows % group_size:
        raise InputError(f"{rows} rows are not whole groups of group_size {group_size}")
    return torch.rand(rows // group_size, columns, generator=generator, device=device).repeat_interleave(group_size, 0)


def elbo(model, prompt, completion, *, mc_samples=1, generator=None, attention_mask=None, **options):
    """Monte Carlo estimate of the evidence lower bound on log p(o|q) (LLaDA, arXiv 2502.09992): float [B], with gradient.

        ELBO = E_{l ~ U{1..L}} E_{|S| = l} [ L/l * log p(S) ]
        log p(S) = sum_{i in S} log p(o_i | q, o without S)

    for S: l of the row's L tokens until its EOS. It is also the mean, over all L! orders, of the chain-rule log-likelihood in
    that order. prompt [B, P], completion [B, L]. Options, none of which changes the mean: stratified (default True) spreads
    the samples' levels l evenly; complementary scores every S together with its complement, so that a pair of samples scores
    each token once (arXiv 2506.20639; mc_samples must be even); group_size G lets G consecutive rows share their draws: wd1's
    weights sum to zero over a group, but little cancels, and its gradient gets noisier (extras/measured.md).
    """
    if options.get("complementary") and mc_samples % 2:
        raise InputError(f"complementary masks come in pairs: mc_samples {mc_samples} must be even")
    views = elbo_views(model.config, prompt, completion, mc_samples=mc_samples, generator=generator, **options)
    return log_likelihood(model, prompt, views, attention_mask)


def elbo_views(
    config, prompt, completion, *, mc_samples=1, stratified=True, complementary=False, group_size=1, generator=None
):
    """The `mc_samples` Views whose estimate is `elbo`."""
    counted = until_eos(completion, config.eos_token_id)
    length = counted.sum(-1, keepdim=True)  # [B, 1], each row's own L
    draws, views = mc_samples // (1 + complementary), []
    rand = lambda columns: shared_rand(len(prompt), columns, group_size, generator, prompt.device)
    for k in range(draws):
        level = (k + rand(1)) / draws if stratified else rand(1)  # [B, 1], uniform between 0 and 1
        size = 1 + (level * length).long().clamp(max=length - 1)  # l ~ U{1..L}
        # The first l tokens in a random order are a uniform subset of size l.
        rank = rand(completion.shape[1]).masked_fill(~counted, 2.0).argsort(-1).argsort(-1)
        subsets = [(rank < size, size)]
        if complementary:  # S and the rest are half of the estimate each; if there is no rest, S counts twice
            rest = length - size
            subsets = [(rank < size, torch.where(rest > 0, size, size / 2)), (rank >= size, rest.clamp(min=1))]
        for subset, divisor in subsets:
            weight = (subset & counted) * length / (divisor * mc_samples)
            views.append(View(F.pad(subset | ~counted, (prompt.shape[1], 0)), completion, weight))
    return views


def one_step_log_likelihood(model, prompt, completion, *, attention_mask=None, **options):
    """The mean-field estimate of d1 (arXiv 2504.12216), which wd1's experiments use: float [B], with gradient.

        log p(o | q) ≈ sum_i log p(o_i | q')

    where q' is q with each token masked with probability prompt_mask_prob, and nothing of o is shown. One forward pass and no
    noise from a completion mask, but biased: tokens are predicted as if independent. Masking some of the prompt makes the mu
    gradient steps on one batch see different inputs. Options: prompt_mask_prob (default 0.15), mc_samples (prompt masks to
    average over), group_size (rows that share them), generator.
    """
    return log_likelihood(model, prompt, one_step_views(model.config, prompt, completion, **options), attention_mask)


def one_step_views(config, prompt, completion, *, mc_samples=1, prompt_mask_prob=0.15, group_size=1, generator=None):
    """The `mc_samples` Views whose estimate is `one_step_log_likelihood`."""
    weight, views = until_eos(completion, config.eos_token_id) / mc_samples, []
    for _ in range(mc_samples):
        noise = shared_rand(*prompt.shape, group_size, generator, prompt.device)
        hidden = F.pad(noise < prompt_mask_prob, (0, completion.shape[1]), value=True)
        views.append(View(hidden, completion, weight))
    return views


def path_views(config, rollout, steps, guesses=False, confidence_factor=True):
    """Views of the sampler's own path: the canvas x_t at each step t in the list `steps`, of those that were taken.

    By default they score the tokens written at t and are scaled up to all steps; with all of them the estimate is the
    log-probability of the tokens in the order they were written (arXiv 2510.04019), but for the mask's share of the softmax:

        sum_t sum_{i written at t} log p(o_i | q, x_t)

    For wd1++ (guesses=True) each view stands alone and scores the sampler's full guess x0_t at all hidden tokens S_t, with
    c_i the model's probability of the token when it was proposed (or 1, without confidence_factor), up to the guess's EOS:

        L/|S_t|^2 * sum_{i in S_t} c_i log p(x0_t[i] | q, x_t)
    """
    views, taken = [], int(rollout.steps.max())
    for step in steps:
        hidden = rollout.written_at >= step
        if guesses:  # L/|S_t| as in the ELBO, but counted past the EOS; the other 1/|S_t| makes a mean
            target, size = rollout.guesses[:, step], hidden.sum(-1, keepdim=True).clamp(min=1)
            weight = hidden * target.shape[1] / size**2 * (rollout.confidence[:, step] if confidence_factor else 1)
        else:
            target, weight = rollout.completion, (rollout.written_at == step) * taken / len(steps)
        views.append(View(F.pad(hidden, (rollout.prompt.shape[1], 0)), target, weight * until_eos(target, config.eos_token_id)))
    return views


# ============================================================================= 5. Advantages, group weights and losses
# The policy that maximises E[A] - lambda KL(pi || pi_old) is pi_old, tilted towards what is better (Z makes it sum to 1):
#
#     pi(o | q) = pi_old(o | q) exp(psi A(o)) / Z
#
# Samples of pi_old stand for pi_old already, so each counts as much as its tilt, and that, made to sum to 1, is the softmax of
# psi A. Fitting the model to pi then means maximising sum_i w+_i log p(o_i | q): no ratio, and no second model. The same
# argument with -A gives the policy to stay away from, and w-. Without w- a group of equally bad completions would be imitated.
# With beta KL(pi || ref) besides, pi_old becomes the mixture pi_old^(1-b) ref^b, b = beta / (lambda + beta): sample from
# that, token by token (`generate`'s reference_weight), and weigh as before. wd1-positive, for comparison, drops w-. wd1++
# learns from what came before the answer as well: all T guesses x0_t of a prompt's G samplings are scored, as one group.


def advantages(rewards):
    """A_i = r_i - mean_j r_j, not divided by the group's standard deviation: [N, G] -> [N, G]."""
    return rewards - rewards.mean(-1, keepdim=True)


def group_weights(rewards, psi=1.0):
    """Each completion's share of the pull up and of the push down: (w_plus, w_minus), constants, both [N, G].

        w+ = softmax(psi A)
        w- = softmax(-psi A)

    Each sums to 1, so their difference sums to 0: it favours nothing in a group whose rewards are equal.
    """
    scaled = psi * advantages(rewards.detach())
    return scaled.softmax(-1), (-scaled).softmax(-1)


def wd1_loss(log_likelihood, w_plus, w_minus):
    """The weighted log-likelihood, averaged over the N groups: all [N, G], returns a scalar.

        loss = - sum_i (w+_i - w-_i) log p(o_i | q)
    """
    return -((w_plus - w_minus) * log_likelihood).sum(-1).mean()


def diffu_grpo_loss(log_probs, old_log_probs, ref_log_probs, advantages, counted, epsilon=0.5, beta=0.04):
    """The baseline, diffu-GRPO (d1, arXiv 2504.12216): a clipped ratio and a KL penalty per token, averaged.

    log_probs, old_log_probs, ref_log_probs: [B, L], one-step estimates under one prompt mask; advantages [B]; counted
    bool [B, L]. Returns the mean over counted tokens of the following, where k3 >= 0 estimates KL(pi || ref):

        loss = -min(ratio A, clip(ratio) A) + beta k3
        k3 = ref/pi - log(ref/pi) - 1
    """
    ratio, advantages = (log_probs - old_log_probs).exp(), advantages[:, None]
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    log_ref_ratio = ref_log_probs - log_probs
    k3 = log_ref_ratio.exp() - log_ref_ratio - 1
    return ((beta * k3 - gain) * counted).sum() / counted.sum()


# ================================================================================================ 6. The training loop
# The rest is plumbing around four lines. For each step:
#
#     o_1, ..., o_G ~ pi_old(o | q)      sample G completions for each of N prompts
#     r_i = reward(o_i)                  score them; their weights follow, and stay as they are
#     theta = theta - eta grad loss      mu times, by AdamW, each with fresh masks; eta is the learning rate
#     pi_old = pi                        and start again, with new samples
#
# mu > 1 makes more of each expensive sample, but drifts from the policy that wrote it. What keeps a run from leaving what it
# knows is a small learning rate and, less so, harder clipping or mu = 1 (README, "What can go wrong").


def set_up(config):
    """What a run needs, checked before anything is written: (model, reference or None, tokenizer, training, held-out set)."""
    task, source = get_task(config.task), config.model
    if config.model == "tiny" and config.task in ("sudoku", "countdown") and not config.dry_run:
        from extras.tiny import demo_base  # the demo's base model: pretrained once, then kept

        source = parallel.in_turn(lambda: demo_base(config))
    files = dict(data=config.data, test_data=config.test_data, seed=config.seed, blanks=config.blanks)
    test_set = task.test(**files)
    test_set = test_set.select(range(min(config.eval_size, len(test_set))))
    train_set = test_set if config.eval_only else task.train(**files)
    dtype = getattr(torch, config.dtype) if config.lora_rank or config.eval_only else torch.float32
    device = "meta" if config.dry_run else "cpu" if config.shard else config.device
    model, tokenizer = load_model(source, device=device, dtype=dtype, seed=config.seed, load_in_4bit=config.load_in_4bit)
    check_prompts(config, encode(tokenizer, train_set[:]["prompt"] + test_set[:]["prompt"]), model.config)
    if config.lora_rank and not config.eval_only and not hasattr(model, "peft_config"):
        from extras.lora import add_adapters

        model = add_adapters(model, config.lora_rank, config.seed, source)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    reference = (model if config.lora_rank else copy.deepcopy(model)) if config.beta and not config.eval_only else None
    networks = dict.fromkeys([model, reference or model])  # each once, in the same order on every rank
    for network in networks if config.shard else ():
        parallel.shard(network, config.device, getattr(torch, config.dtype))
    if not config.dry_run:
        few = encode(tokenizer, test_set[:8]["prompt"]).to(config.device)
        with autocast(config):
            self_check(model, few.input_ids, few.attention_mask, config.model)
        parallel.reshard(model)  # an optimizer that is made next must see the weights divided
    for network in networks if config.compile else ():
        network.get_decoder().compile()
    return model, reference, tokenizer, train_set, test_set


def encode(tokenizer, prompts):
    """The prompts as a user's turns, if the tokenizer has a chat template, in tokens: input_ids, attention_mask [B, P]."""
    layout = dict(padding=True, padding_side="left", return_tensors="pt")
    if not tokenizer.chat_template:
        return tokenizer(list(prompts), **layout)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    with refusing("the tokenizer's chat template cannot be used"):
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, add_special_tokens=False, **layout)  # the template has written those


def sample(model, tokenizer, prompts, config, gen_length, steps, seed=(), **options) -> Rollout:
    """A completion for each prompt, at most `rollout_batch_size` at a time. The options are those of `generate`.

    Each rank does its share; draws depend on `seed` (numbers) and on which prompts are sampled together.
    """
    batch = encode(tokenizer, prompts).to(config.device)
    mask = None if batch.attention_mask.all() else batch.attention_mask
    options |= dict(gen_length=gen_length, steps=steps, block_length=min(config.block_length, gen_length))
    options |= dict(cache=config.cache, threshold=config.threshold)
    share = math.ceil(len(prompts) / parallel.WORLD)
    size = math.ceil(share / math.ceil(share / config.rollout_batch_size))  # parts as equal as can be
    model.eval()

    def part(first):
        rows, draws = slice(first, first + size), np.random.SeedSequence([*seed, first]).generate_state(1, np.uint64)
        generator = torch.Generator(config.device).manual_seed(int(draws[0]))
        padding = None if mask is None else mask[rows]
        rollout = generate(model, batch.input_ids[rows], attention_mask=padding, generator=generator, **options)
        return [None if tensor is None else tensor.cpu() for tensor in vars(rollout).values()]

    parts = zip(*parallel.spread(part, range(0, len(prompts), size)))
    return Rollout(*(None if tensors[0] is None else torch.cat(tensors).to(config.device) for tensors in parts))


def decode(model, tokenizer, tokens):
    """The texts of completions [B, L], each up to its first EOS."""
    kept = until_eos(tokens, model.config.eos_token_id)
    return [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(tokens, kept)]


def collect(model, tokenizer, reference, rows, config, seed):
    """Samples and scores a completion for each of `rows`, B problems, each G times on end: (rollout, texts, rewards, weights).

    rewards [N, G]. weights (w+, w-): each [B, 1]; for wd1++, whose groups are the G T guesses of all steps, [B, T].
    """
    task, stepwise = get_task(config.task), config.objective == "wd1++"
    b = 0.0 if config.objective == "diffu-grpo" else config.beta / (config.lam + config.beta)  # see section 5
    options = dict(temperature=config.temperature, trajectory=stepwise, reference=reference, reference_weight=b)
    prompts = [row["prompt"] for row in rows]
    rollout = sample(model, tokenizer, prompts, config, config.gen_length, config.diffusion_steps, seed, **options)

    def score(tokens, copies):  # tokens [B * copies, L] -> texts, rewards [N, G * copies]
        texts = decode(model, tokenizer, tokens)
        rewards = parallel.spread(lambda i: judge(task.reward, texts[i], rows[i // copies]), range(len(texts)))
        return texts, torch.tensor(rewards, dtype=torch.float, device=config.device).view(-1, config.num_generations * copies)

    texts, rewards = score(rollout.completion, 1)
    judged = score(rollout.guesses.flatten(0, 1), config.diffusion_steps)[1] if stepwise else rewards
    w_plus, w_minus = group_weights(judged, psi=1 / (config.lam + config.beta))
    if config.objective == "wd1-positive":
        w_minus = torch.zeros_like(w_minus)
    return rollout, texts, rewards, (w_plus.view(len(rows), -1), w_minus.view(len(rows), -1))


def draw_views(config, model_config, rollout):
    """The forward passes of one gradient step, with fresh masks: [(column of the weights, View)]."""
    grpo, pair = config.objective == "diffu-grpo", (rollout.prompt, rollout.completion)
    shared = dict(group_size=config.num_generations if config.shared_masks else 1)
    if config.objective == "wd1++":  # a random few of the T terms of the loss, as published not scaled up
        steps = torch.randperm(config.diffusion_steps)[: config.mc_samples].tolist()
        return list(zip(steps, path_views(model_config, rollout, steps, True, config.confidence_factor)))
    if grpo or config.likelihood == "one_step":
        options = dict(mc_samples=1 if grpo else config.mc_samples, prompt_mask_prob=config.prompt_mask_prob, **shared)
        views = one_step_views(model_config, *pair, **options)
    elif config.likelihood == "elbo":
        options = dict(mc_samples=config.mc_samples, complementary=config.complementary, **shared)
        views = elbo_views(model_config, *pair, **options)
    else:
        steps = torch.randperm(int(rollout.steps.max()))[: config.mc_samples].tolist()
        views = path_views(model_config, rollout, steps)
    return [(0, view) for view in views]


def learn(model, reference, optimizer, rollout, rewards, weights, config):
    """The mu gradient steps on a batch. Returns the means of "loss" and "grad_norm" (None if no step could be taken), and how
    many steps were "clipped" or, not being finite, "skipped".

    Every loss is a sum over views and rows, so micro-batches of rows go backward one by one, and rows that the sum multiplies
    by zero (wd1: a group with equal rewards) are left out, but for one if none is left: that changes memory and time, not the
    gradient (but for the draws of LoRA's dropout).
    """
    trained = optimizer.param_groups[0]["params"]
    (w_plus, w_minus), grpo, taken = weights, config.objective == "diffu-grpo", []
    advantage = advantages(rewards).flatten()
    matters = w_plus != w_minus  # [B, columns]; other rows add nothing to the loss
    if grpo:  # its KL term counts in every row
        matters = (advantage != 0)[:, None] | (config.beta > 0)

    def draw_passes():  # of one update: [(column of the weights, View, rows)], the rows in micro-batches
        views, size = draw_views(config, model.config, rollout), config.micro_batch_size
        needed = [matters[:, column] & (view.weight != 0).any(1) for column, view in views]
        return [(*view, rows) for view, mask in zip(views, needed) for rows in parallel.share(mask).split(size)]

    def log_probs(policy, view, rows):  # [b, L]
        padding = None if rollout.attention_mask is None else rollout.attention_mask[rows]
        return token_log_probs(policy, rollout.prompt[rows], View(*(part[rows] for part in view)), padding)

    @torch.no_grad()
    def frozen(policy):  # of every pass, under a policy that stays as it is
        return [[log_probs(policy, view, rows) for _, view, rows in passes] for passes in updates]

    updates = [draw_passes() for _ in range(config.num_iterations)]
    old = ref = frozen(model) if grpo else None  # without beta any ref will do
    if grpo and reference:
        with as_reference(reference):
            ref = frozen(reference)
    model.train()
    for update, passes in enumerate(updates):
        optimizer.zero_grad()
        total = torch.zeros((), device=config.device)
        for i, (column, view, rows) in enumerate(passes):
            parallel.last_pass(model, i + 1 == len(passes))
            log_p = log_probs(model, view, rows)  # [b, L]
            if grpo:
                counted = view.weight.bool()
                terms = log_p, old[update][i], ref[update][i], advantage[rows], counted[rows]
                loss = diffu_grpo_loss(*terms, config.epsilon, config.beta) * counted[rows].sum() / counted.sum()
            else:
                log_p = (view.weight[rows] * log_p).sum(-1)  # [b], this view's part of log p(o|q)
                # wd1_loss is linear in log p: these rows pass as one group, divided by the N it would average over.
                loss = wd1_loss(log_p[None], w_plus[None, rows, column], w_minus[None, rows, column]) / len(rewards)
            loss.backward()
            total += loss.detach()
        total = parallel.sum_gradients(model, total, trained)
        norm = parallel.whole(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)).item()
        if math.isfinite(total) and math.isfinite(norm):  # a step along anything else would ruin the weights
            optimizer.step()
            taken.append((total, norm))
    loss, norm = map(fmean, zip(*taken)) if taken else (None, None)
    clipped = sum(norm > config.max_grad_norm for _, norm in taken)
    return {"loss": loss, "grad_norm": norm, "clipped": clipped, "skipped": len(updates) - len(taken)}


def train(config):
    """Evaluates, trains, evaluates again and saves, all in `output_dir`. Returns the summary, as in summary.json.

    On Ctrl-C or SIGTERM it finishes the sampling or the update that it is at, leaves a checkpoint and raises SystemExit
    (torchrun by default waits only 30 s for that: raise its --shutdown-timeout). Killed at any moment, it goes on, with
    `resume`, as if it had never stopped.
    """
    check(config)
    parallel.start(config.device)
    run = RunDirectory(config)
    model, reference, tokenizer, train_set, test_set = set_up(config)
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), config.learning_rate, (0.9, 0.99), weight_decay=config.weight_decay)
    schedule = transformers.get_scheduler(config.lr_scheduler, optimizer, config.warmup_steps, config.max_steps + 1)
    state = {"before": None, "after": None, "seconds": 0.0}
    state |= dict.fromkeys(["steps", "forward_passes", "skipped_updates", "failed_in_a_row"], 0)
    state["problems"] = zlib.crc32(json.dumps([train_set[:], test_set[:]]).encode())
    state = run.restore(state, parameters, optimizer)
    passes = collections.Counter(forward=state["forward_passes"])
    for network in {model, reference or model}:
        network.get_decoder().register_forward_pre_hook(lambda *_: passes.update(["forward"]))
    run.start(state["steps"])
    started = time.time() - state["seconds"]
    with autocast(config), run.catching_signals():
        if state["before"] is None:
            state["before"] = state["after"] = evaluate_model(model, tokenizer, test_set, config)
            run.record(0, {"eval": state["before"]})
            show(model, tokenizer, test_set[0], config, "before")
            state["forward_passes"] = passes["forward"]
        numbers = range(state["steps"], config.max_steps)
        bar = tqdm(numbers, config.objective, config.max_steps, initial=state["steps"], disable=parallel.RANK > 0)
        for step in bar:
            run.stop_if_asked(state, parameters, optimizer)
            begin = time.time()
            seed = np.random.SeedSequence([config.seed, step]).generate_state(1)[0]  # draws depend on the step's number alone
            transformers.set_seed(int(seed))
            problems = [train_set[i] for i in problems_of(step, config, len(train_set))]
            rows = [problem for problem in problems for _ in range(config.num_generations)]
            rollout, texts, rewards, weights = collect(model, tokenizer, reference, rows, config, (config.seed, step))
            run.stop_if_asked(state, parameters, optimizer)  # the samples are lost, and the same will be drawn again
            timings = {"tokens_per_second": rollout.completion.numel() / (time.time() - begin)}
            learning_rate = config.learning_rate * schedule.lr_lambdas[0](step + 1)
            optimizer.param_groups[0]["lr"] = learning_rate  # from the step's number: no scheduler's state to save
            metrics = describe(config, model.config, rollout, texts, rewards, weights[0], rows)
            metrics["learning_rate"] = learning_rate
            metrics |= learn(model, reference, optimizer, rollout, rewards, weights, config)
            state["failed_in_a_row"] = state["failed_in_a_row"] + 1 if metrics["loss"] is None else 0
            if state["failed_in_a_row"] == 3:
                hint = "start again with a lower --learning_rate"
                raise FloatingPointError(f"no finite loss and gradient in 3 steps, stopped at step {step + 1}: {hint}")
            done = step + 1 == config.max_steps
            if done or (config.eval_every and (step + 1) % config.eval_every == 0):
                metrics["eval"] = state["after"] = evaluate_model(model, tokenizer, test_set, config)
            state.update(steps=step + 1, seconds=time.time() - started, forward_passes=passes["forward"])
            state["skipped_updates"] += metrics["skipped"]
            metrics["forward_passes"], timings["seconds"] = state["forward_passes"], state["seconds"]
            run.record(step + 1, metrics, timings, rows[0]["prompt"], zip(texts, rewards[0].tolist()))  # of the first group
            bar.set_postfix(run.progress(metrics, timings, state["after"]))
            if done or (step + 1) % config.save_every == 0:
                run.save(state, parameters, optimizer)
        show(model, tokenizer, test_set[0], config, "after")
        run.finish(model, tokenizer, state)
    return state


# ==================================================================================================== 7. Evaluation
# On problems kept from training, at temperature 0, as a user would ask. The reward of samples may rise while this falls.


def evaluate_model(model, tokenizer, test_set, config):
    """{"accuracy", "reward" (at the length nearest to gen_length), "lengths": {L: {"accuracy", "reward"}}, "problems"}."""
    task, lengths = get_task(config.task), {}
    for length in config.eval_lengths:
        rollout = sample(model, tokenizer, test_set["prompt"], config, length, eval_steps(length))
        answers = list(zip(decode(model, tokenizer, rollout.completion), test_set))
        judged = parallel.spread(lambda answer: (bool(judge(task.correct, *answer)), judge(task.reward, *answer)), answers)
        correct, reward = zip(*judged)
        lengths[str(length)] = {"accuracy": fmean(correct), "reward": fmean(reward)}
    nearest = min(config.eval_lengths, key=lambda length: abs(length - config.gen_length))
    return {**lengths[str(nearest)], "lengths": lengths, "problems": len(test_set)}


def evaluate(config):
    """Evaluates a model on the held-out problems; trains and writes nothing. Returns what evaluate_model returns."""
    config.eval_only = True
    check(config)
    parallel.start(config.device)
    model, _, tokenizer, _, test_set = set_up(config)
    with autocast(config):
        return evaluate_model(model, tokenizer, test_set, config)


# ============================================================================================== 8. The command line


def main(argv=None):
    """Runs the program; returns its exit code: 0, 1 for a run that could not go on, 2 for input that cannot be used."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries, not for the user
    quiet()
    try:
        config = parse_arguments(Config, PRESETS, argv, __doc__.splitlines()[0])
        if config.dry_run:
            from extras.plan import plan

            print(json.dumps(plan(config), indent=2))
        elif config.eval_only:
            print(json.dumps(evaluate(config), indent=2))
        else:
            summary = train(config)
            for when in ("before", "after"):
                print(f"{when:>6}: accuracy {summary[when]['accuracy']:.1%}, reward {summary[when]['reward']:.3f}")
            print(f"{config.output_dir}/curve.png shows how it went; {config.output_dir}/model is the trained model")
        return 0
    except (KeyboardInterrupt, InputError, FloatingPointError, OSError, RuntimeError) as error:
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
