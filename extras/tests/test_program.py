"""The program as a user runs it: train, resume, evaluate; what it writes, refuses and says."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

import rewards
import wd1
from extras.tests.program import (
    FAST,
    HERE,
    arguments,
    call,
    contents,
    even_characters,
    metrics,
    run,
)  # fmt: skip
from test_wd1 import write_checkpoint

PROBLEMS = {  # in the public formats: one to train on, one to test on
    "Sudoku": """{"Puzzle": "0401034201240210", "Solution": "2431134231244213"}
{"Puzzle": 234341221434321, "Solution": "1234341221434321"}""",
    "Countdown": """{"input": "30,100,93", "output": "23"}
{"nums": [44, 19, 35], "target": 28}""",
    "GSM8K": """{"question": "2 + 2?", "answer": "Two and two. #### 4"}
{"question": "2 + 3?", "answer": "Two and three. #### 5"}""",
    "Math": r"""{"problem": "2 / 4?", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
{"problem": "3 / 4?", "solution": "It is $\\boxed{\\frac{3}{4}}$."}""",
}


def problem_files(directory, task):
    """Files of problems to train on and to test on, as options."""
    files = {name: directory / f"{name}.jsonl" for name in ("data", "test_data")}
    for file, line in zip(files.values(), PROBLEMS[task].splitlines()):
        file.write_text(line)
    return files


@pytest.mark.parametrize("family, task, lora_rank", [
    ("llada", "Sudoku", 0), ("Dream", "Countdown", 2), ("a2d-qwen3", "GSM8K", 2),
    ("llada", "Math", 2),
])  # fmt: skip
def test_train_resume_and_evaluate_on_real_formats(
    tmp_path, capsys, monkeypatch, family, task, lora_rank
):
    source, *_ = write_checkpoint(tmp_path / "checkpoint", family)
    monkeypatch.setattr(getattr(rewards, task), "reward", even_characters)
    options = dict(model=source, task=task.lower(), lora_rank=lora_rank, save_every=1)
    options |= problem_files(tmp_path, task)
    code, directory = run(tmp_path, **options)
    assert code == run(tmp_path, **options | {"max_steps": 3}, resume=True)[0] == 0
    assert "before: accuracy" in capsys.readouterr().out
    names = """.lock checkpoint config.json metrics.jsonl model samples.jsonl summary.json
        timings.jsonl"""
    assert sorted(os.listdir(directory)) == names.split()
    assert len(os.listdir(directory / "checkpoint")) == 2
    assert [line["step"] for line in metrics(directory)] == [0, 1, 2, 3]
    samples = metrics(directory, "samples.jsonl")
    assert all({"step", "prompt", "completion", "reward"} == sample.keys() for sample in samples)
    summary = json.loads((directory / "summary.json").read_text())
    assert {"seconds", "forward_passes"} <= summary.keys() and summary["steps"] == 3

    options["model"] = directory / "model"
    assert run(tmp_path, **options, eval_only=True, out="unused")[0] == 0
    assert json.loads(capsys.readouterr().out) == summary["after"]
    assert not (tmp_path / "unused").exists() and not (source / "EXECUTED").exists()

    ids, base = torch.arange(9)[None], wd1.load_model(source)[0]
    before = wd1.predict_logits(base, ids)
    after = wd1.predict_logits(wd1.load_model(directory / "model")[0], ids)
    assert not torch.equal(before, after)
    if lora_rank:
        plain = peft.PeftModel.from_pretrained(base, directory / "model")
        torch.testing.assert_close(wd1.predict_logits(plain, ids), after)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_learns_what_is_rewarded(tmp_path, monkeypatch, dtype):
    """The loop as a whole: more even characters after 15 steps."""
    monkeypatch.setattr(rewards.Sudoku, "reward", even_characters)
    options = dict(max_steps=15, eval_every=0, batch_size=32, num_generations=8, temperature=1.0)
    _, directory = run(tmp_path, dtype=dtype, learning_rate=3e-3, **options)
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
--learning_rate -1 -> --learning_rate: '-1' is no float
--learning_rate nan -> --learning_rate: 'nan' is no float
--max_steps 0 -> --max_steps: '0' is no int, 1 to 1e15
--max_steps many -> --max_steps: 'many'
--eval_lengths 4000 -> 4017 tokens
--lr_decay 2 -> --lr_decay
--likelihood exact -> --likelihood
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
--device quantum -> quantum
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
    tmp_path, capsys
):
    _, directory = run(tmp_path)
    before = contents(directory)
    assert run(tmp_path)[0] == 2 and "holds another run" in capsys.readouterr().err
    assert run(tmp_path, resume=True, max_steps=9, lam=2.0)[0] == 2
    assert "--lam has changed; start a new run" in capsys.readouterr().err
    assert contents(directory) == before


def test_an_exit_code_is_the_same_without_a_reader():
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "wd1.py", "--bogus"]
    assert subprocess.run(words, stdout=writing, stderr=writing, cwd=HERE).returncode == 2


def test_the_help_names_every_setting(capsys):
    assert call(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in asdict(wd1.Config()))


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
    for changes in ({"likelihood": "evil"}, {"lr_scheduler": ["x"]}, {"max_steps": "many"}):
        (directory / "config.json").write_text(json.dumps(config | changes))
        assert call(again) == 2 and min(changes) in capsys.readouterr().err


def edit(file, old, new):
    """Replaces some text in a file."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def scale_weights(file):
    save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file)


