"""wd1.py's program with more to choose from: other objectives, other sampling, sharded weights.

    python -m extras.train --objective diffu-grpo ...
    python -m extras.train --objective wd1++ ...
    python -m extras.train --cache dual --threshold 0.9 ...
    torchrun --nproc_per_node 8 -m extras.train --shard --lora_rank 0 --gradient_checkpointing ...

All of it is passed to wd1.train from outside; without options it does what wd1.py does.
"""

from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field

import wd1
from extras.methods import objectives
from extras.methods.views import draw_views
from extras.sampling.cache import CachedPolicy
from extras.sampling.choices import guided, random, threshold
from rewards import InputError

OBJECTIVES = {  # what differs from wd1's settings; the tiny models have their own
    "wd1": {},
    "wd1-positive": {},
    "wd1-uneven": {},
    "wd1-centred": {},
    "wd1++": dict(  # as published; --lora_rank 128 is for a single GPU
        mc_samples=8, num_generations=4, gen_length=512, diffusion_steps=256, block_length=128,
        temperature=0.4, rollout_batch_size=8, num_iterations=1, max_steps=150, lora_rank=0,
        learning_rate=1e-6, weight_decay=0.0, max_grad_norm=1.0,
    ),
    "diffu-grpo": dict(beta=0.04),
}  # fmt: skip


Above0 = Annotated[wd1.Share, Field(gt=0)]


class MoreConfig(wd1.Config):
    """wd1.Config with more settings."""

    # beyond wd1.py
    objective: Literal[*OBJECTIVES] = "wd1"  # what is optimised (extras/methods)
    likelihood: Literal["one_step", "elbo", "trajectory"] = "one_step"  # or the sampler's path
    mc_samples: wd1.Size = 1  # draws of an estimate, or steps of the trajectory or of wd1++
    beta: wd1.Strength = 0.0  # strength of the KL to the reference; diffu-grpo: 0.04
    complementary: bool = False  # elbo: score each mask together with its complement
    shared_masks: bool = False  # a group shares its mask draws
    epsilon: wd1.Share = 0.5  # diffu-grpo: ratios are clipped to [1 - epsilon, 1 + epsilon]
    confidence_factor: bool = True  # wd1++: weigh tokens with the sampler's confidence
    tempered: bool = False  # wd1++: log p at the sampling temperature, as in the authors' code
    cache: Literal["none", "prefix", "dual"] = "none"  # approximate, fast: keep keys and values
    threshold: Above0 = 1.0  # approximate, fast: also write all surer tokens; 1: exact
    cfg_scale: wd1.Strength = 0.0  # classifier-free guidance of sampling and evaluation
    remasking: Literal["low_confidence", "random"] = "low_confidence"  # what a step leaves masked
    shard: bool = False  # divide the weights among a torchrun's processes (FSDP2)
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # a tracker for the metrics

    program: ClassVar[str] = "python -m extras.train"

    def presets(self):
        """wd1's, and the objective's, which give way to the tiny models'."""
        tiny = wd1.PRESETS["tiny"] if wd1.is_tiny(self.model) else {}
        return super().presets() | OBJECTIVES[self.objective] | tiny

    def check(self):
        super().check()
        is_wd1 = self.objective not in ("wd1++", "diffu-grpo")
        along_path = self.likelihood == "trajectory"
        stepwise = along_path or self.objective == "wd1++"
        mixed = self.beta > 0 and self.objective != "diffu-grpo"
        elbo = is_wd1 and self.likelihood == "elbo"
        for wrong, sentence in (
            (along_path and not is_wd1, f"--likelihood trajectory: {self.objective} has its own"),
            (
                stepwise and self.mc_samples > self.diffusion_steps,
                f"--mc_samples: there are only --diffusion_steps {self.diffusion_steps}",
            ),
            (self.complementary and not elbo, "--complementary is for --likelihood elbo"),
            (
                self.complementary and self.mc_samples % 2,
                f"--complementary pairs masks: --mc_samples {self.mc_samples} is odd",
            ),
            (stepwise and self.shared_masks, "--shared_masks: the sampler's path has none"),
            (mixed and self.cache != "none", "--cache serves one model, and --beta mixes two"),
        ):
            if wrong:
                raise InputError(sentence)


def sampler(config, generate=wd1.generate):
    """`generate` with the approximations, the guidance and the choices that `config` asks for."""

    def sample(model, prompt, *, policy=wd1.predict_logits, generator=None, **options):
        blind = policy
        if config.cache != "none":
            policy, blind = CachedPolicy(config.cache), CachedPolicy(config.cache)
        if config.cfg_scale:
            policy = guided(config.cfg_scale, prompt.shape[1], policy, blind)
        choose = random(generator) if config.remasking == "random" else wd1.most_certain
        if config.threshold < 1:
            choose = threshold(config.threshold, choose)
        options |= dict(policy=policy, choose=choose, generator=generator)
        return generate(model, prompt, **options)

    return sample


def parts(config):
    """What wd1.train takes for a MoreConfig: a dict of keywords."""
    learn = partial(wd1.learn, draw=draw_views)
    methods = {
        "wd1": (wd1.collect, learn),
        "wd1-positive": (objectives.collect_positive, learn),
        "wd1-uneven": (objectives.collect_uneven, learn),
        "wd1-centred": (objectives.collect_centred, learn),
        "wd1++": (objectives.collect_guesses, objectives.learn_guesses),
        "diffu-grpo": (objectives.collect_grpo, objectives.learn_grpo),
    }
    collect, learn = methods[config.objective]
    given = dict(generate=wd1.generate, learn=learn, collect=collect)
    if config.shard:
        from extras.scale.fsdp import sharded

        given |= sharded(config, **{name: given[name] for name in ("generate", "learn")})
    if config.objective == "wd1++":
        with_guesses = partial(objectives.generate_guesses, given["generate"])
        given["collect"] = partial(collect, sampler(config, with_guesses))
    return given | dict(generate=sampler(config, given["generate"]))


def train(config):
    """wd1.train for a MoreConfig, with warnings, and a tracker if it asks for one."""
    from extras.watch.health import warn
    from extras.watch.track import tracker

    watchers = [warn] if config.track == "none" else [warn, tracker(config)]

    def watch(run, metrics):
        for watcher in watchers if wd1.RANK == 0 else ():
            watcher(run, metrics)

    return wd1.train(config, **parts(config), watch=watch)


def evaluate(config):
    """wd1.evaluate for a MoreConfig."""
    given = parts(config)
    given = {name: given[name] for name in ("load", "generate") if name in given}
    return wd1.evaluate(config, **given)


def main(argv=None):
    """The command line."""
    wd1.main(argv, MoreConfig, train, evaluate)


if __name__ == "__main__":
    with wd1.one_sentence():
        main()
