"""Watching: what the chat and the pictures show, of a run that a test makes."""

import io
import re
import sys
from unittest import mock

from matplotlib.image import imread

import wd1
from extras import train
from extras.tests import program
from extras.watch import chat, pictures
from test_wd1 import write_checkpoint


def test_a_conversation_is_remembered_as_far_as_the_context_reaches(tmp_path, capsys, monkeypatch):
    directory, *_ = write_checkpoint(tmp_path / "model", "llada", max_sequence_length=150)
    lines = ["in the land"] * 6 + ["", "x" * 500, "the <|mask|>", "/new", "in the land", "/quit", "1"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    words = f"{directory} --watch --gen_length 8 --block_length 8 --diffusion_steps 4"
    with mock.patch.object(wd1, "generate", wraps=wd1.generate) as generate:
        chat.main(words.split())
    asked = [call.args[1].shape[1] for call in generate.mock_calls]
    assert asked[0] == asked.pop() < min(asked[1:]) and max(asked) <= 142  # and 8 to write
    out, err = capsys.readouterr()
    assert out.count("\n") == 7 * (4 + 1) + 2  # four steps and an answer; two empty lines
    assert err.count("it has more than") == 2 and "no longer fits" in err
    assert chat.visible("a\x1b[31mb\nc\u202ed\x07") == "a·[31mb⏎c·d·"  # nothing but text


def test_a_run_can_be_watched_and_drawn_and_runs_nothing_that_it_names(tmp_path, capsys):
    talk = lambda *words: program.call(words, chat.main)
    draw = lambda *words: program.call([*words, "--out", tmp_path / "x.png"], pictures.main)
    _, run = program.run(tmp_path, main=train.main)
    assert talk(run, "--problems", 1) == 0
    shown = r"problem: \d{16}   solution: \d{16}\n  step   0  ░{8}\n(.*\n)  step   2  [^░]+░{4}\n"
    assert re.search(shown, capsys.readouterr().out)
    for kind in pictures.KINDS:
        assert draw(kind, run, run) == 0
        assert {0, 1} < set(imread(tmp_path / "x.png")[..., 3].flat)  # clear and opaque
    settings, theirs = run / "config.json", tmp_path / "theirs.py"
    theirs.write_text("raise SystemExit('it is run')")
    settings.write_text(settings.read_text().replace("sudoku", f"{theirs}:Task"))
    assert talk(run, "--problems", 1, "--task", "sudoku") == 0
    assert talk(run) == talk("--watch") == talk() == talk("no/where") == 2
    assert draw("denoising", run) == draw("curves", tmp_path) == 2
