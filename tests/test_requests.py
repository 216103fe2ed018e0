"""Edit requests: every bad row gets a typed error that names row and field; text survives unharmed."""

from __future__ import annotations

import csv
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_kedit import EditRequest, KeditError, Probe, load_edit_dataset, load_requests
from hf_kedit.errors import DataError, RequestError, SubjectNotFoundError
from hf_kedit.requests import find_subject

GOOD: dict[str, Any] = {"prompt": "{} plays", "subject": "Ada", "target_new": "chess"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"target_new": ""}, "target_new"),
        ({"target_new": "   "}, "target_new"),
        ({"target_new": 3}, "target_new"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "{} knows {}"}, "prompt"),
        ({"subject": None}, "subject"),
        ({"subject": ""}, "subject"),
        ({"subject": 5}, "subject"),
        ({"id": ""}, "id"),
        ({"rephrase_prompts": [""]}, "rephrase_prompts"),
        ({"rephrase_prompts": 7}, "rephrase_prompts"),
        ({"locality": 3}, "locality"),
        ({"locality": {"a": [{"prompt": ""}]}}, "locality['a']"),
        ({"locality": {"a": {"prompt": ["x", "y"], "ground_truth": ["z"]}}}, "locality['a']"),
        ({"portability": [{"prompt": "x"}]}, "portability"),
        ({"ground_truth": 4}, "ground_truth"),
        ({"traget_new": "x"}, "traget_new"),
        ({"prompt": "a\x00b {}"}, "prompt"),
    ],
)
def test_bad_rows_name_row_and_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        load_requests([GOOD, GOOD | change])
    assert caught.value.row == 1
    assert caught.value.field == field
    assert "row 1" in str(caught.value) and field in str(caught.value)


def test_unknown_field_suggests_the_nearest() -> None:
    with pytest.raises(RequestError, match="Did you mean 'target_new'"):
        load_requests(GOOD | {"target_neww": "x"})


@pytest.mark.parametrize("empty", [[], "empty.json", "empty.jsonl"])
def test_nothing_to_edit(empty: Any, tmp_path: Path) -> None:
    if isinstance(empty, str):
        path = tmp_path / empty
        path.write_text("[]" if empty.endswith("json") else "")
        empty = path
    with pytest.raises(DataError, match="empty"):
        load_requests(empty)


def test_a_slice_of_a_dataset_is_its_rows() -> None:
    rows = [GOOD | {"id": name, "rephrase_prompts": [f"{name}?"]} for name in "abc"]
    assert load_requests(Dataset.from_list(rows)[1:]) == load_requests(rows[1:])
    with pytest.raises(RequestError, match="must be a string"):  # columns of several lengths are no slice
        load_requests({"prompt": ["{} a", "{} b"], "subject": ["A"], "target_new": ["x", "y"]})


def test_duplicate_ids() -> None:
    with pytest.raises(RequestError, match="row 0") as caught:
        load_requests([GOOD | {"id": "a"}, GOOD | {"id": "a"}])
    assert caught.value.row == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{not json", "not JSON"),
        ("a.jsonl", b'{"prompt": 1}\n{', "line 2"),
        ("a.json", b"\xff\xfe\x00", "cannot read"),
        ("a.parquet", b"x", "a.parquet"),
        ("a.txt", b"x", "use .json"),
        ("a.csv", b"prompt,target_new\n1,2,3\n", "line 2.*more cells"),
        ("a.csv", b"prompt,prompt\n1,2\n", "two columns are called 'prompt'"),
    ],
)
def test_unreadable_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_requests(tmp_path / name)
    with pytest.raises(DataError):
        load_requests(tmp_path / "missing.json")
    with pytest.raises(DataError, match="folder"):
        load_requests(tmp_path)


def test_files_of_every_format_give_the_same_requests(tmp_path: Path) -> None:
    rows = [GOOD | {"id": "one"}, GOOD | {"subject": "Bo\u2028b", "id": "two"}]
    (tmp_path / "r.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "r.jsonl").write_text(
        "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n", encoding="utf-8"
    )
    plain = load_requests(rows)
    assert load_requests(tmp_path / "r.json") == plain
    assert load_requests(str(tmp_path / "r.jsonl")) == plain
    (tmp_path / "r.csv").write_text("prompt,subject,target_new,id\n{} plays,Ada,chess,one\n", encoding="utf-8")
    assert load_requests(tmp_path / "r.csv") == plain[:1]


