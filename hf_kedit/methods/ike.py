"""IKE, ICE and PROMPT: an edit is a text in front of the question.

IKE (Zheng et al. 2023, "Can We Edit Factual Knowledge by In-Context Learning?", arXiv 2305.12740) shows the model a
few edits of other facts before the new one, so that it learns from them where a new fact counts and where not:

    copy     New Fact: {p} {t}    Prompt: {p} {t}                     the fact itself
    update   New Fact: {p} {t}    Prompt: {a paraphrase of p} {t}     what follows from it
    retain   New Fact: {p} {t}    Prompt: {another prompt} {its own answer}

ICE (Cohen et al. 2023) is the same without demonstrations (``k=0``), PROMPT a fact in front of the question in words
of one's own. Nothing in the model changes. Which prompts an edit is put in front of is looked up for every prompt; all
others are answered as ever.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt

from ..books.prefixed_rows import PrefixWriter
from ..books.prefixes import Prefix
from ..books.prompt_book import MOST_CHOICES, SAME_PICTURE, PromptEntry
from ..books.prompting import Prompter
from ..books.retrieval import LEXICAL, Passage, Remembering, Retriever, find_retriever
from ..config import EditConfig, ModelProfile
from ..data import load_edit_dataset
from ..data.demonstrations import language_of, packaged_demonstrations
from ..engine.examples import encode_examples, target_probabilities
from ..errors import ConfigError, DataError, UnsupportedModelError
from ..logging import get_logger, warn_once
from ..remote.model import RemoteModel
from ..requests import SLOT, EditRequest, in_row, load_requests
from ..text.pictures import PictureFrame, pictures_of
from ..text.processors import picture_frame, sees, takes_several
from ..tokens import as_ids, separator_between
from .base import BothFormats, Capabilities, Method, Outcome, Workbench, register_method

logger = get_logger(__name__)
BELIEVED = 0.5
"""A new answer less likely than this behind its fact is one that the model does not believe."""
ANY = -1.0
"""A similarity that every prompt reaches."""
_ROWS = 8
"""Edits that are measured in one forward; each is as long as its demonstrations."""
COPY, UPDATE, RETAIN = "copy", "update", "retain"
SHARES = {COPY: 4, UPDATE: 12, RETAIN: 16}
"""How often each kind occurs among 32 demonstrations, as published."""
FACT = "New Fact: {}\nPrompt: "


@dataclass
class InContextConfig(EditConfig):
    """Fields shared by the methods that put a text in front of prompts.

    Args:
        template: what stands in front of a prompt, with ``{}`` for the new fact.
        threshold: least similarity of a prompt that an edit is put in front of.
        image_threshold: least similarity of a prompt's picture with the edit's, if that is about one: the cosine of
            what the language model gets of both (`PromptBook`). 1 is the very picture.
    """

    template: str = FACT
    threshold: float = 0.5
    image_threshold: float = SAME_PICTURE

    def validate(self) -> None:
        """Check the template."""
        super().validate()
        if self.template.count(SLOT) != 1:
            raise ConfigError(f"{type(self).__name__}.template needs one {{}} for the new fact: {self.template!r}")
        if self.layers is not None:
            raise ConfigError(f"{type(self).__name__}.layers: edits in prompts have no layers")

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Which prompts an edit is put in front of; nothing else of a context is a number."""
        return {"threshold": [0.6, 0.7, 0.8, 0.4]}

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """None."""
        return ()


@dataclass
class PromptConfig(InContextConfig):
    """Hyperparameters of PROMPT; see `InContextConfig` for the others.

    Args:
        retriever: which prompts belong to an edit: ``"lexical"``, ``"model"`` or ``"model:<layer>"`` (the edited
            model's own states), the id of a sentence-transformers model, or a name given to `register_retriever`.
        scope: ``"retrieve"``: an edit is put in front of the prompts that are similar enough; ``"always"``: the most
            similar one in front of every prompt, as published evaluations do. Nothing is then left unchanged.
        select: the selection step of SCR (arXiv 2606.00570): of so many of the most similar edits (published: 5) the
            model itself picks the one that a prompt is about, or none; 0: the most similar one counts.
    """

    edit_type: ClassVar[str] = "prompt"

    retriever: str = LEXICAL
    scope: Literal["retrieve", "always"] = "retrieve"
    select: Annotated[int, Field(ge=0, le=MOST_CHOICES)] = 0


