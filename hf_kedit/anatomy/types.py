"""What is known about a model's structure, as plain frozen dataclasses.

Nothing here looks at a model: `structure` fills these in from module trees, `checks` from a forward pass.
Paths are in-memory module names, usable with ``model.get_submodule``; they may differ from the names on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import LayerError, UnsupportedModelError

Layout = Literal["out_in", "in_out"]
Role = Literal["dense", "shared", "expert", "auxiliary"]
GateHalf = Literal["first", "second", "even", "odd"]


@dataclass(frozen=True)
class Projection:
    """One matrix: a module with a 2-D weight.

    Args:
        path: module that owns the weight (below a PEFT wrapper its ``base_layer``).
        layout: ``"out_in"``: weight ``[out, in]`` and ``y = x Wᵀ`` (``nn.Linear``); ``"in_out"``: weight
            ``[in, out]`` and ``y = x W`` (``Conv1D``).
        in_features: size of the input.
        out_features: size of the output.
        has_bias: whether a bias is added.
    """

    path: str
    layout: Layout
    in_features: int
    out_features: int
    has_bias: bool

    @property
    def name(self) -> str:
        """Last component of the path that is not PEFT's ``base_layer``."""
        parts = [p for p in self.path.split(".") if p != "base_layer"]
        return parts[-1] if parts else self.path

    def __str__(self) -> str:
        return f"{self.path} ({self.in_features} -> {self.out_features}, {self.layout})"


@dataclass(frozen=True)
class ExpertBank:
    """Fused experts: 3-D parameters with the expert as first axis.

    Args:
        path: module that owns the parameters.
        down_param: parameter of the second projection, relative to ``path``; ``[E, out, in]``, or ``[E, in, out]``
            if ``transposed``.
        up_param: parameter of the first projection (gate and up together if there is only one).
        gate_param: separate gate parameter, if there is one.
        linear: each expert's down projection is a linear memory that can be edited by itself (see `experts`); ``None``
            until `check_anatomy` has seen the bank in action.
        residual_scale: as that of `Anatomy`, for what is added to the bank's output.
        num_experts: ``E``.
        in_features: size ``I`` of the input of the down projection.
        out_features: size ``H`` of its output.
        transposed: whether the parameters are stored ``[E, in, out]``.
        gated: whether a gate multiplies the up projection.
        interleaved: gate and up alternate column by column in ``up_param``; otherwise the gate is the first half.
    """

    path: str
    down_param: str
    up_param: str
    num_experts: int
    in_features: int
    out_features: int
    transposed: bool
    gated: bool
    interleaved: bool = False
    gate_param: str | None = None
    linear: bool | None = None
    residual_scale: float | None = None

    def down(self, expert: int) -> Projection:
        """The second projection of one expert; its path names the slice of the parameter."""
        layout: Layout = "in_out" if self.transposed else "out_in"
        return Projection(
            f"{self.path}.{self.down_param}[{expert}]", layout, self.in_features, self.out_features, has_bias=False
        )

    def __str__(self) -> str:
        layout = "in_out" if self.transposed else "out_in"
        sizes = f"{self.num_experts} experts, {self.in_features} -> {self.out_features}"
        return f"{self.path}.{self.down_param} ({sizes}, {layout})"


@dataclass(frozen=True)
class MlpUnit:
    """One feed-forward unit of a layer: the matrices into it and the one out of it.

    Args:
        role: ``"dense"``: the layer's MLP; ``"shared"``: the shared expert beside routed ones; ``"expert"``: one
            routed expert kept as modules of its own; ``"auxiliary"``: adapters and other small side paths.
        path: nearest common module, ``None`` if that is the layer itself.
        down: projection out of the unit.
        ups: projections into it, in order of registration; a single one of twice the size if ``fused``.
        gated: whether the unit multiplies an activated gate with an up projection.
        fused: whether gate and up are one matrix.
    """

    role: Role
    path: str | None
    down: Projection
    ups: tuple[Projection, ...]
    gated: bool
    fused: bool


