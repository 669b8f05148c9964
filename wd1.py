"""wd1: reinforcement learning for diffusion language models, in one file.

A diffusion language model (LLaDA, Dream, ...) writes text by *unmasking*: it starts from nothing
but mask tokens and, step by step, fills in the positions it is surest of, wherever they are. Nobody
can compute the probability of the finished text: it could have been written in any order. PPO and
GRPO have to estimate it under three policies (the old one, that sampled; the reference, the base
model; the current one), and divide one poor estimate by another.

wd1 (arXiv 2507.08838) estimates it under one, the current policy p, and never divides. For every
prompt q it samples a group of G completions o_i, scores them, and *imitates the good ones and
un-imitates the bad ones*:

    A_i  = r_i - mean_j r_j                             how much better than the group
    w+_i = softmax_i(psi A)                             o_i's share of the pull upwards
    w-_i = softmax_i(-psi A)                            and its share of the push downwards
    loss = - sum_i (w+_i - w-_i) log p(o_i | q)         a weighted log-likelihood

psi = 1 / (lambda + beta) says how sharply the weights prefer the best. lambda and beta are the
strengths of KL penalties towards the old policy and the reference; no KL is ever computed:
section 5.

That is the whole method. The rest makes each symbol concrete: 1 configuration, 2 the model,
3 sampling, 4 likelihood, 5 weights and loss, 6 the training loop, 7 evaluation, 8 the command line.
A reader who stops after section 5 has read the paper; one who goes on to `learn` in section 6 could
implement it. Shapes stand beside tensors: N prompts, G completions each, B = N G rows, P prompt
tokens, L completion tokens, T denoising steps, V vocabulary entries, H hidden features; b are some
of the rows, n some of the columns.

    python wd1.py --model GSAI-ML/LLaDA-8B-Instruct --task sudoku     80 GB GPU
        with --load_in_4bit --gradient_checkpointing                  24 GB GPU
    torchrun --nproc_per_node 8 wd1.py --model ...                    8 GPUs
    python wd1.py --help                                              settings

What few need is passed in from outside, by extras/: diffu-GRPO, wd1++, caches, FSDP2, pictures.
"""

import signal

if __name__ == "__main__":
    # Ctrl-C ends the program while all this is imported: a KeyboardInterrupt could be swallowed by
    # a library.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import atexit
import contextlib
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import string
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, ClassVar, Literal, NamedTuple, Optional, get_args, get_origin

import filelock
import numpy as np
import pandas as pd
import peft
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from pydantic import BaseModel, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from rewards import (
    InputError,
    character_tokenizer,
    get_task,  # a Task by its name: it has train, test, reward, correct and scores
    judge,  # judge(task.reward, text, problem) is a finite number, or raises InputError
    one_sentence,  # a program ends in one sentence for what goes wrong, not in a traceback
    problems_of,  # which problems a step takes: the training problems in random order
    refusing,  # with refusing(sentence): what fails inside is an InputError of this sentence
)

