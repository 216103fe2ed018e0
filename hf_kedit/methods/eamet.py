"""EAMET: embedding alignment model editing in transformers (Dai et al. 2025, "EAMET: Robust Massive Model Editing via
Embedding Alignment Optimization", arXiv 2505.11876; its first version is called NAMET).

MEMIT writes all facts of a batch with one matrix, which can only give similar keys similar changes. EAMET therefore
optimises the values one after the other and asks each new one, ``δ_j``, to stand to the earlier ones as its key
``k_j`` stands to theirs. With ``S_i = cos(k_j, k_i)``, ``c_i = cos(δ_j, δ_i)``, ``i < j``, the loss grows by

    cs_factor · KL(p ‖ q) + mse_factor · Σ_{i of the largest S} p_i (S_i − c_i)²,  p = softmax(S/τ), q = softmax(c/τ)

Its length is tied to the key's (``fix_ks``) or to the activation's (``norm``):

    fix_ks:  norm_factor · (‖δ_j‖ − clamp_ks_factor · ‖k_j‖)²,   ‖δ_j‖ ≤ clamp_ks_factor · ‖k_j‖
    norm:    v_weight_decay · ‖δ_j‖ / ‖a_j‖,                     ‖δ_j‖ ≤ clamp_norm_factor · ‖a_j‖

Keys are those of the last edited layer, before the batch. The writing of the layers is MEMIT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from ..config import ModelProfile
from ..engine.capture import Tap
from ..engine.rows import Row
from ..engine.sweep import Sweep
from ..errors import ConfigError
from ..logging import progress_bar
from ..values.optimise import ValuePlace, Values, join_values, place_path
from ..values.settings import Guide, ValueSettings
from .base import Capabilities, register_method
from .locate_then_edit import mean_key
from .memit import MEMIT, MEMITConfig

if TYPE_CHECKING:
    from ..anatomy import Anatomy

COMPARED = 50
LONG_ACTIVATION = 100.0


@dataclass
class EAMETConfig(MEMITConfig):
    """Hyperparameters of EAMET: those of MEMIT and of its alignment.

    Args:
        cs_factor: weight of the divergence between the neighbourhoods of keys and of values.
        mse_factor: weight of the squared differences of cosines, for the 50 most similar earlier keys.
        temperature: τ of both softmaxes.
        length_rule: what a value's length is tied to: ``fix_ks`` to the key's, ``norm`` to the activation's.
        norm_factor: weight of the term of ``fix_ks``.
        clamp_ks_factor: lengths of ``fix_ks``, as multiples of the key's.
        target_init: begin with a vector along the activation, as long as the key, unless the activation is longer
            than 100; otherwise with zero.
    """

    edit_type: ClassVar[str] = "eamet"
    keeps_keys_by_default: ClassVar[bool] = False

    cs_factor: NonNegativeFloat = 2.0
    mse_factor: NonNegativeFloat = 8.0
    temperature: PositiveFloat = 0.07
    length_rule: Literal["fix_ks", "norm"] = "fix_ks"
    norm_factor: NonNegativeFloat = 0.05
    clamp_ks_factor: PositiveFloat = 3.0
    target_init: bool = True
    stop_loss: NonNegativeFloat = 0.01

    def validate(self) -> None:
        """Check that all facts are put into one matrix."""
        super().validate()
        if self.sequence == "joint":
            raise ConfigError("EAMETConfig.sequence: EAMET's values depend on those before; MEMIT solves for a set")
        if self.expert_policy != "shared":
            raise ConfigError("EAMET compares keys of one matrix; use expert_policy='shared'")
        if self.v_optimizer != "adam":
            raise ConfigError("EAMETConfig.v_optimizer: the terms of EAMET are known to 'adam' alone")

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """MEMIT's with smaller steps, and how strongly values are aligned and held to a length."""
        return super().search_space(profile, traced) | {
            "v_lr": [0.1, 0.5],
            "cs_factor": [0.5, 0.0],
            "length_rule": ["norm"],
        }

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """Two layers, and the small learning rate that a start away from zero needs."""
        first = round(0.1 * profile.num_layers)
        layers = list(range(first, min(first + 2, profile.num_layers)))
        return super().derive(profile) | {"layers": layers, "v_lr": 0.04}


