"""When to worry: advice, the mask token, trackers."""

import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch

import wd1
from extras import train
from extras.tests import program
from extras.watch import health

STEP, STEADY = np.arange(60), np.random.default_rng(0).normal(0.5, 0.05, 60)
FADES = 0.05 ** (STEP > 40)
CASES = [  # what is said; the rewards; what else is not as in a good run
    ("the reward has fallen from 0.5", STEADY - 0.4 * (STEP > 40), {}),
    ("", -STEP[:19], {}),  # too early to tell
    ("", abs(STEP % 16 - 8), {}),  # slow swings are not a fall
    ("no group had unequal rewards", 0 * STEP, dict(degenerate_groups=1)),
    ("the entropy has collapsed", STEADY, dict(entropy=FADES)),
    ("", STEADY, dict(degenerate_groups=1, entropy=FADES, accuracy=0.9)),  # all is learned
]


@pytest.mark.parametrize("said, reward, others", CASES)
def test_a_run_that_goes_wrong_is_warned_of_once(said, reward, others, tmp_path, capsys):
    columns = dict(reward=reward, accuracy=0.3, entropy=1.0, degenerate_groups=0.5) | others
    lines = pd.DataFrame(columns).to_json(orient="records", lines=True)
    (tmp_path / "metrics.jsonl").write_text('{"eval": {}}\n' + lines)
    run = SimpleNamespace(path=tmp_path)
    for step in (60, 61):
        health.warn(run, dict(step=step))
    error = capsys.readouterr().err
    assert said in error and error.count("warning") == bool(said)


def test_the_mask_token_is_one(capsys):
    """A model that was trained to unmask from a token restores what that hides, not what others do."""
    health.main(["--model", "tiny"])
    assert "was it trained to unmask" in capsys.readouterr().out
    model, _ = wd1.load_model("tiny")
    torch.manual_seed(0)
    prompt, text = torch.arange(20, 42).repeat(16, 1).split([6, 16], 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        (-wd1.elbo(model, prompt, text).mean() / 16).backward()
        optimizer.step()
    assert health.mask_check(model, prompt) > 2
    model.config.mask_token_id = 120  # which it never saw
    assert health.mask_check(model, prompt) < 2


@pytest.mark.parametrize("package", ["torch.utils.tensorboard", "wandb"])
def test_a_tracker_gets_what_metrics_jsonl_has_and_ends_nothing(package, tmp_path, capsys, monkeypatch):
    sent, kind = {}, package.split(".")[-1]

    def log(numbers, step):
        if step > 1:
            raise OSError("no network")
        sent[step] = sent.get(step, {}) | numbers

    fake = mock.MagicMock(log=log)
    fake.SummaryWriter().add_scalar = lambda name, number, step: log({name: number}, step)
    for installed in (None, fake):
        monkeypatch.setitem(sys.modules, package, installed)
        code, directory = program.run(tmp_path, main=train.main, track=kind, max_steps=3)
        assert code == (0 if installed else 2)
    _, first, *_ = program.metrics(directory)
    assert "eval/accuracy" in sent[0] and "entropy" in sent[1] and first | sent[1] == first
    error = capsys.readouterr().err
    assert f"pip install {kind}" in error and error.count("has stopped: no network") == 1
