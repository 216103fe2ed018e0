"""What a user wants changed: `EditRequest`, the probes that judge it, and reading many of them.

A request is validated when it is made; the error names the row, the id and the field. This module knows
nothing of models or tokens. Everything here works on strings and never uses ``str.format``, so that braces
in prompts are harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, Union

from .errors import DataError, RequestError, SubjectNotFoundError, nearest, shown
from .storage.cells import check_plain, read_cell
from .storage.records import CsvRow, read_records
from .text.chat import TEXT_FORMATS, ChatFrame, Messages, TextFormat, chat_frame, read_messages, with_system
from .text.joining import separator_between
from .text.probes import Probe as Probe
from .text.probes import answer_groups as answer_groups
from .text.probes import probes_to_json
from .text.scripts import HALF, is_writable
from .text.subjects import find_subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLOT = "{}"
ERASED = "I don't know."
"""What a model says in the place of an answer that it is to lose, unless something else is asked for."""
T = TypeVar("T")
RequestSource = Union["EditRequest", Mapping[str, Any], Iterable[Any], str, Path]


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
        metadata: anything else that JSON can hold. Methods read two texts of it: DINM and DPO the answer that is to go
            (``target_neg``), WISE an irrelevant text (``loc_prompt``).
        messages: the conversation that the fact is a part of, as ``[{"role": "system", "content": …}, …]``; what the
            user says last is the prompt, which may then be left out, and other wordings and probes are asked in its
            place.
        prompt_format: how the model reads prompt, wordings and probes: ``"plain"``, as they are; ``"chat"``, through
            the tokenizer's chat template; ``"both"``: one edit for both. ``None``: ``"chat"`` where there are
            messages, otherwise as the method's config says.
        frame: the chat that the prompt stands in, once a tokenizer has written it (`rendered`); not saved.

    Raises:
        RequestError: if a field is missing, empty or of a wrong type.
    """

    prompt: str = ""
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
    messages: Messages | None = None
    prompt_format: TextFormat | None = None
    frame: ChatFrame | None = field(default=None, repr=False, compare=False)
    row: int | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_format()
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
        check_plain("metadata", self.metadata, self._fail)

    # ------------------------------------------------------------------ text

    @property
    def plain_prompt(self) -> str:
        """The prompt with the subject written in, outside of any chat."""
        if SLOT in self.prompt and self.subject is not None:
            before, after = self.prompt.split(SLOT)
            return before + self.subject + after
        return self.prompt

    @property
    def filled_prompt(self) -> str:
        """What the model reads before the answer: the plain prompt, or the chat that it is the last turn of."""
        return self.plain_prompt if self._chat is None else self._chat.text(self.plain_prompt)

    def posed(self, text: str) -> str:
        """What the model reads of another text in the place of the prompt: the text, or the chat with it."""
        return text if self._chat is None else self._chat.text(text)

    @property
    def unlearns(self) -> bool:
        """Whether the request is to take answers away, beside giving its target."""
        return bool(self.metadata.get("erase"))

    @property
    def unwanted(self) -> list[str]:
        """The answers that are to go.

        Those that ``erase`` names, else ``target_neg``; of a request that unlearns, else the old answers.
        """
        named, negative = self.metadata.get("erase"), self.metadata.get("target_neg")
        if isinstance(named, list):
            return list(named)
        return [negative] if negative else list(self.ground_truth) if named else []

    @property
    def _chat(self) -> ChatFrame | None:
        return self.frame if self.prompt_format == "chat" else None

    def in_context(self, template: str, index: int = 0) -> tuple[str, int]:
        """What the model reads, in a context; contexts of a chat are said by its system and its user.

        Args:
            template: text with ``{}`` for the prompt.
            index: number of the template among those of a method.

        Returns:
            The text, and how far the characters of `plain_prompt` moved.
        """
        before, after = template.split(SLOT) if template.count(SLOT) == 1 else (template, "")
        if self._chat is not None:
            return self._chat.in_context(before, after, index, self.plain_prompt)
        return before + self.plain_prompt + after, len(before)

    def in_format(self, prompt_format: TextFormat | None, system: str | None = None) -> EditRequest:
        """The request in a format, unless it names one itself; a chat gets its messages, with ``system`` in front."""
        chosen = self.prompt_format or prompt_format
        if chosen in (None, "plain"):
            return self
        return replace(self, prompt_format=chosen, messages=with_system(self.messages, system, self.prompt))

    def rendered(self, tokenizer: PreTrainedTokenizerBase) -> EditRequest:
        """The request as methods and protocols read it: a chat stands in what the tokenizer's template writes.

        This is the one place where a request becomes text. Its other wordings and its probes are then texts of chats
        too (of ``"both"``, those of the plain request are left).

        Raises:
            ChatTemplateError: if there is no template, or it cannot write the conversation.
        """
        if self.prompt_format not in ("chat", "both") or self.frame is not None:
            return self
        frame = chat_frame(tokenizer, with_system(self.messages, None, self.prompt))
        return replace(self, frame=frame)._framed()

    def _framed(self) -> EditRequest:
        frame = self._chat
        if frame is None:
            return self

        def asked(axes: Mapping[str, Sequence[Probe]]) -> dict[str, list[Probe]]:
            return {axis: [replace(p, prompt=frame.text(p.prompt)) for p in probes] for axis, probes in axes.items()}

        return replace(
            self,
            rephrase_prompts=[frame.text(text) for text in self.rephrase_prompts],
            locality=asked(self.locality),
            portability=asked(self.portability),
        )

    def asked(self, prompt_format: TextFormat | None, system: str | None = None) -> EditRequest:
        """The request in the one format that it is asked in; ``None``: its own, of ``"both"`` the plain one."""
        chosen = prompt_format or self.prompt_format
        if chosen != "chat":
            return replace(self, prompt_format=None, messages=None, frame=None)
        return replace(self, prompt_format=chosen, messages=with_system(self.messages, system, self.prompt))

    def formats(self) -> list[EditRequest]:
        """The rendered request in each of its formats: of ``"both"`` the plain one and the chat, otherwise itself."""
        if self.prompt_format != "both":
            return [self]
        return [
            self.asked("plain"),
            replace(self, prompt_format="chat")._framed(),
        ]

    def separator_or(self, default: str | None) -> str | None:
        """What stands between prompt and target: the fact's own separator, else ``default`` (``None``: by rule)."""
        if self._chat is not None:  # what a template writes before an answer knows of no other separator
            return separator_between(self.filled_prompt, self.target_new)
        return default if self.separator is None else self.separator

    def subject_span(self) -> tuple[int, int]:
        """Character span of the subject in `filled_prompt`; see `plain_span`."""
        start, end = self.plain_span()
        shift = 0 if self._chat is None else self._chat.shift(self.plain_prompt)
        return start + shift, end + shift

    def plain_span(self) -> tuple[int, int]:
        """Character span of the subject in `plain_prompt`.

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
        Columns that only describe the row (``dataset``, ``task``, ``group_id`` …) go to ``metadata``. ``erase`` (true,
        or the answers that are to go) makes `ERASED` the target, unless there is one. In fields that
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
        if isinstance(extra, Mapping):
            for name in _OPTIONAL:
                if data.get(name) is None:
                    data[name] = extra.get(name)  # `FEATURES` has no columns for them
        metadata = data.pop("metadata", None) or {}
        if not isinstance(metadata, Mapping):
            raise RequestError(f"must be a dict, not {type(metadata).__name__}", row=row, field="metadata")
        metadata = dict(metadata)
        for name in _DESCRIPTIVE:
            if (described := data.pop(name, None)) is not None:
                metadata[name] = described
        if not metadata.get("erase") and isinstance(extra, Mapping) and extra.get("erase"):
            metadata["erase"] = extra["erase"]
        if metadata.get("erase"):
            metadata["erase"] = _erased(metadata["erase"], row)
            data["target_new"] = data.get("target_new") or ERASED
        unknown = [name for name in data if name not in _FIELDS]
        if unknown:
            raise RequestError(
                f"unknown field.{nearest(str(unknown[0]), [*_FIELDS, *_ALIASES])}"
                " Put anything that is not part of the edit into 'metadata'.",
                row=row,
                field=str(unknown[0]),
            )
        if data.get("prompt") is None and data.get("messages") is None:
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
            "locality": probes_to_json(self.locality),
            "portability": probes_to_json(self.portability),
            "image": self.image,
            "metadata": self.metadata,
            **{name: value for name in _OPTIONAL if (value := getattr(self, name)) is not None},
        }

    def with_id(self, new_id: str) -> EditRequest:
        """Return a copy under another id; all else has been checked, and is shared."""
        copied = copy(self)
        copied.id = new_id
        return copied

    # ------------------------------------------------------------------ checks

    def _check_format(self) -> None:
        """Check format and messages, and let prompt and last message be the same."""
        if self.prompt_format is not None and self.prompt_format not in TEXT_FORMATS:
            self._fail(f"must be one of {', '.join(TEXT_FORMATS)}, not {shown(self.prompt_format)}", "prompt_format")
        if self.messages is None:
            return
        if self.prompt_format == "plain":
            self._fail("a request with messages is a chat; leave the messages out, or the format", "prompt_format")
        try:
            self.messages = read_messages(self.messages, self.prompt)
        except ValueError as error:
            self._fail(str(error), "messages")
        for message in self.messages[:-1]:
            self._check_text("messages", message["content"])
        self.prompt, self.prompt_format = self.messages[-1]["content"], self.prompt_format or "chat"

    def _fail(self, message: str, field_name: str) -> NoReturn:
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
                probes[str(axis)] = self._axis(f"{name}[{axis!r}]", entries)
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
            texts: list[Any] = [axis]
            for probe in entries:
                texts.append(probe.prompt)
                for group in probe.ground_truth:
                    texts += group
                if probe.image is not None:
                    texts.append(probe.image)
            if not _are_texts(texts):
                self._check_text(name, axis)
                for text in texts[1:]:
                    self._check_text(f"{name}[{axis!r}]", text)
        return {axis: entries for axis, entries in probes.items() if entries}

    def _axis(self, name: str, entries: Any) -> list[Probe]:
        if isinstance(entries, (list, Sequence)) and not isinstance(entries, str):
            return [Probe.from_value(entry, field_name=name, row=self.row) for entry in entries]
        if isinstance(entries, (Mapping, Probe)):
            prompts = entries.get("prompt") if isinstance(entries, Mapping) else None
            if isinstance(entries, Probe) or isinstance(prompts, str) or not isinstance(prompts, Sequence):
                return [Probe.from_value(entries, field_name=name, row=self.row)]
            answers = entries.get("ground_truth") or [None] * len(prompts)
            if not isinstance(answers, (list, tuple)) or len(answers) != len(prompts):
                self._fail("'prompt' and 'ground_truth' must be lists of the same length", name)
            pairs = [{"prompt": p, "ground_truth": answer} for p, answer in zip(prompts, answers, strict=True)]
            return [Probe.from_value(pair, field_name=name, row=self.row) for pair in pairs]
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
    "messages",
    "prompt_format",
)
_OPTIONAL = ("separator", "messages", "prompt_format")  # columns that only rows with a value have
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
    "erase",
    "extra",
)
KNOWN_FIELDS = frozenset({*_FIELDS, *_ALIASES, *_DESCRIPTIVE, "metadata"})
"""Everything that `EditRequest.from_dict` takes."""


_LISTS, _OBJECTS = ("ground_truth", "rephrase_prompts"), ("locality", "portability", "metadata", "extra", "messages")
_CELLS = (*_LISTS, *_OBJECTS)


def _are_texts(values: Sequence[Any]) -> bool:
    """Whether `EditRequest._check_text` lets all of them pass: asked of many at once, in a fraction of its time."""
    try:
        whole = "".join(values)
    except TypeError:
        return False
    return all(map(str.strip, values)) and "\x00" not in whole and is_writable(whole)


def _erased(value: Any, row: int | None) -> bool | list[str]:
    """``erase`` of a row: true, or the answers as a list."""
    answers = [value] if isinstance(value, str) else value
    if answers is True:
        return True
    if not isinstance(answers, list) or not all(isinstance(text, str) and text.strip() for text in answers):
        raise RequestError(f"must be true, or the answers that are to go, not {shown(value)}", row=row, field="erase")
    return answers


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
