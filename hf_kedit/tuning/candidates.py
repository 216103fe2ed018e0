"""Candidates: settings that are tried. The derived ones come first; the others change some of their fields."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

from ..config import EditConfig, ModelProfile
from ..errors import ConfigError
from .logbook import digest_of

_TRIES = 50
"""So many proposals in a row that are there already, and the space is taken to be exhausted."""
_MUTATED = 0.3
"""How often a crossed candidate gets a value that neither parent has."""


@dataclass(frozen=True)
class TuneCandidate:
    """Settings to try.

    Args:
        number: place in the order of invention; of equally good ones the first wins.
        config: complete.
        changes: field → value, of the fields that differ from the derived settings.
    """

    number: int
    config: EditConfig
    changes: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """Hash of the settings."""
        return digest_of(self.config.to_dict())


class Inventor:
    """Invents candidates, each only once. The same seed gives the same ones.

    Args:
        derived: the settings that the library derives for the model, complete.
        space: field → other values, the best guess first.
        profile: of the model.
        seed: of the random choices.
    """

    def __init__(self, derived: EditConfig, space: Mapping[str, Sequence[Any]], profile: ModelProfile, seed: int):
        self.derived, self.profile = derived, profile
        self.space = {field: list(values) for field, values in space.items() if values}
        self._random = random.Random(f"hf_kedit tuning candidates {seed}")
        self._numbers, self._known = count(), set[str]()

    def start(self, known: EditConfig | None = None) -> list[TuneCandidate]:
        """The derived settings, and others that are known already (a packaged file's)."""
        candidates = [self._enter(self.derived)]
        return [c for c in (*candidates, self._enter(known) if known is not None else None) if c is not None]

    def first(self, wanted: int) -> list[TuneCandidate]:
        """Candidates that change one field, the best guesses of all fields first, then some that change several."""
        turns = range(max(map(len, self.space.values()), default=0))
        single = iter([{f: values[i]} for i in turns for f, values in self.space.items() if i < len(values)])
        alone = self._invent(lambda: next(single, None), wanted - wanted // 3)
        return alone + self._invent(self._mixture, wanted - len(alone))

    def crossed(self, parents: Sequence[TuneCandidate], wanted: int) -> list[TuneCandidate]:
        """Candidates that take every field from one of some good ones, sometimes with something new."""
        return self._invent(lambda: self._cross(parents), wanted)

    def _mixture(self) -> dict[str, Any]:
        fields = self._random.sample(list(self.space), min(self._random.choice((2, 3)), len(self.space)))
        return {field: self._random.choice(self.space[field]) for field in fields}

    def _cross(self, parents: Sequence[TuneCandidate]) -> dict[str, Any]:
        one, other = self._random.choices(parents, k=2)
        changes = {}
        for field in dict.fromkeys((*one.changes, *other.changes)):
            parent = self._random.choice((one, other))
            if field in parent.changes:
                changes[field] = parent.changes[field]
        if self._random.random() < _MUTATED:
            field = self._random.choice(list(self.space))
            changes[field] = self._random.choice(self.space[field])
        return changes

    def _invent(self, propose: Any, wanted: int) -> list[TuneCandidate]:
        """Up to ``wanted`` new candidates from proposals; ``None`` ends them."""
        invented: list[TuneCandidate] = []
        tries = 0
        while len(invented) < wanted and tries < _TRIES and (changes := propose()) is not None:
            candidate = self._made(changes)
            tries = 0 if candidate else tries + 1
            invented += [candidate] if candidate else []
        return invented

    def _made(self, changes: Mapping[str, Any]) -> TuneCandidate | None:
        try:
            return self._enter(self.derived.changed(changes).complete(self.profile, files=False))
        except ConfigError:  # two values that do not go together
            return None

    def _enter(self, config: EditConfig) -> TuneCandidate | None:
        """Give a number to settings that are not there yet."""
        old, new = self.derived.to_dict(), config.to_dict()
        candidate = TuneCandidate(0, config, {k: v for k, v in new.items() if v != old[k]})
        if candidate.key in self._known:
            return None
        self._known.add(candidate.key)
        return TuneCandidate(next(self._numbers), config, candidate.changes)


def rungs(candidates: int, first_facts: int, all_facts: int) -> Iterator[tuple[int, int]]:
    """The rungs of successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943): on each, fewer settings are tried
    on more facts.

    Yields:
        Number of facts, and how many candidates go on to the next rung (one after the last).
    """
    facts, left = min(first_facts, all_facts), candidates
    while facts < all_facts and left > 1:
        left = max(2, -(-left // 3)) if left > 2 else left
        yield facts, left
        facts = min(2 * facts, all_facts)
    yield facts, 1
