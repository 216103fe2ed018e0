"""A device that is none: tensors that say they are on ``standin:0`` and compute on the CPU.

torch lets a backend be written in Python. Here a tensor of the backend holds a CPU tensor, and every operation that
reaches a kernel is checked first: all of its tensors must be on one device, but for what a real accelerator allows
(single numbers and indices from the CPU, copies). With the CPU as the second device, placement can be tested without
an accelerator and without a compiler; numbers are those of the CPU. (torch's backward pass knows one such device only,
so there is no ``standin:1``.) It says nothing about numerics, speed or memory of real devices.

`install` changes the process for good: use it in a process of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME, _CPU = "standin", torch.device("cpu")
_COPIES = ("aten::to", "aten::_to_copy", "aten::copy_")
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Placed(torch.Tensor):
    """A tensor that says it is on a device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> Placed:
        """Wrap a CPU tensor."""
        assert not isinstance(inner, Placed)
        found = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=device,
        )  # fmt: skip
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """The values, copied to the host first."""
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({tuple(self.shape)}, {self.dtype}, {self.device})"


class Everywhere(TorchDispatchMode):
    """Sees the operations without a tensor of the device too: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Check the devices of an operation, compute it on the CPU, and say that its results are on the device."""
    name = func._schema.name
    wanted = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)), None)
    placed = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Placed)]
    if placed and name not in _COPIES:
        _check(func, args, kwargs)
    if wanted is not None:
        device = wanted
        args, kwargs = tree_map(
            lambda x: _CPU if isinstance(x, torch.device) and x.type == NAME else x, (args, kwargs)
        )
    elif name == "aten::copy_":
        device = args[0].device
    else:
        device = placed[0].device if placed else torch.device("cpu")
    if device.type == NAME and device.index is None:
        device = torch.device(NAME, 0)
    result = func(*tree_map(_bare, args), **tree_map(_bare, kwargs))
    own = {id(t.inner): t for t in placed}  # what is changed in place is returned as it came

    def dressed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in own:
            if wanted is None or own[id(value)].device == device:
                return own[id(value)]
            value = value.clone()  # a copy to another device shares nothing
        if device.type != NAME:
            return value
        with torch.inference_mode(value.is_inference()):  # a view of a tensor from outside of the mode is none of it
            return Placed(value, device)

    return tree_map(dressed, result)


def _check(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise if tensors of different devices meet where a real accelerator would not have it."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if func._schema.name in _INDEXED:  # indices may be on the CPU
        values = [t for t in args[2:3] if isinstance(t, torch.Tensor)]
        indices = [t for t in args[1] if isinstance(t, torch.Tensor) and t.device.type != "cpu"]
        tensors = [args[0], *values, *indices]
    devices = {t.device for t in tensors if t.dim() or isinstance(t, Placed)}  # numbers may come from the CPU
    if len(devices) > 1:
        where = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device: {func._schema.name}({where})")


def _bare(value: Any) -> Any:
    return value.inner if isinstance(value, Placed) else value


class _Module(_DummyBackendModule):
    """What torch asks a backend."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """For autocast."""
        return [torch.bfloat16]


def install() -> None:
    """Make the devices known to this process, and watch every operation of this thread from now on."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _EVERYWHERE.__enter__()
    for name in ("tensor", "as_tensor"):  # they look for the backend's own kernels, below the mode
        setattr(torch, name, _made_on_the_host(getattr(torch, name)))
    for name in ("empty_strided", "empty.memory_format"):  # so does an index that is given as a list
        _KERNELS.impl(name, _empty(name), "PrivateUse1")
    _KERNELS.impl("_copy_from", _copy, "PrivateUse1")


@contextlib.contextmanager
def away() -> Iterator[None]:
    """A block without anything on the device, in which operations take no longer than ever."""
    _EVERYWHERE.__exit__(None, None, None)
    try:
        yield
    finally:
        _EVERYWHERE.__enter__()


_EVERYWHERE = Everywhere()
_KERNELS = torch.library.Library("aten", "IMPL")


def _empty(name: str) -> Callable[..., torch.Tensor]:
    base, _, overload = name.partition(".")
    make = getattr(getattr(torch.ops.aten, base), overload or "default")

    def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return Placed(
            make(*args, **{**kwargs, "pin_memory": None, "device": torch.device("cpu")}), torch.device(device)
        )

    return made


def _copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _bare(target).copy_(_bare(source))
    return target


def _made_on_the_host(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(data: Any, *, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != NAME:
            kwargs |= {} if device is None else {"device": device}
            return make(data, **kwargs).requires_grad_(requires_grad) if requires_grad else make(data, **kwargs)
        return make(data, **kwargs).to(device).requires_grad_(requires_grad)

    return made
