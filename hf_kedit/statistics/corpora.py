"""Texts that second moments are taken over: a list, a file, a dataset, or what the model writes itself.

No corpus is ever downloaded unless the user names it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..engine.templates import STARTERS, sample_texts
from ..errors import DataError, StatisticsError
from ..tokens import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Corpus:
    """Texts with a name that goes into the cache key.

    Args:
        name: what it is, stable between runs.
        texts: returns a fresh iterator over the texts, always in the same order.
        place: folder or repository that may hold finished statistics instead of texts.
    """

    name: str
    texts: Callable[[], Iterator[str]]
    place: str | None = None


def text_corpus(texts: Sequence[str]) -> Corpus:
    """A corpus from a list of texts, named by its content."""
    digest = hashlib.sha256("\x00".join(texts).encode()).hexdigest()[:12]
    return Corpus(f"texts-{digest}", lambda: iter(texts))


def file_corpus(path: Path) -> Corpus:
    """A corpus from a text file; every non-empty line is one text.

    Raises:
        DataError: if the file is missing or unreadable.
    """
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise DataError(f"cannot read the corpus {str(path)!r}: {error}") from error

    def lines() -> Iterator[str]:
        with path.open(encoding="utf-8") as handle:
            for line in handle:
                if line.strip():
                    yield line.rstrip("\n")

    return Corpus(f"file-{path.stem}-{digest}", lines)


def hub_corpus(name: str) -> Corpus:
    """A corpus from ``datasets``: ``"org/name"`` or ``"org/name:config:split"``, streamed."""
    identifier, _, rest = name.partition(":")
    config, _, split = rest.partition(":")

    def texts() -> Iterator[str]:
        from datasets import load_dataset

        for row in load_dataset(identifier, config or None, split=split or "train", streaming=True):
            text = row.get("text")
            if isinstance(text, str) and text.strip():
                yield text

    return Corpus("hub-" + name.replace("/", "--").replace(":", "-"), texts, place=None if rest else identifier)


def shared_corpus(folder: Path) -> Corpus:
    """A folder of finished statistics in the place of a corpus."""

    def texts() -> Iterator[str]:
        raise StatisticsError(f"{str(folder)!r} holds statistics, not text")

    return Corpus(f"shared-{folder.name}", texts, place=str(folder))


def self_corpus(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Corpus:
    """Texts that the model makes up itself (top-50 sampling, seeded)."""

    def texts() -> Iterator[str]:
        generator = torch.Generator().manual_seed(seed)
        length = min(context_length(model.config) or 64, 64)
        starters = [*STARTERS, "In", "It", "She", "He", "We", "This", "On", "When", "At", "One", "For"]
        while True:
            yield from sample_texts(model, tokenizer, starters, length, generator, top_k=50)

    return Corpus(f"self-{seed}", texts)


def resolve_corpus(source: str | Path | Sequence[str] | None) -> Corpus | None:
    """Turn a user's choice into a corpus: a text file, a list of texts, a dataset id, or ``None``.

    Raises:
        DataError: if a named file does not exist.
    """
    if source is None:
        return None
    if not isinstance(source, (str, Path)):
        return text_corpus(list(source))
    path = Path(source)
    if path.is_file():
        return file_corpus(path)
    if path.is_dir():
        return shared_corpus(path)
    if path.suffix in (".txt", ".jsonl", ".json") or str(source).startswith((".", "/", "~")):
        raise DataError(f"there is no corpus file {str(source)!r}")
    return hub_corpus(str(source))
