"""Facts of the real world that come with the package, as edit requests: ``load_edit_dataset("facts")``.

``facts.yaml`` holds, in our own words, some 470 facts that people agree on: per relation the wordings, as statements
and as questions, and a table subject → answer; besides, what follows from two facts, and other names. Every row is
a counterfactual edit: another object of the same relation becomes the answer.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, nearest
from ..requests import SLOT
from ..storage.parsing import parse_yaml
from .features import blank, probe
from .loading import register_dataset

_FILE = Path(__file__).with_suffix(".yaml")
ARTICLE = "the "
_PROBES_PER_AXIS = 3
VALIDATION_EVERY = 4
"""Of the facts of a relation, one in so many is in the split ``validation``."""


@dataclass(frozen=True)
class FactRelation:
    """A relation, how it is said and asked, and its facts.

    Args:
        subject: kind of the subjects, for people.
        object: kind of the objects.
        statements: texts with ``{}`` for the subject, which the object follows; the first is the prompt of edits.
        questions: the same as questions.
        facts: subject → object, both with their article if they have one.
    """

    subject: str
    object: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Chain:
    """A relation that follows from two others: ``second(first(subject))``."""

    first: str
    second: str
    statements: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Everything in ``facts.yaml``.

    Args:
        relations: key → relation.
        chains: what follows from two facts.
        aliases: object → other ways to say it.
        subject_aliases: subject → another name that means nothing else.
    """

    relations: Mapping[str, FactRelation]
    chains: tuple[Chain, ...]
    aliases: Mapping[str, Sequence[str]]
    subject_aliases: Mapping[str, str]

    def relation(self, key: str) -> FactRelation:
        """Return a relation.

        Raises:
            DataError: there is none of this name.
        """
        if key not in self.relations:
            raise DataError(f"The facts have no relation {key!r}.{nearest(key, self.relations)}")
        return self.relations[key]

    def answers(self, key: str, value: str) -> list[str]:
        """An object with everything else that counts as the same answer; of people, also the last name."""
        relation = self.relation(key)
        names = [value, *self.aliases.get(value, ())]
        last = value.rsplit(" ", 1)[-1]
        if relation.object == "person" and last not in names:
            names.append(last)
        return names

    def same(self, key: str, one: str, other: str) -> bool:
        """Whether two objects of a relation share a name, so that one would pass for the other."""
        return not {n.lower() for n in self.answers(key, one)}.isdisjoint(n.lower() for n in self.answers(key, other))


@functools.cache
def get_facts() -> Facts:
    """Read the packaged facts (once)."""
    content = parse_yaml(_FILE.read_bytes(), _FILE.name, DataError)
    relations = {
        key: FactRelation(
            entry["subject"], entry["object"], tuple(entry["statements"]), tuple(entry["questions"]), entry["facts"]
        )
        for key, entry in content["relations"].items()
    }
    chains = tuple(Chain(c["first"], c["second"], tuple(c["statements"])) for c in content["chains"])
    return Facts(relations, chains, content["aliases"], content["subject_aliases"])


def bare(name: str) -> str:
    """A name without its article: what is called the subject of an edit."""
    return name.removeprefix(ARTICLE)


def filled(template: str, name: str) -> str:
    """Write a subject into a template; its article is a capital at the beginning of a sentence."""
    if template.startswith(SLOT) and name.startswith(ARTICLE):
        name = name[0].upper() + name[1:]
    return template.replace(SLOT, name)


