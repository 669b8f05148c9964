"""Tests of wd1: properties first, each against an oracle that shares no code with what it checks.

The order is that of wd1.py: loading, sampling, likelihood, weights and losses, tasks, the program as a user runs it.
"""

import ast
import dataclasses
import importlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import select
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import rewards
import wd1
from extras import chat, chunks, compare, exercises, export, faults, fuzz, latex, pictures, track, tutorial, watch
from extras.card import model_card
from extras.health import advice, describe, self_check
from extras.latex import equivalent
from extras.settings import check_prompts
from rewards import TASKS, InputError

torch.set_num_threads(1)  # the models are tiny: more threads only get in each other's way
HERE = Path(__file__).parent
settings.register_profile(
    "wd1", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("wd1")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------- tiny checkpoints in real formats

LLADA = {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "activation_type": "silu", "alibi": False,
    "alibi_bias_max": 8.0, "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 32, "embedding_dropout": 0.0,
    "embedding_size": 320, "eos_token_id": 260, "flash_attention": False, "include_bias": False, "include_qkv_bias": False,
    "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False,
    "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": 261, "max_sequence_length": 4096,
    "mlp_hidden_size": 48, "mlp_ratio": 4, "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2,
    "pad_token_id": 260, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True,
    "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "transformers_version": "4.46.3",
    "use_cache": False, "vocab_size": 320, "weight_tying": False,
}  # fmt: skip
QWEN = {
    "attention_dropout": 0.0, "bos_token_id": 256, "eos_token_id": 260, "hidden_act": "silu", "hidden_size": 32,
    "initializer_range": 0.02, "intermediate_size": 48, "max_position_embeddings": 4096, "max_window_layers": 28,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2", "use_cache": True, "use_sliding_window": False, "vocab_size": 320, "pad_token_id": 260,
}  # fmt: skip
CONFIGS = {
    "llada": LLADA,
    "Dream": {**QWEN, "model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": 261,
              "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}},
    "a2d-qwen3": {**QWEN, "model_type": "a2d-qwen3", "head_dim": 16, "tie_word_embeddings": True,
                  "auto_map": {"AutoModelForMaskedLM": "modeling_qwen3.A2DQwen3LMHeadModel"}},
    "a2d-qwen2": {**QWEN, "model_type": "a2d-qwen2"},
    "a2d-llama": {**QWEN, "model_type": "a2d-llama"},
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def config_size(config):
    names = ("d_model", "mlp_hidden_size", "n_layers", "n_heads", "n_kv_heads", "rope_theta", "embedding_size")
    if config["model_type"] != "llada":
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "rope_theta", "vocab_size")  # fmt: skip
    return [config[name] for name in names]


def weight_shapes(config):
    """Plain names of this test -> (the checkpoint's own name, shape)."""
    hidden, mlp, layers, heads, kv_heads, _, vocab = config_size(config)
    head = config.get("head_dim") or hidden // heads
    sizes = {
        "q": (heads * head, hidden), "k": (kv_heads * head, hidden), "v": (kv_heads * head, hidden),
        "o": (hidden, heads * head), "gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp),
        "norm1": (hidden,), "norm2": (hidden,),
    }  # fmt: skip
    if config["model_type"] == "llada":
        outer = {"embed": "model.transformer.wte", "norm": "model.transformer.ln_f", "head": "model.transformer.ff_out"}
        block = "model.transformer.blocks.{}."
        inner = dict(q="q_proj", k="k_proj", v="v_proj", o="attn_out", gate="ff_proj", up="up_proj", down="ff_out",
                     norm1="attn_norm", norm2="ff_norm")  # fmt: skip
    else:
        outer = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
        block = "model.layers.{}."
        inner = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {f"{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")}
        inner |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
        if config["model_type"].endswith("qwen3"):
            sizes |= {"q_norm": (head,), "k_norm": (head,)}
            inner |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    shapes = {"embed": (outer["embed"] + ".weight", (vocab, hidden)), "norm": (outer["norm"] + ".weight", (hidden,))}
    if not config.get("tie_word_embeddings") and not config.get("weight_tying"):
        shapes["head"] = (outer["head"] + ".weight", (vocab, hidden))
    for layer in range(layers):
        for name, size in sizes.items():
            shapes[f"{layer}.{name}"] = (block.format(layer) + inner[name] + ".weight", size)
            if config["model_type"] in ("Dream", "a2d-qwen2") and name in "qkv":
                shapes[f"{layer}.{name}_bias"] = (block.format(layer) + inner[name] + ".bias", size[:1])
    return shapes


def write_checkpoint(directory, family, dtype=torch.float32, shards=2, **changes):
    """A random tiny checkpoint with the files a hub repository of the family has, remote code included."""
    config = {**CONFIGS[family], **changes}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    for module in ("configuration_llada", "modeling_llada", "configuration_dream", "modeling_dream", "modeling_qwen3",
                   "tokenization_dream"):  # fmt: skip
        (directory / f"{module}.py").write_text(f"open({str(directory / 'EXECUTED')!r}, 'w'); raise SystemExit('remote code')")
    torch.manual_seed(0)
    tensors = {}
    for name, size in weight_shapes(config).values():
        tensors[name] = (torch.rand(size) + 0.5 if "norm" in name or "ln_f" in name else torch.randn(size) * 0.3).to(dtype)
    names = list(tensors)
    index = {"metadata": {}, "weight_map": {}}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        save_file({name: tensors[name] for name in names[shard::shards]}, directory / file, {"format": "pt"})
        index["weight_map"] |= {name: file for name in names[shard::shards]}
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(directory, family)
    return directory, config, tensors


def write_tokenizer(directory, family):
    """A byte-level BPE: 256 bytes, a few merges, special tokens and a chat template; Dream's as vocab.json + merges.txt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "n"), ("t", "h"), ("th", "e"), ("i", "n")]
    vocab = {char: i for i, char in enumerate(alphabet)}
    special = ["<|endoftext|>", "<|mask|>", "<|start|>", "<|end|>"]
    vocab_bpe = vocab | {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    settings = {
        "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE,
        "added_tokens_decoder": {
            str(260 + i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                           "special": True} for i, token in enumerate(special)
        },
    }  # fmt: skip
    settings["mask_token"] = "<|mask|>"
    if family == "Dream":
        settings |= {"tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
        (directory / "vocab.json").write_text(json.dumps(vocab_bpe))
        (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    else:
        core = Tokenizer(models.BPE(vocab | dict(zip(special, range(260, 264))) | vocab_bpe, merges))
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        core.add_special_tokens([AddedToken(token, special=True) for token in special])
        core.save(str(directory / "tokenizer.json"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def plain_forward(config, tensors, ids, real=None, memory=None, window=None):
    """The oracle: a bidirectional transformer in plain torch, one row at a time, padding simply cut away. [B, T, V].

    memory: a dict that remembers keys and values; with a window (first, last + 1), those outside it are the remembered ones.
    """
    hidden, _, layers, heads, kv_heads, theta, vocab = config_size(config)
    w = {plain: tensors[name].float() for plain, (name, _) in weight_shapes(config).items()}
    head = config.get("head_dim") or hidden // heads

    def rms(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight

    def rotate(x):  # [T, heads, head]
        angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(0, head, 2) / head)  # [T, head / 2]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., : head // 2], x[..., head // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    out = torch.zeros(*ids.shape, vocab)
    for row, tokens in enumerate(ids):
        keep = torch.ones(len(tokens), dtype=torch.bool) if real is None else real[row].bool()
        x = w["embed"][tokens[keep]]
        for layer in range(layers):
            get = lambda name: w[f"{layer}.{name}"]  # noqa: B023, E731
            h = rms(x, get("norm1"))
            q, k, v = (h @ get(name).T + w.get(f"{layer}.{name}_bias", 0) for name in "qkv")
            q, k, v = q.view(-1, heads, head), k.view(-1, kv_heads, head), v.view(-1, kv_heads, head)
            if f"{layer}.q_norm" in w:
                q, k = rms(q, get("q_norm")), rms(k, get("k_norm"))
            q, k = rotate(q), rotate(k)
            if memory is not None:
                if window:
                    old = torch.ones(len(tokens), dtype=torch.bool)
                    old[window[0] : window[1]] = False
                    old = old[keep]
                    k, v = (torch.where(old[:, None, None], was, now) for was, now in zip(memory[row, layer], (k, v)))
                else:
                    memory[row, layer] = k, v
            mixed = torch.zeros(len(x), heads, head)
            for i in range(heads):
                j = i * kv_heads // heads
                mixed[:, i] = (q[:, i] @ k[:, j].T / head**0.5).softmax(-1) @ v[:, j]
            x = x + mixed.flatten(1) @ get("o").T
            h = rms(x, get("norm2"))
            x = x + (F.silu(h @ get("gate").T) * (h @ get("up").T)) @ get("down").T
        out[row, keep] = rms(x, w["norm"]) @ w.get("head", w["embed"]).T
    return out


# --------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_checkpoints_give_the_logits_of_an_independent_forward_pass(tmp_path, family, dtype):
    directory, config, tensors = write_checkpoint(tmp_path / "model", family, dtype)
    model, tokenizer = wd1.load_model(directory)
    assert not (directory / "EXECUTED").exists()
    assert model.config.mask_token_id == 261 and model.config.logit_shift is (family == "Dream")
    assert tokenizer.decode(tokenizer("in the land").input_ids) == "in the land"
    ids = torch.randint(0, 256, (3, 9), generator=seeded(1))
    ids[:, 5:] = 261
    real = torch.ones(3, 9)
    real[1, :2] = real[2, :4] = 0
    want = plain_forward(config, tensors, ids, real)
    if model.config.logit_shift:
        want = torch.cat([want[:, :1], want[:, :-1]], 1)
    got = wd1.predict_logits(model, ids, real[:, :5])  # columns beyond the mask are real
    first = real.argmax(1)
    for row in range(3):
        start = first[row] + model.config.logit_shift * (row > 0)  # nothing predicts a padded row's first token when shifted
        torch.testing.assert_close(got[row, start:], want[row, start:], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(wd1.predict_logits(model, ids[:1]), want[:1], atol=2e-4, rtol=1e-4)
    columns = torch.tensor([6, 8])
    torch.testing.assert_close(wd1.predict_logits(model, ids, real, columns), got[:, columns])
    by_row = torch.tensor([[6, 8], [5, 6], [7, 5]])
    rows = torch.stack([got[i, by_row[i]] for i in range(3)])
    torch.testing.assert_close(wd1.predict_logits(model, ids, real, by_row), rows)


@pytest.mark.parametrize("family", ["llada", "Dream", "a2d-qwen3"])
def test_what_the_project_saves_loads_again_here_and_in_plain_transformers(tmp_path, family):
    directory, *_ = write_checkpoint(tmp_path / "model", family)
    model, tokenizer = wd1.load_model(directory)
    ids = torch.randint(0, 256, (2, 7), generator=seeded(0))
    want = wd1.predict_logits(model, ids)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, tokenizer_again = wd1.load_model(tmp_path / "saved")
    assert again.config.mask_token_id == 261 and again.config.logit_shift == model.config.logit_shift
    assert tokenizer_again("the <|mask|>").input_ids == tokenizer("the <|mask|>").input_ids
    torch.testing.assert_close(wd1.predict_logits(again, ids), want)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    positions = (torch.arange(7) - 1).clamp(min=0) if model.config.logit_shift else torch.arange(7)
    torch.testing.assert_close(plain(ids).logits[:, positions], want)


def test_random_weights_come_from_a_config_and_its_seed():
    (a, tokenizer), (b, _), (c, _) = wd1.load_model("tiny"), wd1.load_model(HERE / "tiny_config.json"), wd1.load_model("tiny", seed=1)
    weights = [dict(model.named_parameters()) for model in (a, b, c)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["lm_head.weight"] if "lm_head.weight" in weights[0] else weights[0]["model.embed_tokens.weight"],
                           weights[2]["model.embed_tokens.weight"])  # fmt: skip
    for task in TASKS.values():
        text = task.instruction + "0123 (1+2)/3\n<reasoning></reasoning><answer>x</answer>"
        ids = tokenizer(text).input_ids
        assert ids.count(tokenizer.unk_token_id) == 0 and tokenizer.decode(ids) == text and len(ids) < 30


def damage(directory, **changes):
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


def rename_weight(directory):
    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors["stray"] = tensors.pop(name)
    save_file(tensors, file, {"format": "pt"})
    for index in directory.glob("*.index.json"):
        index.write_text(index.read_text().replace(name, "stray"))


BROKEN = {
    "alibi": (lambda d: damage(d, alibi=True), "alibi = True"),
    "layer norm": (lambda d: damage(d, layer_norm_type="low_precision"), "layer_norm_type"),
    "block": (lambda d: damage(d, block_type="sequential"), "block_type"),
    "activation": (lambda d: damage(d, activation_type="swiglu"), "activation_type"),
    "q/k norms": (lambda d: damage(d, attention_layer_norm=True), "attention_layer_norm"),
    "biases": (lambda d: damage(d, include_qkv_bias=True), "include_qkv_bias"),
    "unknown family": (lambda d: damage(d, model_type="bert"), "model_type 'bert' is not supported"),
    "autoregressive": (lambda d: damage(d, model_type="llama"), "autoregressive"),
    "heads": (lambda d: damage(d, n_heads=5, n_kv_heads=5), "not a valid config"),
    "type": (lambda d: damage(d, d_model="wide"), "not a valid config"),
    "config": (lambda d: (d / "config.json").write_text("[1"), "not a model config"),
    "no config": (lambda d: (d / "config.json").unlink(), "not a model config"),
    "renamed weight": (rename_weight, "weights are"),
    "shape": (lambda d: damage(d, mlp_hidden_size=64), "weights"),
    "a layer more": (lambda d: damage(d, n_layers=3), "weights are missing"),
    "a layer less": (lambda d: damage(d, n_layers=1), "weights are unexpected"),
    "no weights": (lambda d: [f.unlink() for f in d.glob("*.safetensors*")], "weights cannot be loaded"),
    "only pickles": (
        lambda d: [f.unlink() for f in d.glob("*.safetensors*")] and torch.save({}, d / "pytorch_model.bin"), "weights cannot be loaded"
    ),
    "truncated": (lambda d: [os.truncate(f, 300) for f in d.glob("*.safetensors")], "weights cannot be loaded"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no readable tokenizer.json"),
    "mask out of range": (lambda d: damage(d, mask_token_id=9999), "no mask token"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_loaded_faithfully_gets_one_sentence(tmp_path, what):
    directory, *_ = write_checkpoint(tmp_path / "model", "llada")
    break_it, expected = BROKEN[what]
    break_it(directory)
    with pytest.raises(InputError, match=expected) as raised:
        wd1.load_model(directory)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400 + len(str(directory))


def test_a_model_needs_a_mask_token_and_a_place(tmp_path):
    directory, *_ = write_checkpoint(tmp_path / "model", "a2d-qwen2")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        text = (directory / name).read_text()
        settings = json.loads(text)
        settings.pop("mask_token", None)
        (directory / name).write_text(json.dumps(settings))
    with pytest.raises(InputError, match="no mask token"):
        wd1.load_model(directory)
    for source in ("nowhere/at/all", str(tmp_path / "none.json"), "-", str(HERE / "README.md"), "~nobody-here/x", "x" * 5000):
        with pytest.raises(InputError, match="no such directory|not a path"):
            wd1.load_model(source)


@pytest.mark.parametrize(
    "changes, expected",
    [(dict(mask_token_id=None), "no mask token"), (dict(eos_token_id=None), "no mask token"), (dict(model_type=["llada"]), "not supported"),
     (dict(d_model=-4), "not a valid config"), (dict(pad_token_id=9999), "not a valid config"), (dict(n_kv_heads=3), "not a valid config")],
    ids=str,
)  # fmt: skip
def test_bad_configs_for_random_weights(tmp_path, changes, expected):
    config = json.loads((HERE / "tiny_config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=expected):
        wd1.load_model(tmp_path / "config.json")


def test_adapters_must_fit_their_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    base, *_ = write_checkpoint(tmp_path / "base", "llada")
    model = get_peft_model(wd1.load_model(base)[0], LoraConfig(r=2, target_modules="all-linear"))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "lora")
    wd1.load_model(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name.replace("self_attn.", ""): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match="other names"):
        wd1.load_model(tmp_path / "lora")


# -------------------------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def model():
    """A tiny random model with strong opinions, 14 tokens, mask 1, EOS 0."""
    return small_model()


def small_model(seed=0, **changes):
    config = json.loads((HERE / "tiny_config.json").read_text())
    config |= dict(d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, mlp_hidden_size=24, vocab_size=14, embedding_size=14)
    model, _ = load_dict({**config, **changes})
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0, 0.5)
    return model


def load_dict(config):
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        return wd1.load_model(Path(directory) / "config.json")


def prompts(rows=2, length=4, seed=0):
    return torch.randint(2, 14, (rows, length), generator=seeded(seed))


@st.composite
def schedules(draw):
    blocks, block_length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return dict(
        gen_length=blocks * block_length, block_length=block_length, steps=draw(st.integers(blocks, blocks * block_length))
    )


@given(schedules())
def test_the_schedule_writes_each_block_in_its_own_steps(schedule):
    plan = wd1.unmasking_schedule(**schedule)
    per_block = dict(plan)
    assert sum(map(len, per_block.values())) == schedule["steps"] and all(min(counts) >= 1 for counts in per_block.values())
    assert list(per_block) == list(range(0, schedule["gen_length"], schedule["block_length"]))  # left to right
    for counts in per_block.values():
        assert sum(counts) == schedule["block_length"] and counts == sorted(counts, reverse=True)
        assert max(counts) - min(counts) <= 1
    steps = [len(counts) for counts in per_block.values()]
    assert max(steps) - min(steps) <= 1


@given(
    schedules(), st.sampled_from(["low_confidence", "random"]), st.sampled_from([0.0, 0.7, 1.5]), st.sampled_from([0.0, 1.0]),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_generate_keeps_its_promises(model, schedule, remasking, temperature, cfg_scale, trajectory, seed):
    prompt = prompts()
    before = prompt.clone()
    options = dict(remasking=remasking, temperature=temperature, cfg_scale=cfg_scale, trajectory=trajectory, **schedule)
    rollout = wd1.generate(model, prompt, generator=seeded(seed), **options)
    assert torch.equal(prompt, before)
    completion, written_at = rollout.completion, rollout.written_at
    assert completion.shape == written_at.shape == (2, schedule["gen_length"]) and completion.dtype == torch.long
    assert not (completion == 1).any(), "the mask token was written"
    plan = [(start, count) for start, counts in wd1.unmasking_schedule(**schedule) for count in counts]
    for step, (start, count) in enumerate(plan):
        written, going = written_at == step, step < rollout.steps
        assert (written.sum(1) == count * going).all(), "exactly the scheduled number of tokens in a step"
        done = (completion[:, :start] == 0).any(1) if start else torch.zeros(2, dtype=torch.bool)
        assert torch.equal(going, ~done), "a row is done when a finished block holds an EOS"
        outside = torch.ones_like(written)
        outside[:, start : start + schedule["block_length"]] = False
        assert not (written & outside).any(), "and only in the current block"
    again = wd1.generate(model, prompt, generator=seeded(seed), **options)
    assert torch.equal(again.completion, completion), "a seed fixes everything"
    if temperature == 0 and remasking == "low_confidence":
        other = wd1.generate(model, prompt, generator=seeded(seed + 1), **options)
        assert torch.equal(other.completion, completion), "temperature 0 is deterministic"
    if trajectory:
        steps = torch.arange(schedule["steps"])[None, :, None]
        assert (rollout.guesses != 1).all()
        known = written_at[:, None] < steps
        final = completion[:, None].expand_as(rollout.guesses)
        assert torch.equal(rollout.guesses[known], final[known]), "what is written stays"
        unwritten = completion[written_at == schedule["steps"]]
        assert (unwritten == 0).all(), "what is right of a finished row is EOS"
        just = written_at[:, None] == steps
        assert torch.equal(rollout.guesses[just], final[just]), "what is written is the guess"


def plain_generate(model, prompt, gen_length, steps, block_length, threshold=1.0):
    """The oracle: greedy sampling of one row, token by token and step by step, with Python loops."""
    [row] = prompt.tolist()
    canvas, blocks = row + [1] * gen_length, gen_length // block_length
    for block in range(blocks):
        start = len(row) + block * block_length
        own_steps = steps // blocks + (block < steps % blocks)
        for step in range(own_steps):
            count = block_length // own_steps + (step < block_length % own_steps)
            logits = model(torch.tensor([canvas])).logits[0].double()
            logits[:, 1] = -math.inf
            probability = logits.softmax(-1)
            open_positions = [i for i in range(start, start + block_length) if canvas[i] == 1]
            best = sorted(open_positions, key=lambda i: -probability[i].max())[:count]  # noqa: B023
            for i in {*best, *(i for i in open_positions if probability[i].max() > threshold)}:
                canvas[i] = int(probability[i].argmax())
    return canvas[len(row) :]


def until_block_end(row, block_length):
    """What can matter of a completion: all up to the end of the block of its first EOS, then EOS."""
    end = (row.index(0) // block_length + 1) * block_length if 0 in row else len(row)
    return row[:end] + [0] * (len(row) - end)


@given(schedules(), st.integers(0, 9))
def test_greedy_sampling_equals_a_plain_loop(model, schedule, seed):
    prompt = prompts(rows=3, seed=seed)
    got = wd1.generate(model, prompt, **schedule).completion.tolist()
    assert got == [until_block_end(plain_generate(model, row[None], **schedule), schedule["block_length"]) for row in prompt]


@given(schedules(), st.integers(0, 9), st.sampled_from([0.2, 0.5, 0.9]), st.booleans())
def test_a_threshold_writes_all_that_pass_it(model, schedule, seed, threshold, trajectory):
    prompt = prompts(rows=3, seed=seed)
    rollout = wd1.generate(model, prompt, **schedule, threshold=threshold, trajectory=trajectory)
    plain = [plain_generate(model, row[None], **schedule, threshold=threshold) for row in prompt]
    assert rollout.completion.tolist() == [until_block_end(row, schedule["block_length"]) for row in plain]
    exact = wd1.generate(model, prompt, **schedule)
    assert (rollout.steps <= schedule["steps"]).all() and exact.steps.max() <= schedule["steps"]
    for row in range(3):  # whoever wrote a token was a step that took place
        written = rollout.written_at[row][rollout.written_at[row] < schedule["steps"]]
        assert written.max() < rollout.steps[row] and (rollout.steps[row] == rollout.steps.max() or 0 in plain[row])
    if trajectory:
        known = rollout.written_at[:, None] < torch.arange(schedule["steps"])[None, :, None]
        assert (rollout.guesses != 1).all() and torch.equal(
            rollout.guesses[known], rollout.completion[:, None].expand_as(known)[known]
        )


def test_only_what_can_be_written_is_computed(model):
    """The head sees the masked tokens of the block, and a row that is done is not run at all."""
    heads, rows = [], []
    hooks = [model.lm_head.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0].shape[:2].numel())),
             model.model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))]  # fmt: skip
    prompt = prompts(rows=40)
    rollout = wd1.generate(model, prompt, gen_length=12, steps=6, block_length=4, temperature=1.5, generator=seeded(0))
    for hook in hooks:
        hook.remove()
    ended = (rollout.completion == 0).view(40, 3, 4).any(2).cumsum(1) > 0  # [rows, blocks]: an EOS in it or before
    live = [40, int((~ended[:, 0]).sum()), int((~ended[:, 1]).sum())]
    assert 0 < live[2] < live[1] < 40
    assert rows == [n for n in live for _ in range(2)] and heads == [n * masked for n in live for masked in (4, 2)]
    assert torch.equal(rollout.steps, 2 + 2 * (~ended[:, :2]).sum(1))


CACHE_OPTIONS = [dict(), dict(cfg_scale=1.0), dict(reference_weight=0.5), dict(temperature=1.0), dict(threshold=0.5), dict(trajectory=True)]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("options", CACHE_OPTIONS, ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_a_cache_renewed_at_every_step_changes_nothing(model, monkeypatch, cache, options, shift):
    monkeypatch.setattr(model.config, "logit_shift", shift)
    padded, mask = F.pad(prompts(rows=3), (2, 0), value=0), F.pad(torch.ones(3, 4), (2, 0))
    mask[1, :4] = 0
    options = dict(gen_length=6, steps=4, block_length=6, attention_mask=mask, reference=small_model(seed=1), **options)
    exact = wd1.generate(model, padded, generator=seeded(0), **options)
    cached = wd1.generate(model, padded, generator=seeded(0), **options, cache=cache, refresh_every=1)
    assert torch.equal(exact.completion, cached.completion) and torch.equal(exact.written_at, cached.written_at)


@pytest.mark.parametrize("family", ["llada", "Dream", "a2d-qwen3"])
@pytest.mark.parametrize("window", [(5, 7), (5, 9), (2, 4)])
def test_cached_keys_and_values_are_those_of_the_earlier_canvas(tmp_path, family, window):
    """Against plain attention, in which the columns outside the window keep the keys and values of another canvas."""
    directory, config, tensors = write_checkpoint(tmp_path / "model", family)
    model, _ = wd1.load_model(directory)
    before, after = torch.randint(0, 256, (2, 3, 9), generator=seeded(0))
    real = torch.ones(3, 9)
    real[1, :2] = real[2, :1] = 0
    memory, cache = {}, wd1.KeyValueCache(window)
    shift = int(model.config.logit_shift)
    positions = torch.arange(window[0] + shift, window[1])
    read_at = positions - shift
    want = plain_forward(config, tensors, before, real, memory)[:, read_at]
    torch.testing.assert_close(wd1.predict_logits(model, before, real, positions, cache), want, atol=2e-4, rtol=1e-4)
    for _ in range(2):  # the cache itself does not change
        want = plain_forward(config, tensors, after, real, memory, window)[:, read_at]
        got = wd1.predict_logits(model, after, real, positions, cache)
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
        after = after.flip(1)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_cached_guesses_are_those_of_the_columns_they_stand_at(model, cache):
    """With one step a block every pass is a first one, and exact: so are the guesses right of the block."""
    options = dict(gen_length=12, steps=3, block_length=4, trajectory=True)
    exact, cached = (wd1.generate(model, prompts(rows=9), **options, cache=name) for name in ("none", cache))
    assert torch.equal(exact.guesses, cached.guesses)
    options |= dict(steps=6)
    exact, cached = (wd1.generate(model, prompts(rows=40), **options, cache=name) for name in ("none", cache))
    assert (exact.guesses == cached.guesses).float().mean() > 0.8  # stale keys change some


@pytest.mark.parametrize("options", [dict(cache="prefix"), dict(cache="dual"), dict(cache="dual", threshold=0.4)], ids=str)
def test_a_cache_never_leaks_between_prompts(model, options):
    prompt = prompts(rows=60)
    options = dict(gen_length=16, steps=8, block_length=8, **options)
    together = wd1.generate(model, prompt, **options).completion
    for row in (2, 0, 1, 3, 0):
        assert torch.equal(wd1.generate(model, prompt[row : row + 1], **options).completion, together[row : row + 1])
    assert not torch.equal(together, wd1.generate(model, prompt, **{**options, "cache": "none", "threshold": 1.0}).completion)


@given(st.integers(1, 5), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.5]))
def test_a_row_does_not_depend_on_its_padding(model, padding, temperature, cfg_scale):
    prompt = prompts(rows=2)
    padded, mask = F.pad(prompt, (padding, 0), value=0), F.pad(torch.ones_like(prompt), (padding, 0))
    options = dict(gen_length=6, steps=3, block_length=3, temperature=temperature, cfg_scale=cfg_scale)
    plain = wd1.generate(model, prompt, generator=seeded(0), **options)
    shifted = wd1.generate(model, padded, attention_mask=mask, generator=seeded(0), **options)
    assert torch.equal(plain.completion, shifted.completion)


def test_sampling_follows_the_models_distribution(model):
    """One token, temperature tau: frequencies against softmax(logits / tau), by a chi-squared bound."""
    prompt, draws = prompts(rows=1).repeat(20_000, 1), 20_000
    logits = wd1.predict_logits(model, F.pad(prompt[:1], (0, 1), value=1))[0, -1].detach()
    logits[1] = -math.inf
    for temperature in (0.5, 1.0, 2.0):
        rollout = wd1.generate(
            model, prompt, gen_length=1, steps=1, block_length=1, temperature=temperature, generator=seeded(3), trajectory=True
        )
        expected = (logits / temperature).softmax(-1) * draws
        counts = torch.bincount(rollout.completion[:, 0], minlength=14).float()
        seen = expected > 0
        assert counts[~seen].sum() == 0
        assert (((counts - expected) ** 2)[seen] / expected[seen]).sum() < 40  # 12 degrees of freedom: p < 1e-4
        # Confidence is the probability at temperature 1, whatever the sampling temperature.
        want = logits.softmax(-1)[rollout.completion[:, 0]]
        torch.testing.assert_close(rollout.confidence[:, 0, 0], want)


def test_guidance_and_mixture_change_the_logits_as_the_formulas_say(model):
    """With L = 1 the greedy token is the argmax of the combined logits, computed here."""
    other = small_model(seed=1)
    for seed in range(20):
        prompt = prompts(rows=1, seed=seed)
        canvas = F.pad(prompt, (0, 1), value=1)
        c, r = (wd1.predict_logits(m, canvas)[0, -1] for m in (model, other))
        u = wd1.predict_logits(model, torch.ones_like(canvas))[0, -1]
        for want, options in [
            (u + 2.5 * (c - u), dict(cfg_scale=1.5)),
            (0.3 * c + 0.7 * r, dict(reference=other, reference_weight=0.7)),
            (r, dict(reference=other, reference_weight=1.0)),
        ]:
            want[1] = -math.inf
            got = wd1.generate(model, prompt, gen_length=1, steps=1, block_length=1, **options).completion
            assert got.item() == want.argmax().item()


@pytest.mark.parametrize(
    "options",
    [dict(gen_length=10, block_length=4, steps=5), dict(gen_length=8, block_length=4, steps=1), dict(remasking="best"),
     dict(gen_length=8, block_length=4, steps=9), dict(gen_length=8, block_length=0, steps=4), dict(gen_length=0), dict(cache="all")],
)  # fmt: skip
def test_impossible_schedules_are_refused_in_words(model, options):
    with pytest.raises(InputError, match="gen_length|denoising steps|remasking|cache"):
        wd1.generate(model, prompts(), **{**dict(gen_length=8, block_length=4, steps=4), **options})


# ------------------------------------------------------------------------------------------------------ likelihood


def log_prob(model, prompt, completion, shown, i, length):
    """log p(o_i | q, the shown tokens), everything else masked: one row, plainly."""
    canvas = prompt + [completion[j] if j in shown else 1 for j in range(length)]
    logits = model(torch.tensor([canvas])).logits[0, len(prompt) + i]
    return logits.log_softmax(-1)[completion[i]].item()


def exact_elbo(model, prompt, completion, counted):
    """Sum over all non-empty subsets S of the first `counted` tokens, each with weight 1 / (l C(L, l))."""
    total, everything = 0.0, range(counted)
    for size in range(1, counted + 1):
        for subset in itertools.combinations(everything, size):
            shown = set(everything) - set(subset)
            part = sum(log_prob(model, prompt, completion, shown, i, len(completion)) for i in subset)
            total += part / (size * math.comb(counted, size))
    return total


def chain_rule(model, prompt, completion, counted):
    """The log-likelihood of each of the L! orders."""
    values = []
    for order in itertools.permutations(range(counted)):
        values.append(sum(log_prob(model, prompt, completion, set(order[:n]), i, len(completion)) for n, i in enumerate(order)))
    return values


EOS_CASES = {"no eos": ([5, 2, 9, 3], 4), "eos last": ([5, 2, 9, 0], 4), "eos inside": ([5, 2, 0, 7], 3), "eos first": ([0, 4, 0, 7], 1)}
OPTIONS = {
    "plain": dict(mc_samples=1), "4 samples": dict(mc_samples=4, stratified=False), "stratified": dict(mc_samples=4),
    "complementary": dict(mc_samples=2, complementary=True), "both": dict(mc_samples=4, complementary=True),
    "shared": dict(mc_samples=2, group_size=4), "all": dict(mc_samples=4, complementary=True, group_size=4),
}  # fmt: skip


@pytest.mark.parametrize("case", EOS_CASES)
def test_the_elbo_is_the_mean_over_orders_and_below_the_log_of_the_mean(model, case):
    completion, counted = EOS_CASES[case]
    with torch.no_grad():
        exact, orders = exact_elbo(model, [3, 8], completion, counted), chain_rule(model, [3, 8], completion, counted)
    assert exact == pytest.approx(sum(orders) / len(orders), abs=1e-4)
    assert exact <= torch.tensor(orders).logsumexp(0).item() - math.log(len(orders)) + 1e-5


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", EOS_CASES)
def test_the_monte_carlo_elbo_is_unbiased(model, case, options):
    completion, counted = EOS_CASES[case]
    rows = 8_000
    with torch.no_grad():
        exact = exact_elbo(model, [3, 8], completion, counted)
        prompt, batch = torch.tensor([[3, 8]]).repeat(rows, 1), torch.tensor([completion]).repeat(rows, 1)
        values = wd1.elbo(model, prompt, batch, generator=seeded(0), **OPTIONS[options]).double()
    independent = values.view(-1, OPTIONS[options].get("group_size", 1)).mean(1)
    error = independent.std() / len(independent) ** 0.5
    assert abs(values.mean() - exact) < 4 * error + 1e-4
    assert error < 0.1, "the test would notice a bias"


@given(st.lists(st.integers(2, 13), min_size=1, max_size=5), st.integers(0, 999))
def test_the_exact_elbo_by_quadrature_over_all_noise(model, completion, seed):
    """Every subset with the weight that the method gives it (METHOD: 1 / (l C(L, l))): the formula, not the code that draws."""
    length = len(completion)
    prompt = prompts(rows=1, length=3, seed=seed)
    total = 0.0
    with torch.no_grad():
        for size in range(1, length + 1):
            for subset in itertools.combinations(range(length), size):
                hidden = torch.zeros(1, 3 + length, dtype=torch.bool)
                weight = torch.zeros(1, length)
                hidden[0, [3 + i for i in subset]] = True
                weight[0, list(subset)] = 1 / (size * math.comb(length, size))
                view = wd1.View(hidden, torch.tensor([completion]), weight)
                total += wd1.log_likelihood(model, prompt, [view]).item()
        assert total == pytest.approx(exact_elbo(model, prompt[0].tolist(), completion, length), abs=1e-4)


def test_what_follows_the_eos_changes_no_estimate(model):
    prompt = prompts(rows=1)
    a, b = torch.tensor([[5, 0, 7, 7]]), torch.tensor([[5, 0, 2, 0]])
    for estimate in (wd1.elbo, wd1.one_step_log_likelihood):
        torch.testing.assert_close(
            estimate(model, prompt, a, generator=seeded(0)), estimate(model, prompt, b, generator=seeded(0))
        )
    assert wd1.until_eos(torch.tensor([[5, 0, 0, 3], [4, 4, 4, 4], [6, 9, 4, 0]]), [0, 9]).tolist() == [
        [True, True, False, False], [True] * 4, [True, True, False, False],
    ]  # fmt: skip


@given(st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99), st.sampled_from([1, 2]))
def test_one_step_is_the_sum_of_independent_predictions(model, prompt_mask_prob, seed, group_size):
    prompt, completion = prompts(rows=2, seed=seed), torch.tensor([[5, 2, 0, 7], [3, 3, 4, 8]])
    got = wd1.one_step_log_likelihood(
        model, prompt, completion, prompt_mask_prob=prompt_mask_prob, generator=seeded(seed), group_size=group_size
    )
    noise = torch.rand(2 // group_size, 4, generator=seeded(seed)).repeat_interleave(group_size, 0)
    for row, counted in enumerate((3, 4)):
        seen = [1 if noise[row, i] < prompt_mask_prob else token for i, token in enumerate(prompt[row].tolist())]
        want = sum(log_prob(model, seen, completion[row].tolist(), set(), i, 4) for i in range(counted))
        assert got[row].item() == pytest.approx(want, abs=1e-4)


@given(schedules(), st.integers(0, 99))
def test_the_trajectory_estimate_is_the_probability_of_the_path(model, schedule, seed):
    """Replayed step by step: each token's probability on the canvas it was written on. Random subsets are unbiased."""
    prompt = prompts(rows=1, seed=seed)
    rollout = wd1.generate(model, prompt, temperature=1.0, generator=seeded(seed), **schedule)
    [completion], [written_at], steps = rollout.completion.tolist(), rollout.written_at.tolist(), rollout.steps.item()
    counted = completion.index(0) + 1 if 0 in completion else len(completion)
    want = 0.0
    for step in range(steps):
        shown = {i for i, when in enumerate(written_at) if when < step}
        for i, when in enumerate(written_at):
            if when == step and i < counted:
                want += log_prob(model, prompt[0].tolist(), completion, shown, i, len(completion))
    one = [wd1.log_likelihood(model, prompt, wd1.path_views(model.config, rollout, [step])).item() for step in range(steps)]
    whole = wd1.log_likelihood(model, prompt, wd1.path_views(model.config, rollout, range(steps))).item()
    assert whole == pytest.approx(want, abs=1e-3) and sum(one) / steps == pytest.approx(want, abs=1e-3)


def test_wd1_plus_plus_scores_the_full_guess_at_each_step(model):
    prompt = prompts(rows=2)
    rollout = wd1.generate(
        model, prompt, gen_length=6, steps=3, block_length=6, temperature=1.0, generator=seeded(5), trajectory=True
    )
    for factor in (True, False):
        for step, view in enumerate(wd1.path_views(model.config, rollout, range(3), True, factor)):
            got = wd1.log_likelihood(model, prompt, [view])
            for row in range(2):
                guess, written = rollout.guesses[row, step].tolist(), rollout.written_at[row].tolist()
                hidden = [i for i in range(6) if written[i] >= step]
                counted = guess.index(0) + 1 if 0 in guess else 6
                shown = set(range(6)) - set(hidden)
                want = 0.0
                for i in hidden:
                    c = rollout.confidence[row, step, i].item() if factor else 1.0
                    want += c * log_prob(model, prompt[row].tolist(), guess, shown, i, 6) if i < counted else 0
                assert got[row].item() == pytest.approx(want * 6 / len(hidden) ** 2, abs=1e-4)


@given(st.integers(0, 999), st.integers(1, 40))
def test_chunked_log_probabilities_are_the_direct_ones(model, seed, chunk):
    """Values and gradients, for any set of scored tokens and any number of chunks."""
    prompt, target = prompts(rows=3, seed=seed), torch.randint(0, 14, (3, 6), generator=seeded(seed))
    noise = torch.rand(2, 3, 10, generator=seeded(seed))
    view = wd1.View(noise[0] < 0.5, target, noise[1, :, 4:] * (noise[1, :, 4:] < noise[0, 0, 0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "MAX_LOGITS", 14 * chunk)
        got = wd1.token_log_probs(model, prompt, view)
        got_gradient = torch.autograd.grad((got * view.weight).sum() + got.sum() * 0, list(model.parameters()))
    canvas = torch.cat([prompt, target], 1).masked_fill(view.hidden, 1)
    want = model(canvas).logits[:, 4:].log_softmax(-1).gather(-1, target[..., None])[..., 0]
    torch.testing.assert_close(got, want * (view.weight != 0), atol=1e-5, rtol=1e-5)
    want_gradient = torch.autograd.grad((want * view.weight).sum(), list(model.parameters()))
    torch.testing.assert_close(got_gradient, want_gradient, atol=1e-5, rtol=1e-5)


def test_variance_reduction_reduces_variance(model):
    """Equal numbers of forward passes, one completion; the figures for the trained tiny model are in the README."""
    rows = 4_000
    prompt = torch.tensor([[3, 8]]).repeat(rows, 1)
    batch = torch.tensor([[5, 2, 9, 3, 11, 4]]).repeat(rows, 1)
    with torch.no_grad():
        plain, stratified, complementary = (
            wd1.elbo(model, prompt, batch, mc_samples=4, generator=seeded(0), **options).var().item()
            for options in (dict(stratified=False), dict(), dict(complementary=True))
        )
    assert stratified < plain and complementary < plain


# ------------------------------------------------------------------------------------------------ weights and loss

reward_groups = st.integers(2, 8).flatmap(
    lambda size: st.lists(st.lists(st.floats(-3, 3, width=32), min_size=size, max_size=size), min_size=1, max_size=4)
)
psis = st.floats(0.01, 8)


@given(reward_groups, psis, st.floats(-5, 5), st.randoms())
def test_group_weights_have_the_properties_of_the_paper(values, psi, constant, random):
    r = torch.tensor(values, dtype=torch.float64)
    w_plus, w_minus = wd1.group_weights(r, psi)
    close = dict(atol=1e-9, rtol=1e-6)
    for w in (w_plus, w_minus):
        assert w.shape == r.shape and (w >= 0).all() and not w.requires_grad
        torch.testing.assert_close(w.sum(1), torch.ones(len(r), dtype=r.dtype), **close)
    torch.testing.assert_close((w_plus - w_minus).sum(1), torch.zeros(len(r), dtype=r.dtype), **close)
    for same, other in zip(wd1.group_weights(r + constant, psi), (w_plus, w_minus)):
        torch.testing.assert_close(same, other, **close)  # a constant changes nothing
    torch.testing.assert_close(torch.stack(wd1.group_weights(-r, psi)), torch.stack([w_minus, w_plus]), **close)  # odd in A
    order = random.sample(range(r.shape[1]), r.shape[1])
    torch.testing.assert_close(wd1.group_weights(r[:, order], psi)[0], w_plus[:, order], **close)  # order is irrelevant
    explicit = [[math.exp(psi * (x - sum(row) / len(row))) for x in row] for row in values]  # a second derivation
    torch.testing.assert_close(w_plus, torch.tensor([[e / sum(row) for e in row] for row in explicit], dtype=r.dtype), **close)


@given(reward_groups)
def test_small_psi_makes_the_weights_linear_in_the_advantage(values):
    r = torch.tensor(values, dtype=torch.float64)
    w_plus, w_minus = wd1.group_weights(r, 1e-4)
    a = r - r.mean(1, keepdim=True)
    torch.testing.assert_close((w_plus - w_minus) / 1e-4, 2 * a / r.shape[1], atol=1e-5, rtol=1e-5)


@given(reward_groups, psis, st.integers(0, 99))
def test_the_loss_is_linear_in_the_log_likelihoods_and_blind_to_their_common_part(values, psi, seed):
    r = torch.tensor(values, dtype=torch.float64)
    x, y = torch.randn(2, *r.shape, generator=seeded(seed), dtype=torch.float64)
    weights = wd1.group_weights(r, psi)
    loss = lambda log_p: wd1.wd1_loss(log_p, *weights)  # noqa: E731
    torch.testing.assert_close(loss(2 * x - 3 * y), 2 * loss(x) - 3 * loss(y), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(loss(x + 7 * torch.arange(len(r))[:, None]), loss(x), atol=1e-8, rtol=1e-8)
    by_hand = -sum((p - m) * v for p, m, v in zip(*(t.flatten().tolist() for t in (*weights, x)))) / len(r)
    assert loss(x).item() == pytest.approx(by_hand, abs=1e-9)
    x.requires_grad_(True)
    loss(x).backward()
    torch.testing.assert_close(x.grad, -(weights[0] - weights[1]) / len(r))


@given(st.floats(-2, 2), st.integers(2, 6), psis)
def test_equal_rewards_give_exactly_no_loss_and_no_gradient(model, reward, size, psi):
    completion = torch.randint(2, 14, (size, 4), generator=seeded(size))
    model.zero_grad()
    log_p = wd1.elbo(model, prompts(rows=1).repeat(size, 1), completion, generator=seeded(0))
    loss = wd1.wd1_loss(log_p[None], *wd1.group_weights(torch.full((1, size), reward), psi))
    loss.backward()
    assert loss.item() == 0 and all((weight.grad == 0).all() for weight in model.parameters())


@pytest.mark.parametrize("estimate", [wd1.elbo, wd1.one_step_log_likelihood])
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4, unique=True), st.integers(0, 50))
@settings(max_examples=15)
def test_a_small_step_raises_the_best_completion_over_the_worst(estimate, values, seed):
    """Along -grad, the w-weighted sum of log-likelihoods rises; for a pair of best and worst that is their difference."""
    r = torch.tensor([[max(values), min(values)]])
    if r[0, 0] - r[0, 1] < 0.05:
        return
    tiny = small_model(seed)
    prompt, completion = prompts(rows=1, seed=seed).repeat(2, 1), torch.randint(2, 14, (2, 4), generator=seeded(seed))
    if torch.equal(*completion):
        return
    log_p = lambda: estimate(tiny, prompt, completion, generator=seeded(seed), group_size=2)  # noqa: E731
    before = log_p()
    wd1.wd1_loss(before[None], *wd1.group_weights(r)).backward()
    with torch.no_grad():
        norm = sum(weight.grad.pow(2).sum() for weight in tiny.parameters()).sqrt()
        for weight in tiny.parameters():
            weight -= 1e-3 * weight.grad / norm
        after = log_p()
    assert (after[0] - after[1]) > (before[0] - before[1])


@given(st.integers(0, 99), st.floats(0.1, 0.9), st.floats(0, 0.5))
def test_diffu_grpo_by_a_second_derivation(seed, epsilon, beta):
    new, old, ref = torch.randn(3, 3, 5, generator=seeded(seed), dtype=torch.float64)
    new.requires_grad_(True)
    a, counted = torch.randn(3, generator=seeded(seed + 1), dtype=torch.float64), torch.rand(3, 5, generator=seeded(seed)) < 0.7
    counted[0, 0] = True
    loss = wd1.diffu_grpo_loss(new, old, ref, a, counted, epsilon, beta)
    total, n = 0.0, 0
    for i, j in itertools.product(range(3), range(5)):
        if counted[i, j]:
            ratio = math.exp((new[i, j] - old[i, j]).item())
            gain = min(ratio * a[i], min(max(ratio, 1 - epsilon), 1 + epsilon) * a[i])
            d = (ref[i, j] - new[i, j]).item()
            total, n = total + beta * (math.exp(d) - d - 1) - gain, n + 1
    assert loss.item() == pytest.approx(float(total) / n, rel=1e-6)
    # On-policy, without a reference term, its gradient is the policy gradient: -A / n at every counted token.
    on_policy = wd1.diffu_grpo_loss(new, new.detach(), new.detach(), a, counted, epsilon, beta)
    [gradient] = torch.autograd.grad(on_policy, new)
    torch.testing.assert_close(gradient, -a[:, None] * counted / counted.sum())


# ----------------------------------------------------------------------------------------------------------- tasks


def answer(text):
    return f"<reasoning>\nsteps\n</reasoning>\n<answer>\n{text}\n</answer>"


def test_sudoku_puzzles_have_one_solution_the_right_blanks_and_no_grid_in_common():
    task = TASKS["sudoku"]
    for blanks in (6, 8, 11):
        train, test = task.train(seed=1, blanks=blanks), task.test(seed=1, blanks=blanks)
        assert not set(train["solution"]) & set(test["solution"])
        assert len(set(train["solution"]) | set(test["solution"])) == 288 and len(test) == 500
        for example in [*train.select(range(20)), *test.select(range(20))]:
            puzzle, solution = example["puzzle"], example["solution"]
            assert puzzle.count("0") == blanks and example["prompt"].endswith(puzzle)
            assert [grid for grid in solve(puzzle)] == [solution]
    assert task.train(seed=1)[:5] == task.train(seed=1)[:5] != task.train(seed=2)[:5]


def solve(puzzle):
    """All solutions, by backtracking."""
    if "0" not in puzzle:
        yield puzzle
        return
    i = puzzle.index("0")
    row, column = divmod(i, 4)
    peers = {puzzle[j] for j in range(16) if j // 4 == row or j % 4 == column or (j // 8, j % 4 // 2) == (row // 2, column // 2)}
    for digit in set("1234") - peers:
        yield from solve(puzzle[:i] + digit + puzzle[i + 1 :])


def test_sudoku_rewards():
    task, example = TASKS["sudoku"], {"puzzle": "0401034201240210", "solution": "2431134231244213"}
    assert list(solve(example["puzzle"])) == [example["solution"]]
    right = example["solution"]
    for text, reward, correct in [
        (answer(right), 1, True), (f"<answer>{right}</answer>", 1, True), (answer(" ".join(right) + "99"), 1, True),
        (right, 0, False), (f"<answer>{right}", 0, False), ("", 0, False), (answer(""), 0, False),
        (answer(right[:4]), 2 / 6, False), (answer("3" + right[1:]), 5 / 6, False), (answer("2" * 16), 1 / 6, False),
        (f"<answer>{right}</answer><answer>0</answer>", 0, False), (f"<answer>0</answer> <answer>{right}</answer>", 1, True),
        (f"<answer>{right}</answer><answer>0", 1, True), (f"<answer>0<answer>{right}</answer>", 1, True),
    ]:  # fmt: skip
        assert (task.reward(text, example), task.correct(text, example)) == (pytest.approx(reward), correct), text
    # Another solution of an ambiguous puzzle is solved, though it is not the listed one.
    ambiguous = next(p for p in ("0" * n + right[n:] for n in range(17)) if len(list(solve(p))) > 1)
    other = next(grid for grid in solve(ambiguous) if grid != right)
    example = {"puzzle": ambiguous, "solution": right}
    assert task.correct(answer(other), example) and task.reward(answer(other), example) < 1
    assert not task.correct(answer("2134" + right[4:]), {"puzzle": right[:15] + "0", "solution": right})


def test_countdown_problems_can_be_solved_and_do_not_overlap():
    task = TASKS["countdown"]
    train, test = task.train(seed=0), task.test(seed=0)
    key = lambda e: (tuple(sorted(e["nums"])), e["target"])  # noqa: E731
    assert not {key(e) for e in train} & {key(e) for e in test}
    for example in test.select(range(30)):
        solutions = [
            text
            for a, b, c in itertools.permutations(example["nums"])
            for x, y in itertools.product("+-*/", repeat=2)
            for text in (f"({a}{x}{b}){y}{c}", f"{a}{x}({b}{y}{c})")
            if task.correct(answer(text), example)
        ]
        assert solutions and all(task.reward(answer(text), example) == 1 for text in solutions)


@pytest.mark.parametrize(
    "text, reward",
    [("44 + 19 - 35", 1), ("(44+19)-35", 1), (" -35 + (44 + 19) ", 1), ("44+19-35 = 28", 0.1), ("28", 0.1), ("44+19", 0.1),
     ("44+19-35+0", 0.1), ("44+19-35-44+44", 0.1), ("9**9**9**9", 0.1), ("44//19+35", 0.1), ("__import__('os').getpid()", 0.1),
     ("a+b", 0.1), ("\u0664\u0664+19-35", 0.1), ("44+19-\u0663\u0665", 0.1), ("44/0+19+35", 0.1), ("(" * 10**6, 0.1),
     ("(" * 500_000 + "1" + ")" * 500_000, 0.1), ("1+" * 500_000 + "1", 0.1), ("", 0.1), ("44+19-35;1", 0.1), ("44+19-3_5", 0.1),
     ("44.0+19-35", 0.1), ("44 19 35", 0.1), ("44 +\n19 - 35" + " " * 200, 1), ("+44+19-35", 1), ("0x2c+19-35", 0.1), ("1e9", 0.1), ("\x00", 0.1)],
)  # fmt: skip
def test_countdown_expressions(text, reward):
    task, example = TASKS["countdown"], {"nums": [44, 19, 35], "target": 28}
    began = time.perf_counter()
    assert task.reward(answer(text), example) == reward
    assert time.perf_counter() - began < 1
    assert task.reward("no answer " + text.replace("<", ""), example) == 0


@given(st.recursive(st.integers(0, 99).map(str), lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
    lambda t: f"({t[0]}{t[1]}{t[2]})"), max_leaves=6))  # fmt: skip
def test_expressions_have_the_value_of_exact_arithmetic(text):
    from fractions import Fraction

    got = rewards.evaluate_expression(text)
    exact = "".join(f"Fraction({part})" if part.isdigit() else part for part in __import__("re").findall(r"\d+|.", text))
    try:
        want = Fraction(eval(exact))  # the test's own text, no model's
    except ZeroDivisionError:
        want = None
    assert (got is None) if want is None or len(text) > 100 else got[0] == want


def test_gsm8k_rewards():
    task, example = TASKS["gsm8k"], {"question": "?", "answer": "72"}
    for text, reward in [
        (answer("72"), 4), (answer("72") + "\n", 4), (answer("73"), 2), (answer("72.0"), 3.5), (answer("$1,000"), 1.5),
        ("<reasoning>a</reasoning><answer>72</answer>", 3), ("<answer>72</answer>", 2.5), ("72", 0), ("", 0),
        (answer("72") + "x" * 10, 3.365 - 0.0), (answer("72") + "\nabc", 3.497), ("<reasoning>\n" + "x" * 800, 0.125), ("<reasoning>\n</reasoning>\n<answer>\n</answer>", 1.0),
    ]:  # fmt: skip
        if text == answer("72") + "x" * 10:  # the last tag is no longer alone on its line: 2 + 0.5 + 0.5 + 3/8 - 0.01
            reward = 3.365
        assert task.reward(text, example) == pytest.approx(reward), text
    assert task.correct(answer("1,450"), {"answer": "1450"}) and task.correct(answer("72"), example)


def test_math_rewards():
    task, example = TASKS["math"], {"problem": "?", "answer": "\\frac{1}{2}"}
    for text, reward in [
        (answer("\\boxed{\\frac{1}{2}}"), 3), (answer("\\boxed{0.5}"), 3), (answer("\\frac{1}{2}"), 2.75), (answer("\\boxed{\\frac{1}{3}}"), 1),
        (answer("x"), 0.75), ("so \\boxed{\\frac{2}{4}}", 2.5), ("so \\boxed{3}", 0.5), ("", 0.25), ("\\boxed{", 0.25), (answer("\\boxed{"), 0.75),
    ]:  # fmt: skip
        assert task.reward(text, example) == pytest.approx(reward), text
    assert rewards.last_boxed("\\boxed{1} and \\boxed{\\sqrt{2}} so") == "\\sqrt{2}" and rewards.last_boxed("\\boxed{{}") is None
    began = time.perf_counter()
    for hostile in ("9^{9^{9^{9}}}", "9" * 10**6, "\\frac{" * 1000, "10^{99999999}", "99999!!!!!!!", "__import__('os').abort()"):
        assert task.reward(answer(f"\\boxed{{{hostile}}}"), example) in (1, 0.75)
    assert time.perf_counter() - began < 20


PIECES = ["<answer>", "</answer>", "<reasoning>", "</reasoning>", "\n", "\\boxed{", "}", "{", "1", "72", "+", "(", ")", " ", "^", "####", "-"]
completions = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
EXAMPLES = {
    "sudoku": {"puzzle": "0401034201240210", "solution": "2431134231244213"}, "countdown": {"nums": [1, 2, 3], "target": 6},
    "gsm8k": {"question": "?", "answer": "72"}, "math": {"problem": "?", "answer": "72"},
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
@given(completions)
@settings(max_examples=150)
def test_rewards_are_total(name, text):
    task = TASKS[name]
    for completion in (text, f"<answer>{text}</answer>"):
        reward = task.reward(completion, EXAMPLES[name])
        assert isinstance(reward, float) and math.isfinite(reward) and isinstance(task.correct(completion, EXAMPLES[name]), bool)


def test_a_fuzzer_finds_nothing_and_would_find_something(monkeypatch):
    """A few hundred of the million of `make fuzz`; and rewards that raise, or run or open something, are noticed."""
    watch, draw = fuzz.Watch(), random.Random(0)
    for number in range(600):
        watch.try_all(fuzz.completion(draw), draw)
        if number == 300:
            watch.seen.clear()  # until here sympy has loaded its modules
    assert watch.seen == [] and all(len(times) == 600 for times in watch.times.values())
    for function in fuzz.TARGETS.values():
        for _ in range(300):
            function(fuzz.completion(draw))
    for deed in (lambda *_: exec("1"), lambda *_: open(os.devnull).close() or 0.0, lambda *_: 1 / 0, lambda *_: math.nan):
        monkeypatch.setattr(rewards.Sudoku, "reward", deed)
        watch.seen.clear()
        watch.try_all("x", draw)
        assert [name for name, *_ in watch.seen] == ["sudoku"]


@pytest.mark.parametrize(
    "answer, gold, same",
    [("\\frac34", "\\frac{3}{4}", True), ("0.75", "\\frac{3}{4}", True), ("3/4", "\\frac{3}{4}", True), ("(3, \\pi/2)", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
     ("[0, \\infty)", "[0,\\infty)", True), ("(0, \\infty)", "[0,\\infty)", False), ("2\\sqrt{13}", "\\sqrt{52}", True), ("9i+6", "6+9i", True), ("1,450", "1450", True),
     ("x = 5", "5", True), ("y=3+2x", "y = 2x + 3", True), ("(x+1)(x+2)", "x^2+3x+2", True), ("x^2+3x+3", "x^2+3x+2", False), ("\\text{Evelyn}", "Evelyn", True),
     ("50\\%", "50", True), ("90^\\circ", "90", True), ("9^{9^{9^9}}", "3", False), ("12", "13", False), ("10^{12}", "1000000000000", True), ("\\frac{17}{21+\\sqrt[4]{\\frac{0.5}{12}}}", "\\frac{17}{21}", False),
     ("5120^r^5", "r", False), ("5", "x = 5", True), ("x \\in [-2,7]", "[-2,7]", True), ("{" * 150, "3", False), ("__import__('os')", "3", False)],
)  # fmt: skip
def test_latex_answers_that_mean_the_same(answer, gold, same):
    assert equivalent(answer, gold) is same and equivalent(gold, gold)
    latex.compare.cache_clear()
    with ThreadPoolExecutor(1) as other_thread:  # where there are no alarms
        assert other_thread.submit(equivalent, answer, gold).result() is same


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("unit", ["<answer>", "</answer>", "<reasoning>\n", "\n</reasoning>\n<answer>", "\\boxed{", "}{", "1", " ", "\n"])
def test_rewards_take_a_megabyte(name, unit):
    for text in (unit * (10**6 // len(unit)), f"<answer>{unit * (10**6 // len(unit))}</answer>"):
        assert math.isfinite(TASKS[name].reward(text, EXAMPLES[name]))


DATA = {
    "sudoku": ("csv", "Puzzle,Solution\n0401034201240210,2431134231244213\n0,1234341221434321\n", 2),
    "countdown": ("jsonl", '{"input": "30,100,93", "output": "23"}\n{"nums": [44, 19, 35], "target": 28}\n', 2),
    "gsm8k": ("jsonl", '{"question": "2 + 2?", "answer": "Two and two. #### 4"}\n', 1),
    "math": ("jsonl", '{"problem": "Half?", "solution": "It is $\\\\boxed{\\\\frac{1}{2}}$."}\n', 1),
}


@pytest.mark.parametrize("name", TASKS)
def test_public_file_formats(tmp_path, name):
    suffix, text, count = DATA[name]
    file = tmp_path / f"data.{suffix}"
    file.write_text(text)
    rows = TASKS[name].test(test_data=str(file))
    assert len(rows) == count and all(row["prompt"].startswith(TASKS[name].instruction) for row in rows)
    if name == "countdown":
        assert rows[0]["nums"] == [30, 100, 93] and rows[0]["target"] == 23
    if name == "math":
        assert rows[0]["answer"] == "\\frac{1}{2}"


@pytest.mark.parametrize(
    "name, file, text, expected",
    [("sudoku", "a.csv", "", "no problems"), ("sudoku", "a.csv", "Puzzle,Solution\n", "no problems"),
     ("sudoku", "a.csv", "Puzzle,Answer\n0401034201240210,1\n", "line 2: column 'Solution' is missing"),
     ("sudoku", "a.csv", "Puzzle,Solution\n0401034201240210,2431134231244213\n9,1\n", "line 3: column 'Puzzle'"),
     ("sudoku", "a.csv", "Puzzle,Solution\n0401034201240210,2431134231244214\n", "line 2: column 'Solution' is not a solved"),
     ("sudoku", "a.csv", "Puzzle,Solution\n4401034201240210,2431134231244213\n", "does not keep the clues"),
     ("countdown", "a.jsonl", '{"nums": "x", "target": 1}', "line 1: column 'nums'"),
     ("countdown", "a.jsonl", '{"nums": [1, 2, 3], "target": 6}\n{"nums": [1', "line 2"),
     ("countdown", "a.jsonl", "[1, 2]", "line 1: not a JSON object"), ("gsm8k", "a.jsonl", '{"question": "?"}', "column 'answer'"),
     ("gsm8k", "a.jsonl", '{"question": "?", "answer": "4"}', "no result after '####'"),
     ("gsm8k", "a.jsonl", '{"question": "\\ud800", "answer": "#### 4"}', "column 'question' is not text"),
     ("countdown", "a.jsonl", '{"nums": [1, 2, 3, 4], "target": 6}', "no problem is left"),
     ("countdown", "a.jsonl", '{"nums": [1, 2, ' + "3" * 5000 + '], "target": 6}', "line 1"),
     ("math", "a.jsonl", '{"problem": "?", "solution": "4"}', "no .*boxed"), ("math", "a.parquet", "PAR1", "only .csv and .jsonl")],
)  # fmt: skip
def test_bad_data_files_name_the_row_and_the_column(tmp_path, name, file, text, expected):
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=expected) as raised:
        TASKS[name].train(data=str(tmp_path / file))
    assert "\n" not in str(raised.value)


def test_one_file_is_split_without_overlap_and_two_files_are_kept_apart(tmp_path):
    task, file = TASKS["sudoku"], tmp_path / "all.csv"
    rows = [f"{'0' + grid[1:]},{grid}" for grid in rewards.solved_grids()]
    file.write_text("\n".join(["Puzzle,Solution", *rows]))
    train, test = task.train(data=str(file)), task.test(data=str(file))
    assert len(train) + len(test) == 288 and len(test) > 40 and not set(train["solution"]) & set(test["solution"])
    assert set(test["solution"]) == set(task.test()["solution"])
    other = tmp_path / "test.csv"
    other.write_text("\n".join(["Puzzle,Solution", *rows[:100]]))
    train, test = (split(data=str(file), test_data=str(other)) for split in (task.train, task.test))
    assert len(test) == 100 and 88 <= len(train) <= 188 and not set(train["solution"]) & set(test["solution"])
    with pytest.raises(InputError, match="no problem is left"):
        task.train(data=str(other), test_data=str(file))


# ------------------------------------------------------------------------------------- the program as a user runs it

FAST = dict(
    gen_length=8, block_length=4, diffusion_steps=4, batch_size=4, num_generations=2, micro_batch_size=4, num_iterations=2,
    max_steps=2, eval_lengths=8, eval_size=3, rollout_batch_size=4, lora_rank=0, warmup_steps=0, learning_rate=1e-3, dtype="float32",
)  # fmt: skip


def arguments(**options):
    words = []
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)] if value is not None else []
    return words


def run(tmp_path, model=None, out="run", **options):
    """Runs the program in this process: (exit code, run directory)."""
    model = str(model or HERE / "tiny_config.json")
    options = {**FAST, "task": "sudoku", "model": model, "output_dir": tmp_path / out, "device": "cpu", **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.Sudoku, "problems", few_problems)
        patch.setattr("extras.runs.plot_runs", lambda runs, out: Path(out).touch())  # a second each; a test of the whole program draws it
        return wd1.main(arguments(**options)), tmp_path / out


def few_problems(self, split, seed, blanks):
    """Sixty puzzles instead of 20,000, which take a second to make."""
    return self.puzzles(split, np.random.default_rng([seed, split == "test"]), blanks, 60)


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def task_data(tmp_path, name):
    suffix, text, _ = DATA[name]
    file = tmp_path / f"{name}.{suffix}"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    "family, task, lora_rank", [("llada", "sudoku", 0), ("Dream", "countdown", 2), ("a2d-qwen3", "gsm8k", 2), ("llada", "math", 0)]
)
def test_train_resume_and_evaluate_on_real_formats(tmp_path, capsys, monkeypatch, family, task, lora_rank):
    source, *_ = write_checkpoint(tmp_path / "checkpoint", family)
    options = dict(model=source, task=task, lora_rank=lora_rank, save_every=1)
    rewarded(monkeypatch, type(TASKS[task]))
    if task in ("gsm8k", "math"):
        options["data"] = task_data(tmp_path, task)
        options["test_data"] = str(tmp_path / "test.jsonl")
        Path(options["test_data"]).write_text(DATA[task][1].replace("2 + 2", "3 + 1").replace("Half", "A half"))
    code, directory = run(tmp_path, **options)
    assert code == 0 and not (source / "EXECUTED").exists()
    output = capsys.readouterr().out
    assert "before: accuracy" in output and "step   0" in output and "░" in output
    names = {"config.json", "metrics.jsonl", "timings.jsonl", "summary.json", "samples.jsonl", "curve.png", "checkpoint", "model", ".lock"}
    assert {path.name for path in directory.iterdir()} == names
    summary = json.loads((directory / "summary.json").read_text())
    assert set(summary) >= {"before", "after", "steps", "seconds", "forward_passes"} and summary["steps"] == 2
    assert 0 <= summary["after"]["accuracy"] <= 1 and "reward" in summary["before"]
    assert [line["step"] for line in metrics(directory)] == [0, 1, 2]
    assert {"prompt", "completion", "reward"} <= set(json.loads((directory / "samples.jsonl").read_text().splitlines()[0]))

    assert run(tmp_path, **{**options, "max_steps": 3}, resume=True)[0] == 0
    assert [line["step"] for line in metrics(directory)] == [0, 1, 2, 3]
    capsys.readouterr()
    assert run(tmp_path, **{**options, "model": directory / "model"}, eval_only=True, out="unused")[0] == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated == json.loads((directory / "summary.json").read_text())["after"] and not (tmp_path / "unused").exists()

    trained, tokenizer = wd1.load_model(directory / "model")
    prompt = tokenizer("the land", return_tensors="pt").input_ids
    assert wd1.generate(trained, prompt, gen_length=4, steps=4, block_length=4).completion.shape == (1, 4)
    if lora_rank:
        from peft import PeftModel

        plain = PeftModel.from_pretrained(wd1.load_model(source)[0], directory / "model")
        torch.testing.assert_close(wd1.predict_logits(plain, prompt), wd1.predict_logits(trained, prompt))
        assert not torch.equal(wd1.predict_logits(wd1.load_model(source)[0], prompt), wd1.predict_logits(trained, prompt))


OBJECTIVES = [
    dict(objective="wd1"), dict(objective="wd1", likelihood="elbo", mc_samples=2, complementary=True, shared_masks=True),
    dict(objective="wd1", likelihood="trajectory", mc_samples=3), dict(objective="wd1", beta=1.0), dict(objective="wd1-positive"),
    dict(objective="wd1++", mc_samples=2), dict(objective="diffu-grpo"), dict(objective="diffu-grpo", beta=0.0),
    dict(objective="wd1", beta=1.0, lora_rank=2), dict(objective="diffu-grpo", lora_rank=2),
    dict(objective="wd1", shared_masks=True, gradient_checkpointing=True, dtype="bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize("options", OBJECTIVES, ids=lambda options: "-".join(map(str, options.values())))
def test_every_objective_runs_and_its_plan_counts_its_forward_passes(tmp_path, capsys, monkeypatch, options):
    rewarded(monkeypatch)
    code, directory = run(tmp_path, max_steps=2, eval_every=0, **options)
    assert code == 0
    capsys.readouterr()
    assert run(tmp_path, dry_run=True, out="unused", **options)[0] == 0 and not (tmp_path / "unused").exists()
    plan, lines = json.loads(capsys.readouterr().out), metrics(directory)
    first = lines[1]["forward_passes"]
    evaluation, shown = 4, 4  # 3 problems in one batch, and the one that is shown, in 4 steps each
    per_step = plan["sampling_forward_passes_per_step"] + plan["update_forward_passes_per_step"]
    assert first == per_step + evaluation + shown
    assert all(line["skipped"] == 0 for line in lines[1:])
    # Per gradient step, beyond sampling: one pass for wd1, three (old, reference, current) for diffu-GRPO.
    passes = plan["update_forward_passes_per_step"] / FAST["num_iterations"]
    if options == dict(objective="wd1"):
        assert passes == 1
    if options == dict(objective="diffu-grpo"):
        assert passes == 3


def rewarded(monkeypatch, task=rewards.Sudoku):
    """A reward that a random model gets some of: the share of even characters."""
    monkeypatch.setattr(task, "reward", faults.even_characters)


def load_state(directory):
    """The newest checkpoint of a run: (its tensors, its state)."""
    newest = sorted((directory / "checkpoint").glob("step-*"))[-1]
    [file] = newest.glob("*.safetensors")
    return load_file(file), json.loads((newest / "state.json").read_text())


def test_without_padding_no_attention_mask_is_made(model, monkeypatch):
    masks, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, attn_mask=None, **options: (
        masks.append(attn_mask), attention(*args, attn_mask=attn_mask, **options))[1])  # fmt: skip
    for cache in ("none", "dual"):
        wd1.generate(model, prompts(), gen_length=8, steps=4, block_length=4, cache=cache)
    assert masks and all(mask is None for mask in masks)


def test_a_run_learns_what_is_rewarded(tmp_path, monkeypatch):
    """The loop as a whole: more even characters after 15 steps. (wd1-positive only imitates itself, and is slower.)"""
    rewarded(monkeypatch)
    options = dict(batch_size=32, num_generations=8, micro_batch_size=32, rollout_batch_size=32, max_steps=15, eval_every=0)
    for objective, dtype in (("wd1", "float32"), ("wd1", "bfloat16"), ("wd1++", "float32"), ("diffu-grpo", "float32")):
        options |= dict(temperature=1.0, objective=objective, learning_rate=3e-3, beta=0.0, dtype=dtype, mc_samples=1)
        _, directory = run(tmp_path, out=objective + dtype, **options)
        values = [line["reward"] for line in metrics(directory)[1:]]
        assert sum(values[-3:]) / 3 > sum(values[:3]) / 3 + 0.1, objective


@pytest.mark.parametrize("options", [dict(likelihood="elbo", mc_samples=2), dict(likelihood="trajectory", mc_samples=2),
                                     dict(objective="wd1++", mc_samples=2), dict(objective="wd1-positive")], ids=str)  # fmt: skip
def test_rows_that_teach_nothing_are_left_out_of_the_update_exactly(model, options):
    """learn's gradient against autograd of the whole batch's loss; two of the three groups have equal rewards."""
    values = {**FAST, **options, "micro_batch_size": 3, "num_iterations": 1, "max_grad_norm": 1e9, "block_length": 8}
    config = wd1.Config(**{**values, "device": "cpu", "beta": 0.0})
    stepwise = config.objective == "wd1++"
    rollout = wd1.generate(model, prompts(rows=6), gen_length=8, steps=4, block_length=8, temperature=1.0, generator=seeded(0),
                           trajectory=stepwise)  # fmt: skip
    r = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.5, 0.5]])
    w_plus, w_minus = wd1.group_weights(r[:, :, None].expand(3, 2, 4).flatten(1) if stepwise else r)
    weights = (w_plus.view(6, -1), w_minus.view(6, -1) * (config.objective != "wd1-positive"))
    passes = []
    hook = model.model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    torch.manual_seed(0)
    wd1.learn(model, None, torch.optim.SGD(model.parameters(), lr=0.0), rollout, r, weights, config)
    hook.remove()
    got = [weight.grad for weight in model.parameters()]
    model.eval()
    torch.manual_seed(0)
    views, loss = wd1.draw_views(config, model.config, rollout), 0
    for column, view in views:
        log_p = wd1.log_likelihood(model, rollout.prompt, [view])
        loss -= ((weights[0] - weights[1])[:, column] * log_p).sum() / 3
    torch.testing.assert_close(got, list(torch.autograd.grad(loss, list(model.parameters()))), atol=1e-5, rtol=1e-4)
    assert 0 < sum(passes) <= len(views) * (6 if config.objective == "wd1-positive" else 2)


