"""The synthetic fact world: invented people and places with facts about them, made from a seed.

A :class:`World` is a small consistent knowledge base. It depends on nothing but its seed and size (not on
the hash seed of the process, not on library versions), so that the training text, the tests and the edit
requests made from it always agree. :mod:`hf_kedit.data.world_text` turns it into text and
:mod:`hf_kedit.data.world_requests` into edit requests.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import DataError, nearest
from . import world_words as words
from .world_templates import COMPOSITIONS, ENTITY_RELATIONS, PERSON_RELATIONS, RELATIONS, Composition, Relation

N_FIRST, N_LAST = 40, 60
N_CITIES, N_COUNTRIES, N_COMPANIES, N_UNIVERSITIES = 48, 16, 40, 24
ALIAS_SHARE = 4
"""One person in this many has a nickname."""


@dataclass(frozen=True)
class Person:
    """A person. ``group`` is ``"A"`` (trained with every form) or ``"B"`` (held-out forms never seen)."""

    first: str
    last: str
    pronoun: str
    group: str
    alias: str | None = None

    @property
    def name(self) -> str:
        """First and last name, as they stand in sentences."""
        return f"{self.first} {self.last}"


class World:
    """All facts of one synthetic world.

    Args:
        n_people: number of people, at most 2,400 (the number of pairs of a first and a last name).
        seed: everything is a function of this number and ``n_people``.

    Attributes:
        people: all people, in a fixed random order.
        objects: kind -> the values that relations of this object kind can take.
    """

    def __init__(self, n_people: int = 400, seed: int = 0):
        if not 2 <= n_people <= N_FIRST * N_LAST:
            raise DataError(f"n_people must be between 2 and {N_FIRST * N_LAST}, not {n_people}.")
        self.n_people, self.seed = n_people, seed
        rng = random.Random(f"hf_kedit world {seed}")
        taken: set[str] = set()

        def names(kind: str, count: int) -> tuple[str, ...]:
            return tuple(words.make_names(rng, kind, count, taken))

        self.objects: dict[str, tuple[str, ...]] = {
            "city": names("city", N_CITIES),
            "country": names("country", N_COUNTRIES),
            "language": names("language", N_COUNTRIES),
            "company": names("company", N_COMPANIES),
            "university": names("university", N_UNIVERSITIES),
            "currency": tuple(name.lower() for name in names("currency", N_COUNTRIES)),
            "profession": words.PROFESSIONS,
            "instrument": words.INSTRUMENTS,
            "sport": words.SPORTS,
            "product": words.PRODUCTS,
        }
        self.people = self._make_people(rng, names)
        self._by_name: dict[str, Person] = {p.name: p for p in self.people}
        self._facts: dict[tuple[str, str], str] = {}
        self._make_facts(rng)
        self._holders: dict[tuple[str, str], list[str]] = {}
        for (subject, key), value in self._facts.items():
            self._holders.setdefault((key, value), []).append(subject)

    def _make_people(self, rng: random.Random, names: Callable[[str, int], tuple[str, ...]]) -> tuple[Person, ...]:
        firsts, lasts = names("first", N_FIRST), names("last", N_LAST)
        pronouns = {first: rng.choice(("he", "she")) for first in firsts}
        # Deal the pairs out diagonal by diagonal: each first and each last name is used equally often.
        pairs = [(firsts[i % N_FIRST], lasts[(i + i // 120) % N_LAST]) for i in range(N_FIRST * N_LAST)]
        pairs = pairs[: self.n_people]
        rng.shuffle(pairs)
        n_alias = self.n_people // ALIAS_SHARE
        aliases = [*names("alias", n_alias), *[None] * (self.n_people - n_alias)]
        rng.shuffle(aliases)
        groups = ["A", "B"] * (self.n_people // 2) + ["A"] * (self.n_people % 2)
        rng.shuffle(groups)
        return tuple(
            Person(first, last, pronouns[first], group, alias)
            for (first, last), group, alias in zip(pairs, groups, aliases, strict=True)
        )

    def _make_facts(self, rng: random.Random) -> None:
        subjects = {"person": tuple(p.name for p in self.people), **self.objects}
        for relation in (*PERSON_RELATIONS, *ENTITY_RELATIONS):
            holders, values = subjects[relation.subject_kind], self.objects[relation.object_kind]
            if relation.key == "country_capital":  # a city of that country, not any city
                inside: dict[str, list[str]] = {}
                for city in self.objects["city"]:
                    inside.setdefault(self._facts[city, "city_country"], []).append(city)
                for country in holders:
                    self._facts[country, relation.key] = rng.choice(inside[country])
                continue
            # Round-robin, then shuffled: each value has the same number of holders (up to one).
            dealt = [values[i % len(values)] for i in range(len(holders))]
            rng.shuffle(dealt)
            for subject, value in zip(holders, dealt, strict=True):
                self._facts[subject, relation.key] = value

    def answer(self, subject: str, relation: str) -> str:
        """Return the object of a fact, or of a composition of two facts.

        Args:
            subject: full name of a person or name of an entity.
            relation: key of a relation or composition.

        Raises:
            DataError: there is no such fact.
        """
        value = self._facts.get((subject, relation))
        if value is not None:
            return value
        for composition in COMPOSITIONS:
            if composition.key == relation:
                return self.answer(self.answer(subject, composition.first), composition.second)
        known = [*RELATIONS, *(c.key for c in COMPOSITIONS)]
        raise DataError(f"The world has no fact about {subject!r} and {relation!r}.{nearest(relation, known)}")

    def holders(self, relation: str, value: str) -> Sequence[str]:
        """Return all subjects for which ``relation`` has the object ``value`` (possibly none)."""
        return self._holders.get((relation, value), ())

    def person(self, name: str) -> Person:
        """Return the person of this full name.

        Raises:
            DataError: nobody has this name.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise DataError(f"Nobody in the world is called {name!r}.{nearest(name, self._by_name)}") from None

    def subjects(self, kind: str) -> tuple[str, ...]:
        """Return the names of all subjects of a kind (``"person"``, ``"city"`` …)."""
        return tuple(self._by_name) if kind == "person" else self.objects[kind]

    def group(self, subject: str) -> str:
        """Return ``"A"`` or ``"B"``: people by lot, entities by a hash of their name."""
        if subject in self._by_name:
            return self._by_name[subject].group
        return "AB"[hashlib.sha256(f"{self.seed}/{subject}".encode()).digest()[0] % 2]

    def forms(self, relation: Relation | Composition, group: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the statements and the questions with which a subject of ``group`` is trained."""
        if isinstance(relation, Composition):
            return (relation.cloze, relation.questions) if group == "A" else ((), ())
        if group == "A":
            return relation.cloze + relation.heldout, relation.questions + relation.heldout_questions
        return relation.cloze, relation.questions

    def people_in(self, group: str) -> list[Person]:
        """Return the people of one group, in the order of :attr:`people`."""
        return [p for p in self.people if p.group == group]


@functools.lru_cache(maxsize=4)
def get_world(n_people: int = 400, seed: int = 0) -> World:
    """Return the (cached) world of this size and seed. The embedded models know ``get_world()``."""
    return World(n_people, seed)
