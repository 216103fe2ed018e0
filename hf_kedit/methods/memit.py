"""MEMIT: Mass-Editing Memory in a Transformer (Meng et al. 2023, arXiv 2210.07229).

Many facts at once, spread over a range of layers ``l_1 … l_m``. For every request a target ``z`` is optimised at
the output of block ``l_m`` (eq. 15). Then, from below, each layer takes its share of what is still missing
(eq. 20), with keys and hidden states measured after the layers before it were written:

    R = (Z − Z_current) / (layers left),   ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹        (eq. 14)

``C`` is the second moment of the layer's keys (a mean), ``λ`` stands for the number of keys to preserve.
Column j of ``R`` and ``(λC + KKᵀ)⁻¹K`` belongs to request j, so that single facts can be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..config import ModelProfile
from ..engine.capture import Tap
from ..engine.ledger import WeightDelta
from ..engine.solve import ridge_columns
from ..logging import get_logger, warn_once
from ..requests import EditRequest
from .base import Capabilities, Outcome, register_method
from .locate import LocateConfig, LocateMethod, mean_key

logger = get_logger(__name__)


@dataclass
class MEMITConfig(LocateConfig):
    """Hyperparameters of MEMIT; see `LocateConfig` for the shared ones.

    Args:
        mom2_update_weight: λ, how many typical keys the second moment stands for.
        context_template_length_params: ``(tokens, count)`` of the generated context templates.
    """

    edit_type: ClassVar[str] = "memit"

    mom2_update_weight: float | None = None
    context_template_length_params: list[tuple[int, int]] | None = None

    def validate(self) -> None:
        """Check ranges."""
        super().validate()
        self._require_positive("mom2_update_weight")
        if self.layers is not None:
            self.layers = sorted(self.layers)

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """Fields filled from an hparams file or the model's depth."""
        return (*super().model_dependent_fields(), "mom2_update_weight")

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """The range that the published configurations of 28- to 48-layer models share."""
        n = profile.num_layers
        first, last = round(0.12 * n), max(round(0.28 * n), round(0.12 * n))
        values = super().derive(profile) | {
            "layers": list(range(first, min(last, n - 1) + 1)),
            "mom2_update_weight": 15000.0,
        }
        if profile.norm != "rms":
            values["clamp_norm_factor"] = 0.75
        return values


@register_method
class MEMIT(LocateMethod):
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

    def prepare(self) -> None:
        """Templates and, in one pass over the text, the second moments of all layers, before any weight changes."""
        self.template_lengths = self.config.context_template_length_params or [(10, 5)]
        self.templates()
        with self.bench.ledger.disabled():
            self.bench.statistics.moments(self.edited_modules())

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Edit a batch of facts."""
        bench, layers, deltas = self.bench, self.config.layers or [], []
        groups = self.templates()
        rows = self.rows(requests, groups)
        rewriting = [[r for r in group if not r.is_drift] for group in rows]
        z_tap = Tap(bench.anatomy.layers[layers[-1]].path)
        values = self.optimise(rows, layers[-1], "block", [Tap(bench.anatomy.down(layers[0]).path, "input")])
        z = values.value  # [n, H]
        missing: list[torch.Tensor] = []
        with bench.ledger.provisional() as scope:
            for i, layer in enumerate(layers):
                module = bench.anatomy.down(layer).path
                key_tap = Tap(module, "input")
                if i == 0:  # the optimisation's first pass has already seen both
                    keys, current = values.taken[key_tap], values.initial
                else:
                    flat = self.measure([r for group in rewriting for r in group], [key_tap])[key_tap]
                    keys = flat.view(len(requests), -1, flat.shape[-1])
                    current = self.measure([group[0] for group in rewriting], [z_tap])[z_tap]
                k = mean_key(keys, groups).T  # [d_in, n]
                residual = z - current.to(z.device)  # [n, H]
                share = self._at_projection(residual / (len(layers) - i), layer).T  # [H, n]
                columns = ridge_columns(bench.statistics.factor(module), k.cpu(), self._weight)
                delta = WeightDelta(
                    module, left=share, right=columns.float().to(share.device), owners=tuple(range(len(requests)))
                )
                scope.add(delta)
                deltas.append(delta)
                missing.append(residual.norm(dim=-1))
                bench.note(f"k_star.{layer}", k)
                bench.note(f"left.{layer}", columns)
                bench.note(f"right.{layer}", share)
                bench.note(f"cur_z.{layer}", current.T)
                bench.note(f"residual_total.{layer}", residual.T)
            left_over = (z - self.measure([group[0] for group in rewriting], [z_tap])[z_tap].to(z.device)).norm(dim=-1)
        diagnostics = [
            self.diagnose(values, j) | {"residual_ratio": float(left_over[j] / missing[0][j].clamp_min(1e-12))}
            for j in range(len(requests))
        ]
        return Outcome(deltas, diagnostics)

    @property
    def _weight(self) -> float:
        assert self.config.mom2_update_weight is not None
        return self.config.mom2_update_weight

    def _at_projection(self, share: torch.Tensor, layer: int) -> torch.Tensor:
        """Translate a wanted change of the block's output into one of the projection's output.

        Most blocks add the projection's output to the stream unchanged. Some scale it by a constant, which is
        divided out; behind a post-norm there is no exact translation, and the user is told.
        """
        anatomy = self.bench.anatomy
        if anatomy.additive is None or anatomy.additive[layer]:
            return share
        scale = anatomy.residual_scale[layer] if anatomy.residual_scale is not None else None
        if scale:
            return share / scale
        warn_once(
            logger,
            f"{anatomy.model_class} normalises the output of its MLPs, so spreading an edit over layers is only"
            " approximate; check the result, or use a single layer",
        )
        return share
