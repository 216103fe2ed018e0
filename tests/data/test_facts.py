"""The packaged facts of the real world: what the file may hold, and the rows that are made of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml
from datasets import DatasetDict

from hf_kedit.data import FEATURES, load_edit_dataset
from hf_kedit.data.facts import _FILE, bare, filled, get_facts
from hf_kedit.errors import DataError
from hf_kedit.requests import load_requests

TABLE = yaml.safe_load(Path(_FILE).read_text(encoding="utf-8"))
RELATIONS = TABLE["relations"]


@pytest.fixture(scope="module")
def splits() -> DatasetDict:
    return load_edit_dataset("facts", split="all")


@pytest.fixture(scope="module")
def rows(splits):
    return [dict(row) for table in splits.values() for row in table]


# ---------------------------------------------------------------------- the file


def test_a_subject_stands_once_in_a_table():
    """YAML takes the last of two equal keys in silence."""

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader, node):
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), [key for key, n in Counter(keys).items() if n > 1]
        return dict(loader.construct_pairs(node, deep=True))

    Strict.add_constructor("tag:yaml.org,2002:map", mapping)
    yaml.load(_FILE.read_text(encoding="utf-8"), Strict)


def test_every_name_is_text():
    """What YAML reads as a number, a date or a truth value would be no name."""
    for key, relation in RELATIONS.items():
        for subject, answer in relation["facts"].items():
            assert isinstance(subject, str) and isinstance(answer, str), (key, subject, answer)
    for table in (TABLE["aliases"], TABLE["subject_aliases"]):
        for name, others in table.items():
            assert all(isinstance(text, str) for text in [name, *([others] if isinstance(others, str) else others)])


@pytest.mark.parametrize("key", RELATIONS)
def test_wordings(key):
    relation = RELATIONS[key]
    assert len(relation["statements"]) >= 3 and len(relation["questions"]) >= 2
    for text in relation["statements"]:
        assert text.count("{}") == 1 and text == text.strip() and text[-1] not in ".?:,"
    assert all(text.count("{}") == 1 and text.endswith("?") for text in relation["questions"])
    if any(subject[0].islower() and not subject.startswith("the ") for subject in relation["facts"]):
        assert not any(text.startswith("{}") for text in relation["statements"]), "a sentence would begin small"


@pytest.mark.parametrize("key", RELATIONS)
def test_answers(key):
    facts = RELATIONS[key]["facts"]
    assert len(facts) >= 10
    assert len(set(facts.values())) >= 3, "no other object to edit to"
    for subject, answer in facts.items():
        assert answer.lower() not in bare(subject).lower().split(), f"{subject!r} gives its answer away"


def test_other_names_are_used():
    subjects = {subject for relation in RELATIONS.values() for subject in relation["facts"]}
    objects = {answer for relation in RELATIONS.values() for answer in relation["facts"].values()}
    assert not set(TABLE["aliases"]) - objects - subjects
    assert not set(TABLE["subject_aliases"]) - subjects
    for chain in TABLE["chains"]:
        first, second = RELATIONS[chain["first"]]["facts"], RELATIONS[chain["second"]]["facts"]
        assert len({answer for answer in first.values() if answer in second}) >= 2, chain


def test_a_name_is_written_as_in_a_sentence():
    assert filled("{} is tall", "the Eiffel Tower") == "The Eiffel Tower is tall"
    assert filled("To see {}, go", "the Eiffel Tower") == "To see the Eiffel Tower, go"
    assert filled("{} is tall", "Big Ben") == "Big Ben is tall"
    assert bare("the Eiffel Tower") == "Eiffel Tower" and bare("Theseus") == "Theseus"


def test_names_that_pass_for_another():
    facts = get_facts()
    assert facts.answers("book_author", "Leo Tolstoy") == ["Leo Tolstoy", "Tolstoy"]
    assert facts.answers("dish_country", "the United States")[0] == "the United States"
    assert facts.same("city_country", "the United Kingdom", "Scotland")
    assert not facts.same("city_country", "the United Kingdom", "the United States")
    with pytest.raises(DataError, match="country_capital"):
        facts.relation("country_capitol")


# ---------------------------------------------------------------------- the rows


def test_every_fact_is_one_row(splits, rows):
    assert all(table.features == FEATURES for table in splits.values())
    count = sum(len(relation["facts"]) for relation in RELATIONS.values())
    assert len(rows) == count >= 400
    assert len({row["id"] for row in rows}) == count
    assert len({row["prompt"] for row in rows}) == count
    seen = Counter(row["extra"]["relation"] for row in rows)
    assert seen == {key: len(relation["facts"]) for key, relation in RELATIONS.items()}
    by_split = [{row["extra"]["relation"] for row in table} for table in splits.values()]
    assert by_split[0] == by_split[1] == set(RELATIONS)
    assert {row["prompt"] for row in splits["test"]}.isdisjoint({row["prompt"] for row in splits["validation"]})


def test_the_first_rows_are_of_all_relations(splits):
    assert len({row["extra"]["relation"] for row in splits["test"].select(range(len(RELATIONS)))}) == len(RELATIONS)


def test_subjects_stand_in_all_wordings(rows):
    for row, request in zip(rows, load_requests(rows), strict=True):
        start, end = request.subject_span()
        assert request.filled_prompt[start:end] == row["subject"]
        wordings = [*row["rephrase_prompts"], *row["extra"]["questions"]]
        assert len(wordings) >= 4 and len({*wordings, row["prompt"]}) == len(wordings) + 1
        assert all(row["subject"] in text for text in wordings)


def test_the_new_object_is_of_the_same_kind_and_false(rows):
    for row in rows:
        objects = set(RELATIONS[row["extra"]["relation"]]["facts"].values())
        assert row["target_new"] in objects
        assert row["ground_truth"][0] in objects
        accepted = {row["target_new"], *TABLE["aliases"].get(row["target_new"], ())}
        assert accepted.isdisjoint(row["ground_truth"])


def _facts_by_prompt():
    """First wording of a fact → (relation, answer), written out here once more."""
    table = {}
    for key, relation in RELATIONS.items():
        for subject, answer in relation["facts"].items():
            text = relation["statements"][0].replace("{}", subject)
            table[text[0].upper() + text[1:]] = (key, subject, answer)
    return table


def test_probes_are_true_and_would_show_a_leak(rows):
    known = _facts_by_prompt()
    for row in rows:
        relation = row["extra"]["relation"]
        axes = Counter(probe["name"] for probe in row["locality"])
        assert axes["Neighborhood"] + axes["Other_Subjects"] >= 2 and axes["Entities"] >= 2, row["prompt"]
        for probe in row["locality"]:
            key, subject, answer = known[probe["prompt"]]
            (accepted,) = probe["ground_truth"]
            assert accepted[0] == answer
            assert row["target_new"] not in accepted
            assert probe["prompt"] != row["prompt"]
            same = {"Neighborhood": True, "Other_Subjects": True, "Same_Subject": False, "Entities": False}
            assert (key == relation) == same[probe["name"]]
            if probe["name"] == "Same_Subject":
                assert bare(subject) == row["subject"]
            if key == relation:
                assert (answer == row["ground_truth"][0]) == (probe["name"] == "Neighborhood")


def test_a_consequence_follows_from_the_new_object(rows):
    (row,) = (r for r in rows if r["subject"] == "Eiffel Tower")
    hops = {p["prompt"]: p["ground_truth"][0][0] for p in row["portability"]}
    new = row["target_new"]
    assert new != "Paris"
    assert hops["The Eiffel Tower is located in the country of"] == RELATIONS["city_country"]["facts"][new]
    assert sum(bool(r["portability"]) for r in rows) >= 100
    (named,) = (r for r in rows if r["subject"] == "Mona Lisa")
    other = [p for p in named["portability"] if p["name"] == "Subject_Aliasing"]
    assert (
        other[0]["prompt"] == "The painting called La Gioconda is a work by"
        and other[0]["ground_truth"][0][0] == named["target_new"]
    )


def test_seed_and_relation():
    capitals = load_edit_dataset("facts", relation="country_capital")
    assert {row["extra"]["relation"] for row in capitals} == {"country_capital"}
    other = load_edit_dataset("facts", relation="country_capital", seed=1)
    assert capitals["prompt"][:] == other["prompt"][:] and capitals["target_new"][:] != other["target_new"][:]
    assert load_edit_dataset("facts", relation="country_capital")["target_new"][:] == capitals["target_new"][:]
    with pytest.raises(DataError, match="no relation 'capital'"):
        load_edit_dataset("facts", relation="capital")


def test_nothing_is_asked_that_another_row_edits():
    rows = load_edit_dataset("facts", apart=True)
    prompts = set(rows["prompt"])
    asked = {probe["prompt"] for row in rows for probe in row["locality"]}
    assert len(asked) >= 50 and asked.isdisjoint(prompts)
