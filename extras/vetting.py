"""What a checkpoint from a stranger can do: nothing.

transformers and peft act on dozens of settings that a checkpoint's files may carry: classes to import, attention kernels to
fetch, files elsewhere to read, pickles to open. None of that is handled here one by one. They are shown a directory made for
the purpose (`vetted`), in which there is nothing but safetensors and the few settings that are understood; and nothing is
allocated before sizes have been compared with what the files can hold.
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

KNOWN = {  # all that is read of these files
    "tokenizer_config.json": """bos_token eos_token pad_token unk_token mask_token additional_special_tokens chat_template
        extra_special_tokens added_tokens_decoder add_prefix_space clean_up_tokenization_spaces""".split(),
    "adapter_config.json": """peft_type base_model_name_or_path r lora_alpha lora_dropout target_modules use_rslora bias
        task_type inference_mode fan_in_fan_out""".split(),
}
LARGEST = {  # no model is larger; one that asked for more would be hours in the making before it is refused
    "vocab_size": 2**22, "hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 1000, "head_dim": 2**14,
    "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "max_position_embeddings": 2**30, "r": 2**14,
}  # fmt: skip


def check_sizes(file, settings):
    """Refuses settings that are no sensible sizes."""
    for name in LARGEST.keys() & settings.keys():
        if type(settings[name]) is not int or not 1 <= settings[name] <= LARGEST[name]:
            sentence = f"{name} = {settings[name]!r:.50} is no number from 1 to {LARGEST[name]}"
            raise InputError(f"{file}: not a valid config ({sentence})")


def own(directory, name):
    """The regular file `name` of a directory, or of the hub's cache that the directory is a snapshot in."""
    file, home = (directory / name).resolve(), directory.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not re.fullmatch(r"[\w.-]+", str(name)) or file.parent not in homes:
        raise InputError(f"{directory}: {str(name)!r:.100} is not a file of this directory; refused")
    if not file.is_file():
        raise FileNotFoundError(f"no {name}")
    return file


def weight_files(directory):
    """The safetensors files of a checkpoint, by name; pickled weights are never read."""
    if (directory / "adapter_config.json").exists():
        names = {"adapter_model.safetensors"}
    elif (directory / "model.safetensors.index.json").exists():
        names = {*json.loads(own(directory, "model.safetensors.index.json").read_text())["weight_map"].values()}
    else:
        names = {"model.safetensors"}
    for name in names:
        if not str(name).endswith(".safetensors"):
            raise InputError(f"{directory}: {name!r:.100} is no safetensors file; others are not read")
    return {name: own(directory, name) for name in sorted(names)}


@contextlib.contextmanager
def vetted(directory, weights=True):
    """A temporary directory that shows what is understood of a checkpoint, its weights or its tokenizer, and nothing else."""
    with tempfile.TemporaryDirectory() as shown:
        shown = Path(shown)
        files = weight_files(directory) if weights else {}
        for name in ("model.safetensors.index.json", "tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja"):
            if (directory / name).exists():
                files[name] = own(directory, name)
        for name, file in files.items():
            (shown / name).symlink_to(file)
        for name, known in KNOWN.items():
            if (directory / name).exists():
                settings = json.loads(own(directory, name).read_text())
                kept = {key: value for key, value in settings.items() if key in known}
                (shown / name).write_text(json.dumps(kept))
        yield shown


def check_weights(path, stock, config, dtype, renamed):
    """Refuses, before anything is allocated, weights that the files or the memory cannot hold, or that have two values.

    renamed: patterns and what they become, from the names in the files to those of the class.
    """
    with refusing(f"{path}: not a valid config"), torch.device("meta"):
        count = sum(weight.numel() for weight in stock(config).parameters())
    if path.is_dir():
        size, names = 0, set()
        with refusing(f"{path}: the weights cannot be loaded"):
            for file in weight_files(path).values():
                size += file.stat().st_size
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
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
    if count * dtype.itemsize > memory:
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
    for name, value in settings.items():
        if name not in harmless and value not in (getattr(defaults, name, value), None, {}, []):
            raise InputError(f"{file}: {name} = {value!r:.100} is not supported")
    target, alpha = settings.get("target_modules"), settings.get("lora_alpha")
    names = isinstance(target, list) and all(re.fullmatch(r"[\w.]+", str(name)) for name in target)
    plain = settings.get("peft_type") == "LORA" and settings.get("bias", "none") == "none"
    if not plain or not (names or target == "all-linear") or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise InputError(f"{file}: not plain LoRA on named layers")
    return {name: settings[name] for name in KNOWN[file.name] if name in settings and name != "peft_type"}
