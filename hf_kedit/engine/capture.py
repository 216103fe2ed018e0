"""Recording what goes into and comes out of named modules, at chosen positions, in one forward.

The forward stops after the last module that is asked for. Everything recorded is a copy, because some models
change module outputs in place afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.hooks import RemovableHandle

from ..anatomy.experts import routing_of
from ..anatomy.outputs import block_output as first
from ..anatomy.outputs import hooks, module_input, replace_module_input
from ..anatomy.outputs import replace_block_output as with_first
from ..anatomy.switching import Switch
from ..errors import UnsupportedModelError
from ..tokens import pad_rows
from .experts import ExpertSlice
from .forward import device_of, model_inputs
from .weights import get_module

__all__ = [
    "ModuleCall",
    "Tap",
    "as_rows",
    "capture_at",
    "capture_routing",
    "first",
    "listen",
    "rewritten",
    "states_of",
    "stream_states",
    "top_experts",
    "with_first",
]

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..anatomy import Anatomy
    from ..tokens import TokenBatch

ROUTED_ROWS = 64


class _Stop(Exception):
    """Ends a forward as soon as everything has been recorded."""


@dataclass(frozen=True)
class Tap:
    """What to record: the input or the output of a module.

    Args:
        module: in-memory module name.
        kind: ``"input"``: its first argument; ``"output"``: what it returns (first element of a tuple).
    """

    module: str
    kind: Literal["input", "output"] = "output"


def as_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """View ``[rows · width, d]`` (OPT flattens its MLP) as ``[rows, width, d]``; other shapes pass through.

    Raises:
        UnsupportedModelError: for more dimensions (`Anatomy.one_stream`): rows are not the first of them.
    """
    if tensor.dim() > 3:
        raise UnsupportedModelError(
            f"a module of this model works on {tuple(tensor.shape)} where hf_kedit needs [batch, tokens, width]"
        )
    if tensor.dim() == 2 and rows and tensor.shape[0] % rows == 0:
        return tensor.view(rows, -1, tensor.shape[-1])
    return tensor


def listen(model: torch.nn.Module, taps: Sequence[Tap], receive: Callable[[Tap, torch.Tensor], None]) -> Switch[None]:
    """Call ``receive(tap, tensor)`` for every tap during forwards inside the block."""

    def watching(tap: Tap) -> Callable[[torch.Tensor], None]:
        return lambda state: receive(tap, state)

    return rewritten(model, {tap: watching(tap) for tap in taps})


def rewritten(
    model: torch.nn.Module, changes: Mapping[Tap, Callable[[torch.Tensor], torch.Tensor | None]]
) -> Switch[None]:
    """Let functions replace what goes into or comes out of modules during forwards inside the block.

    Args:
        model: whose modules are hooked; the hooks are always removed.
        changes: tap → function of the state, which returns the state to go on with, or ``None`` for the same one.
    """
    registrations: list[Callable[[], RemovableHandle]] = []
    for tap, change in changes.items():
        module = get_module(model, tap.module)
        if tap.kind == "input":
            registrations.append(partial(module.register_forward_pre_hook, _before(change), with_kwargs=True))
        else:
            registrations.append(partial(module.register_forward_hook, _after(change)))
    return hooks(*registrations)


def _before(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[..., Any]:
    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = change(module_input(args, kwargs))
        return None if new is None else replace_module_input(args, kwargs, new)

    return hook


def _after(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[..., Any]:
    def hook(_: Any, __: Any, output: Any) -> Any:
        new = change(first(output))
        return None if new is None else with_first(output, new)

    return hook


def capture_at(
    model: PreTrainedModel,
    batch: TokenBatch,
    columns: torch.Tensor,
    taps: Sequence[Tap],
    *,
    stop: bool = True,
    **extra: Any,
) -> dict[Tap, torch.Tensor]:
    """Run one forward without gradients and return each tap at one column per row.

    Args:
        model: in evaluation mode.
        batch: padded rows.
        columns: ``[rows]`` column in the padded batch.
        taps: what to record.
        stop: end the forward once everything was seen.
        extra: more arguments for the model (``decoder_input_ids`` …).

    Returns:
        Tap → ``[rows, d]`` in fp32.
    """
    captured: dict[Tap, torch.Tensor] = {}
    rows = columns.shape[0]

    def receive(tap: Tap, tensor: torch.Tensor) -> None:
        states = as_rows(tensor.detach(), rows)
        index = torch.arange(rows, device=states.device)
        captured[tap] = states[index, columns.to(states.device)].float().clone()
        if stop and len(captured) == len(set(taps)):
            raise _Stop

    with torch.no_grad(), listen(model, taps, receive), contextlib.suppress(_Stop):
        model(**model_inputs(model, batch), **extra)
    return captured


@dataclass(frozen=True)
class ModuleCall:
    """What a module is called with in a forward, and what it returns: enough to call it again by itself.

    Args:
        args: positional arguments.
        kwargs: the others: masks, positions and the like, which the model has made of a batch.
        output: what it returned (the first element of a tuple), ``[rows, width, d]`` fp32.
        mask: the real tokens of the batch, ``[rows, width]`` bool.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor
    mask: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: PreTrainedModel, path: str, batch: TokenBatch, run: Callable[..., Any] | None = None
    ) -> ModuleCall:
        """Run a model up to a module and note how it calls it.

        Args:
            model: in evaluation mode.
            path: name of the module.
            batch: padded rows.
            run: called instead of the model, with its modules.
        """
        module, calls, outputs = get_module(model, path), [], []

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(replace_module_input(args, kwargs, module_input(args, kwargs).clone()))

        def after(_: Any, __: Any, output: Any) -> None:
            outputs.append(as_rows(first(output), len(batch.input_ids)).float().clone())
            raise _Stop

        noting = partial(module.register_forward_pre_hook, before, with_kwargs=True)
        with hooks(noting, partial(module.register_forward_hook, after)), contextlib.suppress(_Stop):
            (run or model)(**model_inputs(model, batch))
        ((args, kwargs),) = calls
        return cls(args, kwargs, outputs[0], batch.attention_mask.bool().to(outputs[0].device))

    def of_module(self, module: Callable[..., Any]) -> torch.Tensor:
        """What the module, or another one in its place, returns to this call, ``[rows, width, d]`` fp32."""
        return as_rows(first(module(*self.args, **self.kwargs)), len(self.mask)).float()

    def mean_of(self, numbers: torch.Tensor) -> torch.Tensor:
        """The mean over the real tokens of ``[rows, width]``, a scalar."""
        return numbers[self.mask].mean()


