"""What MEMIT and its relatives share: values optimised once, then written layer by layer from below.

For every request a target is optimised at some site of the model. Then each matrix takes its share of what is
still missing, with keys and states measured after the matrices before it were written:

    R = share of (targets − current states),   ΔW = R Aᵀ,   A = A(K), column j belonging to request j

A method says where its targets are (`targets`), how a residual is shared out (`share`) and how keys become the
columns ``A`` (`columns`). Its own file reads beside its paper.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..books.ledger import WeightDelta
from ..config import ModelProfile
from ..engine.capture import Tap
from ..engine.rows import Row
from ..engine.sweep import Sweep
from ..engine.values import Site, Values, site_path
from ..errors import ConfigError
from ..logging import get_logger, warn_once
from ..requests import EditRequest
from ..statistics.solve import ridge_columns
from .base import Outcome
from .locate_then_edit import LocateConfig, LocateMethod, mean_key, routing_diagnostics, where_routed

if TYPE_CHECKING:
    from ..anatomy import Anatomy

logger = get_logger(__name__)


@dataclass
class SpreadConfig(LocateConfig):
    """Config of the methods that spread edits over layers; its fields are those of `LocateConfig`."""

    def validate(self) -> None:
        """Put the layers into the order in which they are written."""
        super().validate()
        if self.layers is not None:
            self.layers = sorted(self.layers)

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """The range that the published configurations of 28- to 48-layer models share."""
        n = profile.num_layers
        first, last = round(0.12 * n), max(round(0.28 * n), round(0.12 * n))
        values = super().derive(profile) | {"layers": list(range(first, min(last, n - 1) + 1))}
        if profile.norm != "rms":
            values["clamp_norm_factor"] = 0.75
        return values


def derived_weight(profile: ModelProfile) -> float:
    """λ for a model without published values.

    A typical key is stored to the part ``s / (1 + s)`` with ``s ≈ d_in / λ``. The published λ of 7B models, 15,000,
    is about their ``d_in``; smaller models need a smaller one, or nothing is written.
    """
    return float(min(15000, 4 * profile.hidden_size))


@dataclass
class RidgeConfig(SpreadConfig):
    """Config of the methods that weigh the second moment against the new keys.

    Args:
        mom2_update_weight: λ, how many typical keys the second moment stands for.
    """

    mom2_update_weight: float | None = None

    def validate(self) -> None:
        """Check ranges."""
        super().validate()
        self._require_positive("mom2_update_weight")

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """Fields filled from an hparams file or the model's depth."""
        return (*super().model_dependent_fields(), "mom2_update_weight")

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """λ by the width of the model."""
        return super().derive(profile) | {"mom2_update_weight": derived_weight(profile)}


@dataclass
class LayeredRidgeConfig(RidgeConfig):
    """A `RidgeConfig` whose λ may differ from layer to layer.

    Args:
        layer_weights: λ of each edited layer, from below; ``None``: ``mom2_update_weight`` for all.
    """

    layer_weights: list[float] | None = None

    def validate(self) -> None:
        """Check that there is one per layer."""
        super().validate()
        if self.layer_weights is None:
            return
        name = type(self).__name__
        if not all(weight > 0 for weight in self.layer_weights):
            raise ConfigError(f"{name}.layer_weights must be above 0, not {self.layer_weights!r}")
        if self.layers is not None and len(self.layer_weights) != len(self.layers):
            raise ConfigError(
                f"{name}.layer_weights has {len(self.layer_weights)} entries for {len(self.layers)} layers:"
                " give one per layer, or mom2_update_weight for all"
            )

    def weight_of(self, module: str, anatomy: Anatomy) -> float:
        """λ of the layer that a module is in."""
        assert self.mom2_update_weight is not None
        for layer, weight in zip(self.layers or [], self.layer_weights or [], strict=False):
            if module.startswith(anatomy.layers[layer].path + "."):
                return weight
        return self.mom2_update_weight


@dataclass(frozen=True)
class Stop:
    """One matrix on the way up.

    Args:
        layer: its layer.
        index: place of the layer among the edited ones, from 0.
        modules: name of the projection that is written, for every request.
        measured: where current states are compared with the targets.
        target: wanted states there, ``[requests, d]``.
        site: kind of the measured place.
        label: suffix of the names in a trace.
    """

    layer: int
    index: int
    modules: tuple[str, ...]
    measured: Tap
    target: torch.Tensor
    site: Site = "block"
    label: str = ""


