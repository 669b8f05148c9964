"""Several processes, weights divided among them, and what a run is said to cost."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import rewards
import wd1
from extras.scale import fsdp, gpu, plan
from extras.tests.program import FAST, HERE, even_characters, few_problems, metrics
from rewards import InputError

QUICK = dict(FAST, model="tiny", eval_lengths=[8])
PARALLEL = dict(
    QUICK, batch_size=8, eval_every=0, temperature=1.0, likelihood="elbo", mc_samples=2,
    micro_batch_size=2,
)  # fmt: skip
SHARD = dict(beta=0.1, gradient_checkpointing=True)


def elsewhere(processes, function, *arguments):
    """Calls a function of this file in processes of their own, one thread each, which give freed
    memory back at once: exit code, output."""
    command = f"-m torch.distributed.run --standalone --nproc_per_node={processes}"
    command = [sys.executable, *command.split(), "-m", "extras.tests.test_scale"]
    command += [function.__name__, json.dumps(arguments, default=str)]
    environment = os.environ | dict(OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="65536")
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr + done.stdout


# ------------------------------------------------------------------------------- several processes


@pytest.fixture
def directory(tmp_path):
    """Of runs, with a model to start from. Half of the vocabulary is EOS: now and then a rank is
    done before the other."""
    model, tokenizer = wd1.load_model(plan.write_config(tmp_path, weight_tying=False))
    model.config.eos_token_id = list(range(2, 66))
    for part in model, tokenizer:
        part.save_pretrained(tmp_path / "start/model")
    return tmp_path


def train_all(directory, runs):
    """Trains {name: options}; shard... divide their weights, if only by one."""
    remove, publish, save = wd1.remove, wd1.publish, wd1.RunDirectory.save

    def remove_late(path):
        time.sleep(0.05)  # time enough for another rank to write there already
        assert path.name != "checkpoint" or not path.exists()
        remove(path)

    def publish_late(draft, path):
        time.sleep(0.05)
        publish(draft, path)

    def save_and_look(run):
        save(run)  # no rank goes on before the checkpoint is there
        assert [*run.path.glob(f"checkpoint/step-{run.state['steps']:07}-*")]

    def reward(task, completion, example):
        torch.rand(1 + wd1.RANK)  # a reward that draws, on each rank otherwise
        return even_characters(task, completion, example)

    def die(run, metrics):
        if run.path.name == "dies" and metrics["step"] == 1 and wd1.RANK == 1:
            os._exit(9)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.Sudoku, "problems", few_problems)
        patch.setattr(rewards.Sudoku, "reward", reward)
        patch.setattr(wd1, "plot", lambda *_: None)
        patch.setattr(wd1, "remove", remove_late)
        patch.setattr(wd1, "publish", publish_late)
        patch.setattr(wd1.RunDirectory, "save", save_and_look)
        patch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)  # LoRA's differs by rank
        for name, options in runs.items():
            files = dict(model=f"{directory}/start/model", output_dir=f"{directory}/{name}")
            config, given = wd1.Config(**PARALLEL | files | options), {}
            if name.startswith("shard"):
                alone = wd1.WORLD == 1
                given = dict(directory=fsdp.ShardedRun) if alone else fsdp.sharded(config)
            wd1.train(config, **given, watch=die)
            assert Path(config.output_dir, "model").is_dir()  # for every rank


def test_two_processes_do_what_one_does(directory):
    """The same weights in one process, in two, in two that divide them; LoRA, a reference, and
    activations computed again included. A run goes on in more processes, or in fewer."""
    runs = {"data": {}, "lora": dict(lora_rank=2, beta=0.5), "shard": SHARD}
    once, again = SHARD | dict(max_steps=1), SHARD | dict(resume=True)
    train_all(directory, {f"{name}-alone": runs[name] for name in runs} | {"shard-more": once})
    runs |= {"shard-more": again, "shard-fewer": once}
    code, output = elsewhere(2, train_all, directory, runs)
    assert code == 0, output
    train_all(directory, {"shard-fewer": again})

    def left(run):
        lines = pd.DataFrame(metrics(directory / run)).drop(columns=["forward_passes", "eval"])
        return dict(wd1.load_model(directory / run / "model")[0].named_parameters()), lines

    start, _ = wd1.load_model(directory / "start/model")
    for name in runs:
        (found, lines), (want, wanted) = left(name), left(f"{name.split('-')[0]}-alone")
        torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
        pd.testing.assert_frame_equal(lines, wanted, rtol=1e-3, atol=1e-5)
        for key, weight in start.named_parameters() if name != "lora" else ():
            assert not torch.equal(found[key], weight)


def test_a_lost_rank_is_noticed_and_one_process_goes_on(directory):
    endless = {"dies": dict(max_steps=99, save_every=1)}
    code, output = elsewhere(2, train_all, directory, endless)
    assert code == 1 and "another process has ended" in output, output
    train_all(directory, {"dies": dict(max_steps=3, resume=True)})
    assert [line["step"] for line in metrics(directory / "dies")] == [0, 1, 2, 3]


def test_several_ranks_stop_with_the_words_that_go_on_and_input_is_not_blamed_on_others(
    tmp_path, monkeypatch, capsys
):
    run = wd1.RunDirectory(wd1.Config(**QUICK, output_dir=tmp_path / "run"))
    run.state = {"steps": 3}
    monkeypatch.setattr(wd1, "WORLD", 2)
    monkeypatch.setattr(wd1, "everywhere", lambda flag: False)
    monkeypatch.setattr(run, "save", lambda: None)
    with pytest.raises(SystemExit, match="torchrun --nproc_per_node 2 wd1.py --resume --output"):
        run.stop_if_asked()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit), wd1.one_sentence():
        raise InputError("no Connection to the hub")
    assert capsys.readouterr().err == "wd1: no Connection to the hub\n"


def test_what_cannot_be_divided_or_written_is_refused_in_a_sentence(tmp_path, monkeypatch):
    run = fsdp.ShardedRun(wd1.Config(**QUICK, output_dir=tmp_path / "run"))
    run.tensors = {"a": torch.ones(2)}
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(OSError):
        run.write_checkpoint(tmp_path / "file" / "draft", "{}")
    with pytest.raises(OSError):
        run.read_checkpoint(tmp_path / "none", run.tensors)
    with pytest.raises(InputError, match="torchrun"):
        fsdp.sharded(run.config)
    monkeypatch.setattr(wd1, "WORLD", 2)
    with pytest.raises(InputError, match="tied"):
        fsdp.sharded(run.config)["load"]("tiny")
    run.config.lora_rank = 2
    with pytest.raises(InputError, match="--lora_rank 0"):
        fsdp.sharded(run.config)


# ------------------------------------------------------------------------------------------- costs


def gigabytes(options):
    """By how much a model, AdamW and gradient steps raise the memory of this process (Linux)."""
    config, peaks = plan.PlanConfig(**options), []
    for source in "tiny", config.model:  # the first: what libraries load and set up once
        model, tokenizer = wd1.load_model(source)
        model = wd1.add_adapters(model, config.lora_rank) if config.lora_rank else model
        gpu.parts(model, tokenizer, config)["update"]()
        peaks.append(1024e-9 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(peaks[1] - peaks[0])


@pytest.mark.parametrize("rank", [0, 16])
def test_the_memory_that_a_run_is_said_to_take_is_what_it_takes(tmp_path, rank):
    """Within 15%, for a model of 18 million weights: counted on tensors without data, and read
    off a real process, which gives back at once what is freed, as a GPU's allocator counts."""
    shape = dict(d_model=512, n_layers=4, mlp_hidden_size=1536, embedding_size=3952)
    options = QUICK | dict(
        model=plan.write_config(tmp_path, **plan.LLADA_8B | shape), batch_size=12,
        micro_batch_size=6, prompt_length=17, gen_length=128, block_length=32, diffusion_steps=4,
        lora_rank=rank,
    )  # fmt: skip
    code, output = elsewhere(1, gigabytes, options)
    assert code == 0, output
    estimate = plan.memory(plan.PlanConfig(**options))["in all"]
    assert float(output.split()[-1]) == pytest.approx(estimate, rel=0.15)


