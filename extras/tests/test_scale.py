"""Several processes, weights divided among them, and what a run is said to cost."""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rewards
import wd1
from extras.scale import fsdp, gpu, plan
from extras.tests.program import FAST, HERE, even_characters, few_problems, metrics
from rewards import InputError

# ------------------------------------------------------------------------------- several processes
QUICK = dict(FAST, model=str(FAST["model"]), eval_lengths=[8])
PARALLEL = dict(
    QUICK, batch_size=8, eval_every=0, temperature=1.0, likelihood="elbo", mc_samples=2,
    micro_batch_size=2,
)  # fmt: skip
DATA, LORA = {}, dict(lora_rank=2, beta=0.5)
SHARD = dict(beta=0.1, gradient_checkpointing=True)


def train_all(directory, runs):
    """Trains {name: options} in this process, alone or one of several; shard... divide weights."""
    lora = wd1.peft.LoraConfig

    def ending(*source, **options):
        """Half of the vocabulary is EOS: now and then a rank is done before the other."""
        model, tokenizer = load(*source, **options)
        model.config.eos_token_id = list(range(2, 66))
        return model, tokenizer

    def die(run, metrics):
        if run.path.name == "dies" and metrics["step"] == 1 and wd1.RANK == 1:
            os._exit(9)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.Sudoku, "problems", few_problems)
        patch.setattr(rewards.Sudoku, "reward", even_characters)
        patch.setattr(wd1, "plot", lambda path: None)
        without_dropout = lambda **options: lora(**options | dict(lora_dropout=0.0))
        patch.setattr(wd1.peft, "LoraConfig", without_dropout)  # its draws differ by rank
        for name, options in runs.items():
            files = dict(model=f"{directory}/config.json", output_dir=f"{directory}/{name}")
            config, given = wd1.Config(**PARALLEL | files | options), {}
            if name.startswith("shard"):
                alone = wd1.WORLD == 1
                given = dict(directory=fsdp.ShardedRun) if alone else fsdp.sharded(config)
            load = given.get("load", wd1.load_model)
            wd1.train(config, **given | dict(load=ending), watch=die)


