"""Edits as a set: all facts that a model carries, solved for together from its original weights.

A sequence of batches depends on the order of the batches, and each one disturbs those before. Here the facts
``1 … n`` are one system, and it is solved again and again (passes ``t = 1 … T``), each time with the values, keys and
states of the model as the pass before left it. Every written matrix grows by

    R_t = share of (Z_t − H_t),   ΔW_t = ΔW_{t−1} + R_t A(K_t)ᵀ                                 (cf. MEMIT eq. 14, 20)

with the columns ``A`` of the method (`SpreadMethod.columns`) for *all* facts. A fact that holds gets no new value: its
target is the state that it has, which keeps it in place while the others move. Under a large λ a pass stores a small
part of what is missing, and a fact that needs little is not written more than it needs.

The result is a function of the set of facts and the original model. Facts are taken in the order of a hash of their
content, and the values of the first pass, which belong to the original model, are optimised one fact at a time, so
that their bits do not depend on the company either. They are kept (`SpreadMethod.state_dict`), which makes it cheap to
add a fact or to take one back: values are most of the cost.

Processes that share their work (`statistics.workers`) split the values among them; everything else each does itself.

References: one joint solve and a sequence that accounts for history are equivalent in theory (arXiv 2605.26670);
repeated edits (arXiv 2503.11895).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..books.ledger import WeightDelta
from ..engine.forward import device_of
from ..engine.rows import Row
from ..logging import get_logger, progress_bar
from ..requests import EditRequest
from ..values.optimise import Values, join_values
from ..values.settings import ValueSettings
from .base import Outcome
from .first_values import FirstValue, content_key
from .spread import Readings, SpreadMethod, members

logger = get_logger(__name__)
SOLVE_ONLY = (
    *("mom2_update_weight", "layer_weights", "keep_edited_keys", "L2", "nullspace_threshold", "nullspace_fraction"),
    *("leak_weight", "nullspace", "refresh_every"),
    *("emmet_lambda", "update_norm_lambda", "sphere_fraction", "sphere_strength", "rect_keep", "rows_per_step"),
    *("prompt_format", "system"),  # requests say it
    *("stats_dataset", "stats_tokens", "stats_dir", "stats_ridge"),
    *("sequence", "joint_passes", "joint_until", "joint_caution"),
)
"""Fields of a config that have no influence on the values of the first pass."""


class JointSolve:
    """One solve of a set of facts.

    The caller sees to it that the model has its original weights and its ledger is empty (`Ledger.emptied`).

    Args:
        method: that solves.
        requests: the set, without repetitions and contradictions, in any order.
        passes: at most so many.
        until: probability from which on a fact holds (``joint_until``).
        after_pass: called with the number of each pass while the model shows its result.
    """

    def __init__(
        self,
        method: SpreadMethod,
        requests: Sequence[EditRequest],
        passes: int,
        until: float,
        *,
        after_pass: Callable[[int], None] | None = None,
    ):
        self.method, self.passes, self.until, self.after_pass = method, passes, until, after_pass
        self.workers = method.bench.statistics.workers
        self.requests = sorted(requests, key=content_key)
        self.groups = method.templates()
        context = {k: v for k, v in method.config.to_dict().items() if k not in SOLVE_ONLY}
        self._context = json.dumps([context, self.groups], sort_keys=True, default=str)

    def solve(self) -> Outcome:
        """Solve; the owners of the deltas' columns are places in ``requests``.

        Raises:
            EditFailedError: if a loss is not finite.
        """
        method, bench = self.method, self.method.bench
        self.find_first_values()
        rows = method.rows(self.requests, self.groups)
        value_rows = method.value_rows(self.requests, rows)
        anatomies = [method.anatomy_for(request) for request in self.requests]
        downs, bare = method.downs(anatomies), [group[0] for group in rows]
        moved = [0] * len(rows)  # in how many passes each fact got a value
        first_columns: dict[str, torch.Tensor] = {}
        changes: dict[str, JointChange] = {}
        method.caution = method.config.joint_caution
        try:
            with bench.ledger.provisional() as written:
                for number in range(1, self.passes + 1):
                    values = self._values(rows, value_rows, first=number == 1)
                    moving = values.offsets.flatten(1).ne(0).any(dim=1).tolist()
                    if not any(moving):
                        break
                    moved = [m + now for m, now in zip(moved, moving, strict=True)]
                    logger.info("joint solve, pass %d: %d of %d facts do not hold yet", number, sum(moving), len(rows))
                    read = Readings(method, rows, self.groups, values.initials, restart=values.route != "full")
                    for i, write in enumerate(method.targets(values, bare, downs)):
                        # Nothing below the first matrix changes: its keys and columns stay those of the first pass.
                        k = read.keys(write) if i > 0 or number == 1 else None
                        missing = write.target - read.states(write)
                        r = method.at_projection(method.share(missing, write), write, anatomies[0]).T
                        for module, mine in members(write.modules).items():
                            change = changes.setdefault(module, JointChange(module, tuple(mine)))
                            a = first_columns[module] if k is None else method.columns(module, k[:, mine]).to(r)
                            if i == 0:
                                first_columns[module] = a
                            change.add(r[:, mine], a, None if k is None or not method.keeps_keys else k[:, mine])
                            written.put(change.as_one())
                    if self.after_pass is not None:
                        self.after_pass(number)
                else:
                    values = self._values(rows, value_rows, measure=True)
        finally:
            method.caution = 1.0
        deltas = [delta for change in changes.values() for delta in change.deltas()]
        return Outcome(deltas, self._diagnostics(moved, values))

    def name(self, request: EditRequest) -> str:
        """Under which the first value of a request is known."""
        return hashlib.sha256(f"{content_key(request)}{self._context}".encode()).hexdigest()

    def find_first_values(self) -> None:
        """Optimise the values of the first pass that are not known yet, on the original model.

        One fact at a time, because the last digits of what several rows give together depend on all of them.
        ``rows_per_step`` sets how many, for those who do not mind (an accelerator has little to do with one).

        Raises:
            EditFailedError: if a loss is not finite.
        """
        method, size = self.method, self.method.config.rows_per_step or 1
        todo = [request for request in self.requests if self.name(request) not in method.first_values]
        mine, found = [todo[i] for i in self.workers.share(len(todo))], dict[str, FirstValue]()
        show = method.bench.show_progress and len(mine) > 1 and self.workers.is_main
        with progress_bar(len(mine), "first values", show=show, unit="edit") as bar:
            for start in range(0, len(mine), size):
                chosen = mine[start : start + size]
                rows = method.value_rows(chosen, method.rows(chosen, self.groups))
                values = method.optimise(rows, method.value_layer(), method.value_places(), [])
                for request, offset, probability in zip(chosen, values.offsets, values.probability, strict=True):
                    found[self.name(request)] = FirstValue(offset.cpu().clone(), probability)
                bar.update(len(chosen))
        for part in self.workers.gather(found):
            for name, value in part.items():
                method.first_values[name] = value

    def _values(
        self,
        rows: Sequence[Sequence[Row]],
        value_rows: Sequence[Sequence[Row]],
        *,
        first: bool = False,
        measure: bool = False,
    ) -> Values:
        """The values of a pass, with the states that they start from as ``initials``; δ = 0 for a fact that holds.

        Args:
            rows: of every request.
            value_rows: the same, as values are optimised.
            first: those of the first pass, which are known.
            measure: only find out what the model says; nothing is optimised.
        """
        method, places = self.method, self.method.value_places()
        if not first:
            settings = replace(method.value_settings(), holds_from=self.until)
            return self._shared(value_rows, replace(settings, steps=1) if measure else settings)
        known = [method.first_values[self.name(request)] for request in self.requests]
        before = Readings.of_places(method, rows, self.groups)
        return Values(
            places,
            before,
            torch.stack([value.offset for value in known]).to(before),
            [[] for _ in known],
            [torch.empty(0) for _ in known],
            [0] * len(known),
            [value.probability for value in known],
        )

    def _shared(self, value_rows: Sequence[Sequence[Row]], settings: ValueSettings) -> Values:
        """Values of all facts on the model as it is, found by all processes, with the states that they start from."""
        method, count = self.method, len(value_rows)
        mine, parts = self.workers.share(count), list[tuple[range, Values]]()
        if mine:
            rows = [value_rows[i] for i in mine]
            values = method.optimise(rows, method.value_layer(), method.value_places(), [], settings=settings)
            values = replace(values, initials=method.states_before(values, rows, self.groups), taken={})
            if self.workers.count == 1:
                return values
            parts = [(mine, replace(values, initials=values.initials.cpu(), offsets=values.offsets.cpu()))]
        gathered = [entry for part in self.workers.gather(parts) for entry in part]
        order = torch.tensor([i for indices, _ in gathered for i in indices]).argsort().tolist()
        joined = join_values([values for _, values in gathered])
        device = device_of(method.bench.model)
        return replace(
            joined,
            initials=joined.initials[order].to(device),
            offsets=joined.offsets[order].to(device),
            loss=[joined.loss[i] for i in order],
            path=[joined.path[i] for i in order],
            updates=[joined.updates[i] for i in order],
            probability=[joined.probability[i] for i in order],
        )

    def _diagnostics(self, moved: Sequence[int], values: Values) -> list[dict[str, Any]]:
        """Numbers about every request.

        Args:
            moved: in how many passes each one got a value.
            values: what the last look at the finished model saw.
        """
        factor, numbers = self.method.value_settings().nll_factor, []
        for request, passes, loss, (_, after) in zip(
            self.requests, moved, values.loss, values.probability, strict=True
        ):
            probability = math.exp(-loss[0][1] / factor) if loss else after
            numbers.append(
                {
                    "target_probability_before": self.method.first_values[self.name(request)].probability[0],
                    "target_probability_after": after,
                    "joint": {
                        "iterations": self.passes,
                        "until": self.until,
                        "passes": passes,
                        "probability": probability,
                        "holds": probability >= self.until,
                    },
                }
            )
        return numbers


class JointChange:
    """What the passes have added to one matrix.

    Args:
        module: its name.
        owners: the facts that it holds.
    """

    def __init__(self, module: str, owners: tuple[int, ...]):
        self.module, self.owners = module, owners
        self.factors: list[tuple[torch.Tensor, torch.Tensor]] | None = []  # None: the matrix is smaller
        self.total: torch.Tensor | None = None
        self.keys: torch.Tensor | None = None

    def add(self, r: torch.Tensor, a: torch.Tensor, keys: torch.Tensor | None) -> None:
        """Add ``R Aᵀ``; equal ``A`` share their columns.

        Args:
            r: ``[d, n]``.
            a: ``[d_in, n]``.
            keys: that later edits are to leave alone; ``None``: as before.
        """
        grown = r @ a.T
        self.total = grown if self.total is None else self.total + grown
        self.keys = self.keys if keys is None else keys
        if self.factors is None:
            return
        if self.factors and self.factors[-1][1] is a:
            r = r + self.factors.pop()[0]
        self.factors.append((r, a))
        if sum(left.numel() + right.numel() for left, right in self.factors) > self.total.numel():
            self.factors = None

    def as_one(self) -> WeightDelta:
        """The change as it is laid on the weight for measuring."""
        return WeightDelta(self.module, dense=self.total)

    def deltas(self) -> list[WeightDelta]:
        """The change as it is kept: in factors with owners as long as these are smaller than the matrix."""
        if self.factors is None:
            return [replace(self.as_one(), keys=self.keys)]
        parts = [WeightDelta(self.module, left=r, right=a, owners=self.owners) for r, a in self.factors]
        return [*parts[:-1], replace(parts[-1], keys=self.keys)]
