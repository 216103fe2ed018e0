"""What MEMIT and its relatives share: values optimised once, then written layer by layer from below.

For every request a target ``z`` is optimised at some place of the model. Then each matrix takes its share of what is
still missing, with keys ``K`` and states ``h`` measured after the matrices before it were written:

    R = share of (Z − H),   ΔW = R Aᵀ,   A = A(K), column j belonging to request j

`SpreadMethod.compute` is this loop (MEMIT's algorithm 1). A method says where its targets are (`targets`), how what is
missing is shared out (`share`) and how keys become the columns ``A`` (`columns`); its file holds only these answers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..books.ledger import WeightDelta
from ..engine.capture import Tap
from ..engine.rows import Row
from ..engine.sweep import Sweep
from ..engine.values import ValuePlace, Values, place_path
from ..logging import get_logger, warn_once
from ..requests import EditRequest
from .base import Outcome
from .locate_then_edit import LocateMethod, mean_key, routing_diagnostics, where_routed

if TYPE_CHECKING:
    from ..anatomy import Anatomy

logger = get_logger(__name__)


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

    # ------------------------------------------------------------------ the loop

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Edit a batch of facts."""
        bench, groups = self.bench, self.templates()
        rows = self.rows(requests, groups)
        anatomies = [self.anatomy_for(request) for request in requests]
        downs = [tuple(a.down(layer).path for a in anatomies) for layer in self.layers]
        value_rows = self.value_rows(requests, rows)
        values = self.optimise(value_rows, self.value_layer(), self.value_places(), self.first_keys(downs))  # Z
        writes = self.targets(values, [group[0] for group in rows], downs)

        read = _Readings(self, rows, values, first_pass=value_rows is rows)
        deltas: list[WeightDelta] = []
        keys_seen: dict[int, torch.Tensor] = {}
        missing_at_first: dict[Tap, torch.Tensor] = {}
        with bench.ledger.provisional() as written:  # measured on the model as it will be, and taken off again
            for write in writes:
                keys = keys_seen[write.layer] = read.keys(write)  # [n, templates, d_in]
                k = mean_key(where_routed(keys, keys), groups).T  # K, [d_in, n]
                current = read.states(write)  # H, [n, d]
                missing = write.target - current  # Z − H
                r = self._at_projection(self.share(missing, write), write, anatomies[0]).T  # R, [d, n]
                a = torch.empty_like(k)  # A, [d_in, n]
                for module, mine in members(write.modules).items():
                    a[:, mine] = self.columns(module, k[:, mine]).to(a)
                    delta = WeightDelta(
                        module,
                        left=r[:, mine],
                        right=a[:, mine].to(r.device),
                        owners=tuple(mine),
                        keys=k[:, mine] if self.keeps_keys else None,
                    )
                    written.add(delta)
                    deltas.append(delta)
                missing_at_first.setdefault(write.measured, missing.norm(dim=-1))
                self._trace(write, k, a, r, current, missing)
            missing_at_last = read.missing(writes)
        before = torch.stack(list(missing_at_first.values())).sum(dim=0).clamp_min(1e-12)
        ratio = (missing_at_last / before).tolist()
        diagnostics = [
            self.diagnose(values, j)
            | {"residual_ratio": ratio[j]}
            | routing_diagnostics(anatomies[j], {layer: keys[j] for layer, keys in keys_seen.items()})
            for j in range(len(requests))
        ]
        return Outcome(deltas, diagnostics)

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check the requests, and that the model has the places whose values are optimised."""
        for place in self.value_places():
            place_path(self.bench.anatomy, self.value_layer(), place)
        super().check(requests)

    # ------------------------------------------------------------------ what a method decides

    @property
    def layers(self) -> list[int]:
        """The edited layers, from below."""
        return sorted(self.config.layers or [])

    @property
    def keeps_keys(self) -> bool:
        """Whether later edits must know the keys of this one (they then travel with its deltas)."""
        return False

    def value_layer(self) -> int:
        """Layer at which the values are optimised."""
        return self.layers[-1]

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
        return [list(group[:1]) for group in rewriting]

    def initial_states(self, values: Values) -> torch.Tensor:
        """Mean states at the value places on `state_rows` before the batch, ``[requests, places, d]``."""
        return values.initials

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

    def _at_projection(self, share: torch.Tensor, write: Write, anatomy: Anatomy) -> torch.Tensor:
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


class _Readings:
    """Keys and states of a batch, read before each write on the model as it then is.

    What the first write needs was seen in the first pass of the value optimisation already. Later readings go on from
    the states that entered the last written layer (`Sweep`).

    Args:
        method: whose batch it is.
        rows: of every request.
        values: the optimised ones.
        first_pass: whether the values were optimised on these rows.
    """

    def __init__(self, method: SpreadMethod, rows: Sequence[Sequence[Row]], values: Values, *, first_pass: bool):
        self.method, self.values, self.first_pass, self.first = method, values, first_pass, True
        rewriting = [[row for row in group if not row.is_drift] for group in rows]
        self.key_sweep, self.state_sweep = self._sweep(rewriting), self._sweep(method.state_rows(rewriting))

    def _sweep(self, rows: Sequence[Sequence[Row]]) -> Sweep:
        bench, flat = self.method.bench, [row for group in rows for row in group]
        return Sweep(bench.model, bench.anatomy, flat, fill=bench.fill, restart=self.values.route != "full")

    def keys(self, write: Write) -> torch.Tensor:
        """Keys of every request at the matrix that is written for it, ``[requests, templates, d_in]``."""
        if self.first and self.first_pass:
            return own_keys(self.values.taken, write.modules)
        taps = [Tap(module, "input") for module in dict.fromkeys(write.modules)]
        taken = self.key_sweep.read(taps, write.layer)
        count = len(write.modules)
        return own_keys({tap: flat.view(count, -1, flat.shape[-1]) for tap, flat in taken.items()}, write.modules)

    def states(self, write: Write) -> torch.Tensor:
        """States at the measured place, ``[requests, d]``."""
        first, self.first = self.first, False
        if first:
            anatomy, layer = self.method.bench.anatomy, self.method.value_layer()
            for i, place in enumerate(self.values.places):
                if write.measured == Tap(place_path(anatomy, layer, place)):
                    return self.method.initial_states(self.values)[:, i]
        return _mean_states(self.state_sweep.read([write.measured], write.layer)[write.measured], write.target)

    def missing(self, writes: Sequence[Write]) -> torch.Tensor:
        """How far every request is from its targets, ``[requests]``: the sum over the places where they are."""
        wanted = {write.measured: write.target for write in writes}
        reached = self.state_sweep.read(list(wanted), writes[-1].layer if len(wanted) == 1 else 0)
        distances = [(target - _mean_states(reached[tap], target)).norm(dim=-1) for tap, target in wanted.items()]
        return torch.stack(distances).sum(dim=0)


def _mean_states(flat: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """States of all rows ``[requests · rows, d]`` averaged over the rows of each request, beside ``targets``."""
    return flat.view(targets.shape[0], -1, flat.shape[-1]).mean(dim=1).to(targets.device)


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
