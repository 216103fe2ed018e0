"""MEMIT-FE: MEMIT whose later layers follow a forward pass (arXiv 2605.00358).

The value is optimised at the output of the *first* edited block ``l_1``. One forward of the bare prompt with that
value in place shows which states the later edited blocks then have at the fact token; these are their targets.
So every layer is asked for a state that the model itself would reach:

    R_l = z_l − current output of block l   (undivided),   ΔW_l = R_l Kᵀ (λ C_l + K Kᵀ)⁻¹
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..engine.capture import Tap
from ..engine.rows import Row
from ..engine.sweep import Sweep
from ..values.optimise import Values, place_path
from .base import Capabilities, register_method
from .memit import MEMIT, MEMITConfig
from .spread import Write


@dataclass
class MEMITFEConfig(MEMITConfig):
    """Hyperparameters of MEMIT-FE: those of MEMIT."""

    edit_type: ClassVar[str] = "memit-fe"


@register_method
class MEMITFE(MEMIT):
    """Batch editing with the value at the first layer and targets from a forward pass."""

    config_class = MEMITFEConfig
    capabilities = Capabilities(
        name="MEMIT-FE",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=True,
        paper="2026, arXiv 2605.00358",
        summary="MEMIT with a value at the first edited layer and targets for the others from a forward pass",
    )
    config: MEMITFEConfig

    def value_layer(self) -> int:
        """The first edited layer."""
        return self.layers[0]

    def targets(self, values: Values, bare: Sequence[Row], downs: Sequence[tuple[str, ...]]) -> list[Write]:
        """Outputs of the edited blocks at the fact token once the first one has its value."""
        anatomy = self.bench.anatomy
        taps = {layer: Tap(place_path(anatomy, layer, "block")) for layer in self.layers}
        later = [taps[layer] for layer in self.layers[1:]]
        states = {taps[self.layers[0]]: values.value}
        if later:
            offsets = {taps[self.layers[0]].module: values.offset}
            sweep = Sweep(self.bench.model, anatomy, bare, fill=self.bench.fill)
            reached = sweep.read(later, 0, offsets=offsets)
            states |= {tap: state.to(values.value.device) for tap, state in reached.items()}
        return [Write(layer, i, downs[i], taps[layer], states[taps[layer]]) for i, layer in enumerate(self.layers)]

    def share(self, missing: torch.Tensor, write: Write) -> torch.Tensor:
        """All of it: every layer has a target of its own."""
        return missing
