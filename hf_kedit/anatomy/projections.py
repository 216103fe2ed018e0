"""The matrices of one block and what they are for, from shapes and the module tree.

No family is known by name. Usual names (``o_proj``, ``gate``, ``shared`` …) only decide where shapes leave
several answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from .types import ExpertBank, LayerAnatomy, Layout, MlpUnit, Projection, Role

# Sequence mixers whose in/out projections look like an MLP. Whole words only: "SeedOss" contains "ssm" nowhere
# but "SeedOssMLP", lower-cased, does.
_ALWAYS_MIXER = frozenset({"mamba", "ssm", "rwkv", "xlstm", "mlstm", "slstm"})
# The same, but also part of family names (RecurrentGemmaMlp), so not counted inside the family's own prefix.
_MIXER = frozenset({"conv", "conv1d", "convolution", "recurrent"})
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_BLOCK_CLASS = re.compile(r"(Block|Layer)$")
_USUAL_OUT = re.compile(r"^(o_proj|out_proj|c_proj|dense|o|wo|proj|out|out_lin|output|linear_out)$")
_USUAL_DOWN = re.compile(r"down|^(c_proj|fc_out|fc2|wo|w_out|dense_4h_to_h|output|lin2|linear2|output_linear)$")
_ROUTER_NAME = re.compile(r"^(gate|router|gating|shared_expert_gate|shared_experts_gate|.*_router)$")
_ROUTER_CLASS = re.compile(r"Router|TopK|MoEGate|MoeGate|GatingNetwork")
_GATE_NAME = re.compile(r"^(gate|w1|wi_0|gate_proj|linear_gate|w_0)$|gate")
_AUXILIARY = re.compile(r"adapter|laurel|altup|per_layer|lora|engram|hyper_connection|altern")
_LIST_EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")


@dataclass(frozen=True)
class Matrix:
    """A matrix and where it sits: its name relative to the block, and its ancestors inside the block."""

    name: str
    projection: Projection
    ancestors: tuple[tuple[str, nn.Module], ...]  # (relative name, module), outermost first, without the block

    @property
    def last(self) -> str:
        """Last component of the name."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def parent(self) -> str:
        """Relative name of the module that holds it, ``""`` for the block."""
        return self.name.rsplit(".", 1)[0] if "." in self.name else ""


