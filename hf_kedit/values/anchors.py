"""Norm-Anchor Scaling (Liu et al. 2026, arXiv 2602.02543): values keep the norm that they have on the original model.

Values that are solved for on edited weights come out longer, write larger changes, and so make the next ones longer
still. NAS cuts this loop: with ``v₀`` what a layer's MLP adds to the stream at the fact token, each solved value
``v* = v₀ + δ`` is put back to a reference norm ``α``, the mean of ``‖v*‖`` over facts that were solved for on the
original model:

    v* ← α v* / ‖v*‖,   δ ← α (v₀ + δ) / ‖v₀ + δ‖ − v₀
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..engine.capture import Tap
from .optimise import ValuePlace, Values, place_path

if TYPE_CHECKING:
    from ..anatomy import Anatomy


def added_by(anatomy: Anatomy, layer: int, places: ValuePlace | Sequence[ValuePlace]) -> list[Tap]:
    """Where ``v₀`` is seen for values at these places: of a whole block it is the output of its MLP."""
    names = (places,) if isinstance(places, str) else places
    return [Tap(place_path(anatomy, layer, "down" if place == "block" else place)) for place in names]


def solved_values(values: Values, added: Sequence[Tap]) -> torch.Tensor:
    """``v₀ + δ``, ``[requests, places, d]``.

    Args:
        values: with what the taps have seen on the bare prompt (the first row of each request).
        added: see `added_by`.
    """
    before = torch.stack([values.taken[tap][:, 0] for tap in added], dim=1)
    return before.to(values.offsets) + values.offsets


def rescaled(values: Values, added: Sequence[Tap], anchor: torch.Tensor) -> Values:
    """Values whose ``v₀ + δ`` have the norm α; one that nothing is added to stays as it is.

    Args:
        values: as they were found.
        added: see `added_by`.
        anchor: α of every place, ``[places]``.
    """
    solved = solved_values(values, added)
    scale = anchor.to(solved).unsqueeze(-1) / torch.linalg.vector_norm(solved, dim=-1, keepdim=True).clamp_min(1e-12)
    moved = values.offsets + (scale - 1) * solved
    return replace(values, offsets=torch.where(values.offsets.ne(0).any(dim=-1, keepdim=True), moved, values.offsets))
