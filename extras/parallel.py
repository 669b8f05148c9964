"""Several GPUs, on one machine or many: one process each, started by torchrun. Alone, every function here does nothing.

Every process ("rank") does its share of the sampling and then holds the whole batch of completions, a few kilobytes. So
all of them compute the same weights and draw the same masks, and each learns from its share of the rows; the gradients are
summed once per update. The number of ranks changes the time a step takes and nothing else, as long as the parts in which
completions are sampled stay the same (--rollout_batch_size divides a rank's share) and nothing is dropped out.
"""

import atexit
import datetime
import functools
import itertools
import math
import os
import sys

import torch
import torch.distributed as dist

from rewards import InputError

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(device):
    """Joins the other ranks of a torchrun, if there are any. Rank 0 alone prints."""
    if WORLD == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    atexit.register(dist.destroy_process_group)  # or its threads may outlive what they use, and abort a finished process
    if RANK:
        sys.stdout = open(os.devnull, "w")


def barrier():
    """Waits for every rank."""
    if dist.is_initialized():
        dist.barrier()


def in_turn(function):
    """function(), on rank 0 before the others: they find what it has put into a cache."""
    if RANK == 0:
        result = function()
    barrier()
    return result if RANK == 0 else function()


def spread(function, items):
    """[function(item) for item in items], each rank computing its share of them.

    Shares are equal, the last items computed twice if need be: ranks that share weights must run them equally often.
    """
    if not dist.is_initialized():
        return [function(item) for item in items]
    size, parts = math.ceil(len(items) / WORLD), [None] * WORLD
    mine = [items[i % len(items)] for i in range(RANK * size, (RANK + 1) * size)]
    dist.all_gather_object(parts, [function(item) for item in mine])
    return list(itertools.chain(*parts))[: len(items)]


def share(needed):
    """The rows that this rank learns from: its share of those `needed` (bool [B]), as many for every rank.

    What is missing to equal shares, or to one row each, is made up with rows that are not needed.
    """
    count = math.ceil(max(int(needed.sum()), 1) / WORLD)
    return (~needed).byte().argsort(stable=True)[RANK::WORLD][:count]


def is_lost_connection(error):
    """Whether a RuntimeError is what NCCL or gloo raise when another rank has gone."""
    return WORLD > 1 and (isinstance(error, dist.DistBackendError) or "onnection" in str(error) or "gloo" in str(error))


def everywhere(flag):
    """True if `flag` is true on every rank."""
    if not dist.is_initialized():
        return bool(flag)
    flag = torch.tensor(int(flag))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def is_sharded(model):
    """Whether `shard` has divided the model's weights: then every rank must run it equally often."""
    return hasattr(model, "run")


def all_done(done, model):
    """Whether this rank, and those that it shares the model's weights with, are done with something."""
    return everywhere(done) if is_sharded(model) else done


def shard(model, device, dtype):
    """Divides a model's weights among all ranks (FSDP2), which then gather them layer by layer while computing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if not dist.is_initialized():
        raise InputError("--shard divides the weights among several processes: start them with torchrun, or leave it out")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.split(":")[0], (WORLD,))
    for part in [*model.get_decoder().layers, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
        part.set_gradient_divide_factor(1.0)  # a sum over ranks, not a mean: the loss is divided by N already
        part.set_force_sum_reduction_for_comms(True)
    model.run = lambda function, *arguments, **options: function(model, *arguments, **options)
    register_fsdp_forward_method(model, "run")
    return model


def reshard(model):
    """Divides again what a forward pass has gathered and would keep for a backward pass."""
    if is_sharded(model):
        model.reshard()


def as_forward(function):
    """Makes `function(model, ...)` count as a forward pass of the model, which is when sharded weights are gathered."""

    @functools.wraps(function)
    def call(model, *arguments, **options):
        if is_sharded(model):
            return model.run(function, *arguments, **options)
        return function(model, *arguments, **options)

    return call


def last_pass(model, is_last):
    """Told before each backward pass of an update: only the last one of sharded weights exchanges gradients."""
    if is_sharded(model):
        model.set_requires_gradient_sync(is_last)


def sum_gradients(model, loss, weights):
    """Sums the gradients of an update, and its loss, over all ranks. Returns the loss as a number."""
    if dist.is_initialized():
        handles = [dist.all_reduce(loss, async_op=True)]
        if not is_sharded(model):
            handles += [dist.all_reduce(weight.grad, async_op=True) for weight in weights]
        for handle in handles:
            handle.wait()
    return loss.item()


def whole(tensor):
    """A tensor that may be sharded, in one piece."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_weights(model):
    """What save_pretrained needs besides, if the model is sharded: all of its weights, on rank 0."""
    if not is_sharded(model):
        return {}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(state_dict=get_model_state_dict(model, options=options))
