"""Where a model keeps its layers, projections, norm, embeddings and head: found by structure, checked by numbers."""

from __future__ import annotations

from .checks import check_anatomy
from .outputs import block_output, replace_block_output
from .profile import profile_of
from .structure import OVERRIDES, resolve_anatomy
from .types import Anatomy, ExpertBank, LayerAnatomy, MlpUnit, Projection

__all__ = [
    "Anatomy",
    "ExpertBank",
    "LayerAnatomy",
    "MlpUnit",
    "OVERRIDES",
    "Projection",
    "block_output",
    "check_anatomy",
    "profile_of",
    "replace_block_output",
    "resolve_anatomy",
]
