"""What only a GPU can tell, in one command: three and a half minutes of an H100 of 80 GB.

    python -m extras.scale.gpu                  # LLaDA-8B's shape, with random weights
    python -m extras.scale.gpu --device cpu     # a rehearsal with a tiny shape, anywhere

Prints how far log p(o|q) of a small model and its gradient are from the CPU's in float32; then the
speed of sampling and of the update, and their peak memory beside what extras/scale/plan.py says.
Random weights tell all of that, since neither time nor memory depends on them; accuracy they do
not tell. They are written to a temporary checkpoint (16 GB; TMPDIR says where), and loaded as any
other.
"""

import argparse
import tempfile
from functools import partial

import torch
from torch.utils.benchmark import Timer  # warms up, and waits for the GPU
from transformers.utils import is_bitsandbytes_available

import wd1
from extras.scale.plan import LLADA_8B, PlanConfig, memory, write_config
from rewards import InputError

CASES = "", "gradient_checkpointing", "gradient_checkpointing load_in_4bit"  # beyond LoRA
ROWS = dict(batch_size=12, rollout_batch_size=12, micro_batch_size=6, num_iterations=1)


def errors(device, dtype):
    """Relative errors of a small model's log p(o|q) and its gradient, against the CPU's."""
    found = []
    for where, kind in (device, dtype), ("cpu", torch.float32):
        model = wd1.load_model("tiny")[0].to(where)
        tokens = torch.arange(3, 99, device=where).view(8, 12)
        padding = torch.ones_like(tokens).triu()  # on the left, in each row one more
        options = dict(attention_mask=padding, prompt_mask_prob=0.0)  # masks differ by device
        with torch.autocast(where, kind, enabled=kind != torch.float32):
            log_p = wd1.one_step_log_likelihood(model, tokens, tokens, **options)
        gradient = torch.autograd.grad(log_p.sum(), model.get_input_embeddings().weight)
        found.append([log_p.cpu(), gradient[0].cpu()])
    return [((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(*found)]


def parts(model, tokenizer, config):
    """The two parts of a training step, on random completions: {name: function}."""
    model.config.eos_token_id = model.config.mask_token_id  # never sampled: no row ends early
    prompts = ["x" * config.prompt_length] * config.batch_size
    given = model, tokenizer, prompts, config, config.gen_length, config.diffusion_steps
    sampling = partial(wd1.sample, *given, temperature=config.temperature)
    rewards = torch.rand(1, config.batch_size, device=config.device)
    batch = wd1.Batch([], sampling(), [], rewards, *wd1.group_weights(rewards[0]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    return dict(update=partial(wd1.learn, model, optimizer, batch, config), sampling=sampling)


def measure(config, device):
    """Prints of each part: tokens a second that a forward pass takes in, as plan.py counts them; GB
    at most; GB as estimated."""
    estimate = memory(config)
    tokens = config.batch_size * (config.prompt_length + config.gen_length)
    passes = {"sampling": config.diffusion_steps, "update": 3 + config.gradient_checkpointing}
    config.device = device
    model, _, tokenizer, *_ = wd1.set_up(config)
    with wd1.autocast(config):
        for name, part in parts(model, tokenizer, config).items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = Timer("part()", globals={"part": part}).timeit(1).mean
            speed = tokens * passes[name] / seconds
            peak = torch.cuda.max_memory_allocated() / 1e9
            expected = estimate["weights"] + estimate["adam"] + estimate[name]
            print(f"| {name} | {speed:.3g} | {peak:.3g} | {expected:.3g} |", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to rehearse")
    device = parser.parse_args(argv).device
    shape, lengths = LLADA_8B, dict(diffusion_steps=32)
    if device == "cpu":
        shape, lengths = {}, dict(prompt_length=16, gen_length=32, diffusion_steps=8)
    elif not torch.cuda.is_available():
        raise InputError("there is no CUDA GPU: --device cpu rehearses")
    for dtype in torch.float32, torch.bfloat16:
        print(dtype, "relative errors of log p(o|q) and its gradient:", *errors(device, dtype))
    with tempfile.TemporaryDirectory() as checkpoint:
        file = write_config(checkpoint, **shape)
        for part in wd1.load_model(file, device=device, dtype=torch.bfloat16):
            part.save_pretrained(checkpoint)
        for case in CASES[: 2 + is_bitsandbytes_available()]:
            print(f"| {case} | tokens/s | GB at most | estimated |\n|---|---|---|---|")
            settings = lengths | dict.fromkeys(case.split(), True)
            measure(PlanConfig(model=checkpoint, **ROWS, **settings), device)


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
