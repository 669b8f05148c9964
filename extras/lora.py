"""LoRA through peft: new adapters on a model, and saved ones on the base model they name."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from extras.vetting import adapter_settings, check_finite, vetted
from rewards import InputError, refusing


def add_adapters(model, rank, seed, source):
    """A PeftModel with new adapters of `rank` on all linear layers; `source` is where the model came from."""
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank // 2 or 1, lora_dropout=0.05, target_modules="all-linear"))
    model.peft_config["default"].base_model_name_or_path = str(Path(source).resolve() if Path(source).exists() else source)
    return model


def load_adapters(path, load_model, **options):
    """(model, tokenizer) of a LoRA directory: a PeftModel on its base, which load_model(base, **options) loads.

    Raises InputError unless every adapter finds its weight: peft would leave out, silently, those that do not.
    """
    with refusing(f"{path}: the LoRA adapters cannot be loaded"):
        settings = adapter_settings(path, LoraConfig())
        base, config = settings["base_model_name_or_path"], LoraConfig(**settings)
        model, tokenizer = load_model(base, **options)
        with vetted(path) as files:
            model = PeftModel.from_pretrained(model, files, config=config, is_trainable=True).eval()
            names = set(get_peft_model_state_dict(model, save_embedding_layers=False))
            if set(load_file(files / "adapter_model.safetensors")) != names:
                raise InputError(f"{path}: the LoRA adapters have other names than the weights of {base}")
        check_finite(path, ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad))
        return model, tokenizer
