"""Tests of wd1: properties first, each against an oracle that shares no code with
what it checks. The second half of the tutorial, in the order of wd1.py: loading, sampling,
likelihood, weights and loss, the update. The tasks, the program in other hands, faults, hostile
files and extras/ are tested in extras/tests/.
"""

import dataclasses
import itertools
import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import rewards
import wd1
from rewards import TASKS, InputError

torch.set_num_threads(1)  # the models are tiny: more threads only get in each other's way
HERE = Path(__file__).parent
settings.register_profile(
    "wd1", deadline=None, derandomize=True, max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("wd1")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------- tiny checkpoints in real formats

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

# ------------------------------------------------------------------------------------- loading


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


# ------------------------------------------------------------------------------------ sampling


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


@given(schedules(), st.sampled_from([0.0, 0.7, 1.5]), st.integers(0, 99))
def test_generate_keeps_its_promises(model, schedule, temperature, seed):
    prompt, watched = prompts(), []
    before, watch = prompt.clone(), lambda *seen: watched.append(seen)
    options = dict(temperature=temperature, **schedule)
    rollout = wd1.generate(model, prompt, generator=seeded(seed), watch=watch, **options)
    assert torch.equal(prompt, before)
    completion, written_at = rollout.completion, rollout.written_at
    assert completion.shape == written_at.shape == (2, schedule["gen_length"])
    assert completion.dtype == torch.long and not (completion == 1).any(), "the mask was written"
    plan = [(start, count) for start, counts in wd1.unmasking_schedule(**schedule) for count in counts]
    for step, (start, count) in enumerate(plan):
        written = written_at == step
        done = (completion[:, :start] == 0).any(1) if start else torch.zeros(2, dtype=torch.bool)
        assert (written.sum(1) == count * ~done).all(), "the scheduled tokens, if no EOS came before"
        outside = torch.ones_like(written)
        outside[:, start : start + schedule["block_length"]] = False
        assert not (written & outside).any(), "and only in the current block"
        if step < len(watched):  # a watcher sees the canvas before the step, and what is proposed
            at, rows, canvas, proposal, _ = watched[step]
            block = slice(start, start + schedule["block_length"])
            assert at == step and rows.tolist() == (~done).nonzero()[:, 0].tolist()
            assert torch.equal(canvas[:, 4:] == 1, (written_at >= step)[rows])
            just = written[rows][:, block]
            assert torch.equal(proposal[just], completion[rows][:, block][just])
    assert (completion[written_at == schedule["steps"]] == 0).all(), "what was not needed is EOS"
    again = wd1.generate(model, prompt, generator=seeded(seed), **options)
    assert torch.equal(again.completion, completion), "a seed fixes everything"
    if temperature == 0:
        other = wd1.generate(model, prompt, generator=seeded(seed + 1), **options)
        assert torch.equal(other.completion, completion), "temperature 0 is deterministic"


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


def test_only_what_can_be_written_is_computed(model):
    """The head sees the block alone, and a row that is done is not run at all."""
    heads, rows = [], []
    hooks = [
        model.lm_head.register_forward_pre_hook(lambda _, x: heads.append(x[0].shape[:2].numel())),
        model.model.register_forward_pre_hook(lambda _, x: rows.append(len(x[0]))),
    ]
    options = dict(gen_length=12, steps=6, block_length=4, temperature=1.5, generator=seeded(0))
    rollout = wd1.generate(model, prompts(rows=40), **options)
    for hook in hooks:
        hook.remove()
    ended = (rollout.completion == 0).view(40, 3, 4).any(2).cumsum(1) > 0  # [rows, blocks]
    live = [40, int((~ended[:, 0]).sum()), int((~ended[:, 1]).sum())]
    assert 0 < live[2] < live[1] < 40
    assert rows == [n for n in live for _ in range(2)] and heads == [4 * n for n in rows]


@given(st.integers(1, 5), st.sampled_from([0.0, 1.0]))
def test_a_row_does_not_depend_on_its_padding(model, padding, temperature):
    prompt = prompts(rows=2)
    padded, mask = F.pad(prompt, (padding, 0), value=0), F.pad(torch.ones_like(prompt), (padding, 0))
    options = dict(gen_length=6, steps=3, block_length=3, temperature=temperature)
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
            model, prompt, gen_length=1, steps=1, block_length=1, temperature=temperature, generator=seeded(3)
        )
        expected = (logits / temperature).softmax(-1) * draws
        counts = torch.bincount(rollout.completion[:, 0], minlength=14).float()
        seen = expected > 0
        assert counts[~seen].sum() == 0
        assert (((counts - expected) ** 2)[seen] / expected[seen]).sum() < 40  # 12 degrees of freedom: p < 1e-4
        # The probability kept is the probability at temperature 1, whatever the sampling temperature.
        want = logits.softmax(-1)[rollout.completion[:, 0]]
        torch.testing.assert_close(rollout.probability[:, 0], want)


