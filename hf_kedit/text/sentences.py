"""Where the beginning of a text ends that is shown instead of the whole."""

from __future__ import annotations

import re

OPENING = 60
"""Characters of an answer that stands within a line of something else."""
# A full stop before a letter or digit ("3.14", "U.S") ends nothing; Chinese writes no spaces behind its own.
_END = re.compile(r"[.?!](?=\s|$)|[。？！]|\n")


def opening(text: str, most: int | None = None) -> str:
    """The first sentence of what a model wrote, without the mark that ends it.

    Args:
        text: a continuation; white space in front of it does not count.
        most: characters that fit; a longer sentence is cut, and ends with ``…``.

    Returns:
        One line; empty where nothing stands before the first end of a sentence.
    """
    sentence = _END.split(text.strip(), maxsplit=1)[0].strip()
    return sentence if most is None or len(sentence) <= most else f"{sentence[:most]}…"