@dataclass
class IKEConfig(PromptConfig):
    """Hyperparameters of IKE.

    Args:
        demonstrations: where demonstrations come from: the name of a data set (its train split), the path of a file
            of requests, or a list of requests as dicts; ``None``: the packaged ones, Chinese for Chinese edits and
            English for others. Their texts are kept with the edits that use them.
        k: how many of them stand in front of an edit; 0 is ICE.
        order: ``"records"``: the k most similar records in the published shares of kinds, most similar last, then a
            copy of the edit itself; ``"sentences"``: the k most similar demonstrations of any kind, the most similar
            first.
    """

    edit_type: ClassVar[str] = "ike"

    demonstrations: str | list[dict[str, Any]] | None = None
    k: NonNegativeInt = 32
    order: Literal["records", "sentences"] = "records"

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """PROMPT's, and what is shown before."""
        return super().search_space(profile, traced) | {"k": [0, 8, 16], "order": ["sentences"]}


class InContext(Method):
    """A method that leaves the model as it is, and keeps texts in the prompt memory.

    A chat is looked up by what its user says last, and the text stands in front of that (`books.prompting`), so that
    an entry answers in both formats.
    """

    pictures = True
    config: InContextConfig
    both_formats: ClassVar[BothFormats | None] = "itself"

    def edited_modules(self) -> list[str]:
        """None."""
        return []

    def seen(self, entry: PromptEntry, request: EditRequest) -> PromptEntry:
        """An entry with what its request's picture looks like; as it is, if that has none."""
        if request.image is None:
            return entry
        look = self.bench.reader.look_of(request.filled_prompt)
        return replace(entry, look=look, image_threshold=self.config.image_threshold)

    def text(self, request: EditRequest) -> str:
        """What is put in front of the prompts that belong to a request."""
        return self.config.template.replace(SLOT, fact_of(request, self.config.separator))

    def reader(self, request: EditRequest) -> Any:
        """The model that reads this text."""
        return self.bench.model

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check that each text fits in front of its own prompt, which could not be asked otherwise."""
        super().check(requests)
        if not isinstance(self.bench.model, RemoteModel):  # whose context nobody knows
            check_room(self.bench, requests, self.text, self.config.separator, self.reader)


class _Prompting(InContext):
    """What IKE and PROMPT share: checks, and an entry in the prompt memory."""

    config: PromptConfig
    text_only: ClassVar[bool] = True

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check that the retriever is there."""
        super().check(requests)
        find_retriever(self.config.retriever, self.bench.own_retriever)
        if self.config.select and isinstance(self.bench.model, RemoteModel):
            raise UnsupportedModelError(
                "select asks for probabilities before every answer, which a model behind an API does not give"
            )

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """One entry per request."""
        entries = [self.seen(self.entry(request.asked("plain")), request) for request in requests]
        shown = [{"demonstrations": len(entry.demonstrations)} for entry in entries]
        if isinstance(self.bench.model, RemoteModel):  # asking for probabilities would cost two calls per fact
            return Outcome([], shown, entries=entries)
        before, after = self._probabilities(requests, entries)
        if min(after) < BELIEVED:
            warn_once(
                logger,
                f"behind its new fact the model gives an answer a probability under {BELIEVED}"
                " (target_probability_after in the edit's diagnostics): it does not believe its context; a method that"
                " changes the model itself may reach more",
            )
        diagnostics = [
            {**numbers, "target_probability_before": b, "target_probability_after": a}
            for numbers, b, a in zip(shown, before, after, strict=True)
        ]
        return Outcome([], diagnostics, entries=entries)

    def compute_apart(self, requests: Sequence[EditRequest]) -> list[Outcome]:
        """As `compute`: no entry knows of the others."""
        found = self.compute(requests)
        return [Outcome([], [d], [e]) for d, e in zip(found.diagnostics, found.entries, strict=True)]

    def _probabilities(
        self, requests: Sequence[EditRequest], entries: Sequence[PromptEntry]
    ) -> tuple[list[float], list[float]]:
        """Probability of each new answer (geometric mean per token) after the prompt alone, and behind the entry."""
        model, tokenizer, fill = self.bench.model, self.bench.tokenizer, self.bench.fill
        plain = encode_examples(model, tokenizer, requests, separator=self.config.separator)
        prompter = Prompter(model, lambda: tokenizer, lambda texts: [None] * len(texts))
        behind = []
        for example, entry in zip(plain, entries, strict=True):
            prefix = Prefix(entry.fact, entry.demonstrations, entry.nearest_last)
            ids, own = prompter.writer.with_prefix(example.ids, prefix, model, reserve=0)
            behind.append(replace(example, ids=as_ids(ids), positions=tuple(own[p] for p in example.positions)))
        return (
            target_probabilities(model, plain, fill, _ROWS),
            target_probabilities(model, behind, fill, _ROWS),
        )

    def entry(self, request: EditRequest) -> PromptEntry:
        """What the memory keeps of a request."""
        config = self.config
        return PromptEntry(
            scope=request.filled_prompt,
            subject=request.subject,
            fact=self.text(request),
            demonstrations=(),
            nearest_last=True,
            retriever=config.retriever,
            threshold=ANY if config.scope == "always" else config.threshold,
            select=config.select,
            statement=fact_of(request, config.separator) if config.select else "",
        )