def name_parts(name: str) -> list[str]:
    """Split a CamelCase or snake_case name into lower-case words: ``Qwen3NextMLP`` → qwen, 3, next, mlp."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return [p.lower() for p in parts]


def as_projection(module: nn.Module, path: str) -> Projection | None:
    """Describe a module that is one matrix; ``None`` for anything else (embeddings, norms, 3-D weights)."""
    if isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower():
        return None
    weight = getattr(module, "weight", None)
    has_bias = getattr(module, "bias", None) is not None
    if isinstance(module, Conv1D):
        return Projection(path, "in_out", int(weight.shape[0]), int(module.nf), has_bias)  # type: ignore[union-attr]
    in_features, out_features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(in_features, int) and isinstance(out_features, int):
        # Sizes are attributes of quantised linear layers too, whose packed weight has another shape.
        if getattr(weight, "dim", int)() == 3:
            return None
        return Projection(path, "out_in", in_features, out_features, has_bias)
    own = module._parameters.get("weight")
    if own is not None and own.dim() == 2:
        return Projection(path, "out_in", int(own.shape[1]), int(own.shape[0]), has_bias)
    return None


def find_matrices(block: nn.Module, path: str) -> list[Matrix]:
    """All matrices below a block in order of registration, PEFT wrappers replaced by what they wrap."""
    return list(_walk(block, "", path, ()))


def _walk(module: nn.Module, name: str, path: str, ancestors: tuple[tuple[str, nn.Module], ...]) -> Iterator[Matrix]:
    base = getattr(module, "base_layer", None)
    while isinstance(base, nn.Module):  # wrappers may be nested
        module, path = base, f"{path}.base_layer"
        base = getattr(module, "base_layer", None)
    projection = as_projection(module, path) if name else None
    if projection is not None:
        yield Matrix(name, projection, ancestors)
        return
    inside = (*ancestors, (name, module)) if name else ()
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, f"{path}.{child_name}", inside)


class BlockReader:
    """Reads one block.

    Args:
        block: the module.
        path: its name in the model.
        index: its position.
        hidden: width of the residual stream.
        family: words that the family's class names begin with.
    """

    def __init__(self, block: nn.Module, path: str, index: int, hidden: int, family: tuple[str, ...] = ()):
        self.block, self.path, self.index, self.hidden, self.family = block, path, index, hidden, family
        self.matrices = find_matrices(block, path)

    def read(self) -> LayerAnatomy:
        """Return what the block's matrices are for."""
        block_class = type(self.block).__name__
        if _ATTENTION.search(block_class) and not _BLOCK_CLASS.search(block_class):
            return LayerAnatomy(self.index, self.path, projections=tuple(m.projection for m in self.matrices))
        attention = [m for m in self.matrices if self._attention_of(m) is not None and not self._is_mixer(m)]
        out = self._attention_output(attention)
        taken = {m.name for m in attention}
        rest = [m for m in self.matrices if m.name not in taken and not self._is_mixer(m)]
        banks = self._expert_banks()
        units = self._units(rest, bool(banks))
        main = self._main(units)
        layer = LayerAnatomy(
            self.index,
            self.path,
            attention=self._full(self._attention_of(out)) if out is not None else None,
            attention_out=out.projection if out is not None else None,
            experts=banks[0] if banks else None,
            units=tuple(units),
            projections=tuple(m.projection for m in self.matrices),
        )
        if main is None:
            return replace(layer, mlp=self._parent_of_bank(banks[0]) if banks else None)
        return replace(
            layer,
            mlp=main.path,
            down=main.down,
            ups=main.ups,
            gate=usual_gate(main),
            gated=main.gated,
            fused=main.fused,
        )

    # ------------------------------------------------------------------ attention

    def _attention_of(self, matrix: Matrix) -> str | None:
        """Relative name of the innermost ancestor that is an attention module."""
        for name, module in reversed(matrix.ancestors):
            class_name = type(module).__name__
            own = name.rsplit(".", 1)[-1]
            if _ATTENTION.search(own) and not re.search(r"norm|mlp|ffn|feed", own):
                return name
            if _ATTENTION.search(class_name) and not _BLOCK_CLASS.search(class_name):
                return name
        return None

    def _attention_output(self, matrices: list[Matrix]) -> Matrix | None:
        outputs = [m for m in matrices if m.projection.out_features == self.hidden]
        # A decoder block of an encoder-decoder has a second attention, over the encoder.
        own = [m for m in outputs if not is_cross(m)] or outputs
        usual = [m for m in own if _USUAL_OUT.match(m.last)]
        return (usual or own or [None])[-1]  # type: ignore[list-item]

    # ------------------------------------------------------------------ MLP units

    def _is_mixer(self, matrix: Matrix) -> bool:
        for name, module in matrix.ancestors:
            class_words = name_parts(type(module).__name__)
            stripped = class_words
            if class_words[: len(self.family)] == list(self.family):
                stripped = class_words[len(self.family) :]
            own = name_parts(name.rsplit(".", 1)[-1])
            if _ALWAYS_MIXER & {*class_words, *own}:
                return True
            if _MIXER & {*stripped, *own}:
                return True
        return False

    def _is_router(self, matrix: Matrix) -> bool:
        return bool(_ROUTER_NAME.match(matrix.last)) or any(
            _ROUTER_CLASS.search(type(module).__name__) for name, module in matrix.ancestors if name == matrix.parent
        )

    def _units(self, matrices: list[Matrix], has_bank: bool) -> list[MlpUnit]:
        groups: dict[str, list[Matrix]] = {}
        for m in matrices:
            groups.setdefault(m.parent, []).append(m)
        units = [unit for group in groups.values() for unit in self._pair(group)]
        if not has_bank and all(_AUXILIARY.search(self._short(u.down)) for u in units):
            # Up and down have different parents (intermediate/output): look below common ancestors, deepest first.
            used = {p.path for u in units for p in (u.down, *u.ups)}
            left = [m for m in matrices if m.projection.path not in used and not _AUXILIARY.search(m.name)]
            above = {name for m in left for name, _ in m.ancestors} | {""}
            for name in sorted(above, key=lambda n: -n.count(".") if n else 1):
                more = self._pair([m for m in left if not name or m.name.startswith(name + ".")])
                if more:
                    units += more
                    break
        return self._with_roles(units, has_bank)

    def _pair(self, group: list[Matrix]) -> list[MlpUnit]:
        """Find ``down`` (out = H) with the matrices into it (in = H, out = I, or 2·I when fused) in a group."""
        usable = [m for m in group if not self._is_router(m)]
        # A projection called "gate" beside one of the same shape is a gate, not a router.
        usable += [
            m
            for m in group
            if m not in usable
            and sum(u.projection.out_features == m.projection.out_features for u in usable) == 1
            and m.projection.out_features != self.hidden
        ]
        usable.sort(key=group.index)
        candidates: list[tuple[Matrix, list[Matrix], bool]] = []
        for down in usable:
            if down.projection.out_features != self.hidden:
                continue
            inner = down.projection.in_features
            into = [m for m in usable if m is not down and m.projection.in_features == self.hidden]
            ups = [m for m in into if m.projection.out_features == inner]
            double = [m for m in into if m.projection.out_features == 2 * inner]
            if ups:
                candidates.append((down, ups, False))
            elif double:
                candidates.append((down, double[:1], True))
        if not candidates:
            return []
        square = [c for c in candidates if c[0].projection.in_features == self.hidden]
        if square:  # I = H: every matrix qualifies as down; one unit, its output projection comes last
            usual = [c for c in square if _USUAL_DOWN.search(c[0].last)]
            keep = (usual or square)[-1]
            candidates = [c for c in candidates if c[0].projection.in_features != self.hidden] + [keep]
        units = []
        for down, ups, fused in candidates:
            ups = sorted(ups, key=group.index)
            units.append(
                MlpUnit(
                    role="dense",
                    path=self._common([down, *ups]),
                    down=down.projection,
                    ups=tuple(m.projection for m in ups),
                    gated=fused or len(ups) > 1,
                    fused=fused,
                )
            )
        return units

    def _with_roles(self, units: list[MlpUnit], has_bank: bool) -> list[MlpUnit]:
        roles: list[Role] = []
        for unit in units:
            name = self._short(unit.down)
            if _LIST_EXPERT.search(name):
                roles.append("expert")
            elif "shared" in name and (has_bank or any(_LIST_EXPERT.search(u.down.path) for u in units)):
                roles.append("shared")
            elif _AUXILIARY.search(name):
                roles.append("auxiliary")
            else:
                roles.append("dense")
        dense = [u for u, role in zip(units, roles, strict=True) if role == "dense"]
        largest = max(dense, key=lambda u: u.down.in_features, default=None)
        return [
            replace(u, role="auxiliary" if role == "dense" and u is not largest else role)
            for u, role in zip(units, roles, strict=True)
        ]

    @staticmethod
    def _main(units: list[MlpUnit]) -> MlpUnit | None:
        main = [u for u in units if u.role in ("dense", "shared")]
        return max(main, key=lambda u: u.down.in_features, default=None)

    # ------------------------------------------------------------------ fused experts

    def _expert_banks(self) -> list[ExpertBank]:
        banks = []
        for name, module in self.block.named_modules():
            three = {k: p for k, p in module._parameters.items() if p is not None and p.dim() == 3}
            if len(three) < 2:  # modules that hold one 3-D weight each, side by side
                three = {
                    f"{child_name}.weight": child._parameters["weight"]
                    for child_name, child in module.named_children()
                    if getattr(child._parameters.get("weight"), "dim", int)() == 3
                }
            full = f"{self.path}.{name}" if name else self.path
            bank = self._bank(full, module, {k: tuple(p.shape) for k, p in three.items() if p is not None})
            if bank is not None and not _ATTENTION.search(name):
                banks.append(bank)
        return banks

    def _bank(self, path: str, module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> ExpertBank | None:
        h = self.hidden
        declared = getattr(module, "is_transposed", None)
        has_gate = getattr(module, "has_gate", None)
        banks: list[tuple[int, ExpertBank]] = []
        for down, (experts, a, b) in shapes.items():
            for transposed in (False, True):
                inner, outer = (a, b) if transposed else (b, a)
                if outer != h or (declared is not None and bool(declared) != transposed):
                    continue
                same, double = [], []
                for up, (count, c, d) in shapes.items():
                    into, out = (c, d) if transposed else (d, c)
                    if up == down or count != experts or into != h:
                        continue
                    if out == inner:
                        same.append(up)
                    elif out == 2 * inner:
                        double.append(up)
                if (not same and not double) or (has_gate and not double and len(same) < 2):
                    continue
                named_down = bool(_USUAL_DOWN.search(down.split(".")[0])) or down.startswith("output")
                score = 4 * named_down + 2 * bool(double) + (not transposed)
                gate = next((n for n in same if _GATE_NAME.search(n)), same[0]) if len(same) > 1 else None
                up_name = double[0] if double and not same else next(n for n in same if n != gate)
                banks.append(
                    (
                        score,
                        ExpertBank(
                            path=path,
                            down_param=down,
                            up_param=up_name,
                            num_experts=experts,
                            in_features=inner,
                            out_features=outer,
                            transposed=transposed,
                            gated=bool(has_gate) if has_gate is not None else bool(double) or gate is not None,
                            interleaved=not getattr(module, "is_concatenated", True),
                            gate_param=gate,
                        ),
                    )
                )
        return max(banks, key=lambda f: f[0])[1] if banks else None

    def _parent_of_bank(self, bank: ExpertBank) -> str | None:
        """The MLP module around a bank: its parent below the block, or the bank itself."""
        name = bank.path.removeprefix(self.path + ".")
        return self._full(name.rsplit(".", 1)[0] if "." in name else name)

    # ------------------------------------------------------------------ names

    def _short(self, projection: Projection) -> str:
        return projection.path.removeprefix(self.path + ".")

    def _full(self, name: str | None) -> str | None:
        return None if name is None else f"{self.path}.{name}"

    def _common(self, matrices: list[Matrix]) -> str | None:
        """Full name of the deepest module that contains all of ``matrices``; ``None`` for the block itself."""
        split = [m.parent.split(".") if m.parent else [] for m in matrices]
        shared: list[str] = []
        for parts in zip(*split, strict=False):
            if len(set(parts)) > 1:
                break
            shared.append(parts[0])
        return self._full(".".join(shared)) if shared else None


def is_cross(matrix: Matrix) -> bool:
    """Whether a matrix belongs to attention over another sequence."""
    text = ".".join([matrix.name, *(type(module).__name__ for _, module in matrix.ancestors)])
    return bool(re.search(r"cross|encdec|enc_dec|encoder_attn|inter_attention", text, re.IGNORECASE))


def usual_gate(unit: MlpUnit) -> Projection | None:
    """Guess by name which of several up projections is the gate; the self-check looks at the numbers."""
    if not unit.gated or unit.fused:
        return None
    return next((p for p in unit.ups if _GATE_NAME.search(p.name)), None)


def relayout(projection: Projection, layout: Layout) -> Projection:
    """Return the projection read in another layout; input and output sizes change places if it differs."""
    if projection.layout == layout:
        return projection
    return replace(
        projection,
        layout=layout,
        in_features=projection.out_features,
        out_features=projection.in_features,
    )
