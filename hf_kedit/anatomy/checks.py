"""Confirming an anatomy on the model itself, with two short forward passes.

The first pass (one row of a few tokens) compares: the down projections' outputs with ``k Wᵀ + b``, the blocks'
outputs with the model's own hidden states, the order of calls, which up projection is the gate, and the logits
with ``head(final_norm(h))``. The second has one row more than there are layers: in row ``i + 1`` a vector ε is
added to the down projection of layer ``i`` alone, and the block's output is compared with that of row 0.
The model is left as it was found, whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import AnatomyError, UnsupportedModelError
from ..logging import get_logger, warn_once
from .experts import is_linear_memory, routing_of
from .outputs import block_output, hooks, module_input, replace_block_output
from .probing import dense_weight, evaluating, forward, sample_ids, tolerance_of, wide_copy
from .structure import norm_candidates
from .types import Anatomy, GateHalf, LayerAnatomy, Projection

logger = get_logger(__name__)
# The same as exactly ε: relative to the size of the stream, so finer than comparing products of matrices.
_ADDITIVE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_ACTIVATIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    F.silu,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.relu,
    lambda x: F.relu(x).square(),
    torch.sigmoid,
    torch.tanh,
    lambda x: x * torch.sigmoid(1.702 * x),
)


@dataclass
class _Seen:
    """What the first pass recorded: wide copies on the CPU, of the first call unless said otherwise."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    tuples: dict[str, bool] = field(default_factory=dict)
    raw: dict[str, torch.Tensor] = field(default_factory=dict)  # as they are
    last_inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # of the last call
    memories: set[str] = field(default_factory=set)  # banks of experts that are linear memories

    def raw_dtype(self) -> torch.dtype:
        """Dtype of the stream."""
        return next((tensor.dtype for tensor in self.raw.values()), torch.float32)

    def last(self, path: str) -> int:
        """When a module was called last; -1 if never."""
        return max((i for i, p in enumerate(self.order) if p == path), default=-1)