def test_slot_fixes_the_place_of_a_repeated_subject() -> None:
    request = EditRequest(prompt="Ada and {} met; Ada", subject="Ada", target_new="left")
    assert request.subject_span() == (8, 11)
    assert request.template == "Ada and {} met; Ada"
    filled = EditRequest(prompt="Ada and Ada met", subject="Ada", target_new="left")
    assert filled.subject_span() == (8, 11)  # the last one: prompts end with what is asked


def test_braces_in_prompts_are_harmless() -> None:
    request = EditRequest(prompt="In {x} and {0}, {} is", subject="A{}B", target_new="y")
    assert request.filled_prompt == "In {x} and {0}, A{}B is"


def test_missing_subject_is_found_when_a_method_needs_it() -> None:
    request = EditRequest(prompt="Somebody plays", subject="Ada", target_new="x", id="q")
    with pytest.raises(SubjectNotFoundError, match="'Ada'") as caught:
        request.subject_span()
    assert caught.value.request_id == "q"
    with pytest.raises(RequestError, match="needs the subject"):
        EditRequest(prompt="Somebody plays", target_new="x").subject_span()


@pytest.mark.parametrize(
    ("prompt", "subject", "found"),
    [
        ("the ADA lovelace story", "Ada Lovelace", "ADA lovelace"),
        ("about Ada  \n Lovelace here", "Ada Lovelace", "Ada  \n Lovelace"),
        ("in Zu\u0308rich today", "Z\u00fcrich", "Zu\u0308rich"),
        ("in Z\u00fcrich today", "Zu\u0308rich", "Z\u00fcrich"),
    ],
)
def test_subjects_are_found_regardless_of_case_space_and_unicode_form(prompt: str, subject: str, found: str) -> None:
    span = find_subject(prompt, subject)
    assert span is not None
    assert prompt[span[0] : span[1]] == found


def test_probe_layouts_are_equivalent() -> None:
    flat = EditRequest.from_dict(GOOD | {"locality": [{"name": "N", "prompt": "p", "ground_truth": [["a", "b"]]}]})
    nested = EditRequest.from_dict(GOOD | {"locality": {"N": [{"prompt": "p", "ground_truth": [["a", "b"]]}]}})
    columns = EditRequest.from_dict(GOOD | {"locality": {"N": {"prompt": ["p"], "ground_truth": [[["a", "b"]]]}}})
    assert flat.locality == nested.locality == columns.locality == {"N": [Probe("p", [["a", "b"]])]}
    assert flat.locality["N"][0].answers == ["a", "b"]


@pytest.mark.parametrize(
    ("answers", "groups"),
    [
        (["a", None, " ", ""], [["a"]]),
        ([["a", None, " "], [None], ("b", "c")], [["a"], ["b", "c"]]),
        (("a",), [["a"]]),
    ],
)
def test_answers_without_what_is_none(answers: Any, groups: list[list[str]]) -> None:
    request = EditRequest.from_dict(GOOD | {"locality": {"N": [{"prompt": "p", "ground_truth": answers}]}})
    assert request.locality["N"][0].ground_truth == groups
    for wrong in ([1], [["a", 1]], [[None, b"a"]], 3):
        with pytest.raises(RequestError, match="answers must be"):
            EditRequest.from_dict(GOOD | {"locality": {"N": [{"prompt": "p", "ground_truth": wrong}]}})


@pytest.mark.parametrize("text", ["", " ", "a\x00", "\ud83d", 3])
def test_a_wrong_text_among_right_ones_is_named(text: Any) -> None:
    """Probes are looked at together; what is wrong with one of them is said of its place."""
    right = Probe("p", [["a", "\U0001f600"]], image="i.png")
    for wrong in (Probe(text, [["a"]]), Probe("p", [["a", text]]), Probe("p", image=text)):
        with pytest.raises(RequestError) as error:
            EditRequest(**GOOD, locality={"N": [right]}, portability={"M": [right], "O": [right, wrong]})
        assert error.value.field == "portability['O']"
    with pytest.raises(RequestError, match="locality"):
        EditRequest(**GOOD, locality={"\x00": [right]})


def test_dict_round_trip_through_json() -> None:
    request = EditRequest.from_dict(
        GOOD | {"ground_truth": ["go"], "portability": {"R": {"prompt": "q", "ground_truth": "x"}}, "task": "fact"}
    )
    assert EditRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    assert request.metadata["task"] == "fact"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(
            [*GOOD, "ground_truth", "locality", "portability", "rephrase_prompts", "id", "metadata", "odd"]
        ),
        json_values,
        max_size=6,
    )
)
def test_any_row_gives_a_request_or_a_typed_error(row: dict[str, Any]) -> None:
    try:
        (request,) = load_requests([row])
    except KeditError:
        return
    assert request.target_new.strip() and request.prompt.strip()
    assert EditRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


