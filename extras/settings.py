"""The settings of a run: read from the command line, completed, and refused in one sentence if they cannot work."""

import json
import math
import os
import re
import typing
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from extras.parallel import WORLD
from extras.track import check_tracker
from rewards import InputError, get_task, refusing

MAY_BE_ZERO = ("seed", "warmup_steps", "lora_rank", "eval_every")


def check(config):
    """Completes what a Config leaves open; refuses, in one sentence, what cannot run."""
    from wd1 import unmasking_schedule

    for name, kind in typing.get_type_hints(type(config)).items():  # a saved config.json may hold anything
        words = [word for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is typing.Literal
                 for word in typing.get_args(part)]  # fmt: skip
        if words and getattr(config, name) not in [*words, None]:
            raise InputError(f"--{name} {getattr(config, name)}: choose one of {', '.join(words)}")
    get_task(config.task)
    check_tracker(config.track)
    for name, value in asdict(config).items():  # counts are at least 1, or 0 where that means something; the rest finite
        for number in value if isinstance(value, list) else [value]:
            least = 1 if type(number) is int and name not in MAY_BE_ZERO else 0
            if type(number) in (int, float) and not least <= number < math.inf:
                raise InputError(f"--{name} {number}: must be {least} or more")
    size, group = config.batch_size, config.num_generations
    if size % group or group < 2:
        raise InputError(f"--batch_size {size} does not fill groups of --num_generations {group} (at least 2 in each)")
    if size // group % WORLD and not config.eval_only:
        raise InputError(f"--batch_size {size} is no multiple of {group * WORLD}, a group for each of {WORLD} processes")
    stepwise = config.objective == "wd1++" or (config.likelihood == "trajectory" and config.objective != "diffu-grpo")
    if stepwise and config.mc_samples > config.diffusion_steps:
        raise InputError(f"--mc_samples {config.mc_samples}: there are only --diffusion_steps {config.diffusion_steps}")
    if config.complementary and config.likelihood == "elbo" and config.mc_samples % 2:
        raise InputError(f"--complementary pairs masks: --mc_samples {config.mc_samples} must be even")
    if config.prompt_mask_prob > 1 or config.seed >= 2**31:
        raise InputError("--prompt_mask_prob is at most 1, and --seed less than 2^31")
    if config.resume and config.eval_only:
        raise InputError("--eval_only evaluates --model: name the model of the run, such as runs/X/model, not --resume")
    if config.load_in_4bit and not (config.lora_rank or config.eval_only):
        raise InputError("--load_in_4bit freezes the weights: train adapters, with a --lora_rank above 0")
    if config.load_in_4bit and config.shard:
        raise InputError("--load_in_4bit and --shard exclude each other: in 4 bits every process holds all weights")
    if config.threshold > 1 or config.threshold <= 0:
        raise InputError(f"--threshold {config.threshold}: is a probability above 0; 1 means exact sampling")
    if config.beta is None:
        config.beta = 0.04 if config.objective == "diffu-grpo" else 0.0
    if config.lam + config.beta == 0:
        raise InputError("--lam and --beta are both 0: without a KL penalty psi = 1 / (lambda + beta) is infinite")
    unmasking_schedule(config.gen_length, config.diffusion_steps, config.block_length)
    for length in config.eval_lengths:
        unmasking_schedule(length, eval_steps(length), min(config.block_length, length))
    config.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with refusing(f"--device {config.device}: cannot be used"):
        if WORLD > 1 and config.device.startswith("cuda"):
            config.device = "cuda"  # of every process its own
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.ones(1, dtype=torch.float64, device=config.device).item()
    if config.dtype == "auto":
        config.dtype = "bfloat16" if config.device.startswith("cuda") else "float32"
    config.output_dir = config.output_dir or default_output_dir(config)


def check_prompts(config, batch, model_config):
    """Refuses encoded prompts that leave no room for the completions, or hold the mask or tokens that the model lacks."""
    prompts = batch["input_ids"]  # [B, P]
    longest, limit = prompts.shape[1] + max(config.gen_length, *config.eval_lengths), model_config.max_position_embeddings
    if longest > limit:
        raise InputError(
            f"prompt and completion take up to {longest} tokens and the model allows {limit}: lower --gen_length and "
            "--eval_lengths, or leave out the long problems"
        )
    if ((prompts == model_config.mask_token_id) & batch["attention_mask"].bool()).any():
        sentence = f"its mask token (id {model_config.mask_token_id}) stands in the prompts, where it must never be"
        raise InputError(f"--model {config.model}: {sentence}")
    if prompts.max() >= model_config.vocab_size:
        raise InputError(f"--model {config.model}: its tokenizer has tokens beyond the {model_config.vocab_size} that it knows")


def autocast(config):
    """The context in which `--dtype bfloat16` computes in bfloat16, whatever the weights are kept in.

    Without its cache: that would go on using the bfloat16 copies of weights which an update has since changed.
    """
    dtype = getattr(torch, config.dtype)
    return torch.autocast(config.device.split(":")[0], dtype, enabled=dtype != torch.float32, cache_enabled=False)


def eval_steps(length):
    """The denoising steps of an evaluation: two tokens a step, as in the published runs."""
    return (length + 1) // 2


def default_output_dir(config):
    """runs/<model>-<task>-<objective>, the model's name made fit for a path."""
    name = re.sub(r"[^\w.+-]+", "-", config.model.removesuffix("/model")).strip("-.")
    task = re.sub(r"[^\w.+-]+", "-", Path(config.task).name)
    return f"runs/{name}-{task}-{config.objective}"


def quiet():
    """Keeps transformers' own messages and progress bars from the terminal."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def refuse(message):
    """What a parser of arguments does instead of printing its usage."""
    raise InputError(message)


def saved_settings(run, task=None):
    """The settings in a run's config.json. A file that they name as the task is somebody's code: the user must name it too."""
    with refusing(f"{run}/config.json cannot be read"):
        saved = json.loads((Path(run) / "config.json").read_text())
        if ".py:" in saved["task"] and task != saved["task"]:
            sentence = f"{run} was trained on --task {saved['task']}, a file that would be run: name it on the command line"
            raise InputError(sentence)
        return saved


def parse_arguments(config_class, presets, argv, description):
    """The command line as a Config. What it leaves open comes from the run it names, if any, else from the presets."""
    parser = transformers.HfArgumentParser(config_class, description=description, allow_abbrev=False)
    parser.error = refuse
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse(f"{unknown[0]}: no such option; python wd1.py --help lists them")
    for name in (given.task, given.objective, given.model):
        parser.set_defaults(**presets.get(name, {}))
    [config] = parser.parse_args_into_dataclasses(argv)
    run, names = Path(config.output_dir or default_output_dir(config)), set(asdict(config)) - {"resume", "output_dir"}
    if not config.resume and Path(config.model).name == "model":  # a model that a run saved is sampled as it was trained
        run = Path(config.model).parent
        names = {"task", "seed", "blanks", "gen_length", "diffusion_steps", "block_length", "eval_lengths"}
    elif not config.resume:
        return config
    if (run / "config.json").is_file():
        saved = saved_settings(run, given.task)
        with refusing(f"{run}/config.json cannot be read"):
            parser.set_defaults(**{name: saved[name] for name in names if name in saved or name != "track"})
    return parser.parse_args_into_dataclasses(argv)[0]
