"""ConflictEdit and RoundEdit (Li et al., 2024, arXiv 2310.02129): two edits of which the second concerns the first.

On disk, ConflictEdit: a JSON list per type, ``coverage``, ``reverse`` and ``composite``::

    [{"rule": "P22>P40", "type": "reverse", "prerequisites": [],
      "triples": [{"relation": {"id": "P22", "prompt": "The father of {} is", "query": "…", "label": "father"},
                   "subject": {"id": "Q1", "label": "Ada Bell"}, "object": {"id": "Q2", "label": "Jan Bell"}}, …],
      "edits": [{"relation": {…}, "subject": {…}, "object": {…}, "new_object": {"id": "Q3", "label": "Piet Mol"}}, …]}]

A record has two edits, made one after the other. What the second says contradicts the first:

- coverage: both say something else of the same subject and relation;
- reverse: the second turns the relation round, so that the first one's subject is no longer right;
- composite: with a third fact (``triples[prerequisites[0]]``) the second implies another object for the first.

RoundEdit: a JSON list per part, ``easy`` and ``hard``. The first edit puts a new object in the place of one of several
true ones, the second puts it back::

    [{"type": "1-3@P276", "edit": {"relation": {…}, "subject": {…}, "new_object": {…}, "object": {…}},
      "true_objects": [{"id": "Q49", "label": "North Island"}, …]}]

Both become two rows of one group; the probes are on the last one, ``Conflict`` (what holds after both) and
``Tied_Fact``, or ``True_Objects`` (the other true ones). A second file has further prompts of every relation,
``{"P22": ["{} was fathered by", …]}``: pass it as ``prompts=``; published figures are means over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from ..storage.records import read_object
from .loading import register_records
from .normalise import RawRow, Record, fill_slots, make_probe, make_row
from .sources import Source

CONFLICT, TIED_FACT, TRUE_OBJECTS = "Conflict", "Tied_Fact", "True_Objects"
CONFLICT_TYPES = ("coverage", "reverse", "composite")
ROUND_PARTS = ("easy", "hard")
_PUBLISHED = "https://github.com/zjunlp/PitfallsKnowledgeEditing (data/GPT-J/ or data/GPT2-XL/)"


class _Fact(NamedTuple):
    """A relation of a subject, and the objects that a record gives it.

    Attributes:
        relation: its id.
        templates: prompts with a slot for the subject, the relation's own first.
        subject: label.
        true: label of the object.
        new: label of the object that takes its place; ``None`` in facts that are not edited.
    """

    relation: str
    templates: list[str]
    subject: str
    true: str
    new: str | None

    def prompts(self, subject: str | None = None) -> list[str]:
        """All prompts about the subject, or about another one."""
        return [fill_slots(template, subject or self.subject) for template in self.templates]


def _source(file: str) -> Source:
    return Source({"test": (file,)}, published=_PUBLISHED, licence="none is stated")


def _fact(record: Record, prompts: Mapping[str, list[str]]) -> _Fact:
    relation = record.child("relation")
    number, own = relation.need("id"), relation.need("prompt")
    new = record.child("new_object").need("label").strip() if "new_object" in record else None
    subject, true = (record.child(name).need("label").strip() for name in ("subject", "object"))
    return _Fact(number, list(dict.fromkeys([own, *prompts.get(number, [])])), subject, true, new)


def _prompts(given: str | Path | Mapping[str, list[str]] | None) -> Mapping[str, list[str]]:
    """The prompts of relations.

    Raises:
        DataError: they are no mapping of lists of prompts, each with a slot.
    """
    found: Any = {} if given is None else given
    if isinstance(found, (str, Path)):
        found = read_object(str(found))
    if not isinstance(found, Mapping) or not all(
        isinstance(own, list) and all(isinstance(prompt, str) and prompt.count("{}") == 1 for prompt in own)
        for own in found.values()
    ):
        raise DataError("prompts must be {relation: [prompts with one {} each]}, or the path of such a JSON file.")
    return found


def _row(record: Record, dataset: str, fact: _Fact, index: int, target: str, old: str, **columns: Any) -> RawRow:
    """The row of one of the two edits of a record."""
    first, *others = fact.prompts()
    extra = {"relation_id": fact.relation, "templates": fact.templates, **columns.pop("extra", {})}
    row = make_row(
        record, dataset, first, suffix=f".{index}", task="fact", subject=fact.subject, target_new=target,
        ground_truth=[old], rephrase_prompts=others, extra=extra, **columns,
    )  # fmt: skip
    row.update(group_id=f"{dataset}/{record.number}", group_index=index, group_size=2)
    return row


def _probes(record: Record, axis: str, prompts: list[str], answers: list[list[str]]) -> list[RawRow]:
    return [probe for prompt in prompts for probe in make_probe(record, axis, prompt, answers)]


@register_records({f"conflictedit/{kind}": _source(f"{kind}_edit.json") for kind in CONFLICT_TYPES})
def conflict_rows(
    record: Record,
    *,
    dataset: str,
    split: str,
    seed: int | None = None,
    prompts: str | Path | Mapping[str, list[str]] | None = None,
) -> Iterator[RawRow]:
    """Yield the two edits of one record of ConflictEdit.

    Args:
        record: as in the module's example.
        dataset: registered name.
        split: not used; there is one.
        seed: not used; nothing is drawn.
        prompts: further prompts of every relation (``conflict_prompts.json``).

    Raises:
        DataError: ``prompts`` are none.
    """
    known = _prompts(prompts)
    kind, edits, triples = record.text("type"), record.children("edits"), record.children("triples")
    if kind not in CONFLICT_TYPES:
        raise record.fail(f"must be one of {', '.join(CONFLICT_TYPES)}", "type")
    if len(edits) != 2:
        raise record.fail("must have two edits", "edits")
    first, second = (_fact(edit, known) for edit in edits)
    if first.new is None or second.new is None:
        raise record.fail("each needs a new_object", "edits")
    holds = (second.new, first.prompts())  # coverage has the same prompts in both, composite implies it of the first
    if kind == "reverse":
        holds = (first.new, first.prompts(second.new))
    tied: list[RawRow] = []
    places = record.items("prerequisites")
    if kind == "composite":
        if not places or not isinstance(places[0], int) or not 0 <= places[0] < len(triples):
            raise record.fail("must name one of the triples", "prerequisites")
        fact = _fact(triples[places[0]], known)
        tied = _probes(record, TIED_FACT, fact.prompts(), [[fact.true]])
    about = {"conflict": kind}
    yield _row(record, dataset, first, 0, first.new, first.true, extra=about)
    conflict = _probes(record, CONFLICT, holds[1], [[holds[0]]])
    yield _row(
        record, dataset, second, 1, second.new, second.true, extra=about, portability=conflict, locality=tied
    )  # fmt: skip


@register_records({f"roundedit/{part}": _source(f"{part}.json") for part in ROUND_PARTS})
def round_rows(
    record: Record,
    *,
    dataset: str,
    split: str,
    seed: int | None = None,
    prompts: str | Path | Mapping[str, list[str]] | None = None,
) -> Iterator[RawRow]:
    """Yield the two edits of one record of RoundEdit: there, and back.

    Args:
        record: as in the module's example.
        dataset: registered name.
        split: not used; there is one.
        seed: not used; nothing is drawn.
        prompts: further prompts of every relation (``round_prompts.json``).

    Raises:
        DataError: ``prompts`` are none.
    """
    fact = _fact(record.child("edit"), _prompts(prompts))
    if fact.new is None:
        raise record.fail("is missing", "edit.new_object")
    others = [entry.need("label").strip() for entry in record.children("true_objects")]
    others = [other for other in dict.fromkeys(others) if other != fact.true]
    if not others:
        raise record.fail("must have an object beside the one that is edited", "true_objects")
    yield _row(record, dataset, fact, 0, fact.new, fact.true)
    kept = _probes(record, TRUE_OBJECTS, fact.prompts(), [[other] for other in others])
    yield _row(record, dataset, fact, 1, fact.true, fact.new, locality=kept)
