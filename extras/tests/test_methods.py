"""Other estimates and objectives, each against its equations written out."""

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import wd1
from extras import train
from extras.methods import objectives, views
from extras.sampling.choices import threshold
from extras.tests.program import FAST, HERE
from test_wd1 import EOS_CASES, exact_elbo, log_prob, prompts, schedules, seeded, small_model

MODEL = small_model()
REWARDS = torch.tensor([[1.0, 0.0, 0.5], [0.2, 0.9, 0.1], [0.0, 0.3, 0.3], [0.5, 0.5, 0.5]])
guess = partial(objectives.generate_guesses, wd1.generate)

# -------------------------------------------------------------------------------- estimates


@given(schedules(), st.integers(0, 99))
def test_the_trajectory_estimate_is_the_probability_of_the_path(schedule, seed):
    """Replayed step by step: each token's probability on the canvas that it was written on."""
    prompt = prompts(rows=1, seed=seed)
    options = dict(temperature=1.0, generator=seeded(seed), **schedule)
    rollout = wd1.generate(MODEL, prompt, **options)
    [completion], [written_at] = rollout.completion.tolist(), rollout.written_at.tolist()
    counted = completion.index(0) + 1 if 0 in completion else len(completion)
    taken = 1 + max(when for when in written_at if when < schedule["steps"])
    want = 0.0
    for i, when in enumerate(written_at[:counted]):
        shown = {j for j, other in enumerate(written_at) if other < when}
        want += log_prob(MODEL, prompt[0].tolist(), completion, shown, i, len(completion))
    estimate = lambda steps: wd1.log_likelihood(
        MODEL, prompt, views.path_views(MODEL.config, rollout, taken, steps)
    ).item()
    assert estimate(range(taken)) == pytest.approx(want, abs=1e-3)
    one = [estimate([step]) for step in range(taken)]
    assert sum(one) / taken == pytest.approx(want, abs=1e-3), "a random one is unbiased"


@pytest.mark.parametrize("draws, group_size", [(1, 1), (2, 1), (2, 4)])
@pytest.mark.parametrize("case", EOS_CASES)
def test_complementary_masks_leave_the_elbo_unbiased(case, draws, group_size):
    completion, counted = EOS_CASES[case]
    prompt = torch.tensor([[3, 8]]).expand(8000, 2)
    batch = torch.tensor([completion]).expand(8000, 4)
    torch.manual_seed(0)
    noise = views.shared_noise(8000, group_size, "cpu")
    drawn = wd1.elbo_views(MODEL.config, prompt, batch, mc_samples=draws, uniform=noise)
    drawn = views.complementary(drawn)
    for one, other in zip(drawn[::2], drawn[1::2]):  # a pair scores each token once
        scored = (one.weight != 0).long() + (other.weight != 0)
        assert (scored[:, :counted] == 1).all() and (scored[:, counted:] == 0).all()
        assert one.hidden[:, 2 + counted :].all() and other.hidden[:, 2 + counted :].all()
    with torch.no_grad():
        exact = exact_elbo(MODEL, [3, 8], completion, counted)
        values = wd1.log_likelihood(MODEL, prompt, drawn).double().view(-1, group_size).mean(1)
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - exact) < 4 * error + 1e-4 and error < 0.1


def test_complementary_masks_reduce_the_variance():
    """At as many forward passes; the figures for the tiny models are in extras/measure."""
    prompt = torch.tensor([[3, 8]]).expand(4000, 2)
    completion = torch.tensor([[5, 2, 9, 3, 11, 4]]).expand(4000, 6)
    draw = partial(wd1.elbo_views, MODEL.config, prompt, completion, generator=seeded(0))
    independent = [view._replace(weight=view.weight / 4) for _ in range(4) for view in draw()]
    with torch.no_grad():
        plain, paired = (
            wd1.log_likelihood(MODEL, prompt, drawn).var()
            for drawn in (independent, views.complementary(draw(mc_samples=2)))
        )
    assert paired < plain


