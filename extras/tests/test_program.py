"""The program as a user runs it: train, resume, evaluate; what it writes, refuses and says."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import peft
import pytest
import torch

import rewards
import wd1
from extras.tests.program import (
    FAST,
    HERE,
    arguments,
    call,
    even_characters,
    few_problems,
    metrics,
    run,
)
from rewards import TASKS
from test_wd1 import write_checkpoint

PROBLEMS = {  # a file of some, in the public formats
    "countdown": '{"input": "30,100,93", "output": "23"}\n{"nums": [44, 19, 35], "target": 28}\n',
    "gsm8k": '{"question": "2 + 2?", "answer": "Two and two. #### 4"}\n',
    "math": '{"problem": "2 / 4?", "solution": "It is $\\\\boxed{\\\\frac{1}{2}}$."}\n',
}


def problem_files(directory, task):
    """Files of problems to train on and of others, as options."""
    files = {name: directory / f"{name}.jsonl" for name in ("data", "test_data")}
    files["data"].write_text(PROBLEMS[task])
    files["test_data"].write_text(PROBLEMS[task].replace("2", "3"))
    return files


def files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family, task, lora_rank", [
    ("llada", "sudoku", 0), ("Dream", "countdown", 2), ("a2d-qwen3", "gsm8k", 2),
    ("llada", "math", 2),
])  # fmt: skip
def test_train_resume_and_evaluate_on_real_formats(
    tmp_path, capsys, monkeypatch, family, task, lora_rank
):
    source, *_ = write_checkpoint(tmp_path / "checkpoint", family)
    monkeypatch.setattr(type(TASKS[task]), "reward", even_characters)
    options = dict(model=source, task=task, lora_rank=lora_rank, save_every=1)
    if task in PROBLEMS:
        options |= problem_files(tmp_path, task)
    code, directory = run(tmp_path, **options)
    assert code == 0 and "before: accuracy" in capsys.readouterr().out
    names = """config.json summary.json metrics.jsonl timings.jsonl samples.jsonl checkpoint model
        .lock"""
    assert {path.name for path in directory.iterdir()} == {*names.split()}
    summary = json.loads((directory / "summary.json").read_text())
    assert {"seconds", "forward_passes"} <= summary.keys() and summary["steps"] == 2
    assert 0 <= summary["after"]["accuracy"] <= 1 and "reward" in summary["before"]
    sample = json.loads((directory / "samples.jsonl").read_text().splitlines()[0])
    assert {"step", "prompt", "completion", "reward"} <= sample.keys()

    assert run(tmp_path, **options | {"max_steps": 3}, resume=True)[0] == 0
    assert [line["step"] for line in metrics(directory)] == [0, 1, 2, 3]
    assert len(list((directory / "checkpoint").iterdir())) == 2
    capsys.readouterr()
    options["model"] = directory / "model"
    assert run(tmp_path, **options, eval_only=True, out="unused")[0] == 0
    summary = json.loads((directory / "summary.json").read_text())
    assert json.loads(capsys.readouterr().out) == summary["after"]
    assert not (tmp_path / "unused").exists() and not (source / "EXECUTED").exists()

    (base, tokenizer), (trained, _) = wd1.load_model(source), wd1.load_model(directory / "model")
    ids = tokenizer("the land", return_tensors="pt").input_ids
    untrained, got = wd1.predict_logits(base, ids), wd1.predict_logits(trained, ids)
    assert not torch.equal(untrained, got)
    if lora_rank:
        plain = peft.PeftModel.from_pretrained(base, directory / "model")
        torch.testing.assert_close(wd1.predict_logits(plain, ids), got)


def test_a_run_learns_what_is_rewarded(tmp_path, monkeypatch):
    """The loop as a whole: more even characters after 15 steps."""
    monkeypatch.setattr(rewards.Sudoku, "reward", even_characters)
    size = dict(batch_size=32, micro_batch_size=32, rollout_batch_size=32, num_generations=8)
    for dtype in ("float32", "bfloat16"):
        options = dict(size, max_steps=15, eval_every=0, temperature=1.0, learning_rate=3e-3)
        _, directory = run(tmp_path, out=dtype, dtype=dtype, **options)
        values = [line["reward"] for line in metrics(directory)[1:]]
        assert sum(values[-3:]) / 3 > sum(values[:3]) / 3 + 0.1


def test_equal_rewards_are_counted_and_teach_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards.Sudoku, "reward", lambda *_: 0.5)
    _, directory = run(tmp_path, weight_decay=0)
    for line in metrics(directory)[1:]:
        assert line["degenerate_groups"] == 1 and line["grad_norm"] == 0
    models = [wd1.load_model(source)[0].parameters() for source in ("tiny", directory / "model")]
    assert all(torch.equal(*pair) for pair in zip(*models, strict=True))


BAD = """
--task chess -> --task chess
--bogus 1 -> --bogus
--gen_length 9 -> gen_length 9
--diffusion_steps 1 -> denoising steps, not 1
--batch_size 5 -> --batch_size
--num_generations 1 -> --num_generations
--learning_rate -1 -> --learning_rate -1
--learning_rate nan -> --learning_rate nan
--max_steps 0 -> --max_steps 0
--max_steps many -> invalid int value
--eval_lengths 4000 -> 4017 tokens
--lr_scheduler square -> invalid choice: 'square'
--likelihood exact -> invalid choice: 'exact'
--model nowhere/at/all -> --model nowhere/at/all
--model /none.json -> --model /none.json
--model /etc/passwd -> --model /etc/passwd
--model ~nobody/x -> --model ~nobody/x
--model LONG -> --model xxx
--model - -> --model -
--data none.csv -> none.csv
--blanks 13 -> --blanks 13
--resume -> no run to go on with
--lam 0 -> both 0
--seed 9223372036854775808 -> --seed
--prompt_mask_prob 2 -> --prompt_mask_prob
--load_in_4bit -> --lora_rank
--load_in_4bit --lora_rank 2 -> 4
--device quantum -> --device quantum
--output_dir /proc/run -> /proc/run
--output_dir /etc/passwd -> /etc/passwd
"""


@pytest.mark.parametrize("case", BAD.strip().splitlines())
def test_bad_input_gets_one_sentence_and_leaves_nothing(tmp_path, capsys, case):
    words, expected = case.split(" -> ")
    code, directory = run(tmp_path, words.replace("LONG", "x" * 5000).split())
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and sentence.startswith("wd1: ") and expected in sentence
    assert not directory.exists()


def test_an_output_directory_is_never_overwritten_and_a_resumed_run_keeps_its_settings(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(rewards.Sudoku, "problems", few_problems)
    _, directory = run(tmp_path)
    before, settings = files(directory), json.loads((directory / "config.json").read_text())
    assert run(tmp_path)[0] == 2 and "holds another run" in capsys.readouterr().err
    others = dict(dtype="bfloat16", likelihood="one_step", lr_scheduler="cosine", task="math")
    others |= dict(eval_lengths=4, data="x", test_data="x", model="tiny")
    for name in settings.keys() - set(wd1.MAY_CHANGE):
        value = settings[name]
        other = others.get(name) or value is False or 2 * value + (value == 0)
        assert call(["--resume", *arguments(output_dir=directory, **{name: other})]) == 2
        assert f"--{name}" in capsys.readouterr().err, name
    assert files(directory) == before
    # Without options, --resume takes the run's own.
    monkeypatch.setattr(wd1, "plot", print)  # which takes a second
    assert call(["--resume", *arguments(output_dir=directory, max_steps=3)]) == 0
    assert metrics(directory)[-1]["step"] == 3


def test_the_help_names_every_setting(capsys):
    assert call(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in vars(wd1.Config()))


OWN_TASK = """
from rewards import Task
class Echo(Task):
    instruction = "Say it again: "
    def problems(self, split, seed, blanks):
        return [{"question": f"{split} {i}"} for i in range(30)]
    def reward(self, completion, example):
        return float(completion == example["question"])
