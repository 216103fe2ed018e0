"""EMMET: Equality-constrained Mass Model Editing in a Transformer (Gupta et al. 2024, "A Unified Framework for
Model Editing", arXiv 2403.14236).

ROME's objective for a batch: the new pairs are stored exactly, and among the updates that do so, the one that
disturbs the preserved keys least is taken,

    ΔW = R (Kᵀ Ĉ⁻¹ K)⁻¹ Kᵀ Ĉ⁻¹,   Ĉ = λ C + ν I,

where MEMIT trades both against each other. Values, keys and spreading are MEMIT's. With more than one fact a
small ridge is added to ``Kᵀ Ĉ⁻¹ K``, which similar keys make nearly singular; a single fact needs none and gives
ROME's closed form. In a sequence the keys of earlier batches can be preserved too (`KeepingConfig`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from ..config import ModelProfile
from ..logging import get_logger, warn_once
from ..statistics.solve import MomentFactor, equality_columns, factor_beside
from .base import Capabilities, Workbench, register_method
from .locate_then_edit import single_layer
from .spread import KeepingConfig, SpreadMethod

logger = get_logger(__name__)
_FEW_KEYS = 10.0


@dataclass
class EMMETConfig(KeepingConfig):
    """Hyperparameters of EMMET; see `KeepingConfig` for the shared ones.

    Args:
        mom2_update_weight: λ, how many typical keys the second moment stands for.
        emmet_lambda: ridge for batches of more than one fact. A common factor of Ĉ cancels except against it: its
            effective size is ``emmet_lambda · mom2_update_weight``. With ``keep_edited_keys`` λ counts: all other
            knowledge weighs as much as λ earlier edits.
        update_norm_lambda: ν, a penalty on the size of the update.
    """

    edit_type: ClassVar[str] = "emmet"
    keeps_keys_by_default: ClassVar[bool] = False

    mom2_update_weight: PositiveFloat | None = None
    emmet_lambda: NonNegativeFloat = 0.1
    update_norm_lambda: NonNegativeFloat = 0.0

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """Fields filled from an hparams file or the model's depth."""
        return (*super().model_dependent_fields(), "mom2_update_weight")

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Those of the value; a single fact is written exactly, whatever λ, but for a penalty on its size."""
        return super().search_space(profile, traced) | {"update_norm_lambda": [0.1, 1.0]}

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """One layer, where ROME edits, as in all published configurations."""
        return super().derive(profile) | {"layers": [single_layer(profile)], "mom2_update_weight": 1.0}


@register_method
class EMMET(SpreadMethod):
    """Batch editing under an equality constraint."""

    config_class = EMMETConfig
    capabilities = Capabilities(
        name="EMMET",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=True,
        paper="Gupta et al. 2024, arXiv 2403.14236",
        summary="ROME for batches: new facts are stored exactly, with the least disturbance of old ones",
    )
    config: EMMETConfig

    def __init__(self, bench: Workbench, config: EMMETConfig):
        super().__init__(bench, config)
        self._factors: dict[str, MomentFactor] = {}

    def prepare(self) -> None:
        """Templates and second moments; says where kept keys would outweigh them."""
        super().prepare()
        weight = self.config.mom2_update_weight
        if self.keeps_keys and weight is not None and weight < _FEW_KEYS:
            warn_once(
                logger,
                "EMMET: with keep_edited_keys all other knowledge weighs no more than mom2_update_weight earlier"
                f" edits, here {weight:g}, and long sequences break the model; set mom2_update_weight to about 100 and"
                " emmet_lambda to 0.1 divided by it",
            )

    def columns(self, module: str, keys: torch.Tensor) -> torch.Tensor:
        """``Ĉ⁻¹ K (Kᵀ Ĉ⁻¹ K)⁻¹``."""
        config = self.config
        assert config.mom2_update_weight is not None
        if config.update_norm_lambda:
            factor, scale = self._penalised(module), 1.0
        else:
            factor, scale = self.bench.statistics.factor(module), config.mom2_update_weight
        ridge = self.caution * config.emmet_lambda if keys.shape[1] > 1 else 0.0
        return equality_columns(factor, keys, scale, ridge, self.earlier_keys(module))

    def _penalised(self, module: str) -> MomentFactor:
        """Factor of ``λ C + ν I``."""
        if module not in self._factors:
            assert self.config.mom2_update_weight is not None
            moment = self.bench.statistics.estimate(module) * self.config.mom2_update_weight
            moment = moment + self.config.update_norm_lambda * torch.eye(moment.shape[0], dtype=moment.dtype)
            ridge, name = self.config.stats_ridge or 0.0, f"Ĉ of {module}"
            self._factors[module] = factor_beside(self.bench.model, moment, ridge=ridge, name=name)
        return self._factors[module]
