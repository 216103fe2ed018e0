"""Rows, the registry of datasets, files of requests, and the requests about the world."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kedit.data import (
    FEATURES,
    blank,
    dataset_names,
    get_world,
    load_edit_dataset,
    load_report,
    probe,
    register_dataset,
)
from hf_kedit.data.loading import _REGISTRY
from hf_kedit.data.world_requests import LOCALITY_AXES, PORTABILITY_AXES
from hf_kedit.data.world_templates import COMPOSITIONS, PERSON_RELATIONS
from hf_kedit.errors import DataError, KeditError, RequestError
from hf_kedit.requests import EditRequest, load_requests


@pytest.fixture(scope="module")
def splits() -> DatasetDict:
    return load_edit_dataset("world", split="all")  # type: ignore[return-value]


def write(path: Path, rows: object) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")  # type: ignore[attr-defined]
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


# ---------------------------------------------------------------------- the world


def test_sizes_and_columns(splits: DatasetDict) -> None:
    assert {k: len(v) for k, v in splits.items()} == {"train": 1400, "validation": 280, "test": 1120}
    assert all(v.features == FEATURES for v in splits.values())
    ids = [i for v in splits.values() for i in v["id"]]
    assert len(set(ids)) == len(ids)


def test_groups_are_apart(splits: DatasetDict) -> None:
    world = get_world()
    subjects = {k: set(v["subject"]) for k, v in splits.items()}
    assert subjects["train"] == {p.name for p in world.people_in("A")}
    assert subjects["test"] | subjects["validation"] == {p.name for p in world.people_in("B")}
    assert not subjects["test"] & subjects["validation"]


def test_a_batch_from_the_start_has_no_subject_twice(splits: DatasetDict) -> None:
    first = splits["test"][:160]["subject"]
    assert len(set(first)) == 160


def test_every_row_agrees_with_the_world(splits: DatasetDict) -> None:
    world = get_world()
    relations = {r.key: r for r in PERSON_RELATIONS}
    prompts: dict[str, str] = {}
    for subject_kind in PERSON_RELATIONS:
        for person in world.people:
            for form in subject_kind.cloze:
                answer = world.answer(person.name, subject_kind.key)
                prompts[form.format(person.name)] = answer
                if person.alias:
                    prompts[form.format(person.alias)] = answer
    for split in splits.values():
        for row in split:
            relation, name = relations[row["extra"]["relation"]], row["subject"]
            truth = world.answer(name, relation.key)
            assert row["ground_truth"] == [truth] and prompts[row["prompt"]] == truth
            assert row["target_new"] in world.objects[relation.object_kind] and row["target_new"] != truth
            assert name in row["prompt"]
            assert row["rephrase_prompts"] == [f.format(name) for f in relation.heldout]
            assert len(row["extra"]["filler_prompts"]) == 3
            assert all(name in p for p in row["extra"]["filler_prompts"] + row["extra"]["question_prompts"])
            for one in row["locality"]:
                (answer,) = one["ground_truth"][0]
                assert answer != row["target_new"] or one["name"] == "Same_Subject"
                if one["name"] != "Entities":
                    assert prompts[one["prompt"]] == answer
                assert (name in one["prompt"]) == (one["name"] == "Same_Subject")
                if one["name"] in ("Neighborhood", "Other_Subjects"):
                    assert (answer == truth) == (one["name"] == "Neighborhood")
                    assert not any(part in one["prompt"].split() for part in name.split())
                if one["name"] == "Shared_Name":
                    assert any(part in one["prompt"].split() for part in name.split())
            for one in row["portability"]:
                (answer,) = one["ground_truth"][0]
                if one["name"] == "Subject_Aliasing":
                    assert world.person(name).alias in one["prompt"] and answer == row["target_new"]
                else:
                    first = [c for c in COMPOSITIONS if c.first == relation.key]
                    assert answer in [world.answer(row["target_new"], c.second) for c in first]
                    assert answer not in [world.answer(truth, c.second) for c in first]


def test_every_axis_is_there(splits: DatasetDict) -> None:
    locality = {p["name"] for row in splits["test"] for p in row["locality"]}
    portability = {p["name"] for row in splits["test"] for p in row["portability"]}
    assert locality == set(LOCALITY_AXES) and portability == set(PORTABILITY_AXES)
    assert all(len({p["name"] for p in row["locality"]}) == len(LOCALITY_AXES) for row in splits["test"])


def test_rows_become_requests(splits: DatasetDict) -> None:
    requests = load_requests(splits["validation"])
    assert len(requests) == 280
    assert set(requests[0].locality) == set(LOCALITY_AXES)
    assert requests[0].template == splits["validation"][0]["extra"]["template"]


def test_the_first_rows_are_skipped(tmp_path: Path) -> None:
    """As they stand in the file: what is skipped is not compared with the rest either."""
    rows = [{"prompt": f"{name} is a", "target_new": target} for name, target in (("A", "x"), ("B", "x"), ("A", "y"))]
    file = write(tmp_path / "rows.json", rows)
    table = load_edit_dataset(file, skip=1, drop_conflicts="first")
    assert table["prompt"] == ["B is a", "A is a"] and table["target_new"] == ["x", "y"]
    report = load_report(table)
    assert (report.read, report.kept, report.dropped) == (3, 2, {"skipped": 1})
    assert load_edit_dataset(file, skip=1, limit=1)["prompt"] == ["B is a"]
    whole = load_edit_dataset("world", limit=12)["prompt"]
    assert load_edit_dataset("world", limit=5, skip=7)["prompt"] == whole[7:]
    streamed = load_edit_dataset(file, skip=2, streaming=True)
    assert [row["target_new"] for row in streamed] == ["y"]


@pytest.mark.parametrize("wrong", [-1, True, 1.0, "2"])
def test_rows_are_counted_in_whole_numbers(wrong: object) -> None:
    with pytest.raises(DataError, match="skip must be a whole number"):
        load_edit_dataset("world", skip=wrong)  # type: ignore[arg-type]


def test_seed_and_limit() -> None:
    standard = load_edit_dataset("world", limit=20)
    assert len(standard) == 20
    assert standard.to_list() == load_edit_dataset("world", limit=40).to_list()[:20]
    assert standard.to_list() == load_edit_dataset("WORLD", split="test", limit=20, seed=0).to_list()
    assert standard["target_new"] != load_edit_dataset("world", limit=20, seed=1)["target_new"]


def test_options_of_the_world() -> None:
    assert len(load_edit_dataset("world", split="train", n_people=20)) == 70
    with pytest.raises(DataError, match="n_people"):
        load_edit_dataset("world", n_peple=20)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "disk"])
def test_round_trips(splits: DatasetDict, tmp_path: Path, form: str) -> None:
    rows = splits["test"].select(range(12))
    if form == "parquet":
        rows.to_parquet(tmp_path / "x.parquet")
        back = Dataset.from_parquet(str(tmp_path / "x.parquet"), features=FEATURES, cache_dir=str(tmp_path / "c"))
    elif form == "jsonl":
        rows.to_json(tmp_path / "x.jsonl")
        back = load_edit_dataset(tmp_path / "x.jsonl")
    else:
        rows.save_to_disk(tmp_path / "x")
        back = Dataset.load_from_disk(str(tmp_path / "x"))
    assert back.features == FEATURES
    assert back.to_list() == rows.to_list()


# ---------------------------------------------------------------------- names and splits


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "wrld"}, "'world'"),
        ({"name": "world", "split": "tset"}, "'test'"),
        ({"name": "world", "limit": 0}, "limit"),
        ({"name": "world", "drop_conflicts": "some"}, "drop_conflicts"),
        ({}, "name of a dataset"),
        ({"name": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_edit_dataset(**arguments)  # type: ignore[arg-type]


def test_registering(caplog: pytest.LogCaptureFixture) -> None:
    name = "tests-only"
    try:

        @register_dataset(name, splits=("train", "test"))
        def load(split, *, path=None, seed=None, shout=False):  # type: ignore[no-untyped-def]
            for i, target in enumerate(["a", "", "b", "c"]):
                yield blank(id=str(i), prompt=f"{split} {i // 3}", target_new=target.upper() if shout else target)

        assert name in dataset_names()
        logging.getLogger("hf_kedit").addHandler(caplog.handler)
        rows = load_edit_dataset(name, shout=True)
        assert rows["target_new"][:] == ["A", "B", "C"]
        assert "1 of 4 rows dropped" in caplog.text
        assert load_edit_dataset(name, drop_conflicts="first")["id"][:] == ["0", "3"]
        assert load_edit_dataset(name, drop_conflicts="last")["id"][:] == ["2", "3"]
        assert load_edit_dataset(name, exclude=["TEST  0"])["id"][:] == ["3"]
        assert load_edit_dataset(name, exclude=rows.select([2]))["id"][:] == ["0", "2"]
        with pytest.raises(DataError, match="no usable"):
            load_edit_dataset(name, exclude=rows)
        with pytest.raises(DataError, match="already"):
            register_dataset(name)
        with pytest.raises(DataError, match="default split"):
            register_dataset("tests-only-2", splits=("train",))
    finally:
        logging.getLogger("hf_kedit").removeHandler(caplog.handler)
        _REGISTRY.pop(name, None)


# ---------------------------------------------------------------------- rows and files


def test_blank_rows_make_a_table() -> None:
    rows = [blank(prompt="p", target_new="t"), blank(extra={"a": ["1998", None]})]
    table = Dataset.from_list(rows, features=FEATURES)
    assert table[1]["extra"] == {"a": ["1998", None]}
    assert table[0]["locality"] == [] and table[0]["group_size"] == 1
    for wrong in ({"prompts": "p"}, {"task": "fakt"}, {"extra": "text"}):
        with pytest.raises(DataError):
            blank(**wrong)


@pytest.mark.parametrize(
    ("given_", "stored"),
    [("a", [["a"]]), (["a", "b"], [["a"], ["b"]]), ([["a", "b"], ["c"]], [["a", "b"], ["c"]]), (["", " "], [])],
)
def test_probe_answers(given_: object, stored: list[list[str]]) -> None:
    assert probe("x", "p", given_)["ground_truth"] == stored  # type: ignore[arg-type]


def test_request_like_files(tmp_path: Path) -> None:
    row = {
        "prompt": "{} was founded in",
        "subject": "Acme",
        "target_new": " 1998",
        "ground_truth": "1990",
        "locality": {"near": [{"prompt": "Bolt was founded in", "ground_truth": "true"}]},
        "metadata": {"source": "me", "task": "fact"},
    }
    for name in ("rows.json", "rows.jsonl"):
        table = load_edit_dataset(str(write(tmp_path / name, [row, {**row, "target_new": ""}])))
        assert len(table) == 1
        assert table[0]["id"] == "rows/0" and table[0]["dataset"] == "rows"
        assert table[0]["prompt"] == "Acme was founded in" and table[0]["target_new"] == "1998"
        assert table[0]["ground_truth"] == ["1990"] and table[0]["extra"] == {"source": "me"}
        assert table[0]["locality"][0]["ground_truth"] == [["true"]]
        request = load_requests(table)[0]
        assert isinstance(request, EditRequest) and request.template == row["prompt"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "p", "target_new": "t", "subjct": "s"}], "row 0.*subjct"),
        ([{"prompt": "p", "target_new": "t"}, "text"], "row 1"),
        ([{"prompt": "p", "target_new": "t"}, {"prompt": 3, "target_new": "t"}], "row 1.*prompt"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[object], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        load_edit_dataset(write(tmp_path / "rows.json", rows))


_KEYS = st.sampled_from(
    [
        "prompt",
        "target_new",
        "subject",
        "locality",
        "ground_truth",
        "name",
        "id",
        "metadata",
        "task",
        "group_size",
        "x",
    ]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(_JSON, max_size=3))
def test_any_file_gives_a_table_or_a_typed_error(rows: list[object], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = write(tmp_path_factory.mktemp("rows") / "rows.json", rows)
    try:
        table = load_edit_dataset(file)
    except KeditError:
        return
    assert table.features == FEATURES and len(table) > 0
