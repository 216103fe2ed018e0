"""Changes that run beside a parameter instead of in it: ``y = W k + U Vᵀ k``, or ``y = W k + b + Δb``.

Where a weight cannot take an edit (it is quantised), the edit is a path of its own: a forward hook adds ``Δ k``,
computed in fp32 from factors in fp32, to what the module gives. The weight is never touched, so that taking the path
away gives the quantised model back bit for bit. The hook comes before all others: code that observes the module or
wraps it sees its edited output, as if the edit were in the weight.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..anatomy.outputs import hooks, module_input
from ..anatomy.switching import Switch, uninterrupted
from ..engine.capture import first, with_first
from ..engine.devices import to_stay
from .deltas import WeightDelta


class Change:
    """The sum of some deltas of one matrix, as a function of the matrix's input.

    Factors stay factors while they are smaller than the matrix. A dense change may require a gradient.

    Args:
        deltas: at least one, all of one shape ``[d_out, d_in]``.
    """

    bias: torch.Tensor | None = None

    def __init__(self, deltas: Sequence[WeightDelta]):
        place = deltas[-1].device  # those that are tried may be on the module's, those that are kept are on the CPU
        lefts = [d.left.to(place) for d in deltas if d.left is not None]
        rights = [d.right.to(place) for d in deltas if d.right is not None]
        d_out, d_in = deltas[0].shape
        self.factors: list[torch.Tensor]
        if len(lefts) == len(deltas) and sum(left.shape[1] for left in lefts) * (d_out + d_in) < d_out * d_in:
            self.factors = [torch.cat(rights, dim=1), torch.cat(lefts, dim=1).T]
        else:
            total = deltas[0].matrix().to(place)
            for delta in deltas[1:]:
                total = total + delta.matrix().to(place)
            self.factors = [total.T]

    @classmethod
    def of_parameter(cls, difference: torch.Tensor) -> Change:
        """The change by a matrix ``[d_out, d_in]``, or of a bias ``[d_out]``, fp32, through which gradients flow."""
        change = cls.__new__(cls)
        change.factors = [difference.T] if difference.dim() == 2 else []
        change.bias = None if difference.dim() == 2 else difference
        return change

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Be a forward hook: add ``Δ k``, or ``Δb``, to the module's output, in fp32."""
        states = first(output)
        if self.bias is not None:
            return with_first(output, (states.float() + self.bias.to(states.device)).to(states.dtype))
        if any(f.device != states.device for f in self.factors):
            with to_stay():
                self.factors = [f.to(states.device) for f in self.factors]
        change = module_input(args, kwargs).float()
        with torch.autocast(states.device.type, enabled=False):
            for factor in self.factors:
                change = change @ factor
        return with_first(output, (states.float() + change).to(states.dtype))


class Beside:
    """The changes that run beside the matrices of one model, by the matrix's name."""

    def __init__(self) -> None:
        self._shown: dict[str, tuple[Change, RemovableHandle]] = {}

    def __bool__(self) -> bool:
        return bool(self._shown)

    def shown(self, key: str) -> Change | None:
        """What runs beside a matrix now."""
        return self._shown[key][0] if key in self._shown else None

    def show(self, key: str, module: nn.Module, change: Change | None) -> None:
        """Let a change run beside a matrix, instead of the one before; ``None``: nothing."""
        if change is self.shown(key):
            return
        with uninterrupted():
            if key in self._shown:
                self._shown.pop(key)[1].remove()
            if change is not None:
                self._shown[key] = (change, attach(module, change))
        forget_graphs()


def attach(module: nn.Module, change: Change) -> RemovableHandle:
    """Hook a change to its module, before all other hooks."""
    return module.register_forward_hook(change, with_kwargs=True, prepend=True)


def running(changes: Sequence[tuple[nn.Module, Change]]) -> Switch[None]:
    """Let changes run beside the matrices of some modules inside the block, on top of what runs there already."""
    return hooks(*(partial(attach, module, change) for module, change in changes))


def forget_graphs() -> None:
    """Have compiled graphs made again: they do not see hooks that come or go."""
    if "torch._dynamo" in sys.modules:
        tell_hooks_apart()
        torch._dynamo.reset()


def tell_hooks_apart() -> None:
    """Have the compiler look whether a module has hooks before it takes the graph of another one of the same kind.

    It does not by default: the graph of the first layer, which nobody edits, would serve the edited one.
    """
    # Asked first, because to set a value has the compiler look at all of its settings again.
    if "torch._dynamo" in sys.modules and torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
