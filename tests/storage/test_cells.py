"""What JSON would not give back as it was is refused, with the place in the value and what to write instead."""

from __future__ import annotations

import datetime
from typing import Any, NoReturn

import pytest
import torch

from hf_kedit.storage.cells import check_plain
from hf_kedit.storage.parsing import LEVELS


class Refused(Exception):
    """What was said."""


def fail(problem: str, name: str) -> NoReturn:
    raise Refused(name, problem)


def nested(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "place", "problem"),
    [
        (torch.ones(1), "m", "a Tensor cannot be saved as it is; write text or plain numbers"),
        (datetime.date(2020, 1, 1), "m", "a date cannot be saved as it is; write text or plain numbers"),
        ({"a": [1, (2, 3)]}, "m.a[1]", "a tuple cannot be saved as it is; write a list"),
        ([{"a": {"b": {1}}}], "m[0].a.b", "a set cannot be saved as it is; write text or plain numbers"),
        ({"a": [10**300]}, "m.a[0]", "a number has more than 300 digits"),
        ({"a": {3: 4}}, "m.a", "the key 3 would come back from a file as text; write it as text"),
    ],
)
def test_what_is_refused(value: Any, place: str, problem: str) -> None:
    with pytest.raises(Refused) as found:
        check_plain("m", value, fail)
    assert found.value.args == (place, problem)


@pytest.mark.parametrize("value", ["\ud83d", ["\ud83d"], {"\ud83d": 1}, {"a": [{"b": "x\udc00"}]}])
def test_half_of_a_character(value: Any) -> None:
    with pytest.raises(Refused):
        check_plain("m", value, fail)


def test_how_deep_a_value_may_be() -> None:
    check_plain("m", nested(LEVELS), fail)
    with pytest.raises(Refused, match=f"more than {LEVELS} levels"):
        check_plain("m", nested(LEVELS + 1), fail)


def test_what_is_taken() -> None:
    check_plain("m", {"a": [None, True, 1, 0.5, "x", {"b": []}], "": {}}, fail)
