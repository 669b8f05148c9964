"""The program as a user runs it: train, resume, evaluate; what it writes, refuses and says."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from statistics import fmean

import pytest
import torch

import rewards
import wd1
from extras.tests.program import (
    FAST,
    HERE,
    arguments,
    call,
    cases,
    contents,
    even_characters,
    metrics,
    run,
)  # fmt: skip
from rewards import InputError
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
    options["max_steps"] = 3
    assert code == run(tmp_path, **options, resume=True)[0] == 0
    assert "before: accuracy" in capsys.readouterr().out
    names = """.lock checkpoint config.json metrics.jsonl model samples.jsonl summary.json
        timings.jsonl"""
    assert sorted(os.listdir(directory)) == names.split()
    assert len(os.listdir(directory / "checkpoint")) == 2
    # The logs are not in it: a header has room for 100 MB, and a long run writes more.
    assert b'"completion"' not in b"".join(contents(directory, "checkpoint/*"))
    assert [line["step"] for line in metrics(directory)] == [0, 1, 2, 3]
    samples = metrics(directory, "samples.jsonl")
    assert all({"step", "prompt", "completion", "reward"} == sample.keys() for sample in samples)
    summary = json.loads((directory / "summary.json").read_text())
    assert {"seconds", "forward_passes"} <= summary.keys() and summary["steps"] == 3

    options["model"] = directory / "model"
    assert run(tmp_path, **options | dict(lora_rank=0), out="unused")[0] == (2 if lora_rank else 0)
    assert bool(lora_rank) == ("it has adapters" in capsys.readouterr().err)
    shutil.rmtree(tmp_path / "unused", ignore_errors=True)
    assert run(tmp_path, **options, eval_only=True, out="unused")[0] == 0
    assert json.loads(capsys.readouterr().out) == summary["after"]
    assert not (tmp_path / "unused").exists() and not (source / "EXECUTED").exists()
    models = [wd1.load_model(path)[0] for path in (source, options["model"])]
    before, after = (wd1.predict_logits(model, torch.arange(9)[None]) for model in models)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_learns_what_is_rewarded(tmp_path, monkeypatch, dtype):
    """The loop as a whole: more even characters after 15 steps. Means of five steps, since problems
    differ: where nothing is learned they rise by 0.05 at most, and here by 0.17 at least (three
    seeds)."""
    monkeypatch.setattr(rewards.Sudoku, "reward", even_characters)
    options = dict(max_steps=15, eval_every=0, batch_size=32, num_generations=8, temperature=1.0)
    _, directory = run(tmp_path, dtype=dtype, learning_rate=3e-3, **options)
    values = [line["reward"] for line in metrics(directory)[1:]]
    assert fmean(values[-5:]) > fmean(values[:5]) + 0.1


BAD = """
--task chess -> --task chess
--bogus 1 -> --bogus: there is no such setting; the nearest is --blanks
-output_dir x -> -output_dir: there is no such setting
seed 4 -> seed: there is no such setting
--data= -> --data ''
--device mps -> --device mps
--gen_length 9 -> gen_length 9
--eval_lengths 9 -> --eval_lengths: gen_length 9
--diffusion_steps 1 -> denoising steps, not 1
--batch_size 5 -> --batch_size
--num_generations 1 -> --num_generations
--learning_rate -1 -> --learning_rate '-1'
--learning_rate nan -> --learning_rate 'nan'
--max_steps 0 -> --max_steps '0': Input should be greater
--max_steps many -> --max_steps 'many'
--eval_lengths 4000 -> 4017 tokens
--lr_decay 2 -> --lr_decay
--max_grad_norm 0 -> --max_grad_norm '0': Input should be greater than 0
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


@cases(BAD)
def test_bad_input_gets_one_sentence_and_leaves_nothing(tmp_path, capsys, words, expected):
    code, directory = run(tmp_path, words.replace("LONG", "x" * 5000).split())
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and sentence.startswith("wd1: ") and expected in sentence
    assert not directory.exists()


def test_an_exit_code_is_the_same_without_a_reader():
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "wd1.py", "--bogus"]
    assert subprocess.run(words, stdout=writing, stderr=writing, cwd=HERE).returncode == 2


def test_the_help_names_every_setting(capsys):
    assert call(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in wd1.Config.model_fields)


