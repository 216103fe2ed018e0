"""The loss of a value optimisation: which sequences are run for a request, and what is read from their logits.

All requests of a batch run together, so each term is index arithmetic over the positions that the sequences want,
summed for each request on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..engine.rows import Row


@dataclass(frozen=True)
class Lane:
    """One sequence to run, and what is read from it.

    Args:
        ids: token ids.
        fact: index of the fact token.
        positions: indices whose logits are read.
        drift: per position, whether its whole distribution is compared (else one target's probability is read).
        targets: per position, the token it should predict (0 where ``drift``).
        owner: the request's place in the batch.
        template: index of the context template; -1 for a drift row.
        weights: factor of the loss at each position with a target; empty: 1.
        shifts: see `Row`.
    """

    ids: tuple[int, ...]
    fact: int
    positions: tuple[int, ...]
    drift: tuple[bool, ...]
    targets: tuple[int, ...]
    owner: int
    template: int
    weights: tuple[float, ...] = ()
    shifts: tuple[tuple[int, torch.Tensor], ...] = field(default=(), compare=False)

    def weight(self, k: int) -> float:
        """Factor of the loss at position ``k``."""
        return self.weights[k - sum(self.drift[:k])] if self.weights and not self.drift[k] else 1.0


def lanes_of(rows: Sequence[Row], owner: int, *, drift: bool = True, shared: bool = True) -> list[Lane]:
    """What has to be run for the rows of one request, with or without its drift row.

    A drift row that is read at its fact token needs nothing behind it. Where the bare prompt begins with the same
    tokens (it starts with the subject), its own fact token gives that distribution, and no row is needed at all; not
    ``shared`` for who asks for the gradient of every row, and so needs a row for the drift alone.
    """
    lanes = []
    for row in rows:
        if not row.is_drift:
            nothing = (False,) * len(row.positions)
            given = (row.targets, owner, row.template, row.weights, row.shifts)
            lanes.append(Lane(row.ids, row.fact, row.positions, nothing, *given))
    for row in rows:
        if not row.is_drift or not drift:
            continue
        ids = row.ids[: row.fact + 1] if row.positions == (row.fact,) else row.ids
        bare = next(k for k, lane in enumerate(lanes) if lane.template == 0)
        lane = lanes[bare]
        if shared and ids == lane.ids[: lane.fact + 1] and row.fact == lane.fact:
            lanes[bare] = replace(
                lane,
                positions=(row.fact, *lane.positions),
                drift=(True, *lane.drift),
                targets=(0, *lane.targets),
            )
        else:
            zeros = (0,) * len(row.positions)
            lanes.append(Lane(ids, row.fact, row.positions, (True,) * len(row.positions), zeros, owner, row.template))
    return lanes


@dataclass(frozen=True)
class _Reading:
    """Positions of one kind: where they are among the logits, whose they are, what they predict, their weight."""

    at: torch.Tensor
    slot: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


class Terms:
    """The loss terms of a batch as index arithmetic over the wanted positions of its lanes.

    Args:
        lanes: in the order in which the replay runs them.
        count: number of requests; their lanes carry 0 … count - 1 as owners.
        device: of the logits.
    """

    def __init__(self, lanes: Sequence[Lane], count: int, device: torch.device):
        self.lanes, self.count, self.device = list(lanes), count, device
        templates = [sum(lane.owner == i and lane.template >= 0 for lane in lanes) for i in range(count)]
        cells = [
            (lane, lane.drift[k], lane.targets[k], lane.drift.count(lane.drift[k]), lane.weight(k))
            for lane in lanes
            for k in range(len(lane.positions))
        ]

        def read(which: Sequence[int], weights: Sequence[float]) -> _Reading:
            def index(values: Sequence[int]) -> torch.Tensor:
                return torch.tensor(values, dtype=torch.long, device=device)

            return _Reading(
                index(which),
                index([cells[k][0].owner for k in which]),
                index([cells[k][2] for k in which]).unsqueeze(1),
                torch.tensor(weights, dtype=torch.float32, device=device),
            )

        rewriting = [k for k, (_, drift, *_) in enumerate(cells) if not drift]
        bare = [k for k in rewriting if cells[k][0].template == 0]
        drifting = [k for k, cell in enumerate(cells) if cell[1]]
        # mean over the target tokens of a row, then over the rows of a request
        self.rewriting = read(
            rewriting, [cells[k][4] / (cells[k][3] * templates[cells[k][0].owner]) for k in rewriting]
        )
        self.bare = read(bare, [1.0 / cells[k][3] for k in bare])
        self.drift = read(drifting, [1.0] * len(drifting))
        self.row_slot = torch.tensor([lane.owner for lane in lanes], device=device)  # [rows]
        owned = [k for k, lane in enumerate(lanes) if lane.template >= 0]
        self.rewriting_rows = torch.tensor(owned, device=device)
        self.drift_rows = torch.tensor([k for k, lane in enumerate(lanes) if lane.template < 0], device=device)
        place = {id(lanes[k]): i for i, k in enumerate(owned)}
        self._row = torch.tensor([place[id(cells[k][0])] for k in rewriting], dtype=torch.long, device=device)
        self._templates = torch.tensor([templates[cells[k][0].owner] for k in rewriting], device=device)

    def _sum(self, values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return torch.zeros(self.count, device=values.device, dtype=values.dtype).index_add(0, slots, values)

    def _picked(self, log_probs: torch.Tensor, read: _Reading) -> torch.Tensor:
        return log_probs[read.at].gather(1, read.target).squeeze(1) * read.weight

    def nll(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Mean over templates of the mean over target tokens of −log p, ``[count]``."""
        return -self._sum(self._picked(log_probs, self.rewriting), self.rewriting.slot)

    def row_nll(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Mean over target tokens of −log p of every rewriting row, ``[count, rows per request]``."""
        picked = self._picked(log_probs, self.rewriting) * self._templates
        rows = torch.zeros(len(self.rewriting_rows), device=picked.device).index_add(0, self._row, picked)
        return -rows.view(self.count, -1)

    def drift_kl(self, log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """KL(current ‖ initial) on the drift rows, ``[count]``."""
        current = log_probs[self.drift.at]
        return self._sum((current.exp() * (current - reference)).sum(-1), self.drift.slot)

    def bare_probability(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Geometric mean per token of the target's probability on the bare prompts, ``[count]``."""
        return self._sum(self._picked(log_probs, self.bare), self.bare.slot).exp()

    def settled(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Whether every supervised token is the model's first choice, ``[count]`` bool."""
        wrong = log_probs[self.rewriting.at].argmax(-1) != self.rewriting.target.squeeze(1)
        return self._sum(wrong.float(), self.rewriting.slot) == 0

    def spread(self, states: torch.Tensor) -> torch.Tensor:
        """``(1/d) Σ_{a<b} ‖h_a − h_b‖²`` over the rewriting rows of each request, ``[count]``.

        Equal to ``(N/d) Σ_a ‖h_a − h̄‖²``, which loses fewer digits.

        Args:
            states: ``[rows, d]``.
        """
        h, owner = states[self.rewriting_rows], self.row_slot[self.rewriting_rows]
        number = self._sum(torch.ones_like(h[:, 0]), owner)
        mean = torch.zeros(self.count, h.shape[1], device=h.device).index_add(0, owner, h) / number.unsqueeze(1)
        squares = (h - mean[owner]).square().sum(-1)
        return number / h.shape[1] * self._sum(squares, owner)

    def select(self, kept: Sequence[int]) -> Terms:
        """The terms of some of the requests, renumbered, as `Replay.select` leaves the rows."""
        place = {owner: k for k, owner in enumerate(kept)}
        lanes = [replace(lane, owner=place[lane.owner]) for lane in self.lanes if lane.owner in place]
        return Terms(lanes, len(kept), self.device)
