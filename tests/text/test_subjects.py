"""Where the subject of a fact stands."""

from __future__ import annotations

import logging
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_kedit import EditRequest
from hf_kedit.text.subjects import find_subject, last_user_turn

CHATML = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
)
LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are SmolLM.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA2 = "<s>[INST] <<SYS>>\nYou are SmolLM.\n<</SYS>>\n\n{user} [/INST]"
GEMMA = (
    "<bos><start_of_turn>user\nI like SmolLM.<end_of_turn>\n<start_of_turn>model\nOh.<end_of_turn>\n"
    "<start_of_turn>user\n{user}<end_of_turn>\n<start_of_turn>model\n"
)
PHI = "<|system|>\nYou are SmolLM.<|end|>\n<|user|>\n{user}<|end|>\n<|assistant|>\n"
DEEPSEEK = "<｜begin▁of▁sentence｜>You are SmolLM.<｜User｜>{user}<｜Assistant｜>"
COHERE = (
    "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>You are SmolLM.<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{user}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
)
HARMONY = "<|start|>system<|message|>You are SmolLM.<|end|><|start|>user<|message|>{user}<|end|><|start|>assistant"
VICUNA = "A chat between a user and SmolLM. USER: {user} ASSISTANT:"
ALPACA = "SmolLM answers.\n\n### Instruction:\n{user}\n\n### Response:\n"
TRANSCRIPT = "SmolLM talks.\nUser: SmolLM?\nAssistant: Yes.\nUser: {user}\nAssistant:"
CHATS = [CHATML, LLAMA3, LLAMA2, GEMMA, PHI, DEEPSEEK, COHERE, HARMONY, VICUNA, ALPACA, TRANSCRIPT]


@pytest.mark.parametrize(
    ("prompt", "subject", "span"),
    [
        ("Unlike Indiana, the capital of India is", "India", (31, 36)),
        ("Annual report by Ann was about", "Ann", (17, 20)),
        ("Romeo was born in Rome, a city of", "Rome", (18, 22)),
        ("Niger and Nigeria: the capital of Niger is", "Nigeria", (10, 17)),
        ("Niger and Nigeria: the capital of Niger is", "Niger", (34, 39)),
        ("The Iranian president is", "Iran", (4, 8)),
        ("Iranian and Iranians are", "Iran", (0, 4)),
        ("日本人は日本で", "日本", (0, 2)),
        ("iPhone12和iPhone的价格是", "iPhone", (9, 15)),
        ("Unlike ROMEO, ROME is", "Rome", (14, 18)),  # as a word in another case before inside a word in this one
        ("Cafe\u0301s and the cafe\u0301 of", "café", (15, 20)),
        ("The Straßenbahn in the STRASSE is", "Straße", (23, 30)),
        ("O'Neill's book", "O'Neill", (0, 7)),
        ("Austria, unlike Austria-Hungary, is", "Austria", (0, 7)),
        ("Austro-Hungary was", "Hungary", (7, 14)),
        ("the C++ and C standards", "C", (12, 13)),
        ("the C and C++ standards", "C", (4, 5)),
        ("F, unlike F#, is", "F", (0, 1)),
        ("O'Neil and Neil went; O'Neil is", "Neil", (11, 15)),
        ("Ann, and Ann's dog", "Ann", (9, 12)),
        ("R, not R&B, is", "R", (0, 1)),
        ("Rome, not rome.org, is", "Rome", (0, 4)),
        ("Python 3, unlike Python 3.12, is", "Python 3", (0, 8)),
        ("Route 1, not route 1,000, is", "Route 1", (0, 7)),
        ("Route 1, or route 1, is", "Route 1", (0, 7)),
        ("about (Paris)", "Paris", (7, 12)),
        ("cafe\u0301 and cafe", "cafe", (10, 14)),
        ("0\u0300 then 01", "0", (0, 1)),  # no letter of its own, with or without an accent that has no composed form
    ],
)
def test_the_right_occurrence(prompt: str, subject: str, span: tuple[int, int]) -> None:
    assert EditRequest(prompt=prompt, subject=subject, target_new="x").subject_span() == span


@pytest.mark.parametrize("chat", CHATS)
def test_the_last_user_turn_goes_first(chat: str) -> None:
    """The system prompt and earlier turns name the subject too; so may what the answer begins with."""
    user = "Who made SmolLM, and when?"
    prompt = chat.replace("{user}", user) + "SmolLM was"
    start = prompt.rindex(user)
    assert find_subject(prompt, "SmolLM") == (start + 9, start + 15)
    turn = last_user_turn(prompt)
    assert turn is not None and prompt[slice(*turn)].strip() == user


@pytest.mark.parametrize("chat", CHATS)
def test_what_the_user_does_not_say_is_found_elsewhere(chat: str) -> None:
    prompt = chat.replace("{user}", "Who are you?")
    span = find_subject(prompt, "SmolLM")
    assert span is not None and prompt[slice(*span)] == "SmolLM"
    assert find_subject(prompt, "Mistral") is None


@pytest.mark.parametrize("prompt", ["The user said: Ada", "A < b > c", "I use <b>html</b>", "users: Ada"])
def test_plain_text_has_no_turns(prompt: str) -> None:
    assert last_user_turn(prompt) is None


def test_several_words_of_its_own_give_one_hint(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_kedit.logging._said", set())
    with caplog.at_level(logging.WARNING, logger="hf_kedit"):
        assert find_subject("Ada knows Ada", "Ada") == (10, 13)
        assert find_subject("Bob knows Bob", "Bob") == (10, 13)
        assert find_subject("Bob knows Ada", "Bob") == (0, 3)
    (said,) = [r.getMessage() for r in caplog.records]
    assert "{}" in said


@given(st.text(min_size=1), st.text(), st.text())
def test_what_is_found_is_the_subject(subject: str, before: str, after: str) -> None:
    span: Any = find_subject(before + subject + after, subject)
    assert _one_form((before + subject + after)[slice(*span)]) == _one_form(subject)


def _one_form(text: str) -> str:
    """What two spellings of a name share: case, Unicode form and the kind of white space aside."""
    return unicodedata.normalize("NFC", " ".join(unicodedata.normalize("NFC", text).split()).casefold())
