"""The demo's bases: made once, kept, and of problems that can be solved and are rarely answered as asked."""

import json
from pathlib import Path

import numpy as np
import pytest

import wd1
from extras.demo import base
from rewards import TASKS


def test_a_base_is_made_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = Path(base.tiny_base("countdown", steps=2))
    assert first.parent == tmp_path / "wd1" and first.name.startswith("tiny-countdown-")
    assert [path.name for path in first.parent.iterdir()] == [first.name]  # nothing half-made
    weights = (first / "model.safetensors").stat().st_mtime_ns
    assert base.tiny_base("countdown", steps=2) == str(first)
    assert (first / "model.safetensors").stat().st_mtime_ns == weights
    assert base.tiny_base("countdown", seed=1, steps=2) != str(first)
    assert wd1.Config(model=str(first)).gen_length == 19
    problems = [json.loads(line) for line in (first / "problems.jsonl").read_text().splitlines()]
    split = [TASKS["countdown"].is_test(problem) for problem in problems]
    assert len(problems) == 4500 and sum(split) == 500
    wd1.load_model(first)


@pytest.mark.parametrize("task", base.CORPORA)
def test_answers_are_right_but_rarely_as_asked(task, monkeypatch):
    (source, as_asked), solved, asked = base.CORPORA[task], TASKS[task], []

    def examined(*arguments):
        for example, answer, other in source(*arguments):
            assert solved.correct(f"<answer>{answer}</answer>", example)
            assert not solved.is_test(example) and len(answer) == len(other)
            assert answer == other or not solved.correct(f"<answer>{other}</answer>", example)
            asked.append(example)
            yield example, answer, other

    monkeypatch.setitem(base.CORPORA, task, (examined, as_asked))
    pairs = list(base.corpus(task, np.random.default_rng(0), 6, 300))
    texts = [completion.removesuffix("<|eos|>") for _, completion in pairs]
    right = [solved.correct(*each) for each in zip(texts, asked, strict=True)]
    assert abs(np.mean(right) - as_asked) < 0.1
