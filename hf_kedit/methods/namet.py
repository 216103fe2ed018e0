"""NAMET: noise-aware model editing in transformers (Dai et al. 2025, "NAMET: Robust Massive Model Editing via
Noise-Aware Memory Optimization", arXiv 2505.11876 v1; later versions of the paper describe another method, EAMET).

MEMIT stores the state that the *bare* prompt of a fact should have. NAMET stores it behind noise: the context
templates that MEMIT uses for keys also say which state there is to change. With ``a_i`` the output of block ``l_m`` at
the fact token behind context ``i`` before the edit, and one offset δ for all contexts, every layer takes its share of

    r = mean over contexts i of (a_i + δ − current_i),   R = r / (layers left)

and is solved for as in MEMIT, with a λ of its own. The bare prompt takes part in the optimisation of δ, not in ``r``.
δ is measured by the activations ``A = [a_i]`` of all rows together, the drift row included:

    decay  v_weight_decay · √rows · ‖δ‖ / ‖A‖_F,     ‖δ‖ ≤ clamp_norm_factor · ‖A‖_F
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat

from ..config import ModelProfile
from ..engine.capture import Tap
from ..engine.rows import Row
from ..values.optimise import Values, place_path
from ..values.settings import ValueSettings
from .base import Capabilities, register_method
from .memit import MEMIT, MEMITConfig


@dataclass
class NAMETConfig(MEMITConfig):
    """Hyperparameters of NAMET: those of MEMIT, with its own defaults."""

    edit_type: ClassVar[str] = "namet"

    stop_loss: NonNegativeFloat = 0.01

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """The two layers, the decay and the limit that the published configurations share."""
        first = round(0.1 * profile.num_layers)
        layers = list(range(first, min(first + 2, profile.num_layers)))
        return super().derive(profile) | {
            "layers": layers,
            "v_lr": 0.04,
            "v_weight_decay": 0.5,
            "clamp_norm_factor": 0.75,
        }


@register_method
class NAMET(MEMIT):
    """MEMIT whose targets are states behind contexts."""

    config_class = NAMETConfig
    capabilities = Capabilities(
        name="NAMET",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=True,
        paper="Dai et al. 2025, arXiv 2505.11876 v1",
        summary="MEMIT whose targets are states behind contexts instead of the bare prompt's; for large batches",
    )
    config: NAMETConfig

    def value_settings(self) -> ValueSettings:
        """δ is measured by the activations of all rows."""
        return replace(super().value_settings(), against_all_rows=True)

    @property
    def _states(self) -> Tap:
        return Tap(place_path(self.bench.anatomy, self.value_layer(), "block"))

    def state_rows(self, rewriting: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """The contexts; the bare prompt where there are none."""
        return [list(group[1:] or group) for group in rewriting]

    def initial_states(self, values: Values) -> torch.Tensor:
        """``mean a_i``."""
        states = values.taken[self._states].to(values.offset.device)
        return states[:, 1:].mean(dim=1, keepdim=True) if states.shape[1] > 1 else states
