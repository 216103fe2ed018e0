"""Which edit, if any, a prompt asks for: by the subject that it names, and by what it wants to know about it.

A prompt is taken to ask for an edited fact if

1. it names the edit's subject, or one of its other names, as words of their own; of names inside one another the
   longest counts. A prompt that names no subject is never claimed, whatever it resembles, and costs a look into a
   dictionary;
2. what it wants to know is nearer to the edit than to anything else that people ask. Both are compared with the
   subject taken out ("the mother tongue of it is"), as sentence vectors: the similarity to the edit's wordings has to
   exceed the largest similarity to `COMMON_RELATIONS`, without those that mean what the edit means, by more than
   ``-slack``.

3. it is a question at all: what it wants to know has at most `MOST_WORDS` words, and is not wholly unlike the edit
   (`UNRELATED`). Free text that happens to name a subject resembles no question, so that the edit is not much farther
   from it than all other relations are.

Before that, where a router has states to compare (of the model at the last token of a prompt, which hold subject *and*
relation in whatever words and under whatever name): the nearest edit claims a prompt whose state is like that of its
own prompt. Which models have such states has to be measured; those know wordings and names that no text tells.

The difference of two similarities needs no scale: a threshold high enough to keep out plain questions about other
facts of the same subject would keep out unusual wordings of the fact itself. `UNRELATED` is no such threshold, it lies
below both.

Of several edits that ask for the same prompt the most similar one wins, and of equals the latest. This module knows
no model and no method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..engine.nearest import Vectors
from ..text.relations import COMMON_RELATIONS
from ..text.subjects import last_user_turn
from .retrieval import words_of

Encoder = Callable[[Sequence[str]], torch.Tensor]
"""Texts → ``[n, d]`` fp32."""
BY_STATE = "state"
AKIN = 0.6
"""Similarity from which on one of `COMMON_RELATIONS` is taken to mean what an edit means."""
UNRELATED = 0.1
"""Similarity below which a prompt has nothing to do with an edit (found on CounterFact rows 100 to 199, whose other
wordings all lie above it, and on lines of WikiText that name a subject, which lie below)."""
SAME = 0.99
"""Similarity from which on two texts are the same to the encoder."""
MOST_WORDS = 32
"""Words, subject taken out, above which a prompt is a text and no question."""
_REMEMBERED = 4096
"""Prompts whose decision is kept."""
_SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|\n+")
_IT = "it"


@dataclass(frozen=True)
class Address:
    """What an edit answers to.

    Args:
        edit_id: of the edit.
        names: words of its subject and of the subject's other names, lower case.
        views: its wordings, with the subject taken out.
    """

    edit_id: str
    names: tuple[tuple[str, ...], ...]
    views: tuple[str, ...]

    @classmethod
    def of(cls, edit_id: str, prompts: Sequence[str], names: Sequence[str]) -> Address:
        """The address of an edit.

        Args:
            edit_id: of the edit.
            prompts: its wordings, each of which names the subject.
            names: the subject and its other names.
        """
        words = tuple(dict.fromkeys(tuple(found) for name in names if (found := words_of(name))))
        views = [asked_about(prompt, words) for prompt in prompts]
        return cls(edit_id, words, tuple(dict.fromkeys(view for view in views if view is not None)))


@dataclass(frozen=True)
class RouteCandidate:
    """How near a prompt is to an edit whose subject it names.

    Args:
        edit_id: of the edit.
        asked: what the prompt wants to know, with the subject taken out.
        similarity: to the nearest wording of the edit, a cosine.
        rival: what else people ask that the prompt is nearest to.
        rival_similarity: to it.
        claimed: whether the prompt counts as asking for the edit's fact.
        by: what was compared: ``"words"``, or ``"state"`` (to which there is no rival, but a least similarity).
        named: whether the prompt names the edit's subject.
        base: the method whose solution answers the prompt, if the edit claims it; set by those who know it.
    """

    edit_id: str
    asked: str
    similarity: float
    rival: str
    rival_similarity: float
    claimed: bool
    by: str = "words"
    named: bool = True
    base: str = ""

    @property
    def reason(self) -> str:
        """What was compared, in words."""
        if self.by == BY_STATE:
            least = f"{self.rival_similarity:.2f} is enough"
            return f"the model's state at its end is {self.similarity:.2f} like that at the edit's end ({least})"
        return (
            f"what is asked ({self.asked!r}) is {self.similarity:.2f} near to it, and {self.rival_similarity:.2f} to"
            f" {self.rival!r}"
        )


class EditRoute(NamedTuple):
    """The edit that claims a prompt.

    Attributes:
        place: of the edit, among the router's addresses.
        named: whether the prompt names its subject; else it was known by a state.
    """

    place: int
    named: bool


def is_claim(asked: str, similarity: float, rival_similarity: float, slack: float) -> bool:
    """Whether a prompt counts as asking for an edit; the names are those of `RouteCandidate`."""
    if asked == _IT:  # a heading: the name and nothing else asks for nothing, unless the edit's wording is the name
        return similarity > SAME
    return similarity - rival_similarity > -slack and similarity >= UNRELATED and len(asked.split()) <= MOST_WORDS


class _Index:
    """Addresses in order, where the wordings of each begin, and all names by their first word."""

    def __init__(self) -> None:
        self.addresses: list[Address] = []
        self.starts = [0]
        self.by_word: dict[str, list[tuple[tuple[str, ...], int]]] = {}

    @classmethod
    def of(cls, addresses: Sequence[Address]) -> _Index:
        made = cls()
        for address in addresses:
            made.append(address)
        return made

    def append(self, address: Address) -> None:
        for name in address.names:
            self.by_word.setdefault(name[0], []).append((name, len(self.addresses)))
        self.addresses.append(address)
        self.starts.append(self.starts[-1] + len(address.views))


class EditRouter:
    """Finds the edit that a prompt asks for; an immutable list of addresses that shares its memory with shorter ones.

    Args:
        encode: makes vectors of texts.
        slack: by how much a rival may be nearer than the edit. Larger claims more wordings, and more questions about
            other facts of the same subject.
        alike: least cosine of two states that ask for the same; ``None``: states are not compared.
    """

    def __init__(self, encode: Encoder, slack: float, alike: float | None = None):
        self.encode, self.slack, self.alike = encode, slack, alike
        self.size = 0
        self.states = Vectors(0)
        self.views = Vectors(0)
        self._index = _Index()
        self._known: dict[str, EditRoute | None] = {}
        self._relations: list[torch.Tensor] = []  # one, once it is needed; routers that come of another share it

    # ------------------------------------------------------------------ addresses

    def __len__(self) -> int:
        return self.size

    @property
    def addresses(self) -> list[Address]:
        """The addresses, oldest first."""
        return self._index.addresses[: self.size]

    def with_addresses(
        self, added: Sequence[Address], vectors: torch.Tensor | None = None, states: torch.Tensor | None = None
    ) -> EditRouter:
        """A router with more addresses behind those that it has.

        Args:
            added: the addresses.
            vectors: of their wordings, in order, ``[wordings, d]``; ``None``: they are made.
            states: at the last token of each one's own prompt, ``[added, d]``, where states are compared.
        """
        made = self.empty()
        if vectors is None:
            vectors = self.vectors_of(added)
        made.views = self.views if self.size else Vectors(vectors.shape[1])
        for row in vectors:
            made.views = made.views.with_row(row)
        if self.alike is not None and states is not None:
            made.states = self.states if self.size else Vectors(states.shape[1])
            for row in _units(states):
                made.states = made.states.with_row(row)
        # Appending in place costs nothing however many there are; only what branches off an earlier state is copied.
        made._index = self._index if self.size == len(self._index.addresses) else _Index.of(self.addresses)
        for address in added:
            made._index.append(address)
        made.size = self.size + len(added)
        return made

    def without(self, edit_ids: set[str]) -> EditRouter:
        """A router without the addresses of some edits."""
        addresses, starts = self.addresses, self._index.starts
        kept = [i for i, address in enumerate(addresses) if address.edit_id not in edit_ids]
        rows = [row for i in kept for row in range(starts[i], starts[i + 1])]
        states = None if self.alike is None else self.states.tensor[kept].clone()
        return self.empty().with_addresses([addresses[i] for i in kept], self.views.tensor[rows].clone(), states)

    def empty(self) -> EditRouter:
        """A router that decides likewise and has no addresses yet."""
        made = EditRouter(self.encode, self.slack, self.alike)
        made._relations = self._relations
        return made

    def vectors_of(self, addresses: Sequence[Address]) -> torch.Tensor:
        """Unit vectors of all wordings of some addresses, in order, ``[wordings, d]``."""
        return _units(self.encode([view for address in addresses for view in address.views]))

    # ------------------------------------------------------------------ routing

    def route(self, prompts: Sequence[str], read: Encoder | None = None) -> list[EditRoute | None]:
        """The edit that each prompt asks for, or ``None``.

        Args:
            prompts: texts.
            read: gives the model's states at the last tokens of some of them, where states are compared.
        """
        known, unknown = self._known, object()
        found: dict[str, Any] = {prompt: known.get(prompt, unknown) for prompt in prompts}
        new = [prompt for prompt, route in found.items() if route is unknown]
        found |= self._alike(new, read)
        asked = [prompt for prompt in new if found[prompt] is unknown]
        for prompt, candidates in zip(asked, self._candidates(asked), strict=True):
            claimed = [(c.similarity, place) for place, c in candidates.items() if c.claimed]
            found[prompt] = EditRoute(max(claimed)[1], named=True) if claimed else None
        if len(known) + len(new) > _REMEMBERED:  # several threads may be here: nothing is looked up twice above
            known.clear()
        known.update({prompt: found[prompt] for prompt in new})
        return [found[prompt] for prompt in prompts]

    def explain(self, prompt: str, read: Encoder | None = None) -> list[RouteCandidate]:
        """All edits whose subject a prompt names, the nearest first; before them one that its state is like."""
        (found,) = self._candidates([prompt])
        by_words = sorted(found.values(), key=lambda c: c.similarity, reverse=True)
        alike = [c for _, c in self._nearest([prompt], read) if c.claimed]
        if not alike:
            return by_words
        return alike + [replace(c, claimed=False) for c in by_words if c.edit_id != alike[0].edit_id]

    def _alike(self, prompts: Sequence[str], read: Encoder | None) -> dict[str, EditRoute]:
        """The edit that the state of each prompt is like; prompts without one are missing."""
        near = self._nearest(prompts, read)
        return {
            prompt: EditRoute(place, c.named) for prompt, (place, c) in zip(prompts, near, strict=False) if c.claimed
        }

    def _nearest(self, prompts: Sequence[str], read: Encoder | None) -> list[tuple[int, RouteCandidate]]:
        """The edit whose state each prompt's is nearest to, the latest of equals; nothing where none are compared."""
        if self.alike is None or read is None or not self.size or not prompts:
            return []
        best, places = (_units(read(prompts)) @ self.states.tensor.T).flip(1).max(dim=1)
        return [
            (place := self.size - 1 - int(back), self._by_state(place, prompt, float(near)))
            for prompt, near, back in zip(prompts, best, places, strict=True)
        ]

    def _by_state(self, place: int, prompt: str, near: float) -> RouteCandidate:
        assert self.alike is not None
        edit_id, claimed = self._index.addresses[place].edit_id, near >= self.alike
        named = claimed and place in self._named(prompt)  # looked up only where it matters
        return RouteCandidate(edit_id, prompt, near, "", self.alike, claimed, BY_STATE, named)

    def _candidates(self, prompts: Sequence[str]) -> list[dict[int, RouteCandidate]]:
        """For every prompt, the edits whose subject it names, by their places."""
        named = [self._named(prompt) for prompt in prompts]
        texts = list(dict.fromkeys(asked for found in named for asked in found.values()))
        if not texts:
            return [{} for _ in prompts]
        vectors = dict(zip(texts, _units(self.encode(texts)), strict=True))
        return [
            {place: self._candidate(place, asked, vectors[asked]) for place, asked in found.items()} for found in named
        ]

    def _candidate(self, place: int, asked: str, vector: torch.Tensor) -> RouteCandidate:
        if not self._relations:
            self._relations.append(_units(self.encode(COMMON_RELATIONS)))
        relations = self._relations[0]
        first, end = self._index.starts[place : place + 2]
        views = self.views.tensor[first:end]
        similarity = float((views @ vector).max())
        akin = (relations @ views.T).max(dim=1).values > AKIN
        rivals = (relations @ vector).masked_fill(akin, -1.0)
        rival, which = (float(x) for x in rivals.max(dim=0))
        return RouteCandidate(
            self._index.addresses[place].edit_id,
            asked,
            similarity,
            COMMON_RELATIONS[int(which)],
            rival,
            claimed=is_claim(asked, similarity, rival, self.slack),
        )

    def _named(self, prompt: str) -> dict[int, str]:
        """The edits whose subject a prompt names, and what it wants to know, with the subject taken out."""
        words = words_of(_turn(prompt))
        spans: dict[tuple[int, int], list[int]] = {}
        for start, word in enumerate(words):
            for name, place in self._index.by_word.get(word, ()):
                end = start + len(name)
                if place < self.size and tuple(words[start:end]) == name:
                    spans.setdefault((start, end), []).append(place)
        found: dict[int, str] = {}
        for start, end in spans:
            if any(a <= start and end <= b and (a, b) != (start, end) for a, b in spans):
                continue  # "York" in "New York"
            for place in spans[start, end]:
                asked = asked_about(prompt, self._index.addresses[place].names)
                if asked is not None:
                    found[place] = asked
        return found


