"""A small corpus that comes with the package: prose of many kinds, and the packaged facts said in sentences.

Second moments are taken over it where the user names no text. Everything in it was written for this library.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

from .facts import filled, get_facts

_FILE = Path(__file__).with_suffix(".txt")


@functools.cache
def packaged_texts() -> list[str]:
    """The texts, always in the same order; each holds one to some two hundred tokens.

    Kinds are mixed, so that whoever reads only the beginning has some of each.
    """
    texts = [line for line in _FILE.read_text(encoding="utf-8").splitlines() if line.strip()]
    facts = get_facts()
    for relation in facts.relations.values():
        for name, answer in relation.facts.items():
            texts.append(" ".join(f"{filled(template, name)} {answer}." for template in relation.statements))
    random.Random("hf_kedit texts").shuffle(texts)
    return texts
