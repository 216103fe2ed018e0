"""Facts to search with, and others to check with: those that the model knows, edited to something else.

Nothing has to be brought along. The model is asked which of the packaged facts it knows (a fact that it does not know
cannot be lost, and its neighbours tell nothing); every one comes with another object of the same relation, wordings,
neighbours and conclusions. What the search sees and what the check sees have no subject in common.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..data import load_edit_dataset
from ..data.general_probes import GENERAL_PROBES
from ..data.loading import requests_of
from ..data.world_text import filler_sentence
from ..errors import TuneError
from ..evaluation import known_facts
from ..logging import get_logger
from ..requests import EditRequest, Probe, RequestSource
from .logbook import Logbook, digest_of
from .scores import GENERAL

if TYPE_CHECKING:
    from ..model import EditableModel

logger = get_logger(__name__)
LEAST_FACTS = 4
"""Fewer facts on either side tell nothing."""
ASKED_AT_ONCE = 16
PACKAGED = ("facts", "world")
"""Data sets with counterfactual edits that come with the package: of the real world, and of the embedded models'."""
_GENERAL_PER_FACT = 10


@dataclass(frozen=True)
class ChosenFacts:
    """The facts of a search.

    Args:
        source: where they come from, for people.
        search: settings are chosen on these.
        held_out: and checked on these; no subject is in both.
        asked: so many facts the model was asked about.
        known: and knew so many.
    """

    source: str
    search: tuple[EditRequest, ...]
    held_out: tuple[EditRequest, ...]
    asked: int
    known: int


def choose_facts(
    model: EditableModel,
    facts: RequestSource | str | None,
    search: int,
    held_out: int,
    *,
    seed: int,
    logbook: Logbook,
    asked: Callable[[int], None] = lambda count: None,
) -> ChosenFacts:
    """Choose facts that the model knows.

    Args:
        model: without edits.
        facts: ``"facts"`` or ``"world"`` for packaged ones; ``None``: the first of them of which the model knows
            enough; otherwise requests, or a file of them, with ``ground_truth``.
        search: at most so many to search with.
        held_out: at most so many to check with.
        seed: of the choice, and of the new objects of packaged facts.
        logbook: what the model was asked before.
        asked: called with the number of facts that were asked about.

    Raises:
        TuneError: if it knows too few.
        DataError, RequestError: if the facts cannot be read.
    """
    names: Sequence[Any] = PACKAGED if facts is None else [facts]
    tried = []
    for name in names:
        asking = _Asking(model, logbook, asked)
        first, second = _pools(name, seed)
        chosen = _choose(asking, first, second, search, held_out)
        source = f"packaged {name}" if name in PACKAGED else "given facts"
        if min(map(len, chosen)) >= min(LEAST_FACTS, search, held_out):
            for part, wanted, what in zip(chosen, (search, held_out), ("search with", "check with"), strict=True):
                if len(part) < wanted:
                    logger.warning("the model knows only %d facts to %s, not %d", len(part), what, wanted)
            general = _general(name, seed)
            numbered = [[_with_general(r, i, general) for i, r in enumerate(part)] for part in chosen]
            return ChosenFacts(source, tuple(numbered[0]), tuple(numbered[1]), asking.count, asking.known)
        tried.append(f"{asking.known} of {asking.count} {source}")
    raise TuneError(
        f"the model knows too few facts to choose settings by ({', '.join(tried)}): at least {2 * LEAST_FACTS} about"
        " different subjects are needed. Give facts that it knows (facts=, --facts FILE), with ground_truth, wordings"
        " and neighbours"
    )


def _pools(source: Any, seed: int) -> tuple[list[EditRequest], list[EditRequest]]:
    """Facts for the search and for the check, in random order; the same ones where a source has no parts."""
    rng = random.Random(f"hf_kedit tuning {seed}")
    if source in PACKAGED:
        splits = [requests_of(load_edit_dataset(source, split=name, seed=seed)) for name in ("validation", "test")]
        return _shuffled(splits[0], rng), _shuffled(splits[1], rng)
    requests = requests_of(source)
    bare = next((r for r in requests if not r.ground_truth or r.subject is None), None)
    if bare is not None:
        raise TuneError(f"facts to tune with need a subject and an old answer (ground_truth): {bare.prompt!r}")
    mixed = _shuffled(requests, rng)
    return mixed, mixed


