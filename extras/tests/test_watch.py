"""Watching: what the chat and the pictures show, of a run that a test makes."""

import io
import json
import sys

import pytest
import torch

import wd1
from extras.tests import program
from extras.watch import chat, pictures
from rewards import InputError
from test_wd1 import HERE, write_checkpoint


def test_nothing_that_a_model_writes_reaches_the_terminal_but_text():
    assert chat.visible("a\x1b[31mb\nc\u202ed\x07") == "a·[31mb⏎c·d·"


def test_a_canvas_shows_what_is_written():
    _, tokenizer = wd1.load_model("tiny")
    tokens = tokenizer("1234").input_ids
    written = torch.tensor([True, False, False, True])
    assert chat.half_written(tokenizer, torch.tensor(tokens), written) == "1░░4"


def test_a_problem_is_shown_whole(tmp_path, capsys):
    model, tokenizer = wd1.load_model("tiny")
    config = wd1.Config(model="tiny", task="countdown", gen_length=8, block_length=8, diffusion_steps=4, eval_lengths=[8])
    task = wd1.get_task("countdown")
    example = {"nums": [1, 2, 3], "target": 6}
    example["prompt"] = task.instruction + task.question(example)
    chat.show(model, tokenizer, example, config, "before")
    out = capsys.readouterr().out
    assert "Numbers: 1, 2, 3⏎Target: 6" in out and "step   0  ░░░░░░░░" in out
    assert "wrong, reward 0.00" in out


def test_a_conversation_is_remembered_as_far_as_the_context_reaches(tmp_path, capsys):
    directory, *_ = write_checkpoint(tmp_path / "model", "llada", max_sequence_length=150)
    model, tokenizer = wd1.load_model(directory)
    config = wd1.Config(gen_length=8, block_length=8, diffusion_steps=4, temperature=0.0, model="x/y")
    talk = chat.Conversation(model, tokenizer, config)
    for _ in range(6):
        first = talk.encode([*talk.turns, {"role": "user", "content": "in the land"}])
        talk.answer("in the land")
        assert first.shape[1] + 8 <= 150 or "no longer fit" in capsys.readouterr().err
        assert [each["role"] for each in talk.turns[-2:]] == ["user", "assistant"]
    assert len(talk.turns) < 12
    for bad in ("x" * 500, "the <|mask|>"):
        with pytest.raises(InputError):
            talk.answer(bad)


def test_a_chat_through_a_pipe(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("0301043002140100\n\n/new\n1\n/quit\n2\n"))
    chat.main(["tiny", "--watch", "--task", "sudoku"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(not line.startswith("  step") for line in lines) == 2 and len(lines) > 10


def test_what_cannot_be_talked_to_gets_a_sentence():
    for argv in ([], ["--watch"], ["tiny", "--gen_length", "0"], ["nowhere/at-all"]):
        with pytest.raises(InputError):
            chat.main(argv)


def test_a_run_can_be_watched_and_drawn(tmp_path, capsys):
    _, directory = program.run(tmp_path)
    chat.main([str(directory), "--problems", "1", "--eval_lengths", "8"])
    assert "problem 1: " in capsys.readouterr().out
    kinds = {"curves": [directory, directory], "run": [directory], "weights": [], "denoising": [directory]}
    for kind, runs in kinds.items():
        out = tmp_path / f"{kind}.png"
        pictures.main([kind, *map(str, runs), "--out", str(out)])
        assert out.read_bytes()[:4] == b"\x89PNG" and out.stat().st_size > 10_000
    for argv in (["curves"], ["curves", str(HERE)], ["denoising", str(directory), "--problem", "9999"]):
        with pytest.raises(InputError):
            pictures.main([*argv, "--out", str(tmp_path / "x.png")])


def test_what_a_run_directory_names_is_not_run(tmp_path):
    _, directory = program.run(tmp_path)
    settings = json.loads((directory / "config.json").read_text())
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'EXECUTED')!r}, 'w')")
    settings["task"] = f"{tmp_path}/theirs.py:Task"
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError):
        pictures.main(["denoising", str(directory), "--out", str(tmp_path / "x.png")])
    chat.main([str(directory), "--problems", "1", "--gen_length", "8"])
    assert not (tmp_path / "EXECUTED").exists()
