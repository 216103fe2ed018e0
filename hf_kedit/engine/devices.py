"""The accelerators that a model lives on, all of them: how much memory they gave, and their random numbers.

`weights.compute_device` says where a single module computes, `forward.device_of` where a model expects its inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from .weights import compute_device

T = TypeVar("T")
_KINDS = ("cuda", "xpu")
"""Accelerators that know float64, count their memory and keep one generator per device."""


def accelerators(model: torch.nn.Module) -> list[torch.device]:
    """The accelerators that hold a part of a model, or to which its offloaded parts are brought."""
    found = {compute_device(model)}
    if any(torch.get_device_module(kind).is_initialized() for kind in _KINDS):  # else no tensor can be on one
        found |= {parameter.device for parameter in model.parameters()}
    return sorted((d for d in found if d.type in _KINDS), key=str)


def synchronise(model: torch.nn.Module) -> None:
    """Wait until all that was asked of the model's accelerators is done."""
    for device in accelerators(model):
        torch.get_device_module(device).synchronize(device)


@contextlib.contextmanager
def to_stay() -> Iterator[None]:
    """A block for making what later forwards use, too, in the middle of one that `torch.inference_mode` may be around.

    What is made there is an inference tensor otherwise, through which no later pass can have a gradient.
    """
    with_gradients = torch.is_grad_enabled()  # switched on by leaving the mode
    with torch.inference_mode(False), torch.set_grad_enabled(with_gradients):
        yield


class PeakMemory:
    """What the accelerators of a model give at most from now on, summed over them.

    Args:
        model: the model.
    """

    def __init__(self, model: torch.nn.Module):
        self.devices = accelerators(model)
        self.before = 0
        for device in self.devices:
            torch.get_device_module(device).reset_peak_memory_stats(device)
            self.before += int(torch.get_device_module(device).memory_allocated(device))

    def read(self) -> int | None:
        """Bytes; ``None`` for a model that lives on no accelerator."""
        if not self.devices:
            return None
        return sum(int(torch.get_device_module(d).max_memory_allocated(d)) for d in self.devices)


def process_memory() -> int:
    """Most bytes of memory that the process has held so far; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


@contextlib.contextmanager
def seeded(seed: int, model: torch.nn.Module | None = None) -> Iterator[None]:
    """Random numbers from a seed inside the block; behind it, every generator goes on as if nothing had happened.

    Args:
        seed: for the CPU's generator, and for those of the model's accelerators. No other device is touched:
            `torch.manual_seed` would seed all of them for good.
        model: whose devices draw numbers too; ``None``: the CPU alone.
    """
    devices = accelerators(model) if model is not None else []
    kind = devices[0].type if devices else "cuda"
    with torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            module = torch.get_device_module(device)
            with module.device(device):
                module.manual_seed(seed)
        yield


def where_there_is_room(model: torch.nn.Module, compute: Callable[[torch.Tensor], T], matrix: torch.Tensor) -> T:
    """Compute with a large float64 matrix on the model's accelerator if there is one with room, else on the CPU.

    Args:
        model: the model; where its inputs are expected counts.
        compute: from the matrix to a result, which stays where it was computed.
        matrix: what to compute with.
    """
    device = compute_device(model)
    if device.type in _KINDS:
        with contextlib.suppress(torch.OutOfMemoryError):
            return compute(matrix.to(device))
    return compute(matrix.cpu())