def check_anatomy(model: nn.Module, anatomy: Anatomy, input_ids: torch.Tensor | None = None) -> Anatomy:
    """Confirm an anatomy by running the model, and fill in what only a run can tell.

    Args:
        model: the model that the anatomy was resolved from, with real weights.
        anatomy: result of `resolve_anatomy`.
        input_ids: token ids ``[1, T]`` or ``[T]`` to run on; by default eight harmless ids.

    Returns:
        A copy of ``anatomy`` with ``additive``, ``residual_scale``, ``block_returns_tuple`` and ``logit_lens`` set,
        and with ``gate``, ``attention_out`` and ``final_norm`` corrected to what was seen in action.

    Raises:
        AnatomyError: if the model cannot be run on token ids alone, a down projection does not compute
            ``k Wᵀ + b``, projections are called in an impossible order, or the blocks' outputs are not the hidden
            states the model reports.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with evaluating(model), torch.random.fork_rng(devices=devices), torch.no_grad():
        ids = sample_ids(model, anatomy, input_ids)
        checker = _Checker(model, anatomy, ids)
        return checker.check()


class _Checker:
    def __init__(self, model: nn.Module, anatomy: Anatomy, ids: torch.Tensor):
        self.model, self.anatomy, self.ids = model, anatomy, ids
        self.tolerance = tolerance_of(model)

    def check(self) -> Anatomy:
        """Run both passes and return the completed anatomy."""
        seen, output = self._observe()
        self._check_called(seen)
        self._check_identity(seen)
        self._check_hidden_states(seen, output)
        layers = tuple(self._correct(layer, seen) for layer in self.anatomy.layers)
        norm, lens = self._logit_lens(seen, output)
        scales = self._scales(seen, {la.index: la.down.path for la in layers if la.down is not None})
        layers = self._correct_experts(layers, seen)
        return replace(
            self.anatomy,
            layers=layers,
            final_norm=norm,
            logit_lens=lens,
            additive=tuple(scale == 1.0 for scale in scales),
            residual_scale=scales,
            block_returns_tuple=tuple(seen.tuples.get(layer.path, False) for layer in layers),
            one_stream=all(tensor.dim() == 3 for tensor in seen.raw.values()),
        )

    # ------------------------------------------------------------------ first pass

    def _observe(self) -> tuple[_Seen, Any]:
        seen = _Seen()

        def watch(path: str, *, keep: bool = True, raw: bool = False) -> Callable[[], RemovableHandle]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                given = module_input(args, kwargs)
                tensor = block_output(output)
                seen.order.append(path)
                seen.tuples.setdefault(path, isinstance(output, (tuple, list)))
                if not keep or not isinstance(tensor, torch.Tensor):
                    return
                if isinstance(given, torch.Tensor):
                    seen.last_inputs[path] = wide_copy(given)
                if raw:
                    seen.raw[path] = tensor.detach().clone()
                if path not in seen.outputs:
                    seen.outputs[path] = wide_copy(tensor)
                    seen.inputs.update({path: seen.last_inputs[path]} if path in seen.last_inputs else {})

            return partial(self.model.get_submodule(path).register_forward_hook, hook, with_kwargs=True)

        watched: list[Callable[[], RemovableHandle]] = []
        for layer in self.anatomy.layers:
            watched.append(watch(layer.path, raw=layer.index == self.anatomy.num_layers - 1))
            for path in dict.fromkeys(p.path for p in (*layer.ups, *((layer.down,) if layer.down else ()))):
                watched.append(watch(path))
            if layer.attention is not None:
                watched.append(watch(layer.attention))
                for projection in self._inside(layer, layer.attention):
                    watched.append(watch(projection.path, keep=projection.out_features == self.anatomy.hidden_size))
            if layer.experts is not None:
                watched.append(self._watch_experts(layer.experts.path, seen))
        watched += [watch(path) for path in self._norms()]
        with hooks(*watched):
            output = forward(self.model, self.anatomy, self.ids, hidden_states=True)
        return seen, output

    def _watch_experts(self, path: str, seen: _Seen) -> Callable[[], RemovableHandle]:
        def hook(bank: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensor, routing = block_output(output), routing_of(args, kwargs)
            if routing is not None and is_linear_memory(bank, routing, tensor, self.tolerance):
                seen.memories.add(path)

        return partial(self.model.get_submodule(path).register_forward_hook, hook, with_kwargs=True)

    def _inside(self, layer: LayerAnatomy, path: str) -> list[Projection]:
        return [p for p in layer.projections if p.path.startswith(path + ".")]

    def _norms(self) -> list[str]:
        candidates = norm_candidates(self.model, self.anatomy.layers_path)
        ours = self.anatomy.final_norm
        return [*candidates, *([ours] if ours is not None and ours not in candidates else [])]

    # ------------------------------------------------------------------ what must hold

    def _check_called(self, seen: _Seen) -> None:
        """Blocks may be skipped (cross-attention without an image), but not all of them."""
        if not any(layer.path in seen.order for layer in self.anatomy.layers):
            raise AnatomyError(
                f"no block of '{self.anatomy.layers_path}' was called in a forward pass of"
                f" {self.anatomy.model_class}; name the right list with the override 'layers'"
            )
        for layer in self.anatomy.layers:
            if layer.down is None or layer.down.path not in seen.order:
                continue
            first_down = seen.order.index(layer.down.path)
            late = [p.path for p in layer.ups if p.path in seen.order and seen.order.index(p.path) > first_down]
            if late:
                raise AnatomyError(
                    f"{layer.down.path} was taken for the projection out of the MLP, but it is called before"
                    f" {', '.join(late)}; name the right one with the override 'down'"
                )

    def _check_identity(self, seen: _Seen) -> None:
        for layer in self.anatomy.layers:
            down = layer.down
            if down is None or layer.path not in seen.order:
                continue
            k, v = seen.inputs.get(down.path), seen.outputs.get(down.path)
            if k is None or v is None:
                raise AnatomyError(
                    f"{down.path} is not called as a module in a forward pass of {self.anatomy.model_class}, so its"
                    " input cannot be observed"
                )
            if k.shape[-1] != down.in_features or v.shape[-1] != down.out_features:
                raise AnatomyError(
                    f"{down.path} maps {k.shape[-1]} -> {v.shape[-1]} in a forward pass, not"
                    f" {down.in_features} -> {down.out_features}; check the overrides 'down' and 'layout'"
                )
            weight, bias = dense_weight(self.model.get_submodule(down.path))
            if weight is None:
                continue  # quantised: sizes are all that can be compared
            matrix = weight.t() if down.layout == "out_in" else weight
            expected = k.to(weight.device, weight.dtype) @ matrix
            if bias is not None:
                expected = expected + bias.to(expected.device)
            if not _close(wide_copy(expected), v, self.tolerance):
                error = float((wide_copy(expected) - v).norm() / v.norm().clamp_min(1e-12))
                raise AnatomyError(
                    f"{down.path} does not compute k·W{' + b' if bias is not None else ''} in layout {down.layout}:"
                    f" relative error {error:.2g}. If it is the wrong matrix or layout, use the overrides 'down' and"
                    " 'layout'; otherwise this layer cannot be edited as a linear memory."
                )

    def _check_hidden_states(self, seen: _Seen, output: Any) -> None:
        states = getattr(output, self._states_name(), None)
        layers = self.anatomy.layers
        if not isinstance(states, (tuple, list)) or len(states) != len(layers) + 1:
            logger.debug("%s reports no hidden state per layer; not compared", self.anatomy.model_class)
            return
        for layer in layers[:-1]:  # the last state is taken after the final norm
            ours = seen.outputs.get(layer.path)
            if ours is None:
                continue
            theirs = wide_copy(states[layer.index + 1])
            if theirs.shape != ours.shape:
                raise UnsupportedModelError(
                    f"{layer.path} returns {tuple(ours.shape)} where {self.anatomy.model_class} reports hidden states"
                    f" {tuple(theirs.shape)}: hf_kedit needs blocks that work on [batch, tokens, width]"
                )
            if not _close(ours, theirs, self.tolerance):
                raise AnatomyError(
                    f"the output of {layer.path} is not hidden state {layer.index + 1} of"
                    f" {self.anatomy.model_class}; name the list of blocks with the override 'layers'"
                )

    def _states_name(self) -> str:
        if not self.anatomy.is_encoder_decoder:
            return "hidden_states"
        return f"{self.anatomy.stack}_hidden_states"

    # ------------------------------------------------------------------ what is seen

    def _correct(self, layer: LayerAnatomy, seen: _Seen) -> LayerAnatomy:
        layer = self._correct_attention(layer, seen)
        if layer.down is None or not layer.gated or layer.down.path not in seen.inputs:
            return layer
        key = seen.inputs[layer.down.path]
        parts = [seen.outputs.get(p.path) for p in layer.ups]
        activations = [*_ACTIVATIONS, *_own_activations(self.model, layer)]
        if layer.fused:
            if parts[0] is None:
                return layer
            y = parts[0]
            half = y.shape[-1] // 2
            options: dict[GateHalf, tuple[torch.Tensor, torch.Tensor]] = {
                "first": (y[..., :half], y[..., half:]),
                "second": (y[..., half:], y[..., :half]),
                "even": (y[..., ::2], y[..., 1::2]),
                "odd": (y[..., 1::2], y[..., ::2]),
            }
            best = _best_gate(key, options, activations)
            return replace(layer, fused_gate=best)
        if len(parts) != 2 or parts[0] is None or parts[1] is None:
            return layer
        chosen = _best_gate(key, {0: (parts[0], parts[1]), 1: (parts[1], parts[0])}, activations)
        return replace(layer, gate=layer.ups[chosen]) if chosen is not None else layer

    def _correct_attention(self, layer: LayerAnatomy, seen: _Seen) -> LayerAnatomy:
        """The projection out of an attention is the last one called inside it."""
        if layer.attention is None or layer.attention_out is None:
            return layer
        inside = {p.path: p for p in self._inside(layer, layer.attention)}
        called = [inside[path] for path in seen.order if path in inside]
        result = seen.outputs.get(layer.attention)
        out = layer.attention_out
        if called and called[-1].out_features == self.anatomy.hidden_size:
            out = called[-1]
        module = self.model.get_submodule(layer.attention)
        if result is not None and not _close(seen.outputs.get(out.path), result, self.tolerance) and _has_bank(module):
            return replace(layer, attention_out=None)  # 3-D weights make the output (JetMoE)
        return replace(layer, attention_out=out)

    def _logit_lens(self, seen: _Seen, output: Any) -> tuple[str | None, bool | None]:
        anatomy = self.anatomy
        last = max((layer.path for layer in anatomy.layers), key=seen.last)
        stream = wide_copy(seen.raw[last]) if last in seen.raw else seen.outputs[last]
        after = sorted((p for p in self._norms() if seen.last(p) > seen.last(last)), key=seen.last)
        fed = [p for p in after if _close(seen.last_inputs.get(p), stream, self.tolerance)]
        norm = anatomy.final_norm
        if norm not in (fed or after):
            norm = (fed or after or [None])[-1]  # type: ignore[list-item]
        logits = getattr(output, "logits", None)
        if anatomy.head is None or anatomy.stack == "encoder" or not isinstance(logits, torch.Tensor):
            return norm, None
        try:
            hidden = seen.raw[last]
            if norm is not None:
                hidden = block_output(self.model.get_submodule(norm)(hidden))
            head = self.model.get_submodule(anatomy.head)
            device = next((p.device for p in head.parameters() if p.device.type != "meta"), hidden.device)
            ours = head(hidden.to(device))
        except (RuntimeError, TypeError, ValueError, KeyError):
            return norm, False
        return norm, _close(wide_copy(ours), wide_copy(logits), self.tolerance)

    # ------------------------------------------------------------------ second pass

    def _scales(self, seen: _Seen, sites: dict[int, str]) -> tuple[float | None, ...]:
        """Add ε to the output of a module of layer ``i`` in a row of its own and see what the block's output does.

        Args:
            seen: by the first pass.
            sites: layer → module.

        Returns:
            Per layer the factor by which ε reaches the block's output; ``None`` if there is no such factor.
        """
        layers = [la for la in self.anatomy.layers if la.index in sites and la.path in seen.outputs]
        rows, width = len(layers) + 1, self.ids.shape[1]
        added: dict[str, torch.Tensor] = {}
        moved: dict[str, torch.Tensor] = {}
        disturbing: list[Callable[[], RemovableHandle]] = []
        for row, layer in enumerate(layers, start=1):
            # As large as the stream itself: well above rounding, and enough to show a normalisation.
            size = max(float(seen.outputs[layer.path].square().mean().sqrt()), 1e-6)

            def at_site(
                _: Any,
                __: Any,
                output: Any,
                *,
                path: str = layer.path,
                row: int = row,
                size: float = size,
            ) -> Any:
                if path in added:
                    return None  # a block that runs several times is disturbed once
                tensor = block_output(output)
                new = tensor.clone(memory_format=torch.contiguous_format)
                view = new if new.dim() == 3 else new.view(rows, -1, new.shape[-1])
                before = wide_copy(view[row])
                view[row] += size * _signs(before.shape).to(new)
                # What was really added, after rounding to the dtype of the activations.
                added[path] = wide_copy(view[row]) - before
                return replace_block_output(output, new)

            def after(_: Any, __: Any, output: Any, *, path: str = layer.path, row: int = row) -> None:
                tensor = block_output(output)
                if path not in moved and tensor.dim() == 3:  # not several streams on a leading axis
                    moved[path] = wide_copy(tensor[row]) - wide_copy(tensor[0])

            disturbing.append(partial(self.model.get_submodule(sites[layer.index]).register_forward_hook, at_site))
            disturbing.append(partial(self.model.get_submodule(layer.path).register_forward_hook, after))
        with hooks(*disturbing):
            if layers:
                forward(self.model, self.anatomy, self.ids[:1].expand(rows, width).contiguous())
        tolerance = _ADDITIVE_TOLERANCE.get(seen.raw_dtype(), 3e-2)
        scales: list[float | None] = []
        for layer in self.anatomy.layers:
            s = _scalar(added.get(layer.path), moved.get(layer.path), tolerance)
            if seen.order.count(layer.path) > 1:
                warn_once(
                    logger,
                    f"{self.anatomy.model_class} runs {layer.path} {seen.order.count(layer.path)} times in one forward"
                    " pass: an edit of it acts every time",
                )
                s = None
            scales.append(1.0 if s is not None and abs(s - 1) <= tolerance else s)
        return tuple(scales)

    def _correct_experts(self, layers: tuple[LayerAnatomy, ...], seen: _Seen) -> tuple[LayerAnatomy, ...]:
        """Note of each bank of experts whether they are linear memories, and how its output enters the stream."""
        sites = {la.index: la.experts.path for la in layers if la.experts and la.experts.path in seen.memories}
        scales = self._scales(seen, sites) if sites else ()
        return tuple(
            layer
            if layer.experts is None
            else replace(
                layer,
                experts=replace(
                    layer.experts,
                    linear=layer.index in sites,
                    residual_scale=scales[layer.index] if layer.index in sites else None,
                ),
            )
            for layer in layers
        )


def _signs(shape: tuple[int, ...]) -> torch.Tensor:
    """Random ±1, the same every time: every direction of the stream is moved by the same amount."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, shape, generator=generator).mul(2).sub(1).float()