@register_dataset("facts", splits=("validation", "test"))
def load_facts(
    split: str,
    *,
    path: Path | None = None,
    seed: int | None = None,
    relation: str | None = None,
    apart: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one split.

    Relations take turns, so that the first rows are of all kinds and a batch has no two edits of one relation as
    long as there are others.

    Args:
        split: ``"validation"`` or ``"test"``.
        path: not used; the facts come with the package.
        seed: of the new objects and the probes; 0 by default.
        relation: only this one.
        apart: ask about others (locality) only what no row of the split edits, for edits in sequence.

    Raises:
        DataError: there is no such relation.
    """
    facts = get_facts()
    keys = list(facts.relations) if relation is None else [relation]
    chosen = {key: [name for i, name in enumerate(facts.relation(key).facts) if _split(i) == split] for key in keys}
    edited = {(key, name) for key, names in chosen.items() for name in names} if apart else set()
    number = 0
    for turn in range(max(len(names) for names in chosen.values())):
        for key, names in chosen.items():
            if turn < len(names):
                rng = random.Random(f"hf_kedit facts {key} {names[turn]} {seed or 0}")
                yield _row(facts, key, names[turn], rng, f"facts/{split}/{number}", edited)
                number += 1


def _split(position: int) -> str:
    return "validation" if position % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "test"


def _row(
    facts: Facts, key: str, name: str, rng: random.Random, row_id: str, edited: set[tuple[str, str]]
) -> dict[str, Any]:
    """The row that edits one fact; nothing is asked that is in ``edited``."""
    relation = facts.relations[key]
    truth = relation.facts[name]
    new = rng.choice([o for o in dict.fromkeys(relation.facts.values()) if not facts.same(key, o, truth)])
    prompt, *rephrased = [filled(template, name) for template in relation.statements]
    return blank(
        id=row_id,
        dataset="facts",
        prompt=prompt,
        subject=bare(name),
        target_new=new,
        ground_truth=facts.answers(key, truth),
        rephrase_prompts=rephrased,
        locality=_locality(facts, key, name, new, rng, edited),
        portability=_portability(facts, key, name, new),
        extra={"relation": key, "questions": [filled(template, name) for template in relation.questions]},
    )


def _locality(
    facts: Facts, key: str, name: str, new: str, rng: random.Random, edited: set[tuple[str, str]]
) -> list[dict[str, Any]]:
    """What must stay as it is. No answer passes for the new object, so that a leak always shows.

    The axes are those of the fact world: others with the old object, others with another one, other facts about the
    subject, and facts of other relations.
    """
    relation = facts.relations[key]
    asked: dict[str, list[tuple[str, str]]] = {a: [] for a in ("Neighborhood", "Other_Subjects", "Same_Subject")}
    for other, answer in relation.facts.items():
        if other != name and not facts.same(key, answer, new):
            asked["Neighborhood" if answer == relation.facts[name] else "Other_Subjects"].append((key, other))
    for second, known in facts.relations.items():
        if second != key and name in known.facts:
            asked["Same_Subject"].append((second, name))
    for k in facts.relations:
        other = rng.choice(list(facts.relations[k].facts))
        if k != key and other != name and not facts.same(k, facts.relations[k].facts[other], new):
            asked.setdefault("Entities", []).append((k, other))
    probes = []
    for axis, pool in asked.items():
        pool = [pair for pair in pool if pair not in edited]
        for k, other in rng.sample(pool, min(_PROBES_PER_AXIS, len(pool))):
            probes.append(_probe(facts, axis, k, facts.relations[k].statements[0], other))
    return probes


def _portability(facts: Facts, key: str, name: str, new: str) -> list[dict[str, Any]]:
    """What follows from the edit: chains whose conclusion is another one than before, and another name's answer."""
    truth, probes = facts.relations[key].facts[name], []
    for chain in facts.chains:
        second = facts.relations[chain.second].facts
        if chain.first == key and new in second and second.get(truth) != second[new]:
            probes += [
                probe("Reasoning", filled(form, name), [facts.answers(chain.second, second[new])])
                for form in chain.statements
            ]
    if name in facts.subject_aliases:
        prompt = filled(facts.relations[key].statements[0], facts.subject_aliases[name])
        probes.append(probe("Subject_Aliasing", prompt, [facts.answers(key, new)]))
    return probes


def _probe(facts: Facts, axis: str, key: str, template: str, name: str) -> dict[str, Any]:
    return probe(axis, filled(template, name), [facts.answers(key, facts.relations[key].facts[name])])
