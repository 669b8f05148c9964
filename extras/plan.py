"""What a run would cost, before it is run: behind `python wd1.py --dry_run`."""

import math

from extras.settings import check
from wd1 import set_up


def plan(config):
    """What a run would cost, counted on a model without weights: a dict. Memory is an estimate, in GB of 10^9 bytes."""
    check(config)
    model = set_up(config)[0]
    shape, weights = model.config, list(model.parameters())
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    rows, width = config.micro_batch_size, 2 if config.dtype == "bfloat16" else 4
    tokens = rows * (config.gen_length + 256)  # with a prompt of 256
    # Kept for the backward pass per token and layer: about 16 hidden and 4 MLP widths, or the layer's input alone.
    layer = 16 * shape.hidden_size + 4 * shape.intermediate_size
    kept = layer * shape.num_hidden_layers
    if config.gradient_checkpointing:
        kept = layer + shape.hidden_size * shape.num_hidden_layers
    chunks = math.ceil(config.batch_size / config.rollout_batch_size)
    mixture = bool(config.beta) and config.objective != "diffu-grpo"
    views = config.mc_samples
    if config.objective == "diffu-grpo":
        views = 1 + 1 + bool(config.beta)  # current, old, reference
    memory = {
        "weights_GB": sum(weight.numel() * weight.element_size() for weight in weights) / 1e9,
        "gradients_and_adam_GB": 12 * trained / 1e9,
        "activations_GB": tokens * kept * width / 1e9,
        "logits_GB": 3 * 4 * rows * config.gen_length * shape.vocab_size / 1e9,
    }
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "trainable_parameters": trained,
        **memory,
        "estimated_memory_GB": sum(memory.values()),
        "samples_per_step": config.batch_size,
        "sampling_forward_passes_per_step": config.diffusion_steps * chunks * (1 + mixture),
        "update_forward_passes_per_step": config.num_iterations * views * math.ceil(config.batch_size / rows),
    }
