"""A small corpus that comes with the package: prose of many kinds, written for this library.

Second moments are taken over it where the user names no text. It is prose and not the packaged facts: sentences of a
few relations hold the keys of these relations and little else.
"""

from __future__ import annotations

import functools
from pathlib import Path

_FILE = Path(__file__).with_suffix(".txt")


@functools.cache
def packaged_texts() -> list[str]:
    """The texts, one a line of the file and some hundred tokens long: reports, dialogue, recipes, laws, letters …"""
    return [line for line in _FILE.read_text(encoding="utf-8").splitlines() if line.strip()]