class SpreadMethod(LocateMethod):
    """Base of the methods that spread a batch of edits over layers."""

    config: SpreadConfig
    default_template_lengths = ((10, 5),)

    # ------------------------------------------------------------------ what a method decides

    @property
    def keeps_keys(self) -> bool:
        """Whether later edits must know the keys of this one (they then travel with its deltas)."""
        return False

    def value_layer(self) -> int:
        """Layer at which the values are optimised."""
        return self.layers[-1]

    def value_sites(self) -> tuple[Site, ...]:
        """Sites of that layer at which the values are optimised."""
        return ("block",)

    def value_rows(self, requests: Sequence[EditRequest], rows: list[list[Row]]) -> list[list[Row]]:
        """Rows on which the values are optimised: those that the keys are taken from, unless a method has others."""
        return rows

    def state_rows(self, rewriting: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """Rows at whose fact tokens states are compared with the targets, as many for each request; their mean counts.

        Args:
            rewriting: rows of every request, the bare prompt first.
        """
        return [list(group[:1]) for group in rewriting]

    def initial_states(self, values: Values) -> torch.Tensor:
        """Mean states at the value sites on `state_rows` before the batch, ``[requests, sites, d]``."""
        return values.initials

    def targets(self, values: Values, bare: Sequence[Row], downs: Sequence[tuple[str, ...]]) -> list[Stop]:
        """The matrices to write, in order, and what shall be true once they are.

        Args:
            values: the optimised values.
            bare: row of the bare prompt of every request.
            downs: for each edited layer, the projection out of the MLP for every request.
        """
        top = Tap(site_path(self.bench.anatomy, self.layers[-1], "block"))
        return [Stop(layer, i, downs[i], top, values.value) for i, layer in enumerate(self.layers)]

    def share(self, residual: torch.Tensor, stop: Stop) -> torch.Tensor:
        """The part of ``residual`` ``[requests, d]`` that this matrix shall add: an equal share per layer left."""
        return residual / (len(self.layers) - stop.index)

    @abstractmethod
    def columns(self, module: str, keys: torch.Tensor) -> torch.Tensor:
        """Return ``A`` ``[d_in, n]`` of ``ΔW = R Aᵀ``.

        Args:
            module: name of the projection.
            keys: ``K`` ``[d_in, n]`` fp32, one column per request.
        """

    # ------------------------------------------------------------------ the loop

    @property
    def layers(self) -> list[int]:
        """The edited layers, from below."""
        return self.config.layers or []

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Edit a batch of facts."""
        bench, deltas = self.bench, []
        groups = self.templates()
        rows = self.rows(requests, groups)
        rewriting = [[r for r in group if not r.is_drift] for group in rows]
        bare = [group[0] for group in rewriting]
        states = self.state_rows(rewriting)
        for_values = self.value_rows(requests, rows)
        anatomies = [self.anatomy_for(request) for request in requests]
        downs = [tuple(a.down(layer).path for a in anatomies) for layer in self.layers]
        values = self.optimise(for_values, self.value_layer(), self.value_sites(), self.first_keys(downs))
        stops = self.targets(values, bare, downs)
        started: dict[Tap, torch.Tensor] = {}
        seen: dict[int, torch.Tensor] = {}
        restart = values.route != "full"
        all_rows, state_rows = (
            Sweep(bench.model, bench.anatomy, [row for group in r for row in group], fill=bench.fill, restart=restart)
            for r in (rewriting, states)
        )
        with bench.ledger.provisional() as scope:
            for number, stop in enumerate(stops):
                key_taps = [Tap(module, "input") for module in dict.fromkeys(stop.modules)]
                if number == 0 and for_values is rows:  # the optimisation's first pass has already seen both
                    taken = values.taken
                else:
                    taken = all_rows.read(key_taps, stop.layer)
                    taken = {tap: flat.view(len(requests), -1, flat.shape[-1]) for tap, flat in taken.items()}
                keys = seen[stop.layer] = own_keys(taken, stop.modules)
                current = self._current(stop, number, values, state_rows)
                k = mean_key(where_routed(keys, keys), groups).T  # [d_in, n]
                residual = stop.target - current  # [n, H]
                share = self._at_projection(self.share(residual, stop), stop, anatomies[0]).T  # [H, n]
                columns = torch.empty_like(k)
                for module, mine in members(stop.modules).items():
                    columns[:, mine] = self.columns(module, k[:, mine]).to(columns)
                    delta = WeightDelta(
                        module,
                        left=share[:, mine],
                        right=columns[:, mine].to(share.device),
                        owners=tuple(mine),
                        keys=k[:, mine] if self.keeps_keys else None,
                    )
                    scope.add(delta)
                    deltas.append(delta)
                started.setdefault(stop.measured, residual.norm(dim=-1))
                self._trace(stop, k, columns, share, current, residual)
            wanted = {stop.measured: stop.target for stop in stops}
            reached = state_rows.read(list(wanted), stops[-1].layer if len(wanted) == 1 else 0)
        missing = [
            (target - _mean_states(reached[tap], target).to(target.device)).norm(dim=-1)
            for tap, target in wanted.items()
        ]
        before = torch.stack(list(started.values())).sum(dim=0).clamp_min(1e-12)
        ratio = (torch.stack(missing).sum(dim=0) / before).cpu().tolist()
        diagnostics = [
            self.diagnose(values, j)
            | {"residual_ratio": ratio[j]}
            | routing_diagnostics(anatomies[j], {layer: keys[j] for layer, keys in seen.items()})
            for j in range(len(requests))
        ]
        return Outcome(deltas, diagnostics)

    def first_keys(self, downs: Sequence[tuple[str, ...]]) -> list[Tap]:
        """Where the keys of the first written matrices are seen, in the first pass of the optimisation already."""
        return [Tap(module, "input") for module in dict.fromkeys(downs[0])]

    def _current(self, stop: Stop, number: int, values: Values, rows: Sweep) -> torch.Tensor:
        """States at the measured place as they are now, ``[requests, d]``."""
        anatomy = self.bench.anatomy
        if number == 0:
            for i, site in enumerate(values.sites):
                if stop.measured == Tap(site_path(anatomy, self.value_layer(), site)):
                    return self.initial_states(values)[:, i]
        found = rows.read([stop.measured], stop.layer)[stop.measured]
        return _mean_states(found, stop.target).to(stop.target.device)

    def _trace(
        self,
        stop: Stop,
        keys: torch.Tensor,
        columns: torch.Tensor,
        share: torch.Tensor,
        current: torch.Tensor,
        residual: torch.Tensor,
    ) -> None:
        name = f"{stop.layer}{stop.label}"
        for kind, value in (
            ("k_star", keys),
            ("left", columns),
            ("right", share),
            ("z", stop.target.T),
            ("cur_z", current.T),
            ("residual_total", residual.T),
        ):
            self.bench.note(f"{kind}.{name}", value)

    def _at_projection(self, share: torch.Tensor, stop: Stop, anatomy: Anatomy) -> torch.Tensor:
        """Translate a wanted change of the block's output into one of the projection's output.

        Most blocks add the projection's output to the stream unchanged. Some scale it by a constant, which is
        divided out; behind a post-norm there is no exact translation, and the user is told.
        """
        if stop.site != "block" or anatomy.additive is None or anatomy.additive[stop.layer]:
            return share
        scale = anatomy.residual_scale[stop.layer] if anatomy.residual_scale is not None else None
        if scale:
            return share / scale
        warn_once(
            logger,
            f"{anatomy.model_class} normalises the output of its MLPs, so spreading an edit over layers is only"
            " approximate; check the result, or use a single layer",
        )
        return share


class LayeredRidgeMethod(SpreadMethod):
    """Base of the methods that solve as MEMIT does, with a λ for each layer."""

    config: LayeredRidgeConfig

    def columns(self, module: str, keys: torch.Tensor) -> torch.Tensor:
        """``(λ_l C + K Kᵀ)⁻¹ K``."""
        weight = self.config.weight_of(module, self.bench.anatomy)
        return ridge_columns(self.bench.statistics.factor(module), keys, weight)


def _mean_states(flat: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """States of all rows ``[requests · rows, d]`` averaged over the rows of each request, ``[requests, d]``."""
    return flat.view(targets.shape[0], -1, flat.shape[-1]).mean(dim=1)


def members(modules: Sequence[str]) -> dict[str, list[int]]:
    """Which requests each module is written for: all of them in a dense model."""
    found: dict[str, list[int]] = {}
    for i, module in enumerate(modules):
        found.setdefault(module, []).append(i)
    return found


def own_keys(taken: Mapping[Tap, torch.Tensor], modules: Sequence[str]) -> torch.Tensor:
    """The keys of every request at its own module, ``[requests, templates, d_in]``.

    Args:
        taken: what the inputs of the modules were for all requests, ``[requests, templates, d_in]`` each.
        modules: module of every request.
    """
    if len(set(modules)) == 1:
        return taken[Tap(modules[0], "input")]
    return torch.stack([taken[Tap(module, "input")][i] for i, module in enumerate(modules)])
