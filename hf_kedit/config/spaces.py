"""How configs say what is worth trying: neighbours of a number, and other layers."""

from __future__ import annotations

from collections.abc import Sequence

from .base import ModelProfile

_PLACES = 6
"""Depths at which a window of layers is tried; few enough that every one gets a turn."""


def times(value: float | None, *factors: float) -> list[float]:
    """Multiples of a value, rounded to three digits; none of a value that is switched off."""
    return [] if value is None else [float(f"{value * factor:.3g}") for factor in factors]


def layer_windows(profile: ModelProfile, layers: Sequence[int] | None, traced: Sequence[int]) -> list[list[int]]:
    """Other layers for a method: those that tracing names, then windows of the same width all over the depth.

    The last layer of the model is left out of the windows: what it adds nothing reads but the head.

    Args:
        profile: of the model.
        layers: that the method would take; ``None`` (all of them): no window is like it.
        traced: see `EditConfig.search_space`.

    Returns:
        Lists of layers that have an MLP, each once, the given ones not among them.
    """
    found = [list(traced)] if traced else []
    if layers:
        last = max(profile.num_layers - 1 - len(layers), 0)
        starts = sorted({round(i * last / (_PLACES - 1)) for i in range(_PLACES)})
        # From the middle outwards: the ends of a model are the least likely places.
        starts.sort(key=lambda start: abs(start - last / 2))
        found += [list(range(start, start + len(layers))) for start in starts]
    windows = [profile.with_mlp(window) for window in found]
    return [w for i, w in enumerate(windows) if w and w not in windows[:i] and w != list(layers or ())]
