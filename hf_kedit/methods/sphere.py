"""SPHERE: AlphaEdit beside the weights' own principal directions (Liu et al. 2025, "Energy-Regularized Sequential
Model Editing on Hyperspheres", arXiv 2510.01172).

Long sequences of edits pull the neurons of a matrix, its rows seen as points on a sphere, towards each other. SPHERE
keeps updates from doing so: with ``Ŵ`` the current weight with rows of length one, and ``U_r`` the eigenvectors of
``Ŵᵀ Ŵ`` whose eigenvalues are the largest and together make up the fraction η of all,

    ΔW ← ΔW (I − α U_r U_rᵀ),

for every update ``ΔW`` of AlphaEdit. Its rank stays, so that single facts can be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from ..config import ModelProfile
from ..engine.weights import get_module, get_weight
from .alphaedit import AlphaEdit, AlphaEditConfig
from .base import Capabilities, register_method


@dataclass
class SPHEREConfig(AlphaEditConfig):
    """Hyperparameters of SPHERE: those of AlphaEdit, and how much is taken out of an update.

    Args:
        sphere_fraction: η, the part of the spectrum that counts as principal.
        sphere_strength: α, which part of an update along these directions is taken out; 0 gives AlphaEdit.
    """

    edit_type: ClassVar[str] = "sphere"

    sphere_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    sphere_strength: Annotated[float, Field(ge=0, le=1)] = 0.5

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """AlphaEdit's, and how much is taken out."""
        return super().search_space(profile, traced) | {"sphere_strength": [0.25, 0.8]}


def principal_directions(weight: torch.Tensor, fraction: float) -> torch.Tensor:
    """The input directions in which the rows of a weight mostly lie.

    Args:
        weight: ``[d_out, d_in]``; a row of zeros has no direction and counts for nothing.
        fraction: η in (0, 1]; the fewest eigenvectors are taken whose eigenvalues sum up to at least this part.

    Returns:
        ``U_r`` ``[d_in, r]``, orthonormal, float64.
    """
    rows = weight.double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    wide = rows.shape[0] < rows.shape[1]
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)  # the smaller Gram matrix; ascending
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    share = values.cumsum(0) / values.sum().clamp_min(1e-30)
    count = min(int((share < fraction * (1 - 1e-12)).sum()) + 1, int((values > 1e-12 * values[0]).sum()))
    picked = vectors[:, :count]
    return rows.T @ picked / values[:count].sqrt() if wide else picked


@register_method
class SPHERE(AlphaEdit):
    """AlphaEdit whose updates keep away from the principal directions of the weight."""

    config_class = SPHEREConfig
    capabilities = Capabilities(
        name="SPHERE",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=True,
        paper="Liu et al. 2025, arXiv 2510.01172",
        summary="AlphaEdit that also spares the principal directions of the weights; for long sequences",
    )
    config: SPHEREConfig

    def columns(self, module: str, keys: torch.Tensor) -> torch.Tensor:
        """AlphaEdit's columns ``A``, less the part α of what lies along ``U_r``."""
        columns = super().columns(module, keys)
        if not self.config.sphere_strength:
            return columns
        weight = get_weight(get_module(self.bench.model, module)).to(columns.device)
        directions = principal_directions(weight, self.config.sphere_fraction)
        return columns - self.config.sphere_strength * (directions @ (directions.T @ columns))
