"""WISE: which edits lie in which side memory, when memories are merged, and what a query is compared with.

Edits fill a *shard*: ``save_freq`` edits that share one random mask. ``merge_freq / save_freq`` full shards are merged
into a *memory*. WISE-Merge keeps one memory, into which later shards are merged too; WISE-Retrieve gets one more
memory each time. What is not merged yet counts as one further memory, merged for reading whenever it is asked for:
reading never changes the state.

`WiseMemories` is immutable: an edit, a rollback or a merge returns a new one. It knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..engine.merging import MergeAlgorithm, merge_deltas
from ..engine.sparse import SparseMatrix
from ..errors import RollbackError

OLD_SHARE = 0.6
"""Weight of the present memory of WISE-Merge when new shards are merged into it; these share the rest."""


@dataclass(frozen=True)
class Policy:
    """What decides on masks, merging and routing; the fields of `WISEConfig` of the same names."""

    save_freq: int
    merge_freq: int
    retrieve: bool
    merge_alg: MergeAlgorithm
    density: float
    mask_ratio: float
    act_ratio: float
    act_on_output: bool
    reference_routing: bool
    seed: int


@dataclass(frozen=True)
class Member:
    """An edit inside a memory.

    Args:
        edit_id: of the journal.
        activation: mean distance of the edit's rows when its training ended.
        prompt: filled in; for replay.
        target: likewise.
        separator: between the two, where the edit brought its own.
    """

    edit_id: str
    activation: float
    prompt: str
    target: str
    separator: str | None = None


@dataclass(frozen=True, eq=False)
class Memory:
    """A change of the layer's weight and the edits that it holds."""

    delta: SparseMatrix
    members: tuple[Member, ...]

    @property
    def edit_ids(self) -> set[str]:
        """Ids of the edits."""
        return {m.edit_id for m in self.members}

    @property
    def activation(self) -> float:
        """Smallest activation of an edit in it."""
        return min(m.activation for m in self.members)


@dataclass(frozen=True)
class Candidate:
    """What a query is compared with: a change ``[d_out, d_in]`` fp32, and the distance from which it is used."""

    delta: torch.Tensor
    threshold: float