def test_equal_rewards_are_counted_and_teach_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards.Sudoku, "reward", lambda *_: 0.5)
    _, directory = run(tmp_path, weight_decay=0)
    assert all(line["degenerate_groups"] == 1 and line["grad_norm"] == 0 for line in metrics(directory)[1:])
    model, _ = wd1.load_model(HERE / "tiny_config.json")
    trained, _ = wd1.load_model(directory / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters()))


@pytest.mark.parametrize(
    "options, expected",
    [(dict(task="chess"), "--task chess: unknown"), (dict(objective="ppo"), "invalid choice: 'ppo'"), (dict(bogus=1), "--bogus: no such option"),
     (dict(gen_length=9), "gen_length 9 is not a multiple of block_length 4"), (dict(diffusion_steps=1), "denoising steps, not"),
     (dict(batch_size=5), "--batch_size 5 does not fill"), (dict(batch_size=1), "--batch_size 1 does not fill"),
     (dict(learning_rate=-1), "--learning_rate -1"), (dict(learning_rate="nan"), "--learning_rate nan"), (dict(max_steps=0), "--max_steps 0"),
     (dict(max_steps="many"), "invalid int value"), (dict(eval_lengths=4000), "the model allows 1024"), (dict(likelihood="elbo", mc_samples=3, complementary=True), "must be even"),
     (dict(model="nowhere/at/all"), "no such directory"), (dict(data="none.csv"), "there is no such file"), (dict(blanks=13), "--blanks 13"),
     (dict(resume=True), "no run to go on with"), (dict(lam=0), "both 0"), (dict(seed=2**63), "--seed"), (dict(prompt_mask_prob=2.0), "at most 1"),
     (dict(load_in_4bit=True), "--lora_rank above 0"), (dict(load_in_4bit=True, lora_rank=2, shard=True), "exclude each other"), (dict(load_in_4bit=True, lora_rank=2), "has no weights"),
     (dict(threshold=0.0), "--threshold 0.0"), (dict(threshold=1.5), "--threshold 1.5"), (dict(cache="all"), "invalid choice: 'all'"),
     (dict(shard=True), "start them with torchrun"), (dict(shard=True, dry_run=True), "leave out --shard"),
     (dict(resume=True, eval_only=True), "--eval_only"), (dict(likelihood="trajectory", mc_samples=5), "only --diffusion_steps 4"), (dict(device="quantum"), "--device quantum")],
    ids=str,
)  # fmt: skip
def test_bad_input_gets_one_sentence_and_leaves_nothing(tmp_path, capsys, options, expected):
    code, directory = run(tmp_path, **options)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("wd1: ") and expected in error and not directory.exists()


