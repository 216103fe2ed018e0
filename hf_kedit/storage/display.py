"""Numbers and texts as they are shown to people: in terminals, in Markdown, in tables.

Texts come from data sets, models and files of others. Whatever they hold, they are shown as text: nothing in them
begins a link, a heading or a table cell, moves the cursor, or turns the direction of writing around.
"""

from __future__ import annotations

import json
import re
import unicodedata

_LINE_ENDS = re.compile(r"[\s\x1c-\x1f\x85\u2028\u2029]+")
# The characters that begin something in GitHub's Markdown; an underscore inside a word begins nothing.
_MARKDOWN = re.compile(r"[\\`*\[\]|#!~$]|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def percent(value: float | None, sign: str = "") -> str:
    """A fraction of 1 as a percentage with one decimal; a dash for what does not exist.

    Args:
        value: the fraction.
        sign: put behind the number.
    """
    return "–" if value is None else f"{100 * value:.1f}{sign}"


def millions(count: int) -> str:
    """A number of parameters in words, with one decimal: ``1.5 million``, ``7.2 billion``."""
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def printable(text: str, keep: str = "\n\t") -> str:
    """The text with control characters, and those that turn the direction of writing, as visible escapes.

    Args:
        text: of any origin.
        keep: control characters that may stay.
    """
    return "".join(c if c in keep or not _is_control(c) else c.encode("unicode_escape").decode() for c in text)


def printable_json(text: str) -> str:
    """JSON with the same content, in which such characters are escapes."""
    return "".join(c if c == "\n" or not _is_control(c) else json.dumps(c)[1:-1] for c in text)


def markdown_text(text: str) -> str:
    """The text as one line of Markdown that shows exactly it: in a paragraph, a heading or a table cell."""
    line = printable(_LINE_ENDS.sub(" ", text).strip())
    line = _MARKDOWN.sub(lambda special: "\\" + special[0], line)
    return re.sub("[&<>]", lambda special: _ENTITIES[special[0]], line)


def markdown_code(text: str, *, cell: bool = False) -> str:
    """The text as one line of code in Markdown.

    Args:
        text: of any origin.
        cell: whether it stands in a table, where a bar ends a cell even inside of code.
    """
    line = printable(_LINE_ENDS.sub(" ", text).strip())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line[:1] in ("`", "") or line[-1:] == "`" else ""
    return fence + space + (line.replace("|", "\\|") if cell else line) + space + fence


def python_text(text: str) -> str:
    """The text as a string in a line of code, which it does not end, nor the block that the line stands in."""
    # Escaped when it is code already, where an escape means the character itself.
    return printable(json.dumps(text, ensure_ascii=False), keep="")


def _is_control(character: str) -> bool:
    """Whether a character acts on a terminal or on the order of others, or ends a line, instead of being shown."""
    kind = unicodedata.category(character)
    # Emoji and Indic scripts need the joiners.
    return kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and character not in "\u200c\u200d\u00ad")
