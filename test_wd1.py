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
from tokenizers import ByteLevelBPETokenizer
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close

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

LLADA = json.loads("""{
    "architectures": ["LLaDAModelLM"], "activation_type": "silu", "alibi": false,
    "attention_dropout": 0.0, "attention_layer_norm": false, "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"
    },
    "bias_for_layer_norm": false, "block_group_size": 1, "block_type": "llama", "d_model": 32,
    "embedding_dropout": 0.0, "embedding_size": 320, "eos_token_id": 260, "include_bias": false,
    "include_qkv_bias": false, "init_device": "meta", "input_emb_norm": false,
    "layer_norm_type": "rms", "layer_norm_with_affine": true, "mask_token_id": 261,
    "max_sequence_length": 4096, "mlp_hidden_size": 48, "mlp_ratio": 4,
    "multi_query_attention": null, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2,
    "pad_token_id": 260, "precision": "amp_bf16", "rms_norm_eps": 1e-05, "rope": true,
    "rope_theta": 500000.0, "scale_logits": false, "transformers_version": "4.46.3",
    "use_cache": false, "vocab_size": 320, "weight_tying": false
}""")
QWEN = json.loads("""{
    "attention_dropout": 0.0, "bos_token_id": 256, "eos_token_id": 260, "hidden_act": "silu",
    "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 4096,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "pad_token_id": 260, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0,
    "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "use_cache": true, "use_sliding_window": false, "vocab_size": 320
}""")
REMOTE = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
CONFIGS = {
    "llada": LLADA,
    "Dream": QWEN | dict(mask_token_id=261, auto_map=REMOTE),
    "a2d-qwen3": QWEN | dict(head_dim=16, tie_word_embeddings=True),
    "a2d-qwen2": QWEN,
    "a2d-llama": QWEN,
}
LLADA_NAMES = dict(line.split() for line in """\
hidden_size                 d_model
intermediate_size           mlp_hidden_size
num_hidden_layers           n_layers
num_attention_heads         n_heads
num_key_value_heads         n_kv_heads
vocab_size                  embedding_size
tie_word_embeddings         weight_tying
head_dim                    head_dim
lm_head                     model.transformer.ff_out
model.embed_tokens          model.transformer.wte
model.norm                  model.transformer.ln_f
model.layers                model.transformer.blocks
self_attn.o_proj            attn_out
self_attn.q                 q
self_attn.k                 k
self_attn.v                 v
mlp.gate_proj               ff_proj
mlp.down_proj               ff_out
mlp.up_proj                 up_proj
input_layernorm             attn_norm
post_attention_layernorm    ff_norm
""".splitlines())  # of settings and weights: the stock class's -> LLaDA's  # fmt: skip
TOKENIZER = json.loads("""{
    "added_tokens_decoder": {
        "260": {"content": "<|endoftext|>", "special": true},
        "261": {"content": "<|mask|>", "special": true},
        "262": {"content": "<|start|>", "special": true},
        "263": {"content": "<|end|>", "special": true}
    },
    "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", null]},
    "eos_token": "<|endoftext|>", "mask_token": "<|mask|>", "pad_token": "<|endoftext|>",
    "tokenizer_class": "DreamTokenizer"
}""")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def stock_model(config):
    """The stock class in a checkpoint's sizes, without data, and its names of weights -> theirs."""
    family = config["model_type"].removeprefix("a2d-")
    kind = {"llada": "llama", "Dream": "qwen2"}.get(family, family)
    table = LLADA_NAMES if family == "llada" else {name: name for name in LLADA_NAMES}
    sizes = {name: config[own] for name, own in table.items() if own in config}
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(kind, **sizes)
        stock = transformers.AutoModelForCausalLM.from_config(config)
    names = {name: name for name, _ in stock.named_parameters()}
    for part, theirs in table.items():
        names = {name: own.replace(part, theirs) for name, own in names.items()}
    return stock, names