def test_every_setting_but_those_that_may_change_is_a_mark_of_the_run():
    rows = Dataset.from_list([{"prompt": "?"}])
    marks = lambda config: wd1.made_from(config, Mock(fingerprint=1), rows, rows)
    before = marks(wd1.Config(model="tiny"))
    for name in asdict(wd1.Config()):
        config = wd1.Config(model="tiny")
        setattr(config, name, "countdown" if name == "task" else "another")
        changed = {mark for mark, value in marks(config).items() if before[mark] != value}
        assert changed == set() if name in wd1.MAY_CHANGE else changed == {f"--{name}"}


MADE_FROM = {  # what a run is made from, changed, and words of the sentence that refuses to go on
    "own.py": (lambda file: edit(file, "float(", "2 * float("), "the task's file has changed"),
    "data.jsonl": (lambda file: edit(file, "four", "five"), "one of the problems has changed"),
    "run/config.json": (lambda file: edit(file, '"lam": 1.0', '"lam": 2.0'), "--lam has changed"),
    "base/model-00001-of-00002.safetensors": (scale_weights, "the model or its tokenizer"),
    "base/tokenizer_config.json": (lambda file: edit(file, "assist", "ASSIST"), "its tokenizer"),
    "run/checkpoint": (shutil.rmtree, "no whole checkpoint"),
}


def test_a_run_goes_on_only_with_what_it_was_made_from(tmp_path, capsys):
    write_checkpoint(tmp_path / "base", "llada")
    (tmp_path / "own.py").write_text(OWN_TASK + "    held_out = 2")
    questions = [json.dumps({"question": f"four {number}?"}) for number in range(9)]
    (tmp_path / "data.jsonl").write_text("\n".join(questions))
    options = dict(task=f"{tmp_path}/own.py:Echo", data=tmp_path / "data.jsonl", lora_rank=2)
    options |= dict(model=tmp_path / "base", max_steps=1)
    assert run(tmp_path, **options)[0] == 0
    for name, (change, words) in MADE_FROM.items():
        shutil.copytree(tmp_path, tmp_path.with_name("copy"))
        change(tmp_path / name)
        before = contents(tmp_path)
        again = dict(task=options["task"], max_steps=2, resume=True)
        assert call(arguments(output_dir=tmp_path / "run", **again)) == 2 and words in capsys.readouterr().err, name
        assert contents(tmp_path) == before
        shutil.rmtree(tmp_path)
        tmp_path.with_name("copy").rename(tmp_path)
    assert call(arguments(output_dir=tmp_path / "run", **again)) == 0