# =============================================================================== 1. Configuration
# One class holds every setting of a run; the command line is made from it, and `--help` from the
# comments. The defaults, but for the model, are those of the published LLaDA-8B runs; PRESETS
# changes some, for a task or for tiny models. Skim it.

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
TINY = Path(__file__).with_name("tiny_config.json")
PRESETS = {  # what differs from the defaults, by task and for models named tiny...
    "sudoku": {"num_iterations": 8},
    "tiny": json.loads(TINY.read_text())["settings"],
}
MAY_CHANGE_ON_RESUME = """max_steps resume device output_dir save_every eval_every
rollout_batch_size micro_batch_size""".split()
Count = Annotated[int, Field(ge=0, lt=1e15)]  # types of settings, which pydantic checks
Size = Annotated[int, Field(ge=1, lt=1e15)]
Strength = Annotated[float, Field(ge=0, lt=1e15)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


class Config(BaseModel, extra="forbid", allow_inf_nan=False):
    """Every setting of a run. What is not given comes from the run to resume, or from PRESETS and
    the defaults here. Raises InputError, in one sentence, for what cannot work."""

    model: Text = "tiny"  # hub id, directory, or LLaDA config.json; tiny: random weights
    task: Text = "sudoku"  # sudoku, countdown, gsm8k, math, or FILE.py:CLASS, a Task of yours
    data: Optional[Text] = None  # a .csv or .jsonl file of problems, instead of the task's own
    test_data: Optional[Text] = None  # a file of held-out problems, instead of a fifth of --data
    blanks: Size = 8  # sudoku: empty cells of a generated puzzle
    output_dir: Optional[Text] = None  # where the run is written; runs/<model>-<task>
    resume: bool = False  # go on from the checkpoint in output_dir
    eval_only: bool = False  # evaluate the model and stop
    seed: Count = 0  # fixes everything random
    device: Optional[Text] = None  # cuda if there is one, else cpu
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # bfloat16 on cuda, else float32
    load_in_4bit: bool = False  # frozen weights in 4 bits (bitsandbytes), for 24 GB
    # the objective
    likelihood: Literal["one_step", "elbo"] = "one_step"  # the estimate of log p(o|q)
    mc_samples: Size = 1  # mask draws of an estimate, one forward pass each
    prompt_mask_prob: Share = 0.15  # one_step: probability of masking a prompt token
    lam: Strength = 1.0  # strength of the KL to the policy before a step; psi = 1 / (lam + beta)
    beta: Strength = 0.0  # strength of the KL to the reference, the base model
    # sampling
    gen_length: Size = 256  # tokens of a completion, L
    diffusion_steps: Size = 128  # denoising steps of a completion, T
    block_length: Size = 32  # tokens of a block; blocks are finished left to right
    temperature: Strength = 0.9  # of sampling in training; evaluation is at 0
    rollout_batch_size: Size = 24  # completions sampled at a time; changes what is drawn
    # the update
    max_steps: Size = 1000  # training steps; each samples one batch
    batch_size: Size = 48  # completions a step, B = N G
    num_generations: Size = 6  # completions a prompt, G
    num_iterations: Size = 12  # gradient steps on each batch, mu
    micro_batch_size: Size = 6  # rows a forward pass; changes memory, and what dropout draws
    learning_rate: Strength = 3e-6  # AdamW's, at first; its betas are 0.9 and 0.99
    lr_decay: Share = 0.0  # the share of the rate that is gone, evenly, after the last step
    weight_decay: Strength = 0.1  # AdamW's
    max_grad_norm: Annotated[Strength, Field(gt=0)] = 0.2  # gradients are clipped to this norm
    lora_rank: Count = 128  # of new LoRA adapters on q, k, v, up; 0: train all weights
    gradient_checkpointing: bool = False  # slower updates in far less memory
    # evaluation
    eval_size: Size = 256  # held-out problems to evaluate on
    eval_lengths: list[Size] = [128, 256, 512]  # completion lengths, two tokens a step
    eval_every: Count = 100  # steps between evaluations; 0: only before and after
    save_every: Size = 20  # steps between checkpoints

    program: ClassVar[str] = "python wd1.py"  # whose settings these are

    def __init__(self, /, **given):
        given = {n: os.fspath(v) if isinstance(v, os.PathLike) else v for n, v in given.items()}
        # Defaults give way to presets, presets to what a run has saved, and that to what is given.
        # `presets` needs model and task, and a saved run its place: so `fill` is first for these.
        self.fill(given)
        name = re.sub(r"[^\w.+-]+", "-", f"{self.model}-{Path(self.task).name}").strip("-.")
        place = self.output_dir or f"runs/{name}"
        saved = {}
        if self.resume:
            with refusing(f"--resume: {place} holds no run to go on with"):
                saved = json.loads(Path(place, "config.json").read_text())
                self.fill(saved)
            # The directory is perhaps a stranger's, and a file that it names would be run.
            if ".py:" in self.task and "task" not in given:
                raise InputError(f"--resume: the task is a file: add --task {self.task}")
        self.fill(self.presets() | saved | given | {"output_dir": place})
        self.check()

    def presets(self):
        """What differs from the defaults for this task and this model."""
        tiny = PRESETS["tiny"] if is_tiny(self.model) else {}
        return PRESETS.get(self.task, {}) | tiny

    def fill(self, settings):
        """Sets every field anew: to what is in `settings`, checked and converted, as text is to
        numbers, else to its default."""
        try:
            super().__init__(**settings)
        except ValidationError as error:
            wrong = error.errors()[0]
            name, value = wrong["loc"][0], wrong["input"]
            raise InputError(f"--{name:.60} {value!r:.60}: {wrong['msg']}") from None

    def check(self):
        """Refuses what cannot work together; completes what is left open."""
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        devices = "cpu|cuda" if WORLD > 1 else "cpu|cuda(:[0-9]+)?"
        group = self.num_generations * WORLD
        four_bits = self.load_in_4bit and not self.eval_only
        for wrong, sentence in (
            (self.num_generations < 2, "--num_generations: a group has 2 or more"),
            (self.batch_size % group, f"--batch_size: no multiple of {group}, a group a process"),
            (self.lam + self.beta == 0, "--lam and --beta: both 0, and psi = 1 / (lam + beta)"),
            (self.resume and self.eval_only, "--eval_only: evaluates --model; leave out --resume"),
            (four_bits and not self.lora_rank, "--load_in_4bit: is for --lora_rank 1 or more"),
            (not self.eval_lengths, "--eval_lengths: there is none"),
            (not re.fullmatch(devices, self.device), f"--device {self.device}: is cpu or cuda"),
        ):
            if wrong:
                raise InputError(sentence)
        # Called for what it raises, an InputError for lengths and steps that do not go together.
        unmasking_schedule(self.gen_length, self.diffusion_steps, self.block_length)
        for length in self.eval_lengths:
            try:
                unmasking_schedule(length, (length + 1) // 2, min(self.block_length, length))
            except InputError as error:
                raise InputError(f"--eval_lengths: {error}") from None
        if self.dtype == "auto":
            self.dtype = "bfloat16" if self.device.startswith("cuda") else "float32"


def is_tiny(model):
    """Whether a model's name, or its directory's, begins with tiny."""
    return bool(re.search("(^|/)tiny[^/]*(/[^/]*)?$", str(model)))


# =================================================================================== 2. The model
# A diffusion language model is a stock transformer without its causal mask. It was trained to
# restore text of which a random part was masked; every position sees every other. It reads a
# canvas x: a prompt, and a completion o with masks in place of some tokens. Its output at a masked
# position k is a distribution over the token that belongs there:
#
#     p(o[k] | x) = softmax(logits[k])[o[k]]
#
# (k counts from the first token of the completion; the canvas has P columns before it.)
#
# So real checkpoints load into stock classes with `config.is_causal = False`, which transformers 5
# heeds. They differ in the names of their weights; Dream also reads its prediction for position k
# at k - 1. With the causal mask left on there would be no error: the model would write nonsense,
# and be trained on that. So, before the first step, `check_model` changes one token of an input,
# and looks whether the predictions on its left change.


def predict_logits(model, canvas, attention_mask=None, positions=None) -> Tensor:
    """One forward pass: logits of the token at each position, given all unmasked ones around it.

    canvas: long [B, P+L]. attention_mask: [B, P] or wider, 0 at left padding; columns that it lacks
    count as 1, and None as 1 everywhere. positions: long [n], the columns to predict, the only ones
    that the output head runs on; None for all. Returns float32 [B, n, V]. Rows do not depend on
    their padding: position ids count from the first real token."""
    head = model.get_output_embeddings()
    return head(hidden_states(model, canvas, attention_mask, positions)).float()


def hidden_states(model, canvas, attention_mask=None, positions=None):
    """The last hidden states from which `predict_logits` predicts `positions`: [B, n, H]."""
    position_ids = visible = None  # 0, 1, 2, ..., and every position sees all
    if attention_mask is not None and not attention_mask.all():
        beyond = canvas.shape[1] - attention_mask.shape[1]
        real = F.pad(attention_mask.bool(), (0, beyond), value=True)  # [B, P+L]
        position_ids = (real.cumsum(-1) - 1).clamp(min=0)
        visible = real[:, None, None]  # [B, 1, 1, P+L]: used as it is, having 4 dimensions
    states = model.get_decoder()(canvas, visible, position_ids, use_cache=False).last_hidden_state
    if positions is None:
        positions = torch.arange(canvas.shape[1], device=canvas.device)
    # With a shift nothing predicts column 0, the prompt's first: it gets what column 1 gets.
    return states[:, (positions - int(model.config.logit_shift)).clamp(min=0)]


def add_adapters(model, rank):
    """A PeftModel with new adapters. The published list names all of Llama's layers; LLaDA's own
    code has only these four names, so only they were trained."""
    targets = ["q_proj", "k_proj", "v_proj", "up_proj"]
    options = dict(r=rank, lora_alpha=rank // 2 or 1, lora_dropout=0.05, target_modules=targets)
    return adapted(model, peft.LoraConfig(**options))


def adapted(model, config):
    """A PeftModel whose config names the model that it adapts."""
    name, _, revision = model.source.partition("@")
    local, model = Path(model.source), peft.get_peft_model(model, config)
    config.base_model_name_or_path = str(local.resolve()) if local.exists() else name
    config.revision = revision or None
    return model


def encode(tokenizer, prompts):
    """The prompts, as user's turns if there is a template: input_ids, attention_mask [B, P]."""
    texts, template = list(prompts), tokenizer.chat_template
    if template:  # it writes the special tokens that begin a text itself
        chats = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    layout = dict(padding=True, padding_side="left", return_tensors="pt")
    return tokenizer(texts, add_special_tokens=not template, **layout)


def decode(model, tokenizer, tokens):
    """The texts of completions [B, L], each up to its first EOS."""
    rows = zip(tokens, until_eos(tokens, model.config.eos_token_id))
    return [tokenizer.decode(row[kept], skip_special_tokens=True) for row, kept in rows]


# ------------------------- reading checkpoints: skip this on a first reading, and go to section 3
# Checkpoints come from strangers: JSON, safetensors and tokenizers' tables are read, never code or
# pickles, and of their settings only those that are listed here.

FAMILIES = dict(line.split() for line in """\
llada        LlamaForCausalLM
llama        LlamaForCausalLM
a2d-llama    LlamaForCausalLM
Dream        Qwen2ForCausalLM
qwen2        Qwen2ForCausalLM
a2d-qwen2    Qwen2ForCausalLM
qwen3        Qwen3ForCausalLM
a2d-qwen3    Qwen3ForCausalLM
""".splitlines())  # fmt: skip
LLADA_CONFIG = dict(line.split() for line in """\
d_model                hidden_size
n_layers               num_hidden_layers
n_heads                num_attention_heads
n_kv_heads             num_key_value_heads
mlp_hidden_size        intermediate_size
vocab_size             vocab_size
embedding_size         vocab_size
max_sequence_length    max_position_embeddings
rms_norm_eps           rms_norm_eps
rope_theta             rope_theta
weight_tying           tie_word_embeddings
pad_token_id           pad_token_id
""".splitlines())  # fmt: skip
LLADA_WEIGHTS = dict(line.split() for line in """\
model.transformer.ff_out.    lm_head.
transformer.wte.             embed_tokens.
transformer.ln_f.            norm.
transformer.blocks.          layers.
.q_proj.                     .self_attn.q_proj.
.k_proj.                     .self_attn.k_proj.
.v_proj.                     .self_attn.v_proj.
.attn_out.                   .self_attn.o_proj.
.ff_proj.                    .mlp.gate_proj.
.up_proj.                    .mlp.up_proj.
.ff_out.                     .mlp.down_proj.
.attn_norm.                  .input_layernorm.
.ff_norm.                    .post_attention_layernorm.
""".splitlines())  # fmt: skip
ONLY = json.loads("""{
    "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": true,
    "alibi": false, "attention_layer_norm": false, "include_bias": false, "clip_qkv": null,
    "include_qkv_bias": false, "bias_for_layer_norm": false, "layer_norm_with_affine": true,
    "input_emb_norm": false, "scale_logits": false, "multi_query_attention": false,
    "use_sliding_window": false, "quantization_config": null, "partial_rotary_factor": 1.0,
    "attention_dropout": 0.0
}""")  # settings that the stock classes would ignore: the one value that they compute
READ = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act
num_key_value_heads head_dim max_position_embeddings initializer_range rms_norm_eps rope_theta
rope_scaling rope_parameters tie_word_embeddings attention_bias mlp_bias pad_token_id
bos_token_id""".split()  # what a stock config is made from
LORA = "r lora_alpha lora_dropout target_modules use_rslora".split()  # what adapters are made from
NOTES = """target_modules base_model_name_or_path task_type inference_mode revision auto_mapping
peft_version""".split()  # what else adapter_config.json may say
TABLES = """tokenizer.json vocab.json merges.txt added_tokens.json special_tokens_map.json
chat_template.jinja""".split()  # a tokenizer's files
TOKENS = """bos_token eos_token pad_token unk_token mask_token added_tokens_decoder
chat_template""".split()  # what of its tokenizer_config.json is read


def load_model(source, *, device="cpu", dtype=torch.float32, seed=0, load_in_4bit=False) -> tuple:
    """Loads a diffusion language model and its tokenizer. Runs no code, unpickles nothing.

    source: a LLaDA-style config.json (random weights from `seed`, a character tokenizer), "tiny"
    (tiny_config.json), a directory in LLaDA's, Dream's, a2d's or this project's format (full or
    LoRA), or a hub id, or id@revision. On device "meta" the model has shapes and no weights.
    load_in_4bit: linear layers in NF4 (QLoRA, arXiv 2305.14314; needs bitsandbytes), dtype for the
    rest.

    Returns (model, tokenizer): a stock transformers model in eval mode (a PeftModel for LoRA), with
    `model.config.mask_token_id` (int), `.eos_token_id` (int or list) and `.logit_shift` (bool: the
    prediction for position k is read at k - 1, as in Dream) set, and `model.source`, which for a
    hub id has the revision that was loaded. Raises InputError, in one sentence, for anything that
    cannot be loaded faithfully."""
    path = TINY if source == "tiny" else Path(source)
    with refusing(f"--model {source}: cannot be loaded"):
        if not path.exists():
            path, source = download(str(source), weights=device != "meta")
        if (path / "adapter_config.json").exists():
            options = dict(device=device, dtype=dtype, load_in_4bit=load_in_4bit)
            model, tokenizer = load_adapters(path, **options)
            model.source = str(source)
            return model, tokenizer
        stock, config = read_config(path if path.is_file() else path / "config.json")
        tokenizer = read_tokenizer(path) if path.is_dir() else character_tokenizer(config)
        check_tokens(config, tokenizer)
        if load_in_4bit and path.is_file():
            raise ValueError("random weights are not loaded in 4 bits")
        if path.is_file() or device == "meta":
            with torch.random.fork_rng(), torch.device(device):
                torch.manual_seed(seed)
                model = stock(config).to(dtype)
        else:
            options = dict(dtype=dtype, device_map={"": device})
            if load_in_4bit:
                options["quantization_config"] = transformers.BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_compute_dtype=dtype,
                    bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                )  # fmt: skip
            model = from_weights(stock, config, read_weights(path), **options)
    if device != "meta":  # what --resume knows the model by
        hashes = [torch.hash_tensor(weight).item() for weight in model.parameters()]
        tables = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template
        model.fingerprint = zlib.crc32(repr([hashes, tables]).encode())
    model.source = str(source)
    return model.eval(), tokenizer


def download(source, weights):
    """The directory of a hub id, or id@revision, perhaps without weights, and its id@commit."""
    files = ["*.json", "*.txt", "*.jinja"] + ["*.safetensors"] * weights
    name, _, revision = source.partition("@")
    with refusing(f"--model {source}: is not here, and cannot be loaded from the hub"):
        path = Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
    return path, f"{name}@{path.name}"


def own(file):
    """Whether a checkpoint has this file. A link may lead to a hub's blobs, but to nowhere else on
    this machine."""
    real = file.resolve()
    return real.is_file() and (real.parent.name == "blobs" or real.parent == file.parent.resolve())


def read_json(file):
    """The settings in one of a checkpoint's JSON files; none if it is not there."""
    return dict(json.loads(file.read_text())) if own(file) else {}


def read_config(file):
    """The stock class and its config for a checkpoint's config.json."""
    raw = read_json(file)
    family = str(raw.get("model_type"))
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r:.60} is none of {', '.join(FAMILIES)}")
    if family in ("llama", "qwen2", "qwen3") and raw.get("is_causal") is not False:
        raise ValueError("is_causal is not false: it is autoregressive, not a diffusion model")
    for name, value in ONLY.items():
        if raw.get(name) not in (value, None):
            raise ValueError(f"{name} = {raw[name]!r:.60} is not what {FAMILIES[family]} computes")
    names = LLADA_CONFIG if family == "llada" else dict(zip(READ, READ))
    known = {ours: raw[theirs] for theirs, ours in names.items() if raw.get(theirs) is not None}
    stock = getattr(transformers, FAMILIES[family])
    config = stock.config_class(**known, attn_implementation="sdpa")
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    if not 1 <= layers <= 1000 or heads % config.num_key_value_heads:
        raise ValueError(f"{layers} layers, or heads that key-value heads do not divide")
    config.is_causal = config.use_cache = False
    config.mask_token_id, config.eos_token_id = raw.get("mask_token_id"), raw.get("eos_token_id")
    config.logit_shift = bool(raw.get("logit_shift", family == "Dream"))
    return stock, config


def check_tokens(config, tokenizer):
    """Completes mask and EOS; ValueError unless they are tokens of the model, and not the same."""
    for name in ("mask_token_id", "eos_token_id"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(tokenizer, name))
    mask, ends = config.mask_token_id, np.atleast_1d(config.eos_token_id).tolist()
    if not all(type(i) is int and 0 <= i < config.vocab_size for i in (mask, *ends)):
        raise ValueError(f"mask_token_id {mask!r:.40} or eos_token_id is no token of the model")
    if mask in ends:
        raise ValueError("its mask token ends texts, too: mask_token_id is an EOS")


def read_weights(directory):
    """A checkpoint's tensors under the stock classes' names."""
    weights = {}
    for file in filter(own, sorted(directory.glob("model*.safetensors"))):
        for name, tensor in load_file(file).items():
            llada = name.startswith("model.transformer.")
            for theirs, ours in LLADA_WEIGHTS.items() if llada else ():
                name = name.replace(theirs, ours)
            if name in weights:
                raise ValueError(f"{name!r:.100} is there twice")
            weights[name] = tensor
    return weights


def from_weights(stock, config, weights, **options):
    """A model of these weights; ValueError unless they are all that its class has, and no more."""
    with torch.device("meta"):
        expected = stock(config).state_dict()
    if config.tie_word_embeddings:  # then a file may hold the embedding alone
        embedding = weights["model.embed_tokens.weight"]
        if not torch.equal(weights.setdefault("lm_head.weight", embedding), embedding):
            raise ValueError("the output head is tied to the embedding, but differs from it")
    shapes = lambda tensors: {(name, *tensor.shape) for name, tensor in tensors.items()}
    refuse_keys(shapes(expected) ^ shapes(weights))
    return stock.from_pretrained(None, config=config, state_dict=weights, **options)


def refuse_keys(*wrong):
    """Raises ValueError if there are any keys of weights in these collections."""
    if wrong := sorted(map(str, itertools.chain(*wrong))):
        sentence = "weights are missing, unexpected or of another shape, the first is"
        raise ValueError(f"{len(wrong)} {sentence} {wrong[0]:.100}")


def load_adapters(path, **options):
    """(model, tokenizer) of a LoRA directory: a PeftModel on the base that it names."""
    settings = read_json(path / "adapter_config.json")
    targets = list(settings["target_modules"])  # names; a pattern becomes letters, which match none
    known = {name: settings[name] for name in LORA if name in settings}
    config = peft.LoraConfig(**known | {"target_modules": targets})
    for name, value in settings.items():
        if value and name not in NOTES and value != getattr(config, name, None):
            raise ValueError(f"the setting {name} = {value!r:.60} is not supported")
    if not own(path / "adapter_model.safetensors"):
        raise ValueError("it has no adapter_model.safetensors of its own")
    saved = load_file(path / "adapter_model.safetensors")
    ranks = all(config.r in tensor.shape for tensor in saved.values())
    if not ranks or not math.isfinite(config.lora_alpha):
        raise ValueError(f"r = {config.r!r:.60} is not their rank, or lora_alpha is not finite")
    base, revision = settings["base_model_name_or_path"], settings.get("revision")
    pinned = revision and not Path(base).exists()  # a directory has no revisions
    model, tokenizer = load_model(f"{base}@{revision}" if pinned else base, **options)
    model = adapted(model, config).eval()
    report = peft.set_peft_model_state_dict(model, saved)
    refuse_keys((name for name in report.missing_keys if "lora_" in name), report.unexpected_keys)
    if hasattr(model, "fingerprint"):
        model.fingerprint = zlib.crc32(repr(sorted(settings.items())).encode(), model.fingerprint)
    return model, tokenizer


def read_tokenizer(directory):
    """The tokenizer of a checkpoint: stock classes read copies of its tables, and of its settings
    those in TOKENS alone. (AutoTokenizer would offer to run code.)"""
    settings = read_json(directory / "tokenizer_config.json")
    settings = {name: settings[name] for name in TOKENS if settings.get(name)}
    tables = [directory / name for name in TABLES if own(directory / name)]
    fast = directory / "tokenizer.json" in tables
    stock = transformers.PreTrainedTokenizerFast if fast else transformers.Qwen2Tokenizer
    if not fast and directory / "vocab.json" not in tables:
        raise ValueError("there is no tokenizer.json or vocab.json")
    with tempfile.TemporaryDirectory() as clean:
        for table in tables:
            shutil.copy(table, clean)
        Path(clean, "tokenizer_config.json").write_text(json.dumps(settings))
        process = multiprocessing.get_context("fork").Process(target=try_out, args=[stock, clean])
        process.start()
        process.join(60)
        if process.exitcode != 0:
            process.kill()
            raise ValueError("its tokenizer or chat template takes too much time or memory")
        tokenizer = stock.from_pretrained(clean)
    if not isinstance(tokenizer.chat_template, str | None):
        raise ValueError("the chat template is not one text")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def try_out(stock, directory, seconds=20, size=2**32):
    """Uses a tokenizer for the first time, in a process that ends where it takes too much: a chat
    template may loop for ever, a normalizer multiply a letter until it fills the memory."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    memory = psutil.Process().memory_info().vms + size
    with contextlib.suppress(ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        tokenizer = stock.from_pretrained(directory)
        encode(tokenizer, [string.printable])
        tokenizer.decode(range(len(tokenizer)))
    except MemoryError:
        os._exit(1)
    except BaseException:  # any other error: the caller will meet it again, and report it
        os._exit(0)


# ==================================================================================== 3. Sampling
# Start from a canvas x: the prompt, and L masks in blocks, which are finished left to right. At
# each of T steps read the whole canvas, guess every masked token of the current block, write the
# few guesses that the model is surest of, and leave the rest masked. What is written stays. Each
# block has its share of the steps, each step its share of the block (LLaDA, arXiv 2502.09992).
#
#     guess[k] ~ p(o[k] | x)                 at each masked token, on its own
#     confidence[k] = p(guess[k] | x)        how sure the model is of it
#
# (The guess is drawn at the temperature asked for, its confidence is always that at temperature 1;
# both leave out the mask token.)
#
# Why the surest first? The guesses of one step do not know of each other: asked for a city, two
# masks may be filled with "New" and "Angeles". Where the model is sure there is little left to
# choose, and little to get wrong. Fewer steps, of more guesses each, are worse for the same reason.


class Rollout(NamedTuple):
    """What `generate` returns: the completions, and how they came to be."""

    prompt: Tensor  # long [B, P], as given
    attention_mask: Tensor  # [B, P]: 0 at left padding
    completion: Tensor  # long [B, L]
    written_at: Tensor  # long [B, L]: the step, from 0, that wrote each, or T. For extras/
    probability: Tensor  # float [B, L]: each token's when written, at temperature 1; for metrics


def unmasking_schedule(gen_length, steps, block_length):
    """A list with, for each block, its first column of the completion and how many tokens each of
    its steps writes. What cannot be shared out evenly goes to the first blocks and steps.

    Raises InputError unless blocks fill the completion, every block has a step and every step a
    token."""
    blocks = gen_length // (block_length or 1)
    if gen_length != blocks * block_length or gen_length > 2**20:
        sentence = f"is no multiple of block_length {block_length}, up to a million"
        raise InputError(f"gen_length {gen_length} {sentence}")
    if not 0 < blocks <= steps <= gen_length:
        sentence = f"take {blocks} to {gen_length} denoising steps, not {steps}"
        raise InputError(f"{gen_length} tokens in {blocks} blocks {sentence}")
    evenly = lambda total, parts: [total // parts + (i < total % parts) for i in range(parts)]
    each = enumerate(evenly(steps, blocks))
    return [(block * block_length, evenly(block_length, its_steps)) for block, its_steps in each]


def propose(logits, temperature, generator):
    """A token for each position, its probability at temperature 1: [..., V] -> long, float [...].

    argmax(logits / temperature + Gumbel noise) is an exact draw from softmax(logits / temperature).
    In float32 u <= 1 - 2^-24, and the noise is never more than 16.6: tokens of probability e^-16.6
    or less would be drawn too rarely or never (arXiv 2409.02908). Hence float64."""
    noisy = logits
    if temperature:
        options = dict(generator=generator, device=logits.device, dtype=torch.float64)
        # Gumbel noise is -log(-log u). This is its negative: 0.8 GB at LLaDA, `noisy` as much.
        minus_noise = torch.rand(logits.shape, **options).log_().neg_().log_()
        noisy = logits / temperature - minus_noise
    proposal = noisy.argmax(-1, keepdim=True)
    log_prob = logits.gather(-1, proposal)[..., 0] - logits.logsumexp(-1)
    return proposal[..., 0], log_prob.exp().clamp(max=1)  # rounding could make it more than 1


def most_certain(confidence, masked, count):
    """The `count` surest places of each row, of those masked: float, bool [b, n] -> bool [b, n]."""
    score = confidence.masked_fill(~masked, -torch.inf)
    order = score.argsort(stable=True, descending=True).argsort()  # 0 for the surest, 1, ...
    return masked & (order < count)


@torch.no_grad()
def generate(
    model, prompt, *, attention_mask=None, gen_length=256, steps=128, block_length=32,
    temperature=0.0, generator=None, policy=predict_logits, choose=most_certain, watch=None,
) -> Rollout:  # fmt: skip
    """Samples completions by iterative unmasking. Returns a Rollout, with no mask left in it.

    prompt: long [B, P], left-padded where attention_mask [B, P] is 0. temperature: 0 takes the
    likeliest token. generator: a torch.Generator on the prompt's device; it fixes every draw. A
    completion ends at its first EOS: blocks to the right of that one's are not even sampled, and
    become EOS. Raises InputError for lengths and steps that do not go together.

    Three functions may be given; `mixture` makes a policy, extras/ others. policy(model, canvas
    [b, P+L], attention_mask, positions [n]): logits [b, n, V]. choose(confidence [b, n], masked
    [b, n], count): the places to write, bool [b, n]; those not masked are ignored. watch(step,
    rows [b], canvas [b, P+L], proposal [b, n], confidence [b, n]) looks on."""
    mask_id, P = model.config.mask_token_id, prompt.shape[1]
    eos = torch.tensor(model.config.eos_token_id, device=prompt.device).view(-1)
    attention_mask = torch.ones_like(prompt) if attention_mask is None else attention_mask
    canvas = F.pad(prompt, (0, gen_length), value=mask_id)  # [B, P+L]
    written_at = torch.full_like(canvas, steps)
    probability = torch.ones(canvas.shape, device=canvas.device)
    step = 0
    for start, counts in unmasking_schedule(gen_length, steps, block_length):
        # [b]: the rows without an EOS before this block. The others are done.
        rows = (~torch.isin(canvas[:, P : P + start], eos).any(1)).nonzero()[:, 0]
        columns = torch.arange(P + start, P + start + block_length, device=canvas.device)  # [n]
        for count in counts:
            masked = canvas[rows[:, None], columns] == mask_id  # [b, n]
            if not masked.any():  # there are no rows, or a given `choose` wrote more than `count`
                break
            logits = policy(model, canvas[rows], attention_mask[rows], columns)  # [b, n, V]
            logits[..., mask_id] = -torch.inf  # the mask is no token, and never proposed
            proposal, confidence = propose(logits, temperature, generator)
            if watch:
                watch(step, rows, canvas[rows], proposal, confidence)
            write = masked & choose(confidence, masked, count)
            # Where these are on the canvas: their rows, and their columns.
            cells = rows[:, None].expand_as(write)[write], columns.expand_as(write)[write]
            canvas[cells] = proposal[write]
            written_at[cells] = step
            probability[cells] = confidence[write]
            step += 1
    completion = canvas[:, P:].masked_fill(canvas[:, P:] == mask_id, eos[0])
    return Rollout(prompt, attention_mask, completion, written_at[:, P:], probability[:, P:])


# =================================================================== 4. The likelihood log p(o|q)
# An estimate takes one or more forward passes, its views v. A view puts masks in place of some
# tokens of the completion, or all of them, and perhaps of some of the prompt. From that canvas x_v
# the model predicts what is hidden of o; the log-probability of each hidden token has a weight:
#
#     log p(o | q) ≈ sum_v sum_k weight_{v,k} log p(o[k] | x_v)
#
# Estimates differ only in what a view hides and in these weights. The ELBO is a lower bound in the
# mean, and noisy because its masks are random; the one-step estimate has a bias of either sign, and
# is noisy because it masks some of the prompt. Both are sums over the tokens of o, not means. Here,
# unlike in sampling, the mask token has its share of p.
#
# A completion ends with its first EOS. What the sampler wrote after it is no part of o: its weight
# is 0 (else a model would be paid for its padding). It is also hidden, as it would show where the
# text ends.
#
# `elbo` and `one_step_log_likelihood` are for other programs to call; `learn` takes their Views one
# at a time, so that one autograd graph is in memory.


class View(NamedTuple):
    """One forward pass of an estimate of log p(o|q)."""

    hidden: Tensor  # bool [B, P+L]: what the model sees as masks
    target: Tensor  # long [B, L]: the completion
    weight: Tensor  # float [B, L]: how much each log-probability counts; 0 where shown or after EOS


def token_log_probs(model, prompt, view, attention_mask=None):
    """log p(target[k] | x), but 0 where the view's weight is 0: float [B, L], with gradient."""
    canvas = torch.cat([prompt, view.target], dim=1)
    canvas = canvas.masked_fill(view.hidden, model.config.mask_token_id)
    positions = torch.arange(prompt.shape[1], canvas.shape[1], device=canvas.device)
    states = hidden_states(model, canvas, attention_mask, positions)  # [B, L, H]
    scored = view.weight != 0  # [B, L]
    head = model.get_output_embeddings()
    log_probs = chunked_log_probs(head, states[scored], view.target[scored])
    return torch.zeros(scored.shape, device=canvas.device).masked_scatter(scored, log_probs)


def chunked_log_probs(head, states, target, *, max_logits=2**24):
    """log softmax(head(states))[target]: states [n, H], target long [n] -> float [n].

    Each log-probability takes V logits, of which backward would keep several copies (LLaDA: 130 MB
    each for 256 tokens). So they are computed a chunk of tokens at a time, and again in backward
    (gradient checkpointing). Not the last chunk: backward begins with it, and would compute it
    again at once."""

    def score(states, target):
        return -F.cross_entropy(head(states).float(), target, reduction="none")

    size = max(max_logits // head.out_features, 1)
    *chunks, last = zip(states.split(size), target.split(size))
    again = functools.partial(checkpoint, score, use_reentrant=False)
    return torch.cat([*(again(*chunk) for chunk in chunks), score(*last)])


def log_likelihood(model, prompt, views, attention_mask=None):
    """The estimate that `views` make of log p(o|q): float [B], with gradient."""
    terms = (view.weight * token_log_probs(model, prompt, view, attention_mask) for view in views)
    return sum(terms).sum(-1)


def until_eos(completion, eos_token_id):
    """bool [B, L]: the tokens up to and including the first EOS (an id, or several)."""
    is_eos = torch.isin(completion, torch.tensor(eos_token_id, device=completion.device)).int()
    return is_eos.cumsum(-1) - is_eos == 0  # no EOS strictly before


def elbo(model, prompt, completion, *, attention_mask=None, **options) -> Tensor:
    """Monte Carlo estimate of the evidence lower bound on log p(o|q), as in LLaDA (arXiv
    2502.09992): float [B], with gradient.

        ELBO = E_{l ~ U{1..m}} E_{|S| = l} [ m/l * score(S) ]
        score(S) = sum_{k in S} log p(o[k] | q, o without S)

    S is a random subset of size l of the completion's m tokens (each row has its m), up to and
    including the first EOS; what comes after that is always hidden.

    Why a bound? Let the model write o one token at a time, in a random order. p(o|q) is a mean over
    orders of products (the chain rule); its log is at least the mean of the sums of logs (Jensen).
    When l tokens are still missing they form a random S, and the next to be written is any of them
    with chance 1/l: on average it adds score(S) / l. Summed over l = 1..m, which is m times the
    mean over l, that is the formula.

    prompt [B, P], completion [B, L]. Options: mc_samples (default 1; the sizes l of several are
    spread evenly over 1..m, for less variance), generator, uniform (a function from a
    number of columns to random numbers in 0..1, float [B, columns])."""
    views = elbo_views(model.config, prompt, completion, **options)
    return log_likelihood(model, prompt, views, attention_mask)


def elbo_views(config, prompt, completion, *, mc_samples=1, generator=None, uniform=None):
    """The `mc_samples` Views whose estimate is `elbo`."""
    uniform = uniform or independent_noise(prompt, generator)
    counted = until_eos(completion, config.eos_token_id)  # [B, L]
    length = counted.sum(-1, keepdim=True)  # [B, 1], each row's m
    views = []
    for draw in range(mc_samples):
        level = (draw + uniform(1)) / mc_samples  # [B, 1], in this draw's part of 0..1
        # l ~ U{1..m}, each draw's from its part of that. (Rounding may make a level 1.)
        size = 1 + (level * length).long().clamp(max=length - 1)
        # S is the first l tokens in a random order. 2, beyond any draw, puts those after EOS last.
        order = uniform(completion.shape[1]).masked_fill(~counted, 2.0).argsort(-1).argsort(-1)
        subset = order < size  # [B, L]
        hidden = F.pad(subset | ~counted, (prompt.shape[1], 0))
        views.append(View(hidden, completion, subset * length / (size * mc_samples)))
    return views


def independent_noise(prompt, generator):
    """A `uniform` for the Views: each row's draws are its own."""
    options = dict(generator=generator, device=prompt.device)
    return lambda columns: torch.rand(len(prompt), columns, **options)


def one_step_log_likelihood(
    model, prompt, completion, *, attention_mask=None, **options
) -> Tensor:
    """The mean-field estimate of d1 (arXiv 2504.12216), which wd1's experiments use: float [B].

        log p(o | q) ≈ sum_k log p(o[k] | q')

    where q' is q with each token masked with probability prompt_mask_prob (default 0.15), anew in
    each row, and nothing of o is shown: as if all of o were written in one denoising step. There is
    no noise from a completion mask, but a bias: tokens are predicted as if independent. Masking
    some of the prompt lets the mu gradient steps on one batch see different inputs. Options: those
    of `elbo`."""
    views = one_step_views(model.config, prompt, completion, **options)
    return log_likelihood(model, prompt, views, attention_mask)


def one_step_views(
    config, prompt, completion, *, mc_samples=1, prompt_mask_prob=0.15, generator=None, uniform=None
):
    """The `mc_samples` Views whose estimate is `one_step_log_likelihood`."""
    uniform = uniform or independent_noise(prompt, generator)
    weight = until_eos(completion, config.eos_token_id) / mc_samples  # [B, L]
    views = []
    for _ in range(mc_samples):
        hidden = uniform(prompt.shape[1]) < prompt_mask_prob  # [B, P]
        hidden = F.pad(hidden, (0, completion.shape[1]), value=True)
        views.append(View(hidden, completion, weight))
    return views


# ========================================================== 5. Advantages, group weights and loss
# The policy pi that maximises E_pi[A] - lambda KL(pi || pi_old) - beta KL(pi || ref) is a geometric
# mean of pi_old, the policy before the step, and the reference, tilted towards what is better (the
# closed form that DPO begins with; Z_0 and Z make each a distribution):
#
#     mix(o | q) = pi_old(o | q)^(1 - s) ref(o | q)^s / Z_0
#     pi_new(o | q) = mix(o | q) exp(psi A(o)) / Z
#
# with psi = 1 / (lambda + beta) and s = beta / (lambda + beta), the reference's share. By default
# s = 0, and mix is pi_old. p, the model in training, is to come close to pi_new: KL(pi_new || p) is
# a constant less the mean of log p(o | q) over o ~ pi_new, so that mean should be large. But the
# o_i are sampled from mix (by `collect`), so each needs the weight pi_new / mix = exp(psi A_i) / Z.
# Z is the mean of exp(psi A) over mix; the mean over the group stands in for it (self-normalised
# importance sampling). Then the group's mean of weighted log p is sum_i w+_i log p(o_i | q), w+
# being a softmax. Neither the samples nor pi_new change while p learns from them: the weights stay,
# and learning needs no ratio of likelihoods and no second model. The same with -A gives the policy
# to stay away from, and w-, which wd1 subtracts. Without w- a group of equally bad completions
# would be imitated.
#
# No KL is ever computed, and so none is enforced: lambda and beta enter through psi and the mixture
# alone. And the sampler, with its temperature, its choice of the surest, its ban on the mask token
# and a mixture that is made token by token, is not exactly mix. Exact weights would have the factor
# mix / sampler, too; wd1 leaves it out.


def as_reference(model):
    """The context in which a model predicts as the reference: with LoRA the model that is trained,
    its adapters off; else the reference is a second model, used as it is."""
    return model.disable_adapter() if hasattr(model, "peft_config") else contextlib.nullcontext()


def mixture(reference, share):
    """The policy p^(1-share) ref^share, normalised, for `generate`: its logits are the weighted
    mean of the two models'."""

    def policy(model, *inputs):
        logits = predict_logits(model, *inputs)
        with as_reference(reference):
            return logits.lerp(predict_logits(reference, *inputs), share)

    return policy


def advantages(rewards):
    """A_i = r_i - mean_j r_j: [N, G] -> [N, G]. (A softmax does not notice the mean. What matters
    is that, unlike in GRPO, nothing is divided by the group's standard deviation.)"""
    return rewards - rewards.mean(-1, keepdim=True)


def group_weights(rewards, psi=1.0) -> tuple[Tensor, Tensor]:
    """Each completion's share of the pull up and of the push down: (w_plus, w_minus), both [N, G].

        w+ = softmax(psi A)
        w- = softmax(-psi A)

    Both sum to 1, and no gradient flows into them. Where a group's rewards are equal A = 0, so that
    w+ = w- = 1/G, and nothing is pulled. Where rewards lie between 0 and 1, as sudoku's do, psi = 1
    makes the best's w+ at most e times the worst's."""
    scaled = psi * advantages(1.0 * rewards.detach())  # a mean needs floats
    return scaled.softmax(-1), (-scaled).softmax(-1)


def wd1_loss(log_likelihood, w_plus, w_minus) -> Tensor:
    """The weighted log-likelihood, averaged over the N groups: all [N, G], returns a scalar.

        loss = - sum_i (w+_i - w-_i) log p(o_i | q)

    It has no lower bound, since what is pushed down may fall for ever: small steps keep it in hand,
    and its value says nothing of progress."""
    return -((w_plus - w_minus) * log_likelihood).sum(-1).mean()


# =========================================================================== 6. The training loop
# Four lines, for each step:
#
#     o_1, ..., o_G ~ pi_old(o | q)      sample G completions for each of N prompts (or the mixture)
#     r_i = reward(o_i)                  score them; their weights follow, and stay as they are
#     theta = theta - eta grad loss      mu times (num_iterations), by AdamW, each with fresh masks
#     pi_old = p                         no copy is made: the next samples are those of the new p
#
# `collect` is the first two, `learn` the third, and `train`, at the end, the loop. mu > 1 makes
# more of each expensive sample, but drifts from the policy that wrote it. What keeps p near pi_old
# is a small learning rate eta. Functions that are arguments below are for extras/ to replace.
#
# On several GPUs each process ("rank") samples its share; all then hold the whole batch, less than
# a megabyte, compute the same weights and draw the same masks; each learns from its share of the
# rows, and gradients are summed at each step. Another number of ranks changes the random draws,
# not the method.


@dataclass
class Batch:
    """What a step learns from: B = N G completions, those of a prompt side by side, and weights."""

    problems: list  # of dicts, B
    rollout: Rollout
    texts: list  # of str, B
    rewards: Tensor  # float [N, G]
    w_plus: Tensor  # float [B]
    w_minus: Tensor  # float [B]


def collect(model, reference, tokenizer, problems, config, seed, generate=generate):
    """Samples and scores a completion for each of `problems`, and weighs the groups: a Batch.
    problems: B dicts, each G times in a row; seed: two numbers, the run's and the step's."""
    share = config.beta / (config.lam + config.beta)  # s in section 5
    options = dict(policy=mixture(reference, share)) if share else {}
    options |= dict(temperature=config.temperature, generate=generate)
    prompts = [problem["prompt"] for problem in problems]
    sizes = config.gen_length, config.diffusion_steps
    rollout = sample(model, tokenizer, prompts, config, *sizes, seed, **options)
    texts = decode(model, tokenizer, rollout.completion)
    transformers.set_seed(seed_of(*seed))  # for rewards that draw
    rewards = judged(get_task(config.task).reward, texts, problems)
    rewards = torch.tensor(rewards, device=config.device).view(-1, config.num_generations)
    w_plus, w_minus = group_weights(rewards, psi=1 / (config.lam + config.beta))
    return Batch(problems, rollout, texts, rewards, w_plus.flatten(), w_minus.flatten())


def draw_views(config, model_config, batch, **options):
    """The forward passes of one gradient step, with fresh masks (by torch's global generator). Rows
    with w+ = w-, as in any group with equal rewards, get weight 0: `learn` leaves them out.
    options: for the functions that make the Views, such as `uniform`."""
    prompt, completion = batch.rollout.prompt, batch.rollout.completion
    options |= dict(mc_samples=config.mc_samples)
    if config.likelihood == "elbo":
        views = elbo_views(model_config, prompt, completion, **options)
    else:
        options |= dict(prompt_mask_prob=config.prompt_mask_prob)
        views = one_step_views(model_config, prompt, completion, **options)
    matters = (batch.w_plus != batch.w_minus)[:, None]
    return [view._replace(weight=view.weight * matters) for view in views]


def weighted_loss(batch, rows, view, log_probs):
    """What one View of some rows adds to wd1_loss, which is linear in log p: log_probs [b, L]."""
    log_p = (view.weight * log_probs).sum(-1)
    # Rows may be part of a group: of a flat [b] wd1_loss is a plain sum; so divide by N here.
    return wd1_loss(log_p, batch.w_plus[rows], batch.w_minus[rows]) / len(batch.rewards)


def clip_gradients(trained, max_norm):
    """Sums the gradients over all ranks and clips them; returns their norm."""
    if WORLD > 1:
        for weight in trained:
            dist.all_reduce(weight.grad)
    return torch.nn.utils.clip_grad_norm_(trained, max_norm).item()


def learn(
    model, optimizer, batch, config, draw=draw_views, loss=weighted_loss, clip=clip_gradients
):
    """The mu gradient steps on a batch, in micro-batches. Returns metrics: means of "loss" and
    "grad_norm" (None if no step was taken), and how many steps were "skipped", loss or gradient not
    being finite. A batch of which no row counts has a gradient of 0, and AdamW still moves, by its
    momentum and weight decay, as in the published runs."""
    trained, rollout, taken = optimizer.param_groups[0]["params"], batch.rollout, []
    model.train()
    for _ in range(config.num_iterations):
        total = 0.0
        optimizer.zero_grad()
        for view in draw(config, model.config, batch):
            for rows in rows_to_learn(view).split(config.micro_batch_size):
                part = view._make(each[rows] for each in view)
                inputs = rollout.prompt[rows], part, rollout.attention_mask[rows]
                value = loss(batch, rows, part, token_log_probs(model, *inputs))
                value.backward()
                total += value.item()
        norm = clip(trained, config.max_grad_norm)
        totals = gather(lambda _: total, range(WORLD))  # each rank's own
        total = sum(totals)
        if math.isfinite(total) and math.isfinite(norm):  # anything else would ruin the weights
            optimizer.step()
            taken.append((total, norm))
    mean, norm = map(fmean, zip(*taken)) if taken else (None, None)
    return {"loss": mean, "grad_norm": norm, "skipped": config.num_iterations - len(taken)}


def rows_to_learn(view):
    """The rows that count, dealt out to the ranks: long [b]. Each rank gets equally many, at least
    one; rows of weight 0, which change nothing, fill up. So each has gradients to sum, and uses up
    as many random numbers in dropout: the next masks are alike on all."""
    counts = (view.weight != 0).any(1)  # [B]
    ordered = counts.int().argsort(descending=True, stable=True)
    share = math.ceil(max(int(counts.sum()), 1) / WORLD)
    return ordered[RANK::WORLD][:share]


# ----------------------- what `collect` and `learn` stand on: skip to `train`, under "the loop"


def gather(function, items, title=None):
    """[function(item) for item in items], each rank computing an equal share and getting all: item
    i comes from rank i modulo WORLD. All ranks have to call it, and compute equally many (with FSDP
    they run the model together): the last round is filled up with repeated items. There is a
    progress bar if it takes long, and in a terminal."""
    numbers = range(RANK, math.ceil(len(items) / WORLD) * WORLD, WORLD)
    bar = tqdm(numbers, title, delay=10, leave=False, disable=RANK > 0 or None)
    mine = [function(items[number % len(items)]) for number in bar]
    parts = [mine] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, mine)
    return [each for turn in zip(*parts) for each in turn][: len(items)]


def judged(judgement, texts, problems):
    """What a Task's reward or correct says of each text: numbers. Every rank judges its share."""
    return gather(lambda each: judge(judgement, *each), [*zip(texts, problems)])


def everywhere(flag=True):
    """Waits for all ranks, and tells whether `flag` is true on each."""
    return all(gather(lambda _: bool(flag), range(WORLD)))


def seed_of(*numbers):
    """A seed of its own for each combination of numbers."""
    # Their count goes first: numpy makes the same of 1, 2 and 1, 2, 0.
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1)[0])