"""


def test_what_a_run_directory_names_is_not_run(tmp_path, capsys):
    """A task in a file of one's own trains, resumes and is evaluated; but a stranger's config.json
    that names a file, or words that no setting has, has nothing run."""
    file = tmp_path / "own.py"
    file.write_text(OWN_TASK)
    task = arguments(task=f"{file}:Echo")
    code, directory = run(tmp_path, task)
    again = ["--resume", *arguments(output_dir=directory)]
    assert code == run(tmp_path, task, resume=True, max_steps=3)[0] == 0
    assert run(tmp_path, task, model=directory / "model", eval_only=True)[0] == 0
    file.write_text("raise SystemExit('this was run')")
    assert call(again) == 2 and f"--task {file}:Echo" in capsys.readouterr().err
    config = json.loads((directory / "config.json").read_text()) | {"task": "sudoku"}
    for changes in ({"likelihood": "evil"}, {"lr_scheduler": ["x"]}, {"max_steps": "1"}):
        (directory / "config.json").write_text(json.dumps(config | changes))
        assert call(again) == 2 and min(changes) in capsys.readouterr().err


def test_three_files_alone_are_the_program(tmp_path):
    """In a folder where nothing of extras can be imported, a run on a real format is stopped by
    Ctrl-C, goes on, and its model is evaluated."""
    for name in ("wd1.py", "rewards.py", "tiny_config.json"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "extras.py").write_text("raise ImportError('extras is not here')")
    write_checkpoint(tmp_path / "checkpoint", "llada")
    program = dict(cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    program["env"] = {**os.environ, "PYTHONPATH": ""}
    command, directory = [sys.executable, "wd1.py"], tmp_path / "runs/checkpoint-gsm8k"
    options = FAST | dict(model="checkpoint", task="gsm8k", **problem_files(tmp_path, "gsm8k"))
    options |= dict(max_steps=900, save_every=1, eval_every=0)
    process = subprocess.Popen([*command, *arguments(**options)], **program)
    while process.poll() is None and not list(directory.glob("checkpoint/step-*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in error, error
    again = shlex.split(error.split("to go on: python ")[1])
    done = metrics(directory)[-1]["step"]
    assert 1 <= done < 900
    evaluation = options | dict(model=directory / "model", eval_only=True)
    for words, said in (
        ([*again[1:], f"--max_steps={done + 1}"], "after: accuracy"),
        (arguments(**evaluation), '"accuracy"'),
    ):
        finished = subprocess.run([*command, *words], **program)
        assert finished.returncode == 0 and said in finished.stdout, finished.stderr
    assert (directory / "curve.png").read_bytes().startswith(b"\x89PNG")
