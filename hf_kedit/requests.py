"""What a user wants changed: `EditRequest`, the probes that judge it, and reading many of them.

A request is validated when it is made; the error names the row, the id and the field. This module knows
nothing of models or tokens. Everything here works on strings and never uses ``str.format``, so that braces
in prompts are harmless.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from .errors import DataError, RequestError, SubjectNotFoundError, nearest, shown
from .storage.parsing import LEVELS, parse_json
from .storage.records import CsvRow, read_records
from .text.scripts import HALF, is_writable
from .text.subjects import find_subject

SLOT = "{}"
T = TypeVar("T")
RequestSource = Union["EditRequest", Mapping[str, Any], Iterable[Any], str, Path]


@dataclass(frozen=True)
class Probe:
    """A question whose answer tells something about an edit.

    Args:
        prompt: text before the answer.
        ground_truth: groups of aliases; ``[["Rome", "Roma"]]`` is one value with two spellings.
        match: ``"any"``: one alias of one group suffices; ``"all"``: every group must be hit.
        image: path of an image relative to an image root, for multimodal models.
    """

    prompt: str
    ground_truth: list[list[str]] = field(default_factory=list)
    match: Literal["any", "all"] = "any"
    image: str | None = None

    @property
    def answers(self) -> list[str]:
        """All acceptable answers as one flat list."""
        return [alias for group in self.ground_truth for alias in group]

    @classmethod
    def from_value(cls, value: Any, *, field_name: str, row: int | None = None) -> Probe:
        """Build a probe from a dict with ``prompt`` and ``ground_truth`` (string, list or list of lists)."""
        if isinstance(value, Probe):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(
                f"a probe must be a dict with 'prompt' and 'ground_truth', not {type(value).__name__}",
                row=row,
                field=field_name,
            )
        prompt = value.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise RequestError("a probe needs a non-empty 'prompt'", row=row, field=field_name)
        match: Any = value.get("match") or "any"
        if match not in ("any", "all"):
            raise RequestError(f"'match' must be 'any' or 'all', not {shown(match)}", row=row, field=field_name)
        return cls(prompt, answer_groups(value.get("ground_truth"), field_name, row), match, value.get("image"))


def answer_groups(value: Any, field_name: str = "ground_truth", row: int | None = None) -> list[list[str]]:
    """Normalise answers to groups of aliases: ``"a"`` → ``[["a"]]``, ``["a", "b"]`` → ``[["a"], ["b"]]``.

    Nested lists stay as they are; empty strings and ``None`` are dropped.
    """
    if value is None:
        return []
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence):
        raise RequestError(
            f"answers must be a string or a list, not {type(value).__name__}", row=row, field=field_name
        )
    groups: list[list[str]] = []
    for entry in value:
        aliases = entry if isinstance(entry, (list, tuple)) else [entry]
        if not all(isinstance(a, str) or a is None for a in aliases):
            raise RequestError("answers must be strings", row=row, field=field_name)
        kept = [a for a in aliases if a is not None and a.strip()]
        if kept:
            groups.append(kept)
    return groups


@dataclass
class EditRequest:
    """One fact to change.

    Args:
        prompt: text before the answer; either a template with exactly one ``{}`` for the subject, or filled.
        subject: the entity that the fact is about. Needed by locate-then-edit methods (ROME, MEMIT …).
        target_new: what the model is to say after the prompt. Leading white space is dropped; the separator
            between prompt and target is the library's business.
        ground_truth: what it says now (the old or true answers), may be empty.
        rephrase_prompts: other wordings that should give the new target.
        locality: axis name → probes that must not change.
        portability: axis name → probes whose answer follows from the edit.
        image: path of an image relative to an image root.
        id: a name for the edit, unique within a model; made up when missing.
        separator: text between prompt and target, where this fact needs another one than the config's.
        metadata: anything else that JSON can hold. No method reads it, except that WISE takes an irrelevant text from
            ``loc_prompt``.

    Raises:
        RequestError: if a field is missing, empty or of a wrong type.
    """

    prompt: str
    subject: str | None = None
    target_new: str = ""
    ground_truth: list[str] = field(default_factory=list)
    rephrase_prompts: list[str] = field(default_factory=list)
    locality: dict[str, list[Probe]] = field(default_factory=dict)
    portability: dict[str, list[Probe]] = field(default_factory=dict)
    image: str | None = None
    id: str | None = None
    separator: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    row: int | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_text("prompt", self.prompt)
        self._check_text("target_new", self.target_new)
        self.target_new = self.target_new.strip()
        if self.subject is not None:
            self._check_text("subject", self.subject)
            self.subject = self.subject.strip()
        for name in ("id", "image", "separator"):
            value = getattr(self, name)
            if value is not None:
                self._check_text(name, value, blank=name == "separator")
        slots = self.prompt.count(SLOT)
        if slots > 1:
            self._fail(f"has {slots} slots '{{}}'; write the subject into all but one of them", "prompt")
        if slots == 1 and self.subject is None:
            self._fail("the prompt has a slot '{}' but there is no subject to fill it with", "subject")
        self.ground_truth = [a for g in answer_groups(self.ground_truth, "ground_truth", self.row) for a in g]
        for answer in self.ground_truth:
            self._check_text("ground_truth", answer)
        self.rephrase_prompts = self._texts("rephrase_prompts", self.rephrase_prompts)
        self.locality = self._probes("locality", self.locality)
        self.portability = self._probes("portability", self.portability)
        self.metadata = {} if self.metadata is None else self.metadata
        if not isinstance(self.metadata, Mapping):
            self._fail(f"must be a dict, not {type(self.metadata).__name__}", "metadata")
        self._check_plain("metadata", self.metadata)

    # ------------------------------------------------------------------ text

    @property
    def filled_prompt(self) -> str:
        """The prompt with the subject written in."""
        if SLOT in self.prompt and self.subject is not None:
            before, after = self.prompt.split(SLOT)
            return before + self.subject + after
        return self.prompt

    def separator_or(self, default: str | None) -> str | None:
        """What stands between prompt and target: the fact's own separator, else ``default`` (``None``: by rule)."""
        return default if self.separator is None else self.separator

    def subject_span(self) -> tuple[int, int]:
        """Character span of the subject in `filled_prompt`.

        A slot fixes the place. Otherwise see `find_subject`.

        Raises:
            RequestError: if the request has no subject.
            SubjectNotFoundError: if the prompt does not contain it.
        """
        if self.subject is None:
            self._fail("this method needs the subject of the fact; give `subject=`", "subject")
        assert self.subject is not None
        if SLOT in self.prompt:
            start = self.prompt.index(SLOT)
            return start, start + len(self.subject)
        span = find_subject(self.prompt, self.subject)
        if span is None:
            raise SubjectNotFoundError(
                f"the prompt {shown(self.prompt)} contains neither a slot '{{}}' nor the subject"
                f" {shown(self.subject)}",
                row=self.row,
                field="subject",
                request_id=self.id,
            )
        return span

    @property
    def template(self) -> str:
        """The prompt with the subject replaced by ``{}`` (needs a subject that occurs in the prompt)."""
        start, end = self.subject_span()
        text = self.filled_prompt
        return text[:start] + SLOT + text[end:]

    # ------------------------------------------------------------------ conversion

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], *, row: int | None = None) -> EditRequest:
        """Build a request from a dict or dataset row.

        Accepts the library's own fields, the columns of `hf_kedit.data.FEATURES` (probes as a flat list with
        ``name``), and the common spellings ``rephrase_prompt``, ``target`` and ``{"str": …}`` targets.
        Columns that only describe the row (``dataset``, ``task``, ``group_id`` …) go to ``metadata``. In fields that
        hold lists or objects, a text may be the JSON of one, as in the cells of a CSV file (see `read_cell`).

        Raises:
            RequestError: for an unknown field (the nearest known one is named) or a bad value.
        """
        data = dict(value)
        for alias, name in _ALIASES.items():
            if alias in data and name not in data:
                data[name] = data.pop(alias)
        for name in _CELLS:
            if isinstance(data.get(name), str):
                strict, objects = isinstance(value, CsvRow), name in _OBJECTS
                data[name] = read_cell(data[name], name, row, strict=strict, objects=objects)
        extra = data.get("extra")
        if data.get("separator") is None and isinstance(extra, Mapping):
            data["separator"] = extra.get("separator")  # `FEATURES` has no column for it
        metadata = data.pop("metadata", None) or {}
        if not isinstance(metadata, Mapping):
            raise RequestError(f"must be a dict, not {type(metadata).__name__}", row=row, field="metadata")
        metadata = dict(metadata)
        for name in _DESCRIPTIVE:
            if data.get(name) is not None:
                metadata[name] = data[name]
            data.pop(name, None)
        unknown = [name for name in data if name not in _FIELDS]
        if unknown:
            raise RequestError(
                f"unknown field.{nearest(str(unknown[0]), [*_FIELDS, *_ALIASES])}"
                " Put anything that is not part of the edit into 'metadata'.",
                row=row,
                field=str(unknown[0]),
            )
        if data.get("prompt") is None:
            raise RequestError("is missing", row=row, field="prompt")
        target = data.get("target_new")
        if isinstance(target, Mapping) and isinstance(target.get("str"), str):
            data["target_new"] = target["str"]
        kept = {k: v for k, v in data.items() if v is not None}
        return cls(**kept, metadata=metadata, row=row)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict from which `from_dict` builds an equal request."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "subject": self.subject,
            "target_new": self.target_new,
            "ground_truth": list(self.ground_truth),
            "rephrase_prompts": list(self.rephrase_prompts),
            "locality": _probes_to_json(self.locality),
            "portability": _probes_to_json(self.portability),
            "image": self.image,
            "metadata": self.metadata,
            **({} if self.separator is None else {"separator": self.separator}),
        }

    def with_id(self, new_id: str) -> EditRequest:
        """Return a copy under another id."""
        return replace(self, id=new_id)

    # ------------------------------------------------------------------ checks

    def _fail(self, message: str, field_name: str) -> None:
        raise RequestError(message, row=self.row, field=field_name, request_id=self.id)

    def _check_text(self, name: str, value: Any, *, blank: bool = False) -> None:
        if not isinstance(value, str):
            self._fail(f"must be a string, not {type(value).__name__}", name)
        if not blank and not value.strip():
            self._fail("is empty", name)
        if "\x00" in value:
            self._fail("contains a NUL character", name)
        if not is_writable(value):
            self._fail(HALF, name)

    def _check_plain(self, name: str, value: Any, level: int = 0) -> None:
        """Refuse what JSON does not give back as it was: it could be edited with, and never be saved."""
        if level > LEVELS:
            self._fail(f"is nested more than {LEVELS} levels deep", name)
        if isinstance(value, str):
            if not is_writable(value):
                self._fail(HALF, name)
        elif isinstance(value, Mapping):
            for key, part in value.items():
                if not isinstance(key, str):
                    self._fail(f"the key {shown(key)} would come back from a file as text; write it as text", name)
                self._check_plain(name, key)
                self._check_plain(f"{name}.{key}", part, level + 1)
        elif isinstance(value, list):
            for i, part in enumerate(value):
                self._check_plain(f"{name}[{i}]", part, level + 1)
        elif value is not None and not isinstance(value, (bool, int, float)):
            better = "a list" if isinstance(value, tuple) else "text or plain numbers"
            self._fail(f"a {type(value).__name__} cannot be saved as it is; write {better}", name)

    def _texts(self, name: str, value: Any) -> list[str]:
        if value is None:
            return []
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, Sequence):
            self._fail(f"must be a string or a list of strings, not {type(value).__name__}", name)
        for text in value:
            self._check_text(name, text)
        return list(value)

    def _probes(self, name: str, value: Any) -> dict[str, list[Probe]]:
        probes: dict[str, list[Probe]] = {}
        if value is None:
            return probes
        if isinstance(value, Mapping):
            for axis, entries in value.items():
                probes[str(axis)] = list(self._axis(f"{name}[{axis!r}]", entries))
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for entry in value:
                axis = entry.get("name") if isinstance(entry, Mapping) else None
                if not isinstance(axis, str):
                    self._fail("a list of probes needs a 'name' (the axis) in every entry", name)
                assert isinstance(axis, str)
                probes.setdefault(axis, []).append(Probe.from_value(entry, field_name=name, row=self.row))
        else:
            self._fail(f"must be a dict of axis → probes, not {type(value).__name__}", name)
        for axis, entries in probes.items():
            self._check_text(name, axis)
            for probe in entries:
                for text in (probe.prompt, *probe.answers, *([probe.image] if probe.image is not None else [])):
                    self._check_text(f"{name}[{axis!r}]", text)
        return {axis: entries for axis, entries in probes.items() if entries}

    def _axis(self, name: str, entries: Any) -> Iterator[Probe]:
        if isinstance(entries, Mapping) and isinstance(entries.get("prompt"), Sequence):
            prompts = entries["prompt"]
            if isinstance(prompts, str):
                yield Probe.from_value(entries, field_name=name, row=self.row)
                return
            answers = entries.get("ground_truth") or [None] * len(prompts)
            if not isinstance(answers, (list, tuple)) or len(answers) != len(prompts):
                self._fail("'prompt' and 'ground_truth' must be lists of the same length", name)
            for prompt, answer in zip(prompts, answers, strict=True):
                yield Probe.from_value({"prompt": prompt, "ground_truth": answer}, field_name=name, row=self.row)
        elif isinstance(entries, (Mapping, Probe)):
            yield Probe.from_value(entries, field_name=name, row=self.row)
        elif isinstance(entries, Sequence) and not isinstance(entries, str):
            for entry in entries:
                yield Probe.from_value(entry, field_name=name, row=self.row)
        else:
            self._fail(f"must be a probe or a list of probes, not {type(entries).__name__}", name)