@register_method
class Prompt(_Prompting):
    """PROMPT."""

    config_class = PromptConfig
    capabilities = Capabilities(
        name="PROMPT",
        kind="prompt",
        batch=True,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        paper="Cohen et al. 2023, arXiv 2307.12976",
        summary="puts the new fact in front of the prompts that it belongs to; the model stays as it is",
    )


@register_method
class IKE(_Prompting):
    """IKE."""

    config_class = IKEConfig
    capabilities = Capabilities(
        name="IKE",
        kind="prompt",
        batch=True,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        paper="Zheng et al. 2023, arXiv 2305.12740",
        summary="PROMPT behind demonstrations of other edits: what to copy, what to update, what to retain",
    )
    config: IKEConfig

    def fetch(self) -> None:
        """Demonstrations, and what compares them with edits."""
        if self.config.k:
            _ = self.retriever
            if self.config.demonstrations is not None:
                _ = self.pool

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check that the demonstrations can be read."""
        super().check(requests)
        if self.config.k and self.config.demonstrations is not None and not self.pool:
            raise ConfigError(
                "IKEConfig.demonstrations holds no requests; leave it out for the packaged ones, or set k=0"
            )

    def entry(self, request: EditRequest) -> PromptEntry:
        """The edit behind its demonstrations."""
        plain = super().entry(request)
        if not self.config.k:
            return plain
        retriever = self.retriever
        pool = self._pool_for(request)
        if any(isinstance(record.frame, PictureFrame) for record in pool):
            request = self._shown(request)
        separator = self.config.separator
        if self.config.order == "sentences":
            chosen = nearest_sentences(request, pool, retriever, self.config.k, separator)
            return replace(plain, demonstrations=tuple(chosen), nearest_last=False)
        chosen = nearest_records(request, pool, retriever, self.config.k, self.config.seed, separator)
        return replace(plain, demonstrations=tuple(chosen))

    def _pool_for(self, request: EditRequest) -> list[EditRequest]:
        """The requests that the demonstrations of an edit are chosen from."""
        if self.config.demonstrations is not None:
            others = [r for r in self.pool if (r.plain_prompt, r.image) != (request.plain_prompt, request.image)]
            # a question of text is not answered behind pictures
            return others if request.image is not None else [replace(r, image=None, frame=None) for r in others]
        # What comes unasked must not say something else about the subject of the edit.
        subject = (request.subject or request.filled_prompt).casefold()
        packaged = packaged_demonstrations(language_of(request.filled_prompt))
        return [r for r in packaged if not any(subject in text.casefold() for text in demonstrations_of(r).values())]

    @cached_property
    def retriever(self) -> Retriever:
        """What compares demonstrations with edits; the pool is embedded once."""
        return Remembering(find_retriever(self.config.retriever, self.bench.own_retriever))

    @cached_property
    def pool(self) -> list[EditRequest]:
        """The requests that the config's demonstrations are made of."""
        source = self.config.demonstrations
        assert source is not None
        if isinstance(source, str) and not os.path.isfile(source):
            try:
                source = load_edit_dataset(source, split="train", limit=_POOL)
            except DataError as error:
                raise ConfigError(f"IKEConfig.demonstrations: {source!r} is no file, and {error}") from error
        return [self._shown(request) for request in load_requests(source)]

    def _shown(self, request: EditRequest) -> EditRequest:
        """A record whose demonstrations stand behind its picture, where the model takes several; else text alone."""
        processor = self.bench.processor
        if request.image is None or not sees(processor) or not takes_several(processor):
            return replace(request, image=None) if request.image is not None else request
        read = request.with_pictures(probes=False)
        return replace(read, frame=picture_frame(processor, pictures_of(read.image)))


_POOL = 1000
"""Rows of a data set that demonstrations are chosen from."""


# ---------------------------------------------------------------------- texts


def answered(prompt: str, answer: str, separator: str | None = None) -> str:
    """A prompt with its answer; ``separator`` between them, ``None`` for the rule of `tokens.separator_between`."""
    return prompt + (separator_between(prompt, answer) if separator is None else separator) + answer


def fact_of(request: EditRequest, separator: str | None = None) -> str:
    """The new fact as a sentence: prompt and target."""
    return answered(request.plain_prompt, request.target_new, request.separator_or(separator))