def autocast(config):
    """The context that computes in --dtype, whatever the weights are kept in. Without its cache,
    which would go on using copies of weights that an update has since changed."""
    dtype, device = getattr(torch, config.dtype), config.device.split(":")[0]
    return torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=False)


def sample(
    model, tokenizer, prompts, config, gen_length, steps, seed=(), generate=generate, **options
):
    """A completion for each prompt, at most `rollout_batch_size` at a time: a Rollout. Draws depend
    on `seed` (numbers) and on which prompts are sampled together; other options are generate's."""
    batch = encode(tokenizer, prompts).to(config.device)
    size = min(config.rollout_batch_size, math.ceil(len(prompts) / WORLD))
    block_length = min(config.block_length, gen_length)
    options |= dict(gen_length=gen_length, steps=steps, block_length=block_length)
    model.eval()

    def part(first):
        rows = slice(first, first + size)
        generator = torch.Generator(config.device).manual_seed(seed_of(*seed, first))
        given = dict(attention_mask=batch.attention_mask[rows], generator=generator)
        rollout = generate(model, batch.input_ids[rows], **given, **options)
        return rollout._make(tensor.cpu() for tensor in rollout)  # to be sent to other ranks

    parts = gather(part, range(0, len(prompts), size), "sampling")
    return parts[0]._make(torch.cat(tensors).to(config.device) for tensors in zip(*parts))