def test_an_output_directory_is_never_overwritten_and_a_resumed_run_keeps_its_settings(tmp_path, capsys, monkeypatch):
    code, directory = run(tmp_path)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert code == 0 and run(tmp_path)[0] == 2 and "holds another run" in capsys.readouterr().err
    assert run(tmp_path, resume=True, learning_rate=0.5)[0] == 2
    assert "--learning_rate was 0.001 and now is 0.5" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    # Without options, --resume takes the run's own.
    monkeypatch.setattr(rewards.Sudoku, "problems", few_problems)
    assert wd1.main(["--resume", "--output_dir", str(directory), "--max_steps", "3"]) == 0
    assert metrics(directory)[-1]["step"] == 3
    capsys.readouterr()
    # And its model brings the settings it was trained with.
    assert wd1.main(["--eval_only", "--model", str(directory / "model"), "--eval_size", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["lengths"].keys() == {"8"}


def test_the_program_as_a_command(tmp_path):
    """A real process: interrupted by Ctrl-C it leaves a checkpoint, and --resume finishes the run."""
    command = [sys.executable, str(HERE / "wd1.py"), *arguments(**{**FAST, "max_steps": 300, "save_every": 1, "eval_every": 0,
               "model": HERE / "tiny_config.json", "output_dir": tmp_path / "run"})]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    while process.poll() is None and not list(tmp_path.glob("run/checkpoint/step-*")):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "to go on: python wd1.py --resume" in err and "Traceback" not in err, err
    done = load_state(tmp_path / "run")[1]["steps"]
    assert 1 <= done < 300 and metrics(tmp_path / "run")[-1]["step"] == done
    resume = [*command[:2], "--resume", "--output_dir", str(tmp_path / "run"), "--max_steps", str(done + 1)]
    finished = subprocess.run(resume, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0 and "after: accuracy" in finished.stdout, finished.stderr
    assert (tmp_path / "run/curve.png").read_bytes().startswith(b"\x89PNG")
    helped = subprocess.run([*command[:2], "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert helped.returncode == 0 and "--num_generations" in helped.stdout


def test_the_demos_base_model_is_made_once_and_kept(tmp_path, monkeypatch):
    from extras import tiny

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(tiny.RECIPE, "steps", 2)
    monkeypatch.setitem(tiny.RECIPE, "batch_size", 8)
    config = wd1.Config(task="countdown")
    directory = tiny.demo_base(config)
    assert config.data == f"{directory}/problems.jsonl" and len(TASKS["countdown"].test(data=config.data)) == 500
    with pytest.raises(InputError, match="no such file"):
        tiny.demo_base(wd1.Config(data="none.csv", seed=2))
    directory = tiny.tiny_base(seed=0, blanks=6)
    monkeypatch.setattr(tiny, "pretrain", lambda *_: pytest.fail("made again"))
    assert wd1.load_model(directory)[0].config.mask_token_id == 1
    with pytest.raises(pytest.fail.Exception):
        tiny.tiny_base(seed=1, blanks=6)
    held_out = {grid for grid in rewards.solved_grids() if TASKS["sudoku"].is_test({"solution": grid})}
    texts = [text for _, text in tiny.corpus("sudoku", np.random.default_rng(0), 6, 400)]
    assert 20 < len(held_out) and not {text[len("<answer>") :][:16] for text in texts} & held_out


# ---------------------------------------------------------------------------------------- numbers that can be trusted

TRUSTED = {  # an estimate or an objective, and its settings
    "wd1, one-step": {}, "wd1, one-step, 2 samples": dict(mc_samples=2), "wd1, ELBO": dict(likelihood="elbo", mc_samples=2),
    "wd1, path": dict(likelihood="trajectory", mc_samples=4), "wd1-positive": dict(objective="wd1-positive"),
    "wd1++": dict(objective="wd1++", mc_samples=2), "diffu-GRPO": dict(objective="diffu-grpo", beta=0.1),
}  # fmt: skip
REWARDS = torch.tensor([[1.0, 0.0, 0.5], [0.2, 0.9, 0.1]])


def trusted_batch(case):
    """(model, reference, config, rollout, weights, views): two groups of three; the second row ends at its fourth token."""
    config = wd1.Config(**{**FAST, "eval_lengths": [8], "beta": 0.0, "device": "cpu", "num_iterations": 1, "max_grad_norm": 1e9,
                           "num_generations": 3, "batch_size": 6, "block_length": 8, **TRUSTED[case]})  # fmt: skip
    model, reference = small_model(seed=0), small_model(seed=1)
    prompt = prompts(rows=2, length=5).repeat_interleave(3, 0)
    rollout = wd1.generate(model, prompt, gen_length=8, steps=4, block_length=8, temperature=1.0, generator=seeded(0), trajectory=True)
    rollout.completion[1, 3] = model.config.eos_token_id
    judged = REWARDS if config.objective != "wd1++" else torch.rand(2, 12, generator=seeded(2))
    w_plus, w_minus = wd1.group_weights(judged)
    weights = w_plus.view(6, -1), w_minus.view(6, -1) * (config.objective != "wd1-positive")
    torch.manual_seed(3)
    return model, reference, config, rollout, (judged, *weights), wd1.draw_views(config, model.config, rollout)


def loop_gradient(case, change=lambda *batch: batch, **settings):
    """The loss and the gradient (flat) that `learn` computes for a case, after `change` of (rollout, views)."""
    model, reference, config, rollout, (_, *weights), views = trusted_batch(case)
    rollout, views = change(rollout, views)
    for name, value in settings.items():
        setattr(config, name, value)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.MonkeyPatch.context() as patch, wd1.autocast(config):
        patch.setattr(wd1, "draw_views", lambda *_: views)
        figures = wd1.learn(model, reference, torch.optim.SGD(model.parameters(), lr=0.0), rollout, REWARDS, weights, config)
    return figures["loss"], torch.cat([weight.grad.flatten() for weight in model.parameters()])


def formula(case):
    """The same by the equations of the papers, written out; of wd1.py's own it takes only the masks that were drawn."""
    model, reference, config, rollout, (judged, *_), views = trusted_batch(case)
    P, L, mask_id, eos = 5, 8, model.config.mask_token_id, model.config.eos_token_id
    end = lambda row: row.tolist().index(eos) + 1 if eos in row else L  # the tokens that count

    def log_p(policy, canvas, i, token):
        return wd1.predict_logits(policy, canvas[None])[0, P + i].log_softmax(-1)[token]

    def masked(row, hidden, tokens=None):
        canvas = torch.cat([rollout.prompt[row], rollout.completion[row] if tokens is None else tokens])
        return canvas.masked_fill(hidden, mask_id)

    if config.objective == "diffu-grpo":
        [(_, view)], total, count = views, 0.0, 0
        A = (REWARDS - REWARDS.mean(1, keepdim=True)).flatten()
        for row in range(6):
            canvas = masked(row, view.hidden[row])
            assert (canvas[P:] == mask_id).all()
            for i in range(end(rollout.completion[row])):
                new, ref = (log_p(policy, canvas, i, rollout.completion[row, i]) for policy in (model, reference))
                ratio, against = torch.exp(new - new.detach()), torch.exp(ref.detach() - new)
                clipped = torch.clamp(ratio, 1 - config.epsilon, 1 + config.epsilon)
                total = total + torch.min(ratio * A[row], clipped * A[row]) - config.beta * (against - against.log() - 1)
                count += 1
        return -total / count, model
    flat = judged - judged.mean(1, keepdim=True)
    w_plus, w_minus = (torch.exp(sign * flat) / torch.exp(sign * flat).sum(1, keepdim=True) for sign in (1, -1))
    if config.objective == "wd1-positive":
        w_minus = 0 * w_minus
    gap = (w_plus - w_minus).reshape(6, -1)
    loss = 0.0
    for row in range(6):
        if config.objective == "wd1++":
            for step, view in views:
                S = [i for i in range(L) if rollout.written_at[row, i] >= step]
                guess, c = rollout.guesses[row, step], rollout.confidence[row, step]
                canvas = masked(row, F.pad(torch.tensor([i in S for i in range(L)]), (P, 0)), guess)
                assert torch.equal(canvas == mask_id, F.pad(view.hidden[row, P:], (P, 0)))
                terms = [c[k] * log_p(model, canvas, k, guess[k]) for k in S if k < end(guess)]
                loss = loss - gap[row, step] * L / len(S) * sum(terms) / len(S) / 2
            continue
        tokens, estimate = rollout.completion[row], 0.0
        counted = range(end(tokens))
        if config.likelihood == "trajectory":
            for t in range(4):
                canvas = masked(row, F.pad(rollout.written_at[row] >= t, (P, 0)))
                estimate = estimate + sum(log_p(model, canvas, i, tokens[i]) for i in counted if rollout.written_at[row, i] == t)
        for _, view in views if config.likelihood != "trajectory" else ():
            S = [i for i in counted if view.hidden[row, P + i]]
            scale = len(counted) / len(S) if config.likelihood == "elbo" else 1  # L / l
            assert config.likelihood == "elbo" or len(S) == len(counted)
            canvas = masked(row, view.hidden[row])
            estimate = estimate + scale * sum(log_p(model, canvas, i, tokens[i]) for i in S) / len(views)
        loss = loss - gap[row, 0] * estimate / 2  # a mean over two groups
    return loss, model


def padded(rollout, views):
    """Three tokens of padding on the left of every prompt."""
    rollout = dataclasses.replace(rollout, prompt=F.pad(rollout.prompt, (3, 0)), attention_mask=F.pad(torch.ones(6, 5), (3, 0)))
    return rollout, [(column, view._replace(hidden=F.pad(view.hidden, (3, 0)))) for column, view in views]


SAME = {  # what must not change the numbers -> (how it is done, bound on the relative difference)
    "the formula": (None, 1e-4),
    "padded on the left": (dict(change=padded), 1e-4),
    "one row at a time": (dict(micro_batch_size=1), 1e-4),
    "micro-batches of four": (dict(micro_batch_size=4), 1e-4),
    "logits in chunks": ("chunks", 1e-4),
    "activations recomputed": (dict(gradient_checkpointing=True), 1e-4),
    "two ranks": ("ranks", 1e-4),
    "bfloat16": (dict(dtype="bfloat16"), 0.1),
}

RANKS = f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import torch
import test_wd1
from extras import parallel
parallel.start("cpu")
found = {{case: test_wd1.loop_gradient(case, micro_batch_size=2) for case in test_wd1.TRUSTED}}
if parallel.RANK == 0:
    torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The losses and gradients of all cases in a run of two processes."""
    directory = tmp_path_factory.mktemp("ranks")
    (directory / "worker.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "worker.py"]
    done = subprocess.run(command, cwd=directory, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(directory / "found.pt")


@pytest.mark.parametrize("change", SAME)
@pytest.mark.parametrize("case", TRUSTED)
def test_the_loss_and_its_gradient_are_the_same_in_every_way_to_compute_them(case, change, two_ranks, monkeypatch):
    how, bound = SAME[change]
    loss, gradient = loop_gradient(case, micro_batch_size=6)
    if how is None:
        value, model = formula(case)
        other = value.item(), torch.cat([part.flatten() for part in torch.autograd.grad(value, list(model.parameters()))])
    elif how == "ranks":
        other = two_ranks[case]
    else:
        if how == "chunks":
            monkeypatch.setattr(chunks, "MAX_LOGITS", 3 * 14)
        other = loop_gradient(case, **(how if how != "chunks" else {}))
    assert gradient.norm() > 1e-3
    assert (other[1] - gradient).norm() < bound * gradient.norm()
    assert other[0] == pytest.approx(loss, rel=bound, abs=bound * 0.1)


@pytest.mark.parametrize("case", [case for case in TRUSTED if case.startswith("wd1, ")])
def test_log_likelihoods_are_the_same_in_every_way_to_compute_them(case, monkeypatch):
    model, _, config, rollout, _, views = trusted_batch(case)
    estimate = lambda rollout, views: wd1.log_likelihood(model, rollout.prompt, [v for _, v in views], rollout.attention_mask)
    want = estimate(rollout, views)
    torch.testing.assert_close(estimate(*padded(rollout, views)), want, atol=1e-4, rtol=1e-5)
    for row in range(6):
        one = [wd1.View(*(part[row : row + 1] for part in view)) for _, view in views]
        torch.testing.assert_close(wd1.log_likelihood(model, rollout.prompt[row : row + 1], one), want[row : row + 1], atol=1e-4, rtol=1e-5)
    config.dtype = "bfloat16"
    with wd1.autocast(config):
        torch.testing.assert_close(estimate(rollout, views), want, atol=0, rtol=0.05)
    monkeypatch.setattr(chunks, "MAX_LOGITS", 3 * 14)
    torch.testing.assert_close(estimate(rollout, views), want, atol=1e-4, rtol=1e-5)


# ------------------------------------------------------------------------------------------------- speed and memory


def test_four_bits(tmp_path, monkeypatch):
    """Without bitsandbytes a sentence; with it, each weight is read in 4 bits and the model computes with what was read."""
    directory, *_ = write_checkpoint(tmp_path / "model", "llada", d_model=128, mlp_hidden_size=256)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InputError, match="pip install bitsandbytes"):
            wd1.load_model(directory, load_in_4bit=True)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    (quantised, _), (full, _) = (wd1.load_model(directory, load_in_4bit=value) for value in (True, False))
    for name, module in quantised.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight, original = module.weight, full.get_submodule(name).weight
            read = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
            assert 0 < (read - original).norm() < 0.12 * original.norm()
            original.data.copy_(read)
    ids = torch.randint(0, 256, (2, 9), generator=seeded(0))
    torch.testing.assert_close(wd1.predict_logits(quantised, ids), wd1.predict_logits(full, ids), atol=1e-3, rtol=1e-3)


def test_a_compiled_run_is_the_same_run(tmp_path, monkeypatch):
    """Traced as torch.compile does it, changing shapes included, but run without its code generator, which takes minutes."""
    rewarded(monkeypatch)
    eager = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: eager(self, backend="aot_eager"))
    runs = [run(tmp_path, out=f"compile{value}", compile=value, eval_every=0)[1] for value in (True, None)]
    compiled, plain = (dict(wd1.load_model(directory / "model")[0].named_parameters()) for directory in runs)
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


MEASURE = """
import dataclasses, json, sys, torch, wd1
from extras.bench import make_batch
from extras.memory import measured_peak
torch.set_num_threads(1)
config = wd1.Config(**json.loads(sys.argv[1]))
batch = make_batch(wd1.load_model("tiny")[0], "cpu", 1, 6, 17, config.gen_length, config)

def everything(config):  # a model, AdamW and a gradient step
    model = wd1.set_up(config)[0]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with wd1.autocast(config):
        wd1.learn(model, None, torch.optim.AdamW(trained), *batch, config)

everything(dataclasses.replace(config, model="tiny_config.json"))  # what libraries load and set up once
print(measured_peak(lambda: everything(config), "cpu") / 1e9)
"""


@pytest.mark.parametrize("options", [dict(lora_rank=0), dict(lora_rank=16)], ids=str)
def test_the_dry_run_tells_the_memory_that_is_used(tmp_path, options):
    """Within 15%, for a model of 31 million weights: estimated on tensors without data, and read off a real process."""
    from extras.bench import shape_config
    from extras.plan import plan

    (tmp_path / "config.json").write_text(json.dumps(shape_config("mid")))
    options = dict(model=str(tmp_path / "config.json"), device="cpu", dtype="float32", batch_size=6, num_generations=6, micro_batch_size=6,
                   rollout_batch_size=6, gen_length=128, diffusion_steps=64, num_iterations=2, eval_lengths=[128], eval_size=4, beta=0.0) | options  # fmt: skip
    estimate = plan(wd1.Config(**options))
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once, as a GPU's allocator counts
    done = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(options)], capture_output=True, text=True, cwd=HERE, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(estimate["estimated_memory_GB"], rel=0.15)


def test_the_benchmark_measures_what_it_says(tmp_path, model, monkeypatch):
    from extras import bench, gpu

    prompt = prompts(rows=3)
    shape = dict(gen_length=8, steps=4, block_length=4)
    with bench.full_length(model):  # its plain sampler is the method's, and ours without any early end
        want = [plain_generate(model, row[None], **shape) for row in prompt]
        assert wd1.generate(model, prompt, **shape).completion.tolist() == want
    assert bench.plain_generate(model, prompt, **shape, temperature=0).tolist() == want
    gap, completion = torch.tensor([0.5, -0.2, 0.3]), torch.tensor(want)
    model.zero_grad()
    bench.plain_update(model, prompt, completion, gap)
    got = [weight.grad for weight in model.parameters()]
    view = wd1.View(F.pad(torch.ones(3, 8), (4, 0)).bool(), completion, torch.ones(3, 8))
    loss = -(gap * wd1.log_likelihood(model, prompt, [view])).sum()
    torch.testing.assert_close(got, list(torch.autograd.grad(loss, list(model.parameters()))), atol=1e-5, rtol=1e-4)
    model.zero_grad()

    (tmp_path / "generate.py").write_text("def generate(model, prompt, mask_id, **options):\n    return prompt.repeat(1, 3)")
    assert torch.equal(bench.peer_generate(tmp_path)(model, prompt, 8, 4, 4, 0.0), prompt.repeat(1, 2))

    monkeypatch.setitem(bench.SHAPES, "tiny", (16, 1, 2, 16, 128))
    words = ["--device", "cpu", "--shape", "tiny", "--lora_rank", "2", "--rounds", "1", "--no_compile", "--out", str(tmp_path / "gpu.json")]
    monkeypatch.setattr(sys, "argv", ["gpu", *words])
    gpu.main()
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["agreement"]["same_tokens"] and {"sampling", "update", "step", "memory"} <= result.keys()
    speed = {line["name"]: line for line in result["sampling"] + result["update"] + result["step"]}
    assert speed["threshold 0.9"]["denoising_steps"] <= 16 and speed["plain"]["speed"] == 1
    assert speed["diffu-GRPO"]["forward_passes"] == 16 + 3 * 2 and "chance" not in TASKS


# ------------------------------------------------------------------------------------------------ several processes

WORKER = f"""
import pathlib, sys
sys.path.insert(0, {str(HERE)!r})
import torch
import extras.lora, rewards, test_wd1, wd1
torch.set_num_threads(1)
rewards.Sudoku.problems = test_wd1.few_problems
rewards.Sudoku.reward = test_wd1.faults.even_characters
LoraConfig = extras.lora.LoraConfig
extras.lora.LoraConfig = lambda **options: LoraConfig(**dict(options, lora_dropout=0.0))  # dropout draws differ by rank
for line in pathlib.Path("runs.txt").read_text().splitlines():
    if code := wd1.main(line.split()):
        sys.exit(code)
"""


def launch(directory, runs, ranks):
    """Starts a process, or `ranks` of them under torchrun, that works through the command lines `runs`: a Popen."""
    (directory / "worker.py").write_text(WORKER)
    (directory / "runs.txt").write_text("\n".join(" ".join(argv) for argv in runs))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, "worker.py"]
    return subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


PARALLEL = dict(FAST, batch_size=8, max_steps=2, eval_every=0, temperature=1.0, likelihood="elbo", mc_samples=2, micro_batch_size=2,
                task="sudoku", model=HERE / "tiny_config.json", device="cpu")  # fmt: skip


def test_two_processes_do_what_one_does(tmp_path):
    """The same batches give the same weights (1e-5) in one process, in two, and in two that share the weights (FSDP2),
    and a run goes on with another number of processes. LoRA, a reference and a tied head included."""
    variants = {"data": {}, "shard": dict(shard=True, beta=0.1), "lora": dict(lora_rank=2, beta=0.5),
                "fast": dict(shard=True, threshold=0.05, cache="dual")}  # fmt: skip
    two = [arguments(**{**PARALLEL, **options, "output_dir": name}) for name, options in variants.items()]
    two += [arguments(**{**PARALLEL, "output_dir": "shrinks", "max_steps": 1, "shard": True})]
    one = [arguments(**{**PARALLEL, **options, "shard": None, "output_dir": name + "-alone"}) for name, options in variants.items()]
    one += [["--resume", "--output_dir", "shrinks", "--max_steps", "2", "--shard", "false"]]
    for runs, ranks in ((two, 2), (one, 1)):
        process = launch(tmp_path, runs, ranks)
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
        assert output.count("data/curve.png shows") == (ranks == 2), "rank 0 alone prints"

    def weights(name):
        return dict(wd1.load_model(tmp_path / name / "model")[0].named_parameters())

    untrained = weights("data-alone") and dict(wd1.load_model("tiny")[0].named_parameters())
    for name, alone in [*((name, f"{name}-alone") for name in variants), ("shrinks", "data-alone")]:
        got, want = weights(name), weights(alone)
        assert got.keys() == want.keys()
        assert max((got[key] - want[key]).abs().max().item() for key in want) < 1e-5, name
        assert not all(torch.equal(want[key], untrained[key]) for key in want if key in untrained) or "lora_rank" in variants[name]
        for a, b in zip(metrics(tmp_path / name), metrics(tmp_path / alone), strict=True):
            for key in a.keys() - {"forward_passes", "eval"}:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (name, key)


# ------------------------------------------------------------------------------------------- what happens to runs


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that nothing happens to."""
    return faults.make_reference(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.__name__)
def test_a_run_survives(reference, fault):
    """A few of what `make faults` tries by the hundred; each generator yields None, or what was lost."""
    if fault in (faults.disk_full, faults.read_only) and not faults.can_mount():
        pytest.skip("no right to mount a small disk")
    results = list(fault(reference, faults.FAULTS[fault][1], random.Random(0)))
    assert results and not [lost for lost in results if lost]


def test_the_faults_would_be_noticed(reference, monkeypatch):
    """The harness itself: another seed, another weight or a lost line is a difference; a run without exact draws is one."""
    for harm in (lambda d: (d / "metrics.jsonl").write_text((d / "metrics.jsonl").read_text()[:-2] + "\n"), lambda d: (d / "samples.jsonl").unlink(),
                 lambda d: save_file({k: v + 1e-7 for k, v in load_file(d / "model/adapter_model.safetensors").items()}, d / "model/adapter_model.safetensors")):  # fmt: skip
        directory = faults.copy(reference, "harmed")
        assert faults.differs(directory, reference) is None
        harm(directory)
        assert faults.differs(directory, reference)
    counts = itertools.count()
    forgetful = lambda: setattr(wd1.transformers, "set_seed", lambda number: torch.manual_seed(next(counts)))
    directory = faults.fresh(reference, "forgetful")
    assert faults.wait(faults.start(directory, forgetful, max_steps=4)) == 0
    assert "differs in metrics.jsonl" in faults.differs(directory, reference)


def test_a_resumed_run_needs_the_problems_it_began_with(reference):
    directory = faults.copy(reference, "problems")
    lines = faults.beside(directory, "puzzles.csv").read_text()
    try:
        faults.beside(directory, "puzzles.csv").write_text(lines.replace(lines.splitlines()[1] + "\n", ""))
        assert faults.wait(faults.start(directory, max_steps=5)) == 2
    finally:
        faults.beside(directory, "puzzles.csv").write_text(lines)
    assert faults.not_said(directory, "was a data file changed?") is None


# ------------------------------------------------------------------------------------------------ hostile checkpoints


class Payload:
    """What a pickle runs when it is opened."""

    def __reduce__(self):
        return (open, ("EXECUTED", "w"))


def tokenizer_setting(**settings):
    return lambda d: (d / "tokenizer_config.json").write_text(json.dumps(json.loads((d / "tokenizer_config.json").read_text()) | settings))


def tokenizer_part(change):
    def harm(d):
        parts = json.loads((d / "tokenizer.json").read_text())
        change(parts)
        (d / "tokenizer.json").write_text(json.dumps(parts))

    return harm


def index_points(to):
    def harm(d):
        file = d / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"] = {name: to.format(outside=d.parent / "outside") for name in index["weight_map"]}
        file.write_text(json.dumps(index))

    return harm


def tensor_becomes(change):
    def harm(d):
        file = sorted(d.glob("*.safetensors"))[0]
        tensors = load_file(file)
        name = sorted(tensors)[0]
        tensors[name] = change(tensors[name])
        save_file(tensors, file, {"format": "pt"})

    return harm


def pickled(name):
    def harm(d):
        (d / name).write_bytes(pickle.dumps({"payload": Payload()}))
        (d / "evil.py").write_text("open('EXECUTED', 'w')")

    return harm


def only_pickles(d):
    pickled("pytorch_model.bin")(d)
    for file in d.glob("*.safetensors*"):
        file.unlink()


HOSTILE = {  # what a stranger put into a checkpoint -> (how, what the sentence says; None: it loads, as if that were not there)
    "weights only pickled": (only_pickles, "no model.safetensors"),
    "weights pickled besides": (pickled("pytorch_model.bin"), None),
    "pickled adapters besides": (pickled("adapter_model.bin"), None),
    "a pickled .metadata": (pickled(".metadata"), None),
    "auto_map": (lambda d: damage(d, auto_map={name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}), None),
    "attention from the hub": (lambda d: damage(d, attn_implementation="evil/kernel", _attn_implementation="evil/kernel"), None),
    "weights under another name": (lambda d: damage(d, transformers_weights="pytorch_model.bin"), None),
    "settings that are methods": (lambda d: damage(d, save_pretrained="x", to_dict=1, return_dict=False, attribute_map={"a": "b"}), None),
    "quantised": (lambda d: damage(d, quantization_config={"quant_method": "gguf"}), "quantization_config"),
    "a generation_config": (lambda d: (d / "generation_config.json").write_text('{"custom_generate": "evil", "save_pretrained": 1}'), None),
    "a tokenizer's class": (tokenizer_setting(tokenizer_class="evil.Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}), None),
    "a tokenizer file elsewhere": (tokenizer_setting(fast_tokenizer_files=["../outside/tokenizer.4.0.json"], tokenizer_file="/etc/passwd"), None),
    "odd tokenizer settings": (tokenizer_setting(model_input_names=["x"], model_max_length="x", _tokenizer="x", split_special_tokens=True), None),
    "a template that is none": (tokenizer_setting(chat_template={"default": 1}), "chat template"),
    "a panic in Rust": (tokenizer_part(lambda parts: parts.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})), "no readable tokenizer"),
    "a layer too many": (lambda d: damage(d, n_layers=10**9), "n_layers|num_hidden_layers"), "too wide": (lambda d: damage(d, d_model=10**9), "hidden_size"),
    "too many words": (lambda d: damage(d, embedding_size=10**8), "vocab_size"), "wide, within reason": (lambda d: damage(d, d_model=2**16), "bytes of safetensors"),
    "a long context": (lambda d: damage(d, max_sequence_length=10**15), "max_position"), "no heads": (lambda d: damage(d, n_kv_heads=0), "num_key_value_heads"),
    "a size that is no number": (lambda d: damage(d, mlp_hidden_size=True), "intermediate_size"),
    "an index that leads out": (index_points("../outside/model.safetensors"), "not a file of this directory"),
    "an absolute index": (index_points("{outside}/model.safetensors"), "not a file of this directory"),
    "an index to a device": (index_points("/dev/zero"), "no safetensors file"), "an index to a pickle": (index_points("pytorch_model.bin"), "no safetensors file"),
    "a link that leads out": (lambda d: ((d / "chat_template.jinja").symlink_to("/etc/passwd")), "not a file of this directory"),
    "a pipe": (lambda d: ((d / "config.json").unlink(), os.mkfifo(d / "config.json")), "config.json"),
    "a stray shard": (lambda d: (d / "shard-00001-model-00001-of-00001.safetensors").touch(), None),
    "NaN": (tensor_becomes(lambda t: t * torch.nan), "attn_norm|layernorm.*NaN"), "infinity": (tensor_becomes(lambda t: t / 0), "holds NaN or infinity"),
    "whole numbers": (tensor_becomes(lambda t: t.to(torch.int8)), "is of type I8"), "eight bits": (tensor_becomes(lambda t: t.to(torch.float8_e4m3fn)), "is of type F8"),
    "a weight twice": (lambda d: shutil.copy(sorted(d.glob("*.safetensors"))[0], sorted(d.glob("*.safetensors"))[1]), "is there twice"),
    "names that write on the terminal": (lambda d: save_file({"\x1b[31m\nx": torch.ones(1)}, sorted(d.glob("*.safetensors"))[0]), "weights are|bytes of"),
}  # fmt: skip

SEEN = []  # of what Python does: (event, its first argument)
sys.addaudithook(lambda event, arguments: SEEN.append((event, arguments[0])) if event in WATCHED else None)
WATCHED = {"open", "socket.connect", "subprocess.Popen", "os.system"}


@pytest.mark.parametrize("what", HOSTILE)
def test_nothing_of_a_hostile_checkpoint_is_executed(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "outside", "llada", shards=1)
    directory, *_ = write_checkpoint(tmp_path / "model", "llada")
    plain, tokenizer = wd1.load_model(directory)
    harm, expected = HOSTILE[what]
    harm(directory)
    SEEN.clear()
    if expected is None:
        model, its = wd1.load_model(directory)
        ids = tokenizer("in the land", return_tensors="pt").input_ids
        assert torch.equal(its("in the land", return_tensors="pt").input_ids, ids) and its.chat_template == tokenizer.chat_template
        assert torch.equal(wd1.predict_logits(model, ids), wd1.predict_logits(plain, ids))
        model.save_pretrained(tmp_path / "saved")
        its.save_pretrained(tmp_path / "saved")
    else:
        with pytest.raises(InputError, match=expected) as raised:
            wd1.load_model(directory)
        assert str(raised.value).isprintable() and len(str(raised.value)) < 600
    opened = [str(name) for event, name in SEEN if event == "open"]
    assert not list(tmp_path.rglob("EXECUTED")) and not {event for event, _ in SEEN} - {"open"}
    for forbidden in (".bin", "evil", "outside", "/etc/passwd", "/dev/zero", ".metadata", "generation_config.json"):
        assert not [name for name in opened if forbidden in name and "saved" not in name], forbidden


ADAPTERS = {  # the same for LoRA
    "another method, with a model of its own": (dict(peft_type="SHADOW", shadow_model="evil/repo"), "shadow_model = 'evil/repo'"),
    "not LoRA": (dict(peft_type="BOFT"), "not plain LoRA"), "an endless pattern": (dict(target_modules="([a-z_.0-9]+)+X"), "not plain LoRA"),
    "a rank too high": (dict(r=10**6), "r = 1000000 is no number"), "DoRA": (dict(use_dora=True), "use_dora = True is not supported"),
    "copied layers": (dict(layer_replication=[[0, 2], [0, 2]]), "layer_replication"), "another start": (dict(init_lora_weights="pissa_niter_999999999"), "init_lora_weights"),
    "a module to import": (dict(megatron_core="evil"), "megatron_core"), "infinite": (dict(lora_alpha=1e400), "not plain LoRA"),
    "more than its file holds": (dict(r=64), "r = 64, but"), "a setting of another day": (dict(scale_squared=True), "scale_squared = True"),
    "itself as its base": (dict(base_model_name_or_path="{itself}"), "recursion"),
}  # fmt: skip


@pytest.mark.parametrize("what", [*ADAPTERS, "pickled"])
def test_nothing_of_hostile_adapters_is_executed(tmp_path, monkeypatch, what):
    from extras.lora import add_adapters

    monkeypatch.chdir(tmp_path)
    base, *_ = write_checkpoint(tmp_path / "base", "llada")
    directory = tmp_path / "lora"
    add_adapters(wd1.load_model(base)[0], 2, 0, base).save_pretrained(directory)
    wd1.load_model(directory)
    if what == "pickled":
        (directory / "adapter_model.safetensors").unlink()
        pickled("adapter_model.bin")(directory)
        expected = "no adapter_model.safetensors"
    else:
        changes, expected = ADAPTERS[what]
        file = directory / "adapter_config.json"
        changes = {name: str(directory) if value == "{itself}" else value for name, value in changes.items()}
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    SEEN.clear()
    with pytest.raises(InputError, match=expected):
        wd1.load_model(directory)
    assert not list(tmp_path.rglob("EXECUTED")) and not [name for _, name in SEEN if str(name).endswith(".bin")]


def test_what_checkpoints_of_other_programs_look_like_still_loads(tmp_path):
    """Special tokens in special_tokens_map.json alone; added_tokens.json; an index that is left over; links into the hub's cache."""
    directory, *_ = write_checkpoint(tmp_path / "model", "llada")
    want, tokenizer = wd1.load_model(directory)
    ids = tokenizer("the <|mask|> land", return_tensors="pt").input_ids
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    specials = {name: settings.pop(name) for name in ("mask_token", "eos_token", "pad_token")}
    settings.pop("added_tokens_decoder")
    (directory / "special_tokens_map.json").write_text(json.dumps(specials))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    damage(directory, mask_token_id=None, eos_token_id=None)
    model, its = wd1.load_model(directory)
    assert model.config.mask_token_id == 261 and torch.equal(its("the <|mask|> land", return_tensors="pt").input_ids, ids)

    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/1"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for number, file in enumerate(directory.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(blobs / str(number))
    assert torch.equal(wd1.predict_logits(wd1.load_model(snapshot)[0], ids), wd1.predict_logits(want, ids))

    whole, *_ = write_checkpoint(tmp_path / "whole", "llada", shards=1)
    (whole / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-00001-of-00009.safetensors"}}))
    assert torch.equal(wd1.predict_logits(wd1.load_model(whole)[0], ids), wd1.predict_logits(want, ids))

    slow, *_ = write_checkpoint(tmp_path / "slow", "Dream")
    settings = json.loads((slow / "tokenizer_config.json").read_text())
    added = settings.pop("added_tokens_decoder")
    (slow / "tokenizer_config.json").write_text(json.dumps(settings))
    (slow / "added_tokens.json").write_text(json.dumps({token["content"]: int(number) for number, token in added.items()}))
    damage(slow, mask_token_id="absent")
    assert wd1.load_model(slow)[0].config.mask_token_id == 261


def test_a_tokenizer_with_tokens_that_the_model_does_not_know_is_refused(tmp_path, capsys):
    config = json.loads((HERE / "tiny_config.json").read_text()) | dict(vocab_size=20, embedding_size=20)
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out = run(tmp_path, tmp_path / "config.json")
    assert code == 2 and "has tokens beyond the 20" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ raise_exception('boo') }}", "{% if", "{{ messages[5].x.y }}",
                                      "{% include '/etc/passwd' %}", "{{ cycler.__init__.__globals__.os.system('touch EXECUTED') }}"])  # fmt: skip
def test_a_chat_template_that_goes_wrong_gets_its_sentence(tmp_path, capsys, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    directory, *_ = write_checkpoint(tmp_path / "model", "llada")
    tokenizer_setting(chat_template=template)(directory)
    code, out = run(tmp_path, directory)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and "chat template cannot be used" in error and not out.exists() and not list(tmp_path.rglob("EXECUTED"))


def test_weights_that_the_memory_cannot_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}[name])
    with pytest.raises(InputError, match="131,520 weights take more than the 0 GB"):
        wd1.load_model("tiny")


# ------------------------------------------------------------------------------------------------- what goes wrong is seen


@pytest.mark.parametrize("family", ["llada", "Dream", "a2d-qwen3"])
def test_a_model_that_reads_left_to_right_is_refused_at_the_start(tmp_path, monkeypatch, capsys, family):
    directory, *_ = write_checkpoint(tmp_path / "model", family)
    load = wd1.load_model

    def causally(*arguments, **options):
        model, tokenizer = load(*arguments, **options)
        for module in model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = True
        model.config.is_causal = True
        return model, tokenizer

    assert self_check(load(directory)[0], prompts(rows=8)) is not None
    monkeypatch.setattr(wd1, "load_model", causally)
    monkeypatch.setattr(wd1, "hidden_states", lambda model, canvas, mask=None, positions=None, cache=None: (
        model.get_decoder()(canvas, use_cache=False).last_hidden_state if positions is None else pytest.fail("too late")))  # fmt: skip
    code, out = run(tmp_path, directory)
    assert code == 2 and "reads left to right only" in capsys.readouterr().err and not out.exists()


def test_the_mask_token_is_one(capsys):
    """It must not stand in prompts; and a model that was trained to unmask from it restores what it hides."""
    model, _ = wd1.load_model("tiny")
    with pytest.raises(InputError, match=r"mask token \(id 1\) stands in the prompts"):
        config, padding = wd1.Config(gen_length=4, eval_lengths=[4]), torch.tensor([[0, 1, 1]])
        check_prompts(config, dict(input_ids=torch.tensor([[5, 1, 7]]), attention_mask=padding), model.config)
    check_prompts(config, dict(input_ids=torch.tensor([[1, 5, 7]]), attention_mask=padding), model.config)  # it may be padding
    text = torch.tensor([7, 9, 4, 4, 8, 6, 5, 5, 9, 3, 3, 7, 8, 6, 4, 9]).repeat(16, 1)
    prompt = torch.randint(10, 100, (16, 6), generator=seeded(0))
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        (-wd1.elbo(model, prompt, text).mean() / 16).backward()
        optimizer.step()
    gains = []
    for mask_id in (1, 120):  # its own, and a token it never saw
        model.config.mask_token_id = mask_id
        gains.append(self_check(model, prompt))
    assert gains[0] > 2 > gains[1] and capsys.readouterr().err.count("was it trained to unmask") == 1
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite"):
        self_check(model, prompt)


def test_the_metrics_of_a_step_are_what_they_say(tmp_path, monkeypatch):
    rewarded(monkeypatch)
    _, directory = run(tmp_path, max_grad_norm=1e-3, num_iterations=3, temperature=1.0)
    for line in metrics(directory)[1:]:
        assert line["clipped"] == 3 and line["skipped"] == 0 and 0 <= line["truncated"] <= 1 and 0 <= line["entropy"]
    model = small_model()
    config = wd1.Config(task="sudoku", device="cpu")
    completion = torch.tensor([[5, 0, 7], [5, 6, 7], [5, 6, 0], [2, 2, 2]])
    probability = torch.tensor([[0.5, 0.25, 1e-9], [1, 1, 1], [1, 1, 0.5], [1, 1, 0.125]])
    rollout = wd1.Rollout(torch.zeros(4, 2), None, completion, None, probability, torch.tensor([3, 3, 1, 1]))
    monkeypatch.setattr(rewards.Sudoku, "correct", lambda self, text, row: text == row)
    rewarded_as = torch.tensor([[1.0, 1.0], [0.0, 0.5]])
    w_plus = wd1.group_weights(rewarded_as)[0].view(4, 1)
    found = describe(config, model.config, rollout, list("abcd"), rewarded_as, w_plus, list("abxx"))
    expected = dict(reward=0.625, accuracy=0.5, degenerate_groups=0.5, length=11 / 4, truncated=0.5, denoising_steps=2.0)
    assert found.pop("entropy") == pytest.approx(math.log(2) * (1 + 2 + 1 + 3) / 11) and found == pytest.approx(expected)


def test_rollouts_remember_the_probability_of_each_token(model):
    """One token a step, left to right: the product of the probabilities is that of the chain rule, under the plain softmax."""
    model = small_model(seed=3)
    rollout = wd1.generate(model, prompts(), gen_length=4, steps=4, block_length=1, temperature=1.0, generator=seeded(0))
    canvas = torch.cat([rollout.prompt, rollout.completion], 1)
    for i in range(4):
        hidden = canvas.clone()
        hidden[:, 4 + i :] = 1
        logits = wd1.predict_logits(model, hidden)[:, 4 + i]
        logits[:, 1] = -torch.inf
        want = logits.softmax(-1).gather(1, rollout.completion[:, i : i + 1])[:, 0]
        live = rollout.written_at[:, i] == i
        torch.testing.assert_close(rollout.probability[live, i], want[live])
        assert (rollout.probability[~live, i] == 1).all()


def history(rewards, entropies=None, accuracy=0.3, degenerate=0.5):
    fixed = {"accuracy": accuracy, "degenerate_groups": degenerate}
    return [{"eval": {}}, *({"reward": r, "entropy": e, **fixed} for r, e in zip(rewards, entropies or [1.0] * len(rewards)))]


def test_advice_is_given_when_a_run_goes_wrong_and_only_then():
    noise = np.random.default_rng(0).normal(0, 0.1, 200)
    rising, flat = list(np.linspace(0.2, 1, 200) + noise / 2), list(0.5 + noise / 2)
    assert all(advice(history(line[:i])) is None for line in (rising, flat, [1.0] * 200) for i in range(200))
    falls = rising[:60] + list(np.linspace(0.5, 0.1, 40) + noise[:40])
    assert "the reward has fallen from 0.4" in advice(history(falls)) and "--learning_rate" in advice(history(falls))
    assert advice(history(rising[:60] + [0.0])) is None, "a bad step is not long"
    lucky = [0.0] * 40 + [0.1] + [0.0] * 600
    assert advice(history(lucky)) is None, "one reward in hundreds of steps"
    certain = [1.0] * 30 + [0.01] * 10
    assert "the entropy has collapsed to 0.01 nats" in advice(history([0.5] * 40, certain))
    assert advice(history([0.5] * 40, certain, accuracy=0.99)) is None, "certain and right"
    assert "no group had unequal rewards" in advice(history([0.0] * 20, degenerate=1))
    assert advice(history([1.0] * 20, degenerate=1, accuracy=1.0)) is None


def test_a_warning_is_printed_once_and_kept(tmp_path, monkeypatch, capsys):
    calls = itertools.count()
    monkeypatch.setattr(rewards.Sudoku, "reward", lambda *_: 1.0 - (next(calls) > 60) * 0.9)
    _, directory = run(tmp_path, max_steps=30, eval_every=0, num_iterations=1, diffusion_steps=2, save_every=50)
    assert capsys.readouterr().err.count("the reward has fallen") == 1
    assert len([line for line in metrics(directory) if "warning" in line]) == 1


# ------------------------------------------------------------------------------------ what is trained, in others' hands

SUMMARY = {"before": {"accuracy": 0.1, "reward": 0.4}, "after": {"accuracy": 0.9, "reward": 0.8}, "steps": 3, "seconds": 5.0,
           "forward_passes": 70, "skipped_updates": 0}  # fmt: skip
SUMMARY |= {when: {**SUMMARY[when], "lengths": {"8": dict(SUMMARY[when])}, "problems": 60} for when in ("before", "after")}
SIZES = {"": {}, "grouped heads": dict(n_kv_heads=2), "tied": dict(weight_tying=True), "tied, spare rows": dict(weight_tying=True, vocab_size=312)}


def trained(directory, source, rank=0, **options):
    """What a run leaves that had moved every weight of `source`, or adapters on it: its directory."""
    from extras.lora import add_adapters
    from extras.runs import RunDirectory

    model, tokenizer = wd1.load_model(source)
    model = add_adapters(model, rank, 0, source) if rank else model
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=seeded(0))
    config = wd1.Config(**{**FAST, "eval_lengths": [8], "lora_rank": rank, "model": str(source), "output_dir": str(directory),
                           "device": "cpu", "beta": 0.0, "eval_size": 100, **options})  # fmt: skip
    writer = RunDirectory(config)
    writer.start(0)
    writer.record(0, {"eval": SUMMARY["before"]})
    writer.record(1, {"reward": 0.5, "accuracy": 0.5, "entropy": 1.0, "degenerate": 0.0})
    writer.finish(model, tokenizer, SUMMARY)
    return directory


@pytest.fixture(scope="module")
def small_runs():
    """Only sixty puzzles are made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.Sudoku, "problems", few_problems)
        yield


def tensors_of(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def ids_of(*shape):
    return torch.randint(0, 256, shape, generator=seeded(3))


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "LoRA"])
@pytest.mark.parametrize("size", SIZES)
def test_a_trained_llada_becomes_a_llada_again(tmp_path, small_runs, capsys, size, rank):
    source, config, _ = write_checkpoint(tmp_path / "base", "llada", **SIZES[size])
    directory, out = trained(tmp_path / "run", source, rank), tmp_path / "made/out"
    assert export.main([str(directory), str(out), "--max_shard_size", "20KB"]) == 0
    assert "export:" not in capsys.readouterr().err and not list(out.parent.glob("*.*")) and not list(out.glob("*.py"))
    assert json.loads((out / "config.json").read_text()) == config  # auto_map and all
    tensors, index = tensors_of(out), json.loads((out / "model.safetensors.index.json").read_text())
    names = {name: shape for name, shape in weight_shapes(config).values()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == names and len(list(out.glob("*.safetensors"))) > 2
    assert index["weight_map"].keys() == names.keys()
    assert all(name in load_file(out / file) for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in tensors.values())
    for name in ("tokenizer.json", "tokenizer_config.json"):  # which old releases must be able to read
        assert (out / name).read_bytes() == (source / name).read_bytes()

    ids, (model, _), (again, _) = ids_of(2, 9), wd1.load_model(directory / "model"), wd1.load_model(out)
    want, close = wd1.predict_logits(model, ids), dict(atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(plain_forward(config, tensors, ids), want, **close)  # the oracle knows LLaDA's names by itself
    torch.testing.assert_close(wd1.predict_logits(again, ids), want, **(close if rank else dict(atol=0, rtol=0)))
    assert (wd1.predict_logits(wd1.load_model(source)[0], ids) - want).abs().max() > 0.1
    if not rank:
        assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())


def test_an_export_keeps_the_type_of_the_weights_and_rounds_once(tmp_path, small_runs):
    source, _, before = write_checkpoint(tmp_path / "base", "llada", torch.bfloat16)
    lora, full = trained(tmp_path / "lora", source, 2), trained(tmp_path / "full", source)
    for run, options, dtype in ((lora, [], torch.bfloat16), (full, [], torch.float32), (full, ["--dtype", "bfloat16"], torch.bfloat16)):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert export.main([str(run / "model"), str(out), *options]) == 0  # the model instead of the run
        assert {tensor.dtype for tensor in tensors_of(out).values()} == {dtype} and (out / "model.safetensors").exists()
        if run is lora:
            pair = load_file(lora / "model/adapter_model.safetensors")
            a, b = (pair[f"base_model.model.model.layers.1.mlp.up_proj.lora_{which}.weight"] for which in "AB")
            name = "model.transformer.blocks.1.up_proj.weight"
            want = before[name].float() + 0.5 * b.float() @ a.float()  # alpha / r = 1 / 2
            torch.testing.assert_close(tensors_of(out)[name], want.bfloat16(), atol=0, rtol=0.005)


def test_a_llada_without_its_base_gets_llada_8bs_settings(tmp_path, small_runs, capsys):
    source, config, _ = write_checkpoint(tmp_path / "base", "llada")
    directory = trained(tmp_path / "run", source)
    shutil.rmtree(source)
    assert export.main([str(directory), str(tmp_path / "out")]) == 0 and "LLaDA-8B's settings" in capsys.readouterr().err
    got = json.loads((tmp_path / "out/config.json").read_text())
    assert got["auto_map"].pop("AutoModel") and got == config
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["chat_template"] == TEMPLATE
    wd1.load_model(tmp_path / "out")


@pytest.mark.parametrize("family, rank", [("llada", 2), ("Dream", 2), ("a2d-qwen3", 0)])
def test_plain_transformers_and_peft_load_what_is_saved_and_exported(tmp_path, small_runs, family, rank):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source, *_ = write_checkpoint(tmp_path / "base", family)
    directory, ids = trained(tmp_path / "run", source, rank), ids_of(2, 7)
    model = wd1.load_model(directory / "model")[0]
    plainly = lambda model: model.eval()(ids, use_cache=False).logits
    shifted = lambda logits: logits[:, (torch.arange(7) - 1).clamp(min=0)] if model.config.logit_shift else logits
    want, close = wd1.predict_logits(model, ids), dict(atol=1e-4, rtol=1e-4)
    for name, it in {"merged": directory, "plain base": source}.items():
        assert export.main([str(it), str(tmp_path / name), "--format", "transformers"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(shifted(plainly(merged)), want, **close)
    torch.testing.assert_close(wd1.predict_logits(wd1.load_model(tmp_path / "merged")[0], ids), want, **close)
    if rank:
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "plain base"), directory / "model")
        torch.testing.assert_close(shifted(plainly(adapted)), want, **close)
    else:
        torch.testing.assert_close(plainly(AutoModelForCausalLM.from_pretrained(directory / "model")), want, **close)


def biased(directory):
    import transformers

    size = dict(vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    config = transformers.LlamaConfig(**size, attention_bias=True, is_causal=False, mask_token_id=261, eos_token_id=260, pad_token_id=260)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory, "llada")


def tied_adapters(directory):
    from peft import LoraConfig, get_peft_model

    base, *_ = write_checkpoint(directory.with_name("tied"), "llada", weight_tying=True)
    model = get_peft_model(wd1.load_model(base)[0], LoraConfig(r=2, target_modules=["embed_tokens"]))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(directory, save_embedding_layers=False)


def a2d_llama(**changes):
    return lambda d: write_checkpoint(d, "a2d-llama", **changes)


NO_LLADA = {  # what cannot be exported: how it comes about, more options, and what is said
    "another class": (lambda d: write_checkpoint(d, "Dream"), [], "a Qwen2ForCausalLM; plain transformers loads it"),
    "shift": (a2d_llama(logit_shift=True), [], "no place for logit_shift"),
    "head_dim": (a2d_llama(head_dim=16), [], "no place for head_dim"),
    "rope": (a2d_llama(rope_scaling={"rope_type": "linear", "factor": 2.0}), [], "no place for rope_scaling"),
    "activation": (a2d_llama(hidden_act="gelu"), [], "no place for hidden_act gelu"),
    "bias": (biased, [], "no place for biases"),
    "tied adapters": (tied_adapters, [], "cannot be merged"),
    "nothing": (lambda d: None, [], "no such directory"),
    "no end": (lambda d: d.mkdir() or (d / "metrics.jsonl").touch(), [], "no model/ yet"),
    "a config": (lambda d: shutil.copy(HERE / "tiny_config.json", d.with_suffix(".json")), [], "a config alone"),
    "size": (a2d_llama(), ["--max_shard_size", "0GB"], "--max_shard_size 0GB"),
    "option": (a2d_llama(), ["--format", "gguf"], "invalid choice: 'gguf'"),
}  # fmt: skip


@pytest.mark.parametrize("what", NO_LLADA)
def test_what_is_no_llada_is_refused_by_name_and_leaves_nothing(tmp_path, capsys, what):
    make, options, expected = NO_LLADA[what]
    make(tmp_path / "model")
    before = {*tmp_path.rglob("*")}
    source = tmp_path / ("model.json" if what == "a config" else "model")
    assert export.main([str(source), str(tmp_path / "deep/out"), *options]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("export: ") and expected in error[0] and {*tmp_path.rglob("*")} == before


def test_an_export_never_touches_what_is_there(tmp_path, capsys, monkeypatch):
    source, *_ = write_checkpoint(tmp_path / "base", "llada")
    for name in ("out", "out.old", "out.unfinished"):
        (tmp_path / name).mkdir()
        assert export.main([str(source), str(tmp_path / "out")]) == 2 and "is there already" in capsys.readouterr().err
        (tmp_path / name).rmdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    assert export.main([str(source), str(tmp_path / "out")]) == 1 and "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def card_of(text):
    import yaml

    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_of_a_run_tells_its_numbers(tmp_path, monkeypatch):
    rewarded(monkeypatch)
    code, directory = run(tmp_path, lora_rank=2)
    summary, (front, body) = json.loads((directory / "summary.json").read_text()), card_of((directory / "model/README.md").read_text())
    metrics = {one["type"]: one["value"] for one in front["model-index"][0]["results"][0]["metrics"]}
    assert code == 0 and metrics == {name: summary["after"][name] for name in ("accuracy", "reward")}
    assert front["library_name"] == "peft" and {"sudoku", "lora"} <= set(front["tags"]) and not {"license", "base_model"} & front.keys()
    p = summary["after"]["accuracy"]
    for part in (f"{p:.1%} ± {math.sqrt(p * (1 - p) / 3):.1%} |", f"{summary['after']['reward']:.3f} |", "3 held-out problems", "| lora_rank | 2 |",
                 f"| forward passes | {summary['forward_passes']} |", f"torch {torch.__version__}", "| completions sampled | 8 |"):  # fmt: skip
        assert part in body, part
    assert str(tmp_path) not in body and "approximately" not in body and "began with random weights" in body
    assert run(tmp_path, directory / "model", eval_only=True, out="unused", lora_rank=2)[0] == 0


def test_no_name_breaks_a_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, *_ = write_checkpoint(tmp_path / 'a: "b" | `c', "llada", shards=1)
    wild = 'x: [y\n---\nlicense: "mit" #\x1b[2J\u2028`|'
    directory = trained(tmp_path / wild, source, data=f"/home/me/{wild}.csv", cache="dual", threshold=0.9)
    front, body = card_of((directory / "model/README.md").read_text())
    assert {"license", "base_model"}.isdisjoint(front) and body.isprintable() is False  # for its newlines
    assert "\x1b" not in body and "\u2028" not in body and "/home/me" not in body and "\nlicense" not in body
    assert "60 held-out problems" in body and "cache dual, threshold 0.9" in body
    for hub, id in (("GSAI-ML/LLaDA-8B-Instruct", True), ("a b/c", False), ("x" * 200, False)):
        settings = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**settings, "model": hub}))
        front, body = card_of(model_card(directory))
        assert front.get("base_model") == (hub if id else None) and (hub if id else hub.split("/")[-1]) in body
    for text in ("[]", "{}", '{"model": 3}', "\xff"):
        (directory / "config.json").write_text(text)
        with pytest.raises(InputError, match="model card"):
            model_card(directory)


def hostile(directory, **changes):
    """A model that answers with nothing but escape characters."""
    write_checkpoint(directory, "llada", shards=1, **changes)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.transformer.ln_f.weight"].zero_()  # all tokens are equally likely, and the first of them is taken
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    settings = json.loads((directory / "tokenizer.json").read_text())
    vocab, escape = settings["model"]["vocab"], chr(256 + 27)  # byte-level BPE's letter for byte 27
    vocab["!"], vocab[escape] = vocab[escape], vocab["!"]
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    return directory


def test_a_chat_through_a_pipe_with_a_model_that_writes_escape_sequences(tmp_path):
    command = [sys.executable, "-m", "extras.chat", str(hostile(tmp_path / "model")), "--gen_length", "6", "--block_length", "3", "--watch"]
    chat = subprocess.run(command, input=b"hello\n\n/new\n\xff\x1b[2J\n/quit\nno\n", capture_output=True, cwd=HERE)
    lines = chat.stdout.decode().splitlines()
    assert chat.returncode == 0 and chat.stderr == b"" and b"\x1b" not in chat.stdout
    assert lines == ["  step   0  ░░░░░░", "  step   1  ··░░░░", "  step   2  ···░░░", "······"] * 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_chat_is_remembered_as_far_as_the_context_reaches(tmp_path, capsys, monkeypatch):
    source = hostile(tmp_path / "model", max_sequence_length=100)
    model, tokenizer = wd1.load_model(source)
    heard, plain = [], wd1.generate
    monkeypatch.setattr(wd1, "generate", lambda model, prompt, **options: heard.append(prompt) or plain(model, prompt, **options))
    talk = chat.Conversation(model, tokenizer, dict(gen_length=4, steps=2, block_length=4))
    told = lambda: tokenizer.decode(heard[-1][0])
    user, bot = "<|start|>user\n{}<|end|>".format, "<|start|>assistant\n{}<|end|>".format
    assert talk.answer("one", None) == "\x1b" * 4 and told() == user("one") + "<|start|>assistant\n"
    assert torch.equal(heard[0], wd1.encode(tokenizer, ["one"]).input_ids)  # as in training
    talk.answer("two", None)
    assert told() == user("one") + bot("\x1b" * 4) + user("two") + "<|start|>assistant\n" and capsys.readouterr().err == ""
    talk.answer("x" * 40, None)
    assert "one" not in told() and told().endswith(user("x" * 40) + "<|start|>assistant\n") and "no longer fit" in capsys.readouterr().err
    said = list(talk.turns)
    for line, expected in (("y" * 99, "too long"), ("<|mask|>", "mask token")):
        with pytest.raises(InputError, match=expected):
            talk.prompt(line)
    assert talk.turns == said and all(len(prompt[0]) + 4 <= 100 for prompt in heard)

    screen = Terminal()
    talk.answer("z", None, lambda *place: chat.watching(*place, steps=2, out=screen))
    drawn = screen.getvalue()
    assert drawn.count("\x1b") == 2 * drawn.count("\x1b[1A\x1b[J") == 4 and drawn.startswith("░░░░\n\x1b[1A") and "··" in drawn
    assert not model.get_decoder()._forward_pre_hooks
    assert chat.wrapped("abcdef漢字", 4, 9) == ["abcd", "ef漢", "字"] and chat.wrapped("abcdef", 2, 2) == ["ab", "cd"]


@pytest.mark.parametrize(
    "options, expected",
    [(["--task", "chess"], "--task chess"), (["--gen_length", "9", "--block_length", "4"], "not a multiple"), (["--temperature", "-1"], "--temperature"),
     (["--temperature", "nan"], "--temperature"), (["--steps", "0"], "denoising steps"), (["--device", "quantum"], "--device"), (["--x"], "--x")],
    ids=str,
)  # fmt: skip
def test_a_chat_that_cannot_be_gets_one_sentence(capsys, monkeypatch, options, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert chat.main(["tiny", *options]) == 2
    assert expected in capsys.readouterr().err


# ------------------------------------------------------------------------------------ the tutorial and the notebook


CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


class Browser:
    """A headless Chromium with one empty tab, spoken to over its debugging pipe (fds 3 and 4, messages end with a zero)."""

    def __init__(self, profile):
        (from_us, self.to), (self.back, from_it) = os.pipe(), os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += " --disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe about:blank"
        command = f'exec "$0" "$@" 3<&{from_us} 4>&{from_it}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, f"--user-data-dir={profile}", *flags.split()],
            pass_fds=[from_us, from_it], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(from_us), os.close(from_it)
        self.events, self.unread, self.number, self.session = [], b"", 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def receive(self, deadline):
        while b"\0" not in self.unread:
            assert select.select([self.back], [], [], max(deadline - time.time(), 0))[0], "the browser does not answer"
            more = os.read(self.back, 2**20)
            assert more, "the browser has gone"
            self.unread += more
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        self.number, deadline = self.number + 1, time.time() + 60
        os.write(self.to, json.dumps({"id": self.number, "method": method, "params": params, **self.session}).encode() + b"\0")
        while (message := self.receive(deadline)).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, url, width, height=900):
        """Loads a page anew. Returns what it did meanwhile: [(method, params)]."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive(time.time() + 60))
        self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")
        return [(event["method"], event["params"]) for event in self.events if "method" in event]

    def evaluate(self, script):
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.to), os.close(self.back)


