"""What goes into a module and comes out of it, and hooks that are always removed.

Some families return the hidden states as a bare tensor, others a tuple that starts with them. ``output[0]`` on a
bare tensor silently takes row 0 of the batch. Likewise some pass them in by position, others by keyword.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .switching import Switch, switched


def block_output(output: Any) -> torch.Tensor:
    """Return the hidden states of a module's output: the first element of a tuple or list, else the output."""
    return output[0] if isinstance(output, (tuple, list)) else output


def replace_block_output(output: Any, new: torch.Tensor) -> Any:
    """Return the same structure as ``output`` with its hidden states replaced by ``new``."""
    if isinstance(output, (tuple, list)):
        rest = (new, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
    return new


def module_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a module's input: its first argument, however it was passed; ``None`` if there is none."""
    return args[0] if args else kwargs.get(_input_name(kwargs))


def replace_module_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the same arguments with the module's input replaced by ``new``."""
    if args:
        return (new, *args[1:]), kwargs
    return args, {**kwargs, _input_name(kwargs): new}


def _input_name(kwargs: dict[str, Any]) -> str:
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), "")


def hooks(*registrations: Callable[[], RemovableHandle]) -> Switch[None]:
    """Hooks that are there inside a block and gone behind it.

    Args:
        registrations: each adds one hook: ``partial(module.register_forward_hook, function)``.
    """
    handles: list[RemovableHandle] = []

    def add() -> None:
        for register in registrations:
            handles.append(register())

    def remove() -> None:
        while handles:
            handles.pop().remove()

    return switched(add, remove)