def degenerate(rewards):
    """Which groups have equal rewards, and teach nothing: [N, G] -> bool [N]."""
    return (rewards == rewards[:, :1]).all(1)


def describe(batch, config, eos_token_id):
    """What the completions are like: metrics. "entropy" is the mean -log p of what was written."""
    task, counted = get_task(config.task), until_eos(batch.rollout.completion, eos_token_id)
    right = judged(task.correct, batch.texts, batch.problems)
    log_probs = batch.rollout.probability.clamp(min=1e-30).log()[counted]
    return {
        "reward": batch.rewards.mean().item(),
        "accuracy": fmean(map(bool, right)),
        "degenerate_groups": degenerate(batch.rewards).float().mean().item(),
        "length": counted.sum(1).float().mean().item(),
        "entropy": -log_probs.mean().item(),
    }


def set_up(config, load=load_model):
    """What a run needs, checked: model, reference or None, tokenizer, and two datasets.Dataset, of
    training and of held-out problems."""
    if WORLD > 1 and not dist.is_initialized():
        if config.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()  # gloo on CPUs, and NCCL on GPUs
        atexit.register(dist.destroy_process_group)  # its threads may abort a process that ends
    task = get_task(config.task)
    adapt = config.lora_rank and not config.eval_only
    origin = config.data, config.test_data, config.seed, config.blanks
    test_set = task.test(*origin)
    test_set = test_set.select(range(min(config.eval_size, len(test_set))))
    train_set = test_set if config.eval_only else task.train(*origin)
    if not config.eval_only and set(test_set["prompt"]) <= set(train_set["prompt"]):
        raise InputError(f"--task {config.task}: its test problems are all training problems")
    # Weights that are trained are kept in float32; adapters are, by peft's doing.
    dtype = getattr(torch, config.dtype) if adapt or config.eval_only else torch.float32
    options = dict(device=config.device, dtype=dtype, load_in_4bit=config.load_in_4bit)
    model, tokenizer = load(config.model, **options)
    config.model = model.source
    check_model(model, tokenizer, train_set["prompt"][:] + test_set["prompt"][:], config)
    torch.manual_seed(config.seed)
    if adapt and not hasattr(model, "peft_config"):
        model = add_adapters(model, config.lora_rank)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # of the layers
    reference = None
    if config.beta and not config.eval_only:  # LoRA's is the model itself, its adapters off
        reference = model if adapt else load(config.model, **options)[0]
    return model, reference, tokenizer, train_set, test_set


