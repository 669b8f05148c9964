"""A trained model for other programs: LoRA merged into the weights, in LLaDA's own format on disk or in plain transformers'.

    python -m extras.export runs/X OUT                             # of a LLaDA: a drop-in replacement for what it came from
    python -m extras.export runs/X OUT --dtype bfloat16            # all weights trained: in the size of the original
    python -m extras.export runs/X OUT --format transformers       # any family: merged, for plain transformers without peft

Programs made for LLaDA load it by its own code, modeling_llada.py and configuration_llada.py. No code is copied here: put these
two files of the original repository into OUT yourself (config.json's auto_map names them). What else is in the base's
config.json is carried over as data; if the base cannot be found, LLaDA-8B's settings stand in for it.

Names are those of extras/checkpoints.py, read from right to left. Each LoRA product is added in float32 and rounded once.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from extras.card import lineage, model_card, run_settings, saved_model
from extras.checkpoints import LLADA_CONFIG, LLADA_WEIGHTS, ONLY, find_checkpoint, read_config
from extras.runs import exit_code, replacing
from extras.settings import quiet, refuse
from extras.vetting import INDEX, own, weight_files
from extras.watch import visible
from rewards import InputError, refusing

LLAMA_WEIGHTS = {  # LLADA_WEIGHTS the other way round: patterns of Llama's names -> LLaDA's
    "^" + re.escape(llama).replace(r"\\1", r"(\d+)"): llada[1:].replace(r"(\d+)", r"\1").replace(r"\.", ".")
    for llada, llama in LLADA_WEIGHTS.items()
}
LLADA_8B = {  # the settings of a LLaDA that say nothing about its size, as LLaDA-8B has them
    **{name: ONLY[name] for name in """block_type layer_norm_type activation_type rope alibi attention_layer_norm include_bias
       include_qkv_bias bias_for_layer_norm layer_norm_with_affine input_emb_norm scale_logits""".split()},
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "alibi_bias_max": 8.0, "attention_dropout": 0.0,
    "attention_layer_norm_with_affine": True, "block_group_size": 1, "embedding_dropout": 0.0, "flash_attention": False,
    "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02, "mlp_ratio": 4,
    "multi_query_attention": None, "precision": "amp_bf16", "residual_dropout": 0.0, "rope_full_precision": True,
    "transformers_version": "4.46.3", "use_cache": False,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig",
                 **{auto: "modeling_llada.LLaDAModelLM" for auto in ("AutoModel", "AutoModelForCausalLM")}},
}  # fmt: skip
TOKENIZER = "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja".split()
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass
class Export:
    """What the command line asks for."""

    source: str
    out: Path
    format: str = "llada"
    dtype: str = "auto"
    max_shard_size: str = "5GB"


def export(options):
    """Writes the model that options.source names to options.out, whole or not at all."""
    out, size = options.out.expanduser().absolute(), options.max_shard_size
    for suffix in ("", ".unfinished", ".old"):  # `replacing` would remove the last two
        path = out.with_name(out.name + suffix) if suffix else out
        if path.exists() or path.is_symlink():
            raise InputError(f"{path} is there already: remove it, or choose another place")
    if not re.fullmatch(r"0*[1-9]\d{0,8}(KB|MB|GB|TB)", size.upper()):
        raise InputError(f"--max_shard_size {size}: give a size like 500MB or 5GB")
    source = find_checkpoint(saved_model(options.source))
    if source.is_file():
        raise InputError(f"{options.source}: a config alone has no weights that could be exported")
    dtype = stored_dtype(source) if options.dtype == "auto" else getattr(torch, options.dtype)
    model, tokenizer = load(source, dtype)
    base, config = None, {}
    if options.format == "llada":
        refuse_others(source, model)
        base, config = llada_base(source)
    card = card_of(source, options.format)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as unfinished:
        if options.format == "llada":
            unfinished.mkdir()
            write_weights(unfinished, model, size)
            (unfinished / "config.json").write_text(json.dumps(llada_config(model.config, config, dtype), indent=2) + "\n")
            write_tokenizer(unfinished, tokenizer, base)
        else:
            model.save_pretrained(unfinished, max_shard_size=size)
            tokenizer.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(card, encoding="utf-8")


def stored_dtype(source):
    """The type of a checkpoint's weights on disk, for LoRA of its base's; float32 if there are several."""
    for path in map(find_checkpoint, lineage(source)):
        if path.is_dir() and not (path / "adapter_config.json").is_file():
            kinds = set()
            with refusing(f"{path}: the weights cannot be loaded"):
                for name, file in weight_files(path).items():
                    if name != INDEX:
                        with safe_open(file, "pt") as tensors:
                            kinds |= {tensors.get_slice(weight).get_dtype() for weight in tensors.keys()}
            return TYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32
    return torch.float32


def load(source, dtype):
    """load_model(source), the adapters merged if there are any."""
    from peft.tuners.lora import LoraLayer

    from wd1 import load_model

    seed = run_settings(source).get("seed")  # adapters may stand on random weights, for tests
    model, tokenizer = load_model(source, dtype=dtype, seed=seed if isinstance(seed, int) else 0)
    if not hasattr(model, "peft_config"):
        return model, tokenizer
    tied = {id(model.get_input_embeddings().weight)} if model.config.tie_word_embeddings else set()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            if id(weight) in tied:
                raise InputError(f"{source}: has LoRA adapters on embeddings that the output shares; they cannot be merged")
            with torch.no_grad():
                weight.copy_(weight.float() + layer.get_delta_weight("default").float())
    return model.unload(), tokenizer


def refuse_others(source, model):
    """Refuses a model that LLaDA's code would not compute, and names why."""
    config, heads = model.config, model.config.num_attention_heads
    reasons = {
        f"a {type(model).__name__}": not isinstance(model, transformers.LlamaForCausalLM),
        "logit_shift": config.logit_shift,
        "biases": any(name.endswith(".bias") for name, _ in model.named_parameters()),
        "rope_scaling": config.rope_parameters.keys() - {"rope_type", "rope_theta", "partial_rotary_factor"}
        or config.rope_parameters["rope_type"] != "default",
        f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
        "head_dim other than hidden_size / heads": getattr(config, "head_dim", None) not in (None, config.hidden_size / heads),
    }
    if found := [reason for reason, there in reasons.items() if there]:
        advice = "plain transformers loads it as it is, or merged with --format transformers"
        raise InputError(f"{source}: LLaDA's format has no place for {found[0]}; {advice}")


