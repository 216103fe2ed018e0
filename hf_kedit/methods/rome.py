"""ROME: Rank-One Model Editing (Meng et al. 2022, "Locating and Editing Factual Associations in GPT",
arXiv 2202.05262).

One fact, one layer. The MLP's last projection ``W`` is seen as an associative memory; the edit inserts the pair
(k*, v*) with the least disturbance of the keys that it already holds (eq. 2):

    W ← W + Λ uᵀ,   u = C⁻¹ k* / ‖C⁻¹ k*‖,   Λ = (v* − W k) / (kᵀ u)

``k*`` averages the key over context templates, while the denominator uses the key ``k`` of the bare prompt, as
the authors' code does (the mismatch that R-ROME removes). ``v*`` is optimised at the MLP's output (eq. 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..books.ledger import WeightDelta
from ..config import ModelProfile
from ..engine.capture import Tap
from ..errors import ConfigError, EditFailedError
from ..logging import get_logger, warn_once
from ..requests import EditRequest
from ..statistics.solve import IDENTITY
from ..values.optimise import ValuePlace, Values, pick_values
from .base import Capabilities, Outcome, Workbench, register_method
from .locate_then_edit import LocateConfig, LocateMethod, routing_diagnostics, single_layer, where_routed

if TYPE_CHECKING:
    from ..anatomy import Anatomy

logger = get_logger(__name__)


@dataclass
class ROMEConfig(LocateConfig):
    """Hyperparameters of ROME; see `LocateConfig` for the shared ones.

    Args:
        mom2_adjustment: use the second moment ``C`` of the keys (the paper); ``False`` takes ``C = I``, which
            needs no statistics and disturbs other facts more.
    """

    edit_type: ClassVar[str] = "rome"

    mom2_adjustment: bool = True

    def validate(self) -> None:
        """Check that no joint solve is asked for."""
        super().validate()
        if self.sequence == "joint":
            raise ConfigError(
                f"{type(self).__name__}.sequence: ROME writes one fact at a time and has no joint solution; MEMIT and"
                " its relatives have one (EMMET with a single layer comes nearest)"
            )

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Those of the value, and what keeps the subject what it is."""
        return super().search_space(profile, traced) | {"kl_factor": [0.25, 1.0]}

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """One layer, and the limit of published configurations."""
        return super().derive(profile) | {"layers": [single_layer(profile)], "clamp_norm_factor": 4.0}