@torch.no_grad()
def check_model(model, tokenizer, prompts, config):
    """Refuses a model that could not read the prompts, or would train without error for nothing."""
    with refusing(f"--model {config.model}: cannot be used"):
        encoded, vocabulary = encode(tokenizer, prompts), model.config.vocab_size
        distinct = len(encoded.input_ids.unique(dim=0))
        ids = encoded.input_ids[encoded.attention_mask.bool()]  # without padding
        length = encoded.input_ids.shape[1] + max(config.gen_length, *config.eval_lengths)
        two = torch.arange(16, device=model.device).repeat(2, 1) % vocabulary
        two[1, 8] = 15 % vocabulary  # which places notice? Not those on its left, if it is causal
        noticed = predict_logits(model, two).diff(dim=0)[0].norm(dim=-1)  # [16]; a shift moves it
        whole = not config.lora_rank and not config.eval_only
        for wrong, sentence in (
            (whole and hasattr(model, "peft_config"), "it has adapters, but --lora_rank 0"),
            (length > model.config.max_position_embeddings, f"{length} tokens are too many for it"),
            (not encoded.attention_mask.any(1).all(), "a prompt is empty"),
            ((ids >= vocabulary).any(), f"its tokenizer has tokens beyond its {vocabulary}"),
            (2 * distinct < len(set(prompts)), "its tokenizer makes the same of many prompts"),
            (model.config.mask_token_id in ids, "its mask token stands in the prompts"),
            (not noticed.isfinite().all(), "its logits are not finite numbers"),
            (not noticed.any(), "it predicts the same whatever it reads"),
            (noticed[:8].mean() <= 0.01 * noticed[10:].mean(), "it reads left to right only"),
        ):
            if wrong:
                raise ValueError(sentence)