def _shuffled(requests: Sequence[EditRequest], rng: random.Random) -> list[EditRequest]:
    """In random order, those with conclusions first: the others have no portability, which is then known badly."""
    return sorted(rng.sample(list(requests), len(requests)), key=lambda request: not request.portability)


def _choose(
    asking: _Asking, first: list[EditRequest], second: list[EditRequest], search: int, held_out: int
) -> tuple[list[EditRequest], list[EditRequest]]:
    """Known facts of both pools, each subject once; shared out equally where there are too few."""
    taken: set[str] = set()
    for_search = asking.take(first, search, taken)
    for_check = asking.take(second, held_out, taken)
    for_search += asking.take(second, search - len(for_search), taken)
    if len(for_check) < min(LEAST_FACTS, held_out) < len(for_search):
        all_known = for_search + for_check
        for_search, for_check = all_known[::2], all_known[1::2]
    return for_search, for_check


class _Asking:
    """Asks the model about facts in the order in which they come, as many as are needed."""

    def __init__(self, model: EditableModel, logbook: Logbook, asked: Callable[[int], None]):
        self.model, self.logbook, self.told = model, logbook, asked
        self._known: dict[str, bool] = {}

    @property
    def count(self) -> int:
        """Facts that were asked about."""
        return len(self._known)

    @property
    def known(self) -> int:
        """Those of them that the model knows."""
        return sum(self._known.values())

    def take(self, pool: Sequence[EditRequest], wanted: int, taken: set[str]) -> list[EditRequest]:
        """The first known facts about subjects that are not in ``taken``, which they join."""
        chosen: list[EditRequest] = []
        for request, known in self._asked(pool, taken) if wanted > 0 else ():
            subject = str(request.subject).casefold()
            if known and subject not in taken:
                taken.add(subject)
                chosen.append(request)
            if len(chosen) == wanted:
                break
        return chosen

    def _asked(self, pool: Sequence[EditRequest], taken: set[str]) -> Iterator[tuple[EditRequest, bool]]:
        """The facts, each with whether the model knows it; asked about in chunks, when their turn comes."""
        for start in range(0, len(pool), ASKED_AT_ONCE):
            chunk = [r for r in pool[start : start + ASKED_AT_ONCE] if str(r.subject).casefold() not in taken]
            keys = {id(r): digest_of("known", r.filled_prompt, r.ground_truth) for r in chunk}
            new = [r for r in chunk if keys[id(r)] not in self.logbook]
            if new:
                for request, known in zip(new, known_facts(self.model.base_model, self._tokenizer, new), strict=True):
                    self.logbook.write(keys[id(request)], known, asked=request.filled_prompt)
            self._known |= {key: bool(self.logbook[key]) for key in keys.values()}
            self.told(len(new))
            yield from ((r, self._known[keys[id(r)]]) for r in chunk)

    @property
    def _tokenizer(self) -> Any:
        return self.model.tokenizer


def _general(source: Any, seed: int) -> Sequence[str]:
    """Beginnings of sentences about nothing in particular, in the language of the facts."""
    if source != "world":
        return GENERAL_PROBES
    rng = random.Random(f"hf_kedit tuning general {seed}")
    sentences = [filler_sentence(rng).split() for _ in range(len(GENERAL_PROBES))]
    return [" ".join(words[: len(words) // 2 + 1]) for words in sentences]


def _with_general(request: EditRequest, number: int, texts: Sequence[str]) -> EditRequest:
    """A fact with some of the general texts as probes; facts that follow one another ask different ones."""
    start = number * _GENERAL_PER_FACT
    chosen = [Probe(texts[(start + i) % len(texts)]) for i in range(min(_GENERAL_PER_FACT, len(texts)))]
    return replace(request, locality={**request.locality, GENERAL: chosen})
