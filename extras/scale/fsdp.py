"""Weights divided among GPUs (FSDP2), to train all of a model that no GPU could hold with AdamW.

    torchrun --nproc_per_node 8 -m extras.train --shard --lora_rank 0 --gradient_checkpointing ...

wd1.py as it is gives every process all weights, and sums gradients itself. Here each process keeps
a share of every layer's weights, gradients and moments; FSDP gathers a layer when it is computed
and sums its gradients into the shares after each backward pass. So the samples and the steps are
those of one process, but for rounding. Two things follow, and are done here: everything that reads
or writes weights meets DTensors, shares that know of the whole; and all processes must run the
model equally often, since none can compute a layer without the others.
"""

import hashlib
from functools import partial

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import wd1
from rewards import InputError


def sharded(config, generate=wd1.generate, learn=wd1.learn):
    """What to give wd1.train, and of it `load` and `generate` to wd1.evaluate: a dict of keywords.

    generate, learn: what they would use otherwise. Raises InputError if `config` cannot be sharded.
    """
    if wd1.WORLD == 1:
        raise InputError("--shard divides the weights among processes: start them with torchrun")
    if config.load_in_4bit or (config.lora_rank and not config.eval_only):
        raise InputError("--shard is for training all weights: --lora_rank 0, and none in 4 bits")
    return dict(
        load=partial(load, config),
        generate=partial(generate_in_step, generate),
        learn=partial(learn, clip=clip_shares),
        directory=ShardedRun,
    )


def load(config, source, **options):
    """wd1.load_model, then divided: each process reads all weights into its memory, in float32."""
    model, tokenizer = wd1.load_model(source, **options | dict(device="cpu", dtype=torch.float32))
    if model.config.tie_word_embeddings or hasattr(model, "peft_config"):
        raise InputError(f"--shard: {source} has an output head tied to its embedding, or adapters")
    dtype = getattr(torch, config.dtype)
    precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(config.device.split(":")[0], (wd1.WORLD,))
    # The decoder and the head gather what is theirs alone: wd1.py calls the one, then the other.
    for part in [*model.get_decoder().layers, model.get_decoder(), model.get_output_embeddings()]:
        # Gathered weights are dropped after the forward pass even by those two. If they were kept
        # until a backward pass, an optimizer made, or a step taken, before it would miss them.
        fully_shard(part, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
        part.set_gradient_divide_factor(1.0)  # a sum: the loss is divided by N already
        part.set_force_sum_reduction_for_comms(True)
    return model, tokenizer


@torch.no_grad()
def generate_in_step(generate, model, prompt, *, policy=wd1.predict_logits, **options):
    """`generate`, in as many passes on every rank: where rows end early, the last is repeated."""
    latest = ()

    def announced(*arguments):
        nonlocal latest
        latest = arguments
        wd1.everywhere(False)  # not all are done
        return policy(*arguments)

    rollout = generate(model, prompt, policy=announced, **options)
    while not wd1.everywhere(True):
        policy(*latest)
    return rollout


def clip_shares(trained, max_norm):
    """wd1.clip_gradients for gradients that FSDP has summed."""
    return torch.nn.utils.clip_grad_norm_(trained, max_norm).full_tensor().item()


class ShardedRun(wd1.RunDirectory):
    """A run's directory whose checkpoints are directories with a file a rank, which any number of
    ranks reads again: a program of one process may give it to wd1.train as well, to go on from what
    several have left."""

    def write_checkpoint(self, path, header):
        if wd1.RANK == 0:
            wd1.remove(path)
        wd1.everywhere()
        writer = HuggingFaceStorageWriter(path, save_distributed=True)
        transfer(dcp.save, self.tensors, storage_writer=writer)
        if wd1.RANK == 0:
            (path / "run.json").write_text(header)

    def read_checkpoint(self, path, tensors):
        if tensors:
            transfer(dcp.load, tensors, storage_reader=HuggingFaceStorageReader(path))
        return (path / "run.json").read_text()

    def digest(self, path):
        digests = map(super().digest, sorted(path.iterdir()))
        return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]

    def finish(self, model, tokenizer):
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=whole)
        super().finish(model, tokenizer, state_dict=weights)


def transfer(function, tensors, **storage):
    """dcp.save or dcp.load, with an OSError for what they raise, which is no Exception."""
    try:
        function(tensors, **storage)
    except dcp.api.CheckpointException as error:
        raise OSError(str(error).strip().splitlines()[-1]) from None