@dataclass(frozen=True, eq=False)
class WiseMemories:
    """The state of one edited layer.

    Args:
        policy: when and how shards are merged.
        memories: merged ones, oldest first; WISE-Merge has at most one.
        shards: full ones that are not merged yet.
        open: the shard that the next edit goes into, if it has edits already.
        mask: its mask, ``[d_out, d_in]`` bool.
        drawn: how many masks have been drawn.
    """

    policy: Policy
    memories: tuple[Memory, ...] = ()
    shards: tuple[Memory, ...] = ()
    open: Memory | None = None
    mask: torch.Tensor | None = None
    drawn: int = 0

    # ------------------------------------------------------------------ questions

    @property
    def parts(self) -> tuple[Memory, ...]:
        """Everything that holds edits, oldest first."""
        return (*self.memories, *self.shards, *((self.open,) if self.open else ()))

    @property
    def members(self) -> tuple[Member, ...]:
        """All edits, oldest first."""
        return tuple(m for part in self.parts for m in part.members)

    @property
    def unmerged(self) -> tuple[Memory, ...]:
        """Full shards and the open one."""
        return self.parts[len(self.memories) :]

    def side(self, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """What the next edit trains: its shard's change and mask ``[d_out, d_in]``, and how many masks are drawn."""
        if self.open is not None and self.mask is not None:
            return self.open.delta.dense(), self.mask, self.drawn
        return torch.zeros(shape), draw_mask(shape, self.policy, self.drawn), self.drawn + 1

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """The memories, and last what is not merged yet as one more."""
        candidates = [Candidate(m.delta.dense(), self._threshold(m.members)) for m in self.memories]
        pending = self.unmerged
        if pending:
            deltas = [p.delta.dense() for p in pending]
            delta = deltas[0] if len(deltas) == 1 else self._merge(deltas, [1.0] * len(deltas))
            candidates.append(Candidate(delta, self._threshold([m for p in pending for m in p.members])))
        return tuple(candidates)

    def _threshold(self, members: Sequence[Member]) -> float:
        """WISE-Merge has one threshold for all of its edits, WISE-Retrieve one per memory."""
        counted = members if self.policy.retrieve else self.members
        return min(m.activation for m in counted) * self.policy.act_ratio

    # ------------------------------------------------------------------ changes

    def with_edit(self, member: Member, delta: torch.Tensor, mask: torch.Tensor, drawn: int) -> WiseMemories:
        """Return the state after an edit was trained: its shard is closed, and the group merged, where they are full.

        Args:
            member: the edit.
            delta: the shard's change after training, ``[d_out, d_in]``.
            mask: the shard's mask.
            drawn: third value of `side`.
        """
        before = self.open.members if self.open else ()
        shard = Memory(SparseMatrix.of(delta), (*before, member))
        if len(shard.members) < self.policy.save_freq:
            return replace(self, open=shard, mask=mask, drawn=drawn)
        closed = replace(self, shards=(*self.shards, shard), open=None, mask=None, drawn=drawn)
        return closed.merged() if len(closed.shards) * self.policy.save_freq >= self.policy.merge_freq else closed

    def merged(self) -> WiseMemories:
        """Return the state with the full shards merged into a memory."""
        deltas = [s.delta.dense() for s in self.shards]
        members = tuple(m for s in self.shards for m in s.members)
        if self.policy.retrieve or not self.memories:
            memory = Memory(SparseMatrix.of(self._merge(deltas, [1.0 / len(deltas)] * len(deltas))), members)
            return replace(self, memories=(*self.memories, memory), shards=())
        old = self.memories[0]
        weights = [OLD_SHARE, *[(1 - OLD_SHARE) / len(deltas)] * len(deltas)]
        memory = Memory(SparseMatrix.of(self._merge([old.delta.dense(), *deltas], weights)), (*old.members, *members))
        return replace(self, memories=(memory,), shards=())

    def without(self, edit_ids: Collection[str]) -> WiseMemories:
        """Return the state without some edits: whole shards and memories can go, single edits in them cannot.

        Raises:
            RollbackError: if a shard or memory holds both edits that go and edits that stay.
        """
        gone = set(edit_ids)
        for part in self.parts:
            stuck = sorted(part.edit_ids & gone)
            if stuck and part.edit_ids - gone:
                kind = "memory" if part in self.memories else "shard"
                raise RollbackError(
                    f"WISE trained {len(part.members)} edits into one {kind}: {', '.join(stuck)} cannot be taken out"
                    f" alone. Roll the whole {kind} back ({', '.join(m.edit_id for m in part.members)}), or use"
                    " rebuild_without(edit_id), which makes the others again."
                )
        memories = tuple(m for m in self.memories if m.edit_ids - gone)
        shards = tuple(s for s in self.shards if s.edit_ids - gone)
        stays_open = self.open is not None and bool(self.open.edit_ids - gone)
        if not memories and not shards and not stays_open:
            return WiseMemories(self.policy)
        return replace(
            self,
            memories=memories,
            shards=shards,
            open=self.open if stays_open else None,
            mask=self.mask if stays_open else None,
        )

    def _merge(self, deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.policy.seed)  # of the DARE algorithms
        return merge_deltas(deltas, weights, self.policy.merge_alg, density=self.policy.density, generator=generator)


def draw_mask(shape: tuple[int, int], policy: Policy, number: int) -> torch.Tensor:
    """The mask of a shard: every entry with probability ``mask_ratio``; the same for the same seed and number."""
    generator = torch.Generator().manual_seed(policy.seed * 1_000_003 + number)
    return torch.rand(shape, generator=generator) < policy.mask_ratio


def choose_memory(distances: torch.Tensor, thresholds: Sequence[float], *, side: int | None = None) -> torch.Tensor:
    """Which memory answers a query: of those at or above their threshold, the one at the largest distance.

    Args:
        distances: ``[candidates, rows]``.
        thresholds: one per candidate.
        side: for parity with the published code's WISE-Retrieve: candidate below whose distance no other one is
            chosen, even where it is itself below its threshold.

    Returns:
        ``[rows]`` int64, ``-1`` for the main memory.
    """
    limits = torch.tensor(thresholds, device=distances.device, dtype=distances.dtype)[:, None]
    eligible = distances >= limits
    if side is not None:
        others = torch.arange(len(thresholds), device=distances.device)[:, None] != side
        eligible &= ~(others & (distances <= distances[side]))
    best, chosen = torch.where(eligible, distances, -math.inf).max(dim=0)
    return torch.where(best > -math.inf, chosen, -1)