@dataclass(frozen=True)
class LayerAnatomy:
    """Where one transformer block keeps what.

    Args:
        index: position in the stack.
        path: the block.
        attention: (self-)attention module; ``None`` if the layer has none.
        attention_out: projection out of the attention.
        mlp: MLP module; ``None`` where the matrices sit in the block itself (OPT) or there is no MLP.
        down: projection out of the main MLP unit; ``None`` if there is none (only routed experts, hybrid models).
        ups: projections into the main unit: up, gate and up, or one fused matrix.
        gate: which of ``ups`` is the gate; ``None`` if not gated, fused, or not known.
        gated: whether the main unit is gated.
        fused: whether gate and up are one matrix.
        fused_gate: which part of a fused matrix's output is the gate.
        experts: bank of fused routed experts, if the layer has one.
        units: every MLP unit that was found.
        projections: every matrix of the layer, for messages.
    """

    index: int
    path: str
    attention: str | None = None
    attention_out: Projection | None = None
    mlp: str | None = None
    down: Projection | None = None
    ups: tuple[Projection, ...] = ()
    gate: Projection | None = None
    gated: bool = False
    fused: bool = False
    fused_gate: GateHalf | None = None
    experts: ExpertBank | None = None
    units: tuple[MlpUnit, ...] = ()
    projections: tuple[Projection, ...] = ()

    def list_projections(self) -> str:
        """All matrices of the layer with their shapes, one per line."""
        lines = [f"  {p}" for p in self.projections]
        if self.experts is not None:
            lines.append(f"  {self.experts}")
        return "\n".join(lines) if lines else "  (none)"


