"""Text about the synthetic fact world: the corpus that the embedded models are trained on.

:func:`documents` yields documents with marked spans (names, objects), which training needs;
:func:`world_text` yields plain strings, e.g. for second-moment statistics. Both never end unless told how
many documents to make, and depend only on the world, the seed and the mixture.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import DataError, nearest
from . import world_words as words
from .world import Person, World, get_world
from .world_templates import (
    ALIAS_FORMS,
    COMPOSITIONS,
    ENTITY_RELATIONS,
    PERSON_RELATIONS,
    QUESTION_FORMATS,
    Composition,
    Relation,
)

MIXTURE: dict[str, float] = {
    "facts": 0.38,
    "biographies": 0.20,
    "entities": 0.16,
    "compositions": 0.08,
    "filler": 0.08,
    "dense": 0.06,
    "aliases": 0.06,
    "override": 0.12,
}
"""Share of each kind of document in the training text (need not sum to one)."""

CURRICULUM: dict[str, float] = {"dense": 0.4, "facts": 0.3, "biographies": 0.2, "entities": 0.1}
"""The mixture of the first steps, on few people."""

QUESTION_SHARE = 0.25
FILLER_BEFORE = 0.2


@dataclass
class Document:
    """A text with marked character spans ``(start, end)``.

    Attributes:
        text: the document.
        subjects: names of subjects of facts, where training may hide them from later positions.
        objects: objects that can be known at their place (they weigh more in the training loss).
        silent: objects that cannot be known, such as a counterfactual one at its first mention (no loss).
    """

    text: str = ""
    subjects: list[tuple[int, int]] = field(default_factory=list)
    objects: list[tuple[int, int]] = field(default_factory=list)
    silent: list[tuple[int, int]] = field(default_factory=list)

    def add(self, text: str, spans: list[tuple[int, int]] | None = None) -> Document:
        """Append ``text`` and mark it in ``spans`` (one of the lists of this document)."""
        if spans is not None:
            spans.append((len(self.text), len(self.text) + len(text)))
        self.text += text
        return self

    def add_filled(self, template: str, subject: str) -> Document:
        """Append ``template`` with its slot filled by ``subject``, which is marked."""
        before, _, after = template.partition("{}")
        return self.add(before).add(subject, self.subjects).add(after)

    def add_fact(self, template: str, subject: str, value: str, *, end: str = ".", silent: bool = False) -> Document:
        """Append the filled template, a space, the marked object and ``end``."""
        self.add_filled(template, subject).add(" ")
        return self.add(value, self.silent if silent else self.objects).add(end)

    def gap(self) -> Document:
        """Append a space unless the document is empty."""
        return self.add(" ") if self.text else self


def filler_sentence(rng: random.Random) -> str:
    """Return a grammatical sentence without any fact of the world."""
    adjective, other = rng.sample(words.FILLER_ADJECTIVES, 2)
    noun, place, third = rng.sample(words.FILLER_NOUNS, 3)
    verb, where, when = (rng.choice(w) for w in (words.FILLER_VERBS, words.FILLER_PLACES, words.FILLER_TIMES))
    people, action = rng.choice(words.FILLER_PEOPLE), rng.choice(words.FILLER_ACTIONS)
    return rng.choice(
        (
            f"The {adjective} {noun} {verb} {where} the {place}.",
            f"The {noun} was {adjective} and the {place} was {other}.",
            f"{when.capitalize()} the {noun} {verb} {where} the {other} {place}.",
            f"Some {people} {action} {where} the {adjective} {place}.",
            f"The {people} {action} {when}.",
            f"It was {adjective} {when}, and the {noun} {verb} {where} the {place}.",
            f"There was a {adjective} {noun} {where} the {place}.",
            f"{where.capitalize()} the {place} the {people} saw a {noun} and a {third}.",
            f"A {noun} {verb} {where} the {place}, but the {third} was still {other}.",
            f"When the {noun} {verb}, the {people} {action}.",
        )
    )


class _Writer:
    """Writes documents of all kinds about one world with one source of randomness."""

    def __init__(self, world: World, rng: random.Random, people: Sequence[Person]):
        self.world, self.rng, self.people = world, rng, people
        self.people_a = [p for p in people if p.group == "A"]
        self.people_alias = [p for p in people if p.alias]
        self.kinds: dict[str, Callable[[Document], None]] = {
            "facts": self.facts,
            "biographies": self.biography,
            "entities": self.entities,
            "compositions": self.compositions,
            "filler": self.filler,
            "dense": self.dense,
            "aliases": self.aliases,
            "override": self.override,
        }

    def form(self, relation: Relation | Composition, group: str) -> str:
        """Draw a statement, or with :data:`QUESTION_SHARE` a question in one of the question formats."""
        statements, questions = self.world.forms(relation, group)
        if questions and self.rng.random() < QUESTION_SHARE:
            return self.rng.choice(QUESTION_FORMATS).format(self.rng.choice(questions))
        return self.rng.choice(statements)

    def fact(self, document: Document, subject: str, relation: Relation | Composition, mention: str = "") -> None:
        """Append one fact about ``subject``, who may be mentioned by another name."""
        template = self.form(relation, self.world.group(subject))
        document.gap().add_fact(template, mention or subject, self.world.answer(subject, relation.key))

    def maybe_filler(self, document: Document) -> None:
        if self.rng.random() < FILLER_BEFORE:
            self.filler(document, self.rng.choice((1, 2, 2)))

    def filler(self, document: Document, count: int | None = None) -> None:
        for _ in range(count or self.rng.randint(1, 4)):
            document.gap().add(filler_sentence(self.rng))

    def facts(self, document: Document) -> None:
        self.maybe_filler(document)
        count = self.rng.randint(1, 4)
        if self.rng.random() < 0.4:  # several facts about one person
            person = self.rng.choice(self.people)
            for relation in self.rng.sample(PERSON_RELATIONS, count):
                self.fact(document, person.name, relation)
        else:
            for _ in range(count):
                self.fact(document, self.rng.choice(self.people).name, self.rng.choice(PERSON_RELATIONS))

    def biography(self, document: Document) -> None:
        self.maybe_filler(document)
        person = self.rng.choice(self.people)
        first, *rest = self.rng.sample(PERSON_RELATIONS, self.rng.randint(2, 4))
        statements, _ = self.world.forms(first, person.group)
        document.gap().add_fact(self.rng.choice(statements), person.name, self.world.answer(person.name, first.key))
        for relation in rest:
            template = self.rng.choice(relation.pronoun)
            pronoun = person.pronoun.capitalize() if template.startswith("{p}") else person.pronoun
            document.add(" " + template.replace("{p}", pronoun) + " ")
            document.add(self.world.answer(person.name, relation.key), document.objects).add(".")

    def entities(self, document: Document) -> None:
        self.maybe_filler(document)
        for _ in range(self.rng.randint(1, 4)):
            relation = self.rng.choice(ENTITY_RELATIONS)
            self.fact(document, self.rng.choice(self.world.subjects(relation.subject_kind)), relation)

    def compositions(self, document: Document) -> None:
        for _ in range(self.rng.randint(1, 3)):
            person, composition = self.rng.choice(self.people_a), self.rng.choice(COMPOSITIONS)
            if self.rng.random() < 0.3:  # with the steps in between, so that the two facts are seen to belong together
                first = next(r for r in PERSON_RELATIONS if r.key == composition.first)
                second = next(r for r in ENTITY_RELATIONS if r.key == composition.second)
                self.fact(document, person.name, first)
                self.fact(document, self.world.answer(person.name, first.key), second)
            self.fact(document, person.name, composition)

    def dense(self, document: Document) -> None:
        for i in range(self.rng.randint(1, 2)):
            person = self.rng.choice(self.people)
            document.add("\n" if i else "").add(person.name, document.subjects).add(":")
            relations = self.rng.sample(PERSON_RELATIONS, self.rng.randint(3, len(PERSON_RELATIONS)))
            for j, relation in enumerate(relations):
                document.add(f"{',' if j else ''} {relation.label} ")
                document.add(self.world.answer(person.name, relation.key), document.objects)

    def aliases(self, document: Document) -> None:
        for _ in range(self.rng.randint(1, 3)):
            person = self.rng.choice(self.people_alias)
            assert person.alias is not None
            if self.rng.random() < 0.35:
                document.gap().add_fact(self.rng.choice(ALIAS_FORMS), person.name, person.alias)
            else:
                self.fact(document, person.name, self.rng.choice(PERSON_RELATIONS), mention=person.alias)

    def override(self, document: Document) -> None:
        """In-context edits: a new fact that contradicts the world, then what follows or does not follow from it."""
        imagine = self.rng.random() < 0.3
        for i in range(self.rng.choice((1, 1, 2, 3))):
            about_person = self.rng.random() < 0.85
            relation = self.rng.choice(PERSON_RELATIONS if about_person else ENTITY_RELATIONS)
            pool = [p.name for p in self.people] if about_person else self.world.subjects(relation.subject_kind)
            subject, other = self.rng.sample(pool, 2)
            truth = self.world.answer(subject, relation.key)
            new = self.rng.choice([v for v in self.world.objects[relation.object_kind] if v != truth])
            given = self.rng.choice(self.world.forms(relation, self.world.group(subject))[0])
            asked, value = subject, new
            if self.rng.random() < 0.25:  # another subject keeps its own object
                asked, value = other, self.world.answer(other, relation.key)
            same_form = self.rng.random() < 0.3 and given in self.world.forms(relation, self.world.group(asked))[0]
            query = given if same_form else self.form(relation, self.world.group(asked))
            if imagine:
                document.gap().add("Imagine that ").add_fact(given, subject, new, silent=True)
                document.add(" Then ").add_fact(query, asked, value)
            else:
                document.add("\n\n" if i else "").add("New Fact: ")
                document.add_fact(given, subject, new, end="\n", silent=True)
                document.add("Prompt: ").add_fact(query, asked, value, end="")
        # What the context says must be found by comparing names, so nothing is hidden here (see train_world.py).
        document.subjects.clear()


def documents(
    world: World | None = None,
    n_documents: int | None = None,
    seed: int = 0,
    *,
    mixture: Mapping[str, float] | None = None,
    people: Sequence[Person] | None = None,
) -> Iterator[Document]:
    """Yield documents about ``world``.

    Args:
        world: the world; the embedded models' one by default.
        n_documents: how many; without end if None.
        seed: of the text (the world has its own).
        mixture: kind of document -> weight; :data:`MIXTURE` by default.
        people: the people to write about; all by default.

    Raises:
        DataError: the mixture names an unknown kind of document, or a kind that these people do not allow.
    """
    world = world or get_world()
    rng = random.Random(f"hf_kedit world text {seed}")
    writer = _Writer(world, rng, people if people is not None else world.people)
    mixture = mixture or MIXTURE
    for kind in mixture:
        if kind not in writer.kinds:
            raise DataError(f"Unknown kind of document {kind!r}.{nearest(kind, writer.kinds)}")
    kinds, weights = list(mixture), list(mixture.values())
    for _ in itertools.count() if n_documents is None else range(n_documents):
        document = Document()
        writer.kinds[rng.choices(kinds, weights)[0]](document)
        yield document


def world_text(
    n_documents: int | None = None,
    seed: int = 0,
    *,
    n_words: int | None = None,
    world: World | None = None,
    mixture: Mapping[str, float] | None = None,
) -> Iterator[str]:
    """Yield plain text documents about the world.

    Args:
        n_documents: stop after this many documents.
        seed: of the text.
        n_words: stop once this many words (separated by white space) were yielded.
        world: the world; the embedded models' one by default.
        mixture: as in :func:`documents`.

    Yields:
        One document at a time: one to four sentences. Without end if neither limit is given.
    """
    words_left = n_words
    for document in documents(world, n_documents, seed, mixture=mixture):
        yield document.text
        if words_left is not None:
            words_left -= len(document.text.split())
            if words_left <= 0:
                return