def check_room(
    bench: Workbench,
    requests: Sequence[EditRequest],
    text: Callable[[EditRequest], str],
    separator: str | None = None,
    reader: Callable[[EditRequest], Any] | None = None,
) -> None:
    """Raise if what stands in front of an edit's prompts leaves no room for its own prompt and target.

    Args:
        bench: of the model.
        requests: the edits, as the model reads them.
        text: request (as a plain one) → what stands in front.
        separator: between prompt and target; ``None`` for the rule of `tokens.separator_between`.
        reader: request → the model that reads it; ``None``: the edited one.

    Raises:
        TargetTooLongError: naming the row.
    """
    writer = PrefixWriter(lambda: bench.tokenizer)

    def look(request: EditRequest) -> None:
        (example,) = encode_examples(bench.model, bench.tokenizer, [request], separator=separator)
        model = bench.model if reader is None else reader(request)
        writer.check_room(example.ids, text(request.asked("plain")), model)

    for request in requests:
        for form in request.formats():
            in_row(look, form)


def new_fact(request: EditRequest, separator: str | None = None) -> str:
    """The new fact in the published frame, up to where the prompt follows."""
    return FACT.replace(SLOT, fact_of(request, separator))


def demonstration(request: EditRequest, prompt: str, answer: str, separator: str | None = None) -> str:
    """One demonstration: the fact of a request, and how a prompt is answered after it; behind its picture, if any."""
    text = new_fact(request, separator) + answered(prompt, answer, request.separator_or(separator))
    return (request.frame.text(text) if isinstance(request.frame, PictureFrame) else text) + "\n\n"


def demonstrations_of(request: EditRequest, separator: str | None = None) -> dict[str, str]:
    """The demonstrations that a request can give, by kind: copy, and update and retain where it has the prompts."""
    demonstrations = {COPY: demonstration(request, request.plain_prompt, request.target_new, separator)}
    if request.rephrase_prompts:
        demonstrations[UPDATE] = demonstration(request, request.rephrase_prompts[0], request.target_new, separator)
    for probe in (p for probes in request.locality.values() for p in probes):
        if probe.answers and probe.image in (None, request.image):  # there is no other picture to ask about
            demonstrations[RETAIN] = demonstration(request, probe.prompt, probe.answers[0], separator)
            break
    return demonstrations


def nearest_sentences(
    request: EditRequest, pool: Sequence[EditRequest], retriever: Retriever, k: int, separator: str | None = None
) -> list[str]:
    """The k demonstrations most similar to the edit, most similar first."""
    sentences = [text for record in pool for text in demonstrations_of(record, separator).values()]
    query = new_fact(request, separator) + request.plain_prompt + "\n\n"
    return [sentences[i] for i in _nearest(query, sentences, retriever, k)]


def nearest_records(
    request: EditRequest,
    pool: Sequence[EditRequest],
    retriever: Retriever,
    k: int,
    seed: int,
    separator: str | None = None,
) -> list[str]:
    """One demonstration of each of the k most similar records, most similar last, then a copy of the edit itself.

    The kinds are dealt out at random in the published shares; a record that lacks the prompt of its kind gives a copy.
    """
    query = new_fact(request, separator) + request.plain_prompt
    order = _nearest(query, [fact_of(record, separator) for record in pool], retriever, k)
    return arrange([pool[i] for i in order], deal_kinds(len(order), seed), request, separator)


def deal_kinds(count: int, seed: int) -> list[str]:
    """Kinds of ``count`` demonstrations in the published shares, shuffled."""
    whole = sum(SHARES.values())
    cards = [kind for kind, share in SHARES.items() for _ in range(-(-share * count // whole))]
    drawn = random.Random(seed)
    drawn.shuffle(cards)
    return cards[:count]


def arrange(
    records: Sequence[EditRequest], kinds: Sequence[str], request: EditRequest, separator: str | None = None
) -> list[str]:
    """Demonstrations of records, given most similar first, in the order of the prompt, and a copy of the edit."""
    chosen = []
    for record, kind in zip(records, kinds, strict=True):
        texts = demonstrations_of(record, separator)
        chosen.append(texts.get(kind, texts[COPY]))
    return [*reversed(chosen), demonstrations_of(request, separator)[COPY]]


def _nearest(query: str, texts: Sequence[str], retriever: Retriever, k: int) -> list[int]:
    """Indices of the k texts most similar to a query, most similar first; of equal ones the earlier first."""
    if not texts:
        return []
    scores = retriever.similarity([query], [Passage(text) for text in texts], None)[0]
    return torch.sort(scores, descending=True, stable=True).indices[:k].tolist()


def build_prompt(
    request: EditRequest, query: str, demonstrations: Sequence[str] = (), separator: str | None = None
) -> str:
    """The text that a model (an API's, for instance) has to be asked to answer ``query`` under an edit.

    Args:
        request: the edit.
        query: the question.
        demonstrations: in order; `nearest_records` and `nearest_sentences` choose them.
        separator: between prompt and target; ``None`` for the rule of `tokens.separator_between`.
    """
    return "".join(demonstrations) + new_fact(request, separator) + query
