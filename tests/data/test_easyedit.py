"""EasyEdit's arguments and request dicts, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kedit.data import from_easyedit, load_edit_dataset, row_from_request, to_easyedit, to_easyedit_arguments
from hf_kedit.errors import KeditError, RequestError
from hf_kedit.requests import Probe


def test_lists() -> None:
    first, second = from_easyedit(
        prompts=["Ada Bell died in", "Bolt was founded in"],
        target_new=["Oslo", "1998"],
        ground_truth=["Bergen", "<|endoftext|>"],
        rephrase_prompts=["The place where Ada Bell died is", None],
        subject=["Ada Bell", "Bolt"],
        locality_inputs={
            "near": {"prompt": ["Jan Mol died in", None], "ground_truth": ["Rome", None]},
            "far": {
                "prompt": [["Who rows?", "Who sings?"], "Who paints?"],
                "ground_truth": [["Piet", ["Eva", "E."]], "Jan"],
            },
        },
        portability_inputs={"hop": {"prompt": ["Ada Bell died in", None], "ground_truth": ["Norway", None]}},
    )
    assert first.ground_truth == ["Bergen"] and second.ground_truth == []
    assert first.rephrase_prompts == ["The place where Ada Bell died is"] and second.rephrase_prompts == []
    assert first.locality == {
        "near": [Probe("Jan Mol died in", [["Rome"]])],
        "far": [Probe("Who rows?", [["Piet"]]), Probe("Who sings?", [["Eva"], ["E."]])],
    }
    assert second.locality == {"far": [Probe("Who paints?", [["Jan"]])]} and second.portability == {}
    assert first.portability["hop"][0].answers == ["Norway"]


def test_one_request_without_lists() -> None:
    (request,) = from_easyedit(
        "Ada Bell died in",
        "Oslo",
        ground_truth="Bergen",
        rephrase_prompts=["a", "b"],
        subject="Ada Bell",
        locality_inputs={
            "near": {"prompt": "Jan Mol died in", "ground_truth": "Rome"},
            "far": {"prompt": ["Who rows?", "Who sings?"], "ground_truth": ["Piet", "Eva"]},
            "open": {"prompt": "Who paints?"},
            "unknown": {"prompt": "Who dances?", "ground_truth": "<|endoftext|>"},
        },
    )
    assert request.rephrase_prompts == ["a", "b"]
    assert {axis: [p.answers for p in ps] for axis, ps in request.locality.items()} == {
        "near": [["Rome"]], "far": [["Piet"], ["Eva"]], "open": [[]], "unknown": [[]]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompts": ["a", "b"], "target_new": "t"}, "target_new"),
        ({"prompts": ["a", "b"], "target_new": ["t"]}, "target_new"),
        ({"prompts": {"a": 1}, "target_new": ["t"]}, "prompts"),
        ({"prompts": ["a"], "target_new": ["t"], "subject": ["s", "s"]}, "subject"),
        ({"prompts": ["a"], "target_new": ["t"], "locality_inputs": {"x": ["p"]}}, "locality_inputs"),
        ({"prompts": ["a"], "target_new": ["t"], "locality_inputs": ["p"]}, "locality_inputs"),
        (
            {"prompts": ["a"], "target_new": ["t"], "portability_inputs": {"x": {"prompt": [["p", "q"]],
                                                                               "ground_truth": [["a"]]}}},
            "portability_inputs",
        ),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as error:
        from_easyedit(**arguments)
    assert field in (error.value.field or "")


TEXT = st.text(alphabet="ab c{", min_size=1, max_size=6).filter(lambda t: t.strip() == t)
AXES = st.dictionaries(
    st.sampled_from(["near", "far"]),
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3).map(
        lambda pairs: {"prompt": [p for p, _ in pairs], "ground_truth": [a for _, a in pairs]}
    ),
)
DICTS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": TEXT,
            "target_new": TEXT,
            "ground_truth": st.none() | TEXT,
            "subject": st.none() | TEXT,
            "rephrase_prompt": st.none() | TEXT,
            "locality": AXES,
            "portability": AXES,
        }
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(dicts=DICTS)
def test_round_trips(dicts: list[dict[str, Any]]) -> None:
    """Request dicts → requests and rows → dicts; and the same through the arguments of ``edit``."""
    arguments = {
        "prompts": [d["prompt"] for d in dicts],
        "target_new": [d["target_new"] for d in dicts],
        "ground_truth": [d["ground_truth"] for d in dicts],
        "rephrase_prompts": [d["rephrase_prompt"] for d in dicts],
        "subject": [d["subject"] for d in dicts],
    }
    for section in ("locality", "portability"):
        arguments[f"{section}_inputs"] = {
            axis: {key: [d[section].get(axis, {}).get(key) for d in dicts] for key in ("prompt", "ground_truth")}
            for axis in {a for d in dicts for a in d[section]}
        }
    requests = from_easyedit(**arguments)
    assert [to_easyedit(r) for r in requests] == dicts
    rows = [row_from_request(r, dataset="x", number=i) for i, r in enumerate(requests)]
    assert [to_easyedit(row) for row in rows] == dicts
    again = to_easyedit_arguments(rows, legacy=True)
    assert from_easyedit(**again) == requests
    assert all(t is not None for t in again["ground_truth"])


def test_request_dicts_are_a_file_format(tmp_path: Path) -> None:
    value = {
        "prompt": "Ada Bell died in", "target_new": "1998", "ground_truth": None, "subject": "Ada Bell",
        "rephrase_prompt": None, "locality": {"near": {"prompt": ["Jan Mol died in"], "ground_truth": ["true"]}},
        "portability": {},
    }  # fmt: skip
    file = tmp_path / "requests.json"
    file.write_text(json.dumps([value]))
    (row,) = load_edit_dataset(file)
    assert to_easyedit(row) == value


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.recursive(
            st.none() | st.integers() | TEXT,
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["prompt", "x"]), inner),
            max_leaves=4,
        ),
        min_size=6,
        max_size=6,
    )
)
def test_anything_gives_requests_or_a_typed_error(values: list[Any]) -> None:
    prompts, target, truth, rephrased, locality, subject = values
    try:
        requests = from_easyedit(prompts, target, truth, rephrased, locality, None, subject)
    except KeditError:
        return
    assert all(r.target_new for r in requests)


def test_answers_that_are_to_go() -> None:
    rows = from_easyedit(["Ada Bell died in", "Bolt is in"], ["Oslo", "Rome"], target_neg=["Bergen", None])
    assert [row.metadata for row in rows] == [{"target_neg": "Bergen"}, {}]
    assert from_easyedit(**to_easyedit_arguments(rows)) == rows
    assert "target_neg" not in to_easyedit_arguments(rows[1:])