def _scalar(added: torch.Tensor | None, moved: torch.Tensor | None, tolerance: float) -> float | None:
    """The factor ``s`` with ``moved = s · added`` everywhere, or ``None``; both ``[T, H]``."""
    if added is None or moved is None or added.shape != moved.shape:
        return None
    s = float((added * moved).sum() / added.square().sum().clamp_min(1e-30))
    error = float((moved - s * added).norm() / (abs(s) * added.norm()).clamp_min(1e-30))
    return s if s != 0 and error <= tolerance else None


def _best_gate(
    key: torch.Tensor,
    options: dict[Any, tuple[torch.Tensor, torch.Tensor]],
    activations: list[Callable[[torch.Tensor], torch.Tensor]],
) -> Any:
    """Which reading ``(gate, up)`` gives ``key = f(gate) · up`` for one of the activations; ``None`` if none does."""
    best, least = None, 2e-2
    for name, (gate, up) in options.items():
        for activation in activations:
            try:
                value = activation(gate) * up
            except (RuntimeError, TypeError, ValueError):
                continue
            if not isinstance(value, torch.Tensor) or value.shape != key.shape:
                continue
            error = float((value - key).norm() / key.norm().clamp_min(1e-12))
            if error < least:
                best, least = name, error
    return best


def _own_activations(model: nn.Module, layer: LayerAnatomy) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Parameter-free leaf modules of the MLP: the activation is among them."""
    owner = model.get_submodule(layer.mlp or layer.path)
    return [
        m
        for m in owner.modules()
        if not any(True for _ in m.children()) and not any(True for _ in m.parameters()) and not m._buffers
    ]


def _has_bank(module: nn.Module) -> bool:
    return any(p.dim() == 3 for p in module.parameters())


def _close(ours: torch.Tensor | None, theirs: torch.Tensor, tolerance: float) -> bool:
    if ours is None or ours.shape != theirs.shape:
        return False
    return float((ours - theirs).norm()) <= tolerance * max(float(theirs.norm()), 1e-12)
