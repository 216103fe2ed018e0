"""Texts that second moments are taken over: packaged, a list, a file, a dataset, or what the model writes itself.

No corpus is ever downloaded unless the user names it. For a model that sees, a text may stand behind pictures
(`PicturedText`): the keys at their places, and behind them, are then among those that edits leave in place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.texts import packaged_texts
from ..engine.templates import STARTERS, sample_texts
from ..errors import DataError, RequestError, StatisticsError, reason_of
from ..storage.records import read_rows, rows_given
from ..text.pictures import Picture, PicturedText, as_pictured, each_pictured, pictures_of
from ..text.processors import picture_frame, shown_text
from ..tokens import context_length, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PUBLISHED = {
    "wikipedia": "wikimedia/wikipedia:20231101.en:train",
    "wikitext": "Salesforce/wikitext:wikitext-103-raw-v1:train",
}
"""What ROME's and MEMIT's hyperparameters call their text, and where it is today."""
SELF = "self"
"""The name by which a user asks for text that the model writes."""
OPENINGS = (*STARTERS, "In", "It", "She", "He", "We", "This", "On", "When", "At", "One", "For")
WRITTEN_AT_ONCE, WRITTEN_TOKENS, TEMPERATURE = 64, 64, 0.8


@dataclass(frozen=True)
class Corpus:
    """Texts with a name that goes into the cache key.

    Args:
        name: what it is, stable between runs.
        texts: returns a fresh iterator over the texts, always in the same order.
        place: folder or repository that may hold finished statistics instead of texts.
        later: ``later(n)`` iterates from text ``n`` on, for texts that cost something to make; ``None``: the first
            ``n`` are read and left aside.
        far: the texts come over a network.
    """

    name: str
    texts: Callable[[], Iterator[str]]
    place: str | None = None
    later: Callable[[int], Iterator[str]] | None = None
    far: bool = False

    def from_text(self, start: int) -> Iterator[str]:
        """The texts from number ``start`` on."""
        return islice(self.texts(), start, None) if self.later is None else self.later(start)

    def held(self, count: Callable[[str], int], tokens: int) -> Corpus:
        """The same corpus with its first texts in memory.

        Args:
            count: how many tokens a text counts for.
            tokens: how many the texts in memory have together, at least, if there are so many.
        """
        texts, left = [], tokens
        for text in self.texts():
            texts.append(text)
            left -= count(text)
            if left <= 0:
                break

        def later(start: int) -> Iterator[str]:
            yield from texts[start:]
            if left <= 0:  # there may be more
                yield from islice(self.texts(), max(start, len(texts)), None)

        return Corpus(self.name, lambda: later(0), self.place, later)


def text_corpus(texts: Sequence[str]) -> Corpus:
    """A corpus from a list of texts, named by its content."""
    digest = hashlib.sha256("\x00".join(texts).encode()).hexdigest()[:12]
    return Corpus(f"texts-{digest}", lambda: iter(texts))


def row_corpus(rows: Sequence[Any], processor: Any, root: Path | None = None) -> Corpus:
    """A corpus of rows, some of which have pictures, named by its content: texts, and pixels or the files of pictures.

    Args:
        rows: texts, or mappings with ``text`` and, where it is about pictures, ``image`` (what a request takes).
        processor: of the model; writes the pictures in front of their texts.
        root: folder that relative paths start from; ``None``: the current one.

    Raises:
        DataError: naming the first row that is neither, whose picture cannot be read, or that has one where the model
            does not see.
    """
    read: list[tuple[str, Any]] = []
    digest, folder = hashlib.sha256(), root or Path()
    for number, row in enumerate(rows):
        text, image = (row.get("text"), row.get("image")) if isinstance(row, Mapping) else (row, None)
        if not isinstance(text, str):
            raise DataError(f"row {number} of the corpus is neither a text nor a mapping with a 'text'")
        try:
            if image is not None and processor is None:
                raise RequestError("has a picture, and this model has no processor that reads it")
            kept = as_pictured(image)
            shown = each_pictured(kept)
            files = [p.digest.encode() if isinstance(p, Picture) else (folder / p).read_bytes() for p in shown]
        except (RequestError, OSError) as error:
            raise DataError(f"row {number} of the corpus: {error}") from error
        read.append((text, kept))
        digest.update(b"\x00".join([text.encode(), *(hashlib.sha256(mark).digest() for mark in files), b""]))

    def texts() -> Iterator[str]:
        for text, kept in read:  # large pictures are read one by one, when it is their turn
            yield picture_frame(processor, pictures_of(kept, root)).text(text) if kept is not None else text

    return Corpus(f"rows-{digest.hexdigest()[:12]}", texts)


def plain_texts(corpus: Corpus) -> Iterator[str]:
    """The texts of a corpus that have no pictures; of one that has no others, their words."""
    found = False
    for text in corpus.texts():
        if not isinstance(text, PicturedText):
            found = True
            yield text
    if not found:
        yield from map(shown_text, corpus.texts())


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
    """A corpus from ``datasets``: ``"org/name"`` or ``"org/name:config:split"``, streamed.

    The two names that the published hyperparameters use are understood, too: ``"wikipedia"`` and ``"wikitext"``.
    Reading its texts raises a `DataError` if the dataset cannot be read, or has no column ``text``.
    """
    name = PUBLISHED.get(name, name)
    identifier, _, rest = name.partition(":")
    config, _, split = rest.partition(":")

    def texts() -> Iterator[str]:
        from datasets import load_dataset

        try:
            for row in load_dataset(identifier, config or None, split=split or "train", streaming=True):
                if "text" not in row:
                    raise DataError(f"its columns are {', '.join(map(str, row))}, and none is called 'text'")
                text = row["text"]
                if isinstance(text, str) and text.strip():
                    yield text
        except Exception as error:  # whatever the Hub client, the network or a parser raises
            raise DataError(
                f"the text {name!r} for second moments cannot be read from the Hub: {reason_of(error)}. Name a dataset"
                " with a column 'text' as org/name or org/name:config:split, or a file of texts"
            ) from error

    label = "hub-" + name.replace("/", "--").replace(":", "-")
    return Corpus(label, texts, place=None if rest else identifier, far=True)


def shared_corpus(folder: Path) -> Corpus:
    """A folder of finished statistics in the place of a corpus."""

    def texts() -> Iterator[str]:
        raise StatisticsError(f"{str(folder)!r} holds statistics, not text")

    return Corpus(f"shared-{folder.name}", texts, place=str(folder))


def self_corpus(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Corpus:
    """Texts that the model makes up itself (seeded; `WRITTEN_AT_ONCE` at a time, each batch with its own numbers)."""

    def later(start: int) -> Iterator[str]:
        length = min(context_length(model.config) or WRITTEN_TOKENS, WRITTEN_TOKENS)
        starters = [OPENINGS[i % len(OPENINGS)] for i in range(WRITTEN_AT_ONCE)]
        for batch in count(start // WRITTEN_AT_ONCE):
            # A generator on the CPU looks at 32 bits of its seed only.
            digest = hashlib.sha256(f"{seed} {batch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
            texts = sample_texts(
                model, tokenizer, starters, length, generator, top_k=50, temperature=TEMPERATURE, description="writing"
            )
            yield from texts[start - batch * WRITTEN_AT_ONCE if start > batch * WRITTEN_AT_ONCE else 0 :]

    return Corpus(f"self-{seed}", lambda: later(0), later=later)


def packaged_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the packaged texts have."""
    return sum(len(encode_text(tokenizer, text).ids) for text in packaged_texts())