# ------------------------------------------------------------------- a run's files: skip them too


class RunDirectory:
    """A run's files: one process at a time may write them, all but logs and curve.png are whole or
    not there, and a run goes on from them bit for bit. Rank 0 writes.

    A checkpoint is one file, step-N-DIGEST: weights, AdamW's moments and, in its header, all else;
    named by the SHA-256 of what it holds, and renamed into place when it is whole. A damaged one is
    passed over. What a step draws depends on the settings, the number of ranks and its number, no
    more: a resumed run repeats the steps after the checkpoint, whose lines are cut off the logs."""

    def __init__(self, config):
        self.config, self.path, self.asked = config, Path(config.output_dir), False
        self.lock = filelock.FileLock(self.path / ".lock", timeout=0)  # freed if a process dies
        self.refuse_another()

    def refuse_another(self):
        """Early, and again when the lock is had: another process may have begun since."""
        there = os.listdir(self.path) if self.path.is_dir() else []
        if not self.config.resume and set(there) - {".lock", "unfinished", "checkpoint"}:
            advice = "--resume goes on with it, or choose another directory"
            raise InputError(f"--output_dir {self.path} holds another run: {advice}")

    def restore(self, trained, optimizer, made_from):
        """Claims the directory, and sets `state`, the weights {name: tensor} and the optimizer to
        its newest checkpoint; a new run gets its first. made_from: what must be as it was."""
        with refusing(f"--output_dir {self.path}: cannot be written, or another process does"):
            self.path.mkdir(parents=True, exist_ok=True)
            if RANK == 0:
                self.lock.acquire()
        self.refuse_another()
        if RANK == 0 and not self.config.resume:
            remove(self.path / "checkpoint")  # of a run that ended before its config.json
        everywhere()
        self.tensors, self.made_from = checkpoint_tensors(trained, optimizer), made_from
        # before: the first evaluation; after: the latest, ...
        self.state = dict(before=None, after=None, steps=0, seconds=0.0, forward_passes=0, failed=0)
        self.state["logs"] = dict(metrics=0, samples=0, timings=0)  # bytes
        if self.config.resume:
            self.load()
        self.header = json.dumps([self.state, made_from])
        if not self.config.resume:
            self.save()
        if RANK == 0:
            write_json(self.path / "config.json", self.config.model_dump())
        self.clock = time.monotonic()

    def load(self):
        """Goes back to the newest whole checkpoint, if that was made from the same."""
        found = sorted(self.path.glob("checkpoint/step-*"), reverse=True)
        whole = next((path for path in found if path.name.endswith(self.digest(path))), None)
        if whole is None:
            raise InputError(f"--resume: {self.path} has no whole checkpoint to go on from")
        self.state, made_from = json.loads(self.read_checkpoint(whole, {}))
        for name, mark in self.made_from.items():
            if made_from.get(name) != mark:
                raise InputError(f"--resume: {name} has changed; start a new run to change it")
        self.read_checkpoint(whole, self.tensors)
        everywhere()
        if RANK == 0:
            for path in found[: found.index(whole)]:
                print(f"wd1: {path} is damaged, passed over", file=sys.stderr)
                remove(path)
            for name, size in self.state["logs"].items():
                with (self.path / f"{name}.jsonl").open("ab") as log:
                    if log.tell() < size:
                        raise InputError(f"--resume: {log.name} is shorter than it was")
                    log.truncate(size)

    def save(self):
        """Writes a checkpoint, keeps one more, the last before it, and sums up the run so far."""
        folder = self.path / "checkpoint"
        folder.mkdir(exist_ok=True)
        draft = folder / "unfinished"
        self.write_checkpoint(draft, self.header)
        everywhere()
        if RANK == 0:
            for log in self.path.glob("*.jsonl"):
                to_disk(log)
            publish(draft, folder / f"step-{self.state['steps']:07}-{self.digest(draft)}")
            for old in sorted(folder.glob("step-*"))[:-2]:
                remove(old)
            if self.state["steps"]:
                write_json(self.path / "summary.json", self.state)
                plot(self.path)
        everywhere()  # torchrun gives rank 0 half a minute once another rank has ended

    def write_checkpoint(self, path, header):
        if RANK == 0:
            save_file(self.tensors, path, {"run": header})

    def read_checkpoint(self, path, tensors):
        """Fills {name: tensor} and returns the header."""
        with safe_open(path, "pt") as saved:
            for name, tensor in tensors.items():
                tensor.copy_(saved.get_tensor(name))
            return saved.metadata()["run"]

    def digest(self, path):
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()[:16]

    def record(self, **entries):
        """Appends lines to the logs, {name: [dict]}. Equal runs differ in their timings alone."""
        now = time.monotonic()
        self.state["seconds"] += now - self.clock
        self.clock = now
        entries["timings"] = [{"seconds": self.state["seconds"]}]
        for name, lines in entries.items() if RANK == 0 else ():
            with (self.path / f"{name}.jsonl").open("a") as log:
                log.writelines(f"{json.dumps(line)}\n" for line in lines)
                self.state["logs"][name] = log.tell()
        # A run that stops in the midst of a step saves the state from before it. That step is then
        # repeated, and its forward passes must not count twice.
        self.header = json.dumps([self.state, self.made_from])

    def finish(self, model, tokenizer, **weights):
        """Writes the trained model, which load_model and plain transformers or peft read."""
        draft = self.path / "unfinished-model"
        if RANK == 0:
            remove(draft)
            # Not the embeddings, which peft might save if it found them changed.
            model.save_pretrained(draft, save_embedding_layers=False, **weights)
            tokenizer.save_pretrained(draft)
            publish(draft, self.path / "model")
        everywhere()  # what follows reads it

    @contextlib.contextmanager
    def stoppable(self):
        r"""Ctrl-C or SIGTERM asks the loop to stop (Ctrl-\ is SIGQUIT, and ends all at once). At
        the end the directory is free for others."""

        def ask(*_):
            self.asked = True
            with contextlib.suppress(OSError):  # its reader is gone, as `| tee` is after Ctrl-C
                os.write(2, b"\nstopping where the run can go on from; Ctrl-\\ stops at once\n")

        before = {}
        with contextlib.suppress(ValueError):  # not the main thread, which alone gets signals
            before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self.lock.release(force=True)
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_if_asked(self):
        """After a signal to any rank: leaves a checkpoint and raises SystemExit, with advice."""
        if everywhere(not self.asked):
            return
        self.save()
        program = self.config.program
        if WORLD > 1:
            program = program.replace("python", f"torchrun --nproc_per_node {WORLD}", 1)
        again = f"{program} --resume --output_dir {shlex.quote(str(self.path))}"
        again += f" --task {shlex.quote(self.config.task)}" if ".py:" in self.config.task else ""
        raise SystemExit(f"stopped after step {self.state['steps']}; to go on: {again}")


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def to_disk(path):
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def publish(draft, path):
    """Gives what is written, once it would survive a power cut, its name."""
    for each in (*draft.glob("*"), draft):
        to_disk(each)
    if path.is_dir():  # a file is replaced by the renaming itself
        remove(path)
    draft.rename(path)
    to_disk(path.parent)


