"""When to worry: advice, the mask token, trackers."""

import json
import types

import pytest
import torch

import wd1
from extras import train
from extras.tests import program
from extras.watch import track
from extras.watch.health import advice, mask_check, warn
from rewards import InputError
from test_wd1 import seeded


def history(rewards, entropies=None, accuracy=0.3, degenerate=0.5):
    fixed = {"accuracy": accuracy, "degenerate_groups": degenerate}
    entropies = entropies or [1.0] * len(rewards)
    return [{"eval": {}}, *({"reward": r, "entropy": e, **fixed} for r, e in zip(rewards, entropies))]


def test_advice_is_given_when_a_run_goes_wrong_and_only_then():
    noise = torch.randn(200, generator=seeded(0)).tolist()
    steady = [0.5 + 0.05 * x for x in noise[:60]]
    assert advice(history(steady)) is None and advice(history(steady[:15])) is None
    assert advice(history([i / 60 + 0.05 * x for i, x in enumerate(noise[:60])])) is None  # it learns
    fallen = steady[:40] + [0.1 + 0.02 * x for x in noise[60:80]]
    assert "the reward has fallen" in advice(history(fallen))
    assert "no group had unequal rewards" in advice(history([0.0] * 30, degenerate=1))
    assert advice(history([1.0] * 30, degenerate=1, accuracy=1.0)) is None  # all is learned
    entropies = [1.0] * 20 + [0.05] * 10
    assert "the entropy has collapsed" in advice(history(steady[:30], entropies))
    assert advice(history(steady[:30], entropies, accuracy=0.9)) is None
    wild = [(i % 2) + 0.1 * x for i, x in enumerate(noise)]
    assert advice(history(wild)) is None  # noise is not a fall


def test_a_warning_is_printed_once_and_kept(tmp_path, capsys):
    lines = history([0.9] * 20 + [0.1] * 20)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = types.SimpleNamespace(path=tmp_path)
    for step in (40, 41):
        warn(run, {"step": step})
    assert capsys.readouterr().err.count("the reward has fallen") == 1


def test_the_mask_token_is_one(capsys):
    """A model that was trained to unmask from a token restores what that hides, not what others do."""
    model, _ = wd1.load_model("tiny")
    text = torch.tensor([7, 9, 4, 4, 8, 6, 5, 5, 9, 3, 3, 7, 8, 6, 4, 9]).repeat(16, 1)
    prompt = torch.randint(10, 100, (16, 6), generator=seeded(0))
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        (-wd1.elbo(model, prompt, text).mean() / 16).backward()
        optimizer.step()
    gains = []
    for model.config.mask_token_id in (1, 120):  # its own, and a token it never saw
        gains.append(mask_check(model, prompt))
    assert gains[0] > 2 > gains[1]
    assert capsys.readouterr().err.count("was it trained to unmask") == 1


def test_a_tracker_gets_what_metrics_jsonl_has(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    code, directory = program.run(tmp_path, main=train.main, track="tensorboard", eval_every=1)
    events = reader.EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    lines = program.metrics(directory)
    assert code == 0
    for name in ("reward", "entropy"):
        values = [(event.step, event.value) for event in events.Scalars(name)]
        want = [(line["step"], line[name]) for line in lines if name in line]
        assert [step for step, _ in values] == [step for step, _ in want]
        assert [value for _, value in values] == pytest.approx([value for _, value in want])
    assert len(events.Scalars("eval/accuracy")) == 3


def test_a_tracker_that_fails_or_is_missing_is_said_and_ends_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(track, "start", lambda *_: 1 / 0)
    with pytest.raises(InputError, match="pip install nosuchtracker"):
        track.tracker(types.SimpleNamespace(track="nosuchtracker"))
    code, _ = program.run(tmp_path, main=train.main, track="tensorboard")
    assert code in (0, 2)  # 2: the package is not here
    assert code == 2 or "has stopped" in capsys.readouterr().err