class Alignment:
    """How one value should stand to the earlier ones of its batch.

    Args:
        keys: of the earlier requests, ``[i, d_in]``.
        key: of this request, ``[d_in]``.
        values: the earlier δ, ``[i, d]``.
        config: weights and temperature.
    """

    def __init__(self, keys: torch.Tensor, key: torch.Tensor, values: torch.Tensor, config: EAMETConfig):
        self.config, self.values = config, torch.nn.functional.normalize(values, dim=-1)
        self.similarity = torch.nn.functional.cosine_similarity(keys, key.unsqueeze(0), dim=-1)
        self.weight = (self.similarity / config.temperature).softmax(-1)
        self.nearest = self.similarity.topk(min(COMPARED, len(keys))).indices
        self.floor = 1e-2 * float(key.norm())

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """Both terms for a δ ``[d]``; zero for the first request. Near zero, where a vector has no direction, the
        cosine is that of a vector of a hundredth of the key's length, so that its gradient stays bounded."""
        if not len(self.values):
            return value.new_zeros(())
        config = self.config
        cosine = self.values @ value / torch.linalg.vector_norm(value).clamp_min(self.floor)
        log_q = (cosine / config.temperature).log_softmax(-1)
        divergence = (self.weight * (self.weight.clamp_min(1e-30).log() - log_q)).sum()
        squares = (self.weight * (self.similarity - cosine).square())[self.nearest].sum()
        return config.cs_factor * divergence + config.mse_factor * squares


@register_method
class EAMET(MEMIT):
    """MEMIT with values that are aligned like their keys."""

    config_class = EAMETConfig
    capabilities = Capabilities(
        name="EAMET",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=True,
        paper="Dai et al. 2025, arXiv 2505.11876",
        summary="MEMIT whose values resemble each other as their keys do; for large batches",
    )
    config: EAMETConfig
    solves_together = False

    def value_settings(self) -> ValueSettings:
        """Without MEMIT's decay: EAMET has a rule for lengths of its own."""
        return replace(super().value_settings(), weight_decay=0.0)

    def _optimised(
        self,
        rows: Sequence[Sequence[Row]],
        layer: int,
        places: ValuePlace | Sequence[ValuePlace],
        taps: Sequence[Tap],
        anatomy: Anatomy | None = None,
        guide: Guide | None = None,
        settings: ValueSettings | None = None,
    ) -> Values:
        """One value after the other, each guided to be aligned with those before it."""
        bench = self.bench
        keys, initial = self._before(rows, layer)
        done: list[Values] = []
        show = bench.show_progress and len(rows) > 1
        with progress_bar(len(rows), "optimising values", show=show, unit="edit") as bar:
            for j, group in enumerate(rows):
                offsets = torch.cat([v.offset for v in done]) if done else initial[:0]
                guide = self.guide(Alignment(keys[:j], keys[j], offsets, self.config), keys[j], initial[j])
                done.append(super()._optimised([group], layer, places, taps, anatomy, guide, settings))
                bar.update(1)
        return join_values(done)

    def guide(self, alignment: Alignment, key: torch.Tensor, initial: torch.Tensor) -> Guide:
        """Start, limit and further terms of one value.

        Args:
            alignment: with the earlier values.
            key: of the request, ``[d_in]``.
            initial: activation before the edit, ``[d]``.
        """
        config, size = self.config, initial.norm()
        begin = config.target_init and float(size) < LONG_ACTIVATION
        start = initial / size.clamp_min(1e-12) * key.norm() if begin else torch.zeros_like(initial)
        wanted = config.clamp_ks_factor * key.norm()
        if config.length_rule == "norm":
            assert config.v_weight_decay is not None and config.clamp_norm_factor is not None
            limit, decay = config.clamp_norm_factor * size, config.v_weight_decay / size.clamp_min(1e-12)
        else:
            limit, decay = wanted, None

        def term(offset: torch.Tensor) -> torch.Tensor:
            value = offset[0]
            length = torch.linalg.vector_norm(value)
            rule = config.norm_factor * (length - wanted).square() if decay is None else decay * length
            return alignment(value) + rule

        return Guide(start.unsqueeze(0), limit.reshape(1), term)

    def _before(self, rows: Sequence[Sequence[Row]], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Averaged keys ``[n, d_in]`` and block outputs on the bare prompt ``[n, d]`` at the value layer."""
        bench = self.bench
        key, block = Tap(bench.anatomy.down(layer).path, "input"), Tap(place_path(bench.anatomy, layer, "block"))
        flat = [row for group in rows for row in group if not row.is_drift]
        taken = Sweep(bench.model, bench.anatomy, flat, fill=bench.fill).read([key, block], 0)
        keys, outputs = (taken[tap].view(len(rows), -1, taken[tap].shape[-1]) for tap in (key, block))
        return mean_key(keys, self.templates()), outputs[:, 0].to(keys.device)
