"""What MEMIT and its relatives share: values optimised once, then written layer by layer from below.

For every request a target ``z`` is optimised at some place of the model. Then each matrix takes its share of what is
still missing, with keys ``K`` and states ``h`` measured after the matrices before it were written:

    R = share of (Z − H),   ΔW = R Aᵀ,   A = A(K), column j belonging to request j

`SpreadMethod.compute` is this loop (MEMIT's algorithm 1). A method says where its targets are (`targets`), how what is
missing is shared out (`share`) and how keys become the columns ``A`` (`columns`); its file holds only these answers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..books.ledger import WeightDelta
from ..engine.capture import Tap
from ..engine.rows import Row
from ..engine.sweep import KEPT_BYTES, Sweep
from ..errors import ConfigError
from ..logging import get_logger, warn_once
from ..requests import EditRequest
from ..values.optimise import ValuePlace, Values, pick_values, place_path
from .base import Outcome, Workbench
from .first_values import FirstValues
from .locate_then_edit import LocateConfig, LocateMethod, mean_key, routing_diagnostics, where_routed

if TYPE_CHECKING:
    from ..anatomy import Anatomy

logger = get_logger(__name__)
_AT_ONCE = 256
"""Requests that are read together."""


@dataclass
class KeepingConfig(LocateConfig):
    """Fields of the methods that may leave alone what earlier batches wrote; see also `LocateConfig`.

    Args:
        keep_edited_keys: also leave alone what earlier batches wrote, by the keys ``K_e`` of the edits that the model
            carries (of those that brought theirs along) beside the second moment: ``λ C + K_e K_eᵀ`` instead of
            ``λ C``; arXiv 2605.26670. Without such edits it changes nothing. ``None``: what serves the method
            (`keeps_keys_by_default`). The published algorithms are ``False``, and so are the packaged files with
            published values.
    """

    keeps_keys_by_default: ClassVar[bool] = True
    """What ``keep_edited_keys=None`` means: on where it was measured to help in sequences (docs/methods/memit.md)."""

    keep_edited_keys: bool | None = None

    @classmethod
    def published(cls) -> dict[str, Any]:
        """Each batch is solved as if it were the first."""
        return super().published() | {"keep_edited_keys": False}


@dataclass(frozen=True)
class Write:
    """One matrix to write, and what is to be true once it and those after it are written.

    Args:
        layer: its layer.
        index: place of the layer among the edited ones, from 0.
        modules: name of the projection that is written, for every request (routed experts differ).
        measured: where current states are compared with the targets.
        target: wanted states there, ``[requests, d]``.
        place: kind of the measured place.
        label: suffix of the names in a trace.
    """

    layer: int
    index: int
    modules: tuple[str, ...]
    measured: Tap
    target: torch.Tensor
    place: ValuePlace = "block"
    label: str = ""


class SpreadMethod(LocateMethod):
    """Base of the methods that spread a batch of edits over layers."""

    default_template_lengths = ((10, 5),)
    caution = 1.0
    """Factor of the weight of old knowledge; other than 1 in a joint solve (``joint_caution``)."""

    solves_together: ClassVar[bool] = True
    """Whether a set of facts can be solved for as one (`joint`): no value depends on those of other facts."""

    def __init__(self, bench: Workbench, config: LocateConfig):
        super().__init__(bench, config)
        self.first_values = FirstValues()
        self._only: int | None = None  # the boundary layer (BLUE) that is written

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The first values of the facts that were solved for together; saved so that they are not computed again."""
        return self.first_values.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ConfigError: if the tensors are not this method's.
        """
        try:
            self.first_values.load_state_dict(state)
        except ValueError as error:
            raise ConfigError(f"{self.capabilities.name} was given values that it cannot use: {error}") from error

    # ------------------------------------------------------------------ the loop

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Edit a batch of facts."""
        if not self.config.boundary_layers:
            return self._compute(requests)
        outcomes: list[Outcome] = []
        try:
            with self.bench.ledger.provisional() as written:
                for layer in self.config.written_layers:
                    self._only = layer
                    outcomes.append(self._compute(requests))
                    for delta in outcomes[-1].deltas:
                        written.add(delta)
        finally:
            self._only = None
        first, last = outcomes[0].diagnostics, outcomes[-1].diagnostics
        before = "target_probability_before"
        diagnostics = [b | {before: a[before]} for a, b in zip(first, last, strict=True)]
        return Outcome([delta for outcome in outcomes for delta in outcome.deltas], diagnostics)

    def compute_apart(self, requests: Sequence[EditRequest]) -> list[Outcome]:
        """Edit each fact alone; the values, which take most of the time, are optimised together."""
        if not self.solves_together or self.config.boundary_layers or not self.can_share(requests):
            return super().compute_apart(requests)
        rows, values, first_pass = self._values(requests)
        return [
            self._written(
                [request], [rows[i]], pick_values(values, i), {t: h[i : i + 1] for t, h in first_pass.items()}
            )
            for i, request in enumerate(requests)
        ]

    def _compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Values of a batch, written to the `layers`."""
        return self._written(requests, *self._values(requests))

    def _values(self, requests: Sequence[EditRequest]) -> tuple[list[list[Row]], Values, Mapping[Tap, torch.Tensor]]:
        """The rows of every request, its value, and what the first pass over these rows has seen already."""
        rows = self.rows(requests, self.templates())
        value_rows = self.value_rows(requests, rows)
        downs = self.downs([self.anatomy_for(request) for request in requests])
        values = self.optimise(value_rows, self.value_layer(), self.value_places(), self.first_keys(downs))  # δ
        return rows, values, values.taken if value_rows is rows else {}

    def _written(
        self,
        requests: Sequence[EditRequest],
        rows: Sequence[Sequence[Row]],
        values: Values,
        first_pass: Mapping[Tap, torch.Tensor],
    ) -> Outcome:
        """The changes that write the values, and what is to be said about them."""
        anatomies = [self.anatomy_for(request) for request in requests]
        deltas, numbers = self.write(values, rows, self.templates(), anatomies, first_pass)
        return Outcome(deltas, [self.diagnose(values, j) | numbers[j] for j in range(len(requests))])

    def write(
        self,
        values: Values,
        rows: Sequence[Sequence[Row]],
        groups: Sequence[Sequence[str]],
        anatomies: Sequence[Anatomy],
        first_pass: Mapping[Tap, torch.Tensor],
        held: Callable[[str], torch.Tensor] | None = None,
    ) -> tuple[list[WeightDelta], list[dict[str, Any]]]:
        """Write values into the matrices, from below.

        Args:
            values: one for every group of rows.
            rows: what keys are taken from.
            groups: of context templates, for averaging keys.
            anatomies: for every group of rows.
            first_pass: see `Readings`.
            held: module → keys ``[d_in, m]`` that the matrix is to answer as before, asked when it is written.

        Returns:
            What changed, column j belonging to group j, and numbers for the diagnostics of every group.
        """
        downs = self.downs(anatomies)
        before = self.states_before(values, rows, groups)
        writes = self.targets(replace(values, initials=before), [group[0] for group in rows], downs)  # Z

        read = Readings(self, rows, groups, before, restart=values.route != "full")
        read.first_pass = first_pass
        deltas: list[WeightDelta] = []
        missing_at_first: dict[Tap, torch.Tensor] = {}
        with self.bench.ledger.provisional() as written:  # measured on the model as it will be, and taken off again
            for write in writes:
                k = read.keys(write)  # K, [d_in, n]
                current = read.states(write)  # H, [n, d]
                missing = write.target - current  # Z − H
                r = self.at_projection(self.share(missing, write), write, anatomies[0]).T  # R, [d, n]
                a = torch.empty_like(k)  # A, [d_in, n]
                for module, mine in members(write.modules).items():
                    own = k[:, mine] if held is None else torch.cat([k[:, mine], held(module).to(k)], dim=1)
                    a[:, mine] = self.columns(module, own)[:, : len(mine)].to(a)
                    delta = self.delta(module, r, a, k, mine)
                    written.add(delta)
                    deltas.append(delta)
                missing_at_first.setdefault(write.measured, missing.norm(dim=-1))
                self._trace(write, k, a, r, current, missing)
            missing_at_last = read.missing(writes)
        first = torch.stack(list(missing_at_first.values())).sum(dim=0).clamp_min(1e-12)
        ratio = (missing_at_last / first).tolist()
        numbers = [{"residual_ratio": ratio[j]} | read.routing(j, anatomies[j]) for j in range(len(rows))]
        return deltas, numbers

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check the requests, and that the model has the places whose values are optimised."""
        for place in self.value_places():
            place_path(self.bench.anatomy, self.value_layer(), place)
        super().check(requests)

    def delta(
        self, module: str, r: torch.Tensor, a: torch.Tensor, k: torch.Tensor, mine: Sequence[int]
    ) -> WeightDelta:
        """``R Aᵀ`` of the requests whose facts this module holds.

        Args:
            module: name of the projection.
            r: ``R`` ``[d, n]``.
            a: ``A`` ``[d_in, n]``.
            k: ``K`` ``[d_in, n]``.
            mine: the requests, as indices of columns.
        """
        return WeightDelta(
            module,
            left=r[:, mine],
            right=a[:, mine].to(r.device),
            owners=tuple(mine),
            keys=k[:, mine] if self.keeps_keys else None,
        )

    def downs(self, anatomies: Sequence[Anatomy]) -> list[tuple[str, ...]]:
        """For each edited layer, the projection out of the MLP for every request."""
        return [tuple(a.down(layer).path for a in anatomies) for layer in self.layers]

    # ------------------------------------------------------------------ what a method decides

    @property
    def layers(self) -> list[int]:
        """The layers that share what is written, from below; of boundary layers the one whose turn it is."""
        return self.config.written_layers if self._only is None else [self._only]

    @property
    def keeps_keys(self) -> bool:
        """Whether later edits leave this one alone, and this one those before (its keys travel with its deltas)."""
        config = self.config
        if not isinstance(config, KeepingConfig):
            return False
        return config.keeps_keys_by_default if config.keep_edited_keys is None else config.keep_edited_keys

    def earlier_keys(self, module: str) -> torch.Tensor | None:
        """Keys ``[d_in, m]`` of earlier edits that the matrix is to answer as it does; ``None``: there are none."""
        return self.bench.ledger.keys(module) if self.keeps_keys else None

    def value_layer(self) -> int:
        """Layer at which the values are optimised."""
        return self.layers[-1]

    def value_sites(self) -> list[tuple[int, tuple[ValuePlace, ...]]]:
        """The value layer; every layer that is written, if each has values of its own."""
        layers = self.config.written_layers if self.config.boundary_layers else [self.value_layer()]
        return [(layer, self.value_places()) for layer in layers]

    def value_places(self) -> tuple[ValuePlace, ...]:
        """Places of that layer at which the values are optimised."""
        return ("block",)

    def value_rows(self, requests: Sequence[EditRequest], rows: list[list[Row]]) -> list[list[Row]]:
        """Rows on which the values are optimised: those that the keys are taken from, unless a method has others."""
        return rows

    def first_keys(self, downs: Sequence[tuple[str, ...]]) -> list[Tap]:
        """Where the keys of the first written matrices are seen, in the first pass of the optimisation already."""
        return [Tap(module, "input") for module in dict.fromkeys(downs[0])]

    def state_rows(self, rewriting: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """Rows at whose fact tokens states are compared with the targets, as many for each request; their mean counts.

        Args:
            rewriting: rows of every request, the bare prompt first.
        """
        return [[row for row in group if row.bare] or list(group[:1]) for group in rewriting]

    def initial_states(self, values: Values) -> torch.Tensor:
        """Mean states at the value places on `state_rows` before the batch, ``[requests, places, d]``.

        What `targets` is given as the ``initials`` of the values.
        """
        return values.initials

    def states_before(
        self, values: Values, rows: Sequence[Sequence[Row]], groups: Sequence[Sequence[str]]
    ) -> torch.Tensor:
        """`initial_states`, read anew for requests in two formats, of which the optimisation starts from one."""
        several = sum(row.bare for row in rows[0]) > 1
        return Readings.of_places(self, rows, groups) if several else self.initial_states(values)

    def targets(self, values: Values, bare: Sequence[Row], downs: Sequence[tuple[str, ...]]) -> list[Write]:
        """The matrices to write, in order, and the states that they lead to.

        Args:
            values: the optimised values.
            bare: row of the bare prompt of every request.
            downs: for each edited layer, the projection out of the MLP for every request.
        """
        top = Tap(place_path(self.bench.anatomy, self.layers[-1], "block"))
        return [Write(layer, i, downs[i], top, values.value) for i, layer in enumerate(self.layers)]

    def share(self, missing: torch.Tensor, write: Write) -> torch.Tensor:
        """The part of what is ``missing`` ``[requests, d]`` that this matrix adds: an equal share per layer left."""
        return missing / (len(self.layers) - write.index)

    @abstractmethod
    def columns(self, module: str, keys: torch.Tensor) -> torch.Tensor:
        """Return ``A`` ``[d_in, n]`` of ``ΔW = R Aᵀ``.

        Args:
            module: name of the projection.
            keys: ``K`` ``[d_in, n]`` fp32, one column per request.
        """

    # ------------------------------------------------------------------ inside

    def _trace(
        self,
        write: Write,
        keys: torch.Tensor,
        columns: torch.Tensor,
        share: torch.Tensor,
        current: torch.Tensor,
        missing: torch.Tensor,
    ) -> None:
        name = f"{write.layer}{write.label}"
        for kind, value in (
            ("k_star", keys),
            ("left", columns),
            ("right", share),
            ("z", write.target.T),
            ("cur_z", current.T),
            ("residual_total", missing.T),
        ):
            self.bench.note(f"{kind}.{name}", value)

    def at_projection(self, share: torch.Tensor, write: Write, anatomy: Anatomy) -> torch.Tensor:
        """Translate a wanted change of the block's output into one of the projection's output.

        Most blocks add the projection's output to the stream unchanged. Some scale it by a constant, which is
        divided out; behind a post-norm there is no exact translation, and the user is told.
        """
        if write.place != "block" or anatomy.additive is None or anatomy.additive[write.layer]:
            return share
        scale = anatomy.residual_scale[write.layer] if anatomy.residual_scale is not None else None
        if scale:
            return share / scale
        warn_once(
            logger,
            f"{anatomy.model_class} normalises the output of its MLPs, so spreading an edit over layers is only"
            " approximate; check the result, or use a single layer",
        )
        return share


class Readings:
    """Keys and states of a batch, read before each write on the model as it then is.

    Later readings go on from the states that entered the last written layer (`Sweep`). Many requests are read in
    parts, of which only averages are kept.

    Args:
        method: whose batch it is.
        rows: of every request.
        groups: of context templates, for averaging keys.
        before: states at the value places before anything was written, ``[requests, places, d]``.
        restart: whether the model can be run from the middle.
    """

    first_pass: Mapping[Tap, torch.Tensor]
    """What the value optimisation has already seen, ``[requests, templates, d]``; spares a reading."""

    def __init__(
        self,
        method: SpreadMethod,
        rows: Sequence[Sequence[Row]],
        groups: Sequence[Sequence[str]],
        before: torch.Tensor,
        *,
        restart: bool = True,
    ):
        self.method, self.groups, self.before, self.first, self.first_pass = method, groups, before, True, {}
        self.routed: dict[int, torch.Tensor] = {}
        rewriting = [[row for row in group if not row.is_drift] for group in rows]
        bench, parts = method.bench, -(-len(rows) // _AT_ONCE)

        def sweeps(rows: Sequence[Sequence[Row]]) -> list[Sweep]:
            cut = [rows[i : i + _AT_ONCE] for i in range(0, len(rows), _AT_ONCE)]
            flat = [[row for group in part for row in group] for part in cut]
            kept = KEPT_BYTES // parts
            return [Sweep(bench.model, bench.anatomy, f, fill=bench.fill, restart=restart, kept=kept) for f in flat]

        self._key_sweeps, self._state_sweeps = sweeps(rewriting), sweeps(method.state_rows(rewriting))
        self._templates = len(rewriting[0])

    @classmethod
    def of_places(
        cls, method: SpreadMethod, rows: Sequence[Sequence[Row]], groups: Sequence[Sequence[str]]
    ) -> torch.Tensor:
        """States at the value places as they are, ``[requests, places, d]``."""
        read = cls(method, rows, groups, torch.empty(len(rows)))
        paths = (place_path(method.bench.anatomy, method.value_layer(), place) for place in method.value_places())
        taps = [Tap(path) for path in paths]
        states = read._mean_states(taps, 0)
        return torch.stack([states[tap] for tap in taps], dim=1)

    def keys(self, write: Write) -> torch.Tensor:
        """The averaged key of every request at the matrix that is written for it, ``K`` ``[d_in, n]``."""
        taps = [Tap(module, "input") for module in dict.fromkeys(write.modules)]
        averaged, routed = [], []
        for part, sweep in enumerate(self._key_sweeps):
            modules = write.modules[part * _AT_ONCE : (part + 1) * _AT_ONCE]
            if self.first and all(tap in self.first_pass for tap in taps):
                chosen = slice(part * _AT_ONCE, (part + 1) * _AT_ONCE)
                taken = {tap: self.first_pass[tap][chosen] for tap in taps}
            else:
                flat = sweep.read(taps, write.layer)
                taken = {tap: states.view(len(modules), self._templates, -1) for tap, states in flat.items()}
            keys = own_keys(taken, modules)
            averaged.append(mean_key(where_routed(keys, keys), self.groups))
            routed.append((keys != 0).any(dim=-1))
        self.routed[write.layer] = torch.cat(routed)
        return torch.cat(averaged).T

    def states(self, write: Write) -> torch.Tensor:
        """States at the measured place, ``[requests, d]``."""
        first, self.first = self.first, False
        if first:
            anatomy, method = self.method.bench.anatomy, self.method
            for i, place in enumerate(method.value_places()):
                if write.measured == Tap(place_path(anatomy, method.value_layer(), place)):
                    return self.before[:, i]
        return self._mean_states([write.measured], write.layer)[write.measured].to(write.target.device)

    def missing(self, writes: Sequence[Write]) -> torch.Tensor:
        """How far every request is from its targets, ``[requests]``: the sum over the places where they are."""
        wanted = {write.measured: write.target for write in writes}
        reached = self._mean_states(list(wanted), writes[-1].layer if len(wanted) == 1 else 0)
        return torch.stack([(t - reached[tap].to(t.device)).norm(dim=-1) for tap, t in wanted.items()]).sum(dim=0)

    def routing(self, j: int, anatomy: Anatomy) -> dict[str, Any]:
        """`routing_diagnostics` of one request."""
        return routing_diagnostics(anatomy, {layer: routed[j] for layer, routed in self.routed.items()})

    def _mean_states(self, taps: Sequence[Tap], layer: int) -> dict[Tap, torch.Tensor]:
        """States averaged over the rows of each request, ``[requests, d]``."""
        count, parts = len(self.before), [sweep.read(taps, layer) for sweep in self._state_sweeps]
        flat = {tap: torch.cat([part[tap] for part in parts]) for tap in taps}
        return {tap: states.view(count, -1, states.shape[-1]).mean(dim=1) for tap, states in flat.items()}


def members(modules: Sequence[str]) -> dict[str, list[int]]:
    """Which requests each module is written for: all of them in a dense model."""
    requests: dict[str, list[int]] = {}
    for i, module in enumerate(modules):
        requests.setdefault(module, []).append(i)
    return requests


def own_keys(taken: Mapping[Tap, torch.Tensor], modules: Sequence[str]) -> torch.Tensor:
    """The keys of every request at its own module, ``[requests, templates, d_in]``.

    Args:
        taken: what the inputs of the modules were for all requests, ``[requests, templates, d_in]`` each.
        modules: module of every request.
    """
    if len(set(modules)) == 1:
        return taken[Tap(modules[0], "input")]
    return torch.stack([taken[Tap(module, "input")][i] for i, module in enumerate(modules)])
