"""The settings of the decodings, as dataclasses that are checked when they are made and saved with edits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..errors import ConfigError, LayerError, nearest, shown


@dataclass(frozen=True)
class Decoding:
    """What both decodings have in common.

    A layer is named by its place among transformers' ``hidden_states``: 0 stands for the embeddings, j for the output
    of the j-th block.
    """

    name: ClassVar[str]

    def premature_layers(self, num_layers: int, head_tied: bool) -> list[int]:
        """The layers whose logits are looked at.

        Args:
            num_layers: blocks of the model.
            head_tied: whether its head shares the weight of the embeddings.

        Raises:
            LayerError: if there is no such layer, or none below the last one.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The settings with their name, as JSON knows them."""
        return {"name": self.name, **dataclasses.asdict(self)}


def _check_fraction(name: str, value: Any, *, zero: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 1
    if not (good and (value > 0 or (zero and value == 0))):
        raise ConfigError(f"{name} must be {'at least' if zero else 'above'} 0 and at most 1, not {shown(value)}")


def _check_layers(layers: Any, num_layers: int) -> list[int]:
    """Layers as a list without doubles.

    Raises:
        LayerError: naming the one that does not exist.
    """
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise LayerError(
                f"layer {layer} is none below the last one: valid are 0 (the embeddings) to {num_layers - 1}"
            )
    return sorted(set(layers))


def _as_tuple(layers: Any) -> tuple[int, ...]:
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
        raise ConfigError(f"layers must be a list of layers, not {shown(layers)}")
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise ConfigError(f"layers must be integers, not {shown(layers)}")
    return tuple(layers)


@dataclass(frozen=True)
class DoLaConfig(Decoding):
    """DoLa (arXiv 2309.03883): what the last layer says beyond what an earlier one already said.

    Args:
        layers: candidates for the premature layer: ``"high"``, every second layer of the upper half (of the last
            twenty in models of more than 40), for short answers; ``"low"``, of the lower half (of the first twenty),
            for long answers and reasoning; or the layers themselves. With one the layer is fixed (static DoLa).
        alpha: a token is a candidate if its probability is at least this share of the most probable one's.
        early_norm: apply the final norm to an earlier layer's state before the head. The published code does not.
        divergence: ``"exact"``: the Jensen-Shannon divergence, each row and position by itself; ``"released"``: as the
            published code computes it, one layer for a whole batch.

    Raises:
        ConfigError: for a value out of range.
    """

    name: ClassVar[str] = "dola"

    layers: Literal["high", "low"] | Sequence[int] = "high"
    alpha: float = 0.1
    early_norm: bool = False
    divergence: Literal["exact", "released"] = "exact"

    def __post_init__(self) -> None:
        if self.layers not in ("high", "low"):
            if isinstance(self.layers, str):
                raise ConfigError(f"layers must be 'high', 'low' or a list of layers, not {shown(self.layers)}")
            object.__setattr__(self, "layers", _as_tuple(self.layers))
        _check_fraction("alpha", self.alpha)
        if not isinstance(self.early_norm, bool):
            raise ConfigError(f"early_norm must be true or false, not {shown(self.early_norm)}")
        if self.divergence not in ("exact", "released"):
            raise ConfigError(f"divergence must be 'exact' or 'released', not {shown(self.divergence)}")

    def premature_layers(self, num_layers: int, head_tied: bool) -> list[int]:
        """See `Decoding.premature_layers`."""
        if not isinstance(self.layers, str):
            return _check_layers(self.layers, num_layers)
        middle, deep = num_layers // 2, num_layers > 40
        if self.layers == "high":
            return list(range(num_layers - 20 if deep else middle, num_layers, 2))
        # With tied embeddings layer 0 says nothing but the token that was read: its own row of the head.
        first = min(2, num_layers - 1) if head_tied else 0
        return list(range(first, 20 if deep else middle, 2)) or [first]


@dataclass(frozen=True)
class DeCoConfig(Decoding):
    """DeCo (arXiv 2410.11779): add what an upper layer, which is surest of one candidate, says about the candidates.

    Args:
        layers: layers among which the surest is chosen; ``None``: from 62 % to 88 % of the depth, which are layers 20
            to 28 of the 32 for which the paper gives them.
        weight: λ, how much of the chosen layer's logits is added, times its probability.
        top_p: candidates are the fewest tokens that the last layer gives this probability together,
        top_k: and at most so many.

    Raises:
        ConfigError: for a value out of range.
    """

    name: ClassVar[str] = "deco"

    layers: Sequence[int] | None = None
    weight: float = 0.6
    top_p: float = 0.9
    top_k: int = 20

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", _as_tuple(self.layers))
        _check_fraction("top_p", self.top_p)
        number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not (number and math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"weight must be a number of at least 0, not {shown(self.weight)}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1:
            raise ConfigError(f"top_k must be an integer of at least 1, not {shown(self.top_k)}")

    def premature_layers(self, num_layers: int, head_tied: bool) -> list[int]:
        """See `Decoding.premature_layers`."""
        if self.layers is not None:
            return _check_layers(self.layers, num_layers)
        first = min(math.ceil(0.62 * num_layers), num_layers - 1)
        return list(range(first, max(math.floor(0.88 * num_layers), first) + 1))


DECODINGS: dict[str, type[DoLaConfig] | type[DeCoConfig]] = {"dola": DoLaConfig, "deco": DeCoConfig}
"""The decodings by name."""


def decoding_of(decoding: Decoding | str | Mapping[str, Any], **settings: Any) -> Decoding:
    """The settings of a decoding.

    Args:
        decoding: settings; or a name (``"dola"``, ``"deco"``), if wanted with layers (``"dola:low"``,
            ``"deco:18,20,22"``); or what `Decoding.to_dict` gave.
        settings: fields of `DoLaConfig` or `DeCoConfig`, with a name only.

    Raises:
        ConfigError: for an unknown name or field, or a value out of range.
    """
    if isinstance(decoding, Decoding):
        if settings:
            raise ConfigError("give a decoding's settings, or its name with settings, not both")
        return decoding
    if isinstance(decoding, str) and ":" in decoding:
        decoding, _, layers = decoding.partition(":")
        settings = {"layers": _parse_layers(layers.strip()), **settings}
    if isinstance(decoding, Mapping):
        settings = {**decoding, **settings}
        decoding = settings.pop("name", "")
    kind = DECODINGS.get(decoding.strip().lower()) if isinstance(decoding, str) else None
    if kind is None:
        raise ConfigError(f"unknown decoding {shown(decoding)}; known are {', '.join(DECODINGS)}")
    names = [field.name for field in dataclasses.fields(kind)]
    for name in settings:
        if name not in names:
            raise ConfigError(f"{kind.name} has no setting {shown(name)}.{nearest(str(name), names)}")
    return kind(**settings)


def _parse_layers(text: str) -> Any:
    """``"14,16"`` as a list; words as they are."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [int(part) for part in parts] if parts and all(part.isdecimal() for part in parts) else text
