"""PMET: Precise Model Editing in a Transformer (Li et al. 2023, arXiv 2308.08742).

The hidden state that MEMIT optimises mixes what attention and MLP contribute, but only the MLP is written. PMET
optimises one vector for each, ``δ_attn`` and ``δ_mlp`` at the outputs of the two projections of layer ``l_m``, and
writes only the MLP's part (or both). The residual is shared out with the square root of the layers left:

    R = (z − current output of the projection at l_m) / √(layers left),   ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹

The residual is measured at a projection's output, so writing lower layers does not make it smaller by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat

from ..config import ModelProfile
from ..engine.capture import Tap
from ..engine.rows import Row
from ..errors import ConfigError
from ..logging import get_logger, warn_once
from ..values.optimise import ValuePlace, Values, place_path
from ..values.settings import ValueSettings
from .base import Capabilities, register_method
from .memit import MEMIT, MEMITConfig
from .spread import Write

logger = get_logger(__name__)
PLACES: dict[str, ValuePlace] = {"attention": "attention_out", "mlp": "down"}
SETTLED_FACTOR = 0.1
SETTLED_KL = 0.01


@dataclass
class PMETConfig(MEMITConfig):
    """Hyperparameters of PMET: those of MEMIT, and what is written.

    Args:
        nll_loss_factor: factor of the negative log-likelihood. It drops to a tenth in steps that follow one in
            which every target token was the model's first choice.
        rewrite: what is written in each layer: the projection out of the MLP, and if wanted the one out of the
            attention (written before it).
    """

    edit_type: ClassVar[str] = "pmet"
    keeps_keys_by_default: ClassVar[bool] = False

    nll_loss_factor: PositiveFloat = 1.0
    rewrite: list[Literal["attention", "mlp"]] = field(default_factory=lambda: ["mlp"])

    def validate(self) -> None:
        """Put the projections into the order in which they are written."""
        super().validate()
        if not self.rewrite:
            raise ConfigError("PMETConfig.rewrite is empty; nothing would be written")
        self.rewrite = sorted(set(self.rewrite))
        if self.expert_policy != "shared":
            raise ConfigError(
                "PMETConfig.expert_policy: PMET optimises at the projections of one layer for all facts together,"
                " which single experts do not share; MEMIT and its other relatives can edit them"
            )

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """Published values of models of the same kind."""
        rms = profile.norm == "rms"
        return super().derive(profile) | {
            "v_weight_decay": 0.5,
            "v_num_grad_steps": 25 if rms else 30,
            "clamp_norm_factor": 1.0 if rms else 0.75,
        }

    def value_settings(self, *, keep_path: bool = False) -> ValueSettings:
        """With the rule that ends the optimisation once every target token comes first."""
        return replace(
            super().value_settings(keep_path=keep_path),
            nll_factor=self.nll_loss_factor,
            settled_factor=SETTLED_FACTOR,
            settled_kl=SETTLED_KL,
        )


@register_method
class PMET(MEMIT):
    """Batch editing with separate values for attention and MLP."""

    config_class = PMETConfig
    capabilities = Capabilities(
        name="PMET",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=True,
        paper="Li et al. 2023, arXiv 2308.08742",
        summary="MEMIT with separate values for attention and MLP; writes the MLP, or both",
    )
    config: PMETConfig

    def edited_modules(self) -> list[str]:
        """The projections in the order in which they are written."""
        anatomy = self.bench.anatomy
        return [place_path(anatomy, layer, PLACES[kind]) for layer in self.layers for kind in self.config.rewrite]

    def value_places(self) -> tuple[ValuePlace, ...]:
        """Both projections, whatever is written; of a hybrid's layer without an attention the MLP's alone."""
        if self.bench.anatomy.layers[self.value_layer()].attention_out is None and self.config.rewrite == ["mlp"]:
            warn_once(
                logger,
                f"PMET: layer {self.value_layer()} has no attention whose part of the hidden state could be optimised"
                " beside the MLP's; the MLP's value is optimised alone",
            )
            return ("down",)
        return ("down", "attention_out")

    def first_keys(self, downs: Sequence[tuple[str, ...]]) -> list[Tap]:
        """The inputs of what is written first: the attention's projection, if it is written at all."""
        return [Tap(self.edited_modules()[0], "input")]

    def targets(self, values: Values, bare: Sequence[Row], downs: Sequence[tuple[str, ...]]) -> list[Write]:
        """Each written projection towards the value of its own kind."""
        anatomy, top = self.bench.anatomy, self.value_layer()
        names = {"attention": ".attn", "mlp": ".mlp"} if len(self.config.rewrite) > 1 else {}
        return [
            Write(
                layer,
                i,
                (place_path(anatomy, layer, PLACES[kind]),) * len(bare),
                Tap(place_path(anatomy, top, PLACES[kind])),
                values.value_at(PLACES[kind]),
                PLACES[kind],
                names.get(kind, ""),
            )
            for i, layer in enumerate(self.layers)
            for kind in self.config.rewrite
        ]

    def share(self, missing: torch.Tensor, write: Write) -> torch.Tensor:
        """The square root of the layers left instead of their number."""
        return missing / math.sqrt(len(self.layers) - write.index)