def asked_about(prompt: str, names: Sequence[tuple[str, ...]]) -> str | None:
    """What a prompt wants to know: from the sentence in which the subject is last named to the end, subject taken out.

    Of a chat the user's last turn counts.

    Returns:
        Lower-case words with "it" for the subject; ``None`` if the prompt does not name it.
    """
    sentences = [words_of(sentence) for sentence in _SENTENCE.split(_turn(prompt))]
    for first in reversed(range(len(sentences))):
        words, hit = _replaced(sentences[first], names)
        if hit:
            return " ".join([*words, *(word for later in sentences[first + 1 :] for word in later)])
    words, hit = _replaced([word for sentence in sentences for word in sentence], names)
    return " ".join(words) if hit else None  # a name with a full stop in it


def _replaced(words: Sequence[str], names: Sequence[tuple[str, ...]]) -> tuple[list[str], bool]:
    """Words with "it" for every mention of a name, the longest first, and whether there was any."""
    ordered = sorted(names, key=len, reverse=True)
    out: list[str] = []
    place, hit = 0, False
    while place < len(words):
        name = next((n for n in ordered if tuple(words[place : place + len(n)]) == n), None)
        hit = hit or name is not None
        out.append(words[place] if name is None else _IT)
        place += 1 if name is None else len(name)
    return out, hit


def _turn(prompt: str) -> str:
    """What the user says last, or the whole prompt if it is no chat."""
    span = last_user_turn(prompt)
    return prompt if span is None else prompt[span[0] : span[1]]


def _units(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors.detach().float().cpu(), dim=-1)


def encoder_of_words(embedding: torch.Tensor, ids_of: Callable[[str], Sequence[int]]) -> Encoder:
    """An encoder that needs nothing but the model: the mean of the word vectors that its input layer holds.

    The mean of `COMMON_RELATIONS` is taken off, and with it what all questions have in common.

    Args:
        embedding: ``[vocabulary, d]``.
        ids_of: text → token ids.
    """

    def means(texts: Sequence[str]) -> torch.Tensor:
        return torch.stack([embedding[list(ids_of(f" {text}"))].float().mean(dim=0) for text in texts]).cpu()

    common: list[torch.Tensor] = []

    def encode(texts: Sequence[str]) -> torch.Tensor:
        if not common:
            common.append(means(COMMON_RELATIONS).mean(dim=0))
        return means(texts) - common[0]

    return encode