@pytest.mark.parametrize("body, words", [
    ("return {}['x']", "own.py, line 8: KeyError('x')"), ("raise SystemExit(0)", "SystemExit(0)"),
    ("return 1e300", "it is 1e+300"),
])  # fmt: skip
def test_a_reward_that_fails_is_shown_where_it_does(tmp_path, capsys, body, words):
    (tmp_path / "own.py").write_text(OWN_TASK.replace("return float", f"{body}\n        float"))
    code, _ = run(tmp_path, task=f"{tmp_path}/own.py:Echo")
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and words in error and "no reward for the completion" in error


def test_problems_to_test_on_are_not_those_to_train_on(tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN_TASK.replace("{split} ", ""))
    code, directory = run(tmp_path, task=f"{tmp_path}/own.py:Echo")
    assert code == 2 and "all training problems" in capsys.readouterr().err
    assert not directory.exists()


@pytest.mark.parametrize("seconds", [1, 2.5])
def test_ctrl_c_ends_a_program_that_has_just_begun(tmp_path, seconds):
    """Counted from where Python itself, which takes its time, has come to our first line."""
    options = arguments(**FAST | dict(output_dir=tmp_path, max_steps=10**6))
    begin = "import runpy; print(flush=True); runpy.run_path('wd1.py', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", begin, *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE,
    )  # fmt: skip
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 1) and "Traceback" not in error


def test_ctrl_c_leaves_a_run_that_its_last_words_go_on_with(tmp_path):
    """With the signal and the processes of a user."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE)
    options = FAST | dict(output_dir=tmp_path, max_steps=900, save_every=1, eval_every=0)
    process = subprocess.Popen([sys.executable, "wd1.py", *arguments(**options)], **pipes)
    while process.poll() is None and not list(tmp_path.glob("checkpoint/step-*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in error, error
    done = metrics(tmp_path)[-1]["step"]
    again = shlex.split(error.split("to go on: python ")[1])
    subprocess.run([sys.executable, *again, f"--max_steps={done + 1}"], check=True, **pipes)
    assert [line["step"] for line in metrics(tmp_path)] == [*range(done + 2)] and done < 900


def test_what_is_installed_is_the_program(tmp_path):
    """With extras/install found before this folder, as pip installs it, from anywhere else."""
    words = [sys.executable, "-c", "import wd1, wd1.extras.train; print(wd1.__file__, wd1.generate)"]
    home = os.environ | {"PYTHONPATH": str(HERE / "extras" / "install")}
    said = subprocess.run(words, cwd=tmp_path, env=home, capture_output=True, text=True, check=True)
    assert str(HERE / "wd1.py") in said.stdout
    words[2] = "import wd1; wd1.main(['--bogus'])"
    done = subprocess.run(words, cwd=tmp_path, env=home, capture_output=True, text=True)
    assert done.returncode == 2 and "wd1: --bogus" in done.stderr and "Traceback" not in done.stderr


def test_three_files_alone_are_the_program(tmp_path, monkeypatch):
    """In a folder where nothing of extras can be imported, a run on real formats ends, goes on with
    the settings that it had, and its model is evaluated."""
    for name in ("wd1.py", "rewards.py", "tiny_config.json"):
        shutil.copy(HERE / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("extras.py").write_text("raise ImportError('extras is not here')")
    write_checkpoint(Path("checkpoint"), "llada")
    options = FAST | dict(model="checkpoint", task="gsm8k", **problem_files(tmp_path, "GSM8K"))
    directory = Path("runs/checkpoint-gsm8k")
    for words, said in (
        (arguments(**options), "after: accuracy"),
        (["--resume", *arguments(output_dir=directory, max_steps=3)], "after: accuracy"),
        (arguments(**options | dict(model=directory / "model"), eval_only=True), '"accuracy"'),
    ):
        done = subprocess.run([sys.executable, "wd1.py", *words], capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout, done.stderr
    assert metrics(directory)[-1]["step"] == 3
    assert (directory / "curve.png").read_bytes().startswith(b"\x89PNG")
