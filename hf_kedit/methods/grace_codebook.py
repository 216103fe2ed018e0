"""GRACE's codebook: entries, what happens to them, and the look-up at a layer; the method itself is in grace.py.

Imported by the method file; registers the memory, not a method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import nn

from ..books.book import Saved
from ..books.site_book import SiteMemory, check_finite, register_memory
from ..books.sites import Frame, SiteCall, SiteFunction, held_decision, needs_whole_prompt
from ..engine.nearest import SAME_PROMPT, Vectors
from ..engine.weights import get_module, weight_shape
from ..errors import ArtifactError

Replacement = Literal["replace_last", "replace_all", "replace_prompt"]
Action = Literal["add", "split", "overwrite", "expand", "none"]
SPLIT_GAP = 1e-5


@dataclass(frozen=True)
class Event:
    """Something that happened to an entry.

    Args:
        edit_id: the edit that caused it.
        kind: ``split`` changes the radius only, by an edit that owns another entry; all others make the edit a
            member of this one.
        distance: of the edit's query from the key.
        value_before: row of the value before, for members after the first.
        target_before: target before an ``overwrite``.
    """

    edit_id: str
    kind: Literal["start", "expand", "overwrite", "split"]
    distance: float
    value_before: int | None = None
    target_before: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Entry:
    """One entry of a codebook without its key.

    Args:
        target: token ids that it stands for.
        value: row of its value.
        start_radius: radius at its making.
        events: what happened to it, oldest first.
    """

    target: tuple[int, ...]
    value: int
    start_radius: float
    events: tuple[Event, ...]

    @property
    def radius(self) -> float:
        """ε, as the events left it."""
        radius = self.start_radius
        for event in self.events:
            if event.kind == "split":
                radius = event.distance / 2 - SPLIT_GAP
            elif event.kind == "expand":
                radius = max(radius, event.distance)
        return radius

    @property
    def members(self) -> list[str]:
        """Ids of the edits that share the entry."""
        return [e.edit_id for e in self.events if e.kind != "split"]

    @property
    def uncovered(self) -> list[str]:
        """Members whose prompt a later split has put outside the radius."""
        radius = self.radius
        return [e.edit_id for e in self.events if e.kind != "split" and e.distance > radius]

    def without(self, gone: set[str]) -> Entry | None:
        """The entry as if some edits had not happened to it; ``None`` if no member is left.

        Radius and target follow from the remaining events. The value is the one from before where the newest members
        go; otherwise it stays, because later members were trained on top of it.
        """
        if gone.isdisjoint(e.edit_id for e in self.events):
            return self
        if set(self.members) <= gone:
            return None
        kept: list[Event] = []
        run: list[Event] = []  # members that go, since the last one that stays
        for event in self.events:
            if event.kind == "split":
                kept.extend([] if event.edit_id in gone else [event])
            elif event.edit_id in gone:
                run.append(event)
            else:
                kept.append(_behind(run, event))
                run = []
        left = replace(self, events=tuple(kept))
        if not run:
            return left
        last = _behind(run, Event("", "expand", 0.0, self.value, None))
        assert last.value_before is not None
        return replace(left, value=last.value_before, target=last.target_before or self.target)


def _behind(run: Sequence[Event], event: Event) -> Event:
    """A member event that now follows on what the events of ``run`` followed on."""
    if not run:
        return event
    target = next((e.target_before for e in (*run, event) if e.target_before is not None), None)
    return replace(event, value_before=run[0].value_before, target_before=target)


@dataclass(frozen=True)
class Placement:
    """What an edit does to a codebook.

    Args:
        action: see the module's head; ``none``: nothing.
        entry: the nearest entry, if there is one.
        distance: of the query from its key.
    """

    action: Action
    entry: int | None = None
    distance: float | None = None


@dataclass(frozen=True)
class CodeChange:
    """A computed edit.

    Args:
        placement: where it goes.
        query: the layer's input at the key token, ``[d_in]``.
        value: the trained value, ``[d_out]``.
        target: token ids.
    """

    placement: Placement
    query: torch.Tensor
    value: torch.Tensor
    target: tuple[int, ...]


@register_memory
class Codebook(SiteMemory):
    """GRACE's codebook at one linear layer.

    Args:
        path: name of the layer.
        sizes: (d_in, d_out) of the layer.
        eps: ε0.
        replacement: which positions get the value.
    """

    kind = "grace"

    def __init__(self, path: str, sizes: tuple[int, int], eps: float, replacement: Replacement):
        super().__init__([path])
        self.eps = eps
        self.replacement: Replacement = replacement
        self.keys = Vectors(sizes[0])
        self.values = Vectors(sizes[1])
        self.entries: list[Entry] = []
        self.idle: list[str] = []  # edits that needed no entry
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def edit_ids(self) -> list[str]:
        """Ids of all edits, entry by entry."""
        return [*(edit_id for entry in self.entries for edit_id in entry.members), *self.idle]

    # ------------------------------------------------------------------ looking up

    def functions(self) -> dict[str, SiteFunction]:
        """Replaces outputs at its layer."""
        return {self.paths[0]: self._replace}

    def table(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Radii ``[n]`` fp32 and value rows ``[n]`` int64 of the entries."""
        if self._table is None or self._table[0].device != device:
            radii = torch.tensor([e.radius for e in self.entries], dtype=torch.float32, device=device)
            self._table = radii, torch.tensor([e.value for e in self.entries], dtype=torch.long, device=device)
        return self._table

    def look_up(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each query ``[rows, d_in]`` is within the radius of its nearest key ``[rows]``, and the nearest
        entry's value ``[rows, d_out]``."""
        radii, rows = self.table(queries.device)
        distance, nearest = self.keys.nearest(queries)
        return distance <= radii[nearest], self.values.on(queries.device)[rows[nearest]]

    def _replace(self, call: SiteCall) -> torch.Tensor | None:
        frame = call.frame
        if not self.entries or not decides(frame, self.replacement):
            return None
        if frame.phase == "prompt":
            frame.held[self.key] = self.look_up(call.at_key(call.inputs))
        decision = held_decision(frame, self.key)
        if decision is None:
            return None
        hit, values = decision
        return replaced(call, values, self.replacement, hit)

    # ------------------------------------------------------------------ changing

    def place(self, query: torch.Tensor, target: tuple[int, ...]) -> Placement:
        """What an edit with this query ``[d_in]`` and target does; changes nothing."""
        if not self.entries:
            return Placement("add")
        gap, place = self.keys.nearest(query[None])
        distance, nearest = float(gap), int(place)
        entry = self.entries[nearest]
        if distance > self.eps + entry.radius:
            action: Action = "add"
        elif entry.target == target:
            action = "expand"
        else:
            action = "overwrite" if distance <= SAME_PROMPT * float(query.norm()) else "split"
        return Placement(action, nearest, distance)

    def value_of(self, entry: int) -> torch.Tensor:
        """The value of an entry, ``[d_out]``."""
        return self.values.tensor[self.entries[entry].value]

    def apply(self, batch_id: str, changes: Sequence[CodeChange], edit_ids: Sequence[str]) -> None:
        """Take over edits, in their order."""
        for change in changes:
            check_finite("codebook entry", change.query, change.value)
        self._table = None
        self.entries = list(self.entries)  # earlier states keep theirs
        for change, edit_id in zip(changes, edit_ids, strict=True):
            self._take_over(change, edit_id)

    def _take_over(self, change: CodeChange, edit_id: str) -> None:
        place, distance = change.placement.entry, change.placement.distance
        action = change.placement.action
        if action == "none":
            self.idle = [*self.idle, edit_id]
            return
        entries, row = self.entries, len(self.values)
        if action in ("add", "split"):
            radius = self.eps
            if action == "split":
                assert place is not None and distance is not None
                radius = distance / 2
                split = Event(edit_id, "split", distance)
                entries[place] = replace(entries[place], events=(*entries[place].events, split))
            entries.append(Entry(change.target, row, radius, (Event(edit_id, "start", 0.0),)))
            self.keys = self.keys.with_row(change.query)
        else:
            assert place is not None and distance is not None
            old = entries[place]
            kind: Literal["expand", "overwrite"] = "overwrite" if action == "overwrite" else "expand"
            event = Event(edit_id, kind, distance, old.value, old.target if kind == "overwrite" else None)
            entries[place] = replace(old, target=change.target, value=row, events=(*old.events, event))
        self.values = self.values.with_row(change.value)

    def remove(self, edit_ids: Sequence[str]) -> None:
        """Take edits out of their entries and drop entries without members; always possible."""
        gone = set(edit_ids)
        left = [(place, entry.without(gone)) for place, entry in enumerate(self.entries)]
        kept = [(place, entry) for place, entry in left if entry is not None]
        self.keys = self.keys.select([place for place, _ in kept])
        self.idle = [edit_id for edit_id in self.idle if edit_id not in gone]
        self._compact([entry for _, entry in kept])

    def _compact(self, entries: list[Entry]) -> None:
        """Keep the values that entries refer to: first each entry's own, in order, then those from before."""
        own = [entry.value for entry in entries]
        earlier = [e.value_before for entry in entries for e in entry.events if e.value_before is not None]
        order = list(dict.fromkeys([*own, *earlier]))
        row = {old: new for new, old in enumerate(order)}

        def moved(event: Event) -> Event:
            return event if event.value_before is None else replace(event, value_before=row[event.value_before])

        self.values = self.values.select(order)
        self.entries = [replace(e, value=row[e.value], events=tuple(map(moved, e.events))) for e in entries]
        self._table = None

    def draft(self) -> Codebook:
        """A codebook in the same state, to try changes on; lists of vectors are shared, not copied."""
        made = Codebook(self.paths[0], (self.keys.width, self.values.width), self.eps, self.replacement)
        made.restore(self.snapshot())
        return made

    def snapshot(self) -> Any:
        """The present state; lists of vectors are shared, not copied."""
        return self.keys, self.values, self.entries, self.idle

    def restore(self, snapshot: Any) -> None:
        """Return to an earlier state."""
        self.keys, self.values, self.entries, self.idle = snapshot
        self._table = None

    # ------------------------------------------------------------------ files

    def tensors(self) -> dict[str, torch.Tensor]:
        """Keys, values and radii of the entries, and the values from before later edits of an entry."""
        self._compact(self.entries)
        name, count = f"{self.paths[0]}.kedit_grace", len(self.entries)
        return {
            f"{name}_keys": self.keys.tensor,
            f"{name}_values": self.values.tensor[:count],
            f"{name}_earlier": self.values.tensor[count:],
            f"{name}_eps": torch.tensor([e.radius for e in self.entries], dtype=torch.float32),
        }

    def describe(self) -> dict[str, Any]:
        """Settings, targets and what happened to every entry."""
        self._compact(self.entries)
        return {
            "eps0": self.eps,
            "replacement": self.replacement,
            "num_codes": len(self.entries),
            "entries": [
                {
                    "target": list(entry.target),
                    "start_radius": entry.start_radius,
                    "events": [{k: v for k, v in asdict(e).items() if v is not None} for e in entry.events],
                }
                for entry in self.entries
            ],
            "idle": list(self.idle),
        }

    @classmethod
    def read(cls, model: nn.Module, paths: Sequence[str], part: Mapping[str, Any], saved: Saved) -> Self:
        """Rebuild a codebook; see `SiteMemory.read`."""
        (path,) = paths
        d_out, d_in = weight_shape(get_module(model, path))
        if part["replacement"] not in ("replace_last", "replace_all", "replace_prompt"):
            raise ArtifactError(f"{saved.source}: unknown replacement {part['replacement']!r}")
        codebook = cls(path, (d_in, d_out), float(part["eps0"]), part["replacement"])
        count, name = len(part["entries"]), f"{path}.kedit_grace"
        codebook.keys = Vectors.of(saved.tensor(f"{name}_keys", (count, d_in)))
        values = [saved.tensor(f"{name}_values", (count, d_out)), saved.tensor(f"{name}_earlier", (None, d_out))]
        codebook.values = Vectors.of(torch.cat(values))
        for row, entry in enumerate(part["entries"]):
            events = tuple(_read_event(e, len(codebook.values)) for e in entry["events"])
            codebook.entries.append(Entry(tuple(map(int, entry["target"])), row, float(entry["start_radius"]), events))
        codebook.idle = [str(edit_id) for edit_id in part["idle"]]
        radii = saved.tensor(f"{name}_eps", (count,))
        if not torch.allclose(radii, codebook.table(radii.device)[0]) or not all(e.members for e in codebook.entries):
            raise ArtifactError(f"{saved.source}: the radii of {path} do not follow from what happened to its entries")
        return codebook


def _read_event(event: Mapping[str, Any], values: int) -> Event:
    before = event.get("value_before")
    if event["kind"] not in ("start", "expand", "overwrite", "split") or not 0 <= (before or 0) < values:
        raise ValueError(event)
    target = event.get("target_before")
    return Event(
        str(event["edit_id"]),
        event["kind"],
        float(event["distance"]),
        None if before is None else int(before),
        None if target is None else tuple(map(int, target)),
    )


def decides(frame: Frame, replacement: Replacement) -> bool:
    """Whether a codebook has anything to do in a call."""
    if replacement == "replace_last":
        return frame.phase == "prompt"
    if frame.phase == "decode":
        return replacement == "replace_all"
    return needs_whole_prompt(frame, f"GRACE with {replacement}")


def replaced(
    call: SiteCall, values: torch.Tensor, replacement: Replacement, hit: torch.Tensor | None = None
) -> torch.Tensor:
    """The layer's output with ``values`` ``[rows, d_out]`` at the positions of the replacement, in the rows of
    ``hit`` ``[rows]`` (``None``: all)."""
    frame, device = call.frame, call.output.device
    columns = torch.arange(frame.width, device=device)
    key = frame.key_columns.to(device)[:, None]
    if replacement == "replace_all":
        where = torch.ones(frame.rows, frame.width, dtype=torch.bool, device=device)
    elif replacement == "replace_prompt":
        where = frame.prompt_mask.to(device) & (columns < key)
    else:
        where = columns == key
    if hit is not None:
        where = where & hit.to(device)[:, None]
    return torch.where(where[:, :, None], values.to(call.output)[:, None], call.output)
