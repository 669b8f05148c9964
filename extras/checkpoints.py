"""Real checkpoints in stock classes: which class, whose settings, whose weight names. Runs none of their code.

LLaDA's own modelling code and LlamaForCausalLM with `is_causal = False` and the same weights give the same logits; so do
Dream's and Qwen2's (read one position to the left), and the a2d conversions' and their originals'.
"""

import importlib.util
import json
import re
from pathlib import Path

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from extras.vetting import check_sizes, own, vetted
from rewards import TASKS, InputError, refusing

FAMILIES = {  # model_type in config.json -> stock class
    "llada": transformers.LlamaForCausalLM, "Dream": transformers.Qwen2ForCausalLM,
    **{prefix + "llama": transformers.LlamaForCausalLM for prefix in ("", "a2d-")},
    **{prefix + "qwen2": transformers.Qwen2ForCausalLM for prefix in ("", "a2d-")},
    **{prefix + "qwen3": transformers.Qwen3ForCausalLM for prefix in ("", "a2d-")},
}  # fmt: skip
LLADA_CONFIG = {  # LLaDA's setting -> Llama's; a later line wins (an embedding may have spare rows)
    "d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "mlp_hidden_size": "intermediate_size", "vocab_size": "vocab_size",
    "embedding_size": "vocab_size", "max_sequence_length": "max_position_embeddings", "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "weight_tying": "tie_word_embeddings", "pad_token_id": "pad_token_id",
}  # fmt: skip
LLADA_BLOCK = {  # LLaDA's weight names within a block -> Llama's within a layer
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
}  # fmt: skip
LLADA_WEIGHTS = {  # as patterns; no other family's names match them
    r"^model\.transformer\.wte\.": "model.embed_tokens.", r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    **{rf"^model\.transformer\.blocks\.(\d+)\.{llada}\.": rf"model.layers.\1.{llama}." for llada, llama in LLADA_BLOCK.items()},
}  # fmt: skip
ONLY = {  # settings that a stock class would ignore, and so compute something else: the one value they may have
    "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True, "alibi": False,
    "attention_layer_norm": False, "include_bias": False, "include_qkv_bias": False, "bias_for_layer_norm": False,
    "layer_norm_with_affine": True, "input_emb_norm": False, "scale_logits": False, "multi_query_attention": False,
    "clip_qkv": None, "use_sliding_window": False, "quantization_config": None,
    "partial_rotary_factor": 1.0,
}  # fmt: skip
# All that a stock class is told of a config.json: transformers would, for one, fetch attention kernels that it names.
BELIEVED = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
hidden_act max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings rope_theta rope_scaling rope_parameters
attention_bias mlp_bias attention_dropout pad_token_id bos_token_id""".split()


def find_checkpoint(source, weights=True) -> Path:
    """The directory (or config.json) that `source` names; a hub repository is fetched, code and pickles excepted."""
    with refusing(f"--model {source}: not a path"):
        path = Path(__file__).resolve().parents[1] / "tiny_config.json" if source == "tiny" else Path(source).expanduser()
        if path.is_dir() or (path.is_file() and path.suffix == ".json"):
            return path
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise InputError(f"--model {source}: no such directory or config.json, and not a hub id like GSAI-ML/LLaDA-8B-Instruct")
    from huggingface_hub import snapshot_download

    with refusing(f"--model {source}: no such directory, and the hub does not give it"):
        files = ["*.json", "*.txt", "*.jinja"] + ["*.safetensors"] * weights
        return Path(snapshot_download(str(source), allow_patterns=files))


def read_config(path):
    """The stock class and its config for a directory's config.json, or for such a file itself."""
    file = path / "config.json" if path.is_dir() else path
    with refusing(f"{file}: not a model config"):
        raw = json.loads((own(path, file.name) if path.is_dir() else path).read_text())
        family = str(raw.get("model_type"))
    if family not in FAMILIES:
        raise InputError(f"{file}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    if family in ("llama", "qwen2", "qwen3") and raw.get("is_causal") is not False:
        raise InputError(f"{file}: this is an autoregressive model (is_causal is not false), not a diffusion language model")
    for name, value in ONLY.items():
        if raw.get(name) not in (value, None):
            raise InputError(f"{file}: {name} = {raw[name]!r} is not what {FAMILIES[family].__name__} computes; refused")
    known = {name: raw[name] for name in BELIEVED if raw.get(name) is not None}
    if family == "llada":
        known = {ours: raw[theirs] for theirs, ours in LLADA_CONFIG.items() if raw.get(theirs) is not None}
    check_sizes(file, known)
    with refusing(f"{file}: not a valid config"):
        config = FAMILIES[family].config_class(**known, attn_implementation="sdpa")
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(f"{file}: not a valid config (the heads are not a multiple of the key-value heads)")
    config.is_causal = config.use_cache = False
    config.mask_token_id, config.eos_token_id = raw.get("mask_token_id"), raw.get("eos_token_id")
    config.logit_shift = bool(raw.get("logit_shift", family == "Dream"))
    return FAMILIES[family], config


def four_bits(path, device, dtype):
    """What from_pretrained needs to load linear layers in 4 bits (NF4, as QLoRA, arXiv 2305.14314), straight onto a device."""
    if path.is_file():
        raise InputError(f"--load_in_4bit: {path} has no weights; 4 bits are for those that are read from a checkpoint")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("--load_in_4bit needs bitsandbytes: pip install bitsandbytes")
    settings = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    return dict(quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, **settings), device_map={"": device})


