"""What a model makes of pictures: the mean of the vectors that enter its first block at a picture's places.

That is all that the language model gets of a picture, in its own terms: two pictures of one thing are near each other,
whatever the size and the light.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .capture import Tap, states_of
from .forward import image_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..anatomy import Anatomy


def looks_of(model: PreTrainedModel, anatomy: Anatomy, inputs: Mapping[str, Any]) -> list[torch.Tensor | None]:
    """What the pictures of each row of a call look like, ``[d]`` fp32 on the CPU; ``None`` without any.

    Args:
        model: decoder-only, in evaluation mode.
        anatomy: of the model.
        inputs: ids and mask, and what belongs to the pictures of all rows.
    """
    ids = inputs["input_ids"]
    where = torch.isin(ids, torch.tensor(sorted(image_ids(model))).to(ids))
    if not bool(where.any()):
        return [None] * len(where)
    states = states_of(model, inputs, _first_sight(model, anatomy)).cpu()
    return [row[at].mean(0) if bool(at.any()) else None for row, at in zip(states, where.cpu(), strict=True)]


def _first_sight(model: PreTrainedModel, anatomy: Anatomy) -> Tap:
    """Where pictures have come in: at the first block, or behind the first that looks at them (Mllama)."""
    crossing = getattr(model.config.get_text_config(), "cross_attention_layers", None)
    if crossing:
        return Tap(anatomy.layer(crossing[0]).path)
    return Tap(anatomy.layer(0).path, "input")