def capture_routing(
    model: PreTrainedModel, batch: TokenBatch, columns: torch.Tensor, banks: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Run one forward without gradients and return the routing weights of banks of experts at one column per row.

    Args:
        model: in evaluation mode.
        batch: padded rows.
        columns: ``[rows]`` column in the padded batch.
        banks: names of the banks.

    Returns:
        Bank → ``[rows, experts]`` fp32, 0 where a row's token is not routed.
    """
    weights_of: dict[str, torch.Tensor] = {}
    rows = torch.arange(columns.shape[0], device=columns.device)

    def watching(path: str) -> Callable[..., None]:
        def hook(bank: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routing = routing_of(args, kwargs)
            assert routing is not None  # checked with the anatomy
            device, count = routing.experts.device, getattr(bank, ExpertSlice.param).shape[0]
            place = (rows.to(device), columns.to(device))
            experts = routing.experts.view(*batch.input_ids.shape, -1)[place]
            weights = routing.weights.view(*batch.input_ids.shape, -1)[place].float()
            weights_of[path] = weights.new_zeros(len(rows), count).scatter_add(1, experts, weights)

        return hook

    watched = (
        partial(get_module(model, path).register_forward_pre_hook, watching(path), with_kwargs=True) for path in banks
    )
    with torch.no_grad(), hooks(*watched):
        model(**model_inputs(model, batch))
    return weights_of


def top_experts(
    model: PreTrainedModel,
    anatomy: Anatomy,
    layers: Sequence[int],
    places: Sequence[tuple[Sequence[int], int]],
    fill: int,
) -> list[dict[int, int]]:
    """Find the routed expert that reads a token, with the largest weight, in every layer that has routed experts.

    Args:
        model: in evaluation mode.
        anatomy: of the model.
        layers: numbers of layers.
        places: token ids, and the position of the token in them.
        fill: padding id.

    Returns:
        For each place: layer → expert.

    Raises:
        UnsupportedModelError: if the experts of a layer cannot be edited one by one.
    """
    infos = [anatomy.layer(i) for i in layers]
    routed = [la for la in infos if la.experts is not None or any(u.role == "expert" for u in la.units)]
    anatomy.with_experts({layer.index: 0 for layer in routed})  # says why, where they cannot be edited
    banks = {layer.index: layer.experts.path for layer in routed if layer.experts is not None}
    if not banks:
        return [{} for _ in places]
    chosen: list[dict[int, int]] = []
    for start in range(0, len(places), ROUTED_ROWS):
        part = places[start : start + ROUTED_ROWS]
        batch = pad_rows([ids for ids, _ in part], fill).to(device_of(model))
        columns = torch.tensor([column for _, column in part], device=batch.input_ids.device)
        weights = capture_routing(model, batch, columns, list(banks.values()))
        chosen += [{layer: int(weights[path][k].argmax()) for layer, path in banks.items()} for k in range(len(part))]
    return chosen


def states_of(model: PreTrainedModel, inputs: Mapping[str, Any], tap: Tap) -> torch.Tensor:
    """Call a model without gradients, up to one tap, and return what it saw there, ``[rows, width, d]`` fp32."""
    seen: list[torch.Tensor] = []

    def take(_: Tap, tensor: torch.Tensor) -> None:
        seen.append(as_rows(tensor.detach(), len(inputs["input_ids"])).float().clone())
        raise _Stop

    with torch.no_grad(), listen(model, [tap], take), contextlib.suppress(_Stop):
        model(**inputs)
    return seen[0]


def stream_states(
    model: PreTrainedModel, batch: TokenBatch, taps: Sequence[Tap], receive: Callable[[Tap, torch.Tensor], None]
) -> None:
    """Run one forward without gradients and hand over each tap's real (unpadded) states, ``[tokens, d]``."""
    seen: set[Tap] = set()
    mask = batch.attention_mask.bool()

    def take(tap: Tap, tensor: torch.Tensor) -> None:
        states = as_rows(tensor.detach(), mask.shape[0])
        receive(tap, states[mask.to(states.device)])
        seen.add(tap)
        if len(seen) == len(set(taps)):
            raise _Stop

    with torch.no_grad(), listen(model, taps, take), contextlib.suppress(_Stop):
        model(**model_inputs(model, batch))
