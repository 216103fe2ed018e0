"""What a user wants changed: `EditRequest`, the probes that judge it, and reading many of them.

A request is validated when it is made; the error names the row, the id and the field. This module knows
nothing of models or tokens. Everything here works on strings and never uses ``str.format``, so that braces
in prompts are harmless.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from .errors import DataError, RequestError, SubjectNotFoundError, nearest

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
            raise RequestError(f"'match' must be 'any' or 'all', not {match!r}", row=row, field=field_name)
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
        aliases = [entry] if isinstance(entry, str) or entry is None else list(entry)
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
        metadata: anything else. No method reads it, except that WISE takes an irrelevant text from ``loc_prompt``.

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
    metadata: dict[str, Any] = field(default_factory=dict)
    row: int | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_text("prompt", self.prompt)
        self._check_text("target_new", self.target_new)
        self.target_new = self.target_new.strip()
        if self.subject is not None:
            self._check_text("subject", self.subject)
            self.subject = self.subject.strip()
        if self.id is not None and (not isinstance(self.id, str) or not self.id.strip()):
            self._fail("must be a non-empty string", "id")
        slots = self.prompt.count(SLOT)
        if slots > 1:
            self._fail(f"has {slots} slots '{{}}'; write the subject into all but one of them", "prompt")
        if slots == 1 and self.subject is None:
            self._fail("the prompt has a slot '{}' but there is no subject to fill it with", "subject")
        self.ground_truth = [a for g in answer_groups(self.ground_truth, "ground_truth", self.row) for a in g]
        self.rephrase_prompts = self._texts("rephrase_prompts", self.rephrase_prompts)
        self.locality = self._probes("locality", self.locality)
        self.portability = self._probes("portability", self.portability)
        if self.metadata is None:
            self.metadata = {}

    # ------------------------------------------------------------------ text

    @property
    def filled_prompt(self) -> str:
        """The prompt with the subject written in."""
        if SLOT in self.prompt and self.subject is not None:
            before, after = self.prompt.split(SLOT)
            return before + self.subject + after
        return self.prompt

    def subject_span(self) -> tuple[int, int]:
        """Character span of the subject in `filled_prompt`.

        A slot fixes the place. Otherwise the first occurrence counts: literal, then regardless of case, then
        regardless of Unicode form and of how much white space stands between the words.

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
                f"the prompt {self.prompt!r} contains neither a slot '{{}}' nor the subject {self.subject!r}",
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
        Columns that only describe the row (``dataset``, ``task``, ``group_id`` …) go to ``metadata``.

        Raises:
            RequestError: for an unknown field (the nearest known one is named) or a bad value.
        """
        data = dict(value)
        for alias, name in _ALIASES.items():
            if alias in data and name not in data:
                data[name] = data.pop(alias)
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
        }

    def with_id(self, new_id: str) -> EditRequest:
        """Return a copy under another id."""
        return replace(self, id=new_id)

    # ------------------------------------------------------------------ checks

    def _fail(self, message: str, field_name: str) -> None:
        raise RequestError(message, row=self.row, field=field_name, request_id=self.id)

    def _check_text(self, name: str, value: Any) -> None:
        if not isinstance(value, str):
            self._fail(f"must be a string, not {type(value).__name__}", name)
        if not value.strip():
            self._fail("is empty", name)
        if "\x00" in value:
            self._fail("contains a NUL character", name)

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
        return {axis: entries for axis, entries in probes.items() if entries}

    def _axis(self, name: str, entries: Any) -> Iterator[Probe]:
        if isinstance(entries, Mapping) and isinstance(entries.get("prompt"), Sequence):
            prompts = entries["prompt"]
            if isinstance(prompts, str):
                yield Probe.from_value(entries, field_name=name, row=self.row)
                return
            answers = entries.get("ground_truth") or [None] * len(prompts)
            if isinstance(answers, str) or len(answers) != len(prompts):
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


def _probes_to_json(probes: Mapping[str, Sequence[Probe]]) -> dict[str, list[dict[str, Any]]]:
    return {
        axis: [
            {"prompt": p.prompt, "ground_truth": p.ground_truth, "match": p.match}
            | ({"image": p.image} if p.image else {})
            for p in entries
        ]
        for axis, entries in probes.items()
    }


def find_subject(prompt: str, subject: str) -> tuple[int, int] | None:
    """Find the first occurrence of ``subject`` in ``prompt``: literal, case-insensitive, then normalised.

    Returns:
        The character span in ``prompt``, or ``None``.
    """
    start = prompt.find(subject)
    if start >= 0:
        return start, start + len(subject)
    words = [re.escape(w) for w in subject.split()]
    hit = re.search(r"\s+".join(words), prompt, flags=re.IGNORECASE) if words else None
    if hit:
        return hit.span()
    # Unicode forms can change lengths: search in the composed text and map the span back character by character.
    composed: list[str] = []
    origin: list[tuple[int, int]] = []
    for cluster in re.finditer(r"\S[\u0300-\u036f]*|\s+", prompt):
        text = " " if cluster.group().isspace() else unicodedata.normalize("NFC", cluster.group())
        composed.extend(text)
        origin.extend([cluster.span()] * len(text))
    wanted = " ".join(unicodedata.normalize("NFC", w) for w in subject.split())
    start = "".join(composed).casefold().find(wanted.casefold())
    if start < 0 or start + len(wanted) > len(origin) or not wanted:
        return None
    return origin[start][0], origin[start + len(wanted) - 1][1]


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
    """Read the rows of a JSON (a list, or one object), JSONL or CSV file.

    Raises:
        DataError: if the file is missing, unreadable, not UTF-8, or not of these formats.
    """
    if not path.exists():
        raise DataError(f"there is no file {str(path)!r}")
    if path.is_dir():
        raise DataError(f"{str(path)!r} is a folder; give the path of a .json, .jsonl or .csv file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}") from error
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return [{k: v for k, v in row.items() if v not in (None, "")} for row in csv.DictReader(io.StringIO(text))]
    if suffix in (".jsonl", ".ndjson"):
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path.name}, line {number}: not JSON ({error.msg})") from error
        return rows
    if suffix == ".json":
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path.name}, line {error.lineno}: not JSON ({error.msg})") from error
        return value if isinstance(value, list) else [value]
    raise DataError(f"cannot read {path.name!r}: use .json, .jsonl or .csv")