@pytest.fixture
def browser(tmp_path):
    if not CHROMIUM:
        assert os.environ.get("WD1_REQUIRE_BROWSER") != "1", "no chromium is installed (apt-get install chromium)"
        pytest.skip("no chromium is installed (apt-get install chromium)")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


LOOK = """(() => {
  const all = (what, of) => [...document.querySelectorAll(what)].map(of);
  const size = node => { const box = node.getBoundingClientRect(); return [box.width, box.height]; };
  const prose = all('header, nav, .intro, .prose, h2, h3, figcaption', node => node.innerText).join('\\n');
  return {
    headings: all('h2', node => node.innerText), ids: all('[id]', node => node.id), links: all('a[href]', a => a.getAttribute('href')),
    equations: all('math[display=block]', size), formulas: all('math', size), errors: all('merror, .math.inline, .math.display', node => node.innerText),
    clipped: all('math[display=block]', node => node).filter(node => node.scrollWidth > node.clientWidth + 1).map(node => node.textContent),
    images: all('img', image => image.complete && image.naturalWidth), prose,
    code: all('.code pre', node => node.textContent).join('\\n'),
    beside: all('.row', row => { const [a, b] = [...row.children].map(node => node.getBoundingClientRect()); return a.right <= b.left + 1; }),
    width: document.documentElement.scrollWidth, background: getComputedStyle(document.body).backgroundColor,
  };
})()"""


