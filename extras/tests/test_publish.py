"""What is trained, in others' hands: exports, against an independent forward pass; model cards."""

import json
import math
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import wd1
from extras.publish import card, export
from rewards import InputError
from test_wd1 import HERE, plain_forward, seeded, weight_shapes, write_checkpoint

FIGURES = {"accuracy": 0.25, "reward": 0.5, "lengths": {"8": {"accuracy": 0.25, "reward": 0.5}}, "problems": 48}
SUMMARY = {"before": FIGURES, "after": FIGURES, "steps": 3, "seconds": 5.0, "forward_passes": 70}
SIZES = {
    "": {}, "grouped heads": dict(n_kv_heads=2), "tied": dict(weight_tying=True),
    "tied, spare rows": dict(weight_tying=True, vocab_size=312),
}  # fmt: skip


def trained(directory, source, rank=0, **settings):
    """What a run leaves that had moved every weight of `source`, or adapters on it: its directory."""
    model, tokenizer = wd1.load_model(source)
    model = wd1.add_adapters(model, rank, source) if rank else model
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=seeded(0))
    options = dict(model=str(source), output_dir=str(directory), device="cpu", lora_rank=rank)
    run = wd1.RunDirectory(wd1.Config(**options, eval_lengths=[8], **settings))
    run.restore({}, None, {})
    run.record({"step": 1, "reward": 0.5, "eval": FIGURES})
    run.state |= SUMMARY
    run.write_json("summary.json", run.state)
    run.finish(model, tokenizer)
    run.lock.release(force=True)
    return directory


def ids_of(*shape):
    return torch.randint(0, 256, shape, generator=seeded(3))