_FIELDS = (
    "prompt",
    "subject",
    "target_new",
    "ground_truth",
    "rephrase_prompts",
    "locality",
    "portability",
    "image",
    "id",
    "separator",
)
_ALIASES = {"rephrase_prompt": "rephrase_prompts", "rephrase": "rephrase_prompts", "target": "target_new"}
_DESCRIPTIVE = (
    "dataset",
    "task",
    "group_id",
    "group_index",
    "group_size",
    "target_neg",
    "loc_prompt",
    "image_rephrase",
    "extra",
)


_LISTS, _OBJECTS = ("ground_truth", "rephrase_prompts"), ("locality", "portability", "metadata", "extra")
_CELLS = (*_LISTS, *_OBJECTS)
_LIST_AS_TEXT = re.compile(r"""\[\s*['"].*['"]\s*\]""", flags=re.DOTALL)  # what str(["a"]) gives in Python and numpy


def read_cell(text: str, name: str, row: int | None = None, *, strict: bool = True, objects: bool = False) -> Any:
    """What a text stands for in a field of lists or objects: itself, or the value that its JSON holds.

    Args:
        text: the content of the field.
        name: of the field, for messages.
        row: number of the row, for messages.
        strict: the text is the cell of a CSV file, which can hold a list in no other way.
        objects: the field may hold objects too.

    Raises:
        RequestError: for a list that is written otherwise, as Python and numpy print one: it would become one text.
    """
    content = text.strip()
    if not content.startswith(("[", "{") if objects else "["):
        return text
    try:
        value = parse_json(content, "the text", DataError)
    except DataError as error:
        if strict or _LIST_AS_TEXT.fullmatch(content):
            raise RequestError(
                f'{content[:60]!r} begins like a list and is no JSON: write ["a", "b"] with double quotes, or use'
                " a JSONL file",
                row=row,
                field=name,
            ) from error
        return text
    if not strict and not objects and not _answers(value):
        return text  # "[1, 2]" may well be an answer
    return value


