"""Edit requests about the synthetic fact world, with probes for everything that should and should not change.

Every row is a counterfactual edit: another object of the same relation becomes the answer. Group A, which was
trained with every form, gives the ``train`` split; group B, whose held-out forms no training text contains,
gives ``validation`` (one person in five) and ``test``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .features import blank, probe
from .loading import register_dataset
from .world import Person, World, get_world
from .world_templates import COMPOSITIONS, ENTITY_RELATIONS, PERSON_RELATIONS, QUESTION_FORMATS, Relation
from .world_text import filler_sentence

LOCALITY_AXES = ("Neighborhood", "Other_Subjects", "Shared_Name", "Same_Subject", "Entities")
PORTABILITY_AXES = ("Reasoning", "Subject_Aliasing")

_PROBES_PER_AXIS = 3


@register_dataset("world", splits=("train", "validation", "test"))
def load_world(
    split: str,
    *,
    path: Path | None = None,
    seed: int | None = None,
    n_people: int = 400,
    world_seed: int = 0,
    apart: bool = False,
    sequence: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one split.

    Consecutive rows are about different people until everybody had a turn, so that a batch taken from the start
    has no two edits of one subject (as far as there are people).

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        path: not used; the world is made in memory.
        seed: of the new objects, the probes and the order; 0 by default.
        n_people: size of the world.
        world_seed: seed of the world itself; the embedded models know world 0.
        apart: ask about other people (locality) only whom no row of the split edits. Otherwise some probes ask for
            what another row changes, and in a sequence of edits even a perfect editor answers them differently.
        sequence: the first so many rows alone, to be edited one after another: no probe of locality asks for what one
            of them changes, be it of other people (as with ``apart``) or another fact of the same one. Who has no fact
            left that no row changes has no probes of that axis.
    """
    world = get_world(n_people, world_seed)
    rng = random.Random(f"hf_kedit world requests {split} {seed or 0}")
    if split == "train":
        people = world.people_in("A")
    else:
        group_b = world.people_in("B")
        people = [p for i, p in enumerate(group_b) if (i % 5 == 4) == (split == "validation")]
    rng.shuffle(people)
    orders = {p.name: rng.sample(PERSON_RELATIONS, len(PERSON_RELATIONS)) for p in people}
    rows = [(person, orders[person.name][turn]) for turn in range(len(PERSON_RELATIONS)) for person in people]
    rows = rows[:sequence]
    edited = frozenset(person.name for person, _ in rows) if apart or sequence else frozenset()
    changed: dict[str, set[str]] = {person.name: set() for person, _ in rows}
    for person, relation in rows if sequence else ():
        changed[person.name].add(relation.key)
    for number, (person, relation) in enumerate(rows):
        own = frozenset(changed[person.name])
        yield edit_row(world, person, relation, rng, f"world/{split}/{number}", edited, own)


def edit_row(
    world: World,
    person: Person,
    relation: Relation,
    rng: random.Random,
    row_id: str,
    edited: frozenset[str] = frozenset(),
    changed: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Return the row that edits one fact about one person.

    Locality asks neither about the people in ``edited`` nor for the relations of the person in ``changed``.
    """
    truth = world.answer(person.name, relation.key)
    new = rng.choice([v for v in world.objects[relation.object_kind] if v != truth])
    template = rng.choice(relation.cloze)
    prompt = template.format(person.name)
    rephrased = [form.format(person.name) for form in relation.heldout]
    questions = [q.format(person.name) for q in (*relation.questions, *relation.heldout_questions)]
    filler = [f"{filler_sentence(rng)} {filler_sentence(rng)} {text}" for text in (prompt, *rephrased)]
    return blank(
        id=row_id,
        dataset="world",
        prompt=prompt,
        subject=person.name,
        target_new=new,
        ground_truth=[truth],
        rephrase_prompts=rephrased,
        locality=_locality(world, person, relation, template, new, rng, edited, changed),
        portability=_portability(world, person, relation, new, rng),
        extra={
            "relation": relation.key,
            "template": template,
            "group": person.group,
            "filler_prompts": filler,
            "strict_prompts": [form.format(person.name) for form in relation.strict],
            "question_prompts": [rng.choice(QUESTION_FORMATS).format(q) for q in questions],
        },
    )


def _draw(rng: random.Random, pool: Sequence[str], count: int = _PROBES_PER_AXIS) -> list[str]:
    return rng.sample(list(pool), min(count, len(pool)))


def _locality(
    world: World,
    person: Person,
    relation: Relation,
    template: str,
    new: str,
    rng: random.Random,
    edited: frozenset[str],
    changed: frozenset[str],
) -> list[dict[str, Any]]:
    """Return what must stay as it is. No answer equals the new object, so that a leak always shows."""
    truth = world.answer(person.name, relation.key)
    subjects: dict[str, list[str]] = {"Neighborhood": [], "Other_Subjects": [], "Shared_Name": []}
    for other in world.people:
        answer = world.answer(other.name, relation.key)
        if other.name != person.name and answer != new:
            shared = other.first == person.first or other.last == person.last
            axis = "Shared_Name" if shared else "Neighborhood" if answer == truth else "Other_Subjects"
            subjects[axis].append(other.name)
    probes = []
    for axis, names in subjects.items():
        drawn = _draw(rng, names)
        if edited:  # drawn by lots of their own: the edits are those of the rows without this option
            drawn = _draw(random.Random(f"{person.name} {axis}"), [name for name in names if name not in edited])
        probes += [probe(axis, template.format(name), world.answer(name, relation.key)) for name in drawn]
    seconds = rng.sample([r for r in PERSON_RELATIONS if r is not relation], _PROBES_PER_AXIS)
    forms = [rng.choice(second.cloze) for second in seconds]
    if changed:  # as above
        seconds = [r for r in PERSON_RELATIONS if r.key not in changed]
        forms = [random.Random(f"{person.name} {relation.key} {r.key}").choice(r.cloze) for r in seconds]
    for second, form in zip(seconds, forms, strict=True):
        probes.append(probe("Same_Subject", form.format(person.name), world.answer(person.name, second.key)))
    for second in rng.sample(ENTITY_RELATIONS, _PROBES_PER_AXIS):
        names = [s for s in world.subjects(second.subject_kind) if world.answer(s, second.key) != new]
        name = rng.choice(names)
        probes.append(probe("Entities", rng.choice(second.cloze).format(name), world.answer(name, second.key)))
    return probes


def _portability(
    world: World, person: Person, relation: Relation, new: str, rng: random.Random
) -> list[dict[str, Any]]:
    """Return what follows from the edit. A conclusion that the old object shares is left out: it cannot fail."""
    truth = world.answer(person.name, relation.key)
    probes = []
    for composition in COMPOSITIONS:
        if composition.first == relation.key:
            value = world.answer(new, composition.second)
            if value != world.answer(truth, composition.second):
                form = rng.choice(composition.cloze).format(person.name)
                probes.append(probe("Reasoning", form, value))
    if person.alias:
        probes.append(probe("Subject_Aliasing", rng.choice(relation.cloze).format(person.alias), new))
    return probes
