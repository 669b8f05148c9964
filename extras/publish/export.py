"""A trained model for other programs: LoRA merged, in LLaDA's own format or plain transformers'.

    python -m extras.publish.export runs/X OUT                          # a LLaDA for LLaDA's code
    python -m extras.publish.export runs/X OUT --dtype bfloat16         # in the size of the original
    python -m extras.publish.export runs/X OUT --format transformers    # any family, without peft

Programs made for LLaDA load it by its own code, modeling_llada.py and configuration_llada.py. None is
copied here: put these two files of the original repository into OUT yourself. What else is in the
base's config.json is carried over as data; without one LLaDA-8B's settings stand in for it.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

import wd1
from extras.publish.card import model_card
from rewards import InputError, refusing
from wd1 import LLADA_CONFIG, LLADA_WEIGHTS, ONLY, own, read_json

LLADA_8B = {  # the settings of a LLaDA that say nothing about its size, as LLaDA-8B has them
    **{name: value for name, value in list(ONLY.items())[:14] if name != "clip_qkv"},
    "model_type": "llada", "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"], "attention_dropout": 0.0, "block_group_size": 1,
    "attention_layer_norm_with_affine": True, "embedding_dropout": 0.0, "flash_attention": False,
    "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02,
    "mlp_ratio": 4, "multi_query_attention": None, "precision": "amp_bf16", "use_cache": False,
    "residual_dropout": 0.0, "rope_full_precision": True, "transformers_version": "4.46.3",
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig",
                 "AutoModel": "modeling_llada.LLaDAModelLM",
                 "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
}  # fmt: skip
TOKENIZER = """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
chat_template.jinja""".split()


def lineage(model):
    """[model, what it was trained from, what that was trained from, ...], as directories tell."""
    known = [str(model)]
    while True:
        path = Path(known[-1])
        base = read_json(path, "adapter_config.json").get("base_model_name_or_path")
        if base is None and path.name == "model" and (path.parent / "metrics.jsonl").is_file():
            base = read_json(path.parent, "config.json").get("model")
        if not isinstance(base, str) or base in known:
            return known
        known.append(base)


def llada_base(source):
    """(directory, its config.json) of the LLaDA that a model descends from; (None, {}) if none is
    known."""
    for path in map(Path, lineage(source)):
        raw = read_json(path, "config.json") if path.is_dir() else {}
        if raw.get("model_type") == "llada":
            return path, raw
    print("wd1: no LLaDA is known that it came from: LLaDA-8B's settings are used", file=sys.stderr)
    return None, {}


def merged(source, dtype):
    """load_model(source) with its adapters merged, each product added in float32, rounded once."""
    names = lineage(source)
    if dtype is None:  # as the weights are stored; for LoRA, those of the base
        stored = [path for path in map(Path, names) if (path / "config.json").is_file()]
        full = [path for path in stored if not (path / "adapter_config.json").is_file()]
        with refusing(f"{source}: the weights cannot be loaded"):
            weights = wd1.read_weights(full[0]).values() if full else ()
        kinds = {weight.dtype for weight in weights}
        dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    model, tokenizer = wd1.load_model(source, dtype=dtype)
    if not hasattr(model, "peft_config"):
        return model, tokenizer, dtype
    tied = model.config.tie_word_embeddings and id(model.get_input_embeddings().weight)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            if id(weight) == tied:
                raise InputError(f"{source}: adapters on embeddings that are tied cannot be merged")
            with torch.no_grad():
                weight.copy_(weight.float() + layer.get_delta_weight("default").float())
    return model.unload(), tokenizer, dtype


def refuse_others(source, model):
    """Refuses a model that LLaDA's code would not compute, and names why."""
    config = model.config
    rope, head = config.rope_parameters, config.hidden_size // config.num_attention_heads
    for reason, there in {
        f"a {type(model).__name__}": not isinstance(model, transformers.LlamaForCausalLM),
        "logit_shift": config.logit_shift,
        "biases": any(name.endswith(".bias") for name, _ in model.named_parameters()),
        "rope_scaling": rope.get("rope_type", "default") != "default",
        f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
        "this head_dim": getattr(config, "head_dim", head) != head,
    }.items():
        if there:
            advice = "plain transformers loads it; merge LoRA with --format transformers"
            raise InputError(f"{source}: LLaDA's format has no place for {reason}; {advice}")