@register_method
class ROME(LocateMethod):
    """Rank-one editing of single facts."""

    config_class = ROMEConfig
    capabilities = Capabilities(
        name="ROME",
        kind="weights",
        batch=False,
        sequential=True,
        needs_subject=True,
        paper="Meng et al. 2022, arXiv 2202.05262",
        summary="rank-one update of one MLP projection, one fact at a time",
    )
    config: ROMEConfig
    default_template_lengths = ((5, 10), (10, 10))
    remedy: ClassVar[str] = "R-ROME or another layer avoids them."

    def __init__(self, bench: Workbench, config: ROMEConfig):
        super().__init__(bench, config)
        self._norms: dict[str, float] = {}  # of the unedited weights, by module

    @property
    def needs_moments(self) -> bool:
        """Not with ``C = I``."""
        return self.config.mom2_adjustment

    def templates(self) -> list[list[str]]:
        """One flat list, as ROME averages its keys."""
        return [[t for group in super().templates() for t in group]]

    def value_sites(self) -> list[tuple[int, tuple[ValuePlace, ...]]]:
        """The projections of all layers that are written."""
        return [(layer, ("down",)) for layer in self.config.written_layers]

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Edit one fact, in the layers of the config from below."""
        (request,) = requests
        anatomy = self.anatomy_for(request)
        rows = self.rows([request], self.templates())
        deltas: list[WeightDelta] = []
        diagnostics: dict[str, Any] = {}
        with self.bench.ledger.provisional() as scope:
            for layer in self.config.written_layers:
                values = self.optimise(rows, layer, "down", [_keys_of(anatomy, layer)], anatomy)
                delta, diagnostics = self._insertion(layer, values, anatomy)
                scope.add(delta)
                deltas.append(delta)
        return Outcome(deltas, [diagnostics])

    def compute_apart(self, requests: Sequence[EditRequest]) -> list[Outcome]:
        """Edit each fact alone; their values are optimised together, if there is one layer and one projection."""
        layers, anatomy = self.config.written_layers, self.bench.anatomy
        if len(layers) > 1 or self.config.expert_policy == "top1" or not self.can_share(requests):
            return super().compute_apart(requests)
        values = self.optimise(
            self.rows(requests, self.templates()), layers[0], "down", [_keys_of(anatomy, layers[0])]
        )
        found = [self._insertion(layers[0], pick_values(values, i), anatomy) for i in range(len(requests))]
        return [Outcome([delta], [diagnostics]) for delta, diagnostics in found]

    def _insertion(self, layer: int, values: Values, anatomy: Anatomy) -> tuple[WeightDelta, dict[str, Any]]:
        """The update that inserts one fact into a layer (eq. 2), and what is to be said about it.

        Args:
            layer: that is written.
            values: of one request, with the keys that were seen when they were optimised.
            anatomy: of the request.
        """
        bench, module = self.bench, anatomy.down(layer).path
        keys, outputs = values.taken[_keys_of(anatomy, layer)][0], values.taken[Tap(module)][0]
        k_star, k, output = self.association(where_routed(keys, keys), where_routed(keys, outputs))

        factor = bench.statistics.factor(module) if self.config.mom2_adjustment else IDENTITY
        u = factor.solve(factor.take(k_star.unsqueeze(1))).squeeze(1).float()
        u = (u / u.norm()).to(k.device)
        denominator = k @ u
        right = (values.value[0] - output.to(values.value.device)) / denominator
        if not bool(torch.isfinite(right).all()):
            raise EditFailedError("the key is orthogonal to its own update; choose another layer")

        bench.note(f"k_star.{layer}", k_star)
        bench.note(f"left.{layer}", u)
        bench.note(f"right.{layer}", right)
        bench.note(f"cur_input.{layer}", k)
        bench.note(f"cur_output.{layer}", output)
        diagnostics = self.diagnose(values, 0) | {
            "key_alignment": float(denominator.abs() / k.norm()),
            "update_norm": float(right.norm()),
            **routing_diagnostics(anatomy, {layer: (keys != 0).any(dim=1)}),
        }
        self._warn_if_disabling(diagnostics, float(right.norm()), module)
        delta = WeightDelta(module, left=right.unsqueeze(1), right=u.unsqueeze(1), owners=(0,))
        return delta, diagnostics

    def association(
        self, keys: torch.Tensor, outputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which keys the update is built from: ``k*`` of ``u``, ``k`` of the denominator, and the output ``W k``.

        Args:
            keys: of every context template, the bare prompt first, ``[templates, d_in]``.
            outputs: of the projection for these keys, ``[templates, d_out]``.
        """
        return keys.mean(dim=0), keys[0], outputs[0]

    def _warn_if_disabling(self, diagnostics: dict[str, Any], norm: float, module: str) -> None:
        """An update much larger than the weight itself breaks the model ("disabling edits")."""
        if module not in self._norms:
            self._norms[module] = float(self.bench.ledger.original(module).float().norm())
        diagnostics["update_norm_ratio"] = norm / max(self._norms[module], 1e-12)
        if diagnostics["update_norm_ratio"] > 1.0:
            warn_once(
                logger,
                f"{self.capabilities.name}: an update is {diagnostics['update_norm_ratio']:.1f} times as large as the"
                f" weight of {module}; such edits can break a model. {self.remedy}",
            )


def _keys_of(anatomy: Anatomy, layer: int) -> Tap:
    """Where the keys of a layer are seen."""
    return Tap(anatomy.down(layer).path, "input")