def two_ranks(directory, runs):
    """train_all in two processes: their exit code and output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "extras.tests.test_scale", str(directory), json.dumps(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_two_processes_do_what_one_does(tmp_path):
    """The same weights in one process, in two, in two that divide them; LoRA, a reference, and
    activations computed again included. A run goes on in more processes, or in fewer."""
    plan.write_config(tmp_path, weight_tying=False)
    more, fewer = ({name: SHARD | dict(max_steps=1)} for name in ("shard-more", "shard-fewer"))
    again = dict(SHARD, resume=True)
    train_all(tmp_path, {"data-alone": DATA, "lora-alone": LORA, "shard-alone": SHARD, **more})
    two = {"data": DATA, "lora": LORA, "shard": SHARD, "shard-more": again, **fewer}
    code, output = two_ranks(tmp_path, two)
    assert code == 0, output
    train_all(tmp_path, {"shard-fewer": again})

    def weights(name):
        return dict(wd1.load_model(tmp_path / name)[0].named_parameters())

    for name in two:
        alone = f"{name.split('-')[0]}-alone"
        got, want = weights(f"{name}/model"), weights(f"{alone}/model")
        before = weights("config.json")
        assert got.keys() == want.keys()
        assert max((got[key] - want[key]).abs().max().item() for key in want) < 1e-5, name
        assert name == "lora" or not any(torch.equal(got[key], before[key]) for key in before)
        for one, other in zip(metrics(tmp_path / name), metrics(tmp_path / alone), strict=True):
            for key in one.keys() - {"forward_passes", "eval"}:
                assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), (name, key)


def test_a_lost_rank_is_noticed_and_one_process_goes_on(tmp_path):
    plan.write_config(tmp_path, weight_tying=False)
    code, output = two_ranks(tmp_path, {"dies": dict(max_steps=99, save_every=1)})
    assert code == 1 and "--resume goes on" in output, output
    train_all(tmp_path, {"dies": dict(max_steps=3, resume=True)})
    assert [line["step"] for line in metrics(tmp_path / "dies")] == [0, 1, 2, 3]


def test_what_cannot_be_divided_is_refused_in_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="torchrun"):
        fsdp.sharded(wd1.Config(**QUICK))
    monkeypatch.setattr(wd1, "WORLD", 2)
    with pytest.raises(InputError, match="--lora_rank 0"):
        fsdp.sharded(wd1.Config(**QUICK | dict(lora_rank=2)))
    config = wd1.Config(**QUICK)
    with pytest.raises(InputError, match="tied"):
        fsdp.sharded(config)["load"](config.model)


def test_what_a_full_disk_does_to_a_divided_checkpoint_is_an_error_of_the_system(tmp_path):
    config = wd1.Config(**QUICK | dict(output_dir=str(tmp_path / "run")))
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(OSError):
        fsdp.ShardedRun(config).write_tensors(tmp_path / "file", {"a": torch.ones(2)})
    with pytest.raises(OSError):
        fsdp.ShardedRun(config).read_tensors(tmp_path / "none", {"a": torch.ones(2)})


# ------------------------------------------------------------------------------------------- costs


MIDDLE = dict(
    d_model=512, n_layers=4, n_heads=8, n_kv_heads=8, mlp_hidden_size=1536, vocab_size=3952,
    embedding_size=3952, max_sequence_length=4096, weight_tying=False,
)  # fmt: skip


def used_gigabytes(options):
    """By how much a model, AdamW and gradient steps raise the memory of this process (Linux)."""
    config = wd1.Config(**options)

    def everything(source):
        model = wd1.load_model(source)[0]
        model = wd1.add_adapters(model, config.lora_rank, source) if config.lora_rank else model
        batch = gpu.random_batch(plan.PlanConfig(**options, prompt_length=17))
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        wd1.learn(model, torch.optim.AdamW(trained), batch, config)

    everything("tiny")  # what libraries load and set up once
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free is to be counted when used again
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    def status(name):
        [size] = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return 1024e-9 * int(size)

    before = status("VmRSS")
    everything(config.model)
    return status("VmHWM") - before


@pytest.mark.parametrize("rank", [0, 16])
def test_the_memory_that_a_run_is_said_to_take_is_what_it_takes(tmp_path, rank):
    """Within 15%, for a model of 18 million weights: counted on tensors without data, and read
    off a real process, which gives back at once what is freed, as a GPU's allocator counts."""
    size = dict(batch_size=12, micro_batch_size=6, num_generations=6, gen_length=128)
    options = QUICK | size | dict(lora_rank=rank, diffusion_steps=64)
    options |= dict(model=plan.write_config(tmp_path, **MIDDLE), num_iterations=2)
    estimate = plan.memory(plan.PlanConfig(**options, prompt_length=17))
    command = [sys.executable, "-m", "extras.tests.test_scale", json.dumps(options)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(estimate["in_all_GB"], rel=0.15)


def test_what_is_counted_follows_the_settings(tmp_path, capsys):
    words = ["--model", plan.write_config(tmp_path, weight_tying=False), "--device", "cuda"]
    plan.main([*words, "--gradient_checkpointing", "--tokens_per_second", "1e4"])
    light = json.loads(capsys.readouterr().out)
    plan.main([*words, "--lora_rank", "0", "--beta", "0.1", "--eval_every", "0"])
    full = json.loads(capsys.readouterr().out)
    assert light["update_GB"] < 0.7 * full["update_GB"] and light["hours"] > 0
    parameters = sum(weight.numel() for weight in wd1.load_model(words[1])[0].parameters())
    assert full["weights_GB"] == pytest.approx(2 * 4e-9 * parameters)  # a reference besides
    assert full["adam_GB"] == pytest.approx(8e-9 * parameters)
    assert full["sampling_passes_a_step"] == 2 * light["sampling_passes_a_step"] == 2 * 2 * 128
    assert light["update_passes_a_step"] == 8 * 8  # mu x micro-batches
    assert light["passes_an_evaluation"] == (64 + 128 + 256) * 11
    assert light["passes_in_all"] == 1000 * (256 + 64) + 11 * 448 * 11
    assert full["passes_in_all"] == 1000 * (512 + 64) + 2 * 448 * 11
    plan.main([*words, "--load_in_4bit"])
    assert json.loads(capsys.readouterr().out)["weights_GB"] < light["weights_GB"]


def test_the_gpu_script_rehearses(tmp_path):
    gpu.main(["--device", "cpu", "--out", str(tmp_path / "gpu.json")])
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["agreement"]["torch.float32"] == pytest.approx([0, 0, 1], abs=1e-6)
    assert max(result["agreement"]["torch.bfloat16"][:2]) < 0.05
    speeds = [speed for speed, _, _ in result["LoRA, checkpointing"].values()]
    assert len(speeds) == 2 and min(speeds) > 0
    with pytest.raises(InputError, match="no CUDA"):
        torch.cuda.is_available() or gpu.main(["--out", str(tmp_path / "gpu.json")])


if __name__ == "__main__":
    torch.set_num_threads(1)
    *directory, given = sys.argv[1:]
    if directory:
        with wd1.one_sentence():
            train_all(*directory, json.loads(given))
    else:
        print(used_gigabytes(json.loads(given)))
