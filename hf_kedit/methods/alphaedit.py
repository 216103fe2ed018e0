"""AlphaEdit: null-space constrained knowledge editing (Fang et al. 2025, arXiv 2410.02355).

MEMIT's values, keys and spreading, but each layer's update is confined to the directions that the preserved keys
hardly use, so that it changes next to nothing for them, and it leaves the keys of earlier batches alone:

    ΔWᵀ = (P (K Kᵀ + K_e K_eᵀ) + λ I)⁻¹ P K Rᵀ

``P`` projects onto the eigenvectors of the layer's second moment with small eigenvalues, ``K_e`` are the keys of
the AlphaEdit edits that the model carries. These keys lie in the ledger beside the deltas that they belong to: they
are saved with them, and rolling an edit back takes its keys away too.

Two later methods are settings of the same system,

    ΔWᵀ = (P (K Kᵀ + K_e K_eᵀ + λ₁ C) + λ I)⁻¹ P K Rᵀ

BetaEdit (Liu et al. 2026, arXiv 2605.09285): the null space is an approximate one, so that updates inside it still
change what old keys give; ``λ₁ C`` weighs that, and ``P`` is taken anew from old and edited keys after so many edits.
RLSEdit (Wang et al. 2026, arXiv 2601.15686): recursive least squares that hold the weights (``λ``) and their outputs
for old keys (``λ₁ C``) softly, ``P = I``; its recursion over batches is this solution with all earlier keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from ..config import ModelProfile
from ..engine.devices import where_there_is_room
from ..errors import ConfigError
from ..logging import get_logger, info_once, warn_once
from ..statistics.nullspace import KeySpace, NullSpace, null_space
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
        leak_weight: λ₁, how many typical old keys an update inside the null space is to spare (BetaEdit, RLSEdit);
            MEMIT's ``mom2_update_weight`` is the same thing.
        nullspace: confine updates to the null space; ``False`` with a ``leak_weight`` is RLSEdit.
        refresh_every: take the null space anew after so many facts, from the second moments of their keys and of old
            ones, ``(K_e K_eᵀ / m + λ₁ C) / (1 + λ₁)`` (BetaEdit); ``None``: it stays that of the original model.
    """

    edit_type: ClassVar[str] = "alphaedit"

    nullspace_threshold: PositiveFloat | None = None
    nullspace_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    L2: PositiveFloat | None = None
    leak_weight: NonNegativeFloat = 0.0
    nullspace: bool = True
    refresh_every: PositiveInt | None = None

    def validate(self) -> None:
        """Check that something protects old knowledge."""
        super().validate()
        if not self.leak_weight and (not self.nullspace or self.refresh_every):
            name = "refresh_every" if self.nullspace else "nullspace"
            raise ConfigError(f"{type(self).__name__}.{name} needs a leak_weight above 0 (BetaEdit, RLSEdit)")
        if self.refresh_every and not self.nullspace:
            raise ConfigError(f"{type(self).__name__}.refresh_every: without a null space there is nothing to refresh")

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
        self._refreshed: dict[str, tuple[torch.Tensor, KeySpace]] = {}  # keys that were taken in, and what came out

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
            self._spaces[module] = self._space_of(module, mean)
        return self._spaces[module]

    def _space_of(self, module: str, protected: torch.Tensor) -> KeySpace:
        """The directions that a second moment ``[d, d]`` leaves free, and what is solved with along them."""
        config, mean = self.config, self.bench.statistics.moments([module])[module].mean()
        split: Callable[[torch.Tensor], NullSpace] = NullSpace.everything
        if config.nullspace:
            relative = config.nullspace_threshold is None
            split = partial(
                null_space,
                threshold=config.nullspace_threshold,
                fraction=config.nullspace_fraction if relative else None,
                name=f"the second moment of {module}",
                thin=not config.leak_weight,
            )
        space = where_there_is_room(self.bench.model, split, protected)
        ridge = config.L2
        if ridge is None:
            ridge = RIDGE_PART * space.energy * float(mean.trace())
        info_once(
            logger,
            f"{self.capabilities.name}: {space.kept} of {len(mean)} directions of {module} are free (eigenvalues below"
            f" {space.threshold:.3g}, {space.energy:.2%} of the keys' second moment), ridge {ridge:.3g}",
        )
        if config.leak_weight:
            return KeySpace(space.weighed(mean, config.leak_weight, ridge), 1.0)
        return KeySpace(space, ridge)

    def _current(self, module: str, earlier: torch.Tensor | None) -> KeySpace:
        """The free directions when the model carries edits with these keys ``[d_in, m]``."""
        every = self.config.refresh_every
        taken = 0 if every is None or earlier is None else earlier.shape[1] - earlier.shape[1] % every
        if earlier is None or not taken:
            return self.space(module)
        keys, known = earlier[:, :taken], self._refreshed.get(module)
        if known is None or not torch.equal(known[0], keys):
            weight, mean = self.config.leak_weight, self.bench.statistics.moments([module])[module].mean().double()
            k = keys.to(mean)
            known = (keys.clone(), self._space_of(module, (k @ k.T / taken + weight * mean) / (1 + weight)))
            self._refreshed[module] = known
        return known[1]

    def columns(self, module: str, keys: torch.Tensor) -> torch.Tensor:
        """``P K_a (λ I + K_aᵀ P K_a)⁻¹``, the columns of this batch."""
        earlier = self.bench.ledger.keys(module)
        space = self._current(module, earlier)
        if self.caution != 1:  # solved together: there are no earlier keys
            space = KeySpace(space.space, self.caution * space.ridge)
        return space.columns(keys, earlier)