def write_checkpoint(directory, family, dtype=torch.float32, shards=2, **changes):
    """A random tiny checkpoint with the files that a hub repository of the family has, remote code
    included: (directory, config, tensors)."""
    config = {"model_type": family, **CONFIGS[family], **changes}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    code = f"open({str(directory / 'EXECUTED')!r}, 'w'); raise SystemExit('remote code')"
    for module in """configuration_llada modeling_llada configuration_dream modeling_dream
    tokenization_dream""".split():
        (directory / f"{module}.py").write_text(code)
    torch.manual_seed(0)
    (stock, names), tensors = stock_model(config), {}
    for name, weight in stock.named_parameters():
        size = weight.shape
        weight = torch.rand(size) + 0.5 if "norm" in name else torch.randn(size) * 0.3
        tensors[names[name]] = weight.to(dtype)
    share = sum(weight.nbytes for weight in tensors.values()) // shards
    save_torch_state_dict(tensors, directory, max_shard_size=share * 4 // 3)
    write_tokenizer(directory, family)
    return directory, config, tensors


def write_tokenizer(directory, family):
    """A byte-level BPE: 256 bytes, four merges, special tokens and a chat template; Dream's as
    vocab.json + merges.txt."""
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(["in the land in the land"], 260, show_progress=False)
    if family == "Dream":
        core.save_model(str(directory))
    else:
        core.add_special_tokens(["<|endoftext|>", "<|mask|>", "<|start|>", "<|end|>"])
        core.save(str(directory / "tokenizer.json"))
    settings = TOKENIZER | {"chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def plain_forward(config, tensors, ids, real=None, memory=None, fresh=None):
    """The oracle: a bidirectional transformer in plain torch, one row at a time, padding simply cut
    away. [B, T, V].

    memory: a dict that remembers keys and values; with `fresh`, bool [T], those of the other
    columns are the remembered ones."""
    stock, names = stock_model(config)
    w = {name: tensors[own].float() for name, own in names.items()}
    sizes, embedding = stock.config, w["model.embed_tokens.weight"]
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
            qkv = (linear(f"{own}{name}_proj", h).unflatten(-1, (-1, head)) for name in "qkv")
            q, k, v = (each.transpose(0, 1) for each in qkv)  # [heads, T, head]
            if own + "q_norm.weight" in w:
                q, k = rms(own + "q_norm", q), rms(own + "k_norm", k)
            q, k = rotate(q), rotate(k)
            if fresh is not None:
                new = fresh[keep, None]
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


CASES = *itertools.product(CONFIGS, ["fp32"]), ("llada", "bf16")


@pytest.fixture(params=CASES, ids="-".join)
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
    read_at = (torch.arange(9) - shift).clamp(min=0)
    want, there = plain_forward(config, tensors, ids, real)[:, read_at], real[:, read_at] == 1
    close = partial(assert_close, atol=2e-4, rtol=1e-4)
    got = wd1.predict_logits(model, ids, real[:, :5])  # columns beyond the mask are real
    close(got[there], want[there])
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
    assert_close(wd1.predict_logits(again, ids), want)
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved)
    positions = (torch.arange(7) - int(model.config.logit_shift)).clamp(min=0)
    assert_close(plain(ids).logits[:, positions], want)


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


def block_end(row, size):
    """How many tokens of a row there are up to the end of its first EOS's block."""
    return (row.index(0) // size + 1) * size if 0 in row else len(row)


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
    counts = [n for own in evenly(steps, len(written_at[0]) // size) for n in evenly(size, own)]
    plan = [step for step, count in enumerate(counts) for _ in range(count)]
    for row, when in zip(completion.tolist(), written_at.view(2, -1, size).sort().values):
        live = block_end(row, size)
        assert when.flatten().tolist() == plan[:live] + [steps] * len(plan[live:])
        assert not any(row[live:]), "what was not needed is EOS"
    want = torch.ones(completion.shape)
    for step in range(steps):  # the probability of each token on the canvas that it was written on
        canvas = torch.cat([prompt, completion.masked_fill(written_at >= step, 1)], 1)
        logits = MODEL(canvas).logits[:, 4:].index_fill(-1, torch.tensor(1), -math.inf)
        found = logits.softmax(-1).gather(-1, completion[..., None])[..., 0]
        want = want.where(written_at != step, found)
    assert_close(rollout.probability, want)
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
    end = block_end(row, block_length)
    return row[:end] + [0] * (len(row) - end)


@given(schedules(), st.integers(0, 9))
def test_greedy_sampling_equals_a_plain_loop(schedule, seed):
    prompt, size = prompts(rows=3, seed=seed), schedule["block_length"]
    want = [until_block_end(plain_generate(MODEL, row[None], **schedule), size) for row in prompt]
    assert wd1.generate(MODEL, prompt, **schedule).completion.tolist() == want


def test_only_what_can_be_written_is_computed():
    """The head sees the block alone, a row that is done is not run at all, and where there is no
    padding there is no attention mask."""
    model, seen, heads = small_model(), [], []
    model.model.register_forward_pre_hook(lambda _, given: seen.append((len(given[0]), given[1])))
    model.lm_head.register_forward_pre_hook(lambda _, given: heads.append(given[0].shape[:2]))
    options = dict(gen_length=8, steps=4, block_length=4, temperature=1.5, generator=seeded(0))
    completion = wd1.generate(model, prompts(rows=40), **options).completion
    live = int((completion[:, :4] != 0).all(1).sum())
    assert 0 < live < 40
    rows = 40, 40, live, live  # two steps a block
    assert heads == [(n, 4) for n in rows] and seen == [(n, None) for n in rows]


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


def test_the_noise_of_sampling_lets_unlikely_tokens_win():
    """The largest number that a draw can be carries a token over a gap of 20 nats: float32's,
    1 - 2**-24, does not."""

    def largest(shape, dtype=torch.float32, **_):
        return torch.tensor([[0.5, 1 - torch.finfo(dtype).eps / 2]], dtype=dtype)

    with mock.patch.object(torch, "rand", largest):
        assert wd1.propose(torch.tensor([[20.0, 0.0]]), 1.0, None)[0].item() == 1


# ---------------------------------------------------------------------------------- likelihood


def log_probs(model, prompt, completion, hidden, temperature=1.0):
    """log p(o_i | q, x) of each token of a row, x being those that are not hidden: [L]."""
    canvas = torch.cat([prompt, completion.masked_fill(hidden, 1)])
    logits = model(canvas[None]).logits[0, len(prompt) :] / temperature
    return logits.log_softmax(-1)[torch.arange(len(completion)), completion]


def end(completion):
    """How many tokens of a row count: those up to its first EOS."""
    return completion.tolist().index(0) + 1 if 0 in completion else len(completion)


PROMPT, PLACES = torch.tensor([3, 8]), torch.arange(4)
EOS_CASES = {
    "no eos": [9, 9, 9, 9], "eos last": [5, 2, 9, 0], "eos inside": [9, 9, 0, 7],
    "eos first": [0, 4, 0, 7],
}  # fmt: skip
EOS_CASES = {name: torch.tensor(row) for name, row in EOS_CASES.items()}
per_case = pytest.mark.parametrize("completion", EOS_CASES.values(), ids=EOS_CASES)


def in_each_order(completion):
    """The log-likelihood by the chain rule in each of the L! orders of the counted tokens."""
    for order in itertools.permutations(range(end(completion))):
        hidden, total = torch.ones(4, dtype=bool), 0.0
        for i in order:
            total += log_probs(MODEL, PROMPT, completion, hidden)[i].item()
            hidden[i] = False
        yield total


def exact_elbo(completion):
    return fmean(in_each_order(completion))


@per_case
def test_the_elbo_by_quadrature_is_the_mean_over_orders_and_below_the_log_of_the_mean(completion):
    """Exactly: all subsets S of the counted tokens hidden in turn, with weight 1 / (l C(L, l))."""
    L, views = end(completion), []
    for size in range(1, L + 1):
        for subset in itertools.combinations(range(L), size):
            chosen = torch.isin(PLACES, torch.tensor(subset))[None]
            hidden = F.pad(chosen | (PLACES >= L), (2, 0))
            weight = chosen / (size * math.comb(L, size))
            views.append(wd1.View(hidden, completion[None], weight))
    exact = wd1.log_likelihood(MODEL, PROMPT[None], views).item()
    orders = list(in_each_order(completion))
    assert exact == pytest.approx(fmean(orders), abs=1e-4)
    assert exact <= math.log(fmean(map(math.exp, orders))) + 1e-5


def many_estimates(completion, mc_samples):
    """8,000 estimates of one ELBO, each with masks of its own."""
    prompt, rows = (row.expand(8_000, -1) for row in (PROMPT, completion))
    with torch.no_grad():
        return wd1.elbo(MODEL, prompt, rows, mc_samples=mc_samples, generator=seeded(0)).double()


@pytest.mark.parametrize("mc_samples", [1, 4])
@per_case
def test_the_monte_carlo_elbo_is_unbiased(completion, mc_samples):
    values = many_estimates(completion, mc_samples)
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - exact_elbo(completion)) < 4 * error + 1e-4
    assert error < 0.1, "the test would notice a bias"


def test_levels_spread_evenly_reduce_the_variance():
    """Four masks in one estimate against the mean of four estimates with one each, whose variance
    is a quarter of one's: well below it where equal tokens make the level matter most."""
    one, four = (many_estimates(torch.tensor([5] * 8), n) for n in (1, 4))
    assert four.var() < one.var() / 5


both_estimates = pytest.mark.parametrize("estimate", [wd1.elbo, wd1.one_step_log_likelihood])


@both_estimates
def test_what_follows_the_eos_changes_no_estimate(estimate):
    completions = torch.tensor([[[5, 0, 7, 7]], [[5, 0, 2, 0]]])
    a, b = (estimate(MODEL, prompts(1), each, generator=seeded(0)) for each in completions)
    assert_close(a, b)
    rows = torch.tensor([[5, 0, 0, 3], [4, 4, 4, 4], [6, 9, 4, 0]])
    assert wd1.until_eos(rows, [0, 9]).sum(1).tolist() == [2, 4, 2], "the first of several"


@per_case
@given(st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
def test_one_step_is_the_sum_of_independent_predictions(completion, probability, seed):
    prompt, noise = prompts(1, seed=seed), torch.rand(1, 4, generator=seeded(seed))
    options = dict(prompt_mask_prob=probability, generator=seeded(seed))
    got = wd1.one_step_log_likelihood(MODEL, prompt, completion[None], **options)
    [seen] = prompt.masked_fill(noise < probability, 1)
    want = log_probs(MODEL, seen, completion, PLACES >= 0)[: end(completion)].sum()
    assert got.item() == pytest.approx(want.item(), abs=1e-4)


# ----------------------------------------------------------------------------- weights and loss

reward_groups = arrays(  # [N, G]
    float, st.tuples(st.integers(1, 4), st.integers(2, 8)), elements=st.floats(-3, 3)
).map(torch.from_numpy)
psis = st.floats(0.01, 8)


@given(reward_groups, psis, st.floats(-5, 5))
def test_group_weights_have_the_properties_of_the_paper(r, psi, constant):
    close = partial(assert_close, atol=1e-9, rtol=1e-6)
    weights = wd1.group_weights(r.clone().requires_grad_(), psi)
    for w, sign in zip(weights, (1, -1)):
        close(w, torch.from_numpy(scipy.special.softmax(sign * psi * r.numpy(), 1)))
        assert not w.requires_grad, "weights are constants"
    close(wd1.group_weights(r + constant, psi), weights)  # a constant changes nothing
    whole = r.round()
    assert_close(wd1.group_weights(whole.int(), psi), wd1.group_weights(whole.float(), psi))


@given(reward_groups)
def test_small_psi_makes_the_weights_linear_in_the_advantage(r):
    w_plus, w_minus = wd1.group_weights(r, 1e-4)
    slope = 2 * (r - r.mean(1, keepdim=True)) / r.shape[1]
    assert_close((w_plus - w_minus) / 1e-4, slope, atol=1e-5, rtol=1e-5)


@given(reward_groups, psis, st.integers(0, 99))
def test_the_loss_is_linear_in_the_log_likelihoods_and_blind_to_their_common_part(r, psi, seed):
    weights = wd1.group_weights(r, psi)
    x = torch.randn(r.shape, generator=seeded(seed), dtype=r.dtype)
    loss, slope = wd1.wd1_loss(x, *weights), (weights[1] - weights[0]) / len(r)
    assert_close(loss, (slope * x).sum())
    common = 7 * torch.arange(len(r))[:, None]
    assert_close(wd1.wd1_loss(x + common, *weights), loss, atol=1e-8, rtol=1e-8)


@given(st.floats(-2, 2), st.integers(2, 6), psis)
def test_equal_rewards_give_exactly_no_loss_and_no_gradient(reward, size, psi):
    log_p = torch.randn(1, size, generator=seeded(size), requires_grad=True)
    loss = wd1.wd1_loss(log_p, *wd1.group_weights(torch.full((1, size), reward), psi))
    loss.backward()
    assert loss == 0 and not log_p.grad.any()


@both_estimates
@given(st.integers(0, 999))
def test_a_small_step_raises_the_best_completion_over_the_worst(estimate, seed):
    """Along -grad, the w-weighted sum of log-likelihoods rises; for a pair of best and worst that
    is their difference."""
    tiny, pair = small_model(seed), prompts(2, seed=seed)
    prompt = prompts(1).expand(2, -1)
    log_p = lambda: estimate(tiny, prompt, pair, generator=seeded(seed))
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
    """(model, config, Batch, its views): three groups of three, the last of equal rewards, with
    prompts of 5, 3 and 4 tokens, padded on the left; the second row ends at its fourth token."""
    model, config = small_model(), wd1.Config(**FAST | changes)
    prompt = prompts(rows=3, length=5).repeat_interleave(3, 0)
    mask = torch.ones_like(prompt)
    mask[3:6, :2] = mask[6:, 0] = 0
    probability = torch.rand(9, 8, generator=seeded(2))
    rollout = wd1.Rollout(prompt, mask, prompts(9, 8, seed=2), None, probability)
    rollout.completion[1, 3] = 0
    weights = (w.flatten() for w in wd1.group_weights(REWARDS, 1 / (config.lam + config.beta)))
    batch = wd1.Batch([{}] * 9, rollout, list("abcdefghi"), REWARDS, *weights)
    torch.manual_seed(3)
    return model, config, batch, wd1.draw_views(config, model.config, batch)


def learned(model, config, batch, learn=wd1.learn, **options):
    """The loss and the gradient (flat) that `learn` computes first."""
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with wd1.autocast(config):
        figures = learn(model, descent(model), batch, config, **options)
    return figures["loss"], parameters_to_vector(weight.grad for weight in model.parameters())


def formula(model, config, batch, views):
    """The same by the paper's equations, written out; wd1.py's own are only the masks it drew."""
    psi, A = 1 / (config.lam + config.beta), REWARDS - REWARDS.mean(1, keepdim=True)
    gap, loss = ((psi * A).softmax(1) - (-psi * A).softmax(1)).flatten(), 0.0
    for row, view in itertools.product(range(6), views):  # the other three have no gap
        prompt, real, completion, *_ = (each[row] for each in batch.rollout if each is not None)
        hidden, L = view.hidden[row], end(completion)
        S = hidden[5 : 5 + L].nonzero()[:, 0]
        assert hidden[5 + L :].all(), "the model cannot peek"
        seen = prompt.masked_fill(hidden[:5], 1)[real == 1]
        estimate = L / len(S) * log_probs(model, seen, completion, hidden[5:])[S].sum()
        loss = loss - gap[row] * estimate / len(views) / 3  # a mean over three groups
    return loss.item(), parameters_to_vector(torch.autograd.grad(loss, [*model.parameters()]))


def agrees(found, want, way):
    """Whether a loss and its gradient, computed in some way, are what they should be."""
    (loss, gradient), bound = found, 0.1 if "bfloat16" in str(way) else 1e-4
    assert loss == pytest.approx(want[0], rel=bound, abs=bound * 0.2), way
    assert (gradient - want[1]).norm() < bound * want[1].norm(), way


@pytest.mark.parametrize("case", [
    {}, dict(mc_samples=2), dict(likelihood="elbo", mc_samples=2), dict(lam=4.0),
], ids=str)  # fmt: skip
def test_the_loss_and_its_gradient_are_the_same_in_every_way_to_compute_them(case):
    want = formula(*make_batch(**case))
    assert want[1].norm() > 1e-3
    ways = {}, dict(micro_batch_size=4), dict(gradient_checkpointing=True), dict(dtype="bfloat16")
    with mock.patch.dict(wd1.chunked_log_probs.__kwdefaults__, max_logits=3 * 14):  # three tokens
        for way in ways:
            *batch, views = make_batch(**case, **way)
            agrees(learned(*batch, draw=lambda *_: views), want, way)


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


def test_each_combination_of_numbers_has_a_seed_of_its_own():
    numbers = [each for size in range(5) for each in itertools.product(range(4), repeat=size)]
    assert len({wd1.seed_of(*each) for each in numbers}) == len(numbers)


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
    _, config, batch, _ = make_batch(task="gsm8k")
    batch.texts[0], batch.problems = "<answer>1</answer>", [{"answer": "1"}] * 9
    rows = zip(batch.rollout.completion, batch.rollout.probability.log().tolist())
    counted = [each for tokens, log_p in rows for each in log_p[: end(tokens)]]
    assert wd1.describe(batch, config, 0) == pytest.approx(dict(
        reward=4.2 / 9, accuracy=1 / 9, degenerate_groups=1 / 3, length=len(counted) / 9,
        entropy=-fmean(counted),
    ))  # fmt: skip


def test_a_model_or_a_prompt_that_cannot_be_right_is_refused(checkpoint):
    *_, model, tokenizer = checkpoint
    check = lambda *prompts: wd1.check_model(model, tokenizer, prompts, wd1.Config(**FAST))
    check("in the land", "of the mask")
    pad, tokenizer.pad_token = tokenizer.pad_token, "<|mask|>"
    check("in the land", "in")  # padding is no part of a prompt
    tokenizer.pad_token = pad

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
    bad = dict(gen_length=[8], eval_lengths=[], beta=None, lam=math.nan, likelihood="path")
    for name, value in bad.items():
        with pytest.raises(InputError, match=f"--{name}"):
            wd1.Config(model="tiny", **{name: value})
