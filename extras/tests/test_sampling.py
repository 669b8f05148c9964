"""Caches, thresholds, random remasking and guidance, each against what it should equal."""

from functools import partial
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import wd1
from extras.methods.objectives import generate_guesses
from extras.sampling.cache import CachedPolicy
from extras.sampling.choices import guided, random, threshold
from extras.train import MoreConfig, sampler
from rewards import InputError
from test_wd1 import (
    MODEL,
    plain_forward,
    plain_generate,
    prompts,
    schedules,
    seeded,
    until_block_end,
    write_checkpoint,
)  # fmt: skip


@given(schedules(), st.integers(0, 9), st.sampled_from([0.2, 0.5, 0.9]))
def test_a_threshold_writes_all_that_pass_it(schedule, seed, probability):
    prompt = prompts(rows=3, seed=seed)
    rollout = wd1.generate(MODEL, prompt, **schedule, choose=threshold(probability))
    plain = [plain_generate(MODEL, row[None], **schedule, threshold=probability) for row in prompt]
    want = [until_block_end(row, schedule["block_length"]) for row in plain]
    assert rollout.completion.tolist() == want


@given(st.lists(st.booleans(), min_size=6, max_size=8), st.integers(1, 3), st.integers(0, 99))
def test_random_remasking_writes_as_many_tokens_each_equally_often(masked, count, seed):
    masked, count = torch.tensor(masked).expand(2000, -1), min(count, sum(masked))
    draw = lambda: random(seeded(seed))(masked.float(), masked, count)
    written = draw()
    assert torch.equal(written, draw()), "a seed fixes everything"
    assert (written.sum(1) == count).all() and not (written & ~masked).any()
    often = written[:, masked[0]].float().mean(0)  # within five standard errors:
    assert ((often - count / max(len(often), 1)).abs() < 0.06).all()


@torch.no_grad()
def test_guidance_changes_the_logits_as_the_formula_says():
    canvas = prompts(rows=20, length=6)
    blind = F.pad(canvas[:, 4:], (4, 0), value=1)
    c, u = (wd1.predict_logits(MODEL, each) for each in (canvas, blind))
    assert_close(guided(1.5, 4)(MODEL, canvas), u + 2.5 * (c - u))


class Renewed(CachedPolicy):
    def __call__(self, *inputs):
        self.kept = None
        return super().__call__(*inputs)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("options", [{}, dict(temperature=1.0), dict(choose=threshold(0.5))])
@pytest.mark.parametrize("generate", [wd1.generate, partial(generate_guesses, wd1.generate)])
def test_caches_renewed_at_every_step_change_nothing(monkeypatch, kind, shift, options, generate):
    """Two, each with its canvas, that of guidance having no prompt."""
    monkeypatch.setattr(MODEL.config, "logit_shift", shift)
    padded, mask = F.pad(prompts(rows=3), (2, 0)), F.pad(torch.ones(3, 4), (2, 0))
    mask[1, :4] = 0
    options = dict(gen_length=6, steps=4, block_length=3, attention_mask=mask, **options)
    want, found = (
        generate(MODEL, padded, generator=seeded(0), policy=guided(1.0, 6, *policies), **options)
        for policies in ([], [Renewed(kind), Renewed(kind)])
    )
    for name in {"completion", "written_at", "guess"} & set(want._fields):
        assert torch.equal(getattr(want, name), getattr(found, name))


@pytest.mark.parametrize("family", ["llada", "Dream", "a2d-qwen3"])
@pytest.mark.parametrize("kind, window", [("dual", (5, 7)), ("prefix", (5, 9)), ("dual", (2, 4))])
def test_cached_keys_and_values_are_those_of_the_earlier_canvas(tmp_path, family, kind, window):
    """Against plain attention, in which the columns outside the window keep the keys and values
    that they had when the window held other tokens."""
    directory, config, tensors = write_checkpoint(tmp_path / "model", family)
    model, _ = wd1.load_model(directory)
    before, after = torch.randint(0, 256, (2, 3, 9), generator=seeded(0))
    fresh = torch.isin(torch.arange(9), torch.arange(*window))
    after = after.where(fresh, before)
    real = torch.ones(3, 9)
    real[1, :2] = real[2, :1] = 0  # the mask may be narrower than the canvas
    policy, memory, shift = CachedPolicy(kind), {}, int(model.config.logit_shift)
    positions = torch.arange(window[0] + shift, window[1])
    for canvas, *kept in (
        (before, memory),
        (after, memory, fresh), (after, memory, fresh), (before, memory, fresh),  # it stays
        (before.roll(1, 0),),  # other rows: all is computed again
    ):  # fmt: skip
        want = plain_forward(config, tensors, canvas, real, *kept)[:, positions - shift]
        found = policy(model, canvas, real[:, :5], positions)
        assert_close(found, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "ways", [dict(cache="prefix"), dict(cache="dual"), dict(cache="dual", threshold=0.4)], ids=str
)
def test_a_cache_never_leaks_between_prompts(ways):
    prompt, generate = prompts(rows=60), sampler(MoreConfig(**ways))
    options = dict(gen_length=16, steps=8, block_length=8)
    together = generate(MODEL, prompt, **options).completion
    for row in (2, 0, 1, 3, 0):
        alone = generate(MODEL, prompt[row : row + 1], **options).completion
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(together, wd1.generate(MODEL, prompt, **options).completion)


@given(st.integers(1, 5), st.sampled_from([0.0, 1.0]), st.sampled_from(["none", "dual"]))
def test_a_row_does_not_depend_on_its_padding(padding, temperature, cache):
    generate = sampler(MoreConfig(cfg_scale=0.5, cache=cache, remasking="random"))
    options = dict(gen_length=6, steps=3, block_length=3, temperature=temperature)
    pad = partial(F.pad, pad=(padding, 0))
    plain, shifted = (
        generate(MODEL, prompt, attention_mask=mask, generator=seeded(0), **options).completion
        for prompt, mask in ((prompts(), None), (pad(prompts()), pad(torch.ones(2, 4))))
    )
    assert torch.equal(plain, shifted)


@pytest.mark.parametrize("policy", [wd1.predict_logits, CachedPolicy("dual")])
def test_without_padding_there_is_no_attention_mask(monkeypatch, policy):
    attention = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    wd1.generate(MODEL, prompts(), gen_length=8, steps=4, block_length=4, policy=policy)
    assert {call.kwargs["attn_mask"] for call in attention.call_args_list} == {None}


def test_an_unknown_cache_is_refused():
    with pytest.raises(InputError, match="cache 'all': must be prefix or dual"):
        CachedPolicy("all")