def test_a_mixture_changes_the_logits_as_the_formula_says(model):
    """With L = 1 the greedy token is the argmax of the combined logits, computed here."""
    other = small_model(seed=1)
    for seed in range(20):
        prompt = prompts(rows=1, seed=seed)
        canvas = F.pad(prompt, (0, 1), value=1)
        c, r = (wd1.predict_logits(m, canvas)[0, -1] for m in (model, other))
        for b in (0.7, 1.0):
            want = (1 - b) * c + b * r
            want[1] = -math.inf
            options = dict(gen_length=1, steps=1, block_length=1, policy=wd1.mixture(other, b))
            got = wd1.generate(model, prompt, **options).completion
            assert got.item() == want.argmax().item()


@pytest.mark.parametrize("gen_length, block_length, steps", [(10, 4, 5), (8, 4, 1), (8, 4, 9), (8, 0, 4), (0, 4, 4)])
def test_impossible_schedules_are_refused_in_words(model, gen_length, block_length, steps):
    options = dict(gen_length=gen_length, block_length=block_length, steps=steps)
    with pytest.raises(InputError, match="gen_length|denoising steps"):
        wd1.generate(model, prompts(), **options)


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


def test_the_noise_of_sampling_lets_unlikely_tokens_win(monkeypatch):
    """The largest number that a draw can be carries a token over a gap of 20 nats: float32's, 1 - 2**-24, does not."""
    largest = lambda shape, dtype=None, **_: torch.full(shape, 0.5, dtype=dtype).index_fill(
        -1, torch.tensor([1]), 1 - torch.finfo(dtype or torch.float32).eps / 2)  # fmt: skip
    monkeypatch.setattr(torch, "rand", largest)
    assert wd1.propose(torch.tensor([[20.0, 0.0]]), 1.0, None)[0].item() == 1


def test_without_padding_no_attention_mask_is_made(model, monkeypatch):
    masks, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, attn_mask=None, **options: (
        masks.append(attn_mask), attention(*args, attn_mask=attn_mask, **options))[1])  # fmt: skip
    wd1.generate(model, prompts(), gen_length=8, steps=4, block_length=4)
    assert masks and all(mask is None for mask in masks)


# ---------------------------------------------------------------------------------- likelihood


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

@pytest.mark.parametrize("case", EOS_CASES)
def test_the_elbo_is_the_mean_over_orders_and_below_the_log_of_the_mean(model, case):
    completion, counted = EOS_CASES[case]
    with torch.no_grad():
        exact, orders = exact_elbo(model, [3, 8], completion, counted), chain_rule(model, [3, 8], completion, counted)
    assert exact == pytest.approx(sum(orders) / len(orders), abs=1e-4)
    assert exact <= torch.tensor(orders).logsumexp(0).item() - math.log(len(orders)) + 1e-5


