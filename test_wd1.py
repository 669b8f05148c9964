"""Tests of wd1: properties first, each against an oracle that shares no code with
what it checks. The second half of the tutorial, in the order of wd1.py: loading, sampling,
likelihood, weights and loss, the update. The tasks, the program in other hands, faults, hostile
files and extras/ are tested in extras/tests/.
"""

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from unittest import mock

import numpy as np
import pytest
import scipy
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import save_torch_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tokenizers import AddedToken, ByteLevelBPETokenizer
from torch.nn.utils import parameters_to_vector

import wd1
from rewards import TASKS, InputError

torch.set_num_threads(1)  # the models are tiny: more threads only get in each other's way
HERE = Path(__file__).parent
settings.register_profile("wd1", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("wd1")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def descent(model, lr=0.0):
    return torch.optim.SGD(model.parameters(), lr)


# ------------------------------------------------------------- tiny checkpoints in real formats

LLADA = {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "activation_type": "silu",
    "alibi": False, "alibi_bias_max": 8.0, "attention_dropout": 0.0, "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True, "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 32,
    "embedding_dropout": 0.0, "embedding_size": 320, "eos_token_id": 260, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None,
    "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False,
    "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": 261,
    "max_sequence_length": 4096, "mlp_hidden_size": 48, "mlp_ratio": 4,
    "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2,
    "pad_token_id": 260, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05,
    "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
    "transformers_version": "4.46.3", "use_cache": False, "vocab_size": 320, "weight_tying": False,
}  # fmt: skip
QWEN = {
    "attention_dropout": 0.0, "bos_token_id": 256, "eos_token_id": 260, "hidden_act": "silu",
    "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
    "max_position_embeddings": 4096, "max_window_layers": 28, "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.46.2", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 320, "pad_token_id": 260,
}  # fmt: skip
CONFIGS = {
    "llada": LLADA,
    "Dream": {
        **QWEN, "model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": 261,
        "auto_map": {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        },
    },
    "a2d-qwen3": {
        **QWEN, "model_type": "a2d-qwen3", "head_dim": 16, "tie_word_embeddings": True,
        "auto_map": {"AutoModelForMaskedLM": "modeling_qwen3.A2DQwen3LMHeadModel"},
    },
    "a2d-qwen2": {**QWEN, "model_type": "a2d-qwen2"},
    "a2d-llama": {**QWEN, "model_type": "a2d-llama"},
}  # fmt: skip
LLADA_SETTINGS = {  # the stock classes' settings -> LLaDA's
    "hidden_size": "d_model", "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads", "vocab_size": "embedding_size",
    "tie_word_embeddings": "weight_tying", "head_dim": "head_dim",
}  # fmt: skip
LLADA_WEIGHTS = {  # parts of the stock classes' names of weights -> LLaDA's
    "self_attn.": "", "mlp.": "", "o_proj": "attn_out", "gate_proj": "ff_proj",
    "down_proj": "ff_out", "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm",
    "lm_head": "model.transformer.ff_out", "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f", "model.layers": "model.transformer.blocks",
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def stock_config(config):
    """The config of the stock class that has the sizes of a checkpoint's."""
    family = config["model_type"].removeprefix("a2d-")
    sizes = {
        name: config[own]
        for name, llada in LLADA_SETTINGS.items() for own in (name, llada) if own in config
    }  # fmt: skip
    kind = {"llada": "llama", "Dream": "qwen2"}.get(family, family)
    return transformers.AutoConfig.for_model(kind, **sizes)


def weight_shapes(config):
    """The stock class's names of a checkpoint's weights -> (the checkpoint's own name, shape)."""
    with torch.device("meta"):
        stock = transformers.AutoModelForCausalLM.from_config(stock_config(config))
    shapes = {}
    for ours, weight in stock.named_parameters():
        name = ours
        for part, theirs in LLADA_WEIGHTS.items() if config["model_type"] == "llada" else ():
            name = name.replace(part, theirs)
        shapes[ours] = name, tuple(weight.shape)
    return shapes


def write_checkpoint(directory, family, dtype=torch.float32, shards=2, **changes):
    """A random tiny checkpoint with the files that a hub repository of the family has, remote code
    included: (directory, config, tensors)."""
    config = {**CONFIGS[family], **changes}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    code = f"open({str(directory / 'EXECUTED')!r}, 'w'); raise SystemExit('remote code')"
    for module in (
        "configuration_llada", "modeling_llada", "configuration_dream", "modeling_dream",
        "modeling_qwen3", "tokenization_dream",
    ):  # fmt: skip
        (directory / f"{module}.py").write_text(code)
    torch.manual_seed(0)
    tensors = {}
    for ours, (name, size) in weight_shapes(config).items():
        weight = torch.rand(size) + 0.5 if "norm" in ours else torch.randn(size) * 0.3
        tensors[name] = weight.to(dtype)
    share = sum(weight.nbytes for weight in tensors.values()) // shards
    save_torch_state_dict(tensors, directory, max_shard_size=share * 4 // 3)
    write_tokenizer(directory, family)
    return directory, config, tensors


def write_tokenizer(directory, family):
    """A byte-level BPE: 256 bytes, four merges, special tokens and a chat template; Dream's as
    vocab.json + merges.txt."""
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(["in the land in the land"], 260, show_progress=False)
    names = "endoftext", "mask", "start", "end"
    special = [AddedToken(f"<|{name}|>", special=True) for name in names]
    settings = {
        "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>",
        "added_tokens_decoder": {260 + i: each.__getstate__() for i, each in enumerate(special)},
        "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    if family == "Dream":
        settings["tokenizer_class"] = "DreamTokenizer"
        settings["auto_map"] = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
        core.save_model(str(directory))
    else:
        core.add_special_tokens(special)
        core.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def plain_forward(config, tensors, ids, real=None, memory=None, window=None):
    """The oracle: a bidirectional transformer in plain torch, one row at a time, padding simply cut
    away. [B, T, V].

    memory: a dict that remembers keys and values; with a window (first, last + 1), those outside it
    are the remembered ones."""
    w = {ours: tensors[name].float() for ours, (name, _) in weight_shapes(config).items()}
    sizes, embedding = stock_config(config), w["model.embed_tokens.weight"]
    head = len(w["model.layers.0.self_attn.q_proj.weight"]) // sizes.num_attention_heads

    def rms(name, x):
        return F.rms_norm(x, x.shape[-1:], w[name + ".weight"], config["rms_norm_eps"])

    def linear(name, x):
        return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    def rotate(x):  # [heads, T, head]: each place and the one half a head on turn as one number
        speed = config["rope_theta"] ** (-torch.arange(0, head, 2) / head)  # [head / 2]
        turn = torch.exp(1j * torch.outer(torch.arange(x.shape[1]), speed))
        turned = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([turned.real, turned.imag], -1)

    out = torch.zeros(*ids.shape, len(embedding))
    real = torch.ones(ids.shape) if real is None else real
    for row, tokens in enumerate(ids):
        keep = real[row].nonzero()[:, 0]
        x = embedding[tokens[keep]]
        for layer in range(sizes.num_hidden_layers):
            block = f"model.layers.{layer}."
            own = block + "self_attn."
            h = rms(block + "input_layernorm", x)
            q, k, v = (linear(f"{own}{name}_proj", h) for name in "qkv")
            q, k, v = (each.unflatten(-1, (-1, head)).transpose(0, 1) for each in (q, k, v))
            if own + "q_norm.weight" in w:
                q, k = rms(own + "q_norm", q), rms(own + "k_norm", k)
            q, k = rotate(q), rotate(k)  # [heads, T, head]
            if window:
                new = ((keep >= window[0]) & (keep < window[1]))[:, None]
                k, v = (now.where(new, was) for now, was in zip((k, v), memory[row, layer]))
            elif memory is not None:
                memory[row, layer] = k, v
            mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            x = x + linear(own + "o_proj", mixed.transpose(0, 1).flatten(1))
            h = rms(block + "post_attention_layernorm", x)
            gate = F.silu(linear(block + "mlp.gate_proj", h))
            x = x + linear(block + "mlp.down_proj", gate * linear(block + "mlp.up_proj", h))
        out[row, keep] = rms("model.norm", x) @ w.get("lm_head.weight", embedding).T
    return out


# ------------------------------------------------------------------------------------- loading


@pytest.fixture(params=itertools.product(CONFIGS, ("fp32", "bf16")), ids="-".join)
def checkpoint(request, tmp_path):
    """(directory, config, tensors, model, tokenizer)"""
    family, dtype = request.param
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    written = write_checkpoint(tmp_path / "model", family, dtype)
    return *written, *wd1.load_model(written[0])


def test_checkpoints_give_the_logits_of_an_independent_forward_pass(checkpoint):
    _, config, tensors, model, tokenizer = checkpoint
    shift = int(config["model_type"] == "Dream")
    assert (model.config.mask_token_id, model.config.logit_shift) == (261, shift)
    assert tokenizer.decode(tokenizer("in the land").input_ids) == "in the land"
    ids = F.pad(prompts(3, 5), (0, 4), value=261)
    real = torch.ones(3, 9)
    real[1, :2] = real[2, :4] = 0
    want = plain_forward(config, tensors, ids, real)[:, (torch.arange(9) - shift).clamp(min=0)]
    close = partial(torch.testing.assert_close, atol=2e-4, rtol=1e-4)
    got = wd1.predict_logits(model, ids, real[:, :5])  # columns beyond the mask are real
    for row, first in enumerate((0, 2 + shift, 4 + shift)):  # nothing predicts a shifted first
        close(got[row, first:], want[row, first:])
    close(wd1.predict_logits(model, ids[:1]), want[:1])
    columns = torch.tensor([6, 8])
    close(wd1.predict_logits(model, ids, real, columns), got[:, columns])


def test_what_the_project_saves_loads_again_here_and_in_plain_transformers(checkpoint, tmp_path):
    *_, model, tokenizer = checkpoint
    ids = prompts(length=7)
    want, saved = wd1.predict_logits(model, ids), tmp_path / "saved"
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    again, tokenizer_again = wd1.load_model(saved)
    assert again.config.mask_token_id == 261
    assert tokenizer_again("the <|mask|>").input_ids == tokenizer("the <|mask|>").input_ids
    torch.testing.assert_close(wd1.predict_logits(again, ids), want)
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved)
    positions = (torch.arange(7) - int(model.config.logit_shift)).clamp(min=0)
    torch.testing.assert_close(plain(ids).logits[:, positions], want)


def test_random_weights_come_from_a_config_and_its_seed():
    loaded = [wd1.load_model("tiny"), wd1.load_model(HERE / "tiny_config.json")]
    loaded.append(wd1.load_model("tiny", seed=1))
    a, b, c = (parameters_to_vector(model.parameters()) for model, _ in loaded)
    assert torch.equal(a, b) and not torch.equal(a, c)
    tokenizer = loaded[0][1]
    for task in TASKS.values():
        text = task.instruction + "0123 (1+2)/3\n<reasoning></reasoning><answer>x</answer>"
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text and len(ids) < 30


# ------------------------------------------------------------------------------------ sampling


def small_model(seed=0):
    """A tiny random model with strong opinions: 14 tokens, mask 1, EOS 0."""
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=14, tie_word_embeddings=True, initializer_range=0.4, is_causal=False,
        mask_token_id=1, eos_token_id=0, logit_shift=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval()


MODEL = small_model()


def prompts(rows=2, length=4, seed=0):
    return torch.randint(2, 14, (rows, length), generator=seeded(seed))


def evenly(total, parts):
    return [len(part) for part in np.array_split(range(total), parts)]


@st.composite
def schedules(draw):
    blocks, size = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    steps = draw(st.integers(blocks, blocks * size))
    return dict(gen_length=blocks * size, steps=steps, block_length=size)


def test_a_schedule_writes_each_block_in_its_own_steps_or_is_refused_in_words():
    for length, steps, size in itertools.product(range(13), repeat=3):
        blocks = length // size if size else 0
        if 0 < blocks <= steps <= length == blocks * size:
            starts, own_steps = range(0, length, size), evenly(steps, blocks)
            want = [(start, evenly(size, own)) for start, own in zip(starts, own_steps)]
            assert wd1.unmasking_schedule(length, steps, size) == want
        else:
            with pytest.raises(InputError, match="gen_length|denoising steps"):
                wd1.unmasking_schedule(length, steps, size)


@given(schedules(), st.sampled_from([0.0, 0.7, 1.5]), st.integers(0, 99), st.integers(0, 5))
def test_generate_keeps_its_promises(schedule, temperature, seed, padding):
    (_, steps, size), prompt = schedule.values(), prompts()
    options = dict(temperature=temperature, **schedule)
    rollout = wd1.generate(MODEL, prompt, generator=seeded(seed), **options)
    completion, written_at = rollout.completion, rollout.written_at
    assert torch.equal(prompt, prompts()), "it was changed"
    assert (completion != 1).all(), "the mask was written"
    # Each block in its own steps, so many tokens in each, unless an earlier block has an EOS.
    counts = [n for _, own in wd1.unmasking_schedule(**schedule) for n in own]
    plan = torch.arange(steps).repeat_interleave(torch.tensor(counts)).view(-1, size)
    ended = (completion == 0).view(2, -1, size).any(2).cumsum(1)
    done = F.pad(ended, (1, -1)) > 0  # [rows, blocks]
    want = plan.where(~done[..., None], steps)
    assert torch.equal(written_at.view(2, -1, size).sort().values, want)
    assert (completion[written_at == steps] == 0).all(), "what was not needed is EOS"
    want = torch.ones(completion.shape)
    for step in range(steps):  # the probability of each token on the canvas that it was written on
        canvas = torch.cat([prompt, completion.masked_fill(written_at >= step, 1)], 1)
        logits = MODEL(canvas).logits[:, 4:].index_fill(-1, torch.tensor(1), -math.inf)
        found = logits.softmax(-1).gather(-1, completion[..., None])[..., 0]
        want = want.where(written_at != step, found)
    torch.testing.assert_close(rollout.probability, want)
    # A seed fixes everything, padding changes nothing; and at temperature 0 no seed does.
    other, pad = seeded(seed + (temperature == 0)), partial(F.pad, pad=(padding, 0))
    prompt, mask = pad(prompt), pad(torch.ones_like(prompt))
    again = wd1.generate(MODEL, prompt, attention_mask=mask, generator=other, **options)
    assert torch.equal(again.completion, completion)


def plain_generate(model, prompt, gen_length, steps, block_length, threshold=1.0):
    """The oracle: greedy sampling of one row, token by token and step by step, in Python loops."""
    [row] = prompt.tolist()
    canvas = row + [1] * gen_length
    starts = range(len(row), len(canvas), block_length)
    for start, own_steps in zip(starts, evenly(steps, len(starts))):
        for count in evenly(block_length, own_steps):
            logits = model(torch.tensor([canvas])).logits[0].double()
            logits[:, 1] = -math.inf
            sureness, token = (each.tolist() for each in logits.softmax(-1).max(-1))
            masked = [i for i in range(start, start + block_length) if canvas[i] == 1]
            for n, i in enumerate(sorted(masked, key=lambda i: -sureness[i])):
                if n < count or sureness[i] > threshold:
                    canvas[i] = token[i]
    return canvas[len(row) :]


def until_block_end(row, block_length):
    """What can matter of a completion: all up to the end of its first EOS's block, then EOS."""
    end = (row.index(0) // block_length + 1) * block_length if 0 in row else len(row)
    return row[:end] + [0] * (len(row) - end)


@given(schedules(), st.integers(0, 9))
def test_greedy_sampling_equals_a_plain_loop(schedule, seed):
    prompt, size = prompts(rows=3, seed=seed), schedule["block_length"]
    want = [until_block_end(plain_generate(MODEL, row[None], **schedule), size) for row in prompt]
    assert wd1.generate(MODEL, prompt, **schedule).completion.tolist() == want


def test_only_what_can_be_written_is_computed():
    """The head sees the block alone, a row that is done is not run at all, and where there is no
    padding there is no attention mask."""
    options = dict(gen_length=12, steps=6, block_length=4, temperature=1.5, generator=seeded(0))
    watch = lambda owner, name: mock.patch.object(owner, name, wraps=getattr(owner, name))
    with (
        watch(F, "scaled_dot_product_attention") as attention,
        watch(MODEL.lm_head, "forward") as head,
    ):
        completion = wd1.generate(MODEL, prompts(rows=40), **options).completion
    ended = (completion == 0).view(40, 3, 4).any(2).cumsum(1) > 0  # [rows, blocks]
    live = [40, *(~ended).sum(0).tolist()[:2]]
    assert 0 < live[2] < live[1] < 40
    rows = [n for n in live for _ in range(2)]  # two steps a block, and two layers
    assert [call.args[0].shape[:2] for call in head.call_args_list] == [(n, 4) for n in rows]
    calls = [(len(call.args[0]), call.kwargs["attn_mask"]) for call in attention.call_args_list]
    assert calls == [(n, None) for n in rows for _ in range(2)]


@pytest.mark.parametrize("temperature, b", [(0.5, 0.7), (1.0, 0.0), (2.0, 1.0)])
def test_sampling_follows_the_distribution_of_the_model_or_of_a_mixture(temperature, b):
    """One token: frequencies against softmax(logits / temperature), by a chi-squared test."""
    other, canvas = small_model(seed=1), F.pad(prompts(rows=1), (0, 1), value=1)
    ours, theirs = (model(canvas).logits[0, -1].detach().double() for model in (MODEL, other))
    logits = (1 - b) * ours + b * theirs
    logits[1] = -math.inf
    rollout = wd1.generate(
        MODEL, canvas[:, :-1].expand(20_000, -1), gen_length=1, steps=1, block_length=1,
        temperature=temperature, policy=wd1.mixture(other, b), generator=seeded(3),
    )  # fmt: skip
    token = rollout.completion[:, 0]
    expected = (logits / temperature).softmax(-1) * len(token)
    found = np.delete([token.bincount(minlength=14), expected], 1, axis=1)
    assert scipy.stats.chisquare(*found).pvalue > 1e-4
    # The probability kept is the probability at temperature 1, whatever the sampling temperature.
    want = logits.softmax(-1)[token].float()
    torch.testing.assert_close(rollout.probability[:, 0], want)


def test_the_noise_of_sampling_lets_unlikely_tokens_win():
    """The largest number that a draw can be carries a token over a gap of 20 nats: float32's,
    1 - 2**-24, does not."""

    def largest(shape, dtype=torch.float32, **_):
        return torch.tensor([[0.5, 1 - torch.finfo(dtype).eps / 2]], dtype=dtype)

    with mock.patch.object(torch, "rand", largest):
        assert wd1.propose(torch.tensor([[20.0, 0.0]]), 1.0, None)[0].item() == 1


# ---------------------------------------------------------------------------------- likelihood


def log_prob(model, prompt, completion, shown, i, length):
    """log p(o_i | q, the shown tokens), everything else masked: one row, plainly."""
    canvas = prompt + [completion[j] if j in shown else 1 for j in range(length)]
    logits = model(torch.tensor([canvas])).logits[0, len(prompt) + i]
    return logits.log_softmax(-1)[completion[i]].item()


def in_each_order(model, prompt, completion, counted):
    """The log-likelihood by the chain rule in each of the L! orders of the counted tokens."""
    for order in itertools.permutations(range(counted)):
        steps = [(set(order[:n]), i) for n, i in enumerate(order)]
        yield sum(log_prob(model, prompt, completion, *step, len(completion)) for step in steps)


def exact_elbo(model, prompt, completion, counted):
    return fmean(in_each_order(model, prompt, completion, counted))


EOS_CASES = {
    "no eos": ([9, 9, 9, 9], 4), "eos last": ([5, 2, 9, 0], 4), "eos inside": ([9, 9, 0, 7], 3),
    "eos first": ([0, 4, 0, 7], 1),
}  # fmt: skip
per_case = pytest.mark.parametrize("completion, counted", EOS_CASES.values(), ids=EOS_CASES)


@per_case
def test_the_elbo_by_quadrature_is_the_mean_over_orders_and_below_the_log_of_the_mean(
    completion, counted
):
    """Exactly: all subsets S of the counted tokens hidden in turn, with weight 1 / (l C(L, l))."""
    views, places = [], torch.arange(4)
    for size in range(1, counted + 1):
        for subset in itertools.combinations(range(counted), size):
            chosen = torch.isin(places, torch.tensor(subset))[None]
            hidden = F.pad(chosen | (places >= counted), (2, 0))
            weight = chosen / (size * math.comb(counted, size))
            views.append(wd1.View(hidden, torch.tensor([completion]), weight))
    exact = wd1.log_likelihood(MODEL, torch.tensor([[3, 8]]), views).item()
    orders = list(in_each_order(MODEL, [3, 8], completion, counted))
    assert exact == pytest.approx(fmean(orders), abs=1e-4)
    assert exact <= math.log(fmean(map(math.exp, orders))) + 1e-5


def many_estimates(completion, mc_samples):
    """8,000 estimates of one ELBO, each with masks of its own."""
    prompt, rows = (torch.tensor([row]).expand(8_000, -1) for row in ([3, 8], completion))
    with torch.no_grad():
        return wd1.elbo(MODEL, prompt, rows, mc_samples=mc_samples, generator=seeded(0)).double()


@pytest.mark.parametrize("mc_samples", [1, 4])
@per_case
def test_the_monte_carlo_elbo_is_unbiased(completion, counted, mc_samples):
    values = many_estimates(completion, mc_samples)
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - exact_elbo(MODEL, [3, 8], completion, counted)) < 4 * error + 1e-4
    assert error < 0.1, "the test would notice a bias"


def test_levels_spread_evenly_reduce_the_variance():
    """Four masks in one estimate against the mean of four estimates with one each, whose variance
    is a quarter of one's: well below it where equal tokens make the level matter most."""
    one, four = (many_estimates([5] * 8, n) for n in (1, 4))
    assert four.var() < one.var() / 5


def shared(rows, group_size, generator):
    """Noise that `group_size` consecutive rows share, for the estimates' `uniform`."""
    once = lambda columns: torch.rand(rows // group_size, columns, generator=generator)
    return lambda columns: once(columns).repeat_interleave(group_size, 0)


both_estimates = pytest.mark.parametrize("estimate", [wd1.elbo, wd1.one_step_log_likelihood])


@both_estimates
def test_what_follows_the_eos_changes_no_estimate(estimate):
    completions = torch.tensor([[[5, 0, 7, 7]], [[5, 0, 2, 0]]])
    a, b = (estimate(MODEL, prompts(1), each, generator=seeded(0)) for each in completions)
    torch.testing.assert_close(a, b)
    rows = torch.tensor([[5, 0, 0, 3], [4, 4, 4, 4], [6, 9, 4, 0]])
    assert wd1.until_eos(rows, [0, 9]).sum(1).tolist() == [2, 4, 2], "the first of several"


@per_case
@given(st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
def test_one_step_is_the_sum_of_independent_predictions(completion, counted, probability, seed):
    prompt, noise = prompts(1, seed=seed), torch.rand(1, 4, generator=seeded(seed))
    options = dict(prompt_mask_prob=probability, uniform=shared(1, 1, seeded(seed)))
    got = wd1.one_step_log_likelihood(MODEL, prompt, torch.tensor([completion]), **options)
    [seen] = prompt.masked_fill(noise < probability, 1).tolist()
    want = sum(log_prob(MODEL, seen, completion, set(), i, 4) for i in range(counted))
    assert got.item() == pytest.approx(want, abs=1e-4)


# ----------------------------------------------------------------------------- weights and loss

reward_groups = arrays(  # [N, G]
    float, st.tuples(st.integers(1, 4), st.integers(2, 8)), elements=st.floats(-3, 3)
).map(torch.from_numpy)
psis = st.floats(0.01, 8)


@given(reward_groups, psis, st.floats(-5, 5))
def test_group_weights_have_the_properties_of_the_paper(r, psi, constant):
    close = partial(torch.testing.assert_close, atol=1e-9, rtol=1e-6)
    weights = wd1.group_weights(r.clone().requires_grad_(), psi)
    for w, sign in zip(weights, (1, -1)):
        close(w, torch.from_numpy(scipy.special.softmax(sign * psi * r.numpy(), 1)))
        close(w.sum(1), torch.ones(len(r), dtype=r.dtype))
        assert not w.requires_grad, "weights are constants"
    close(wd1.group_weights(r + constant, psi), weights)  # a constant changes nothing
    close(wd1.group_weights(-r, psi), weights[::-1])  # odd in A
    close(wd1.group_weights(r.flip(1), psi)[0], weights[0].flip(1))  # order is irrelevant


@given(reward_groups)
def test_small_psi_makes_the_weights_linear_in_the_advantage(r):
    w_plus, w_minus = wd1.group_weights(r, 1e-4)
    slope = 2 * (r - r.mean(1, keepdim=True)) / r.shape[1]
    torch.testing.assert_close((w_plus - w_minus) / 1e-4, slope, atol=1e-5, rtol=1e-5)


@given(reward_groups, psis, st.integers(0, 99))
def test_the_loss_is_linear_in_the_log_likelihoods_and_blind_to_their_common_part(r, psi, seed):
    weights = wd1.group_weights(r, psi)
    x = torch.randn(r.shape, generator=seeded(seed), dtype=r.dtype, requires_grad=True)
    loss, slope = wd1.wd1_loss(x, *weights), (weights[1] - weights[0]) / len(r)
    loss.backward()
    torch.testing.assert_close(x.grad, slope)
    torch.testing.assert_close(loss, (slope * x).sum())
    common = 7 * torch.arange(len(r))[:, None]
    torch.testing.assert_close(wd1.wd1_loss(x + common, *weights), loss, atol=1e-8, rtol=1e-8)


@given(st.floats(-2, 2), st.integers(2, 6), psis)
def test_equal_rewards_give_exactly_no_loss_and_no_gradient(reward, size, psi):
    completions = prompts(size, seed=size)
    log_p = wd1.elbo(MODEL, prompts(1).expand(size, -1), completions, generator=seeded(0))
    loss = wd1.wd1_loss(log_p[None], *wd1.group_weights(torch.full((1, size), reward), psi))
    gradient = torch.autograd.grad(loss, list(MODEL.parameters()))
    assert loss == 0 and all((part == 0).all() for part in gradient)


@both_estimates
@given(st.integers(0, 999))
def test_a_small_step_raises_the_best_completion_over_the_worst(estimate, seed):
    """Along -grad, the w-weighted sum of log-likelihoods rises; for a pair of best and worst that
    is their difference."""
    tiny, pair = small_model(seed), prompts(2, seed=seed)
    prompt = prompts(1).expand(2, -1)
    log_p = lambda: estimate(tiny, prompt, pair, uniform=shared(2, 2, seeded(seed)))
    before = log_p()
    wd1.wd1_loss(before[None], *wd1.group_weights(torch.tensor([[1.0, 0.0]]))).backward()
    torch.nn.utils.clip_grad_norm_(tiny.parameters(), 1e-3)
    descent(tiny, lr=1.0).step()
    assert log_p().diff() < before.diff()


# ---------------------------------------------------------------------------------- the update

FAST = dict(
    model="no/preset", gen_length=8, block_length=8, diffusion_steps=4, batch_size=9,
    num_generations=3, eval_lengths=[8], micro_batch_size=6, num_iterations=1, max_grad_norm=1e9,
    lora_rank=0, dtype="float32", device="cpu",
)  # fmt: skip
REWARDS = torch.tensor([[1.0, 0.0, 0.5], [0.2, 0.9, 0.1], [0.5, 0.5, 0.5]])


def make_batch(**changes):
    """(model, config, Batch, its views): three groups of three, the last of equal rewards; the
    second row ends at its fourth token."""
    model, config = small_model(), wd1.Config(**FAST | changes)
    prompt = prompts(rows=3, length=5).repeat_interleave(3, 0)
    rollout = wd1.generate(
        model, prompt, gen_length=8, steps=4, block_length=8, temperature=1.0, generator=seeded(2)
    )
    rollout.completion[1, 3] = 0
    weights = (w.flatten() for w in wd1.group_weights(REWARDS, 1 / (config.lam + config.beta)))
    batch = wd1.Batch([{}] * 9, rollout, list("abcdefghi"), REWARDS, *weights)
    torch.manual_seed(3)
    return model, config, batch, wd1.draw_views(config, model.config, batch)


def learned(model, config, batch, views):
    """The loss and the gradient (flat) that `learn` computes."""
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with wd1.autocast(config):
        figures = wd1.learn(model, descent(model), batch, config, draw=lambda *_: views)
    return figures["loss"], parameters_to_vector(weight.grad for weight in model.parameters())


def formula(model, config, batch, views):
    """The same by the paper's equations, written out; wd1.py's own are only the masks it drew."""
    psi, A = 1 / (config.lam + config.beta), REWARDS - REWARDS.mean(1, keepdim=True)
    gap, loss = ((psi * A).softmax(1) - (-psi * A).softmax(1)).flatten(), 0.0
    for row, view in itertools.product(range(6), views):  # the other three have no gap
        tokens, hidden = batch.rollout.completion[row], view.hidden[row]
        L = tokens.tolist().index(0) + 1 if 0 in tokens else 8
        S = hidden[5 : 5 + L].nonzero()[:, 0]
        assert hidden[5 + L :].all(), "the model cannot peek"
        canvas = torch.cat([batch.rollout.prompt[row], tokens]).masked_fill(hidden, 1)
        log_p = model(canvas[None]).logits[0, 5:].log_softmax(-1)
        estimate = L / len(S) * log_p[S, tokens[S]].sum()
        loss = loss - gap[row] * estimate / len(views) / 3  # a mean over three groups
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), parameters_to_vector(gradient)


def padded(model, config, batch, views):
    """Three tokens of padding on the left of every prompt."""
    pad, prompt = partial(F.pad, pad=(3, 0)), batch.rollout.prompt
    changes = dict(prompt=pad(prompt), attention_mask=pad(torch.ones_like(prompt)))
    rollout = batch.rollout._replace(**changes)
    views = [view._replace(hidden=pad(view.hidden)) for view in views]
    return model, config, replace(batch, rollout=rollout), views


@pytest.mark.parametrize("case", [
    {}, dict(mc_samples=2), dict(likelihood="elbo", mc_samples=2), dict(lam=4.0),
], ids=str)  # fmt: skip
def test_the_loss_and_its_gradient_are_the_same_in_every_way_to_compute_them(case):
    want, slope = formula(*make_batch(**case))
    assert slope.norm() > 1e-3
    found = {"padded": learned(*padded(*make_batch(**case)))}
    for way in (
        {}, dict(micro_batch_size=4), dict(gradient_checkpointing=True), dict(dtype="bfloat16"),
    ):  # fmt: skip
        found[str(way)] = learned(*make_batch(**case, **way))
    with mock.patch.dict(wd1.chunked_log_probs.__kwdefaults__, max_logits=3 * 14):
        found["three tokens at a time"] = learned(*make_batch(**case))
    for way, (loss, gradient) in found.items():
        bound = 0.1 if "bfloat16" in way else 1e-4
        assert loss == pytest.approx(want, rel=bound, abs=bound * 0.2), way
        assert (gradient - slope).norm() < bound * slope.norm(), way


@pytest.mark.parametrize("likelihood", ["elbo", "one_step"])
def test_every_step_draws_new_masks_and_leaves_out_rows_that_teach_nothing(likelihood):
    """Four of the nine rows have w+ = w-: they are not run. If all have, one is, for nothing."""
    changes = dict(likelihood=likelihood, prompt_mask_prob=0.5, num_iterations=8)
    (model, config, batch, _), seen = make_batch(**changes), []
    model.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for each in (batch, replace(batch, w_minus=batch.w_plus)):
        wd1.learn(model, descent(model), each, config)
    assert [len(canvas) for canvas in seen] == [5] * 8 + [1] * 8
    assert len(torch.stack(seen[:8]).unique(dim=0)) == 8


def test_an_update_that_is_not_finite_is_skipped_and_one_that_is_large_is_clipped():
    model, config, batch, views = make_batch(max_grad_norm=1e-3, num_iterations=2)
    weights = lambda: parameters_to_vector(model.parameters()).detach()
    before, optimizer = weights(), descent(model, lr=1.0)
    bad = [view._replace(weight=view.weight * torch.inf) for view in views]
    figures = wd1.learn(model, optimizer, batch, config, draw=lambda *_: bad)
    assert figures == dict(loss=None, grad_norm=None, skipped=2)
    assert torch.equal(weights(), before)
    figures = wd1.learn(model, optimizer, batch, config)
    assert figures["grad_norm"] > 1e-3 and 0 < (weights() - before).norm() < 2.1e-3


def test_the_metrics_of_a_step_are_what_they_say():
    completion = torch.tensor([[5, 0, 7], [5, 6, 7], [5, 6, 0], [2, 2, 2]])
    probability = torch.tensor([[0.5, 0.25, 1e-9], [1, 1, 1], [1, 1, 0.5], [1, 1, 0.125]])
    rollout = wd1.Rollout(None, None, completion, None, probability)
    texts, problems = [f"<answer>{n}</answer>" for n in "1234"], [{"answer": n} for n in "1200"]
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.5]])
    batch = wd1.Batch(problems, rollout, texts, rewards, None, None)
    assert wd1.describe(batch, wd1.Config(**FAST, task="gsm8k"), 0) == pytest.approx(dict(
        reward=(2.5 + 2.5 + 0.5 + 0.5) / 4, accuracy=0.5, published_score=0.5,
        degenerate_groups=0.5, length=11 / 4, entropy=math.log(2) * (1 + 2 + 1 + 3) / 11,
    ))  # fmt: skip


def test_a_model_or_a_prompt_that_cannot_be_right_is_refused(checkpoint):
    *_, model, tokenizer = checkpoint
    check = lambda *prompts: wd1.check_model(model, tokenizer, prompts, wd1.Config(**FAST))
    check("in the land", "of the mask")

    def refuses(*prompts_and_sentence):
        *prompts, sentence = prompts_and_sentence
        with pytest.raises(InputError, match=sentence):
            check(*prompts)

    refuses("the <|mask|>", "mask token stands in the prompts")
    template, tokenizer.chat_template = tokenizer.chat_template, "in the land"
    refuses("in", "the", "land", "the same of many prompts")
    tokenizer.chat_template = None
    refuses("in the land", "", "a prompt is empty")
    tokenizer.chat_template = template
    for each in (model.config, *model.modules()):
        each.is_causal = True
    refuses("in the land", "reads left to right only")
    torch.nn.init.constant_(model.get_output_embeddings().weight, torch.nan)
    refuses("in the land", "not finite")


def test_settings_check_themselves_and_are_those_of_the_command_line():
    assert wd1.Config(model="tiny") == wd1.parse_arguments(["--model", "tiny"])
    assert wd1.Config(model="tiny", task="countdown", gen_length=38).gen_length == 38
    assert wd1.Config(model="runs/tiny-sudoku/model").gen_length == 19
    other = wd1.Config(model="x/y", task="sudoku")
    assert (other.gen_length, other.num_iterations) == (256, 8)
    bad = dict(gen_length=8.5, eval_lengths=[], beta=-1, lam=math.nan, likelihood="path")
    for name, value in bad.items():
        with pytest.raises(InputError, match=f"--{name}"):
            wd1.Config(model="tiny", **{name: value})
