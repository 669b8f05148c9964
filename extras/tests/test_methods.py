"""Other estimates and objectives, each against its equations written out."""

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close

import rewards
import wd1
from extras import train
from extras.methods import objectives, views
from extras.sampling.choices import threshold
from extras.tests.program import even_characters
from test_wd1 import (
    FAST,
    HERE,
    MODEL,
    PLACES,
    PROMPT,
    agrees,
    end,
    exact_elbo,
    learned,
    log_probs,
    per_case,
    prompts,
    schedules,
    seeded,
    small_model,
)  # fmt: skip

# -------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("draws, group_size", [(1, 1), (2, 1), (2, 4)])
@per_case
def test_complementary_masks_leave_the_elbo_unbiased(completion, draws, group_size):
    """And lower its variance where nothing is cut off, at as many forward passes."""
    prompt, rows = (row.expand(8000, -1) for row in (PROMPT, completion))
    grouped = SimpleNamespace(shared_masks=True, num_generations=group_size)
    noise = views.shared_noise(grouped, SimpleNamespace(prompt=prompt))
    torch.manual_seed(0)
    draw = partial(wd1.elbo_views, MODEL.config, prompt, rows, uniform=noise)
    drawn, counted = views.complementary(draw(mc_samples=draws)), PLACES < end(completion)
    for one, other in zip(drawn[::2], drawn[1::2]):  # a pair scores each token once
        assert (((one.weight != 0).long() + (other.weight != 0)) == counted).all()
        assert (one.hidden & other.hidden)[:, 2:][:, ~counted].all()
    with torch.no_grad():
        paired, independent = (
            wd1.log_likelihood(MODEL, prompt, each).double().view(-1, group_size).mean(1)
            for each in (drawn, [view for _ in range(2 * draws) for view in draw()])
        )
    error = paired.std() / len(paired) ** 0.5
    assert abs(paired.mean() - exact_elbo(completion)) < 4 * error + 1e-4 and error < 0.1
    assert paired.var() < (independent / (2 * draws)).var() or 0 in completion


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
    options |= dict(model=MODEL, prompt=prompts(rows=3, seed=seed))
    rollout = objectives.generate_guesses(wd1.generate, generator=seeded(seed), **options)
    if temperature == 0:
        assert torch.equal(rollout.completion, wd1.generate(**options).completion)
    final, sure = (
        each[:, None].expand_as(rollout.guess) for each in (rollout.completion, rollout.probability)
    )
    ahead = rollout.written_at[:, None] - torch.arange(schedule["steps"])[:, None]
    assert (rollout.guess != 1).all(), "the mask was proposed"
    assert torch.equal(rollout.guess[ahead <= 0], final[ahead <= 0])
    assert (rollout.confidence[ahead < 0] == 0).all()
    assert_close(rollout.confidence[ahead == 0], sure[ahead == 0])


def test_all_guesses_are_decoded_and_rewarded_in_one_group_of_a_prompt():
    model, _, batch, _ = make_batch("wd1++")
    _, tokenizer = wd1.load_model("tiny")
    made, last = batch.guesses, batch.rollout.written_at == 3
    assert len(batch.texts) == 12 and made.texts[3::4] == batch.texts, "the last step's"
    assert made.texts == wd1.decode(model, tokenizer, made.rollout.completion)
    scores = [reward(None, *pair) for pair in zip(made.texts, made.problems)]
    assert torch.equal(made.rewards, torch.tensor(scores).view(4, 12))
    assert_close(made.rollout.probability[3::4][last], batch.rollout.probability[last])


# -------------------------------------------------------------------------------- diffu-GRPO


@given(st.integers(0, 99), st.floats(0.1, 0.9), st.floats(0, 0.5))
def test_diffu_grpo_by_a_second_derivation(seed, epsilon, beta):
    """What is good is not pushed up further than 1 + epsilon, what is bad not further down."""
    new, old, ref, noise = torch.randn(4, 3, 5, generator=seeded(seed), dtype=torch.float64)
    A, weight, ratio, d = noise[:, :1], noise.clamp(min=0), (new - old).exp(), ref - new
    gain = A * ratio.clamp(max=1 + epsilon).where(A > 0, ratio.clamp(min=1 - epsilon))
    want = (weight * (beta * (d.exp() - d - 1) - gain)).sum()
    view = objectives.RatioView(None, None, weight, old, ref)
    assert_close(objectives.diffu_grpo_loss(view, new, A[:, 0], epsilon, beta), want)


# -------------------------------------------------------------------- numbers that can be trusted

