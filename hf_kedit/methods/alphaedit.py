"""AlphaEdit: null-space constrained knowledge editing (Fang et al. 2025, arXiv 2410.02355).

MEMIT's values, keys and spreading, but each layer's update is confined to the directions that the preserved keys
hardly use, so that it changes next to nothing for them, and it leaves the keys of earlier batches alone:

    ΔWᵀ = (P (K Kᵀ + K_e K_eᵀ) + λ I)⁻¹ P K Rᵀ

``P`` projects onto the eigenvectors of the layer's second moment with small eigenvalues, ``K_e`` are the keys of
the AlphaEdit edits that the model carries. These keys lie in the ledger beside the deltas that they belong to: they
are saved with them, and rolling an edit back takes its keys away too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveFloat

from ..config import ModelProfile
from ..engine.devices import where_there_is_room
from ..logging import get_logger, info_once, warn_once
from ..statistics.nullspace import KeySpace, null_space
from .base import Capabilities, Workbench, register_method
from .locate_then_edit import LocateConfig
from .spread import SpreadMethod

logger = get_logger(__name__)
RIDGE_PART = 0.5


@dataclass
class AlphaEditConfig(LocateConfig):
    """Hyperparameters of AlphaEdit; see `LocateConfig` for the shared ones.

    Args:
        nullspace_threshold: a direction is free to be used if the second moment's eigenvalue is below this. As
            published, an absolute number, which depends on the scale of the model's keys; ``None`` uses
            ``nullspace_fraction``.
        nullspace_fraction: the free directions, from the smallest eigenvalue on, hold at most this part of the
            keys' second moment (its trace); the same meaning in every model.
        L2: λ, the ridge; a key is stored to the part ``s / (1 + s)``, ``s = kᵀ P k / λ``. ``None``: half of what
            ``kᵀ P k`` is on average over all tokens, ``tr(P C) / 2``.
    """

    edit_type: ClassVar[str] = "alphaedit"

    nullspace_threshold: PositiveFloat | None = None
    nullspace_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    L2: PositiveFloat | None = None

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Those of the value, and how many directions are free."""
        return super().search_space(profile, traced) | {"nullspace_fraction": [0.1, 0.02, 0.25]}


@register_method
class AlphaEdit(SpreadMethod):
    """Batch editing inside the null space of old keys."""

    config_class = AlphaEditConfig
    capabilities = Capabilities(
        name="AlphaEdit",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=True,
        paper="Fang et al. 2025, arXiv 2410.02355",
        summary="MEMIT inside the null space of old keys; for long sequences of batches",
    )
    config: AlphaEditConfig
    tokens_per_width: ClassVar[int] = 10  # small eigenvalues need more of them than a solve does

    def __init__(self, bench: Workbench, config: AlphaEditConfig):
        super().__init__(bench, config)
        self._spaces: dict[str, KeySpace] = {}

    @property
    def keeps_keys(self) -> bool:
        """Later batches leave this one alone."""
        return True

    def prepare(self) -> None:
        """Templates, second moments, and the null space of every layer, all of the unedited model."""
        super().prepare()
        for module in self.edited_modules():
            self.space(module)

    def space(self, module: str) -> KeySpace:
        """The free directions of a module; computed once."""
        if module not in self._spaces:
            moment = self.bench.statistics.moments([module])[module]
            width, mean = moment.total.shape[0], moment.mean()
            if moment.count < self.tokens_per_width * width:
                warn_once(
                    logger,
                    f"AlphaEdit: the second moment of {module} rests on {moment.count:,} tokens. With fewer than"
                    f" {self.tokens_per_width * width:,} its small eigenvalues come out too small, and directions that"
                    " old knowledge uses look free. Set stats_tokens.",
                )
            relative = self.config.nullspace_threshold is None
            split = partial(
                null_space,
                threshold=self.config.nullspace_threshold,
                fraction=self.config.nullspace_fraction if relative else None,
                name=f"the second moment of {module}",
            )
            space = where_there_is_room(self.bench.model, split, mean)
            ridge = self.config.L2
            if ridge is None:
                ridge = RIDGE_PART * space.energy * float(mean.trace())
            info_once(
                logger,
                f"AlphaEdit: {space.kept} of {width} directions of {module} are free (eigenvalues below"
                f" {space.threshold:.3g}, {space.energy:.2%} of the keys' second moment), ridge {ridge:.3g}",
            )
            self._spaces[module] = KeySpace(space, ridge)
        return self._spaces[module]

    def columns(self, module: str, keys: torch.Tensor) -> torch.Tensor:
        """``P K_a (λ I + K_aᵀ P K_a)⁻¹``, the columns of this batch."""
        space = self.space(module)
        if self.caution != 1:  # solved together: there are no earlier keys
            space = KeySpace(space.space, self.caution * space.ridge)
        return space.columns(keys, self.bench.ledger.keys(module))