OWN_TASK = """
from rewards import Task
class Echo(Task):
    instruction = "Say it again: "
    def problems(self, split, seed, blanks):
        return [{"question": f"{split} {i}"} for i in range(30)]
    def reward(self, completion, example):
        return float(completion == example["question"])
"""


CHANGED = [  # a file, what is changed in it, and words of the sentence that refuses to go on
    ("own.py", "float(", "2 * float(", "the task's file has changed"),
    ("data.jsonl", "four", "five", "one of the problems has changed"),
    ("base/model-00001-of-00002.safetensors", ">", "?", "the model or its tokenizer has changed"),
    ("base/tokenizer_config.json", "assist", "ASSIST", "its tokenizer has changed"),
    ("run/config.json", '"lam": 1.0', '"lam": 2.0', "--lam has changed; start a new run"),
    ("run/config.json", "one_step", "evil", "--likelihood"),
    ("run/config.json", '"lam"', '"lr_scheduler"', "--lr_scheduler"),
    ("run/config.json", '"max_steps": 1', '"max_steps": "many"', "--max_steps 'many'"),
    ("run/metrics.jsonl", '{"step": 0', "", "is shorter than it was"),
]


def test_a_run_goes_on_only_with_what_it_was_made_from(tmp_path, capsys):
    """A task in a file of one's own trains, resumes and is evaluated; but nothing of a stranger's
    run directory is run: not the file that it names."""
    write_checkpoint(tmp_path / "base", "llada")
    file, data = tmp_path / "own.py", tmp_path / "data.jsonl"
    file.write_text(OWN_TASK + "    held_out = 2")
    data.write_text("\n".join(f'{{"question": "four {number}?"}}' for number in range(9)))
    task = arguments(task=f"{file}:Echo")
    options = dict(model=tmp_path / "base", data=data, lora_rank=2, max_steps=1)
    code, directory = run(tmp_path, task, **options)
    again = arguments(output_dir=directory, max_steps=2, resume=True)

    def refused(words, *task):
        before = contents(tmp_path)
        assert call([*again, *task]) == 2 and words in capsys.readouterr().err
        assert contents(tmp_path) == before

    for name, old, new, words in CHANGED:
        content = (tmp_path / name).read_bytes()
        assert old.encode() in content
        (tmp_path / name).write_bytes(content.replace(old.encode(), new.encode(), 1))
        refused(words, *task)
        (tmp_path / name).write_bytes(content)
    assert run(tmp_path, task, **options)[0] == 2 and "another run" in capsys.readouterr().err
    assert code == call(again + task) == 0
    options["model"] = directory / "model"
    assert run(tmp_path, task, **options, eval_only=True)[0] == 0
    file.write_text("raise SystemExit('this was run')")
    refused(f"--task {file}:Echo")


def test_a_run_is_not_mixed_with_one_that_came_no_further_than_its_first_checkpoint(
    tmp_path, monkeypatch
):
    def fail(*_):
        raise FloatingPointError("stopped")

    stopped = wd1.train.__kwdefaults__ | dict(collect=fail)
    with monkeypatch.context() as patch:
        patch.setattr(wd1, "write_json", fail)  # what is written first is config.json
        assert [run(tmp_path, seed=seed)[0] for seed in range(4)] == [1] * 4
    with monkeypatch.context() as patch:
        patch.setattr(wd1.train, "__kwdefaults__", stopped)
        assert run(tmp_path, seed=4)[0] == 1
    assert run(tmp_path, resume=True)[0] == 0


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_keeps_to_the_revision_that_it_began_with(tmp_path, monkeypatch, lora_rank):
    """Whatever becomes of the repository; so do the adapters that it leaves."""
    for commit in "c0ffee", "newer":
        write_checkpoint(tmp_path / commit, "llada")
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(tmp_path / (revision or ["newer", "c0ffee"][len(asked) == 1]))

    monkeypatch.setattr(wd1, "snapshot_download", snapshot_download)
    options = dict(model="some/model", task="countdown", max_steps=1, lora_rank=lora_rank)
    options |= problem_files(tmp_path, "Countdown")
    code, directory = run(tmp_path, **options)
    words = arguments(output_dir=directory, max_steps=2, resume=True)
    assert code == call(words) == 0
    assert json.loads((directory / "config.json").read_text())["model"] == "some/model@c0ffee"
    model, _ = wd1.load_model(directory / "model")
    assert asked == [("some/model", None)] + [("some/model", "c0ffee")] * (1 + bool(lora_rank))
    if lora_rank:
        adapters = model.peft_config["default"]
        assert (adapters.base_model_name_or_path, adapters.revision) == asked[1]
    with pytest.raises(InputError, match="--model has changed"):
        wd1.train(wd1.parse_arguments([*words, "--model=some/model"]))


