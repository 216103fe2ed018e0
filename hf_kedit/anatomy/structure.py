"""Finding the parts of a model by its structure: the stack of blocks, their matrices, norm, embeddings and head.

What all supported models have in common: a decoder with a list of N blocks, in each block at least one matrix
H → I and one I → H outside attention, and embeddings and head through the usual transformers accessors. Nothing is
computed, so a model on the meta device will do. There is no table of families; where structure leaves a choice,
usual names decide, and where that fails the caller can name the parts himself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from ..errors import AnatomyError, UnsupportedModelError, nearest
from .projections import BlockReader, Matrix, as_projection, find_matrices, name_parts, relayout, usual_gate
from .types import Anatomy, LayerAnatomy, Layout, MlpUnit, Projection

OVERRIDES = ("layers", "down", "up", "gate", "attn_out", "final_norm", "embed", "head", "layout")
Stack = Literal["decoder", "encoder"]
_FINAL = re.compile(r"final|ln_f|norm_f|^norm$|^ln$")


def resolve_anatomy(
    model: nn.Module, overrides: Mapping[str, str] | None = None, *, stack: Stack = "decoder"
) -> Anatomy:
    """Find out where a model keeps its blocks and what is in them.

    Args:
        model: a transformers model, possibly wrapped by PEFT, ``torch.compile`` or data parallelism. Its weights
            are not read.
        overrides: module names that replace what would be found. ``layers`` is the list of blocks;
            ``down``, ``up``, ``gate`` and ``attn_out`` contain ``{}`` where the layer index goes (``up`` may be
            several names, separated by commas); ``final_norm``, ``embed`` and ``head`` are plain names; ``layout``
            is ``out_in`` or ``in_out`` and says how the MLP's matrices are stored.
        stack: which stack of an encoder-decoder model.

    Returns:
        The anatomy, not yet checked on numbers (see `check_anatomy`).

    Raises:
        AnatomyError: if no stack of blocks is found, or an override is unknown or names no module.
        UnsupportedModelError: if there are blocks but none of them has an MLP.
    """
    return _Resolver(model, _checked_overrides(overrides), stack).resolve()


def unwrap(model: nn.Module) -> nn.Module:
    """Return the transformers model inside wrappers (PEFT, ``torch.compile``, data parallelism)."""
    while True:
        inner: Any = getattr(model, "_orig_mod", None)
        base: Any = getattr(model, "get_base_model", None)
        if inner is None and hasattr(model, "peft_config") and callable(base):
            inner = base()
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def _checked_overrides(overrides: Mapping[str, str] | None) -> dict[str, str]:
    result = dict(overrides or {})
    for key, value in result.items():
        if key not in OVERRIDES:
            raise AnatomyError(f"unknown override {key!r}; known are {', '.join(OVERRIDES)}.{nearest(key, OVERRIDES)}")
        if not isinstance(value, str) or not value:
            raise AnatomyError(f"override {key!r} must be a module name, not {value!r}")
        if key in ("down", "up", "gate", "attn_out") and "{}" not in value:
            raise AnatomyError(
                f"override {key!r} needs {{}} where the layer index goes, e.g. 'model.layers.{{}}.mlp.down_proj';"
                f" got {value!r}"
            )
    layout = result.get("layout")
    if layout is not None and layout not in ("out_in", "in_out"):
        raise AnatomyError(f"override 'layout' must be 'out_in' (nn.Linear) or 'in_out' (Conv1D), not {layout!r}")
    return result


class _Resolver:
    """One look at one model; see `resolve_anatomy`."""

    def __init__(self, model: nn.Module, overrides: dict[str, str], stack: Stack):
        self.outer, self.overrides, self.stack = model, overrides, stack
        self.model = unwrap(model)
        self.config: Any = getattr(self.model, "config", None)
        self.both = bool(getattr(self.config, "is_encoder_decoder", False))
        if stack not in ("decoder", "encoder"):
            raise AnatomyError(f"stack must be 'decoder' or 'encoder', not {stack!r}")
        if stack == "encoder" and not self.both:
            raise AnatomyError(f"{type(self.model).__name__} is not an encoder-decoder model: it has one stack only")
        self.names: dict[int, str] = {}
        for name, module in model.named_modules():
            self.names.setdefault(id(module), name)
        self.text_config = self._text_config()
        self.searched: list[str] = []

    def resolve(self) -> Anatomy:
        """Put the parts together."""
        hidden = self._hidden_size()
        root = self._stack_root()
        layers_path, blocks = self._blocks(root, hidden)
        if len({id(block) for block in blocks}) < len(blocks):
            raise UnsupportedModelError(
                f"'{layers_path}' of {type(self.model).__name__} holds the same block several times: an edit of one"
                " layer would act in others"
            )
        family = self._family(blocks)
        layers = [
            BlockReader(block, f"{layers_path}.{name}", i, hidden, family).read()
            for i, (name, block) in enumerate(blocks._modules.items())
            if block is not None
        ]
        layers = [self._override_layer(layer) for layer in layers]
        if not any(layer.units or layer.experts or layer.down for layer in layers):
            raise UnsupportedModelError(self._no_mlp_message(layers_path, layers, hidden))
        embeddings = self._embeddings()
        head = self._head()
        return Anatomy(
            model_class=type(self.model).__name__,
            model_type=getattr(self.config, "model_type", None),
            hidden_size=hidden,
            num_layers=len(layers),
            layers_path=layers_path,
            layers=tuple(layers),
            final_norm=self._final_norm(root, layers_path),
            embeddings=embeddings,
            head=head,
            is_encoder_decoder=self.both,
            head_tied=self._tied(embeddings, head),
            stack=self.stack,
        )

    # ------------------------------------------------------------------ configuration

    def _text_config(self) -> Any:
        config = self.config
        get = getattr(config, "get_text_config", None)
        if get is None:
            return config
        try:
            return get(decoder=True) if self.stack == "decoder" else get(encoder=True)
        except (ValueError, TypeError, AttributeError):  # several candidates, or an old configuration
            try:
                return get()
            except (ValueError, TypeError, AttributeError):
                return config

    def _read(self, *names: str) -> int | None:
        for config in (self.text_config, self.config):
            for name in names:
                value = getattr(config, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    def _hidden_size(self) -> int:
        size = self._read("hidden_size", "d_model", "n_embd", "dim")
        if size is None:
            weight = getattr(self._get_embeddings(), "weight", None)
            size = int(weight.shape[-1]) if weight is not None else None
        if size is None:
            raise AnatomyError(
                f"{type(self.model).__name__}: the configuration names no hidden size (hidden_size, d_model, n_embd)"
                " and the model has no token embeddings"
            )
        return size

    def _depth(self) -> int | None:
        if self.both and self.stack == "decoder":
            depth = self._read("num_decoder_layers", "decoder_layers")
            if depth:
                return depth
        if self.both and self.stack == "encoder":
            depth = self._read("encoder_layers", "num_encoder_layers", "num_layers")
            if depth:
                return depth
        return self._read("num_hidden_layers", "n_layer", "num_layers", "n_layers")

    # ------------------------------------------------------------------ the stack

    def _stack_root(self) -> nn.Module:
        """The module that holds the stack: the accessor asked again and again, as BLIP-2 answers with a whole LM."""
        name = "get_decoder" if self.stack == "decoder" else "get_encoder"
        root: Any = self.model
        seen: set[int] = set()
        while id(root) not in seen:
            seen.add(id(root))
            try:
                inner = getattr(root, name)()
            except (AttributeError, NotImplementedError, TypeError):
                break
            if isinstance(inner, nn.Module) and id(inner) in self.names:
                root = inner
        if root is self.model:
            root = getattr(self.model, "base_model", self.model)
        return root if isinstance(root, nn.Module) and id(root) in self.names else self.model

    def _path(self, module: nn.Module) -> str:
        return self.names[id(module)]

    def _module(self, path: str, key: str) -> nn.Module:
        try:
            return self.outer.get_submodule(path)
        except AttributeError:
            hint = nearest(path, [n for n in self.names.values() if n])
            raise AnatomyError(
                f"override {key!r}: {type(self.model).__name__} has no module {path!r}.{hint}"
            ) from None

    def _blocks(self, root: nn.Module, hidden: int) -> tuple[str, nn.ModuleList]:
        if "layers" in self.overrides:
            path = self.overrides["layers"].removesuffix(".{}")
            module = self._module(path, "layers")
            if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
                raise AnatomyError(f"override 'layers': {path!r} is a {type(module).__name__}, not a list of blocks")
            return path, module  # type: ignore[return-value]
        depth = self._depth()
        candidates = self._candidate_lists(root)
        if not candidates and root is not self.model:
            candidates = self._candidate_lists(self.model)
        exact = [c for c in candidates if len(c[1]) == depth]
        if exact:
            level = min(c[0].count(".") for c in exact)
            pool = [c for c in exact if c[0].count(".") == level]
        else:
            longest = max((len(c[1]) for c in candidates), default=0)
            pool = [c for c in candidates if len(c[1]) == longest]
            pool = [c for c in pool if c[0].count(".") == min(p[0].count(".") for p in pool)]
        plain = [c for c in pool if "cross" not in c[0].lower()] or pool
        both = [c for c in plain if self._has_attention_and_mlp(c[1], c[0], hidden)]
        if len(plain) > 1 and not both:
            raise AnatomyError(
                f"{type(self.model).__name__} keeps its layers in several lists of which none holds whole blocks:"
                f" {', '.join(c[0] for c in plain)}. hf_kedit needs one list of blocks with attention and MLP;"
                " if there is one, name it with the override 'layers'."
            )
        chosen = (both or plain)[:1]
        if not chosen:
            seen = ", ".join(self.searched) or "no lists at all"
            raise AnatomyError(
                f"no list of {depth if depth is not None else 'N'} blocks found in {type(self.model).__name__} below"
                f" '{self._path(root) or type(root).__name__}' (looked at {seen}; a block holds at least two"
                " matrices). Name it with the override 'layers'."
            )
        return chosen[0]

    def _candidate_lists(self, root: nn.Module) -> list[tuple[str, nn.ModuleList]]:
        """Module lists below ``root`` whose members hold at least two matrices each."""
        prefix = self._path(root)
        lists = []
        for name, module in root.named_modules():
            if not isinstance(module, nn.ModuleList) or not len(module):
                continue
            path = f"{prefix}.{name}" if prefix and name else prefix or name
            self.searched.append(f"{path} ({len(module)})")
            if all(_holds_two(child) for child in module):
                lists.append((path, module))
        return lists

    def _has_attention_and_mlp(self, blocks: nn.ModuleList, path: str, hidden: int) -> bool:
        family = self._family(blocks)
        layers = [
            BlockReader(block, f"{path}.{i}", i, hidden, family).read() for i, block in enumerate(blocks.children())
        ]
        return any(layer.attention_out and (layer.down or layer.experts or layer.units) for layer in layers)

    def _family(self, blocks: nn.ModuleList) -> tuple[str, ...]:
        """Words that the class names of the model and its first block have in common at the front."""
        ours, theirs = name_parts(type(self.model).__name__), name_parts(type(next(iter(blocks.children()))).__name__)
        shared = []
        for a, b in zip(ours, theirs, strict=False):
            if a != b:
                break
            shared.append(a)
        return tuple(shared)

    def _no_mlp_message(self, path: str, layers: list[LayerAnatomy], hidden: int) -> str:
        return (
            f"no layer of {type(self.model).__name__} ('{path}', {len(layers)} layers) has an MLP: a matrix"
            f" {hidden} -> I with one I -> {hidden} outside attention and recurrent or state-space mixers."
            " If there is one, name it with the overrides 'up' and 'down'."
            f" Matrices of the first layer:\n{layers[0].list_projections() if layers else '  (none)'}"
        )

    # ------------------------------------------------------------------ overrides inside a layer

    def _override_layer(self, layer: LayerAnatomy) -> LayerAnatomy:
        layout: Layout | None = self.overrides.get("layout")  # type: ignore[assignment]
        if not any(key in self.overrides for key in ("down", "up", "gate", "attn_out", "layout")):
            return layer
        if "attn_out" in self.overrides:
            out = self._override_projection("attn_out", layer.index)
            parent = out.path.removesuffix(".base_layer").rsplit(".", 1)[0]
            layer = replace(layer, attention_out=out, attention=parent if parent != layer.path else None)
        if not any(key in self.overrides for key in ("down", "up", "gate", "layout")):
            return layer
        down, ups, gate = layer.down, layer.ups, layer.gate
        if "down" in self.overrides:
            down = self._override_projection("down", layer.index)
            if "up" not in self.overrides and layer.down is not None and down.path != layer.down.path:
                unit = next((u for u in layer.units if u.down.path == down.path), None)
                ups, gate = (unit.ups, usual_gate(unit)) if unit is not None else ((), None)
        if "up" in self.overrides:
            names = [n.strip() for n in self.overrides["up"].split(",")]
            ups = tuple(self._override_projection("up", layer.index, name) for name in names)
            gate = None
        if "gate" in self.overrides:
            gate = self._override_projection("gate", layer.index)
            if all(p.path != gate.path for p in ups):
                ups = (gate, *ups)
        if layout is not None:
            down = relayout(down, layout) if down is not None else None
            ups = tuple(relayout(p, layout) for p in ups)
            gate = relayout(gate, layout) if gate is not None else None
        if down is None:
            return layer
        fused = len(ups) == 1 and ups[0].out_features == 2 * down.in_features
        gated = fused or len(ups) > 1
        if gated and not fused and gate is None:
            gate = usual_gate(MlpUnit("dense", None, down, ups, True, False))
        matrices = [Matrix(p.path.removeprefix(layer.path + "."), p, ()) for p in (down, *ups)]
        block = self.outer.get_submodule(layer.path)
        mlp = BlockReader(block, layer.path, layer.index, self._hidden_size())._common(matrices)
        unit = MlpUnit("dense", mlp, down, ups, gated, fused)
        others = tuple(u for u in layer.units if u.down.path != down.path)
        return replace(layer, mlp=mlp, down=down, ups=ups, gate=gate, gated=gated, fused=fused, units=(unit, *others))

    def _override_projection(self, key: str, index: int, pattern: str | None = None) -> Projection:
        path = (pattern or self.overrides[key]).replace("{}", str(index))
        module = self._module(path, key)
        while isinstance(getattr(module, "base_layer", None), nn.Module):
            module, path = module.base_layer, f"{path}.base_layer"  # type: ignore[assignment]
        projection = as_projection(module, path)
        if projection is None:
            inside = ", ".join(m.projection.path for m in find_matrices(module, path)[:8])
            raise AnatomyError(
                f"override {key!r}: {path!r} is a {type(module).__name__}, not one matrix."
                + (f" Matrices inside it: {inside}" if inside else "")
            )
        return projection

    # ------------------------------------------------------------------ around the stack

    def _final_norm(self, root: nn.Module, layers_path: str) -> str | None:
        if "final_norm" in self.overrides:
            self._module(self.overrides["final_norm"], "final_norm")
            return self.overrides["final_norm"]
        # A norm named after the embeddings mostly belongs to them; where it does not (LFM2), the self-check sees it.
        norms = [n for n in norm_candidates(self.outer, layers_path, self._path(root)) if "emb" not in _last(n)]
        usual = [n for n in norms if _FINAL.search(_last(n))]
        return (usual or norms or [None])[-1]  # type: ignore[list-item]

    def _get_embeddings(self) -> nn.Module | None:
        owners: tuple[Any, ...] = (self.model, getattr(self.model, "base_model", None))
        for owner in owners:
            try:
                embeddings = owner.get_input_embeddings()
            except (AttributeError, NotImplementedError):
                continue
            if isinstance(embeddings, nn.Module) and id(embeddings) in self.names:
                return embeddings
        return None

    def _embeddings(self) -> str:
        if "embed" in self.overrides:
            self._module(self.overrides["embed"], "embed")
            return self.overrides["embed"]
        embeddings = self._get_embeddings()
        if embeddings is None:
            raise AnatomyError(
                f"{type(self.model).__name__} does not say which module its token embeddings are"
                " (get_input_embeddings); name it with the override 'embed'"
            )
        return self._path(embeddings)

    def _head(self) -> str | None:
        if "head" in self.overrides:
            self._module(self.overrides["head"], "head")
            return self.overrides["head"]
        try:
            head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError, TypeError):
            head = None
        if isinstance(head, nn.Module) and id(head) in self.names:
            return self._path(head)
        usual = re.compile(r"^(lm_head|embed_out|output_layer|output|head)$")
        vocab = self._read("vocab_size", "padded_vocab_size")
        for name, module in self.model.named_modules():
            if usual.match(name.rsplit(".", 1)[-1]):
                projection = as_projection(module, name)
                if projection is not None and projection.out_features == vocab:
                    return self._path(module)
        return None

    def _tied(self, embeddings: str, head: str | None) -> bool:
        if head is None:
            return False
        ours = getattr(self.outer.get_submodule(embeddings), "weight", None)
        theirs = getattr(self.outer.get_submodule(head), "weight", None)
        return ours is not None and ours is theirs


def norm_candidates(model: nn.Module, layers_path: str, root: str = "") -> list[str]:
    """Names of normalisations beside the list of blocks, or beside one of its parents up to ``root``.

    Args:
        model: the model.
        layers_path: the list of blocks.
        root: module where the search ends.
    """
    path = layers_path
    while "." in path or path:
        path = path.rsplit(".", 1)[0] if "." in path else ""
        owner = model.get_submodule(path) if path else model
        candidates = [
            f"{path}.{name}" if path else name
            for name, child in owner.named_children()
            if "norm" in type(child).__name__.lower()
        ]
        if candidates or path == root:
            return candidates
    return []


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1].lower()


def _holds_two(module: nn.Module) -> bool:
    """Whether a module contains at least two matrices (3-D expert weights count)."""
    count = 0
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2 and "norm" not in name:
            count += 1
        if count >= 2:
            return True
    # Packed weights of quantised layers may be buffers.
    return sum(1 for m in module.modules() if isinstance(getattr(m, "in_features", None), int)) >= 2
