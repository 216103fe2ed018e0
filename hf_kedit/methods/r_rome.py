"""R-ROME and p-ROME: ROME with one and the same key everywhere (Gupta et al. 2024, "Rebuilding ROME",
arXiv 2403.07175).

ROME's code takes the key averaged over context templates for the direction ``u`` of the update and the key of the
bare prompt for its length. Where the two differ, the length is wrong, now and then by so much that a single edit
breaks the model. Here

    W ← W + Λ uᵀ,   u = C⁻¹ k / ‖C⁻¹ k‖,   Λ = (v* − W k) / (kᵀ u)

with one ``k``: the average (R-ROME, ``key_mode="mean"``) or the bare prompt's (p-ROME, ``"prompt"``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..errors import ConfigError
from .base import Capabilities, register_method
from .rome import ROME, ROMEConfig


@dataclass
class RROMEConfig(ROMEConfig):
    """Hyperparameters of R-ROME: those of ROME, and which key is used.

    Args:
        key_mode: ``"mean"``: the key averaged over the context templates (R-ROME); ``"prompt"``: the bare prompt's
            (p-ROME); ``"rome"``: the published mixture of both, which is ROME.
    """

    edit_type: ClassVar[str] = "r-rome"

    key_mode: Literal["mean", "prompt", "rome"] = "mean"

    def validate(self) -> None:
        """Check that the key is one of the subject."""
        super().validate()
        if self.key_mode == "prompt" and self.fact_token == "last":
            raise ConfigError("RROMEConfig.key_mode 'prompt' needs a fact token in the subject, not 'last'")


@register_method
class RROME(ROME):
    """Rank-one editing of single facts with a consistent key."""

    config_class = RROMEConfig
    capabilities = Capabilities(
        name="R-ROME",
        kind="weights",
        batch=False,
        sequential=True,
        needs_subject=True,
        paper="Gupta et al. 2024, arXiv 2403.07175",
        summary="ROME with one key everywhere, which avoids edits that break the model",
    )
    config: RROMEConfig
    remedy: ClassVar[str] = "Another layer, or a smaller clamp_norm_factor, avoids them."

    def association(
        self, keys: torch.Tensor, outputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One key for direction and length, unless ``key_mode="rome"``."""
        if self.config.key_mode == "rome":
            return super().association(keys, outputs)
        if self.config.key_mode == "prompt":
            return keys[0], keys[0], outputs[0]
        return keys.mean(dim=0), keys.mean(dim=0), outputs.mean(dim=0)  # affine: the output of the mean key
