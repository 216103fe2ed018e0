"""Lists of vectors that grow by one in place, and the nearest of them.

What codebook methods share: an append costs one row, whatever the length of the list, and a list is never written
to where an earlier state of it can still see.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .devices import to_stay

SAME_PROMPT = 1e-4
"""Queries closer than this times their norm are one prompt."""
_FIRST_CAPACITY = 16
_CANDIDATES = 8
"""Vectors whose distance is measured by differences in a search."""


class _Buffer:
    """Rows with room for more; ``filled`` of them are in use by some list. ``squares`` are their squared norms."""

    def __init__(self, rows: torch.Tensor, filled: int, squares: torch.Tensor | None = None):
        self.rows = rows
        self.filled = filled
        self.squares = _squares(rows) if squares is None else squares


class Vectors:
    """An immutable list of fp32 vectors; `with_row` makes a longer one that shares the memory of this one.

    Args:
        width: size of a vector.
    """

    def __init__(self, width: int):
        self.width = width
        self.size = 0
        self._buffer = _Buffer(torch.empty(0, width), 0)

    @classmethod
    def of(cls, rows: torch.Tensor) -> Vectors:
        """A list of the rows of ``[n, width]``."""
        made = cls(rows.shape[1])
        made.size = rows.shape[0]
        made._buffer = _Buffer(rows.detach().float(), rows.shape[0])
        return made

    def __len__(self) -> int:
        return self.size

    @property
    def tensor(self) -> torch.Tensor:
        """The vectors, ``[n, width]``; a view, not to be written to."""
        return self._buffer.rows[: self.size]

    def with_row(self, row: torch.Tensor) -> Vectors:
        """The list with one more vector ``[width]``; copies the others only when the room is used up."""
        buffer = self._buffer
        if self.size < buffer.filled or self.size == buffer.rows.shape[0] or buffer.rows.device != row.device:
            capacity = max(2 * self.size, _FIRST_CAPACITY)
            room = torch.empty(capacity, self.width, device=row.device)
            squares = torch.empty(capacity, device=row.device)
            room[: self.size], squares[: self.size] = self.tensor, buffer.squares[: self.size]
            buffer = _Buffer(room, self.size, squares)
        buffer.rows[self.size] = row.detach().float()
        buffer.squares[self.size] = _squares(row.detach().float())
        buffer.filled = self.size + 1
        longer = Vectors(self.width)
        longer.size, longer._buffer = self.size + 1, buffer
        return longer

    def select(self, places: Sequence[int]) -> Vectors:
        """A list of some of the vectors, copied."""
        return Vectors.of(self.tensor[list(places)].clone())

    def with_changed(self, places: Sequence[int], rows: torch.Tensor) -> Vectors:
        """A list in which the vectors at some places are ``[places, width]``; copies all."""
        changed = self.tensor.clone()
        changed[list(places)] = rows.detach().float().to(changed.device)
        return Vectors.of(changed)

    def on(self, device: torch.device) -> torch.Tensor:
        """The vectors on a device; moved there for good, because the model lives there now."""
        if self._buffer.rows.device != device:
            with to_stay():
                squares = self._buffer.squares[: self.size].to(device)
                self._buffer = _Buffer(self.tensor.to(device), self.size, squares)
        return self.tensor

    def nearest(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest vector of each query ``[rows, width]``.

        One matrix product ranks the vectors by ``‖k‖² − 2 q·k``. That form loses the digits that the two terms share,
        so it only proposes: the distances of the best few are taken by differences, and where rounding could hide the
        nearest among the others, those of all.

        Returns:
            Euclidean distances ``[rows]`` fp32 and places in the list ``[rows]`` int64.
        """
        keys, queries = self.on(queries.device), queries.float()
        if len(self) > _CANDIDATES:
            squares = self._buffer.squares[: self.size]
            scores, places = torch.addmm(squares, queries, keys.T, alpha=-2).topk(_CANDIDATES, largest=False)
            doubt = _rounding(queries) * (_squares(queries) + squares.max())
            if not bool((scores[:, -1] - scores[:, 0] <= doubt).any()):
                places = places.sort(dim=1).values  # of equals the first wins, as in a search through all
                gaps = (keys[places] - queries[:, None]).norm(dim=-1)
                distance, which = gaps.min(dim=1)
                return distance, places.gather(1, which[:, None]).squeeze(1)
        distance, place = distances(queries, keys).min(dim=1)
        return distance, place


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """Squared norms of ``[..., width]``."""
    return rows.square().sum(dim=-1)


def _rounding(queries: torch.Tensor) -> float:
    """Bound of the relative error of a product ``q·k``: rounding adds up like a random walk; with a wide margin."""
    short = queries.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return 8 * (2.0**-11 if short else 2.0**-24) * queries.shape[1] ** 0.5


def distances(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Euclidean distances of ``[rows, d]`` and ``[n, d]``, ``[rows, n]`` fp32.

    By differences: with the matrix product that torch takes for many rows, the distance of a vector to itself comes
    out as large as 0.1.
    """
    return torch.cdist(queries.float(), keys, compute_mode="donot_use_mm_for_euclid_dist")