@pytest.mark.parametrize("old, new, sentence", [
    ("float(", "{}['x'] + float(", r"no reward for the completion .*own.py, line 8: KeyError\('x'"),
    ("float(", "exit(0) + float(", r"no reward for the completion .*SystemExit\(0\)"),
    ("float(", "1e300 + float(", r"no reward for the completion .*it is 1e\+300"),
    ("float(", "0 * 1e999 + float(", r"no reward for the completion .*it is nan"),
    ("float(", "'much' or float(", "no reward for the completion"),
    ("{split} ", "", "all training problems"),
])  # fmt: skip
def test_a_task_that_cannot_be_learned_from_is_refused(tmp_path, capsys, old, new, sentence):
    (tmp_path / "own.py").write_text(OWN_TASK.replace(old, new))
    code, directory = run(tmp_path, task=f"{tmp_path}/own.py:Echo")
    assert code == 2 and re.search(sentence, capsys.readouterr().err.splitlines()[-1])
    assert not (directory / "metrics.jsonl").exists() or not metrics(directory)


def start(folder, *words):
    """A process of its own, as a user starts it."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *words], cwd=folder, **pipes)


@pytest.mark.parametrize("seconds", [1, 2.5])
def test_ctrl_c_ends_a_program_that_has_just_begun(tmp_path, seconds):
    """Counted from where Python itself, which takes its time, has come to our first line."""
    begin = "import runpy; print(flush=True); runpy.run_path('wd1.py', run_name='__main__')"
    options = FAST | dict(output_dir=tmp_path, max_steps=900)
    process = start(HERE, "-c", begin, *arguments(**options))
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 1) and "Traceback" not in error


def test_three_files_alone_are_the_program_and_ctrl_c_leaves_a_run_to_go_on_with(tmp_path):
    """In a folder where nothing of extras can be imported, with the signal and the processes of a
    user: a run on real formats is stopped, goes on as its last words say, and its model is
    evaluated."""
    for name in ("wd1.py", "rewards.py", "tiny_config.json"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "extras.py").write_text("raise ImportError('extras is not here')")
    write_checkpoint(tmp_path / "checkpoint", "llada")
    options = FAST | dict(model="checkpoint", task="gsm8k", **problem_files(tmp_path, "GSM8K"))
    endless = arguments(**options | dict(max_steps=900, save_every=1, eval_every=0))
    directory = tmp_path / "runs/checkpoint-gsm8k"
    process = start(tmp_path, "wd1.py", *endless)
    while process.poll() is None and not list(directory.glob("checkpoint/step-*[1-9]-*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in error, error
    done = metrics(directory)[-1]["step"]
    again = [*shlex.split(error.split("to go on: python ")[1]), f"--max_steps={done + 1}"]
    options |= dict(model=directory / "model", eval_only=True)
    evaluate = ["wd1.py", *arguments(**options)]
    for words, expected in (again, "after: accuracy"), (evaluate, '"reward"'):
        process = start(tmp_path, *words)
        assert expected in process.communicate()[0] and process.returncode == 0
    assert [line["step"] for line in metrics(directory)] == [*range(done + 2)] and done < 900
    assert (directory / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_installed_is_the_program(tmp_path, monkeypatch):
    """With extras/install found before this folder, as pip installs it, from anywhere else."""
    monkeypatch.setenv("PYTHONPATH", str(HERE / "extras" / "install"))
    code = "import wd1, wd1.extras.train; print(wd1.__file__, wd1.generate); wd1.main(['--bogus'])"
    process = start(tmp_path, "-c", code)
    said, error = process.communicate()
    assert process.returncode == 2 and str(HERE / "wd1.py") in said
    assert "wd1: --bogus" in error and "Traceback" not in error
