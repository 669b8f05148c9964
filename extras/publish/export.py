"""A trained model for other programs: LoRA merged, in LLaDA's own format or plain transformers'.

    python -m extras.publish.export runs/X OUT                         # a LLaDA for LLaDA's code
    python -m extras.publish.export runs/X OUT --dtype bfloat16        # in the size of the original
    python -m extras.publish.export runs/X OUT --format transformers   # any family, without peft

Programs made for LLaDA load it by its own code, modeling_llada.py and configuration_llada.py. None
is copied here: put these two files of the original repository into OUT yourself. What training does
not change, the settings in config.json and the tokenizer, is that of the LLaDA which a model came
from, carried over as data.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from huggingface_hub import save_torch_state_dict

import wd1
from extras.publish.card import model_card
from rewards import InputError, refusing
from wd1 import LLADA_WEIGHTS, TABLES, download, own, read_json

AUTO_MAP = {  # LLaDA's own; a stranger's might fetch and run anybody's code
    "AutoConfig": "configuration_llada.LLaDAConfig",
    "AutoModel": "modeling_llada.LLaDAModelLM",
    "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
}


def llada_base(source):
    """(directory, its config.json) of the LLaDA that a model came from, as adapters and runs tell,
    perhaps through several of them."""
    path = Path(source)
    if not path.exists():
        path, _ = download(source, weights=False)
    config = read_json(path / "config.json")
    if config.get("model_type") == "llada":
        return path, config
    base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    base = base or read_json(path.parent / "config.json").get("model")
    if base is None:
        raise ValueError(f"model_type {config.get('model_type')} of {path} is not llada")
    return llada_base(base)


def llada_name(name):
    """LLaDA's name of a Llama's weight: LLADA_WEIGHTS the other way round."""
    in_a_layer = name.startswith("model.layers.")
    for theirs, ours in LLADA_WEIGHTS.items():
        if not (in_a_layer and ours == "norm."):  # the last norm's, which is part of others' names
            name = name.replace(ours, theirs)
    return name


def write_llada(directory, model, base, config):
    """Writes a LLaDA: config.json, weights under its names in shards, its tokenizer's files."""
    directory.mkdir()
    weights = {llada_name(name): weight.detach() for name, weight in model.named_parameters()}
    save_torch_state_dict(weights, directory)
    for name in TABLES:  # the base's own: older releases do not read what newer ones write
        if own(base / name):
            shutil.copyfile(base / name, directory / name)
    told = {"auto_map": AUTO_MAP, "torch_dtype": str(model.dtype).removeprefix("torch.")}
    tokenizer = read_json(base / "tokenizer_config.json")
    tokenizer.pop("auto_map", None)
    for name, content in ("config.json", config | told), ("tokenizer_config.json", tokenizer):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def main(argv):
    """The command line. Writes the whole of OUT or nothing."""
    parser = argparse.ArgumentParser("wd1", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a run's directory, a model's, or a hub id")
    parser.add_argument("out", type=Path, help="the directory to write; it must not exist")
    parser.add_argument("--format", choices=["llada", "transformers"], default="llada")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args(argv)
    source, out = given.source, given.out.absolute()
    source = source / "model" if (source / "summary.json").is_file() else source
    if os.path.lexists(out):
        raise InputError(f"{out} is there already: remove it, or choose another place")
    if given.format == "llada":
        advice = "is for what came from a LLaDA; --format transformers takes any model"
        with refusing(f"{source}: LLaDA's format {advice}"):
            base = llada_base(str(source))
    model, tokenizer = wd1.load_model(str(source), dtype=getattr(torch, given.dtype))
    model = model.merge_and_unload() if hasattr(model, "peft_config") else model
    with refusing(f"{out}: cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as unfinished:
            directory = Path(unfinished, "model")
            if given.format == "llada":
                write_llada(directory, model, *base)
            else:
                model.save_pretrained(directory)
                tokenizer.save_pretrained(directory)
            if (source.parent / "summary.json").is_file():
                card = model_card(source.parent, given.format)
                (directory / "README.md").write_text(card, encoding="utf-8")
            directory.rename(out)
    print(f"{out} holds the model")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    with wd1.one_sentence():
        main(sys.argv[1:])
