"""Edit requests: every bad row gets a typed error that names row and field; text survives unharmed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_kedit import EditRequest, KeditError, Probe, load_requests
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
        ("a.parquet", b"x", "use .json"),
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
    assert filled.subject_span() == (0, 3)


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
