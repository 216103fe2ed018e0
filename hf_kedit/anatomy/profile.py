"""From an anatomy to the few facts that the defaults of a config are derived from."""

from __future__ import annotations

from torch import nn

from ..config import ModelProfile
from .types import Anatomy


def profile_of(model: nn.Module, anatomy: Anatomy, name: str) -> ModelProfile:
    """Return depth, width, kind of norm, and the layers with an MLP of a model.

    Args:
        model: with or without weights (meta device).
        anatomy: of the model.
        name: id or path, for the look-up of a packaged hparams file.
    """
    norm = model.get_submodule(anatomy.final_norm) if anatomy.final_norm else None
    return ModelProfile(
        name=name,
        num_layers=anatomy.num_layers,
        hidden_size=anatomy.hidden_size,
        norm="layer" if getattr(norm, "bias", None) is not None else "rms",
        model_type=anatomy.model_type,
        mlp_layers=tuple(layer.index for layer in anatomy.layers if layer.down is not None),
    )
