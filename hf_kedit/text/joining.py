"""What stands between a prompt and its target: a space, or nothing.

A wrong space costs much and is not seen: behind ``She said: "`` a model expects ``I`` without one, and finds it
unlikely with one, before and after any edit.
"""

from __future__ import annotations

import re
import unicodedata

from .scripts import is_cjk, is_unspaced, is_word

_OPENING = "([{«“‘‹„‚¿¡"
_OPENING_NAMES = ("Ps", "Pi")  # Unicode's categories of opening brackets and quotes
_MARKS = ("Mn", "Me")  # those of characters that are put on the one before
# How a prompt ends behind which a target follows directly.
_PROMPT = re.compile(
    r"<[|｜][^<>\n]*[|｜]>$"  # a marker of a chat template
    r"|(?:\w+://|\bwww\.)\S*[./?&=#:%_~-]$"  # inside an address
    r"|(?:^|\s)[#~]$|[@\\]$"  # before a tag, about a number, inside an address or a path
    r"|(?:^|[^\d\s)]\s+|\n)(?:\*\*|__|~~)$"  # where Markdown makes bold or strikes out
    r"|\S[-\u2010\u2011\u2013\u2014\u2212×÷=≈≠≤≥/^&]$|\S[-=]>$|[\d)][+*<>]$"  # a sign without a space before it
)
# A prompt's end and a target's beginning that are parts of one number, word or sign.
_PAIRS = (
    (r"[+\-\u2212±]$", r"\d", r"(?:^|[^\s\d)])\s*[+\-\u2212±]$"),  # a sign, with no number before it
    (r"\d\.$", r"\d", ""),  # 3. + 14
    (r"\d,$", r"\d{3}(?!\d)", ""),  # 12, + 500
    (r"\d:$", r"\d\d(?!\d)", ""),  # 10: + 30
    (r"\d$", r"[%‰°′″]|-[^\W\d]", ""),  # 20 + %, 5 + -year-old
    (r"°$", r"[CFK]\b", ""),
    (r"\w$", r"['’](?:s|re|ll|ve|d|m|t)\b|\.[a-z]|/\w", ""),  # Ann + 's, example + .org
    (r"\w['’]$", r"(?:s|re|ll|ve|d|m|t)\b", ""),
)


def separator_between(prompt: str, target: str) -> str:
    """Return what joins prompt and target: one space, or nothing where a space would be wrong.

    There is none beside white space; in and behind scripts that are written without spaces, and before CJK; behind an
    opening bracket or quote, a currency sign or an operator that binds the target, inside addresses and numbers; and
    before closing punctuation.
    """
    while prompt and unicodedata.category(prompt[-1]) in _MARKS:  # vowel signs and accents are a part of their letter
        prompt = prompt[:-1]
    if not prompt or not target:
        return ""
    last, first = prompt[-1], target[0]
    if (last + first).isascii() and last.isalnum() and first.isalnum():
        return " "  # as all that follows would find, in a tenth of the time
    if last.isspace() or first.isspace() or _is_joiner(last) or _is_joiner(first):
        return ""
    if unicodedata.category(first) in _MARKS:
        return ""
    if is_cjk(first) or is_unspaced(last) or _letter_before(prompt, last):
        return ""
    if _opens(prompt, last) or _closes(target, first) or _PROMPT.search(prompt):
        return ""
    if unicodedata.category(last) == "Sc" and first.isdigit():
        return ""
    return "" if any(_one(prompt, target, *pair) for pair in _PAIRS) else " "


def _is_joiner(character: str) -> bool:
    """Whether a character is a zero-width space, or joins others."""
    return unicodedata.category(character) == "Cf"


def _letter_before(prompt: str, last: str) -> bool:
    """Whether the prompt ends with punctuation of more than ASCII behind a script without spaces."""
    if is_word(last) or last.isascii():
        return False
    letter = next((c for c in reversed(prompt) if is_word(c)), "")
    return bool(letter) and is_unspaced(letter)


def _opens(prompt: str, last: str) -> bool:
    """Whether a prompt ends with an opening bracket or quote."""
    if last in "\"'`":  # the same sign closes: it opens if it is not yet closed, and no word ends there
        before = prompt[-2:-1]
        alone = not before or before.isspace() or unicodedata.category(before) in _OPENING_NAMES
        return alone or (last != "'" and prompt.count(last) % 2 == 1 and not is_word(before))
    return last in _OPENING or unicodedata.category(last) in _OPENING_NAMES


def _closes(target: str, first: str) -> bool:
    """Whether a target begins with punctuation that closes what came before."""
    if unicodedata.category(first) in ("Pe", "Pf") and first != "’":
        return True
    return first in ",.;:!?…" and not is_word(target[1:2]) and target[1:2] not in ("(", ")", "-")


def _one(prompt: str, target: str, end: str, begin: str, context: str) -> bool:
    """Whether a prompt's end and a target's beginning match a pair of `_PAIRS`."""
    return bool(re.search(end, prompt) and re.match(begin, target) and (not context or re.search(context, prompt)))