CASES = {
    "wd1, path": dict(likelihood="trajectory", mc_samples=3),
    "wd1-positive": dict(objective="wd1-positive"),
    "wd1-uneven": dict(objective="wd1-uneven"),
    "wd1-centred": dict(objective="wd1-centred"),
    "wd1++": dict(objective="wd1++", mc_samples=2),
    "wd1++ without the factor": dict(objective="wd1++", mc_samples=2, confidence_factor=False),
    "wd1++, tempered": dict(objective="wd1++", mc_samples=2, tempered=True, temperature=0.7),
    "diffu-GRPO": dict(objective="diffu-grpo", beta=0.1),
}
SETTINGS = FAST | dict(
    block_length=4, batch_size=12, beta=0.0, likelihood="one_step", mc_samples=1,
    prompt_mask_prob=0.0, temperature=1.0, micro_batch_size=64, rollout_batch_size=4,
)  # fmt: skip


def reward(task, text, problem):
    """The longest prompt, the last, is not rewarded at all."""
    return (4 - len(problem["prompt"])) * even_characters(task, text, problem)


def make_batch(case, **changes):
    """(model, config, Batch, learn) as the program makes them: four groups of three, the last of
    equal rewards, whose prompts are of 1 to 4 tokens, padded on the left."""
    config = train.MoreConfig(**SETTINGS | CASES.get(case, dict(likelihood=case)) | changes)
    model, reference = small_model(), small_model(seed=1)
    _, tokenizer = wd1.load_model("tiny")
    problems = [{"prompt": prompt} for prompt in ("(", "')", "$&%", "!)'#") for _ in range(3)]
    parts = train.parts(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.Sudoku, "reward", reward)
        given = model, reference, tokenizer, problems, config, (0,), parts["generate"]
        batch = parts["collect"](*given)
    torch.manual_seed(3)
    return model, config, batch, parts["learn"]


def formula(case):
    """The loss and its gradient by the equations of the papers. Of the program's own are the
    samples, the guesses and their scores, and which steps are drawn."""
    model, config, batch, _ = make_batch(case)
    made, rollout, total = getattr(batch, "guesses", batch), batch.rollout, 0.0
    A = made.rewards - made.rewards.mean(1, keepdim=True)
    w_minus = {"positive": 0, "uneven": 0, "centred": 1 / 3}
    w_minus = w_minus.get(config.objective.removeprefix("wd1-"), (-A).softmax(1))
    gap, places = (A.softmax(1) - w_minus).flatten(), torch.arange(8)
    if config.objective == "wd1-uneven":
        gap[-3:] = 0  # the last group's rewards are equal
    steps = torch.randperm(4)[: config.mc_samples].tolist()
    for row, (prompt, real, completion, when, _) in enumerate(zip(*rollout)):
        counted, prompt = places < end(completion), prompt[real == 1]
        if config.objective == "wd1++":
            for t, n in ((t, row * 4 + t) for t in steps):
                guess, S = made.rollout.completion[n], when >= t
                temperature = config.temperature if config.tempered else 1.0
                terms = log_probs(model, prompt, guess, S, temperature)
                if config.confidence_factor:
                    terms = terms * made.rollout.probability[n]
                terms = terms[S & (places < end(guess))]
                total += gap[n] * 8 / S.sum() * terms.sum() / S.sum()
        elif config.objective == "diffu-grpo":  # the policy is the old one yet: its ratio is 1
            policies = model, batch.reference
            new, ref = (log_probs(each, prompt, completion, places >= 0) for each in policies)
            d = ref.detach() - new
            gain = (new - new.detach()).exp() * A.flatten()[row] - config.beta * (d.exp() - d - 1)
            group = rollout.completion[row // 3 * 3 :][:3]
            total += gain[counted].sum() / sum(map(end, group))
        elif config.likelihood == "trajectory":
            for t in steps:
                terms = log_probs(model, prompt, completion, when >= t)
                total += gap[row] * terms[counted & (when == t)].sum() * 4 / len(steps)
        else:
            terms = log_probs(model, prompt, completion, places >= 0)
            total += gap[row] * terms[counted].sum()
    gradient = torch.autograd.grad(-total / 4, [*model.parameters()])
    return -total.item() / 4, parameters_to_vector(gradient)


TAUGHT = {"wd1, path": 3 * 9} | {case: 2 * 9 for case in CASES if "++" in case}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradient_are_the_same_in_every_way_to_compute_them(case, two_ranks):
    """And of wd1 and wd1++ the rows of the last group, and wd1++'s of other steps, are not run."""
    want, (model, *batch), rows = formula(case), make_batch(case), []
    model.model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    agrees(learned(model, *batch), want, "at once")
    assert want[1].norm() > 1e-3 and 0 < sum(rows) <= TAUGHT.get(case, 3 * 12)
    agrees(two_ranks[case], want, "two ranks")
    for way in dict(micro_batch_size=1), dict(gradient_checkpointing=True), dict(dtype="bfloat16"):
        agrees(learned(*make_batch(case, **way)), want, way)


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
    found = {case: learned(*make_batch(case, micro_batch_size=2)) for case in CASES}
    if wd1.RANK == 0:
        torch.save(found, sys.argv[1])
