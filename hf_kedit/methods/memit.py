"""MEMIT: Mass-Editing Memory in a Transformer (Meng et al. 2023, arXiv 2210.07229).

Many facts at once, spread over a range of layers ``l_1 … l_m``. For every request a target ``z`` is optimised at
the output of block ``l_m`` (eq. 15). Then, from below, each layer takes its share of what is still missing
(eq. 20), with keys and hidden states measured after the layers before it were written:

    R = (Z − Z_current) / (layers left),   ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹        (eq. 14)

``C`` is the second moment of the layer's keys (a mean), ``λ`` stands for the number of keys to preserve.
Column j of ``R`` and ``(λC + KKᵀ)⁻¹K`` belongs to request j, so that single facts can be taken back.
The loop over the layers is `SpreadMethod.compute`; this file holds the solution of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveFloat

from ..config import ModelProfile
from ..config.spaces import times
from ..errors import ConfigError
from ..statistics.solve import ridge_columns
from .base import Capabilities, register_method
from .spread import KeepingConfig, SpreadMethod


@dataclass
class MEMITConfig(KeepingConfig):
    """Hyperparameters of MEMIT and of the methods that solve a layer as it does; see also `KeepingConfig`.

    Args:
        mom2_update_weight: λ, how many typical keys the second moment stands for.
        layer_weights: λ of each edited layer, from below; ``None``: ``mom2_update_weight`` for all.
    """

    edit_type: ClassVar[str] = "memit"

    mom2_update_weight: PositiveFloat | None = None
    layer_weights: Annotated[list[PositiveFloat], Field(min_length=1)] | None = None

    def validate(self) -> None:
        """Check that there is one λ per layer."""
        super().validate()
        if self.layer_weights and self.layers is not None and len(self.layer_weights) != len(self.layers):
            raise ConfigError(
                f"{type(self).__name__}.layer_weights has {len(self.layer_weights)} entries for {len(self.layers)}"
                " layers: give one per layer, or mom2_update_weight for all"
            )

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """Fields filled from an hparams file or the model's depth."""
        return (*super().model_dependent_fields(), "mom2_update_weight")

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Those of the value, and how much old knowledge weighs."""
        return super().search_space(profile, traced) | {
            "mom2_update_weight": times(self.mom2_update_weight, 0.25, 3.0, 0.05, 10.0)
        }

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """λ by the width of the model.

        A typical key is stored to the part ``s / (1 + s)`` with ``s ≈ d_in / λ``. The published λ of 7B models,
        15,000, is about their ``d_in``; smaller models need a smaller one, or nothing is written.
        """
        return super().derive(profile) | {"mom2_update_weight": float(min(15000, 4 * profile.hidden_size))}


@register_method
class MEMIT(SpreadMethod):
    """Batch editing by ridge regression over a range of layers."""

    config_class = MEMITConfig
    capabilities = Capabilities(
        name="MEMIT",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=True,
        paper="Meng et al. 2023, arXiv 2210.07229",
        summary="many facts at once, spread over the MLP projections of several layers",
    )
    config: MEMITConfig

    def columns(self, module: str, keys: torch.Tensor) -> torch.Tensor:
        """``(λ C + K Kᵀ)⁻¹ K``, eq. 14."""
        factor, weight = self.bench.statistics.factor(module), self.weight_of(module)
        earlier = self.earlier_keys(module)
        if earlier is None:
            return ridge_columns(factor, keys, weight)
        everything = torch.cat([earlier.to(keys), keys], dim=1)
        return ridge_columns(factor, everything, weight)[:, earlier.shape[1] :]

    def weight_of(self, module: str) -> float:
        """λ of the layer that a module is in."""
        for layer, weight in zip(self.config.layers or [], self.config.layer_weights or [], strict=False):
            if module.startswith(self.bench.anatomy.layers[layer].path + "."):
                return weight * self.caution
        assert self.config.mom2_update_weight is not None
        return self.config.mom2_update_weight * self.caution
