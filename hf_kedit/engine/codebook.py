"""Lists of vectors that grow by one in place, and the nearest of them.

What codebook methods share: an append costs one row, whatever the length of the list, and a list is never written
to where an earlier state of it can still see.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

SAME_PROMPT = 1e-4
"""Queries closer than this times their norm are one prompt."""
_FIRST_CAPACITY = 16


class _Buffer:
    """Rows with room for more; ``filled`` of them are in use by some list."""

    def __init__(self, rows: torch.Tensor, filled: int):
        self.rows = rows
        self.filled = filled


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
            room = torch.empty(max(2 * self.size, _FIRST_CAPACITY), self.width, device=row.device)
            room[: self.size] = self.tensor
            buffer = _Buffer(room, self.size)
        buffer.rows[self.size] = row.detach().float()
        buffer.filled = self.size + 1
        longer = Vectors(self.width)
        longer.size, longer._buffer = self.size + 1, buffer
        return longer

    def select(self, places: Sequence[int]) -> Vectors:
        """A list of some of the vectors, copied."""
        return Vectors.of(self.tensor[list(places)].clone())

    def on(self, device: torch.device) -> torch.Tensor:
        """The vectors on a device; moved there for good, because the model lives there now."""
        if self._buffer.rows.device != device:
            self._buffer = _Buffer(self.tensor.to(device), self.size)
        return self.tensor


def distances(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Euclidean distances of ``[rows, d]`` and ``[n, d]``, ``[rows, n]`` fp32.

    By differences: with the matrix product that torch takes for many rows, the distance of a vector to itself comes
    out as large as 0.1.
    """
    return torch.cdist(queries.float(), keys, compute_mode="donot_use_mm_for_euclid_dist")