def shared(rows, group_size, generator):
    """Noise that `group_size` consecutive rows share, for the estimates' `uniform`."""
    once = lambda columns: torch.rand(rows // group_size, columns, generator=generator)
    return lambda columns: once(columns).repeat_interleave(group_size, 0)


@pytest.mark.parametrize("mc_samples, group_size", [(1, 1), (4, 1), (2, 4)])
@pytest.mark.parametrize("case", EOS_CASES)
def test_the_monte_carlo_elbo_is_unbiased(model, case, mc_samples, group_size):
    completion, counted = EOS_CASES[case]
    rows = 8_000
    with torch.no_grad():
        exact = exact_elbo(model, [3, 8], completion, counted)
        prompt, batch = torch.tensor([[3, 8]]).repeat(rows, 1), torch.tensor([completion]).repeat(rows, 1)
        noise = shared(rows, group_size, seeded(0))
        values = wd1.elbo(model, prompt, batch, mc_samples=mc_samples, uniform=noise).double()
    independent = values.view(-1, group_size).mean(1)
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
        model, prompt, completion, prompt_mask_prob=prompt_mask_prob, uniform=shared(2, group_size, seeded(seed))
    )
    noise = torch.rand(2 // group_size, 4, generator=seeded(seed)).repeat_interleave(group_size, 0)
    for row, counted in enumerate((3, 4)):
        seen = [1 if noise[row, i] < prompt_mask_prob else token for i, token in enumerate(prompt[row].tolist())]
        want = sum(log_prob(model, seen, completion[row].tolist(), set(), i, 4) for i in range(counted))
        assert got[row].item() == pytest.approx(want, abs=1e-4)


@given(st.integers(0, 999), st.integers(1, 40))
def test_chunked_log_probabilities_are_the_direct_ones(model, seed, chunk):
    """Values and gradients, for any set of scored tokens and any number of chunks."""
    prompt, target = prompts(rows=3, seed=seed), torch.randint(0, 14, (3, 6), generator=seeded(seed))
    noise = torch.rand(2, 3, 10, generator=seeded(seed))
    view = wd1.View(noise[0] < 0.5, target, noise[1, :, 4:] * (noise[1, :, 4:] < noise[0, 0, 0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(wd1.chunked_log_probs.__kwdefaults__ or {}, "max_logits", 14 * chunk)
        got = wd1.token_log_probs(model, prompt, view)
        got_gradient = torch.autograd.grad((got * view.weight).sum() + got.sum() * 0, list(model.parameters()))
    canvas = torch.cat([prompt, target], 1).masked_fill(view.hidden, 1)
    want = model(canvas).logits[:, 4:].log_softmax(-1).gather(-1, target[..., None])[..., 0]
    torch.testing.assert_close(got, want * (view.weight != 0), atol=1e-5, rtol=1e-5)
    want_gradient = torch.autograd.grad((want * view.weight).sum(), list(model.parameters()))
    torch.testing.assert_close(got_gradient, want_gradient, atol=1e-5, rtol=1e-5)


def test_levels_spread_evenly_reduce_the_variance(model):
    """Four masks in one estimate against the mean of four estimates with one each."""
    rows = 4_000
    prompt = torch.tensor([[3, 8]]).repeat(rows, 1)
    batch = torch.tensor([[5, 2, 9, 3, 11, 4]]).repeat(rows, 1)
    with torch.no_grad():
        spread = wd1.elbo(model, prompt, batch, mc_samples=4, generator=seeded(0))
        plain = [wd1.elbo(model, prompt, batch, generator=seeded(i)) for i in range(4)]
    assert spread.var() < torch.stack(plain).mean(0).var()


# ----------------------------------------------------------------------------- weights and loss

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
    log_p = lambda: estimate(tiny, prompt, completion, uniform=shared(2, 2, seeded(seed)))  # noqa: E731
    before = log_p()
    wd1.wd1_loss(before[None], *wd1.group_weights(r)).backward()
    with torch.no_grad():
        norm = sum(weight.grad.pow(2).sum() for weight in tiny.parameters()).sqrt()
        for weight in tiny.parameters():
            weight -= 1e-3 * weight.grad / norm
        after = log_p()
    assert (after[0] - after[1]) > (before[0] - before[1])


def test_weights_are_constants():
    w_plus, w_minus = wd1.group_weights(torch.tensor([[1.0, 0.0]], requires_grad=True))
    assert not w_plus.requires_grad and not w_minus.requires_grad


# ---------------------------------------------------------------------------------- the update

FAST = dict(
    model="no/preset", gen_length=8, block_length=8, diffusion_steps=4, batch_size=6, num_generations=3, eval_lengths=[8],
    micro_batch_size=6, num_iterations=1, max_grad_norm=1e9, lora_rank=0, dtype="float32", device="cpu",
)  # fmt: skip
ESTIMATES = {
    "one-step": {}, "one-step, 2 samples": dict(mc_samples=2),
    "ELBO": dict(likelihood="elbo", mc_samples=2), "psi 1/4": dict(lam=4.0),
}  # fmt: skip
REWARDS = torch.tensor([[1.0, 0.0, 0.5], [0.2, 0.9, 0.1], [0.5, 0.5, 0.5]])


def make_batch(**changes):
    """(model, config, Batch, its views): three groups of three, the last of equal rewards; the second
    row ends at its fourth token."""
    config = wd1.Config(**{**FAST, "batch_size": 9, **changes})
    model = small_model()
    prompt = prompts(rows=3, length=5).repeat_interleave(3, 0)
    options = dict(gen_length=8, steps=4, block_length=8, temperature=1.0, generator=seeded(0))
    rollout = wd1.generate(model, prompt, **options)
    rollout.completion[1, 3] = model.config.eos_token_id
    weights = wd1.group_weights(REWARDS, 1 / (config.lam + config.beta))
    texts, problems = list("abcdefghi"), [{}] * 9
    batch = wd1.Batch(problems, rollout, texts, REWARDS, *(w.flatten() for w in weights))
    torch.manual_seed(3)
    return model, config, batch, wd1.draw_views(config, model.config, batch)


def loop_gradient(case, change=lambda *batch: batch, **changes):
    """The loss and the gradient (flat) that `learn` computes, after `change` of (batch, views)."""
    model, config, batch, views = make_batch(**ESTIMATES[case], **changes)
    batch, views = change(batch, views)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with wd1.autocast(config):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        figures = wd1.learn(model, optimizer, batch, config, draw=lambda *_: views)
    return figures["loss"], torch.cat([weight.grad.flatten() for weight in model.parameters()])


def formula(case):
    """The same by the paper's equations, written out; wd1.py's own are only the masks it drew."""
    model, config, batch, views = make_batch(**ESTIMATES[case])
    psi, A = 1 / (config.lam + config.beta), REWARDS - REWARDS.mean(1, keepdim=True)
    w_plus, w_minus = (torch.exp(s * psi * A) / torch.exp(s * psi * A).sum(1, keepdim=True) for s in (1, -1))
    gap, loss, eos = (w_plus - w_minus).flatten(), 0.0, model.config.eos_token_id
    for row in range(6):  # the other three have no gap
        tokens, estimate = batch.rollout.completion[row], 0.0
        end = tokens.tolist().index(eos) + 1 if eos in tokens else 8
        for view in views:
            S = [i for i in range(end) if view.hidden[row, 5 + i]]
            canvas = torch.cat([batch.rollout.prompt[row], tokens]).masked_fill(view.hidden[row], 1)
            assert (canvas[5 + end :] == 1).all() and (config.likelihood == "elbo" or len(S) == end)
            scale = end / len(S) if config.likelihood == "elbo" else 1  # L / l
            log_p = wd1.predict_logits(model, canvas[None])[0].log_softmax(-1)
            estimate = estimate + scale * sum(log_p[5 + i, tokens[i]] for i in S) / len(views)
        loss = loss - gap[row] * estimate / 3  # a mean over three groups
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([part.flatten() for part in gradient])


def padded(batch, views):
    """Three tokens of padding on the left of every prompt."""
    prompt, mask = F.pad(batch.rollout.prompt, (3, 0)), F.pad(torch.ones(9, 5), (3, 0))
    rollout = dataclasses.replace(batch.rollout, prompt=prompt, attention_mask=mask)
    views = [view._replace(hidden=F.pad(view.hidden, (3, 0))) for view in views]
    return dataclasses.replace(batch, rollout=rollout), views


WAYS = {  # what must not change the numbers -> a bound on the relative difference
    "padded on the left": (dict(change=padded), 1e-4),
    "one row at a time": (dict(micro_batch_size=1), 1e-4),
    "micro-batches of four": (dict(micro_batch_size=4), 1e-4),
    "activations recomputed": (dict(gradient_checkpointing=True), 1e-4),
    "bfloat16": (dict(dtype="bfloat16"), 0.1),
}


@pytest.mark.parametrize("case", ESTIMATES)
def test_the_loss_and_its_gradient_are_the_same_in_every_way_to_compute_them(case):
    loss, gradient = loop_gradient(case)
    assert gradient.norm() > 1e-3
    others = {way: (loop_gradient(case, **how), bound) for way, (how, bound) in WAYS.items()}
    for way, (other, bound) in {**others, "the formula": (formula(case), 1e-4)}.items():
        assert (other[1] - gradient).norm() < bound * gradient.norm(), way
        assert other[0] == pytest.approx(loss, rel=bound, abs=bound * 0.2), way


def test_rows_that_teach_nothing_are_left_out_of_the_update():
    """Four of the nine rows have w+ = w-: they are not run. If all have, one is, for nothing."""
    model, config, batch, views = make_batch(likelihood="elbo")
    passes = []
    model.model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    wd1.learn(model, torch.optim.SGD(model.parameters(), lr=0.0), batch, config)
    equal = dataclasses.replace(batch, w_minus=batch.w_plus)
    figures = wd1.learn(model, torch.optim.SGD(model.parameters(), lr=1.0), equal, config)
    assert passes == [5, 1] and figures["loss"] == figures["grad_norm"] == 0


@pytest.mark.parametrize("likelihood", ["elbo", "one_step"])
def test_every_gradient_step_draws_new_masks(likelihood):
    model, config, batch, _ = make_batch(likelihood=likelihood, prompt_mask_prob=0.5, num_iterations=8)
    drawn = []

    def draw(*arguments):
        drawn.append(wd1.draw_views(*arguments)[0].hidden)
        return wd1.draw_views(*arguments)

    wd1.learn(model, torch.optim.SGD(model.parameters(), lr=0.0), batch, config, draw=draw)
    assert len(torch.stack(drawn).flatten(1).unique(dim=0)) == 8


def test_an_update_that_is_not_finite_is_skipped_and_one_that_is_large_is_clipped():
    model, config, batch, views = make_batch(max_grad_norm=1e-3, num_iterations=2)
    before = [weight.clone() for weight in model.parameters()]
    bad = [view._replace(weight=view.weight * torch.inf) for view in views]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    figures = wd1.learn(model, optimizer, batch, config, draw=lambda *_: bad)
    assert figures == dict(loss=None, grad_norm=None, clipped=0, skipped=2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    figures = wd1.learn(model, optimizer, batch, config)
    moved = sum((a - b).pow(2).sum() for a, b in zip(before, model.parameters())) ** 0.5
    assert figures["clipped"] == 2 and 0 < moved < 2.1e-3


def test_the_metrics_of_a_step_are_what_they_say(monkeypatch):
    config = wd1.Config(task="sudoku", device="cpu")
    completion = torch.tensor([[5, 0, 7], [5, 6, 7], [5, 6, 0], [2, 2, 2]])
    probability = torch.tensor([[0.5, 0.25, 1e-9], [1, 1, 1], [1, 1, 0.5], [1, 1, 0.125]])
    rollout = wd1.Rollout(torch.zeros(4, 2), None, completion, None, probability)
    monkeypatch.setattr(rewards.Sudoku, "correct", lambda self, text, row: text == row)
    scores = torch.tensor([[1.0, 1.0], [0.0, 0.5]])
    batch = wd1.Batch(list("abxx"), rollout, list("abcd"), scores, None, None)
    found = wd1.describe(batch, config, 0)
    assert found.pop("entropy") == pytest.approx(math.log(2) * (1 + 2 + 1 + 3) / 11)
    expected = dict(reward=0.625, accuracy=0.5, degenerate_groups=0.5, length=11 / 4, truncated=0.5)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("family", ["llada", "Dream", "a2d-qwen3"])
def test_a_model_that_reads_left_to_right_is_refused(tmp_path, family):
    directory, *_ = write_checkpoint(tmp_path / "model", family)
    model, tokenizer = wd1.load_model(directory)
    config = wd1.Config(**FAST)
    wd1.check_model(model, tokenizer, ["in the land"], config)
    model.config.is_causal = True
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True
    with pytest.raises(InputError, match="reads left to right only"):
        wd1.check_model(model, tokenizer, ["in the land"], config)


def test_a_prompt_that_cannot_be_right_is_refused(tmp_path):
    directory, *_ = write_checkpoint(tmp_path / "model", "llada")
    model, tokenizer = wd1.load_model(directory)
    with pytest.raises(InputError, match="mask token stands in the prompts"):
        wd1.check_model(model, tokenizer, ["in", "the <|mask|>"], wd1.Config(**FAST))
    with pytest.raises(InputError, match="tokens are more than it allows"):
        wd1.check_model(model, tokenizer, ["in " * 3000], wd1.Config(**FAST))
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite"):
        wd1.check_model(model, tokenizer, ["in"], wd1.Config(**FAST))


def test_settings_check_themselves_and_are_those_of_the_command_line():
    assert wd1.Config(model="tiny") == wd1.parse_arguments(["--model", "tiny"])
    assert wd1.Config(model="tiny", task="countdown", gen_length=38).gen_length == 38
    assert wd1.Config(model="runs/tiny-sudoku/model").gen_length == 19 != wd1.Config(model="x/y").gen_length
    assert wd1.Config(model="x/y", task="sudoku").num_iterations == 8
    for bad in (dict(gen_length=0), dict(seed=-1), dict(lam=math.nan), dict(eval_lengths=[]), dict(beta=None),
                dict(gen_length=[8]), dict(likelihood="path"), dict(batch_size=7), dict(bogus=1), dict(lam=0)):  # fmt: skip
        with pytest.raises(InputError, match=f"--{next(iter(bad))}"):
            wd1.Config(model="tiny", **bad)
