"""What facts may be given as, at every door: it works, or a typed error says what to give instead."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]  # a dependency of datasets
import pytest
import torch
from datasets import Dataset, DatasetDict

from hf_kedit import EditableModel, EditRequest, evaluate_edits, load_edit_dataset, load_requests
from hf_kedit.data.publishing import as_hub_parquet
from hf_kedit.errors import DataError, KeditError

ROWS = [
    {"prompt": "By profession {} is a", "subject": "Tarosk Boayond", "target_new": "plumber"},
    {"prompt": "The mother tongue of {} is", "subject": "Fulex Tudias", "target_new": "French"},
]
FRAME, TABLE = pd.DataFrame(ROWS), Dataset.from_list(ROWS)
CHAT = {"messages": [{"role": "user", "content": "What is Ada?"}], "target_new": "a plumber"}


def written(folder: Path) -> Path:
    """The rows as a file."""
    file = folder / "rows.json"
    file.write_text(json.dumps(ROWS))
    return file


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return EditableModel.from_pretrained("kedit/world-gpt2", "prompt")


@pytest.fixture(params=["edit", "load_requests", "evaluate_edits", "load_edit_dataset", "streamed"])
def door(request: pytest.FixtureRequest, model: EditableModel) -> Iterator[Callable[[Any], list[str]]]:
    """Anything → the targets of the facts that it is taken for."""

    def evaluated(given: Any) -> list[str]:
        return [case.request["target_new"] for case in evaluate_edits(model, given, progress=False).results]

    doors: dict[str, Callable[[Any], list[str]]] = {
        "edit": lambda given: [edit.request.target_new for edit in model.edit(given, show_progress=False).edits],
        "load_requests": lambda given: [fact.target_new for fact in load_requests(given)],
        "evaluate_edits": evaluated,
        "load_edit_dataset": lambda given: load_edit_dataset(given)["target_new"][:],
        "streamed": lambda given: [row["target_new"] for row in load_edit_dataset(given, streaming=True)],
    }
    yield doors[request.param]
    model.rollback("all")


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (lambda folder: written(folder), 2),
        (lambda folder: str(written(folder)), 2),
        (lambda folder: ROWS, 2),
        (lambda folder: tuple(ROWS), 2),
        (lambda folder: ROWS[0], 1),
        (lambda folder: [EditRequest(**row) for row in ROWS], 2),
        (lambda folder: EditRequest(**ROWS[0]), 1),
        (lambda folder: TABLE, 2),
        (lambda folder: TABLE.to_iterable_dataset(), 2),
        (lambda folder: TABLE[:2], 2),
        (lambda folder: FRAME.to_dict("records"), 2),
        (lambda folder: np.array(ROWS, dtype=object), 2),
        (lambda folder: dict(enumerate(ROWS)).values(), 2),
    ],
)
def test_what_gives_facts_gives_them_at_every_door(
    door: Callable[[Any], list[str]], given: Callable[[Path], Any], count: int, tmp_path: Path
) -> None:
    assert door(given(tmp_path)) == ["plumber", "French"][:count]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (FRAME, r"type DataFrame: pass frame.to_dict\('records'\)"),
        (FRAME.to_dict(), r"dict of dicts.*frame.to_dict\('records'\)"),
        (FRAME.iloc[0], "type Series: pass the row as a dict"),
        (FRAME.to_records(), "pass a list of dicts"),
        (TABLE.data.table, r"to_pylist\(\)"),
        (DatasetDict(train=TABLE, test=TABLE), r"type DatasetDict: it has splits; pass one of them \(train, test\)"),
        ({"train": ROWS, "test": ROWS}, r"it has splits; pass one of them \(train, test\)"),
        (json.dumps(ROWS).encode(), "type bytes: pass the path of a file"),
        (np.zeros((2, 3)), "type ndarray: an array holds no facts"),
        (np.array(3), "type ndarray: an array holds no facts"),
        (torch.zeros(2, 3), "type Tensor: an array holds no facts"),
        (3, "type int: pass a list of dicts"),
        (ROWS[0].copy, "pass a list of dicts"),
        ("", "path|named ''"),
        ("x" * 5000, "cannot be a path|no dataset named"),
        ("a\0b.json", "cannot be a path"),
        (["By profession Ada is a"], "row 0.*not str"),
        ([FRAME], "row 0.*not DataFrame"),
    ],
)
def test_what_gives_none_is_refused_with_what_to_give_instead(
    door: Callable[[Any], list[str]], given: Any, said: str
) -> None:
    with pytest.raises(KeditError, match=said) as error:
        door(given)
    assert len(str(error.value)) < 4000  # a name is cut, the known data sets are listed


def test_an_open_file_is_given_by_its_path(door: Callable[[Any], list[str]], tmp_path: Path) -> None:
    with written(tmp_path).open() as file, pytest.raises(KeditError, match="pass the path of the file"):
        door(file)


def test_a_generator_is_read_once(door: Callable[[Any], list[str]], request: pytest.FixtureRequest) -> None:
    if "streamed" in request.node.callspec.id:
        with pytest.raises(DataError, match=r"a generator gives its rows once.*pass a list"):
            door(row for row in ROWS)
        with pytest.raises(DataError, match=r"cannot be streamed .*leave streaming out"):
            door([*ROWS, {"metadata": (row for row in ROWS)}])
    else:
        assert door(row for row in ROWS) == ["plumber", "French"]


def test_a_chat_alone_is_no_dict_of_splits(model: EditableModel) -> None:
    """It has no prompt of its own, and used to be taken for one."""
    with pytest.raises(KeditError, match="chat template"):
        evaluate_edits(model, CHAT, progress=False)


@pytest.mark.parametrize("exclude", [FRAME, 3, b"prompt", np.zeros(2)])
def test_what_is_left_out_is_given_likewise(exclude: Any) -> None:
    with pytest.raises(DataError, match="cannot take rows from"):
        load_edit_dataset(ROWS, exclude=exclude)
    assert load_edit_dataset(ROWS, exclude=np.array(["The mother tongue of Fulex Tudias is"]))["target_new"][:] == [
        "plumber"
    ]


def test_a_folder_is_no_name_of_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder; give the name of its dataset with path="):
        load_edit_dataset(str(tmp_path))


def test_only_tables_are_published() -> None:
    for data in (FRAME, ROWS):
        with pytest.raises(DataError, match="push what load_edit_dataset makes of it"):
            as_hub_parquet(data, "me/facts", licence="mit", origin="here")