def test_what_is_counted_follows_the_settings(tmp_path, capsys):
    """And is said for a GPU that is elsewhere, in passes that are counted here by hand."""
    model = plan.write_config(tmp_path, weight_tying=False)

    def said(words):
        plan.main(["--model", model, "--device", "cuda", *words.split()])
        return json.loads(capsys.readouterr().out)

    light = said("--gradient_checkpointing --tokens_per_second 1e4")
    full = said("--lora_rank 0 --beta 0.1 --eval_every 0")
    parameters = wd1.load_model(model)[0].num_parameters()
    assert full["GB"]["weights"] == pytest.approx(2 * 4e-9 * parameters)  # a reference besides
    assert full["GB"]["adam"] == pytest.approx(8e-9 * parameters)
    assert said("--load_in_4bit")["GB"]["weights"] < light["GB"]["weights"]
    assert light["GB"]["update"] < 0.7 * full["GB"]["update"]
    sampling, updates, evaluation = 1000 * 2 * 128, 1000 * 8 * 8, (64 + 128 + 256) * 256 / 24
    assert light["passes"] == round(sampling + updates + 11 * evaluation)
    assert full["passes"] == round(2 * sampling + updates + 2 * evaluation)
    looks = 11 * 256 * (64 * (200 + 128) + 128 * (200 + 256) + 256 * (200 + 512))
    tokens = (24 * sampling + 6 * updates * 4) * (200 + 256) + looks
    assert light["hours"] == pytest.approx(tokens / 1e4 / 3600)


def test_the_gpu_script_rehearses(capsys):
    gpu.main(["--device", "cpu"])
    said = capsys.readouterr().out
    exact, rounded = (max(map(float, line.split()[-2:])) for line in said.splitlines()[:2])
    assert exact < 1e-6 < rounded < 0.05
    assert said.count("| update | ") == said.count("| sampling | ") >= 2
    with pytest.raises(InputError, match="no CUDA"):
        torch.cuda.is_available() or gpu.main([])


if __name__ == "__main__":
    with wd1.one_sentence():
        globals()[sys.argv[1]](*json.loads(sys.argv[2]))
