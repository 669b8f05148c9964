"""What a checkpoint from a stranger can do: name the base of its adapters, and bring a chat template that never ends.

transformers and peft act on dozens of settings that a checkpoint's files may carry: classes to import, attention kernels to
fetch, files elsewhere to read, pickles to open. None of that is handled here one by one. They are shown a directory made for
the purpose (`vetted`), in which there is nothing but safetensors, the tokenizer's files and the few settings that are
understood; and nothing is allocated before sizes have been compared with what the files can hold.
"""

import contextlib
import json
import math
import os
import re
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

from rewards import InputError, refusing

SPECIAL = "bos_token eos_token pad_token unk_token mask_token cls_token sep_token additional_special_tokens".split()
KNOWN = {  # all that is passed on of these files
    "tokenizer_config.json": SPECIAL
    + "chat_template extra_special_tokens added_tokens_decoder add_prefix_space clean_up_tokenization_spaces".split(),
    "special_tokens_map.json": SPECIAL,
    "adapter_config.json": """peft_type base_model_name_or_path r lora_alpha lora_dropout target_modules use_rslora bias
        task_type inference_mode fan_in_fan_out""".split(),
}
LARGEST = {  # no model is larger; one that asked for more would be hours in the making before it is refused
    "vocab_size": 2**22, "hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 1000, "head_dim": 2**14,
    "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "max_position_embeddings": 2**30, "r": 2**14,
}  # fmt: skip


INDEX = "model.safetensors.index.json"


def check_sizes(file, settings):
    """Refuses settings that are no sensible sizes."""
    for name in LARGEST.keys() & settings.keys():
        if type(settings[name]) is not int or not 1 <= settings[name] <= LARGEST[name]:
            sentence = f"{name} = {settings[name]!r:.50} is no number from 1 to {LARGEST[name]}"
            raise InputError(f"{file}: not a valid config ({sentence})")


def own(directory, name):
    """The regular file `name` of a directory; it may be a link into a cache of the hub (models--.../blobs)."""
    file, home = (directory / name).resolve(), directory.resolve()
    in_the_hubs_cache = file.parent.name == "blobs" and file.parent.parent.name.startswith("models--")
    if not re.fullmatch(r"[\w.-]+", str(name)) or not (file.parent == home or in_the_hubs_cache):
        raise InputError(f"{directory}: {str(name)!r:.100} is not a file of this directory, or a link out of it; refused")
    if not file.is_file():
        raise FileNotFoundError(f"no {name}")
    return file


def weight_files(directory):
    """The safetensors files of a checkpoint, and their index if it is used, by name; pickled weights are never read."""
    if (directory / "adapter_config.json").exists():
        names = {"adapter_model.safetensors"}
    elif (directory / "model.safetensors").exists() or not (directory / INDEX).exists():
        names = {"model.safetensors"}
    else:
        names = {*json.loads(own(directory, INDEX).read_text())["weight_map"].values(), INDEX}
    for name in names - {INDEX}:
        if not str(name).endswith(".safetensors"):
            raise InputError(f"{directory}: {name!r:.100} is no safetensors file; others are not read")
    return {name: own(directory, name) for name in sorted(names)}


@contextlib.contextmanager
def vetted(directory, weights=True):
    """A temporary directory that shows what is understood of a checkpoint, its weights or its tokenizer, and nothing else."""
    with tempfile.TemporaryDirectory() as shown:
        shown = Path(shown)
        files = weight_files(directory) if weights else {}
        for name in ("tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja"):
            if (directory / name).exists():
                files[name] = own(directory, name)
        for name, file in files.items():
            (shown / name).symlink_to(file)
        for name, known in KNOWN.items():
            if (directory / name).exists():
                settings = json.loads(own(directory, name).read_text())
                kept = {key: value for key, value in settings.items() if key in known}
                (shown / name).write_text(json.dumps(kept))
        if (directory / "added_tokens.json").exists():  # of older tokenizers
            added = json.loads(own(directory, "added_tokens.json").read_text())
            (shown / "added_tokens.json").write_text(json.dumps({str(token): int(number) for token, number in added.items()}))
        yield shown


def check_weights(path, stock, config, item_size, renamed):
    """Refuses, before anything is allocated, weights that the files or the memory cannot hold, that are there twice, or that
    are no floats.

    item_size: bytes that a weight takes in the machine's own memory. renamed: patterns and what they become, from the names in
    the files to those of the class.
    """
    with refusing(f"{path}: not a valid config"), torch.device("meta"):
        count = sum(weight.numel() for weight in stock(config).parameters())
    if path.is_dir():
        size, names = 0, set()
        with refusing(f"{path}: the weights cannot be loaded"):
            for file in (file for name, file in weight_files(path).items() if name != INDEX):
                size += file.stat().st_size
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():
                        kind, short = tensors.get_slice(name).get_dtype(), f"{name!r:.100}"
                        for pattern, replacement in renamed.items():
                            name = re.sub(pattern, replacement, name)
                        if kind not in ("F32", "F16", "BF16", "F64"):
                            raise ValueError(f"{short} is of type {kind}, not float")
                        if name in names:
                            raise ValueError(f"{short} is there twice")
                        names.add(name)
            if count > size:
                raise ValueError(f"config.json asks for {count:,} of them, which {size:,} bytes of safetensors cannot be")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if count * item_size > memory:
        raise InputError(f"{path}: {count:,} weights take more than the {memory / 1e9:.0f} GB of memory of this machine")


def check_finite(path, weights):
    """Refuses (name, weight) pairs with NaN or infinity in them, which training would spread, and names the first."""
    for name, weight in weights:
        if weight.is_floating_point() and not all(bound.isfinite() for bound in weight.detach().aminmax()):
            raise InputError(f"{path}: the weight {name} holds NaN or infinity")


def adapter_settings(directory, defaults):
    """What adapter_config.json asks for, as far as it is understood; refuses what would compute something else.

    defaults: peft's own, an object with an attribute for each setting.
    """
    file = directory / "adapter_config.json"
    settings = json.loads(own(directory, file.name).read_text())
    check_sizes(file, settings)
    harmless = {*KNOWN[file.name], "auto_mapping", "revision", "peft_version"}
    drawn_anew = settings.get("init_lora_weights") in (True, False, "gaussian")  # others change the base as well
    for name, value in settings.items():
        plain = (getattr(defaults, name, None), None, False, {}, [])
        if name not in harmless and value not in plain and not (name == "init_lora_weights" and drawn_anew):
            raise InputError(f"{file}: {name} = {value!r:.100} is not supported")
    with safe_open(own(directory, "adapter_model.safetensors"), "pt") as tensors:
        for name in tensors.keys():
            shape = tensors.get_slice(name).get_shape()
            if settings.get("r") not in shape:
                raise InputError(f"{file}: r = {settings.get('r')!r:.100}, but {name!r:.100} has the shape {shape}")
    target, alpha = settings.get("target_modules"), settings.get("lora_alpha")
    names = isinstance(target, list) and all(re.fullmatch(r"[\w.]+", str(name)) for name in target)
    plain = settings.get("peft_type") == "LORA" and settings.get("bias", "none") == "none"
    if not plain or not (names or target == "all-linear") or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise InputError(f"{file}: not plain LoRA on named layers")
    return {name: settings[name] for name in KNOWN[file.name] if name in settings and name != "peft_type"}
