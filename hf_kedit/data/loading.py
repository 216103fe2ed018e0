"""Load edit requests by name or from a file: ``load_edit_dataset``, and the registry behind it.

A loader is a generator of rows (see :mod:`hf_kedit.data.features`) registered under a name with
:func:`register_dataset`. What all datasets share is done here, once: choosing the split, checking names, dropping
rows without a target, conflicts, exclusion, the limit, and building the ``datasets.Dataset``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict

from hf_kedit.data.features import FEATURES, row_from_request
from hf_kedit.errors import DataError, RequestError, nearest
from hf_kedit.logging import get_logger
from hf_kedit.requests import EditRequest, read_rows

logger = get_logger(__name__)

Loader = Callable[..., Iterable[dict[str, Any]]]
FILE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv")


@dataclass(frozen=True)
class DatasetEntry:
    """A registered dataset: its loader, its splits, and the split that is meant when none is named."""

    name: str
    loader: Loader
    splits: tuple[str, ...]
    default_split: str

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the loader's own keyword arguments."""
        return tuple(p for p in inspect.signature(self.loader).parameters if p not in ("split", "path", "seed"))


_REGISTRY: dict[str, DatasetEntry] = {}


def register_dataset(
    name: str, *, splits: tuple[str, ...] = ("test",), default_split: str = "test"
) -> Callable[[Loader], Loader]:
    """Register a loader (use as a decorator).

    The loader is called as ``loader(split, path=…, seed=…, **options)`` and yields rows that have all columns of
    ``FEATURES``; ``path`` and ``seed`` are None unless the user gave them.

    Args:
        name: the name for :func:`load_edit_dataset`; case does not matter.
        splits: which splits there are.
        default_split: the one that is loaded when the user names none.

    Raises:
        DataError: the name is taken, or the default split is not one of the splits.
    """
    if name.lower() in _REGISTRY:
        raise DataError(f"A dataset named {name!r} is registered already.")
    if default_split not in splits:
        raise DataError(f"The default split {default_split!r} is not one of {', '.join(splits)}.")

    def decorate(loader: Loader) -> Loader:
        _REGISTRY[name.lower()] = DatasetEntry(name, loader, tuple(splits), default_split)
        return loader

    return decorate


def dataset_names() -> list[str]:
    """Return the names of all registered datasets."""
    return sorted(entry.name for entry in _REGISTRY.values())


def dataset_entry(name: str) -> DatasetEntry:
    """Return the registered dataset of this name.

    Raises:
        DataError: there is none.
    """
    try:
        return _REGISTRY[name.lower()]
    except KeyError:
        raise DataError(
            f"There is no dataset named {name!r}.{nearest(name, _REGISTRY)} "
            f"Known: {', '.join(dataset_names())}; or give the path of a .json, .jsonl or .csv file."
        ) from None


