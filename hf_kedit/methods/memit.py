"""MEMIT: Mass-Editing Memory in a Transformer (Meng et al. 2023, arXiv 2210.07229).

Many facts at once, spread over a range of layers ``l_1 … l_m``. For every request a target ``z`` is optimised at
the output of block ``l_m`` (eq. 15). Then, from below, each layer takes its share of what is still missing
(eq. 20), with keys and hidden states measured after the layers before it were written:

    R = (Z − Z_current) / (layers left),   ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹        (eq. 14)

``C`` is the second moment of the layer's keys (a mean), ``λ`` stands for the number of keys to preserve.
Column j of ``R`` and ``(λC + KKᵀ)⁻¹K`` belongs to request j, so that single facts can be taken back.
The loop over the layers is in `spread`; this file holds the solution of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..statistics.solve import ridge_columns
from .base import Capabilities, register_method
from .spread import RidgeConfig, SpreadMethod


@dataclass
class MEMITConfig(RidgeConfig):
    """Hyperparameters of MEMIT; see `RidgeConfig` and `LocateConfig` for the shared ones.

    Args:
        keep_edited_keys: also leave alone what earlier batches wrote: ``(λ C + K_e K_eᵀ + K Kᵀ)⁻¹`` with the keys
            ``K_e`` of the edits that the model carries and that were made with this switch (sequences of batches).
    """

    edit_type: ClassVar[str] = "memit"

    keep_edited_keys: bool = False


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

    @property
    def keeps_keys(self) -> bool:
        """Whether later batches shall leave this one alone."""
        return self.config.keep_edited_keys

    def columns(self, module: str, keys: torch.Tensor) -> torch.Tensor:
        """``(λ C + K Kᵀ)⁻¹ K``, eq. 14."""
        assert self.config.mom2_update_weight is not None
        factor = self.bench.statistics.factor(module)
        earlier = self.bench.ledger.keys(module) if self.config.keep_edited_keys else None
        if earlier is None:
            return ridge_columns(factor, keys, self.config.mom2_update_weight)
        everything = torch.cat([earlier.to(keys), keys], dim=1)
        return ridge_columns(factor, everything, self.config.mom2_update_weight)[:, earlier.shape[1] :]
