"""Other estimates and objectives, each against its equations written out."""

import itertools
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewards
import wd1
from extras import train
from extras.methods import objectives, views
from extras.sampling.choices import threshold
from extras.tests.program import FAST, HERE, even_characters
from test_wd1 import EOS_CASES, exact_elbo, prompts, schedules, seeded, shared, small_model

MODEL = small_model()

# -------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("draws, group_size", [(1, 1), (2, 1), (2, 4)])
@pytest.mark.parametrize("case", EOS_CASES)
def test_complementary_masks_leave_the_elbo_unbiased(case, draws, group_size):
    """And lower its variance where nothing is cut off, at as many forward passes."""
    completion, counted = EOS_CASES[case]
    prompt = torch.tensor([[3, 8]]).expand(8000, 2)
    batch = torch.tensor([completion]).expand(8000, 4)
    noise = shared(8000, group_size, seeded(0))
    draw = partial(wd1.elbo_views, MODEL.config, prompt, batch, uniform=noise)
    drawn = views.complementary(draw(mc_samples=draws))
    for one, other in zip(drawn[::2], drawn[1::2]):  # a pair scores each token once
        scored = (one.weight != 0).long() + (other.weight != 0)
        assert (scored[:, :counted] == 1).all() and (scored[:, counted:] == 0).all()
        assert one.hidden[:, 2 + counted :].all() and other.hidden[:, 2 + counted :].all()
    with torch.no_grad():
        exact = exact_elbo(MODEL, [3, 8], completion, counted)
        paired, independent = (
            wd1.log_likelihood(MODEL, prompt, each).double().view(-1, group_size).mean(1)
            for each in (drawn, [view for _ in range(2 * draws) for view in draw()])
        )
    error = paired.std() / len(paired) ** 0.5
    assert abs(paired.mean() - exact) < 4 * error + 1e-4 and error < 0.1
    assert paired.var() < (independent / (2 * draws)).var() or case != "no eos"


