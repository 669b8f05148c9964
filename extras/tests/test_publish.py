"""What is trained, in others' hands: exports, against an independent forward pass; model cards."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import wd1
from extras.publish import card, export
from rewards import InputError
from test_wd1 import plain_forward, seeded, write_checkpoint

SUMMARY = {
    "before": {"lengths": {"8": {"accuracy": 0.0}}},
    "after": {
        "lengths": {"8": {"accuracy": 0.25}}, "accuracy": 0.25, "reward": 0.5, "problems": 48,
    },
    "steps": 3, "seconds": 5.0,
}  # fmt: skip
IDS = torch.randint(0, 256, (2, 9), generator=seeded(3))
THEIRS = {"AutoConfig": "stranger/repository--modeling.Config"}


def trained(source, rank):
    """The model of a run that moved every weight of the one in `source`, or adapters on it."""
    model, tokenizer = wd1.load_model(source)
    model = wd1.add_adapters(model, rank) if rank else model
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data += weight.requires_grad * 0.1 * torch.randn(weight.shape)
    made, config = source / "run/model", wd1.Config(model=str(source), lora_rank=rank)
    for part in model, tokenizer:
        part.save_pretrained(made, save_embedding_layers=False)
    for name, content in ("config", config.model_dump()), ("summary", SUMMARY):
        (made.parent / f"{name}.json").write_text(json.dumps(content))
    return made


def logits_of(model):
    return wd1.predict_logits(wd1.load_model(model)[0], IDS)


@pytest.mark.parametrize(
    "ranks, changes, dtype, close",  # of the runs, one after another; 0: all weights are trained
    [
        ([0], {}, "float32", 2e-4),
        ([2], dict(weight_tying=True, vocab_size=312), "float32", 2e-4),  # spare rows
        ([0, 2], dict(n_kv_heads=2), "bfloat16", 0.5),
    ],
)
def test_a_trained_llada_becomes_a_llada_again(tmp_path, ranks, changes, dtype, close):
    base, config, _ = write_checkpoint(tmp_path / "base", "llada", auto_map=THEIRS, **changes)
    tokenizer = {"auto_map": THEIRS, "eos_token": "<|endoftext|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    model, out = base, tmp_path / "made/out"
    for rank in ranks:
        model = trained(model, rank)
    export.main([str(model.parent), str(out), "--dtype", dtype])
    assert [*out.parent.iterdir()] == [out]
    assert not any("stranger" in file.read_text() for file in out.glob("*.json"))
    made = json.loads((out / "config.json").read_text())
    assert made == config | {"auto_map": export.AUTO_MAP, "torch_dtype": dtype}
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert "modeling_llada.py" in (out / "README.md").read_text()
    tensors, want = load_file(out / "model.safetensors"), logits_of(model)
    assert str(tensors["model.transformer.ln_f.weight"].dtype) == f"torch.{dtype}"
    for logits in plain_forward(config, tensors, IDS), logits_of(out):
        torch.testing.assert_close(logits, want, atol=close, rtol=1e-4)
    assert (logits_of(base) - want).abs().max() > 1


@pytest.mark.parametrize("family, shift", [("llada", 0), ("Dream", 1), ("a2d-qwen3", 0)])
def test_plain_transformers_loads_what_is_merged_and_peft_the_adapters(tmp_path, family, shift):
    base, *_ = write_checkpoint(tmp_path / "base", family)
    run, plain = trained(base, 2), []
    for source in base, run:
        export.main([str(source), f"{source}-plain", "--format", "transformers"])
        plain.append(AutoModelForCausalLM.from_pretrained(f"{source}-plain"))
    places = (torch.arange(9) - shift).clamp(min=0)
    for model in plain[1], PeftModel.from_pretrained(plain[0], run):
        logits = model(IDS, use_cache=False).logits[:, places]
        torch.testing.assert_close(logits, logits_of(run), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "there, family, sentence",
    [
        ("model", "Dream", "takes any model .*type Dream"),
        ("out", "llada", "out is there already"),
        ("model", "llada", "not tell enough for a model card"),
    ],
)
def test_an_export_is_whole_or_refused_and_leaves_nothing(tmp_path, there, family, sentence):
    write_checkpoint(tmp_path / there, family)
    (tmp_path / "summary.json").touch()
    before = {*tmp_path.iterdir()}
    with pytest.raises(InputError, match=sentence):
        export.main([f"{tmp_path}/model", f"{tmp_path}/out"])
    assert {*tmp_path.iterdir()} == before


def test_a_card_tells_the_numbers_of_its_run_and_no_name_breaks_it(tmp_path):
    source, *_ = write_checkpoint(tmp_path / "ba`se|\n---\nx: {{ 7*7 }}", "llada")
    model = trained(source, 2)
    card.main([str(model.parent)])
    made = ModelCard.load(model / "README.md")
    data = made.data
    assert [each.metric_value for each in data.eval_results] == [0.25, 0.5]
    assert (data.library_name, data.license, data.base_model) == ("peft", None, None)
    for told in (
        "| 8 | 0.0% ± 0.0% | 25.0% ± 6.2% |",  # the square root of 0.25 * 0.75 / 48
        '"lora_rank": 2', "after 3 steps", "On 48 held-out problems",
    ):  # fmt: skip
        assert told in made.text
    assert tmp_path.name not in made.content and "49" not in made.text
    with pytest.raises(InputError, match="finished run"):
        card.main([str(source)])