def _answers(values: list[Any]) -> bool:
    """Whether a list holds texts, or lists of them."""
    return all(isinstance(v, str) or (isinstance(v, list) and all(isinstance(a, str) for a in v)) for v in values)


def _probes_to_json(probes: Mapping[str, Sequence[Probe]]) -> dict[str, list[dict[str, Any]]]:
    return {
        axis: [
            {"prompt": p.prompt, "ground_truth": p.ground_truth, "match": p.match}
            | ({"image": p.image} if p.image else {})
            for p in entries
        ]
        for axis, entries in probes.items()
    }


def in_row(build: Callable[[EditRequest], T], request: EditRequest) -> T:
    """Call ``build(request)`` and add the request's row and id to a `RequestError` that lacks them."""
    try:
        return build(request)
    except RequestError as error:
        if error.row is None and error.request_id is None:
            raise type(error)(str(error), row=request.row, request_id=request.id) from error
        raise


# ---------------------------------------------------------------------- many requests


def load_requests(source: RequestSource) -> list[EditRequest]:
    """Turn anything that a user may pass to ``edit`` into a validated list.

    Args:
        source: an `EditRequest`, a dict, a list of either, a ``datasets.Dataset``, or the path of a JSON, JSONL
            or CSV file.

    Returns:
        A non-empty list; ids are unique where given.

    Raises:
        RequestError: naming row and field of the first bad request.
        DataError: if a file cannot be read, or there is nothing in it.
    """
    if isinstance(source, EditRequest):
        return [source]
    if isinstance(source, (str, Path)):
        rows: Iterable[Any] = read_rows(Path(source))
    elif isinstance(source, Mapping):
        rows = [source]
    elif isinstance(source, Iterable):
        rows = source
    else:
        raise RequestError(f"cannot read edit requests from a {type(source).__name__}")
    requests: list[EditRequest] = []
    seen: dict[str, int] = {}
    for number, entry in enumerate(rows):
        if isinstance(entry, EditRequest):
            request = entry
        elif isinstance(entry, Mapping):
            request = EditRequest.from_dict(entry, row=number)
        else:
            raise RequestError(
                f"must be an EditRequest or a dict, not {type(entry).__name__}", row=number, field="request"
            )
        if request.id is not None:
            if request.id in seen:
                raise RequestError(
                    f"the same id is used in row {seen[request.id]}", row=number, field="id", request_id=request.id
                )
            seen[request.id] = number
        requests.append(request)
    if not requests:
        raise DataError("there are no edit requests: the list, dataset or file is empty")
    return requests


def read_rows(path: Path) -> list[Any]:
    """Read the rows of a JSON (a list, or one object), JSONL, CSV or Parquet file; blank cells of CSV are left out.

    Raises:
        DataError: if the file is missing, unreadable, not UTF-8, or not of these formats.
    """
    rows = read_records(str(path))
    return [CsvRow({k: v for k, v in row.items() if v}) if isinstance(row, CsvRow) else row for row in rows]
