"""The journal: which edits a model carries, in the order in which they were made; and the result of one call."""

from __future__ import annotations

import gc
import json
import math
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from .drawing.edits import PARTS, AnswerShift, KeptCount, draw_edits
from .drawing.style import as_label
from .errors import (
    ArtifactError,
    KeditError,
    RequestError,
    RollbackError,
    UnknownEditError,
    check_choice,
    nearest,
    shown,
)
from .requests import EditRequest
from .storage.parsing import parse_json_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass
class Edit:
    """One edit that is in the model.

    Args:
        id: unique in the model.
        request: what was asked for.
        method: ``edit_type`` of the method.
        batch_id: edits with the same one were computed together.
        created: time in UTC, ISO format.
        diagnostics: numbers of the method: ``loss``, ``target_probability_before``/``_after``, ``seconds``,
            ``peak_memory_bytes`` …
    """

    id: str
    request: EditRequest
    method: str
    batch_id: str
    created: str
    diagnostics: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict: one line of ``edits.jsonl``."""
        request = self.request.to_dict()
        request.pop("id")
        return {
            "edit_id": self.id,
            "method": self.method,
            "batch_id": self.batch_id,
            "created": self.created,
            **request,
            "diagnostics": self.diagnostics,
        }

    @property
    def joint(self) -> dict[str, Any] | None:
        """How the edit was solved for together with others (`EditableModel.resolve_all`); ``None``: it was not."""
        return self.diagnostics.get("joint")

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Edit:
        """Read a line of ``edits.jsonl``.

        Raises:
            ArtifactError: if a field is missing or wrong.
        """
        try:
            data = dict(value)
            head = {name: data.pop(name) for name in ("edit_id", "method", "batch_id", "created")}
            diagnostics = data.pop("diagnostics", {})
            if not all(isinstance(v, str) for v in head.values()) or not isinstance(diagnostics, dict):
                raise TypeError("edit_id, method, batch_id and created must be strings, diagnostics an object")
            request = EditRequest.from_dict({**data, "id": head["edit_id"]})
            return cls(head["edit_id"], request, head["method"], head["batch_id"], head["created"], diagnostics)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"edits.jsonl holds a line that is not an edit: {error}") from error


@dataclass(frozen=True)
class EditConflict:
    """Two edits of a set that say something about the same.

    Args:
        kind: ``"contradiction"``: the same prompt with different targets, of which the later edit counts;
            ``"repetition"``: with the same target, which is solved for once; else the name of the portability axis
            by which the one edit expects another answer than the other one gives (aliases, inverse relations …).
        edit_ids: of the one that counts, or expects, and of the other.
        prompt: what both are about.
        targets: what each of them wants to be said there.
    """

    kind: str
    edit_ids: tuple[str, str]
    prompt: str
    targets: tuple[str, str]


@dataclass
class EditResult:
    """What `EditableModel.edit` returns.

    Args:
        edits: one per request that was applied, in order.
        failed: (request, error) of requests that were left out (only with ``on_error="skip"``).
        seconds: of the whole call.
        side_effects: what the call's ``watch`` saw (`SideEffectReport`), or ``None``.
        conflicts: edits of the model that do not go together (only where they are solved for together).
    """

    edits: list[Edit]
    failed: list[tuple[EditRequest, KeditError]] = field(default_factory=list)
    seconds: float = 0.0
    side_effects: Any = None
    conflicts: list[EditConflict] = field(default_factory=list)

    @property
    def ids(self) -> list[str]:
        """Ids of the edits."""
        return [e.id for e in self.edits]

    def plot(self, part: str | None = None, *, ax: Axes | None = None) -> Figure:
        """Draw what the call did: answers before and after, the loss step by step, and what else changed.

        With ``watch=SideEffects()`` the old answers are known too, and what happened to others. Without, there is what
        the method measured.

        Args:
            part: ``"answers"``, ``"loss"`` or ``"side effects"`` alone; ``None``: all that are known.
            ax: draw on these axes; with ``part``.

        Raises:
            RequestError: if nothing is known that could be drawn.
            MissingExtraError: without matplotlib (the extra ``viz``).
        """
        if part is not None:
            check_choice("part", part, PARTS)
        elif ax is not None:
            raise RequestError(f"ax= takes one chart; name it with part=: {', '.join(PARTS)}")
        seen = self.side_effects
        shifts: Sequence[AnswerShift] = getattr(seen, "shifts", ()) or [_shift_of(edit) for edit in self.edits]
        shifts = [s for s in shifts if part in (None, "answers") and (s.before, s.after) != (None, None)]
        losses = [edit.diagnostics.get("loss") or [] for edit in self.edits if part in (None, "loss")]
        losses = [points for points in losses if len(points) > 1 and all(map(math.isfinite, points))]
        counts: Sequence[KeptCount] = getattr(seen, "counts", ()) if part in (None, "side effects") else ()
        if not (shifts or losses or counts):
            raise RequestError(
                f"nothing is known of {'the ' + part if part else 'these edits'} that could be drawn;"
                " edit(…, watch=SideEffects()) asks the model before and after"
            )
        method = as_label(self.edits[0].method) if self.edits else "?"
        many = f"{len(self.edits)} edit{'' if len(self.edits) == 1 else 's'}"
        harm = getattr(seen, "harm", []) if counts else []
        return draw_edits(f"{many} with {method}, {self.seconds:.2g} s", shifts, losses, counts, harm, ax)


def _shift_of(edit: Edit) -> AnswerShift:
    """What the method measured of the new answer."""
    before, after = (edit.diagnostics.get(f"target_probability_{when}") for when in ("before", "after"))
    return AnswerShift(edit.request.filled_prompt, edit.request.target_new, True, before, after)


class Journal:
    """An ordered list of edits with unique ids."""

    def __init__(self, edits: Sequence[Edit] = ()):
        self._edits: list[Edit] = list(edits)

    def __len__(self) -> int:
        return len(self._edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits)

    def as_list(self) -> list[Edit]:
        """A copy of the list."""
        return list(self._edits)

    def add(self, edits: Sequence[Edit]) -> None:
        """Append edits."""
        self._edits.extend(edits)

    def put(self, edits: Sequence[Edit]) -> None:
        """Let edits take the place of those with their ids; the others are appended."""
        new = {e.id: e for e in edits}
        self._edits = [new.pop(e.id, e) for e in self._edits] + list(new.values())

    def drop(self, edit_ids: Sequence[str]) -> None:
        """Remove edits."""
        gone = set(edit_ids)
        self._edits = [e for e in self._edits if e.id not in gone]

    def get(self, edit_id: str) -> Edit:
        """Return an edit.

        Raises:
            UnknownEditError: naming the nearest id.
        """
        for edit in self._edits:
            if edit.id == edit_id:
                return edit
        ids = [e.id for e in self._edits]
        raise UnknownEditError(f"there is no edit {edit_id!r} in the model.{nearest(edit_id, ids)}")

    def with_ids(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """Give every request an id that the journal does not know yet.

        Raises:
            RequestError: if the model already carries an edit with a request's id.
        """
        known = {e.id for e in self._edits}
        named = []
        for request in requests:
            if request.id is not None and request.id in known:
                raise RequestError(
                    "the model already carries an edit with this id; roll it back first, or choose another id",
                    row=request.row,
                    field="id",
                    request_id=request.id,
                )
            named.append(request if request.id is not None else request.with_id(new_id("edit")))
        return named

    def batches_of(self, method: str) -> list[list[Edit]]:
        """The edits of a method, grouped by the batches in which they were made, in order."""
        batches: dict[str, list[Edit]] = {}
        for edit in self._edits:
            if edit.method == method:
                batches.setdefault(edit.batch_id, []).append(edit)
        return list(batches.values())

    def select(self, which: str | int | Sequence[str]) -> list[str]:
        """Resolve what a user may ask to roll back: an id, a list of ids, the last n, or ``"all"``.

        Raises:
            UnknownEditError: for an id that is not there.
            RollbackError: for a count below 1 or above the number of edits.
        """
        if isinstance(which, bool) or not isinstance(which, (str, int, Sequence)):
            raise RollbackError("give an edit id, a list of ids, a number of edits, or 'all'")
        if isinstance(which, str):
            return [e.id for e in self._edits] if which == "all" else [self.get(which).id]
        if isinstance(which, int):
            if not 1 <= which <= len(self._edits):
                raise RollbackError(f"cannot roll back {which} edits; the model carries {len(self._edits)}")
            return [e.id for e in self._edits[-which:]]
        if not all(isinstance(edit_id, str) for edit_id in which):
            raise RollbackError(f"give the ids of edits as texts, not {shown(which)}")
        return [self.get(edit_id).id for edit_id in dict.fromkeys(which)]

    def to_jsonl(self) -> str:
        """One JSON object per line.

        Raises:
            ArtifactError: if a field holds something that is no JSON or no text, naming edit and field.
        """
        return "".join(_line(edit.to_dict()) for edit in self._edits)

    @classmethod
    def from_jsonl(cls, text: str) -> Journal:
        """Read `to_jsonl`'s output.

        Raises:
            ArtifactError: for a damaged line.
        """
        # Many objects are made here, and all of them stay. The garbage collector would look at everything that the
        # process holds, again and again, and find nothing: with torch and transformers imported, that takes longer
        # than reading a thousand edits.
        collects = gc.isenabled()
        try:
            gc.disable()
            edits = [Edit.from_dict(line) for line in parse_json_lines(text, "edits.jsonl", ArtifactError)]
        finally:
            if collects:
                gc.enable()
        ids = [e.id for e in edits]
        if len(set(ids)) != len(ids):
            raise ArtifactError("edits.jsonl names an edit twice")
        return cls(edits)


_WRITER = json.JSONEncoder(ensure_ascii=False)  # made once: a journal has many lines


def _line(edit: dict[str, Any]) -> str:
    line = _as_json(edit)
    if isinstance(line, str):
        return line + "\n"
    name, problem = next((n, found) for n, value in edit.items() if not isinstance(found := _as_json(value), str))
    raise ArtifactError(f"the edit {edit['edit_id']!r} cannot be saved: its {name!r} is no JSON ({problem})")


def _as_json(value: Any) -> str | Exception:
    """A value as JSON that can be written in UTF-8, or why it cannot."""
    try:
        text = _WRITER.encode(value)
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        return error
    return text


def new_id(prefix: str) -> str:
    """A short id that does not repeat."""
    return f"{prefix}-{uuid.uuid4().hex[:8]}"


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
