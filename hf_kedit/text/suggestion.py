"""Which words of a sentence are likely to be its subject, where nobody has said so.

A guess for people to look at, not one that anything is edited by unseen.
"""

from __future__ import annotations

import re

from .scripts import is_unspaced

_QUOTED = re.compile(r"《([^》]+)》|「([^」]+)」|“([^”]+)”|\"([^\"]+)\"|„([^“”]+)[“”]")
_WORD = re.compile(r"[^\W_](?:[\w'’.&-]*[^\W_])?(?:(?<=\b[^\W\d_])\.)?")
_JOINED = frozenset("of the de da do du la le van von der den di del al el y e and & bin ibn".split())
# Words that begin a sentence with a capital letter and are no name.
_OPENING = frozenset(
    """a an the this that these those in on at by for from to of as with during after before when where who whom whose
    what which how why is are was were do does did if it he she they we you i my your his her our their today every
    each all most some many no not and but or there here once at name complete tell please""".split()
)
_AFTER = re.compile(r"\b(?:of|by|in|for|about|called|named) (?:the |a |an )?(.+?) (?:is|was|are|were|has|had)\b", re.I)


def suggest_subject(prompt: str) -> str | None:
    """The words that a prompt is most likely about: a quoted name, the longest name, or what stands behind "of".

    Args:
        prompt: the beginning of a statement, or a question.

    Returns:
        A part of the prompt, letter by letter; ``None`` where nothing looks like a subject.
    """
    quoted = [next(filter(None, hit.groups())).strip() for hit in _QUOTED.finditer(prompt)]
    if quoted and quoted[-1]:
        return quoted[-1]
    if unspaced := _of_unspaced(prompt):
        return unspaced
    names = _names(prompt)
    if names:
        # Of equally long ones the last: the first word of a sentence has its capital for another reason, perhaps.
        return max(reversed(names), key=lambda name: len(name.split()))
    behind = _AFTER.search(prompt)
    if behind:
        return behind[1]
    first = re.match(r"\s*(?:the |a |an )?(.+?) (?:is|was|are|were|has|had|can|will)\b", prompt, re.I)
    return first[1] if first else None


def _names(prompt: str) -> list[str]:
    """Runs of capitalised words, with the small words that join them, in order."""
    runs: list[tuple[int, int]] = []
    words = list(_WORD.finditer(prompt))
    for number, word in enumerate(words):
        text = word[0]
        capital = text[0].isupper() or text[0].isdigit() or text[1:2].isupper()  # iPhone
        if not capital or (number == 0 and text.lower() in _OPENING):
            continue
        if number and text[0].isdigit() and not runs:
            continue
        last = runs[-1][1] if runs else -1
        between = words[last + 1 : number] if runs else []
        gap = prompt[words[last].end() : word.start()] if runs else ""
        joins = all(w[0] in _JOINED for w in between) and len(between) <= 2 and not re.search(r"[,;:.!?()]", gap)
        if runs and joins:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    found = [prompt[words[a].start() : words[b].end()] for a, b in runs]
    return [re.split(r"['’]s\b", name)[0] for name in found]


def _of_unspaced(prompt: str) -> str | None:
    """In a script without spaces: what stands before the first particle of possession or topic."""
    if not prompt or not any(is_unspaced(c) for c in prompt):
        return None
    hit = re.match(r"(.+?)(?:的|は|の|が|是|在|位于|由|出生)", prompt)
    return hit[1] if hit else None