def packaged_corpus(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, more: bool) -> Corpus:
    """The texts that come with the package, and behind them, if ``more`` is wanted, what the model writes.

    Reading costs a twentieth of writing: no step per token, no head, and only the layers below the last one wanted.
    """
    texts = packaged_texts()
    packaged = text_corpus(texts)
    name = packaged.name.replace("texts-", "packaged-")
    if not more:
        return Corpus(name, packaged.texts)
    own = self_corpus(model, tokenizer)

    def later(start: int) -> Iterator[str]:
        yield from texts[start:]
        yield from own.from_text(max(start - len(texts), 0))

    return Corpus(f"{name}+{own.name}", lambda: later(0), later=later)


def resolve_corpus(source: str | Path | Sequence[Any] | None, processor: Any = None) -> Corpus | None:
    """Turn a user's choice into a corpus: a file, a list of texts or rows, a dataset id, or ``None``.

    A file of texts has one in every line; of a model that sees, a JSONL file may have rows with pictures instead.

    Args:
        source: the choice.
        processor: of a model that sees.

    Raises:
        DataError: if a named file does not exist, or a row cannot be used.
    """
    if source is None:
        return None
    if not isinstance(source, (str, Path)):
        rows = list(rows_given(source))
        return text_corpus(rows) if all(isinstance(row, str) for row in rows) else row_corpus(rows, processor)
    if not str(source).strip():
        raise DataError("the name of the corpus is empty; name a file, a folder or a data set, or leave it out")
    path = Path(source)
    if os.path.isfile(path):
        if processor is not None and path.suffix == ".jsonl":
            return row_corpus(list(read_rows(path)), processor, path.parent)
        return file_corpus(path)
    if os.path.isdir(path):
        return shared_corpus(path)
    if path.suffix in (".txt", ".jsonl", ".json") or str(source).startswith((".", "/", "~")):
        raise DataError(f"there is no corpus file {str(source)!r}")
    return hub_corpus(str(source))