@pytest.mark.parametrize("case", ["elbo", "one_step", "diffu-GRPO"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_group_shares_its_masks_if_asked_to_and_every_step_draws_new_ones(case, shared):
    model, config, batch, _ = make_batch(case, shared_masks=shared, prompt_mask_prob=0.5)
    batch.rollout.completion[:] = 5  # no EOS: all are of one length
    draw = lambda: views.draw_views(config, model.config, batch)[0]
    if case == "diffu-GRPO":
        draw = lambda: objectives.draw_ratios(model, config, batch)
    hidden = torch.stack([draw().hidden for _ in range(8)])
    assert len(hidden.flatten(1).unique(dim=0)) == 8
    hidden = hidden.unflatten(1, (4, 3))  # [draws, N, G, P+L]
    alike = (hidden == hidden[:, :, :1]).all(-1).all(-1)  # [draws, N]
    assert alike.all() if shared else alike.float().mean() < 0.5


# -------------------------------------------------------------------------------- the guesses


@given(schedules(), st.sampled_from([0.0, 1.0]), st.sampled_from([0.3, 1.0]), st.integers(0, 99))
def test_guesses_keep_what_is_written_and_are_what_is_written_next(
    schedule, temperature, probability, seed
):
    options = dict(choose=threshold(probability), temperature=temperature, **schedule)
    sample = lambda generate: generate(
        MODEL, prompts(rows=3, seed=seed), generator=seeded(seed), **options
    )
    rollout = sample(partial(objectives.generate_guesses, wd1.generate))
    if temperature == 0:
        assert torch.equal(rollout.completion, sample(wd1.generate).completion)
    final = rollout.completion[:, None].expand_as(rollout.guess)
    steps = torch.arange(schedule["steps"])[:, None]
    known, just = rollout.written_at[:, None] < steps, rollout.written_at[:, None] == steps
    assert (rollout.guess != 1).all(), "the mask was proposed"
    assert torch.equal(rollout.guess[known | just], final[known | just])
    assert (rollout.confidence[known] == 0).all() and (rollout.confidence[just] > 0).all()
    probability = rollout.probability[:, None].expand_as(final)
    torch.testing.assert_close(rollout.confidence[just], probability[just])


def test_all_guesses_are_decoded_and_rewarded_in_one_group_of_a_prompt():
    model, _, batch, _ = make_batch("wd1++")
    _, tokenizer = wd1.load_model(FAST["model"])
    made = batch.guesses
    assert len(batch.texts) == 12 and made.texts[3::4] == batch.texts, "the last step's"
    assert made.texts == wd1.decode(model, tokenizer, made.rollout.completion)
    scores = [reward(None, *pair) for pair in zip(made.texts, made.problems)]
    assert torch.equal(made.rewards, torch.tensor(scores).view(4, 12))
    guess, sure = (x.view(12, 4, 8) for x in (made.rollout.completion, made.rollout.probability))
    for step in range(4):
        known, just = batch.rollout.written_at <= step, batch.rollout.written_at == step
        assert torch.equal(guess[:, step][known], batch.rollout.completion[known])
        torch.testing.assert_close(sure[:, step][just], batch.rollout.probability[just])


# -------------------------------------------------------------------------------- diffu-GRPO


@given(st.integers(0, 99), st.floats(0.1, 0.9), st.floats(0, 0.5))
def test_diffu_grpo_by_a_second_derivation(seed, epsilon, beta):
    new, old, ref, noise = torch.randn(4, 3, 5, generator=seeded(seed), dtype=torch.float64)
    A, weight = noise[:, 0], noise.clamp(min=0)
    view = objectives.RatioView(None, None, weight, old, ref)
    total = 0.0
    for i, j in itertools.product(range(3), range(5)):
        ratio, d = math.exp(new[i, j] - old[i, j]), ref[i, j] - new[i, j]
        gain = min(ratio * A[i], min(max(ratio, 1 - epsilon), 1 + epsilon) * A[i])
        total += weight[i, j] * (beta * (math.exp(d) - d - 1) - gain)
    loss = objectives.diffu_grpo_loss(view, new, A, epsilon, beta)
    assert loss.item() == pytest.approx(total.item(), rel=1e-6, abs=1e-9)


# -------------------------------------------------------------------- numbers that can be trusted

CASES = {
    "wd1, path": dict(likelihood="trajectory", mc_samples=3),
    "wd1-positive": dict(objective="wd1-positive"),
    "wd1++": dict(objective="wd1++", mc_samples=2),
    "wd1++ without the factor": dict(objective="wd1++", mc_samples=2, confidence_factor=False),
    "wd1++, tempered": dict(objective="wd1++", mc_samples=2, tempered=True, temperature=0.7),
    "diffu-GRPO": dict(objective="diffu-grpo", beta=0.1),
}
SETTINGS = dict(
    FAST, model=str(FAST["model"]), eval_lengths=[8], num_generations=3, batch_size=12, beta=0.0,
    likelihood="one_step", mc_samples=1, num_iterations=1, prompt_mask_prob=0.0, temperature=1.0,
    micro_batch_size=64, max_grad_norm=1e9,
)  # fmt: skip


def reward(task, text, problem):
    """The longest prompt, the last, is not rewarded at all."""
    return (4 - len(problem["prompt"])) * even_characters(task, text, problem)


def make_batch(case, **changes):
    """(model, config, Batch, learn) as the program makes them: four groups of three, the last of
    equal rewards, whose prompts are of 1 to 4 tokens, padded on the left."""
    config = train.MoreConfig(**SETTINGS | CASES.get(case, dict(likelihood=case)) | changes)
    model, reference = small_model(), small_model(seed=1)
    _, tokenizer = wd1.load_model(config.model)
    problems = [{"prompt": prompt} for prompt in ("(", "')", "$&%", "!)'#") for _ in range(3)]
    parts = train.parts(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.Sudoku, "reward", reward)
        given = model, reference, tokenizer, problems, config, (0,), parts["generate"]
        return model, config, parts["collect"](*given), parts["learn"]


def loop_gradient(case, **changes):
    """The loss, the gradient (flat) and the rows that were run, of the first update."""
    model, config, batch, learn = make_batch(case, **changes)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = []
    model.model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    torch.manual_seed(3)
    with wd1.autocast(config):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        figures = learn(model, optimizer, batch, config)
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    return figures["loss"], gradient, sum(rows)


def formula(case):
    """The same by the equations of the papers. Of the program's own are the samples, the guesses
    and their scores, and which steps are drawn."""
    model, config, batch, _ = make_batch(case)
    rollout, likelihood = batch.rollout, config.likelihood
    torch.manual_seed(3)
    steps, all_hidden = torch.randperm(4)[: config.mc_samples].tolist(), torch.full((8,), True)
    scored = getattr(batch, "guesses", batch).rewards
    A = scored - scored.mean(1, keepdim=True)
    w_minus = 0 if config.objective == "wd1-positive" else (-A).softmax(1)
    gap, total = (A.softmax(1) - w_minus).flatten(), 0.0

    def end(tokens):
        return tokens.tolist().index(0) + 1 if 0 in tokens else 8

    def log_p(model, row, hidden, tokens):  # [L]; `hidden` [L]: of the completion. No padding here
        prompt = rollout.prompt[row][rollout.attention_mask[row].bool()]
        canvas = torch.cat([prompt, tokens.masked_fill(hidden, 1)])
        logits = wd1.predict_logits(model, canvas[None])[0, -8:]
        logits = logits / config.temperature if config.tempered else logits
        return logits.log_softmax(-1)[torch.arange(8), tokens]

    for row, (tokens, when) in enumerate(zip(rollout.completion, rollout.written_at)):
        counted = torch.arange(8) < end(tokens)
        if config.objective == "wd1++":
            for t in steps:
                guess, S = batch.guesses.rollout.completion[row * 4 + t], when >= t
                terms = log_p(model, row, S, guess)
                if config.confidence_factor:
                    terms = terms * batch.guesses.rollout.probability[row * 4 + t]
                terms = terms[S & (torch.arange(8) < end(guess))]
                total += gap[row * 4 + t] * 8 / S.sum() * terms.sum() / S.sum()
        elif config.objective == "diffu-grpo":  # the policy is the old one yet: its ratio is 1
            new, ref = (log_p(m, row, all_hidden, tokens) for m in (model, batch.reference))
            against = (ref.detach() - new).exp()
            gain = (new - new.detach()).exp() * A.flatten()[row]
            gain = gain - config.beta * (against - against.log() - 1)
            group = rollout.completion[row // 3 * 3 :][:3]
            total += gain[counted].sum() / sum(end(other) for other in group)
        elif likelihood == "trajectory":
            for t in steps:
                terms = log_p(model, row, when >= t, tokens)
                total += gap[row] * terms[counted & (when == t)].sum() * 4 / len(steps)
        else:
            total += gap[row] * log_p(model, row, all_hidden, tokens)[counted].sum()
    loss = -total / 4
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([part.flatten() for part in gradient])


WAYS = {  # what must not change the numbers -> a bound on the relative difference
    "one row at a time": (dict(micro_batch_size=1), 1e-4),
    "micro-batches of four": (dict(micro_batch_size=4), 1e-4),
    "activations recomputed": (dict(gradient_checkpointing=True), 1e-4),
    "bfloat16": (dict(dtype="bfloat16"), 0.1),
}
TAUGHT = {"wd1, path": 3 * 9} | {case: 2 * 9 for case in CASES if "++" in case}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradient_are_the_same_in_every_way_to_compute_them(case, two_ranks):
    """And of wd1 and wd1++ the rows of the last group, and wd1++'s of other steps, are not run."""
    loss, gradient, rows = loop_gradient(case)
    assert gradient.norm() > 1e-3 and 0 < rows <= TAUGHT.get(case, 3 * 12)
    others = {way: (loop_gradient(case, **how), bound) for way, (how, bound) in WAYS.items()}
    others |= {"the formula": (formula(case), 1e-4), "two ranks": (two_ranks[case], 1e-4)}
    for way, (other, bound) in others.items():
        assert (other[1] - gradient).norm() < bound * gradient.norm(), way
        assert other[0] == pytest.approx(loss, rel=bound, abs=bound * 0.2), way


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The losses and gradients of all cases by two processes, which run this file's last lines."""
    found = tmp_path_factory.mktemp("ranks") / "found.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "extras.tests.test_methods", found]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(found)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    found = {case: loop_gradient(case, micro_batch_size=2)[:2] for case in CASES}
    if wd1.RANK == 0:
        torch.save(found, sys.argv[1])
