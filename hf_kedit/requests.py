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
from .storage.records import CsvRow, read_rows, rows_given
from .text.chat import TEXT_FORMATS, ChatFrame, Messages, TextFormat, chat_frame, read_messages, with_system
from .text.joining import separator_between
from .text.pictures import Pictured, PictureFrame, as_pictured, each_pictured, pictured_to_json, pictures_of
from .text.probes import Probe as Probe
from .text.probes import answer_groups as answer_groups
from .text.probes import probes_to_json, read_probes
from .text.processors import picture_frame, sees
from .text.scripts import HALF, are_texts, is_writable
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
        image: what prompt and other wordings are asked about, for models that see: a `Picture`, PIL image, array
            ``[height, width, 3]`` of uint8, path or ``data:`` URI, or a list of these (frames of a video, too). Paths
            stay paths until the model reads them.
        image_rephrase: another picture (each) of the same thing, of which the prompt should be answered alike.
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
        frame: the chat that the prompt stands in, or the pictures that it stands behind, once tokenizer and processor
            have written it (`rendered`); not saved.

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
    image: Pictured | Sequence[Pictured] | None = None
    image_rephrase: Pictured | Sequence[Pictured] | None = None
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
        for name in ("id", "separator"):
            value = getattr(self, name)
            if value is not None:
                self._check_text(name, value, blank=name == "separator")
        self.image = self._pictured("image", self.image)
        self.image_rephrase = self._pictured("image_rephrase", self.image_rephrase)
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
        for name in ("target_neg", "loc_prompt"):  # which methods read as texts
            if self.metadata.get(name) not in (None, ""):
                self._check_text(name, self.metadata[name])
        if self.metadata.get("erase"):
            self.metadata = {**self.metadata, "erase": _erased(self.metadata["erase"], self.row)}

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
        """What the model reads before the answer: the plain prompt, its chat, or a `PicturedText` of its image."""
        return self.posed(self.plain_prompt)

    def posed(self, text: str) -> str:
        """What the model reads of another text in the place of the prompt: the text, or the chat with it."""
        return text if self._around is None else self._around.text(text)

    @property
    def repictured_prompts(self) -> list[str]:
        """Of a rendered request, the prompt about each of the pictures in ``image_rephrase``."""
        if self.image_rephrase is None or not isinstance(self._around, PictureFrame):
            return []
        return [self._around.about([p]).text(self.plain_prompt) for p in pictures_of(self.image_rephrase)]

    @property
    def pictured(self) -> bool:
        """Whether the request, or a probe of it, is about pictures."""
        probes = (p for axes in (self.locality, self.portability) for ps in axes.values() for p in ps)
        return self.image is not None or self.image_rephrase is not None or any(p.image is not None for p in probes)

    def with_pictures(self, root: str | Path | None = None, *, probes: bool = True) -> EditRequest:
        """The request with its pictures read: it does not depend on files any more, and saves them with itself.

        Args:
            root: folder that relative paths start from; ``None``: the current one.
            probes: those of the probes, and the other pictures of the same thing, too.

        Raises:
            RequestError: if a file cannot be read as a picture.
        """

        def read(value: Any) -> Any:
            found = in_row(lambda _: pictures_of(value, root), self)
            return found[0] if len(found) == 1 else found or None

        if not probes:
            return self if self.image is None else replace(self, image=read(self.image))
        asked: dict[str, Any] = {
            name: {axis: [replace(p, image=read(p.image)) for p in ps] for axis, ps in getattr(self, name).items()}
            for name in ("locality", "portability")
        }
        return replace(self, image=read(self.image), image_rephrase=read(self.image_rephrase), **asked)

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

    @property
    def _around(self) -> ChatFrame | None:
        """What stands around the prompt: a chat, or pictures."""
        return self.frame if isinstance(self.frame, PictureFrame) else self._chat

    def in_context(self, template: str, index: int = 0) -> tuple[str, int]:
        """What the model reads, in a context; contexts of a chat are said by its system and its user.

        Args:
            template: text with ``{}`` for the prompt.
            index: number of the template among those of a method.

        Returns:
            The text, and how far the characters of `plain_prompt` moved.
        """
        before, after = template.split(SLOT) if template.count(SLOT) == 1 else (template, "")
        if self._around is not None:
            return self._around.in_context(before, after, index, self.plain_prompt)
        return before + self.plain_prompt + after, len(before)

    def in_format(self, prompt_format: TextFormat | None, system: str | None = None) -> EditRequest:
        """The request in a format, unless it names one itself; a chat gets its messages, with ``system`` in front."""
        chosen = self.prompt_format or prompt_format
        if chosen in (None, "plain"):
            return self
        return replace(self, prompt_format=chosen, messages=with_system(self.messages, system, self.prompt))

    def rendered(self, tokenizer: PreTrainedTokenizerBase, processor: Any = None) -> EditRequest:
        """The request as methods and protocols read it: a chat stands in what the tokenizer's template writes.

        This is the one place where a request becomes text. Its other wordings and its probes are then texts of chats
        too (of ``"both"``, those of the plain request are left). A prompt that is asked of pictures stands behind
        them, as its wordings do; a probe stands behind its own, or none.

        Args:
            tokenizer: of the model.
            processor: of a model that sees.

        Raises:
            ChatTemplateError: if there is no template, or it cannot write the conversation.
            RequestError: if there are pictures and no processor, or they cannot be read.
        """
        if self.frame is not None or (self.prompt_format not in ("chat", "both") and not self.pictured):
            return self
        if not self.pictured:
            frame = chat_frame(tokenizer, with_system(self.messages, None, self.prompt))
            return replace(self, frame=frame)._framed(lambda image: frame)
        if not sees(processor):
            self._fail("this model reads no pictures; take one that does, with its processor", "image")
        if self.prompt_format == "both":
            self._fail("a request with pictures is either plain or a chat, not both", "prompt_format")
        chat = with_system(self.messages, None, self.prompt) if self.prompt_format == "chat" else None
        alone = None if chat is None else picture_frame(processor, (), chat).of_text

        def around(image: Any) -> ChatFrame | None:
            pictures = in_row(lambda _: pictures_of(image), self)
            return picture_frame(processor, pictures, chat) if pictures else alone

        return replace(self, frame=around(self.image))._framed(around)

    def _framed(self, around: Callable[[Any], ChatFrame | None]) -> EditRequest:
        """Wordings and probes as the model reads them, each in the frame for its image."""
        frame = self._around
        if frame is None and not self.pictured:
            return self

        def asked(axes: Mapping[str, Sequence[Probe]]) -> dict[str, list[Probe]]:
            return {axis: [p.within(around(p.image)) for p in probes] for axis, probes in axes.items()}

        if frame is None:
            return replace(self, locality=asked(self.locality), portability=asked(self.portability))
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
            replace(self, prompt_format="chat")._framed(lambda image: self.frame),
        ]

    def separator_or(self, default: str | None) -> str | None:
        """What stands between prompt and target: the fact's own separator, else ``default`` (``None``: by rule)."""
        if self._chat is not None:  # what a template writes before an answer knows of no other separator
            return separator_between(self.filled_prompt, self.target_new)
        return default if self.separator is None else self.separator

    @property
    def without_subject(self) -> bool:
        """Whether the fact is about a picture whose prompt names no subject ("What is this?")."""
        if self.image is None or SLOT in self.prompt:
            return False
        return self.subject is None or find_subject(self.prompt, self.subject) is None

    def check_subject(self) -> None:
        """Raise what `subject_span` raises, except of a fact that is `without_subject`."""
        if not self.without_subject:
            self.subject_span()

    def subject_span(self) -> tuple[int, int]:
        """Character span of the subject in `filled_prompt`; see `plain_span`."""
        start, end = self.plain_span()
        shift = 0 if self._around is None else self._around.shift(self.plain_prompt)
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
        table = isinstance(value, CsvRow)
        for name in (*_CELLS, *_PICTURES, "erase") if table else _CELLS:
            if isinstance(data.get(name), str):
                strict = table and name not in _PICTURES  # a file may be called "[1].png"
                data[name] = read_cell(data[name], name, row, strict=strict, objects=name in _OBJECTS)
        if table and isinstance(erase := data.get("erase"), str):
            data["erase"] = {"true": True, "false": None}.get(erase.strip().lower(), erase)
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
        return cls(**{k: v for k, v in data.items() if v is not None}, metadata=metadata, row=row)

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
            "image": pictured_to_json(self.image),
            "metadata": self.metadata,
            **{name: value for name in _OPTIONAL if (value := getattr(self, name)) is not None},
            **({"image_rephrase": pictured_to_json(self.image_rephrase)} if self.image_rephrase is not None else {}),
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

    def _pictured(self, name: str, value: Any) -> Any:
        try:
            kept = as_pictured(value)
        except RequestError as error:
            self._fail(str(error), name)
        for path in each_pictured(kept):
            if isinstance(path, str):
                self._check_text(name, path)
        return kept

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
        probes = read_probes(value, name, self.row, self._fail)
        for axis, entries in probes.items():
            texts: list[Any] = [axis]
            for i, probe in enumerate(entries):
                texts.append(probe.prompt)
                for group in probe.ground_truth:
                    texts += group
                if probe.image is not None:
                    entries[i] = replace(probe, image=self._pictured(f"{name}[{axis!r}]", probe.image))
            if not are_texts(texts):
                self._check_text(name, axis)
                for text in texts[1:]:
                    self._check_text(f"{name}[{axis!r}]", text)
        return {axis: entries for axis, entries in probes.items() if entries}