def load_edit_dataset(
    name: str | Path | None = None,
    split: str | None = None,
    path: str | Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    *,
    drop_conflicts: Literal["first", "last"] | None = None,
    exclude: Iterable[Any] | None = None,
    **options: Any,
) -> Dataset | DatasetDict:
    """Load edit requests as a table with the columns of :data:`hf_kedit.data.FEATURES`.

    Args:
        name: a registered dataset (:func:`dataset_names`), or the path of a JSON, JSONL or CSV file whose rows have
            those columns or the fields of :class:`hf_kedit.EditRequest`.
        split: name of the split; the dataset's default one (mostly ``"test"``) if None; ``"all"`` for a
            ``DatasetDict`` of all splits.
        path: file or folder for a registered dataset that reads one; or, without ``name``, the file to load.
        limit: take the first so many rows.
        seed: for datasets that draw at random; None for their standard rows.
        drop_conflicts: what to do with rows that have the same prompt but another target: keep all (None), or only
            the ``"first"`` or ``"last"`` of each.
        exclude: prompts, or rows with a ``"prompt"`` (another dataset), that must not occur.
        options: further arguments of the dataset's loader.

    Returns:
        A ``datasets.Dataset``; a ``DatasetDict`` for ``split="all"``. Rows are never shuffled.

    Raises:
        DataError: unknown dataset, split or option; unreadable file; nothing left.
        RequestError: a row of a file is not a usable request (names row and field).
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, not {limit}.")
    if drop_conflicts not in (None, "first", "last"):
        raise DataError(f"drop_conflicts must be 'first', 'last' or None, not {drop_conflicts!r}.")
    source = name if name is not None else path
    if source is None:
        raise DataError(f"Give the name of a dataset ({', '.join(dataset_names())}) or the path of a file.")
    excluded = {_normalised(e if isinstance(e, str) else e["prompt"]) for e in exclude or ()}

    def build(rows: Iterable[dict[str, Any]], label: str) -> Dataset:
        return _build(rows, label, limit, drop_conflicts, excluded)

    if isinstance(source, Path) or name is None or _looks_like_file(str(source)):
        if options:
            raise DataError(f"A file takes no option {next(iter(options))!r}.")
        if split not in (None, "all", "train", "test"):
            raise DataError(f"A file has no split {split!r}: leave it out.")
        file = Path(source)
        table = build(_file_rows(file), file.name)
        return DatasetDict({"test": table}) if split == "all" else table

    entry = dataset_entry(str(source))
    for option in options:
        if option not in entry.options:
            raise DataError(f"The dataset {entry.name!r} has no option {option!r}.{nearest(option, entry.options)}")
    wanted = entry.splits if split == "all" else (split or entry.default_split,)
    for one in wanted:
        if one not in entry.splits:
            raise DataError(
                f"The dataset {entry.name!r} has no split {one!r}.{nearest(one, entry.splits)} "
                f"It has {', '.join(entry.splits)}."
            )
    file_or_none = Path(path) if path is not None else None
    tables = {
        one: build(entry.loader(one, path=file_or_none, seed=seed, **options), f"{entry.name}/{one}") for one in wanted
    }
    return DatasetDict(tables) if split == "all" else tables[wanted[0]]


def _looks_like_file(name: str) -> bool:
    return name.lower() not in _REGISTRY and Path(name).suffix.lower() in FILE_SUFFIXES


def _normalised(prompt: str) -> str:
    return " ".join(prompt.split()).casefold()


def _build(
    rows: Iterable[dict[str, Any]], label: str, limit: int | None, conflicts: str | None, excluded: set[str]
) -> Dataset:
    """Filter the rows, say how many went where, and make the table."""
    kept: list[dict[str, Any]] = []
    read = no_target = left_out = 0
    for row in rows:
        if limit is not None and len(kept) >= limit and conflicts is None:
            break
        read += 1
        if not (row["target_new"] or "").strip():
            no_target += 1
        elif _normalised(row["prompt"]) in excluded:
            left_out += 1
        else:
            kept.append(row)
    clashing = 0
    if conflicts is not None:
        chosen: dict[str, dict[str, Any]] = {}
        for row in kept:
            key = _normalised(row["prompt"])
            if key in chosen and conflicts == "last":
                del chosen[key]
            chosen.setdefault(key, row)
        clashing, kept = len(kept) - len(chosen), list(chosen.values())[:limit]
    if no_target:
        logger.warning("%s: %d of %d rows dropped because they have no target", label, no_target, read)
    logger.info("%s: %d rows read, %d kept, %d excluded, %d repeated", label, read, len(kept), left_out, clashing)
    if not kept:
        raise DataError(f"{label}: no usable edit request among {read} rows.")
    try:
        return Dataset.from_list(kept, features=FEATURES)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{label}: a column has values of a wrong type: {error}") from error


def _file_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Read a file of requests or rows, each checked by :class:`EditRequest`."""
    for number, entry in enumerate(read_rows(file)):
        if not isinstance(entry, dict):
            raise RequestError(f"must be an object, not {type(entry).__name__}", row=number)
        target = entry.get("target_new", entry.get("target"))
        if target is None or (isinstance(target, str) and not target.strip()):
            yield {"prompt": str(entry.get("prompt")), "target_new": ""}  # counted and dropped
            continue
        yield row_from_request(EditRequest.from_dict(entry, row=number), dataset=file.stem, number=number)