def llada_base(source):
    """(directory, config.json) of the LLaDA that a model descends from; (None, {}), with a notice, if it cannot be found."""
    for ancestor in lineage(source):
        try:
            path = find_checkpoint(ancestor, weights=False)
            if (path / "adapter_config.json").is_file():
                continue
            read_config(path)  # or its settings are not what was computed with
            raw = json.loads((own(path, "config.json") if path.is_dir() else path).read_text())
        except InputError as error:
            notice(error)
            continue
        if raw["model_type"] == "llada":
            return path, raw
    notice("no LLaDA is known that this came from: LLaDA-8B's settings stand in for its own")
    return None, {}


def llada_config(config, base, dtype):
    """LLaDA's config.json for a Llama's config: its base's, with what this model says of itself.

    (mlp_ratio is kept, 4 in LLaDA-8B though its MLP is 3 times as wide: mlp_hidden_size overrules it.)
    """
    ours = config.to_dict() | config.rope_parameters
    own_settings = {theirs: ours[name] for theirs, name in LLADA_CONFIG.items()}
    own_settings |= {name: ours[name] for name in ("mask_token_id", "eos_token_id")}
    if type(base.get("vocab_size")) is int:  # an embedding may have spare rows
        own_settings["vocab_size"] = min(base["vocab_size"], ours["vocab_size"])
    if ours["pad_token_id"] is None:
        own_settings["pad_token_id"] = torch.tensor(config.eos_token_id).view(-1)[0].item()
    own_settings["auto_map"] = without_remote_code(base.get("auto_map") or LLADA_8B["auto_map"])
    own_settings |= {name: str(dtype).removeprefix("torch.") for name in ("torch_dtype", "dtype") if name in base}
    return dict(sorted((LLADA_8B | base | own_settings).items()))


def without_remote_code(auto_map):
    """auto_map, if it names classes in files beside it: "owner/repository--file.Class" would fetch and run anybody's code."""
    if not isinstance(auto_map, dict) or any("--" in str(name) for name in auto_map.values()):
        return LLADA_8B["auto_map"]
    return auto_map


def write_weights(directory, model, max_shard_size):
    """The weights under LLaDA's names, shard by shard: no second copy of the model is made. Tied ones are written once."""
    weights = {}
    for name, weight in model.state_dict().items():
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            for pattern, replacement in LLAMA_WEIGHTS.items():
                name = re.sub(pattern, replacement, name)
            weights[name] = weight
    plan = split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: weights[name].contiguous() for name in names}, directory / file, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_tokenizer(directory, tokenizer, base):
    """The base's own tokenizer files: older releases do not read what newer ones write. Without them, the best that can be."""
    with refusing(f"{base}: the tokenizer's files cannot be read"):
        if base and base.is_dir() and (base / "tokenizer.json").exists():
            same = Tokenizer.from_file(str(own(base, "tokenizer.json"))).get_vocab() == tokenizer.get_vocab()
            files = {name: own(base, name).read_bytes() for name in TOKENIZER if same and (base / name).exists()}
            settings = json.loads(files.get("tokenizer_config.json", "{}"))
            if "--" in str(settings.pop("auto_map", "")):  # see without_remote_code
                files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
            for name, content in files.items():
                (directory / name).write_bytes(content)
            if same:
                return
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def card_of(source, form):
    """The model card, if a run's files stand beside the model."""
    run = source.resolve().parent
    if run_settings(source) and (run / "summary.json").is_file():
        return model_card(run, form)
    return "No run's files stood beside this model when it was exported: nothing is known here of how it was trained.\n"


def main(argv=None):
    """Runs the program; returns its exit code: 0, 1 if nothing could be written, 2 for input that cannot be used."""
    quiet()
    parser = argparse.ArgumentParser(prog="python -m extras.export", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("source", help="a run's directory, or a model: a directory or a hub id")
    parser.add_argument("out", type=Path, help="the directory to write; it must not exist")
    parser.add_argument("--format", choices=["llada", "transformers"], default="llada", help="default: %(default)s")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
                        help="auto: as the weights are saved, for LoRA as the base's are")  # fmt: skip
    parser.add_argument("--max_shard_size", default="5GB", help="of a file of weights; default: %(default)s")
    try:
        parser.error = refuse
        options = Export(**vars(parser.parse_args(argv)))
        export(options)
        print(f"{options.out} holds the model")
        return 0
    except (KeyboardInterrupt, InputError, OSError) as error:
        return exit_code(error, notice)


def notice(sentence):
    print(f"export: {visible(str(sentence))}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