@given(st.text(min_size=1), st.text(), st.text())
def test_a_literal_subject_is_always_found(subject: str, before: str, after: str) -> None:
    span = find_subject(before + subject + after, subject)
    assert span is not None
    assert (before + subject + after)[span[0] : span[1]] == subject


# ---------------------------------------------------------------------- lists in cells


def _csv(tmp_path: Path, **cells: str) -> Path:
    file = tmp_path / "facts.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*GOOD, *cells])
        writer.writeheader()
        writer.writerow(GOOD | cells)
    return file


@pytest.mark.parametrize("column", ["rephrase_prompts", "rephrase_prompt", "rephrase", "ground_truth"])
@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ('["a b", "c d"]', ["a b", "c d"]),
        (' ["a b"] ', ["a b"]),
        ('["a, \\"b\\"", "ü"]', ['a, "b"', "ü"]),
        ("[]", []),
        ("a b", ["a b"]),
        ("a [b]", ["a [b]"]),
    ],
)
def test_a_cell_may_hold_a_list_as_json(column: str, cell: str, texts: list[str], tmp_path: Path) -> None:
    (request,) = load_requests(_csv(tmp_path, **{column: cell}))
    assert (request.ground_truth if column == "ground_truth" else request.rephrase_prompts) == texts


@pytest.mark.parametrize("cell", ["['a b', 'c d']", "['a b' 'c d']", "[a b, c d]", "[", '["a b",', "[MASK] is"])
@pytest.mark.parametrize("column", ["rephrase_prompts", "ground_truth"])
def test_a_list_that_is_no_json_is_refused_with_row_and_field(column: str, cell: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="JSON") as caught:
        load_requests(_csv(tmp_path, **{column: cell}))
    assert (caught.value.row, caught.value.field) == (0, column)


def test_a_bracket_in_a_prompt_stays_text(tmp_path: Path) -> None:
    file = tmp_path / "prompt.csv"
    file.write_text('prompt,target_new\n"[""a"", ""b""] is a list of","[1, 2]"\n', encoding="utf-8")
    (request,) = load_requests(file)
    assert (request.prompt, request.target_new) == ('["a", "b"] is a list of', "[1, 2]")


def test_probes_and_metadata_may_be_json_in_a_cell(tmp_path: Path) -> None:
    cells = {
        "locality": '{"near": [{"prompt": "p", "ground_truth": ["x"]}]}',
        "portability": '[{"name": "hop", "prompt": "q", "ground_truth": [["y", "z"]]}]',
        "metadata": '{"source": [1]}',
    }
    (request,) = load_requests(_csv(tmp_path, **cells))
    assert request.locality == {"near": [Probe("p", [["x"]])]}
    assert request.portability == {"hop": [Probe("q", [["y", "z"]])]}
    assert request.metadata == {"source": [1]}
    with pytest.raises(RequestError, match="dict"):
        load_requests(_csv(tmp_path, locality="near"))


@pytest.mark.parametrize(
    ("cell", "erase"),
    [("true", True), ("TRUE", True), ('["chess", "go"]', ["chess", "go"]), ("chess", ["chess"]), ("false", None)],
)
def test_what_is_to_go_in_a_cell(cell: str, erase: object, tmp_path: Path) -> None:
    (request,) = load_requests(_csv(tmp_path, erase=cell))
    assert request.metadata.get("erase") == erase
    (row,) = load_edit_dataset(_csv(tmp_path, erase=cell))
    assert EditRequest.from_dict(row).metadata.get("erase") == erase
    with pytest.raises(RequestError, match="JSON"):
        load_requests(_csv(tmp_path, erase="['chess']"))


def test_pictures_in_a_cell(tmp_path: Path) -> None:
    (request,) = load_requests(_csv(tmp_path, image='["a.png", "b.png"]', image_rephrase="[1].png"))
    assert (request.image, request.image_rephrase) == (("a.png", "b.png"), "[1].png")
    with pytest.raises(RequestError, match="JSON"):
        load_requests(_csv(tmp_path, image="['a.png', 'b.png']"))
    with pytest.raises(RequestError, match=r"begins like an object.*write \{"):
        load_requests(_csv(tmp_path, metadata="{'a': 1}"))


