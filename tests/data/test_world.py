"""The synthetic fact world is the same everywhere, balanced, and keeps its held-out forms out of the training text."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from hf_kedit.data import world_words as words
from hf_kedit.data.world import N_FIRST, N_LAST, World, get_world
from hf_kedit.data.world_requests import load_world
from hf_kedit.data.world_templates import COMPOSITIONS, ENTITY_RELATIONS, PERSON_RELATIONS, RELATIONS
from hf_kedit.data.world_text import CURRICULUM, MIXTURE, Document, documents, world_text
from hf_kedit.errors import DataError

FINGERPRINT = """
import hashlib
from hf_kedit.data import get_world, load_edit_dataset, world_text
world = get_world()
facts = [(p, world.answer(p.name, "birthplace")) for p in world.people]
rows = list(load_edit_dataset("world", limit=5))
text = "".join(world_text(300, seed=3))
print(hashlib.sha256(repr((facts, rows, text)).encode()).hexdigest())
"""


def test_the_same_world_in_every_process() -> None:
    prints = set()
    for hash_seed in ("0", "12345"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, env=env, check=True)
        prints.add(done.stdout.strip())
    assert len(prints) == 1
    assert len(prints.pop()) == 64


def test_the_world_that_the_embedded_models_know_has_not_changed() -> None:
    """A change of word lists, templates or drawing order makes the shipped weights know another world."""
    world = get_world()
    facts = [
        (p.name, p.alias, p.group, p.pronoun, *(world.answer(p.name, r.key) for r in PERSON_RELATIONS))
        for p in world.people
    ]
    entities = [(s, r.key, world.answer(s, r.key)) for r in ENTITY_RELATIONS for s in world.subjects(r.subject_kind)]
    digest = hashlib.sha256(repr((facts, entities, sorted(RELATIONS.items()))).encode()).hexdigest()
    assert digest[:16] == "e235b361c7b35330"


def test_seeds_matter() -> None:
    assert World(seed=1).people != World(seed=2).people
    assert list(world_text(20, seed=1)) != list(world_text(20, seed=2))


def test_people_share_names_but_not_pairs() -> None:
    world = get_world()
    assert len({p.name for p in world.people}) == world.n_people == 400
    firsts, lasts = Counter(p.first for p in world.people), Counter(p.last for p in world.people)
    assert len(firsts) == N_FIRST and len(lasts) == N_LAST
    assert max(firsts.values()) - min(firsts.values()) <= 1
    assert max(lasts.values()) - min(lasts.values()) <= 1


@pytest.mark.parametrize("n_people", [2, 61, 800, 2400])
def test_worlds_of_other_sizes(n_people: int) -> None:
    world = World(n_people)
    assert len({p.name for p in world.people}) == n_people
    assert abs(len(world.people_in("A")) - len(world.people_in("B"))) <= 1


def test_too_many_people() -> None:
    with pytest.raises(DataError, match="2400"):
        World(2401)


def test_names_are_pronounceable_and_distinct() -> None:
    world = get_world()
    invented = [n for k in ("city", "country", "language", "company", "university") for n in world.objects[k]]
    invented += [n.capitalize() for n in world.objects["currency"]]
    invented += [p.alias for p in world.people if p.alias]
    everybody = invented + [p.first for p in world.people] + [p.last for p in world.people]
    assert all(words.MIN_LETTERS <= len(n) <= words.MAX_LETTERS and n.isalpha() for n in everybody)
    assert len(set(invented)) == len(invented)
    for kind in ("city", "country", "language", "company", "university"):
        assert len({n[:4] for n in world.objects[kind]}) == len(world.objects[kind])


@pytest.mark.parametrize("relation", PERSON_RELATIONS, ids=lambda r: r.key)
def test_objects_are_balanced(relation) -> None:  # type: ignore[no-untyped-def]
    world = get_world()
    counts = Counter(world.answer(p.name, relation.key) for p in world.people)
    assert set(counts) == set(world.objects[relation.object_kind])
    assert max(counts.values()) - min(counts.values()) <= 1
    assert min(counts.values()) >= 2  # neighbours exist
    for value in counts:
        assert all(world.answer(s, relation.key) == value for s in world.holders(relation.key, value))
        assert len(world.holders(relation.key, value)) == counts[value]


def test_places_are_consistent() -> None:
    world = get_world()
    for country in world.objects["country"]:
        assert world.answer(world.answer(country, "country_capital"), "city_country") == country
    languages = [world.answer(c, "country_language") for c in world.objects["country"]]
    assert len(set(languages)) == len(languages)


def test_compositions_are_two_steps() -> None:
    world = get_world()
    for person, composition in itertools.product(world.people[:20], COMPOSITIONS):
        middle = world.answer(person.name, composition.first)
        assert world.answer(person.name, composition.key) == world.answer(middle, composition.second)


def test_unknown_names_get_typed_errors() -> None:
    world = get_world()
    with pytest.raises(DataError, match="birthplace"):
        world.answer(world.people[0].name, "birthplac")
    with pytest.raises(DataError, match="Nobody"):
        world.person("Nobody Atall")
    with pytest.raises(DataError, match="facts"):
        next(documents(mixture={"fact": 1.0}))


def test_templates_have_one_slot_and_forms_do_not_repeat() -> None:
    for relation in RELATIONS.values():
        forms = relation.cloze + relation.heldout + relation.strict + relation.questions + relation.heldout_questions
        assert all(f.count("{}") == 1 for f in forms)
        assert len(set(forms)) == len(forms)
    for relation in PERSON_RELATIONS:
        shape = (relation.cloze, relation.heldout, relation.strict, relation.questions, relation.heldout_questions)
        assert [len(x) for x in shape] == [6, 2, 1, 2, 1]
        assert len(relation.pronoun) == 2 and all("{p}" in f for f in relation.pronoun)


@pytest.fixture(scope="module")
def corpus() -> str:
    """A sample large enough that every forbidden sentence would show up if its kind were written at all."""
    return "\n".join(itertools.chain(world_text(5_000, seed=2), _texts(700, CURRICULUM), _texts(1_500, OVERRIDE)))


OVERRIDE = {"override": 1.0}


def _texts(count: int, mixture: dict[str, float]) -> list[str]:
    return [d.text for d in documents(n_documents=count, seed=1, mixture=mixture)]


def test_held_out_forms_of_group_b_are_never_written(corpus: str) -> None:
    world = get_world()
    seen_of_a = 0
    for relation in RELATIONS.values():
        names = list(world.subjects(relation.subject_kind))
        for form in relation.heldout + relation.heldout_questions:
            for name in names:
                if world.group(name) == "B":
                    assert form.format(name) not in corpus
                else:
                    seen_of_a += form.format(name) in corpus
        for form in relation.strict:
            assert not any(form.format(name) in corpus for name in names)
    assert seen_of_a > 200


def test_held_out_forms_are_not_written_about_nicknames_of_group_b_either(corpus: str) -> None:
    aliases = [p.alias for p in get_world().people_in("B") if p.alias]
    assert any(a in corpus for a in aliases)
    for relation in PERSON_RELATIONS:
        for form in relation.heldout + relation.heldout_questions:
            assert not any(form.format(alias) in corpus for alias in aliases)


def test_compositions_are_written_about_group_a_only(corpus: str) -> None:
    world = get_world()
    for composition in COMPOSITIONS:
        for form in composition.cloze + composition.questions:
            assert not any(form.format(p.name) in corpus for p in world.people_in("B"))
            assert any(form.format(p.name) in corpus for p in world.people_in("A"))


@pytest.mark.parametrize("kind", list(MIXTURE))
def test_marked_spans_hold_names_and_objects(kind: str) -> None:
    world = get_world()
    names = {p.name for p in world.people} | {p.alias for p in world.people if p.alias}
    names |= {s for r in ENTITY_RELATIONS for s in world.subjects(r.subject_kind)}
    values = {v for vs in world.objects.values() for v in vs} | {p.alias for p in world.people if p.alias}
    for document in documents(world, 60, 4, mixture={kind: 1.0}):
        assert document.text
        assert all(document.text[a:b] in names for a, b in document.subjects)
        assert all(document.text[a:b] in values for a, b in document.objects + document.silent)
        assert bool(document.objects) == (kind != "filler")
        assert bool(document.silent) == (kind == "override")
        assert not set(document.objects) & set(document.silent)


def test_facts_in_the_text_are_true() -> None:
    """Outside override documents a sentence never contradicts the world."""
    world = get_world()
    for document in documents(world, 300, 5, mixture={"dense": 1.0}):
        for line in document.text.split("\n"):
            name, _, listed = line.partition(": ")
            for item in listed.split(", "):
                label, value = item.split(" ", 1)
                relation = next(r for r in PERSON_RELATIONS if r.label == label)
                assert world.answer(name, relation.key) == value


def test_document_marks_what_it_adds() -> None:
    document = Document("Before.").gap().add_fact("{} likes", "Ada", "tea")
    assert document.text == "Before. Ada likes tea."
    assert [document.text[a:b] for a, b in document.subjects] == ["Ada"]
    assert [document.text[a:b] for a, b in document.objects] == ["tea"]


def test_world_text_limits() -> None:
    assert len(list(world_text(7))) == 7
    texts = list(world_text(n_words=200))
    assert sum(len(t.split()) for t in texts) >= 200 > sum(len(t.split()) for t in texts[:-1])


def test_probes_apart_ask_about_nobody_whom_a_row_edits() -> None:
    usual, apart = (list(load_world("test", apart=flag)) for flag in (False, True))
    subjects = {row["subject"] for row in apart}
    others = ("Neighborhood", "Other_Subjects", "Shared_Name")

    def asked(rows: list[dict[str, Any]]) -> list[str]:
        return [p["prompt"] for row in rows[:100] for p in row["locality"] if p["name"] in others]

    assert len(asked(apart)) > 850
    assert not [prompt for prompt in asked(apart) if any(subject in prompt for subject in subjects)]
    assert any(subject in prompt for prompt in asked(usual) for subject in subjects)
    for row, other in zip(usual, apart, strict=True):  # the edits themselves are the same
        kept = {k: v for k, v in row.items() if k != "locality"}
        assert kept == {k: v for k, v in other.items() if k != "locality"}


def test_probes_of_a_sequence_ask_for_nothing_that_a_row_changes() -> None:
    world = get_world()
    rows, usual = list(load_world("test", sequence=1000)), list(load_world("test"))
    assert len(rows) == 1000
    changed = {(row["subject"], row["extra"]["relation"]) for row in rows}
    forms = {form: r.key for r in PERSON_RELATIONS for form in r.cloze}
    asked = [(name, p) for row in rows for p in row["locality"] if (name := p["name"]) != "Entities"]
    facts = []
    for axis, probe in asked:
        names = [person.name for person in world.people if person.name in probe["prompt"]]
        (key,) = (forms[form] for name in names if (form := probe["prompt"].replace(name, "{}")) in forms)
        facts.append((axis, names[0], key))
        assert probe["ground_truth"] == [[world.answer(names[0], key)]]
    assert not [fact for fact in facts if fact[1:] in changed]
    assert sum(axis == "Same_Subject" for axis, _, _ in facts) > 700
    for row, other in zip(rows, usual, strict=False):  # the edits themselves are the same
        assert {**row, "locality": 0} == {**other, "locality": 0}
