"""The demo's bases: made once, kept, and of problems that can be solved and are rarely answered as asked."""

from functools import partial
from statistics import fmean

import numpy as np
import pytest
import torch

import wd1
from extras.demo import __main__ as demo
from extras.demo import base
from rewards import InputError, get_task

REVERSE = "extras/tasks/reverse.py:Reverse"


def test_pretraining_goes_on_from_its_checkpoint_with_few_answers_as_asked(tmp_path, monkeypatch):
    encode, seen = wd1.encode, []
    spy = lambda tokenizer, texts: seen.extend(texts) or encode(tokenizer, texts)
    monkeypatch.setattr(wd1, "encode", spy)
    draw = lambda era: [("prompt", "asked", "other", 0.3)]
    job = "", draw, 0, 12, tmp_path / "checkpoint"
    whole, resumed = (base.pretrain(*job)[0].state_dict() for _ in range(2))
    assert len(seen) == 256 * (12 + 2)  # the second began where the first left it, after step 10
    assert 0.25 < seen.count("asked<|eos|>") / seen.count("prompt") < 0.35
    torch.testing.assert_close(whole, resumed, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sudoku", "countdown", REVERSE, "extras/tasks/sort.py:Sort"])
def test_the_other_form_is_as_long_and_wrong_and_test_problems_stay_out(name):
    task = base.Sums() if name == "countdown" else get_task(name)
    tested, right, shares = set(task.test()["prompt"]), [], []
    for problem, (prompt, asked, other, share) in zip(task.train(), base.completions(name, task)):
        assert prompt not in tested and len(asked) == len(other)
        right.append(task.correct(other, problem))
        shares.append(share)
    assert fmean(right) < 0.05  # some read the same either way
    assert 0.35 < fmean(shares) < 0.55 and 0 < min(shares) <= max(shares) < 1  # both are learned


def test_a_base_is_made_once_and_what_cannot_work_is_said_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "tiny_base", partial(base.tiny_base, steps=2))
    options = dict(task=REVERSE, output_dir=f"{tmp_path}/run", max_steps=1, eval_size=8)
    run = lambda job, **more: job(wd1.Config(**options, **more))
    run(demo.train)
    before, _, after = capsys.readouterr().out.partition("after: ")
    problem = before.partition("before: ")[2].splitlines()[0]
    assert problem and after.startswith(problem) and "wrong, reward" in before
    monkeypatch.setattr(base, "tqdm", None)  # from here on no other base can be made
    run(demo.evaluate)
    with pytest.raises(InputError, match="holds another run"):
        run(demo.train, seed=1)
    with monkeypatch.context() as changed, pytest.raises(InputError, match="cannot be written"):
        changed.setenv("XDG_CACHE_HOME", f"{tmp_path}/run/config.json")
        run(demo.evaluate)
    for name, value, sentence in [  # each on top of the others
        ("answer", None, "needs its answer"),
        ("answer", lambda *_: "x" * 17, "too long"),
        ("answer", lambda *_: "x", "not callable"),  # it would make another base
        ("correct", lambda *_: False, "not correct"),
        ("is_test", lambda *_: False, "no problem is left to test on"),
    ]:
        monkeypatch.setattr(type(get_task(REVERSE)), name, value)
        with pytest.raises((InputError, TypeError), match=sentence):
            run(demo.evaluate)


def test_the_controls_know_of_right_answers_what_they_should():
    task, noise = (get_task(f"extras/tasks/controls.py:{name}") for name in ("EitherWay", "Noise"))
    [problem, other, *_] = task.test(blanks=10)
    right = problem["solution"]
    texts = [right, right.translate(str.maketrans("1234", "abcd")), other["solution"]]
    texts = [f"<answer>{text}</answer>" for text in texts]
    assert [task.correct(text, problem) for text in texts] == [True, True, False]
    assert [noise.correct(text, problem) for text in texts] == [True, False, False]
    drawn = np.array([noise.reward(text, problem) for text in [*map(str, range(1000)), *texts]])
    assert 0 <= drawn.min() and drawn.max() <= 1 and abs(drawn.mean() - 0.5) < 0.05
    assert [noise.reward(text, problem) for text in texts] == list(drawn[-3:])