def test_lists_as_text_in_other_tables() -> None:
    """A data frame of a CSV file has the same cells; a text that only looks a little like a list stays one."""
    assert EditRequest.from_dict(GOOD | {"rephrase_prompts": '["a b", "c d"]'}).rephrase_prompts == ["a b", "c d"]
    assert EditRequest.from_dict(GOOD | {"ground_truth": '[["a", "b"], ["c"]]'}).ground_truth == ["a", "b", "c"]
    for text in ("[1, 2]", "[MASK] is", "[sic]"):
        assert EditRequest.from_dict(GOOD | {"ground_truth": text}).ground_truth == [text]
    for text in ("['a' 'b']", "['a', 'b']"):
        with pytest.raises(RequestError, match="JSON"):
            EditRequest.from_dict(GOOD | {"ground_truth": text}, row=3)


# ---------------------------------------------------------------------- what could never be saved

LONE = "\ud83d"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": LONE + " {} is"}, "prompt"),
        ({"subject": "A" + LONE}, "subject"),
        ({"target_new": LONE}, "target_new"),
        ({"ground_truth": ["x", LONE]}, "ground_truth"),
        ({"rephrase_prompts": [LONE]}, "rephrase_prompts"),
        ({"locality": {"near": [{"prompt": LONE, "ground_truth": "x"}]}}, "locality['near']"),
        ({"locality": {"near": [{"prompt": "x", "ground_truth": [["a", LONE]]}]}}, "locality['near']"),
        ({"portability": {LONE: [{"prompt": "x", "ground_truth": "a"}]}}, "portability"),
        ({"portability": {"hop": Probe("x", [["a"]], image=LONE)}}, "portability['hop']"),
        ({"image": LONE}, "image"),
        ({"id": LONE}, "id"),
        ({"separator": LONE}, "separator"),
        ({"metadata": {"a": {"b": ["x", LONE]}}}, "metadata.a.b[1]"),
        ({"metadata": {LONE: 1}}, "metadata"),
        ({"metadata": {"a": torch.ones(1)}}, "metadata.a"),
        ({"metadata": {"a": datetime(2020, 1, 1)}}, "metadata.a"),
        ({"metadata": {"a": {"b": {1, 2}}}}, "metadata.a.b"),
        ({"metadata": {"a": b"x"}}, "metadata.a"),
        ({"metadata": {"a": [Path("x")]}}, "metadata.a[0]"),
        ({"metadata": {"a": (1, 2)}}, "metadata.a"),
        ({"metadata": {1: "a"}}, "metadata"),
        ({"metadata": {"a": {None: 1}}}, "metadata.a"),
        ({"metadata": {"target_neg": 5}}, "target_neg"),
        ({"metadata": {"target_neg": ["x"]}}, "target_neg"),
        ({"metadata": {"target_neg": " "}}, "target_neg"),
        ({"metadata": {"loc_prompt": {}, "a": 1}}, "loc_prompt"),
        ({"metadata": {"erase": 5}}, "erase"),
        ({"metadata": {"erase": ["x", 5]}}, "erase"),
        ({"metadata": {"erase": {"x": 1}}}, "erase"),
    ],
)
def test_what_could_be_edited_but_never_saved_is_refused_at_once(change: dict[str, Any], field: str) -> None:
    for make in (lambda: load_requests([GOOD, GOOD | change]), lambda: EditRequest(**(GOOD | change), row=1)):
        with pytest.raises(RequestError) as caught:
            make()
        assert (caught.value.row, caught.value.field) == (1, field)
        str(caught.value).encode("utf-8")  # can be shown


def test_descriptive_columns_are_checked_too() -> None:
    with pytest.raises(RequestError) as caught:
        load_requests([GOOD | {"task": object()}])
    assert (caught.value.row, caught.value.field) == (0, "metadata.task")


def test_deep_metadata_is_refused() -> None:
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    with pytest.raises(RequestError, match="nested"):
        EditRequest(**GOOD, metadata={"a": deep})


# ---------------------------------------------------------------------- a separator of one's own


def test_a_row_may_bring_its_separator(tmp_path: Path) -> None:
    request = EditRequest.from_dict(GOOD | {"separator": "\n"})
    assert request.separator == "\n"
    assert EditRequest.from_dict(request.to_dict()) == request
    assert "separator" not in EditRequest(**GOOD).to_dict()  # files are as they were
    (tmp_path / "r.jsonl").write_text(json.dumps(GOOD | {"separator": ""}))
    assert load_requests(tmp_path / "r.jsonl")[0].separator == ""


def test_answers_that_are_to_go_are_a_list_however_they_are_named() -> None:
    assert EditRequest(**GOOD, metadata={"erase": "chess"}).unwanted == ["chess"]
    assert EditRequest.from_dict(GOOD | {"erase": "chess"}).unwanted == ["chess"]