def read_tokenizer(path, config):
    """The tokenizer of a checkpoint, read from its *files* with a stock class; AutoTokenizer would offer to run its code.

    Completes the config from it: mask_token_id and eos_token_id.
    """
    with refusing(f"{path}: no readable tokenizer.json, or vocab.json with merges.txt"):
        tokenizer = character_tokenizer(config) if path.is_file() else load_tokenizer(path)
    for name in ("mask", "eos"):
        if getattr(config, f"{name}_token_id") is None:
            setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        ids = getattr(config, f"{name}_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if not ids or not all(isinstance(i, int) and 0 <= i < config.vocab_size for i in ids):
            raise InputError(f"{path}: no {name} token: no fit {name}_token_id in config.json, nor one in the tokenizer")
    return tokenizer


def load_tokenizer(path):
    """The tokenizer in a directory; Dream's own class is Qwen2's."""
    fast = (path / "tokenizer.json").exists()
    for name in () if fast else ("vocab.json", "merges.txt"):
        own(path, name)  # raises if it is missing
    stock = transformers.PreTrainedTokenizerFast if fast else transformers.Qwen2Tokenizer
    with vetted(path, weights=False) as files:
        tokenizer = stock.from_pretrained(files)
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not isinstance(tokenizer.chat_template, str | None):
        raise ValueError("the chat template is no text")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def character_tokenizer(config):
    """The tiny model's tokenizer: a token is a character, a tag, or the whole instruction of a task.

    125,000 parameters do not read English; with one token per instruction they get the very prompts that LLaDA gets.
    """
    if not isinstance(config.mask_token_id, int) or not isinstance(config.eos_token_id, int):
        raise InputError("no mask token: a config.json without a tokenizer needs numbers mask_token_id and eos_token_id")
    words = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", *(task.instruction for task in TASKS.values())]
    special = {config.eos_token_id: "<|eos|>", config.mask_token_id: "<|mask|>"}
    free = (i for i in range(config.vocab_size) if i not in special)
    vocab = dict(zip(["<|unk|>", "\n", *map(chr, range(32, 127)), *words], free)) | {v: k for k, v in special.items()}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_tokens(words)
    names = dict(mask_token="<|mask|>", eos_token="<|eos|>", pad_token="<|eos|>", unk_token="<|unk|>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)
