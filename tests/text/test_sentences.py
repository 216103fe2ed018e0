"""The beginning of an answer, as pages and terminals show it."""

import pytest

from hf_kedit.text.sentences import opening


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Rome. It is", "Rome"),
        ("Rome", "Rome"),
        ("Rome.", "Rome"),
        ("Really?! Yes", "Really?"),
        ("a\nb", "a"),
        ("\n\nRome is old. So", "Rome is old"),
        ("the U.S. Senate. And", "the U.S"),
        ("3.14 is pi. Yes", "3.14 is pi"),
        ("born in 1990. He", "born in 1990"),
        ("罗马。它", "罗马"),
        (". Rome", ""),
        ("", ""),
    ],
)
def test_the_opening_of_a_text(text: str, first: str) -> None:
    assert opening(text) == first


def test_a_long_sentence_is_cut() -> None:
    assert opening("a city by the sea. It", 6) == "a city…"
    assert opening("a city. By the sea", 6) == "a city"