@pytest.mark.parametrize("case", ["elbo", "one_step", "diffu-GRPO"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_group_shares_its_masks_if_asked_to_and_every_step_draws_new_ones(case, shared):
    changes = dict(shared_masks=shared, prompt_mask_prob=0.5)
    model, config, batch, _ = make_batch(case, **changes)
    batch.rollout.completion[:] = 5  # no EOS: all are of one length
    hidden = []
    for _ in range(8):
        if case == "diffu-GRPO":
            hidden.append(objectives.draw_ratios(model, config, batch).hidden)
        else:
            hidden.append(views.draw_views(config, model.config, batch)[0].hidden)
    hidden = torch.stack(hidden).view(-1, 4, 3, 13)  # [draws, N, G, P+L]
    assert len(hidden.flatten(1).unique(dim=0)) == len(hidden)
    alike = (hidden == hidden[:, :, :1]).all(-1).all(-1)  # [draws, N]
    assert alike.all() if shared else alike.float().mean() < 0.5


# -------------------------------------------------------------------------------- the guesses


@given(schedules(), st.sampled_from([0.0, 1.0]), st.sampled_from([0.3, 1.0]), st.integers(0, 99))
def test_guesses_keep_what_is_written_and_are_what_is_written_next(
    schedule, temperature, probability, seed
):
    options = dict(choose=threshold(probability), temperature=temperature, **schedule)
    rollout = guess(MODEL, prompts(rows=3, seed=seed), generator=seeded(seed), **options)
    if temperature == 0:
        plain = wd1.generate(MODEL, prompts(rows=3, seed=seed), **options)
        assert torch.equal(rollout.completion, plain.completion)
    final = rollout.completion[:, None].expand_as(rollout.guess)
    steps = torch.arange(schedule["steps"])[:, None]
    known, just = rollout.written_at[:, None] < steps, rollout.written_at[:, None] == steps
    assert (rollout.guess != 1).all(), "the mask was proposed"
    assert torch.equal(rollout.guess[known | just], final[known | just])
    assert (rollout.confidence[known] == 0).all() and (rollout.confidence[just] > 0).all()
    probability = rollout.probability[:, None].expand_as(final)
    torch.testing.assert_close(rollout.confidence[just], probability[just])


def test_all_guesses_are_decoded_and_rewarded_in_one_group_of_a_prompt(monkeypatch):
    model, tokenizer = wd1.load_model(HERE / "tiny_config.json")
    config = train.MoreConfig(**FAST_CONFIG, objective="wd1++")
    problems = [problem for problem in [{"prompt": "1203"}, {"prompt": "40"}] for _ in range(3)]
    reward = lambda task, text, problem: len(text) * len(problem["prompt"])
    monkeypatch.setattr(type(wd1.get_task("sudoku")), "reward", reward)
    made = objectives.collect_guesses(guess, model, None, tokenizer, problems, config, (0,), None)
    rewards = torch.zeros(6, 4)
    assert len(made.texts) == 6 and made.guesses.texts[3::4] == made.texts, "the last step's"
    for row, step in itertools.product(range(6), range(4)):
        tokens = made.guesses.rollout.completion[row * 4 + step]
        known = made.rollout.written_at[row] <= step
        assert torch.equal(tokens[known], made.rollout.completion[row][known])
        [text] = wd1.decode(model, tokenizer, tokens[None])
        rewards[row, step] = reward(None, text, problems[row])
    assert torch.equal(made.guesses.rewards, rewards.view(2, 12)) and made.rewards.shape == (2, 3)
    for w, sign in ((made.guesses.w_plus, 1), (made.guesses.w_minus, -1)):
        want = (sign * (rewards.view(2, 12) - rewards.view(2, 12).mean(1, keepdim=True))).softmax(1)
        torch.testing.assert_close(w, want.flatten())


# -------------------------------------------------------------------------------- diffu-GRPO


@given(st.integers(0, 99), st.floats(0.1, 0.9), st.floats(0, 0.5))
def test_diffu_grpo_by_a_second_derivation(seed, epsilon, beta):
    new, old, ref = torch.randn(3, 3, 5, generator=seeded(seed), dtype=torch.float64)
    new.requires_grad_(True)
    noise = torch.rand(3, 5, generator=seeded(seed), dtype=torch.float64)
    A, weight = noise[:, 0] - noise[:, 1], noise * (noise < 0.7)
    loss = partial(objectives.diffu_grpo_loss, advantages=A, epsilon=epsilon, beta=beta)
    view = objectives.RatioView(None, None, weight, old, ref)
    total = 0.0
    for i, j in itertools.product(range(3), range(5)):
        ratio, d = math.exp((new[i, j] - old[i, j]).item()), (ref[i, j] - new[i, j]).item()
        gain = min(ratio * A[i], min(max(ratio, 1 - epsilon), 1 + epsilon) * A[i])
        total += weight[i, j] * (beta * (math.exp(d) - d - 1) - gain)
    assert loss(view, new).item() == pytest.approx(total.item(), rel=1e-6, abs=1e-9)
    # On-policy, without a reference term, its gradient is the policy gradient.
    same = view._replace(old=new.detach(), reference=new.detach())
    [gradient] = torch.autograd.grad(loss(same, new), new)
    torch.testing.assert_close(gradient, -A[:, None] * weight)


# -------------------------------------------------------------------- numbers that can be trusted

CASES = {
    "wd1, path": dict(likelihood="trajectory", mc_samples=4),
    "wd1-positive": dict(objective="wd1-positive"),
    "wd1++": dict(objective="wd1++", mc_samples=2),
    "wd1++ without the factor": dict(objective="wd1++", mc_samples=2, confidence_factor=False),
    "diffu-GRPO": dict(objective="diffu-grpo", beta=0.1),
}
FAST_CONFIG = dict(
    FAST, model=str(FAST["model"]), eval_lengths=[8], num_generations=3, batch_size=12, beta=0.0,
    likelihood="one_step", mc_samples=1, num_iterations=1, prompt_mask_prob=0.0, block_length=8,
    micro_batch_size=12, max_grad_norm=1e9,
)  # fmt: skip


def make_batch(case, **changes):
    """(model, config, Batch, learn): four groups of three, the last of equal rewards; the second
    row ends at its fourth token."""
    own = CASES.get(case, dict(likelihood=case))
    config = train.MoreConfig(**{**FAST_CONFIG, **own, **changes})
    prompt = prompts(rows=4, length=5).repeat_interleave(3, 0)
    options = dict(gen_length=8, steps=4, block_length=8, temperature=1.0, generator=seeded(0))
    rollout = guess(MODEL, prompt, **options)
    rollout.completion[1, 3] = 0
    weights = [w.flatten() for w in wd1.group_weights(REWARDS)]
    if config.objective == "wd1-positive":
        weights[1] = torch.zeros(12)
    batch = wd1.Batch([{}] * 12, rollout, ["a"] * 12, REWARDS, *weights)
    if config.objective == "wd1++":
        many = rollout.map(lambda tensor: tensor.repeat_interleave(4, 0))
        rows = [many.prompt, None, rollout.guess.flatten(0, 1), many.written_at]
        rows = wd1.Rollout(*rows, rollout.confidence.flatten(0, 1))
        scores = torch.rand(4, 12, generator=seeded(2)) * torch.tensor([[1.0], [1.0], [1.0], [0.0]])
        weights = (w.flatten() for w in wd1.group_weights(scores))
        guesses = wd1.Batch([], rows, [], scores, *weights)
        batch = objectives.GuessBatch(**vars(batch), guesses=guesses)
    if config.objective == "diffu-grpo":
        batch = objectives.RatioBatch(**vars(batch), reference=small_model(seed=1))
    return small_model(), config, batch, train.parts(config)["learn"]


def padded(batch):
    """Three tokens of padding on the left of every prompt."""
    prompt = F.pad(batch.rollout.prompt, (3, 0))
    mask = F.pad(torch.ones(len(prompt), 5), (3, 0))
    rollout = dataclasses.replace(batch.rollout, prompt=prompt, attention_mask=mask)
    more = {"guesses": padded(batch.guesses)} if hasattr(batch, "guesses") else {}
    return dataclasses.replace(batch, rollout=rollout, **more)


def loop_gradient(case, change=lambda batch: batch, **changes):
    """The loss, the gradient (flat) and the numbers of rows of each pass, of the first update."""
    model, config, batch, learn = make_batch(case, **changes)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    passes = []
    model.model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    torch.manual_seed(3)
    with wd1.autocast(config):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        figures = learn(model, optimizer, change(batch), config)
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    return figures["loss"], gradient, passes


def end(tokens):
    return tokens.tolist().index(0) + 1 if 0 in tokens else 8


def log_p(model, prompt, hidden, tokens):
    """[L]: the log-probabilities of `tokens`, where `hidden` [L] hides them."""
    canvas = torch.cat([prompt, tokens.masked_fill(hidden, 1)])
    logits = wd1.predict_logits(model, canvas[None])[0, 5:]
    return logits.log_softmax(-1)[torch.arange(8), tokens]


# By the equations of the papers. Of the program's own they take samples, guesses and their steps.
def grpo_formula(model, config, batch):
    rollout, A = batch.rollout, REWARDS - REWARDS.mean(1, keepdim=True)
    total = 0.0
    for group, member in itertools.product(range(4), range(3)):
        prompt, tokens = (part[group * 3 + member] for part in (rollout.prompt, rollout.completion))
        all_hidden = torch.ones(8, dtype=torch.bool)
        new, ref = (log_p(p, prompt, all_hidden, tokens) for p in (model, batch.reference))
        ratio, against = (new - new.detach()).exp(), (ref.detach() - new).exp()
        clipped = ratio.clamp(1 - config.epsilon, 1 + config.epsilon)
        gain = torch.min(ratio * A[group, member], clipped * A[group, member])
        gain = gain - config.beta * (against - against.log() - 1)
        size = sum(end(rollout.completion[group * 3 + other]) for other in range(3))
        total = total - gain[: end(tokens)].sum() / size / 4
    return total


def guesses_formula(model, config, batch):
    rollout, scores = batch.rollout, batch.guesses.rewards
    A = scores - scores.mean(1, keepdim=True)
    gap, loss = (A.softmax(1) - (-A).softmax(1)).view(12, 4), 0.0
    for row, t in itertools.product(range(12), torch.randperm(4)[:2].tolist()):
        tokens, S = rollout.guess[row, t], rollout.written_at[row] >= t
        terms = log_p(model, rollout.prompt[row], S, tokens)
        if config.confidence_factor:
            terms = terms * rollout.confidence[row, t]
        terms = terms[: end(tokens)][S[: end(tokens)]]
        loss = loss - gap[row, t] * 8 / S.sum() * terms.sum() / S.sum() / 4
    return loss


def wd1_formula(model, config, batch):
    rollout, A = batch.rollout, REWARDS - REWARDS.mean(1, keepdim=True)
    gap = A.softmax(1) - (0 if config.objective == "wd1-positive" else (-A).softmax(1))
    loss, along_path = 0.0, config.likelihood == "trajectory"  # else one step
    for row in range(12):
        tokens, when = rollout.completion[row], rollout.written_at[row]
        counted, estimate = torch.arange(8) < end(tokens), 0.0
        for t in range(4) if along_path else [0]:
            scored = counted & (when == t) if along_path else counted
            terms = log_p(model, rollout.prompt[row], when >= t, tokens)
            estimate = estimate + terms[scored].sum()
        loss = loss - gap.flatten()[row] * estimate / 4
    return loss


FORMULAS = {"wd1++": guesses_formula, "diffu-grpo": grpo_formula}


WAYS = {  # what must not change the numbers -> a bound on the relative difference
    "padded on the left": (dict(change=padded), 1e-4),
    "one row at a time": (dict(micro_batch_size=1), 1e-4),
    "micro-batches of four": (dict(micro_batch_size=4), 1e-4),
    "activations recomputed": (dict(gradient_checkpointing=True), 1e-4),
    "bfloat16": (dict(dtype="bfloat16"), 0.1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradient_are_the_same_in_every_way_to_compute_them(case, two_ranks):
    loss, gradient, _ = loop_gradient(case)
    assert gradient.norm() > 1e-3
    others = {way: (loop_gradient(case, **how), bound) for way, (how, bound) in WAYS.items()}
    model, config, batch, _ = make_batch(case)
    torch.manual_seed(3)
    value = FORMULAS.get(config.objective, wd1_formula)(model, config, batch)
    parts = torch.autograd.grad(value, list(model.parameters()))
    others["the formula"] = (value.item(), torch.cat([part.flatten() for part in parts])), 1e-4
    others["two ranks"] = two_ranks[case], 1e-4
    for way, (other, bound) in others.items():
        assert (other[1] - gradient).norm() < bound * gradient.norm(), way
        assert other[0] == pytest.approx(loss, rel=bound, abs=bound * 0.2), way


RANKS = """
import torch, wd1
from extras.tests import test_methods
torch.distributed.init_process_group("gloo")
gradient = test_methods.loop_gradient
found = {case: gradient(case, micro_batch_size=2)[:2] for case in test_methods.CASES}
if wd1.RANK == 0:
    torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The losses and gradients of all cases in a run of two processes."""
    directory = tmp_path_factory.mktemp("ranks")
    (directory / "worker.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    options = dict(cwd=directory, env=environment, capture_output=True, text=True)
    done = subprocess.run([*command, "worker.py"], **options)
    assert done.returncode == 0, done.stderr
    return torch.load(directory / "found.pt")


@pytest.mark.parametrize("case, rows", [("wd1, path", 9), ("wd1++", 18), ("wd1-positive", 12)])
def test_rows_that_teach_nothing_are_left_out_of_the_update(case, rows):
    """Those of the last group, but for wd1-positive; of wd1++ also those of other steps."""
    _, _, passes = loop_gradient(case)
    assert 0 < max(passes) <= rows
