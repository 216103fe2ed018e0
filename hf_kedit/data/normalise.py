"""Helpers that every dataset's normaliser uses: checked access to one raw record, answers, probes, rows.

A raw record is whatever stood in the file. :class:`Record` gives its fields as text, lists and groups of aliases,
strips white space, and turns everything unusable into a :class:`RequestError` that names the row and the field,
so that no normaliser has to check types itself. Fields nobody asked for end up in ``extra``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import RequestError
from ..requests import answer_groups
from ..storage.files import json_ready
from ..text.scripts import HALF, is_writable
from .features import blank, probe
from .report import LoadReport

RawRow = dict[str, Any]


class Record:
    """One raw record and its number in the file.

    Args:
        value: the record; must be a mapping.
        number: row number in the source, counted from 0.
        report: where dropped probes are counted.
        prefix: path of a nested record, for error messages.

    Raises:
        RequestError: the record is not an object.
    """

    def __init__(self, value: Any, number: int, report: LoadReport, prefix: str = "") -> None:
        if not isinstance(value, Mapping):
            raise RequestError(
                f"must be an object, not {type(value).__name__}", row=number, field=prefix.rstrip(".") or None
            )
        self.value: Mapping[str, Any] = value
        self.number = number
        self.report = report
        self.prefix = prefix
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return not _missing(self.value.get(name))

    def fail(self, message: str, name: str | None = None) -> RequestError:
        """Return the error about a field (raise the result)."""
        return RequestError(message, row=self.number, field=self.prefix + name if name else None)

    def raw(self, *names: str) -> Any:
        """Return the first of these fields that has a value, else None; all of them count as used."""
        self._used.update(names)
        return next((self.value[n] for n in names if n in self), None)

    def _name(self, names: tuple[str, ...]) -> str:
        return next((n for n in names if n in self), names[0])

    def text(self, *names: str) -> str | None:
        """Return the first of these fields as stripped text, or None if there is none or it is blank."""
        return (self.verbatim(*names) or "").strip() or None

    def verbatim(self, *names: str) -> str | None:
        """Return the first of these fields as text with its white space, or None."""
        value = self.raw(*names)
        return None if value is None else as_text(value, self, self._name(names))

    def need(self, *names: str) -> str:
        """Return a field as text with its white space.

        Raises:
            RequestError: it is missing or blank.
        """
        value = self.verbatim(*names)
        if value is None or not value.strip():
            raise self.fail("is missing or empty" + (f" (also sought as {', '.join(names[1:])})" if names[1:] else ""),
                            names[0])  # fmt: skip
        return value

    def texts(self, *names: str, strip: bool = True) -> list[str]:
        """Return a field that is text or a list of texts as a list of non-empty texts.

        Args:
            names: the field and its other spellings.
            strip: drop white space on both sides, not only at the end.
        """
        value, name = self.raw(*names), self._name(names)
        if value is None:
            return []
        entries = value if isinstance(value, list) else [value]
        texts = [as_text(entry, self, name).rstrip() for entry in entries if not _missing(entry)]
        return [text.strip() if strip else text for text in texts]

    def groups(self, *names: str) -> list[list[str]]:
        """Return a field with answers as groups of aliases (see :func:`groups`)."""
        return groups(self.raw(*names), self, self._name(names))

    def items(self, *names: str) -> list[Any]:
        """Return a field that is a list (or missing) as a list."""
        value = self.raw(*names)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.fail(f"must be a list, not {type(value).__name__}", self._name(names))
        return value

    def child(self, name: str) -> Record:
        """Return a nested object.

        Raises:
            RequestError: it is missing or not an object.
        """
        value = self.raw(name)
        if value is None:
            raise self.fail("is missing", name)
        return self.nested(value, name)

    def children(self, *names: str) -> list[Record]:
        """Return a field that is a list of objects, one object, or missing."""
        value, name = self.raw(*names), self._name(names)
        if value is None:
            return []
        if isinstance(value, Mapping):
            return [self.nested(value, name)]
        if not isinstance(value, list):
            raise self.fail(f"must be a list of objects, not {type(value).__name__}", name)
        return [self.nested(entry, f"{name}[{i}]") for i, entry in enumerate(value)]

    def nested(self, value: Any, name: str) -> Record:
        """Return a record inside this one."""
        return Record(value, self.number, self.report, f"{self.prefix}{name}.")

    def rest(self) -> RawRow:
        """Return the fields that nobody has asked for and that have a value."""
        return {str(k): json_ready(v) for k, v in self.value.items() if k not in self._used and not _missing(v)}


def _missing(value: Any) -> bool:
    """Whether a field says nothing: null, NaN (a blank cell read by pandas) or blank text (one in a CSV file)."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def as_text(value: Any, record: Record, name: str) -> str:
    """Return a text, or a number as text.

    Raises:
        RequestError: it is something else, or no valid Unicode.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise record.fail(f"must be text, not {type(value).__name__}", name)
    if not is_writable(value):
        raise record.fail(HALF, name)
    return value


def groups(value: Any, record: Record, name: str) -> list[list[str]]:
    """Return answers as groups of aliases, stripped, without empty ones.

    ``"a"`` → ``[["a"]]``; ``["a", "b"]`` → ``[["a"], ["b"]]``; ``[["a", "b"], ["c"]]`` unchanged;
    ``{"value": "a", "aliases": ["b"]}`` → ``[["a", "b"]]``, also inside a list.
    """
    entries = value if isinstance(value, list) else [value]
    plain: list[str | list[str] | None] = []
    for entry in entries:
        if _missing(entry):
            continue
        if isinstance(entry, Mapping):
            inner = record.nested(entry, name)
            plain.append([*inner.texts("value", "answer"), *inner.texts("aliases", "alias", "answer_alias")])
        elif isinstance(entry, list):
            plain.append([as_text(alias, record, name).strip() for alias in entry if not _missing(alias)])
        else:
            plain.append(as_text(entry, record, name).strip())
    return answer_groups(plain, name, record.number)


def flat(answers: Iterable[Iterable[str]]) -> list[str]:
    """Return groups of aliases as one list without repetitions."""
    return list(dict.fromkeys(alias for group in answers for alias in group))


def fill_slots(template: str, subject: str | None) -> str:
    """Write the subject into the slot ``{}``, if there is one. Other braces are left alone."""
    return template if subject is None else template.replace("{}", subject)


def make_probe(
    record: Record,
    name: str,
    prompt: str | None,
    answers: list[list[str]],
    *,
    match: str = "any",
    image: str | None = None,
    unanswered: bool = False,
) -> Iterator[RawRow]:
    """Yield one probe; or none, counted, if it has no prompt or no answer.

    Args:
        record: where it comes from.
        name: the axis.
        prompt: text before the answer.
        answers: groups of aliases.
        match: ``"any"`` or ``"all"`` groups.
        image: path relative to an image root.
        unanswered: keep a probe without an answer, for comparing outputs before and after.
    """
    if prompt is None or not prompt.strip():
        record.report.drop_probe("no prompt")
    elif not answers and not unanswered:
        record.report.drop_probe("no answer")
    else:
        yield probe(name, prompt.strip(), answers, match=match, image=image)


def axes(record: Record, section: str) -> list[RawRow]:
    """Return the probes of a section ``{axis: [{"prompt": …, "ground_truth": …}, …]}``.

    ``prompt`` may be a list; its texts are probes with the same answers, unless there is one answer for each.
    """
    value = record.raw(section)
    if value is None:
        return []
    holder = record.nested(value, section)
    probes: list[RawRow] = []
    for axis in holder.value:
        for item in holder.children(axis):
            prompts, answer = item.texts("prompt"), item.raw("ground_truth")
            if isinstance(item.value.get("prompt"), list) and isinstance(answer, list) and len(answer) == len(prompts):
                pairs: Iterable[tuple[str, Any]] = zip(prompts, answer, strict=True)
            else:
                pairs = [(prompt, answer) for prompt in prompts or [""]]
            for prompt, one in pairs:
                probes += make_probe(item, str(axis), prompt, groups(one, item, "ground_truth"))
    return probes


def make_row(record: Record, dataset: str, prompt: str, *, suffix: str = "", **columns: Any) -> RawRow:
    """Return the row of a record.

    Args:
        record: the raw record; its unused fields go to ``extra``, where given ones win.
        dataset: name of the dataset, used for the id.
        prompt: filled prompt, not stripped; ``extra["prompt_raw"]`` keeps it if stripping changes it.
        suffix: appended to the id, for several edits of one record.
        columns: the other columns. A ``target_new`` of None is stored as ``""`` (such rows are dropped, counted).
    """
    extra = {**record.rest(), **json_ready(columns.pop("extra", None) or {})}
    if prompt != prompt.strip():
        extra["prompt_raw"] = prompt
    columns["target_new"] = (columns.get("target_new") or "").strip()
    row_id = f"{dataset}/{record.number}{suffix}"
    return blank(id=row_id, dataset=dataset, prompt=prompt.strip(), extra=extra, **columns)


def grouped(
    rows: list[RawRow], dataset: str, number: int, portability: list[RawRow], extra: RawRow
) -> Iterator[RawRow]:
    """Yield the edits of one case as a group: equal ``group_id``; probes and ``extra`` on the last row.

    A case with a single edit is no group.
    """
    for index, row in enumerate(rows):
        if len(rows) > 1:
            row.update(group_id=f"{dataset}/{number}", group_index=index, group_size=len(rows))
        if index == len(rows) - 1:
            row["portability"] = row["portability"] + portability
            row["extra"] = {**extra, **row["extra"]}
        yield row