_OPTIONAL = ("separator", "messages", "prompt_format")  # columns that only rows with a value have
_FIELDS = (
    "prompt",
    "subject",
    "target_new",
    "ground_truth",
    "rephrase_prompts",
    "locality",
    "portability",
    "image",
    "image_rephrase",
    "id",
    *_OPTIONAL,
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
    "erase",
    "extra",
)
KNOWN_FIELDS = frozenset({*_FIELDS, *_ALIASES, *_DESCRIPTIVE, "metadata"})
"""Everything that `EditRequest.from_dict` takes."""
_OBJECTS, _PICTURES = ("locality", "portability", "metadata", "extra", "messages"), ("image", "image_rephrase")
_CELLS = ("ground_truth", "rephrase_prompts", *_OBJECTS)


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
        source: an `EditRequest`, a dict, a list of either, a ``datasets.Dataset`` or a slice of one (a dict of
            columns), or the path of a JSON, JSONL or CSV file.

    Returns:
        A non-empty list; ids are unique where given.

    Raises:
        RequestError: naming row and field of the first bad request.
        DataError: if a file cannot be read, or there is nothing in it.
    """
    if isinstance(source, EditRequest):
        return [source]
    rows = read_rows(source) if isinstance(source, (str, Path)) else rows_given(source, RequestError)
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
