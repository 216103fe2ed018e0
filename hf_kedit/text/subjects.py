"""Where the subject of a fact stands in its prompt.

An edit is written at the subject's tokens, so the wrong place is a wrong edit that looks right: the new target comes
out, and nothing else changes as it should. Names occur inside other words ("Rome" in "Romeo") and more than once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache

from ..logging import get_logger, warn_once
from .scripts import is_unspaced, is_word

logger = get_logger(__name__)
Span = tuple[int, int]

_JOINERS = "-\u2010\u2011&@."  # Austria-Hungary, AT&T, rome.org, Python 3.12
# Where a user's turn begins: a marker of a chat template that names the role, or a line of a plain transcript.
_USER = re.compile(
    r"<[|｜]?(?:im_start|start_header_id|header_start|start_of_role|start_of_turn|start)[|｜]?>\s*(?:user|human)\b"
    r"(?:<[|｜][^<>\n]*[|｜]>)?"  # <|start_header_id|>user<|end_header_id|>
    r"|<[|｜]_?(?:user|human|prompter)(?:_token)?[|｜]>"  # <|user|>, <｜User｜>, <|USER_TOKEN|>
    r"|\[INST\](?:\s*<<SYS>>.*?<</SYS>>)?"
    r"|^(?:(?:user|human)\s*:|\#{2,}\s*(?:user|human|instruction|question)\b:?)"
    r"|(?-i:\bUSER:)",
    flags=re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
# Where it ends: any marker of a template, or the next speaker's line.
_TURN_END = re.compile(
    r"<[|｜][^<>\n]*[|｜]>|</?(?:s|start_of_turn|end_of_turn)>|\[/?INST\]"
    r"|^(?:[A-Z]\w*\s*:|\#{2,}\s*\w)|\bASSISTANT:",
    flags=re.MULTILINE,
)


def last_user_turn(prompt: str) -> Span | None:
    """Span of what the user says last in a prompt that is formatted as a chat; ``None`` if it is not."""
    begin = None
    for begin in _USER.finditer(prompt):  # noqa: B007
        pass
    if begin is None:
        return None
    end = _TURN_END.search(prompt, begin.end())
    return begin.end(), end.start() if end else len(prompt)


@lru_cache(maxsize=1024)  # each of a request's context templates asks
def find_subject(prompt: str, subject: str) -> Span | None:
    """Find a subject in a prompt.

    The last user turn of a chat goes first. There, an occurrence as a word of its own goes before one that a sign
    joins to more (Austria-Hungary, O'Neil, C++), and that before one inside a word; each literally, then regardless of
    case, then regardless of Unicode form and of how much white space stands between the words. Of several words of its
    own the last one counts, because prompts end with what is asked; of several inside words, the first. Scripts
    without spaces have no words to compare, and there the first one counts.

    Returns:
        The character span in ``prompt``, or ``None``.
    """
    turn = last_user_turn(prompt)
    for first, end in ([turn] if turn else []) + [(0, len(prompt))]:
        span = _find(prompt[first:end], subject)
        if span is not None:
            return first + span[0], first + span[1]
    return None


def _find(text: str, subject: str) -> Span | None:
    stages: list[Callable[[str, str], Iterator[Span]]] = [_literal, _ignoring_case, _normalised]
    spans: dict[Callable[[str, str], Iterator[Span]], list[Span]] = {}
    for apart in (_is_word, _is_joined):
        for stage in stages:
            if stage not in spans:  # most subjects are found by the first, which is the quickest
                spans[stage] = list(stage(text, subject))
            own = [span for span in spans[stage] if apart(text, span)]
            if len(own) > 1:
                warn_once(logger, "a subject occurs more than once in its prompt: the last one counts; '{}' decides")
            if own:
                return own[-1]
    return next((found[0] for found in spans.values() if found), None)


def _is_word(text: str, span: Span) -> bool:
    """Whether a span begins and ends where words do, and no sign makes it a part of a longer name."""
    return _is_joined(text, span) and not _goes_on(text, span[0] - 1, -1) and not _goes_on(text, span[1], 1)


def _is_joined(text: str, span: Span) -> bool:
    """Whether a span begins and ends where words do."""
    start, end = span
    before, after = text[start - 1 : start], text[end : end + 1]
    return _apart(before, text[start]) and _apart(text[end - 1], after)


def _apart(left: str, right: str) -> bool:
    """Whether a word may end between two neighbours."""
    if not left or not right:
        return True
    if unicodedata.category(right).startswith("M"):  # a mark belongs to the letter before it
        return False
    if not (is_word(left) and is_word(right)):
        return True
    return is_unspaced(left) != is_unspaced(right)


def _goes_on(text: str, at: int, step: int) -> bool:
    """Whether the character at a place, outwards of a span by ``step``, joins it to what stands beyond."""
    beyond = at + step
    if not 0 <= at < len(text):
        return False
    if step > 0 and text[at] in "+#":  # C++, C#
        return True
    if not (0 <= beyond < len(text) and is_word(text[beyond])):
        return False
    if text[at] == ",":  # 1,000
        return text[beyond].isdigit() and text[at - step].isdigit()
    return text[at] in _JOINERS or (step < 0 and text[at] in "'’")  # O'Neil, but not Ann's


def _literal(text: str, subject: str) -> Iterator[Span]:
    start = text.find(subject)
    while start >= 0:
        yield start, start + len(subject)
        start = text.find(subject, start + 1)


def _ignoring_case(text: str, subject: str) -> Iterator[Span]:
    wanted = r"\s+".join(re.escape(word) for word in subject.split())
    for hit in re.finditer(f"(?=({wanted}))", text, flags=re.IGNORECASE) if wanted else ():
        yield hit.span(1)


def _normalised(text: str, subject: str) -> Iterator[Span]:
    """Unicode forms can change lengths: search the composed text, and map spans back character by character."""
    composed: list[str] = []
    origin: list[Span] = []
    for cluster in re.finditer(r"\S[\u0300-\u036f]*|\s+", text):
        whole = " " if cluster.group().isspace() else unicodedata.normalize("NFC", cluster.group())
        for character in whole.casefold():  # which may be several: ß is ss
            composed.append(character)
            origin.append(cluster.span())
    wanted = " ".join(unicodedata.normalize("NFC", word) for word in subject.split()).casefold()
    for start, end in _literal("".join(composed), wanted) if wanted else ():
        # Half a cluster is another letter: the first "s" of ß, or an "0" without the accent that has no composed form.
        if not (_in_one(origin, start - 1, start) or _in_one(origin, end - 1, end)):
            yield origin[start][0], origin[end - 1][1]


def _in_one(origin: list[Span], left: int, right: int) -> bool:
    """Whether two neighbouring characters of the composed text stem from the same cluster."""
    return left >= 0 and right < len(origin) and origin[left] == origin[right]