def write_json(path, content):
    """Writes a file, or leaves it as it is."""
    draft = path.with_name("unfinished")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    publish(draft, path)


def checkpoint_tensors(trained, optimizer):
    """All tensors of a checkpoint by name: the weights that are trained, and AdamW's state."""
    tensors = {}
    for name, weight in trained.items():
        # AdamW would begin with these at its first step; they are there for `load` to fill.
        moments = {part: torch.zeros_like(weight.data) for part in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] |= {"step": torch.zeros(()), **moments}
        parts = {"weight": weight.data, **optimizer.state[weight]}
        tensors |= {f"{part}.{name}": tensor for part, tensor in parts.items()}
    return tensors


def plot(path):
    """curve.png: reward and held-out accuracy against steps, where matplotlib is there."""
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure

        axes, columns = Figure().subplots(), ["reward", "eval.accuracy"]
        lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        pd.json_normalize(list(lines)).plot("step", columns, style=["-", "o"], ax=axes)
        axes.figure.savefig(path / "curve.png", dpi=150)


def made_from(config, model, train_set, test_set):
    """What a run is made from: `--resume` refuses any other, by its name here."""
    settings = config.model_dump().items()
    parts = {f"--{name}": value for name, value in settings if name not in MAY_CHANGE_ON_RESUME}
    parts["the task's file"] = Path(inspect.getfile(type(get_task(config.task)))).read_text()
    parts["one of the problems"] = [train_set[:], test_set[:]]
    parts["the model or its tokenizer"] = model.fingerprint
    return {name: zlib.crc32(json.dumps(part).encode()) for name, part in parts.items()}


