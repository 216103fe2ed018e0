"""What a request may hold, read without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hf_kedit.errors import ServeError
from hf_kedit.serving.answering import TokenChance
from hf_kedit.serving.protocol import ChatRequest, Form, read_asked


def chat(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "developer", "content": "Be brief."}], **fields}
    return read_asked(json.dumps(body).encode(), ChatRequest)


@pytest.mark.parametrize(("name", "value"), [("n", True), ("n", 1.0), ("frequency_penalty", False), ("echo", 0)])
def test_what_only_equals_a_value_that_asks_for_nothing_is_refused(name: str, value: object) -> None:
    with pytest.raises(ServeError, match=f"{name}=.*not supported") as caught:
        chat(**{name: value})
    assert caught.value.param == name


def test_values_that_ask_for_nothing() -> None:
    assert chat(n=1, frequency_penalty=0.0, echo=False, tools=[], user="me").model == "m"


def test_a_developer_speaks_as_the_system() -> None:
    (message,) = chat().messages
    assert message.plain == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 3}, 3)],
)
def test_how_many_log_probabilities_are_wanted(fields: dict[str, Any], wanted: int | None) -> None:
    assert chat(**fields).top_logprobs_wanted == wanted


@pytest.mark.parametrize("count", [0, 3])
def test_likeliest_tokens_without_log_probabilities(count: int) -> None:
    with pytest.raises(ServeError, match="needs logprobs"):
        _ = chat(top_logprobs=count).top_logprobs_wanted


@pytest.mark.parametrize(
    ("fields", "said", "param"),
    [
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content: input should be",
            "messages[0].content",
        ),
        ({"temperature": "hot"}, "temperature: input should be a valid number", "temperature"),
    ],
)
def test_what_is_wrong_reads_as_a_sentence(fields: dict[str, Any], said: str, param: str) -> None:
    with pytest.raises(ServeError) as caught:
        chat(**fields)
    assert str(caught.value).startswith(said) and caught.value.param == param


def test_bytes_of_a_token_unless_it_is_a_part_of_a_character() -> None:
    form = Form({"id": "x", "created": 1, "model": "m"}, chat=True)
    chances = [TokenChance("é", -0.5, 0, (("é", -0.5), ("\ufffd", -1.0))), TokenChance("\ufffd", -2.0, 1, ())]
    (choice,) = form.piece(0, "é\ufffd", chances)["choices"]
    whole, part = choice["logprobs"]["content"]
    assert whole["bytes"] == [0xC3, 0xA9] and part["bytes"] is None
    assert [each["bytes"] for each in whole["top_logprobs"]] == [[0xC3, 0xA9], None]