def tensors_of(directory):
    return {n: tensor for file in directory.glob("*.safetensors") for n, tensor in load_file(file).items()}


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "LoRA"])
@pytest.mark.parametrize("size", SIZES)
def test_a_trained_llada_becomes_a_llada_again(tmp_path, size, rank):
    source, config, _ = write_checkpoint(tmp_path / "base", "llada", **SIZES[size])
    directory, out = trained(tmp_path / "run", source, rank), tmp_path / "made/out"
    export.main([str(directory), str(out), "--max_shard_size", "20KB"])
    assert not list(out.parent.glob("*.*")) and not list(out.glob("*.py"))
    made = json.loads((out / "config.json").read_text())
    assert made.pop("auto_map") == export.LLADA_8B["auto_map"]
    assert made == {name: value for name, value in config.items() if name != "auto_map"}
    tensors, index = tensors_of(out), json.loads((out / "model.safetensors.index.json").read_text())
    names = dict(weight_shapes(config).values())
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == names
    assert index["weight_map"].keys() == names.keys() and len(list(out.glob("*.safetensors"))) > 2
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    ids, (model, _), (again, _) = ids_of(2, 9), wd1.load_model(directory / "model"), wd1.load_model(out)
    want, close = wd1.predict_logits(model, ids), dict(atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(plain_forward(config, tensors, ids), want, **close)
    torch.testing.assert_close(wd1.predict_logits(again, ids), want, **close)
    assert (wd1.predict_logits(wd1.load_model(source)[0], ids) - want).abs().max() > 0.1


def test_an_export_keeps_the_type_of_the_weights_and_rounds_once(tmp_path):
    source, _, before = write_checkpoint(tmp_path / "base", "llada", torch.bfloat16)
    lora, full = trained(tmp_path / "lora", source, 2), trained(tmp_path / "full", source)
    for number, (run, options, dtype) in enumerate(
        [(lora, [], torch.bfloat16), (full, [], torch.float32), (full, ["--dtype", "bfloat16"], torch.bfloat16)]
    ):
        out = tmp_path / f"out{number}"
        export.main([str(run / "model"), str(out), *options])
        assert {tensor.dtype for tensor in tensors_of(out).values()} == {dtype}
        if run is lora:
            pair = load_file(lora / "model/adapter_model.safetensors")
            a, b = (pair[f"base_model.model.model.layers.1.mlp.up_proj.lora_{x}.weight"] for x in "AB")
            name = "model.transformer.blocks.1.up_proj.weight"
            want = before[name].float() + 0.5 * b.float() @ a.float()  # alpha / r = 1 / 2
            torch.testing.assert_close(tensors_of(out)[name], want.bfloat16(), atol=0, rtol=0.005)


def test_a_llada_without_its_base_gets_llada_8bs_settings(tmp_path, capsys):
    source, config, _ = write_checkpoint(tmp_path / "base", "llada")
    directory = trained(tmp_path / "run", source)
    shutil.rmtree(source)
    export.main([str(directory), str(tmp_path / "out")])
    assert "LLaDA-8B's settings" in capsys.readouterr().err
    made = json.loads((tmp_path / "out/config.json").read_text())
    assert made.pop("auto_map") and made == {n: v for n, v in config.items() if n != "auto_map"}
    wd1.load_model(tmp_path / "out")


def test_nobodys_code_is_named(tmp_path):
    theirs = {"AutoConfig": "stranger/repository--modeling.Config"}
    source, *_ = write_checkpoint(tmp_path / "base", "llada", auto_map=theirs)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["stranger/repository--tokenizer.T", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    export.main([str(source), str(tmp_path / "out")])
    assert not any("stranger" in file.read_text() for file in (tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize("family, rank", [("llada", 2), ("Dream", 2), ("a2d-qwen3", 0)])
def test_plain_transformers_and_peft_load_what_is_saved_and_exported(tmp_path, family, rank):
    source, *_ = write_checkpoint(tmp_path / "base", family)
    directory, ids = trained(tmp_path / "run", source, rank), ids_of(2, 7)
    model = wd1.load_model(directory / "model")[0]
    places = (torch.arange(7) - 1).clamp(min=0) if model.config.logit_shift else torch.arange(7)
    plainly = lambda model: model.eval()(ids, use_cache=False).logits[:, places]
    want, close = wd1.predict_logits(model, ids), dict(atol=1e-4, rtol=1e-4)
    for name, it in {"merged": directory, "plain": source}.items():
        export.main([str(it), str(tmp_path / name), "--format", "transformers"])
    torch.testing.assert_close(plainly(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), want, **close)
    if rank:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        torch.testing.assert_close(plainly(PeftModel.from_pretrained(base, directory / "model")), want, **close)


NO_LLADA = {  # what cannot be exported, and what is said
    "another class": (lambda d: write_checkpoint(d, "Dream"), "a Qwen2ForCausalLM; plain"),
    "shift": (lambda d: write_checkpoint(d, "a2d-llama", logit_shift=True), "logit_shift"),
    "head_dim": (lambda d: write_checkpoint(d, "a2d-llama", head_dim=16), "head_dim"),
    "rope": (lambda d: write_checkpoint(d, "a2d-llama", rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope"),
    "activation": (lambda d: write_checkpoint(d, "a2d-llama", hidden_act="gelu"), "hidden_act gelu"),
    "nothing": (lambda d: None, "no such directory"),
    "size": (lambda d: write_checkpoint(d, "llada"), "max_shard_size"),
}  # fmt: skip


@pytest.mark.parametrize("what", NO_LLADA)
def test_what_is_no_llada_is_refused_by_name_and_leaves_nothing(tmp_path, what):
    make, expected = NO_LLADA[what]
    make(tmp_path / "model")
    options = ["--max_shard_size", "no size"] if what == "size" else []
    with pytest.raises(InputError, match=expected):
        export.main([str(tmp_path / "model"), str(tmp_path / "out"), *options])
    assert not list(tmp_path.glob("out*"))


def test_an_export_never_touches_what_is_there(tmp_path):
    source, *_ = write_checkpoint(tmp_path / "base", "llada")
    for name in ("out", "out.unfinished"):
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match="is there already"):
            export.main([str(source), str(tmp_path / "out")])
        (tmp_path / name).rmdir()


def test_a_card_tells_the_numbers_of_its_run_and_no_name_breaks_it(tmp_path):
    source, *_ = write_checkpoint(tmp_path / "ba`se|\n---\nx: {{ 7*7 }}", "llada")
    directory = trained(tmp_path / "r`un: |x", source, 2)
    card.main([str(directory)])
    text = (directory / "model/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    results = {one["type"]: one["value"] for one in data["model-index"][0]["results"][0]["metrics"]}
    assert results == {name: FIGURES[name] for name in ("accuracy", "reward")}
    assert data["library_name"] == "peft" and not {"license", "base_model"} & data.keys()
    p = FIGURES["accuracy"]
    assert f"{p:.1%} ± {math.sqrt(p * (1 - p) / 48):.1%}" in body and "| lora_rank | 2 |" in body
    assert str(tmp_path) not in text and "49" not in body and "48 held-out problems" in body
    with pytest.raises(InputError, match="finished run"):
        card.main([str(HERE)])