def llada_config(config, base, dtype):
    """LLaDA's config.json: its base's, with what this model says of itself."""
    ours = config.to_dict() | config.rope_parameters
    told = {theirs: ours[name] for theirs, name in LLADA_CONFIG.items()}
    told |= {name: ours[name] for name in ("mask_token_id", "eos_token_id")}
    if type(base.get("vocab_size")) is int:  # an embedding may have spare rows
        told["vocab_size"] = min(base["vocab_size"], ours["vocab_size"])
    if ours["pad_token_id"] is None:
        told["pad_token_id"] = torch.tensor(config.eos_token_id).view(-1)[0].item()
    told["auto_map"] = LLADA_8B["auto_map"]  # a stranger's might fetch and run anybody's code
    told |= {name: str(dtype).split(".")[1] for name in ("torch_dtype", "dtype") if name in base}
    return LLADA_8B | base | told


def llada_name(name):
    """LLaDA's name of a Llama's weight: LLADA_WEIGHTS the other way round, outer names first."""
    in_a_layer = name.startswith("model.layers.")
    for theirs, ours in reversed(LLADA_WEIGHTS.items()):
        if not (in_a_layer and ours == "norm."):  # the last norm's, which is part of others' names
            name = name.replace(ours, theirs)
    return name


def write_llada(directory, model, tokenizer, source, dtype, size):
    """Writes LLaDA's config.json, weights under its names in shards, and its tokenizer's files."""
    base, config = llada_base(source)
    weights, tied = model.state_dict(), model.config.tie_word_embeddings
    weights = {llada_name(n): w for n, w in weights.items() if not (tied and n == "lm_head.weight")}
    directory.mkdir()
    plan = split_torch_state_dict_into_shards(weights, max_shard_size=size)
    for file, names in plan.filename_to_tensors.items():
        part = {name: weights[name].contiguous() for name in names}
        save_file(part, directory / file, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    settings = llada_config(model.config, config, dtype)
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if base is None or not (base / "tokenizer.json").exists():
        tokenizer.save_pretrained(directory)
        return
    for name in TOKENIZER:  # the base's own: older releases do not read what newer ones write
        if (base / name).exists():
            shutil.copyfile(own(base, name), directory / name)
    settings = read_json(base, "tokenizer_config.json")
    settings.pop("auto_map", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main(argv):
    """The command line. Writes the whole of OUT or nothing."""
    parser = wd1.Parser([], description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("source", help="a run's directory, or a model: a directory or a hub id")
    parser.add_argument("out", type=Path, help="the directory to write; it must not exist")
    parser.add_argument("--format", choices=["llada", "transformers"], default="llada", help=" ")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help=" ")
    parser.add_argument("--max_shard_size", default="5GB", help="of a file of weights")
    given = parser.parse_args(argv)
    source, out = Path(given.source), given.out.expanduser().absolute()
    run = source if (source / "metrics.jsonl").is_file() else source.parent
    source = str(source / "model" if run == source else source)
    unfinished = out.with_name(out.name + ".unfinished")
    for path in (out, unfinished):
        if os.path.lexists(path):
            raise InputError(f"{path} is there already: remove it, or choose another place")
    dtype = None if given.dtype == "auto" else getattr(torch, given.dtype)
    model, tokenizer, dtype = merged(source, dtype)
    if given.format == "llada":
        refuse_others(source, model)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with refusing(f"--max_shard_size {given.max_shard_size}, or {out}: cannot be written"):
            if given.format == "llada":
                write_llada(unfinished, model, tokenizer, source, dtype, given.max_shard_size)
            else:
                model.save_pretrained(unfinished, max_shard_size=given.max_shard_size)
                tokenizer.save_pretrained(unfinished)
            if (run / "summary.json").is_file():
                card = model_card(run, given.format)
                (unfinished / "README.md").write_text(card, encoding="utf-8")
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{out} holds the model")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    with wd1.one_sentence():
        main(sys.argv[1:])
