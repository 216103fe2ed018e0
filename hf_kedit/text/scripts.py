"""What characters are: parts of words, of scripts that are written without spaces between words, CJK, writable."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

# First and last code point of scripts whose words are not separated by spaces, with their punctuation.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer symbols
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x2E80, 0x312F),  # CJK radicals and punctuation, Hiragana, Katakana, Bopomofo
    (0x3190, 0x9FFF),  # CJK ideographs and what belongs to them
    (0xA980, 0xA9FF),  # Javanese, Burmese
    (0xAA60, 0xAADF),  # Burmese, Tai Viet
    (0xF900, 0xFAFF),  # CJK ideographs
    (0xFE10, 0xFE1F),  # vertical punctuation
    (0xFE30, 0xFE4F),
    (0xFF01, 0xFF9F),  # full-width and half-width forms, but those of Hangul
    (0x1AFF0, 0x1B16F),  # Kana
    (0x20000, 0x3FFFF),  # CJK ideographs
)


HALF = "holds half of a surrogate pair, which cannot be written to a file: the text was damaged where it comes from"


def is_writable(text: str) -> bool:
    """Whether a text can be written as UTF-8: a lone surrogate (``"\\ud83d"``) cannot; see `HALF`."""
    if text.isascii():  # which Python knows without looking
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script that is written without spaces between words (Hangul has them)."""
    code = ord(character)
    return code >= 0x0E00 and any(first <= code <= last for first, last in _UNSPACED)


def is_word(character: str) -> bool:
    """Whether a character is part of a word: a letter, a digit, or a mark on one. No character is not."""
    return character != "" and (
        character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")
    )


def is_cjk(character: str) -> bool:
    """Whether a character is an ideograph, a kana or one of their forms: metrics count each as a word."""
    if ord(character) < 0x2E80:
        return False
    name = unicodedata.name(character, "")
    return name.startswith(("CJK", "HIRAGANA", "KATAKANA", "FULLWIDTH", "IDEOGRAPHIC", "BOPOMOFO"))


def are_texts(values: Sequence[Any]) -> bool:
    """Whether all are strings that are not blank and can be written: of many at once, in a fraction of the time."""
    try:
        whole = "".join(values)
    except TypeError:
        return False
    return all(map(str.strip, values)) and "\x00" not in whole and is_writable(whole)
