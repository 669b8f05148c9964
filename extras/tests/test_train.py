"""The extended program, as a user runs it: python -m extras.train."""

import re
from functools import partial
from unittest.mock import Mock

import pytest

import rewards
from extras import train
from extras.tests.program import HERE, cases, even_characters, metrics, run

WAYS = """\
--likelihood elbo --mc_samples 2 --complementary --shared_masks -> 2
--likelihood trajectory --mc_samples 3 -> 3
--beta 1 -> 1
--beta 1 --lora_rank 2 --cfg_scale 0.5 -> 1
--objective wd1-positive --remasking random -> 1
--objective wd1++ --mc_samples 2 --tempered --temperature 0.5 -> 2
--objective wd1++ --mc_samples 2 --cache dual --confidence_factor false -> 2
--objective diffu-grpo -> 3
--objective diffu-grpo --beta 0 -> 2
--objective diffu-grpo --lora_rank 2 --cache prefix --shared_masks -> 3
--shared_masks --gradient_checkpointing --dtype bfloat16 -> 1
"""  # a run, and its forward passes per gradient step, beyond sampling
BAD = """\
--objective ppo -> --objective 'ppo'
--threshold 0 -> --threshold '0'
--threshold 1.5 -> --threshold '1.5'
--epsilon 1.5 -> --epsilon '1.5'
--likelihood trajectory --mc_samples 5 -> only --diffusion_steps 4
--objective wd1++ --mc_samples 5 -> only --diffusion_steps 4
--likelihood elbo --mc_samples 3 --complementary -> --mc_samples 3 is odd
--likelihood one_step --complementary -> is for --likelihood elbo
--objective diffu-grpo --likelihood trajectory -> --likelihood trajectory
--objective wd1++ --shared_masks -> --shared_masks
--cache dual --beta 0.5 -> --beta mixes two
--shard -> start them with torchrun
"""


@pytest.fixture(autouse=True)
def rewarded(monkeypatch):
    monkeypatch.setattr(rewards.Sudoku, "reward", even_characters)


@cases(WAYS)
def test_every_objective_runs_resumes_and_costs_its_forward_passes(tmp_path, words, expected):
    go = partial(run, tmp_path, main=train.main, num_iterations=1, eval_every=0)
    common = "--likelihood one_step --mc_samples 1 "
    code, directory = go((common + words).split())
    first, second = metrics(directory)[1:]
    assert code == 0 and first["skipped"] == second["skipped"] == 0
    guided = 1 + ("cfg_scale" in words)
    mixed = 1 + ("--beta 1" in words)
    sampled = 4 * guided * mixed  # a step, in one batch; and 4 for the problems of the evaluation
    assert first["forward_passes"] == 4 * guided + sampled + int(expected)
    assert go((common + words).split(), max_steps=3, resume=True)[0] == 0
    assert len(metrics(directory)) == 4


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


@cases(BAD)
def test_bad_input_gets_one_sentence_and_leaves_nothing(tmp_path, capsys, words, expected):
    code, directory = run(tmp_path, words.split(), main=train.main)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("wd1: ") and expected in error
    assert not directory.exists()


def test_presets_of_the_objectives_give_way_to_the_tiny_models_and_to_the_user():
    config = train.MoreConfig
    assert config(model="x/y", objective="wd1++", temperature=0.4).temperature == 0.4
    assert config(model="runs/tiny-x/model", objective="wd1++").gen_length == 19


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
