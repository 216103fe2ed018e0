"""One expert of a fused bank as a module of its own, that can be read, written and hooked.

A bank keeps the matrices of all its experts in one parameter, and nothing is called per expert. `expert_slice` gives
the second projection of one of them the face of a linear layer ``κ → W κ`` (see `anatomy.experts` for ``κ``): its
weight is the slice of the parameter, and its hooks see what the expert reads and gives for all tokens of a forward.
What a hook changes reaches the bank's output. Without hooks, the model runs as if the slice did not exist.
"""

from __future__ import annotations

import re
import weakref
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..anatomy.experts import expert_keys, routing_of
from ..errors import LayerError, UnsupportedModelError

_NAME = re.compile(r"(?P<bank>.+)\.(?P<param>down_proj)\[(?P<index>\d+)\]")
_SLICES: WeakKeyDictionary[nn.Module, dict[int, ExpertSlice]] = WeakKeyDictionary()


class ExpertSlice(nn.Module):
    """The second projection of one expert.

    Args:
        bank: the module that holds all experts.
        index: of the expert.
    """

    param = "down_proj"

    def __init__(self, bank: nn.Module, index: int):
        super().__init__()
        self._bank, self.index = weakref.ref(bank), index
        self._hooked = 0
        self._joint: RemovableHandle | None = None
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def bank(self) -> nn.Module:
        """The module that holds all experts."""
        bank = self._bank()
        assert bank is not None, "the model is gone"
        return bank

    @property
    def transposed(self) -> bool:
        """Whether the slice is stored ``[d_in, d_out]``."""
        return bool(self.bank.is_transposed)

    @property
    def weight(self) -> torch.Tensor:
        """The slice as it is stored; a view, so that writing into it changes the model."""
        whole: torch.Tensor = getattr(self.bank, self.param)
        return whole[self.index]

    @property
    def sparsity(self) -> float:
        """How many tokens there are for one that is routed here, if all experts are equally busy."""
        config = getattr(self.bank, "config", None)
        return getattr(self.bank, self.param).shape[0] / max(getattr(config, "num_experts_per_tok", None) or 1, 1)

    def put_into(self, whole: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The parameter of all experts with this one replaced, as a new tensor; differentiable in both."""
        return whole.index_copy(0, torch.tensor([self.index], device=whole.device), value.unsqueeze(0))

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        """``W κ`` for ``κ`` ``[tokens, d_in]``."""
        output = keys @ (self.weight if self.transposed else self.weight.t())
        self._last = (keys, output)
        return output

    def register_forward_hook(self, hook: Any, **options: Any) -> Any:
        """Hook what the expert gives, inside the bank's forward."""
        return self._join(super().register_forward_hook(hook, **options))

    def register_forward_pre_hook(self, hook: Any, **options: Any) -> Any:
        """Hook what the expert reads, inside the bank's forward."""
        return self._join(super().register_forward_pre_hook(hook, **options))

    def _join(self, handle: RemovableHandle) -> _Joined:
        """Run the slice with the bank from now on, until the last of its hooks is removed."""
        if self._hooked == 0:
            self._joint = self.bank.register_forward_hook(self._run, with_kwargs=True)
        self._hooked += 1
        return _Joined(self, handle)

    def _leave(self) -> None:
        self._hooked -= 1
        if self._hooked == 0 and self._joint is not None:
            self._joint.remove()

    def _run(self, bank: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> Any:
        """Call the slice on its keys, and add what its hooks have changed to the bank's output."""
        routing = routing_of(args, kwargs)
        if routing is None:
            raise UnsupportedModelError(f"{type(bank).__name__} is not called with tokens and their routing")
        keys = expert_keys(bank, routing, self.index)
        seen = self(keys)
        assert self._last is not None
        (used, plain), self._last = self._last, None
        if seen is plain and used is keys:
            return None
        if used is not keys:
            plain = self.forward(keys)
            self._last = None
        return output + (seen - plain).to(output.dtype)


class _Joined:
    """The handle of a hook on a slice."""

    def __init__(self, owner: ExpertSlice, handle: RemovableHandle):
        self._owner, self._handle = owner, handle
        self._removed = False

    def remove(self) -> None:
        """Take the hook off."""
        if not self._removed:
            self._removed = True
            self._handle.remove()
            self._owner._leave()


def expert_slice(model: nn.Module, path: str) -> ExpertSlice | None:
    """Return the slice that a path such as ``model.layers.3.mlp.experts.down_proj[5]`` names; ``None`` for others.

    Raises:
        LayerError: if there is no such bank or expert.
        UnsupportedModelError: if the bank does not say how it is laid out.
    """
    match = _NAME.fullmatch(path)
    if match is None:
        return None
    index = int(match["index"])
    try:
        bank = model.get_submodule(match["bank"])
        whole = getattr(bank, match["param"])
    except AttributeError:
        raise LayerError(f"the model has no experts {match['bank']}.{match['param']}") from None
    if not hasattr(bank, "is_transposed"):
        raise UnsupportedModelError(f"{match['bank']} does not say how it stores its experts; they cannot be edited")
    if index >= whole.shape[0]:
        raise LayerError(f"{match['bank']} has experts 0 … {whole.shape[0] - 1}, not {index}")
    return _SLICES.setdefault(bank, {}).setdefault(index, ExpertSlice(bank, index))


def expert_index(path: str) -> int | None:
    """Number of the expert that a path names; ``None`` for other modules."""
    match = _NAME.fullmatch(path)
    return int(match["index"]) if match is not None else None


def parameter_name(module: str, name: str) -> str:
    """Name of the model's parameter that ``name`` of ``module`` is, or is a slice of."""
    match = _NAME.fullmatch(module)
    return f"{match['bank']}.{match['param']}" if match is not None and name == "weight" else f"{module}.{name}"