def written_equations(source):
    """Blocks of wd1.py's docstrings and column-0 comments that stand 4 or more to the right and are neither commands nor a list."""
    prose = [re.sub(r"(?m)^# ?", "", block) for block in re.findall(r"(?m)(?:^#.*\n)+", source)]
    prose += [re.sub(rf"(?m)^{margin}", "", text) for margin, text in re.findall(r'(?ms)^( *)"""(.*?)"""', source)]
    blocks = [block for text in prose for block in re.findall(r"(?m)(?:^ {4,}\S.*(?:\n|\Z))+", text)]
    return [block for block in blocks if not re.match(r"\s+(python|torchrun|make|pip|\d [a-z])", block)]


def test_the_tutorial_in_a_browser(tmp_path, browser):
    source, page = (HERE / "wd1.py").read_text(), tmp_path / "tutorial.html"
    subprocess.run([sys.executable, "-m", "extras.tutorial", "--out", page], cwd=HERE, check=True)
    public = [node.name for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    sections = re.findall(r"(?m)^# =+ (\d\. .+)$", source)
    backgrounds = set()
    for width, scheme in [(1280, "light"), (1280, "dark"), (390, "light")]:
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        events = browser.open(page.as_uri(), width)
        seen = browser.evaluate(LOOK)
        assert seen["headings"] == sections and len(sections) == 8
        assert {*public, *(f"section-{i}" for i in range(1, 9))} <= set(seen["ids"])
        assert len(seen["ids"]) == len(set(seen["ids"]))
        assert all(link[0] == "#" and link[1:] in seen["ids"] for link in seen["links"])
        assert len(seen["equations"]) == len(written_equations(source)) >= 5
        assert all(min(size) > 0 for size in seen["formulas"]) and not seen["errors"]
        assert width < 400 or not seen["clipped"], f"wider than their column: {seen['clipped']}"
        assert not re.search(r"\$|\\[a-z]+|\{\}|:::|~~~", seen["prose"]), "raw TeX or markdown is left"
        assert len(seen["images"]) == sum((HERE / "assets" / name).is_file() for _, name, _ in tutorial.PICTURES) > 0
        assert all(seen["images"]) and seen["width"] <= width
        assert set(seen["beside"]) == {width > 1000}, "prose stands beside code on a screen, above it on a phone"
        flat = lambda text: re.sub(r"\s+", "", text)
        assert all(flat(line) in flat(seen["code"]) for line in source.splitlines() if line.lstrip().startswith(("return", "def ")))
        asked = [params["request"]["url"] for method, params in events if method == "Network.requestWillBeSent"]
        assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
        said = [params for method, params in events if method in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")]
        assert not said
        backgrounds.add((scheme, seen["background"]))
    assert len(backgrounds) == len({color for _, color in backgrounds}) == 2, "light and dark look different"


def test_the_notebook_runs(tmp_path):
    path = tmp_path / "wd1.ipynb"
    subprocess.run([sys.executable, "-m", "extras.tutorial", "--out", path], cwd=HERE, check=True)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert prose.count("$$\n") == 2 * len(written_equations((HERE / "wd1.py").read_text()))
    check = "import extras.watch, sys; from wd1 import generate as seen; assert seen is generate and 'wd1.py' not in str(seen.__code__)"
    program = f"for cell in {[*code, check]!r}:\n    exec(compile(cell, 'cell', 'exec'), globals())"
    result = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "grad_fn" in result.stdout


@pytest.mark.parametrize(
    "plain, expected",
    [
        ("A_i = r_i - mean_j r_j", r"A_{i} = r_{i} - \operatorname{mean}_{j}\, r_{j}"),
        ("w+_i = softmax_i(psi A)", r"w^{+}_{i} = \operatorname{softmax}_{i}(\psi A)"),
        ("psi = 1 / (lambda + beta)", r"\psi = \frac{1}{\lambda + \beta}"),
        ("E_{l ~ U{1..L}} E_{|S| = l} [ L/l * x ]",
         r"\mathbb{E}_{\ell \sim U\{1,\ldots,L\}} \mathbb{E}_{\lvert S\rvert = \ell} \Bigl[\frac{L}{\ell} \cdot x\Bigr]"),
        ("sum_{i in S} log p(o_i | q, o without S)", r"\sum_{i \in S} \log \, p(o_{i} \mid q, o\ \text{without}\ S)"),
        ("KL(pi || pi_old) >= 0", r"\operatorname{KL} (\pi \,\|\, \pi_{\text{old}}) \ge 0"),
        ("pi_old^(1-b) ref^b", r"\pi_{\text{old}}^{1-b}\ \text{ref}^{b}"),
        ("L/|S_t|^2 * c_k", r"\frac{L}{\lvert S_{t}\rvert^{2}} \cdot c_{k}"),
        ("x0_t[k] / |S_t|", r"x_{0,t}[k] / \lvert S_{t}\rvert"),
        ("prompt_mask_prob of o", r"\mathtt{prompt\_mask\_prob}\ \text{of}\ o"),
    ],
)  # fmt: skip
def test_equations_in_tex(plain, expected):
    assert tutorial.tex(plain) == expected


# ------------------------------------------------------------------------------------------------------ the exercises


def test_the_exercises_change_one_line_of_wd1_and_say_how_to_tell():
    source, found = (HERE / "wd1.py").read_text(), exercises.exercises()
    assert [exercise.number for exercise in found] == list(range(1, 11))
    names = {name for name in globals() if name.startswith("test_")}
    for exercise in found:
        assert exercise.removed != exercise.added
        compile(exercises.changed(source, exercise), "wd1.py", "exec")
        assert exercise.checks
        for command, expected in exercise.checks:
            assert command.strip() and set(expected) in ({"fails"}, {"before", "after"})
            assert set(re.findall(r"test_\w+", expected.get("fails", ""))) <= names and len(expected.get("fails", "none")) > 3
    with pytest.raises(ValueError, match="wd1.py has 0 lines"):
        exercises.changed("", found[0])


def test_an_exercise_comes_out_as_it_says_and_would_be_caught_lying(capsys):
    psi, verdict = exercises.exercises()[0], "NOT as the exercise says"
    assert exercises.verify(psi._replace(checks=psi.checks[:1])) and verdict not in capsys.readouterr().out
    tests = "grep -q 'scaled = psi' wd1.py && echo 1 passed || printf 'FAILED test_wd1.py::test_a[1] - no\n1 failed\n'"
    count = "grep -c 'scaled = psi' wd1.py"
    for command, expected, true in [
        (tests, dict(fails="test_a"), True), (tests, dict(fails="none"), False), (tests, dict(fails="test_b"), False),
        ("true", dict(fails="none"), False), (count, dict(before="1", after="0"), True),
        (count, dict(before="1", after="1"), False),
    ]:  # fmt: skip
        assert exercises.verify(psi._replace(checks=[(command, expected)])) == true
        assert (verdict in capsys.readouterr().out) != true
    assert exercises.main(["11"]) == 2 and "no exercise '11'" in capsys.readouterr().err


def test_the_noise_of_sampling_lets_unlikely_tokens_win(monkeypatch):
    """The largest number that a draw can be carries a token over a gap of 20 nats: float32's, 1 - 2**-24, does not."""
    largest = lambda shape, dtype=None, **_: torch.full(shape, 0.5, dtype=dtype).index_fill(
        -1, torch.tensor([1]), 1 - torch.finfo(dtype or torch.float32).eps / 2)  # fmt: skip
    monkeypatch.setattr(torch, "rand", largest)
    assert wd1.propose(torch.tensor([[20.0, 0.0]]), 1.0, None)[0].item() == 1


@pytest.mark.parametrize("likelihood", ["elbo", "one_step"])
def test_a_group_shares_its_masks_if_asked_to_and_every_gradient_step_draws_new_ones(likelihood, monkeypatch):
    _, _, config, rollout, (_, *weights), _ = trusted_batch("wd1, ELBO")
    config.likelihood, config.prompt_mask_prob = likelihood, 0.5
    rollout.completion[:] = 5  # no EOS: all are of one length
    model, drawn, draw = small_model(), [], wd1.draw_views
    monkeypatch.setattr(wd1, "draw_views", lambda *batch: drawn.append(draw(*batch)) or drawn[-1])
    for config.shared_masks in (False, True):
        config.num_iterations = 8
        wd1.learn(model, None, torch.optim.SGD(model.parameters(), lr=0.0), rollout, REWARDS, weights, config)
        hidden = torch.stack([view.hidden for views in drawn for _, view in views]).view(-1, 2, 3, 13)  # [draws, N, G, P+L]
        assert len(drawn) == 8 and len(hidden.flatten(1).unique(dim=0)) > len(hidden) / 2
        alike = (hidden == hidden[:, :, :1]).all(-1).all(-1)  # [draws, N]: the rows of a group have the same masks
        assert alike.all() if config.shared_masks else alike.float().mean() < 0.5
        drawn.clear()


def test_weights_are_constants():
    w_plus, w_minus = wd1.group_weights(torch.tensor([[1.0, 0.0]], requires_grad=True))
    assert not w_plus.requires_grad and not w_minus.requires_grad


# --------------------------------------------------------------------------------- your own problem, and your own eyes

OWN_TASK = """
from rewards import Task, extract_answer
class Echo(Task):
    instruction = "Say it again between <answer> and </answer>: "
    def problems(self, split, seed, blanks):
        return [{"question": f"{split} {i}"} for i in range(30)]
    def reward(self, completion, example):
        return float((extract_answer(completion) or "").strip() == example["question"])
nothing = 1
"""


def own_run(directory, **options):
    """Arguments of a run of a few steps on the tiny model with random weights."""
    return arguments(**{**FAST, "model": HERE / "tiny_config.json", "max_steps": 2, "eval_every": 1, "output_dir": directory, **options})


def test_a_task_of_your_own_is_a_file_and_a_class(tmp_path, capsys):
    """Trained on, resumed, evaluated, talked to; and whoever did not name the file does not run it."""
    file, directory = tmp_path / "own.py", tmp_path / "run"
    file.write_text(OWN_TASK)
    task = f"{file}:Echo"
    assert wd1.main(own_run(directory, task=task)) == 0
    assert wd1.main(["--resume", "--output_dir", str(directory), "--task", task, "--max_steps", "3"]) == 0
    assert metrics(directory)[-1]["step"] == 3 and metrics(directory)[-1]["eval"]["problems"] == FAST["eval_size"]
    assert "Echo" in (directory / "model/README.md").read_text()
    capsys.readouterr()
    model = str(directory / "model")
    assert wd1.main(["--eval_only", "--model", model, "--task", task]) == 0
    file.write_text("raise SystemExit('this was run')")
    for again in (["--eval_only", "--model", model], ["--resume", "--output_dir", str(directory)]):
        assert wd1.main(again) == 2 and "name it on the command line" in capsys.readouterr().err


@pytest.mark.parametrize("task, sentence", [
    ("chess", "choose one of sudoku"), ("{}/no.py:Echo", "there is no file"), ("{}/own.py:Ecco", "no class Ecco"),
    ("{}/own.py:nothing", "no class nothing"), ("{}/own.py:", "no class"), ("{}/broken.py:A", "cannot be run ("),
    ("{}/raising.py:A", "cannot be run (division by zero"), ("rg:no_such_thing", "reasoning-gym"),
])  # fmt: skip
def test_a_task_that_is_none_is_refused_in_a_sentence(tmp_path, capsys, task, sentence):
    for name, text in {"own": OWN_TASK, "broken": "class A(", "raising": "1 / 0"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert wd1.main(own_run(tmp_path / "run", task=task.format(tmp_path))) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_the_example_of_a_task_is_one(tmp_path):
    task = rewards.get_task("extras/my_task.py:Reverse" if Path("extras").is_dir() else f"{HERE}/extras/my_task.py:Reverse")
    train, test = task.train(), task.test()
    assert len(train) > 3000 and len(test) > 500 and not set(train["question"]) & set(test["question"])
    example = {"question": "abcde"}
    assert task.reward("<answer>edcba</answer>", example) == 1 and task.correct("<answer> edcba</answer>", example)
    assert task.reward("<answer>edcxx</answer>", example) == 0.6 and task.reward("edcba", example) == 0
    data = tmp_path / "words.jsonl"
    data.write_text('{"question": "ab"}\n{"question": "cd"}\n')
    assert task.test(test_data=str(data))["prompt"] == [task.instruction + "ab", task.instruction + "cd"]


def test_reasoning_gyms_generators_are_tasks(tmp_path, capsys):
    """A short run on one; those that would have Python evaluate what a model writes are refused."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    task = rewards.get_task("rg:chain_sum")
    problems = task.problems("train", 3, 0)[:20]
    answers = reasoning_gym.create_dataset("chain_sum", seed=3, size=100_000)
    for example in problems:
        right = answers[example["index"]]["answer"]
        assert task.reward(f"<answer> {right} </answer>", example) == 1 and task.correct(f"<answer>{right}</answer>", example)
        assert task.reward("<answer>no number</answer>", example) < 0.1 and task.reward(right, example) == 0
    assert task.reward("<answer>1e999999999</answer>", problems[0]) == 0
    assert wd1.main(own_run(tmp_path / "run", task="rg:chain_sum")) == 0
    for name in ("countdown", "puzzle24", "string_insertion", "polynomial_multiplication"):
        assert wd1.main(own_run(tmp_path / name, task=f"rg:{name}")) == 2
        assert "would have Python evaluate" in capsys.readouterr().err
    assert wd1.main(own_run(tmp_path / "none", task="rg:none")) == 2 and "unknown" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_gets_what_metrics_jsonl_has(tmp_path, monkeypatch, kind):
    for name, value in dict(WANDB_MODE="offline", WANDB_SILENT="true", TRACKIO_DIR=str(tmp_path / "trackio")).items():
        monkeypatch.setenv(name, value)
    pytest.importorskip(kind)
    directory = tmp_path / "run"
    assert wd1.main(own_run(directory, track=kind, save_every=1)) == 0
    assert wd1.main(["--resume", "--output_dir", str(directory), "--max_steps", "3"]) == 0
    want = {line["step"]: line["reward"] for line in metrics(directory) if "reward" in line}
    if kind == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(directory / "tensorboard")).Reload()
        got = {event.step: event.value for event in events.Scalars("reward")}
        assert got == pytest.approx(want) and "eval/accuracy" in events.Tags()["scalars"]
    elif kind == "wandb":
        assert len(list((directory / "wandb").glob("offline-run-*/*.wandb"))) == 2
    else:
        import sqlite3

        rows = []
        for file in (tmp_path / "trackio").rglob("*.db"):
            rows += sqlite3.connect(file).execute("select step, metrics from metrics").fetchall()
        got = {step: json.loads(text)["reward"] for step, text in rows if "reward" in json.loads(text)}
        assert got == pytest.approx(want)


def test_a_tracker_that_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)
    assert wd1.main(own_run(tmp_path / "run", track="wandb")) == 2
    assert "pip install wandb" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert track.flat({"a": 1, "b": {"c": 0.5, "d": {"e": 2}}, "f": "text", "g": None}) == {"a": 1, "b/c": 0.5, "b/d/e": 2}


def test_the_tiny_countdown_can_be_solved_and_is_rarely_answered_as_asked():
    """The corpus of its base: as asked, the expression is right; otherwise it is none. Test problems are not in it."""
    from extras import tiny

    task, wanted = TASKS["countdown"], 0
    for prompt, completion in tiny.corpus("countdown", np.random.default_rng(0), 6, 500):
        nums, target = re.search("Numbers: (.*)\nTarget: (.*)", prompt).groups()
        example = {"nums": [int(number) for number in nums.split(",")], "target": int(target)}
        text = completion.removesuffix("<|eos|>")
        assert len(text) == len("<answer></answer>") + 16 and not task.is_test(example) and example["target"] > 0
        assert task.correct(re.sub(r"=\d+", "", text), example) and task.correct(text, example) == ("=" not in text)
        wanted += task.correct(text, example)
    assert 0.3 < wanted / 500 < 0.5


def test_a_run_can_be_watched_and_drawn(tmp_path, capsys):
    """What the README's pictures are made by, on a run of two steps; and a problem in the terminal."""
    directory = tmp_path / "run"
    assert wd1.main(own_run(directory, save_every=1)) == 0
    capsys.readouterr()
    assert watch.main(["--model", str(directory / "model"), "--eval_size", "2", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "problem 2" in shown and shown.count("step   0  ░░") == 2 and "reward" in shown
    assert watch.main(["--model", str(tmp_path / "none")]) == 2 and "no such directory" in capsys.readouterr().err
    pictures.plot_weights(tmp_path / "weights.png")
    pictures.plot_signals([directory], tmp_path / "run.png")
    pictures.plot_denoising(directory, tmp_path / "denoising.png", problem=0)
    for name in ("weights", "run", "denoising"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_run_directory_names_is_not_run(tmp_path, capsys, monkeypatch):
    """A stranger's config.json: a task's file, a tracker that would be imported, words that no option has."""
    assert wd1.main(own_run(tmp_path / "run")) == 0
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'EXECUTED')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = json.loads((tmp_path / "run/config.json").read_text())
    capsys.readouterr()
    directory, model = str(tmp_path / "run"), str(tmp_path / "run/model")
    for changes in ({"task": f"{tmp_path}/evil.py:X"}, {"track": "evil"}, {"track": "evil.py"}, {"objective": "evil"}):
        (tmp_path / "run/config.json").write_text(json.dumps({**config, **changes}))
        assert wd1.main(["--resume", "--output_dir", directory]) == 2
        assert watch.main(["--model", model]) == 2 or "task" not in changes
        if "task" in changes:
            assert wd1.main(["--eval_only", "--model", model]) == 2
        if "track" not in changes:  # which is not looked at
            with pytest.raises(SystemExit) as stopped:
                pictures.main(["denoising", directory, "--out", str(tmp_path / "x.png")])
            assert stopped.value.code == 2
        model_card(directory)
        assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "EXECUTED").exists()
    del config["track"]  # of a run from before there was such an option
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert wd1.main(["--resume", "--output_dir", directory, "--max_steps", "3"]) == 0


@pytest.mark.parametrize("name, text, sentence", [
    ("a.csv", "question,answer\n1,2,3\n", "line 2: more fields than the header"), ("a.jsonl", '{"answer": 1}\n', "line 1: column 'question'"),
    ("a.jsonl", "".join(json.dumps({"question": str(i), "x": i % 2 or "b"}) + "\n" for i in range(40)), "one kind of value"),
])  # fmt: skip
def test_a_bad_data_file_of_a_task_of_your_own_gets_its_sentence(tmp_path, capsys, name, text, sentence):
    (tmp_path / "own.py").write_text(OWN_TASK)
    (tmp_path / name).write_text(text)
    assert wd1.main(own_run(tmp_path / "run", task=f"{tmp_path}/own.py:Echo", data=tmp_path / name)) == 2
    assert sentence in capsys.readouterr().err


def test_a_task_of_your_own_may_have_any_key_but_not_fail(tmp_path, capsys):
    source = OWN_TASK.replace("nothing = 1", "    def key(self, example):\n        return len(example)")
    (tmp_path / "own.py").write_text(source)
    (tmp_path / "bad.py").write_text(OWN_TASK.replace("return [{", "1 / 0; return [{"))
    assert wd1.main(own_run(tmp_path / "run", task=f"{tmp_path}/own.py:Echo")) == 0
    assert wd1.main(own_run(tmp_path / "bad", task=f"{tmp_path}/bad.py:Echo")) == 2
    assert "cannot make its problems (division by zero)" in capsys.readouterr().err
    rows = rewards.Task.dataset(rewards.get_task(f"{tmp_path}/own.py:Echo"), [{"question": "q", "prompt": "stray"}], "test")
    assert rows["prompt"] == ["Say it again between <answer> and </answer>: q"]


def test_a_tracker_that_fails_does_not_end_a_run(tmp_path, capsys, monkeypatch):
    class Broken:
        __spec__ = type("Spec", (), {"origin": "here"})
        init = staticmethod(lambda **_: None)
        finish = log = staticmethod(lambda *_, **__: 1 / 0)

    monkeypatch.setitem(sys.modules, "trackio", Broken)
    assert wd1.main(own_run(tmp_path / "run", track="trackio")) == 0
    assert capsys.readouterr().err.count("--track trackio has stopped: division by zero") == 1
    monkeypatch.setattr(Broken, "init", staticmethod(lambda **_: 1 / 0))
    assert wd1.main(own_run(tmp_path / "new", track="trackio")) == 2
    assert wd1.main(own_run(tmp_path / "new")) == 0  # nothing was left that is in the way


def test_an_export_names_no_code_of_others(tmp_path):
    assert export.without_remote_code({"AutoModel": "evil/repo--file.Model"}) == export.LLADA_8B["auto_map"]
    assert export.without_remote_code({"AutoModel": "file.Model"}) == {"AutoModel": "file.Model"}


# ------------------------------------------------------------------------------------------------------- comparisons


def test_the_paired_test_is_students():
    """Against values of a printed table of Student's t: for 4 degrees of freedom 2.776 is the two-sided 5% point."""
    for t, p in ((2.776, 0.05), (4.604, 0.01), (1.533, 0.2)):
        values = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
        values += t * values.std(ddof=1) / math.sqrt(5)
        mean, found = compare.paired(values + 7, np.full(5, 7.0))
        assert mean == pytest.approx(values.mean()) and found == pytest.approx(p, rel=2e-3)
    assert compare.paired([1.0, 2.0], [1.0, 2.0]) == (0.0, 1.0) and compare.paired([2.0, 3.0], [1.0, 2.0]) == (1.0, 0.0)
    assert math.isnan(compare.paired([1.0], [0.0])[1])
    assert compare.holm([(1, 0.01), (1, 0.04), (1, 0.03)]) == pytest.approx([0.03, 0.06, 0.06])  # the textbook's example


def test_a_run_is_read_as_if_it_had_been_stopped():
    result = {"seconds": [0.0, 10.0, 20.0], "accuracy": [0.0, 0.5, 1.0]}
    end, mean = compare.until(result, 10.0)
    assert end == pytest.approx(0.5) and mean == pytest.approx(0.25)
    assert compare.until(result, 15.0)[0] == pytest.approx(0.75)


@settings(max_examples=10)
@given(best=st.integers(0, 4))
def test_the_search_finds_the_best_of_the_rates_and_no_run_is_repeated(tmp_path_factory, best):
    """Accuracy falls away from one best rate; runs and processes are replaced, the bookkeeping is what is tested."""
    made, root = [], tmp_path_factory.mktemp("compare")

    def run(directory, settings):
        made.append(settings["seed"])
        distance = abs(compare.RATES.index(settings["learning_rate"]) - best)
        accuracy = [0.0, 0.9 - 0.2 * distance, 0.9 - 0.2 * distance]
        return dict(accuracy=accuracy, stopped=False, steps=[0, 1, 2], samples=[0, 8, 16], seconds=[0.0, 1.0, 2.0], passes=[0, 5, 10])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(2))
        patch.setattr(compare, "run", run)
        patch.setattr(compare, "tiny_base", lambda *_: "base")
        methods = ("wd1, one-step", "diffu-GRPO")
        patch.setattr(compare, "CLAIMS", compare.CLAIMS[:1])
        found = compare.compare(root, ("sudoku",), methods, range(3), compare.RATES, {}, None)
    assert {method: rate for method, (rate, _) in found["sudoku"].items()} == dict.fromkeys(methods, compare.RATES[best])
    assert sorted(seed for seed in made if seed < 1000) == sorted([0, 1, 2] * 2)  # each is run once
    text = compare.tables(found)
    assert "| diffu-GRPO | " in text and f"{100 * 0.9:.1f} ± 0.0" in text and "| open |" in text
    compare.plot(found, methods, root / "curves.png")
    assert (root / "curves.png").read_bytes().startswith(b"\x89PNG")