# --------------------------------------------------------------------------------------- the loop


def problems_at(step, train_set, config):
    """The problems of a step, each G times in a row."""
    count = config.batch_size // config.num_generations
    chosen = problems_of(step - 1, count, len(train_set), config.seed)
    return [train_set[i] for i in chosen for _ in range(config.num_generations)]


def learning_rate_at(step, config):
    """AdamW's rate in a step, from 1: constant, or falling evenly."""
    return config.learning_rate * (1 - config.lr_decay * (step - 1) / config.max_steps)


def check_progress(state, metrics, trained, config):
    """Ends a run that will come to nothing: its weights are not finite, or three steps in a row
    had no update, or the last one had none."""
    step, finite = metrics["step"], all(bool(w.isfinite().all()) for w in trained.values())
    state["failed"] = state["failed"] + 1 if metrics["loss"] is None else 0
    patience = 1 if step == config.max_steps else 3
    if state["failed"] >= patience or not everywhere(finite):
        advice = "start again with a lower --learning_rate"
        raise FloatingPointError(f"step {step}: no finite loss or weights: {advice}")


def train(
    config, *, load=load_model, generate=generate, collect=collect, learn=learn,
    directory=RunDirectory, watch=lambda run, metrics: None,
) -> dict:  # fmt: skip
    """Evaluates, trains, evaluates again and saves, all in `output_dir`. Returns the summary.

    On Ctrl-C or SIGTERM it finishes the sampling or the learning that it is at, leaves a checkpoint
    and raises SystemExit (if that was the last step's learning it ends as usual). Killed at any
    moment once config.json is there it goes on, with `resume`, as if it had never stopped. What
    does the work may be replaced; watch(run, metrics) is told of each step."""
    run = directory(config)
    model, reference, tokenizer, train_set, test_set = set_up(config, load)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    options = dict(betas=(0.9, 0.99), weight_decay=config.weight_decay)
    optimizer = torch.optim.AdamW(trained.values(), **options)  # its rate: learning_rate_at
    with autocast(config), run.stoppable():
        run.restore(trained, optimizer, made_from(config, model, train_set, test_set))
        state = run.state

        def count_pass(*_):  # of this process: on several, about their share of all
            state["forward_passes"] += 1

        for network in {model, reference or model}:  # LoRA's reference is the model itself
            network.get_decoder().register_forward_pre_hook(count_pass)

        def end_step(metrics, **more):
            """An evaluation, if it is time for one, and a line in each log."""
            step, every = metrics["step"], config.eval_every
            if step in (0, config.max_steps) or every and step % every == 0:
                state["after"] = evaluate_model(model, tokenizer, test_set, config, generate)
                state["before"] = state["before"] or state["after"]
                metrics["eval"] = state["after"]
            state["steps"], metrics["forward_passes"] = step, state["forward_passes"]
            run.record(metrics=[metrics], **more)
            watch(run, metrics)

        if not state["before"]:
            end_step({"step": 0})
        bar = tqdm(range(state["steps"] + 1, config.max_steps + 1), "wd1", disable=RANK > 0)
        for step in bar:
            run.stop_if_asked()
            seed, problems = (config.seed, step), problems_at(step, train_set, config)
            batch = collect(model, reference, tokenizer, problems, config, seed, generate)
            run.stop_if_asked()  # --resume will draw the same samples
            optimizer.param_groups[0]["lr"] = learning_rate_at(step, config)
            metrics = {"step": step, **describe(batch, config, model.config.eos_token_id)}
            transformers.set_seed(seed_of(*seed))  # the same masks on all ranks, and after --resume
            metrics |= learn(model, optimizer, batch, config)
            check_progress(state, metrics, trained, config)
            samples = [  # the first group
                dict(step=step, prompt=problems[0]["prompt"], completion=text, reward=reward)
                for text, reward in zip(batch.texts, batch.rewards[0].tolist())
            ]
            end_step(metrics, samples=samples)
            held_out = state["after"]["accuracy"]
            bar.set_postfix(reward=metrics["reward"], held_out=held_out, refresh=False)
            if step == config.max_steps or step % config.save_every == 0:
                run.save()
        run.finish(model, tokenizer)
    return state


# ================================================================================== 7. Evaluation
# On problems that are not trained on, at temperature 0. The reward of samples may rise while
# held-out accuracy falls.


def evaluate_model(model, tokenizer, test_set, config, generate=generate):
    """{"accuracy", "reward", "published_score", "lengths": {L: these three}, "problems"}; the first
    three at the length nearest to gen_length. published_score is by the published runs' rules."""
    lengths = {}
    for length in config.eval_lengths:
        sizes = length, (length + 1) // 2  # two tokens a step, as published; at temperature 0
        rollout = sample(model, tokenizer, test_set["prompt"], config, *sizes, generate=generate)
        texts = decode(model, tokenizer, rollout.completion)
        lengths[str(length)] = get_task(config.task).scores(texts, test_set)
    nearest = min(config.eval_lengths, key=lambda length: abs(length - config.gen_length))
    return {**lengths[str(nearest)], "lengths": lengths, "problems": len(test_set)}


def evaluate(config, *, load=load_model, generate=generate) -> dict:
    """Evaluates a model on held-out problems and writes nothing. Returns evaluate_model's dict."""
    config.eval_only = True
    model, _, tokenizer, _, test_set = set_up(config, load)
    with autocast(config):
        return evaluate_model(model, tokenizer, test_set, config, generate)


# ============================================================================ 8. The command line


def parse_arguments(argv=None, config_class=Config):
    """The command line as a Config; `--help` is made from the comments of the class."""
    parser = argparse.ArgumentParser(
        prog="wd1",
        usage=f"{config_class.program} [--SETTING VALUE ...]",
        description=__doc__.splitlines()[0],
        epilog=f"Other defaults, by task and for models named tiny: {PRESETS}",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        conflict_handler="resolve",  # a subclass may define a setting anew
    )
    classes = [each for each in config_class.__mro__ if issubclass(each, Config)]
    source = "".join(map(inspect.getsource, reversed(classes)))
    group = parser  # of what comes before the first group
    # Four spaces from the left, `name: ...  # comment` is a setting, `# comment` alone begins a
    # group of them. Values stay the text that they are: pydantic converts them.
    for name, comment in re.findall(r"(?m)^    (?:(\w+): .*)?# (.*)$", source):
        if not name:
            group = parser.add_argument_group(comment)
        elif field := config_class.model_fields.get(name):
            kind, help = field.annotation, f"{comment} [{field.default}]"
            form = "|".join(get_args(kind)) if get_origin(kind) is Literal else "X"
            several = {bool: dict(nargs="?", const=True), list[Size]: dict(nargs="+")}.get(kind, {})
            group.add_argument(f"--{name}", metavar=form, help=help, **several)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0]
        near = difflib.get_close_matches(word.strip("-"), config_class.model_fields, 1, cutoff=0)
        raise InputError(f"{word:.60}: there is no such setting; the nearest is --{near[0]}")
    return config_class(**vars(given))


def main(argv=None, config_class=Config, train=train, evaluate=evaluate):
    """Runs the program."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = parse_arguments(argv, config_class)
    if RANK:  # what is printed is the same on all
        sys.stdout = open(os.devnull, "w")
    if config.eval_only:
        print(json.dumps(evaluate(config), indent=2))
        return
    summary = train(config)
    for when in ("before", "after"):
        figures = "accuracy {accuracy:.1%}, reward {reward:.3f}".format_map(summary[when])
        print(f"{when:>6}: {figures}")
    print(f"{config.output_dir}/model is the trained model; curve.png shows how it went")


if __name__ == "__main__":
    with one_sentence():
        main()
