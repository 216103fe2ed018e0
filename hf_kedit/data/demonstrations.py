"""Edits that come with the package for IKE to show a model: ``load_edit_dataset("demonstrations/en")`` and ``…/zh``.

``demonstrations.yaml`` holds, in our own words, about forty facts a language with an untrue answer, another wording,
and something else that stays as it is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..requests import SLOT, EditRequest, load_requests
from ..storage.parsing import parse_yaml
from .features import blank, probe
from .loading import register_dataset

_FILE = Path(__file__).with_suffix(".yaml")
LANGUAGES = ("en", "zh")
_HAN = re.compile("[\u4e00-\u9fff]")
_KANA_OR_HANGUL = re.compile("[\u3040-\u30ff\uac00-\ud7af]")


def language_of(text: str) -> str:
    """``"zh"`` for texts with Chinese characters and none of Japanese's or Korean's own, else ``"en"``."""
    return "zh" if _HAN.search(text) and not _KANA_OR_HANGUL.search(text) else "en"


@functools.cache
def packaged_demonstrations(language: str) -> tuple[EditRequest, ...]:
    """The packaged edits of a language."""
    return tuple(load_requests([{**row, "id": None} for row in _rows(language)]))


@functools.cache
def _read() -> dict[str, list[list[str]]]:
    content: dict[str, list[list[str]]] = parse_yaml(_FILE.read_bytes(), _FILE.name, DataError)
    return content


def _rows(language: str) -> Iterator[dict[str, Any]]:
    name = f"demonstrations/{language}"
    for number, (prompt, subject, target, rephrase, near, answer) in enumerate(_read()[language]):
        yield blank(
            id=f"{name}/{number}",
            dataset=name,
            prompt=prompt.replace(SLOT, subject),
            subject=subject,
            target_new=target,
            rephrase_prompts=[rephrase],
            locality=[probe("other", near, [[answer]])],
        )


def _register(language: str) -> None:
    @register_dataset(f"demonstrations/{language}", splits=("train",), default_split="train")
    def load(split: str, *, path: Path | None = None, seed: int | None = None) -> Iterator[dict[str, Any]]:
        yield from _rows(language)


for _language in LANGUAGES:
    _register(_language)
