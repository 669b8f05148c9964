"""The extended program, as a user runs it: python -m extras.train."""

import re
from unittest.mock import Mock

import pytest

import rewards
from extras import train
from extras.tests.program import HERE, even_characters, metrics, run

WAYS = [  # settings of a run, and its forward passes per gradient step, beyond sampling
    (dict(likelihood="elbo", mc_samples=2, complementary=True, shared_masks=True), 2),
    (dict(likelihood="trajectory", mc_samples=3), 3),
    (dict(beta=1.0), 1),
    (dict(beta=1.0, lora_rank=2, cfg_scale=0.5), 1),
    (dict(objective="wd1-positive", remasking="random"), 1),
    (dict(objective="wd1++", mc_samples=2, tempered=True, temperature=0.5), 2),
    (dict(objective="wd1++", mc_samples=2, cache="dual", confidence_factor="false"), 2),
    (dict(objective="diffu-grpo"), 3),
    (dict(objective="diffu-grpo", beta=0.0), 2),
    (dict(objective="diffu-grpo", lora_rank=2, cache="prefix", shared_masks=True), 3),
    (dict(shared_masks=True, gradient_checkpointing=True, dtype="bfloat16"), 1),
]


@pytest.fixture(autouse=True)
def rewarded(monkeypatch):
    monkeypatch.setattr(rewards.Sudoku, "reward", even_characters)


@pytest.mark.parametrize("options, passes", WAYS, ids=str)
def test_every_objective_runs_resumes_and_costs_its_forward_passes(tmp_path, options, passes):
    options = dict(likelihood="one_step", mc_samples=1, num_iterations=1, eval_every=0) | options
    code, directory = run(tmp_path, **options, main=train.main)
    first, second = metrics(directory)[1:]
    assert code == 0 and first["skipped"] == second["skipped"] == 0 and first["loss"] is not None
    guided = 2 if options.get("cfg_scale") else 1
    mixed = 2 if options.get("beta") and "objective" not in options else 1
    sampled = 4 * guided * mixed  # a step, in one batch; and 4 for the problems of the evaluation
    assert first["forward_passes"] == 4 * guided + sampled + passes
    resumed = dict(options, max_steps=3, resume=True)
    assert run(tmp_path, **resumed, main=train.main)[0] == 0 and len(metrics(directory)) == 4


def test_wd1_is_the_same_program(tmp_path):
    plain = run(tmp_path, out="plain")[1]
    more = run(tmp_path, out="more", main=train.main)[1]
    assert metrics(plain) == metrics(more)


@pytest.mark.parametrize("objective", ["wd1++", "diffu-grpo"])
def test_a_run_learns_what_is_rewarded(tmp_path, objective):
    options = dict(batch_size=32, num_generations=8, micro_batch_size=32, rollout_batch_size=32)
    options |= dict(max_steps=15, eval_every=0, temperature=1.0, learning_rate=3e-3, beta=0.0)
    options |= dict(objective=objective, mc_samples=1, main=train.main)
    values = [line["reward"] for line in metrics(run(tmp_path, **options)[1])[1:]]
    assert sum(values[-3:]) / 3 > sum(values[:3]) / 3 + 0.1


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(objective="ppo"), "--objective: invalid choice: 'ppo'"),
        (dict(threshold=0.0), "--threshold 0.0"),
        (dict(threshold=1.5), "--threshold 1.5"),
        (dict(epsilon=1.5), "--epsilon 1.5"),
        (dict(likelihood="trajectory", mc_samples=5), "only --diffusion_steps 4"),
        (dict(objective="wd1++", mc_samples=5), "only --diffusion_steps 4"),
        (dict(likelihood="elbo", mc_samples=3, complementary=True), "--mc_samples 3 is odd"),
        (dict(likelihood="one_step", complementary=True), "is for --likelihood elbo"),
        (dict(objective="diffu-grpo", likelihood="trajectory"), "--likelihood trajectory"),
        (dict(objective="wd1++", shared_masks=True), "--shared_masks"),
        (dict(cache="dual", beta=0.5), "--beta mixes two"),
        (dict(shard=True), "start them with torchrun"),
    ],
    ids=str,
)
def test_bad_input_gets_one_sentence_and_leaves_nothing(tmp_path, capsys, options, expected):
    code, directory = run(tmp_path, main=train.main, **options)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("wd1: ") and expected in error
    assert not directory.exists()


def test_presets_of_the_objectives_give_way_to_the_tiny_models_and_to_the_user():
    config = train.MoreConfig
    assert config(model="x/y", objective="wd1++").gen_length == 512
    assert config(model="x/y", objective="wd1++", temperature=0.4).temperature == 0.4
    assert config(model="runs/tiny-x/model", objective="wd1++").gen_length == 19
    assert config(model="tiny", objective="diffu-grpo").beta == 0.04
    assert config(objective="diffu-grpo", beta=0.0).beta == 0 == config().beta


def test_evaluation_samples_as_asked(tmp_path, monkeypatch, capsys):
    asked = dict(cache="dual", threshold=0.4, cfg_scale=0.5, remasking="random")
    used = []
    for name in ("CachedPolicy", "threshold", "guided", "random"):
        used.append(Mock(wraps=getattr(train, name)))
        monkeypatch.setattr(train, name, used[-1])
    code, directory = run(tmp_path, main=train.main, eval_only=True, **asked)
    assert code == 0 and all(way.called for way in used)
    assert '"accuracy"' in capsys.readouterr().out and not directory.exists()


def test_the_table_of_defaults_says_what_they_are():
    page = (HERE / "extras/methods/defaults.md").read_text()
    for section, objective in zip(page.split("\n## ")[1:], ("wd1", "wd1++", "diffu-grpo")):
        config = train.MoreConfig(model="x/y", task="countdown", objective=objective)
        rows = re.findall(r"(?m)^\| `(\w+)` \| .*? \| (.*?) \|", section)
        assert len(rows) >= 3
        for name, ours in rows:
            assert str(getattr(config, name)).lower() == ours.replace("e-6", "e-06")