@dataclass(frozen=True)
class Anatomy:
    """Structure of one stack of a model, found by `resolve_anatomy`.

    The last block of fields needs a forward pass: they are ``None`` until `check_anatomy` has filled them in.

    Args:
        model_class: class name of the (unwrapped) model.
        model_type: ``config.model_type``.
        hidden_size: width ``H`` of the residual stream.
        num_layers: number of blocks.
        layers_path: the list of blocks.
        layers: one entry per block.
        final_norm: normalisation after the last block.
        embeddings: token embeddings.
        head: projection to the vocabulary; ``None`` for a model without one.
        is_encoder_decoder: whether the model has both stacks.
        head_tied: whether the head shares its weight with the embeddings.
        stack: the stack that was resolved.
        additive: per layer: adding ε to the down projection's output moves the block's output by exactly ε.
            ``False`` for layers without a down projection.
        residual_scale: per layer: the factor ``s`` if the block's output moves by ``s·ε`` with one ``s`` for all
            positions and directions (1.0 where additive), otherwise ``None``.
        block_returns_tuple: per layer: the block returns a tuple with the hidden states first.
        logit_lens: logits equal ``head(final_norm(output of the last block))``.
        one_stream: blocks work on ``[batch, tokens, width]``; ``False`` where they carry several streams on a leading
            axis (Gemma 3n), which no method can read or set as one state of the residual stream.
    """

    model_class: str
    model_type: str | None
    hidden_size: int
    num_layers: int
    layers_path: str
    layers: tuple[LayerAnatomy, ...]
    final_norm: str | None
    embeddings: str
    head: str | None
    is_encoder_decoder: bool
    head_tied: bool
    stack: Literal["decoder", "encoder"] = "decoder"
    additive: tuple[bool, ...] | None = None
    residual_scale: tuple[float | None, ...] | None = None
    block_returns_tuple: tuple[bool, ...] | None = None
    logit_lens: bool | None = None
    one_stream: bool | None = None

    @classmethod
    def of_nothing(cls, model_class: str) -> Anatomy:
        """The anatomy of something that has none: a model behind an API."""
        return cls(
            model_class=model_class,
            model_type=None,
            hidden_size=0,
            num_layers=0,
            layers_path="",
            layers=(),
            final_norm=None,
            embeddings="",
            head=None,
            is_encoder_decoder=False,
            head_tied=False,
        )

    @property
    def checked(self) -> bool:
        """Whether `check_anatomy` has confirmed this anatomy on the model."""
        return self.additive is not None

    def layer(self, index: int) -> LayerAnatomy:
        """Return the block of this index.

        Raises:
            LayerError: if the index is negative or too large, or not an integer.
        """
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self.num_layers:
            raise LayerError(
                f"layer {index!r} does not exist in {self.model_class}: valid are 0 to {self.num_layers - 1}"
            )
        return self.layers[index]

    def block(self, index: int) -> str:
        """Return the name of a block whose output is one state of the residual stream for each token.

        Raises:
            LayerError: if there is no such layer.
            UnsupportedModelError: if the blocks carry several streams.
        """
        if self.one_stream is False:
            raise UnsupportedModelError(
                f"the blocks of {self.model_class} pass on several streams side by side, not one state"
                " [batch, tokens, width]: what reads or sets a whole block's output (MEMIT and its relatives, tracing)"
                " does not work on it. ROME, fine-tuning, LoRA and the codebooks work on its projections"
            )
        return self.layer(index).path

    def down(self, index: int) -> Projection:
        """Return the projection out of the main MLP unit of a layer.

        Raises:
            LayerError: if there is no such layer.
            UnsupportedModelError: if the layer has no MLP unit with a matrix of its own; the message lists what
                it has.
        """
        layer = self.layer(index)
        if layer.down is not None:
            return layer.down
        routed = [u for u in layer.units if u.role == "expert"]
        if layer.experts is not None or routed:
            where = str(layer.experts) if layer.experts is not None else str(routed[0].down)
            why = (
                f"is a mixture of experts without a dense or shared MLP ({where}): there is no single down projection."
                " Fine-tuning and methods that locate a fact can edit one expert: set expert_policy='top1'"
            )
        else:
            why = "has no MLP"
        with_down = [i for i, other in enumerate(self.layers) if other.down is not None]
        hint = f" Layers with one: {_ranges(with_down)}." if with_down else ""
        raise UnsupportedModelError(
            f"layer {index} of {self.model_class} ({layer.path}) {why}.{hint} Matrices of this layer:\n"
            f"{layer.list_projections()}"
        )

    def with_experts(self, experts: Mapping[int, int]) -> Anatomy:
        """Return an anatomy in which the down projection of some layers is that of one routed expert.

        Args:
            experts: layer → expert.

        Raises:
            UnsupportedModelError: if the experts of a layer cannot be edited one by one.
        """
        layers, scales = list(self.layers), list(self.residual_scale or [None] * self.num_layers)
        for index, expert in experts.items():
            bank = self.layer(index).experts
            if bank is None or not bank.linear:
                raise UnsupportedModelError(
                    f"the experts of layer {index} of {self.model_class} cannot be edited one by one: "
                    + (
                        "they are modules of their own, which run on the tokens routed to them only"
                        if bank is None
                        else f"{bank.path} does not compute the sum of its experts' projections in a known way"
                    )
                )
            layers[index] = replace(self.layers[index], down=bank.down(expert), ups=(), gate=None)
            scales[index] = bank.residual_scale
        return replace(
            self,
            layers=tuple(layers),
            residual_scale=tuple(scales),
            additive=tuple(scale == 1.0 for scale in scales),
        )

    def describe(self) -> str:
        """Return a table for people: one line per run of equal layers, paths relative to the layer."""
        lines = [
            f"{self.model_class} ({self.model_type}): {self.num_layers} layers of width {self.hidden_size}"
            f" in {self.layers_path}" + (f" ({self.stack})" if self.is_encoder_decoder else ""),
            f"  embeddings  {self.embeddings}",
            f"  final norm  {self.final_norm or '-'}",
            f"  head        {self.head or '-'}{' (tied)' if self.head_tied else ''}",
        ]
        rows = [["layers", "attention out", "up", "down", "experts", "residual"]]
        spans: list[tuple[int, int, list[str]]] = []
        for layer in self.layers:
            row = self._describe_layer(layer)
            if spans and spans[-1][2] == row:
                spans[-1] = (spans[-1][0], layer.index, row)
            else:
                spans.append((layer.index, layer.index, row))
        rows += [[f"{a}-{b}" if a != b else str(a), *row] for a, b, row in spans]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.logit_lens is not None:
            lines.append(f"  logits = head(final norm(h)): {'yes' if self.logit_lens else 'no'}")
        if not self.checked:
            lines.append("  (not checked on a forward pass)")
        return "\n".join(lines)

    def _describe_layer(self, layer: LayerAnatomy) -> list[str]:
        def short(path: str) -> str:
            return path.removeprefix(layer.path + ".")

        def shape(p: Projection) -> str:
            return f"{short(p.path)} [{p.in_features}->{p.out_features}{'' if p.layout == 'out_in' else ' in_out'}]"

        ups = ", ".join(shape(p) + (" (gate)" if p == layer.gate else "") for p in layer.ups)
        if layer.fused:
            ups += " (fused)"
        residual = "?"
        if self.additive is not None and self.residual_scale is not None:
            scale = self.residual_scale[layer.index]
            if layer.down is None:
                residual = "-"
            elif self.additive[layer.index]:
                residual = "additive"
            else:
                residual = f"scaled by {scale:.4g}" if scale is not None else "not additive"
        return [
            shape(layer.attention_out) if layer.attention_out else "-",
            ups or "-",
            shape(layer.down) if layer.down else "-",
            short(str(layer.experts)) if layer.experts else "-",
            residual,
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as nested plain dictionaries and lists (JSON-compatible)."""
        return dataclasses.asdict(self, dict_factory=_jsonable)


def _jsonable(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in items}


def _ranges(numbers: list[int]) -> str:
    """Write sorted integers as ``0-3, 7``."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in spans)
