"""Peak memory: counted on tensors without data, for a model and a machine one need not have, or read off this process."""

import ctypes
import gc
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class CountMemory(TorchDispatchMode):
    """A context that counts the bytes of all tensors made in it: `.now` those alive, `.peak` the most there were at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)]
        keys = {tensor.untyped_storage()._cdata for tensor in known}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in keys:
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.alive.discard(key)
        self.now -= size


def without_data(model):
    """Gives a model weights with shapes and no data, in place, and returns the context in which to compute with them."""
    mode, made = FakeTensorMode(), {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:  # tied weights stay tied
                    with mode:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
                tensors[name] = tensor if tensor is None else made[id(tensor)]
    return mode


def measured_peak(function, device):
    """Bytes by which calling `function` raises the memory in use, at its highest: of the GPU, or of this process (Linux)."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what is free, so that it is counted when it is used again
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    status = lambda: dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    before = int(status()["VmRSS"].split()[0])
    function()
    return 1024 * (int(status()["VmHWM"].split()[0]) - before)
