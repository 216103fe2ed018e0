"""Load edit requests by name or from a file: ``load_edit_dataset``, and the registry behind it.

A loader is a generator of rows (see :mod:`hf_kedit.data.features`) registered under a name with
:func:`register_dataset`; datasets that are files of records register a function of one record with
:func:`register_records`. What all datasets share is done here, once: choosing the split, finding the files,
dropping rows without a target, conflicts, exclusion, the limit, counting, and building the table.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets

from ..errors import DataError, KeditError, RequestError, nearest, reason_of, shown
from ..logging import get_logger
from ..requests import KNOWN_FIELDS, EditRequest, RequestSource, load_requests
from ..storage.files import named_path
from ..storage.records import SUFFIXES, read_all, read_rows, rows_given
from .columns import Columns, check_columns, own_rows
from .conflicts import Keep, Key, excluded_keys, select
from .features import FEATURES
from .normalise import RawRow, Record
from .report import LoadReport
from .sources import Located, Source

logger = get_logger(__name__)

Loader = Callable[..., Iterable[RawRow]]
Normaliser = Callable[..., Iterable[RawRow]]
BadRows = Literal["raise", "drop"]
_CHUNK = 5000  # rows turned into Arrow at a time: as dicts they need ten times the memory
_GIVEN = ("split", "path", "seed", "record", "dataset", "files", "report", "bad_rows")  # no options of a dataset
_SPLIT_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}


@dataclass(frozen=True)
class DatasetEntry:
    """A registered dataset.

    Args:
        name: as listed by :func:`dataset_names`.
        loader: makes the rows of a split.
        splits: names of the splits.
        default_split: the split that is meant when none is named.
        source: where its files are; None for data made in memory.
        function: whose keyword arguments are the dataset's options (the loader, or the function of a record).
    """

    name: str
    loader: Loader
    splits: tuple[str, ...]
    default_split: str
    source: Source | None = None
    function: Callable[..., Any] | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the dataset's own keyword arguments."""
        return tuple(p for p in inspect.signature(self.function or self.loader).parameters if p not in _GIVEN)


_REGISTRY: dict[str, DatasetEntry] = {}


def register_dataset(
    name: str,
    *,
    splits: tuple[str, ...] | None = None,
    default_split: str | None = None,
    source: Source | None = None,
    function: Callable[..., Any] | None = None,
) -> Callable[[Loader], Loader]:
    """Register a loader (use as a decorator).

    Without a source the loader is called as ``loader(split, path=…, seed=…, **options)``; ``path`` and ``seed``
    are None unless the user gave them. With one, as ``loader(split, dataset=name, files=…, seed=…, report=…,
    bad_rows=…, **options)``. It yields rows that have all columns of ``FEATURES``.

    Args:
        name: the name for :func:`load_edit_dataset`; case does not matter.
        splits: which splits there are; those of the source, or ``("test",)``.
        default_split: the one that is loaded when the user names none: ``"test"`` if there is one.
        source: the files it reads.
        function: whose keyword arguments are the options, if not the loader.

    Raises:
        DataError: the name is taken, or the default split is not one of the splits.
    """
    splits = splits or (source.splits if source else ("test",))
    default = default_split or ("test" if "test" in splits or source is None else splits[0])
    if name.lower() in _REGISTRY:
        raise DataError(f"A dataset named {name!r} is registered already.")
    if default not in splits:
        raise DataError(f"The default split {default!r} is not one of {', '.join(splits)}.")

    def decorate(loader: Loader) -> Loader:
        _REGISTRY[name.lower()] = DatasetEntry(name, loader, tuple(splits), default, source, function)
        return loader

    return decorate


def register_records(sources: Mapping[str, Source]) -> Callable[[Normaliser], Normaliser]:
    """Register a function that turns one record of a file into rows, under one or more names (decorator).

    It is called as ``function(record, dataset=name, split=…, seed=…, **options)``.

    Args:
        sources: name → files.
    """

    def decorate(function: Normaliser) -> Normaliser:
        def load(
            split: str, *, dataset: str, files: tuple[str, ...], seed: int | None, report: LoadReport,
            bad_rows: BadRows, **options: Any,
        ) -> Iterator[RawRow]:  # fmt: skip
            with closing(read_all(files)) as values:
                yield from each_row(
                    (
                        _normalised(function, value, number, report, dataset, split, seed, options)
                        for number, value in enumerate(values)
                    ),
                    report,
                    bad_rows,
                )

        for name, source in sources.items():
            register_dataset(name, source=source, function=function)(load)
        return function

    return decorate


def _normalised(
    function: Normaliser, value: Any, number: int, report: LoadReport, dataset: str, split: str, seed: int | None,
    options: Mapping[str, Any],
) -> Iterator[RawRow]:  # fmt: skip
    """Run the function when advanced, so that :func:`each_row` sees its errors."""
    try:
        yield from function(Record(value, number, report), dataset=dataset, split=split, seed=seed, **options)
    except RecursionError as error:
        raise RequestError("is nested too deeply", row=number) from error


def each_row(per_record: Iterable[Iterable[RawRow]], report: LoadReport, bad_rows: BadRows) -> Iterator[RawRow]:
    """Chain the rows of all records; a record with an error is raised, or dropped as a whole and counted."""
    for rows in per_record:
        try:
            made = list(rows)
        except RequestError as error:
            if bad_rows == "raise":
                raise
            logger.debug("%s: %s", report.dataset, error)
            report.drop("unusable")
        else:
            yield from made


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
        if os.path.isdir(name):
            raise DataError(f"{name!r} is a folder; give the name of its dataset with path=, or one file.") from None
        raise DataError(
            f"There is no dataset named {shown(name)}.{nearest(name, _REGISTRY)} "
            f"Known: {', '.join(dataset_names())}; or give the path of a {', '.join(SUFFIXES)} file."
        ) from None


def layouts_of(value: Any) -> list[str]:
    """Names of the registered datasets whose records look most like this one.

    They can be read as such, make use of a field that an `EditRequest` does not have, and leave the fewest over.
    """
    unknown = set(value) - KNOWN_FIELDS if isinstance(value, Mapping) else set()
    left: dict[str, int] = {}
    for entry in _REGISTRY.values() if unknown else ():
        if entry.function is None:
            continue
        record = Record(value, 0, LoadReport("", ""))
        try:
            rows = list(entry.function(record, dataset=entry.name, split=entry.default_split, seed=None))
        except Exception:  # whatever it stumbles over, this is no record of it
            continue
        if rows and not unknown <= set(record.rest()):
            left[entry.name] = len(record.rest())
    return [name for name, count in left.items() if count == min(left.values())]


def requests_of(source: RequestSource, path: str | Path | None = None) -> list[EditRequest]:
    """`load_requests`; if the rows are those of a registered dataset, the error says so.

    Args:
        source: as for `load_requests`.
        path: the file that the rows come from, if they have been read already.

    Raises:
        RequestError: naming row and field of the first bad request.
        DataError: if there are no rows, or they have the layout of a registered dataset.
    """
    if isinstance(source, (str, Path)):
        return requests_of(read_rows(source), source)
    try:
        return load_requests(source)
    except RequestError as error:
        raise explained(error, source[0] if isinstance(source, list) else source, path) from None


def explained(error: RequestError, first: Any, path: str | Path | None = None) -> KeditError:
    """The error of a row, with what to do if the rows have the layout of a registered dataset.

    Args:
        error: of any row.
        first: the first row.
        path: where it stands.
    """
    names = layouts_of(first) if error.row == 0 else []
    if not names:
        return error
    file = "FILE" if path is None else str(path)
    return DataError(
        f"{error} These rows look like those of {' or '.join(map(repr, names[:4]))}: load them with"
        f" load_edit_dataset({names[0]!r}, path={file!r}), or on the command line --dataset {names[0]}"
        f" --dataset-path {file}."
    )


@dataclass(frozen=True)
class _Plan:
    """Everything that decides which rows a split has; a stream carries it instead of the rows."""

    label: str
    split: str
    name: str | None
    path: str | None
    located: Located
    records: Any = None
    columns: Columns | None = None
    seed: int | None = None
    limit: int | None = None
    skip: int = 0
    keep: Keep | None = None
    excluded: frozenset[Key | str] = frozenset()
    bad_rows: BadRows = "raise"
    options: dict[str, Any] = field(default_factory=dict)

    def report(self) -> LoadReport:
        return LoadReport(self.label, self.split, list(self.located.files), self.located.revision)

    def rows(self, report: LoadReport) -> Iterator[RawRow]:
        """Yield the rows to use; counts and messages are complete at the end."""
        yield from select(self._source_rows(report), report, self.limit, self.keep, self.excluded, self.skip)
        report.complete = True
        lost = {r: n for r, n in report.dropped.items() if r in ("no target", "no alternative target", "unusable")}
        if lost:
            logger.warning(
                "%s/%s: %s", self.label, self.split,
                "; ".join(f"{n} of {report.read} rows dropped ({reason})" for reason, n in sorted(lost.items())),
            )  # fmt: skip
        logger.info("%s", report)
        if not report.kept:
            raise DataError(f"{self.label}/{self.split}: no usable edit request among {report.read} rows ({report}).")

    def _own_rows(self, report: LoadReport) -> Iterator[RawRow]:
        with closing(read_all(self.located.files)) as stored:
            values = stored if self.records is None else iter(self.records)
            first = next(values, None)
            rows = own_rows(() if first is None else chain((first,), values), self.label, report, self.columns)
            try:
                yield from each_row(rows, report, self.bad_rows)
            except RequestError as error:
                raise (error if self.columns else explained(error, first, self.path)) from None

    def _source_rows(self, report: LoadReport) -> Iterable[RawRow]:
        if self.name is None:
            return self._own_rows(report)
        entry = dataset_entry(self.name)
        if entry.source is None:
            path = Path(self.path) if self.path is not None else None
            return entry.loader(self.split, path=path, seed=self.seed, **self.options)
        return entry.loader(
            self.split, dataset=entry.name, files=self.located.files, seed=self.seed, report=report,
            bad_rows=self.bad_rows, **self.options,
        )  # fmt: skip


def load_edit_dataset(
    name: Any = None,
    split: str | None = None,
    path: str | Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    *,
    skip: int = 0,
    revision: str | None = None,
    streaming: bool = False,
    drop_conflicts: Keep | None = None,
    exclude: Iterable[Any] | None = None,
    columns: Columns | None = None,
    bad_rows: BadRows = "raise",
    **options: Any,
) -> Any:
    """Load edit requests as a table with the columns of :data:`hf_kedit.data.FEATURES`.

    Rows are never shuffled. What became of them is logged and kept: see :func:`hf_kedit.data.load_report`.

    Args:
        name: a registered dataset (:func:`dataset_names`); or the path of a JSON, JSONL, CSV or Parquet file; or a
            ``datasets.Dataset``, a list of dicts or `EditRequest`, or one of these. Own data have those columns, the
            fields of :class:`hf_kedit.EditRequest`, or what ``columns`` says.
        split: name of the split; the dataset's default one (mostly ``"test"``) if None; ``"all"`` for a
            ``DatasetDict`` of all splits.
        path: file or folder of a registered dataset that was downloaded before; or, without ``name``, the file.
        limit: take the first so many rows. A group of edits that belong together is never cut.
        seed: for datasets that draw at random; None for their standard rows.
        skip: leave out the first so many rows, such as those that settings were chosen on. Rows are counted as they
            stand in the source, and before ``limit``.
        revision: branch, tag or full commit hash of the Hub dataset instead of the built-in one.
        streaming: return an ``IterableDataset`` that reads rows as they are needed. Files that are not in the
            Hub's cache are then read over the network instead of being downloaded.
        drop_conflicts: what to do with rows that have the same prompt but another target: keep all (None), or only
            the ``"first"`` or ``"last"`` of each. Repetitions go as well. Needed for sequential editing.
        exclude: prompts, or rows with a ``"prompt"`` (another dataset), that must not occur.
        columns: for own data: field → column name, e.g. ``{"prompt": "question", "target_new": "answer"}``;
            ``"rephrase_prompts"`` may name several columns; ``"locality"`` and ``"portability"`` may be
            ``{axis: (prompt column, answer column)}``. Other columns go to ``extra``.
        bad_rows: ``"raise"`` at the first row that is unusable, or ``"drop"`` and count them.
        options: further arguments of the dataset's loader (``dataset_entry(name).options``).

    Returns:
        A ``datasets.Dataset``; an ``IterableDataset`` if streaming; a ``DatasetDict`` or
        ``IterableDatasetDict`` for ``split="all"``.

    Raises:
        DataError: unknown dataset, split or option; unreadable file, or one that has to be downloaded first (the
            message says where it is published); nothing left.
        RequestError: a row is not usable (names row and field).
    """
    for what, number, least in (("limit", 1 if limit is None else limit, 1), ("skip", skip, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise DataError(f"{what} must be a whole number of at least {least}, not {shown(number)}.")
    if drop_conflicts not in (None, "first", "last"):
        raise DataError(f"drop_conflicts must be 'first', 'last' or None, not {drop_conflicts!r}.")
    if bad_rows not in ("raise", "drop"):
        raise DataError(f"bad_rows must be 'raise' or 'drop', not {bad_rows!r}.")
    if streaming and drop_conflicts == "last":
        raise DataError("drop_conflicts='last' needs all rows at once; use 'first', or streaming=False.")
    if name is None and path is None:
        raise DataError(f"Give the name of a dataset ({', '.join(dataset_names())}) or the path of a file.")
    common = {
        "columns": columns, "seed": seed, "limit": limit, "skip": skip, "keep": drop_conflicts,
        "excluded": excluded_keys(exclude), "bad_rows": bad_rows, "options": options,
    }  # fmt: skip
    if name is None or isinstance(name, Path) or not isinstance(name, str) or _looks_like_file(name):
        plans = [_own_plan(path if name is None else name, split, revision, streaming, common)]
    else:
        if columns is not None:
            raise DataError(f"'columns' is for own data; the layout of {name!r} is known.")
        plans = _registered_plans(dataset_entry(name), split, path, revision, streaming, common)
    tables = {plan.split: _stream(plan) if streaming else _table(plan) for plan in plans}
    if split != "all":
        return next(iter(tables.values()))
    if streaming:
        from datasets import IterableDatasetDict

        return IterableDatasetDict(tables)
    return DatasetDict(tables)


def _looks_like_file(name: str) -> bool:
    return name.lower() not in _REGISTRY and Path(name).suffix.lower() in SUFFIXES


def _own_plan(
    source: Any, split: str | None, revision: str | None, streaming: bool, common: Mapping[str, Any]
) -> _Plan:
    if common["options"]:
        raise DataError(f"Own data take no option {next(iter(common['options']))!r}.")
    if revision is not None:
        raise DataError("'revision' is for data from the Hub.")
    if split not in (None, "all", "train", "test"):
        raise DataError(f"Own data have no split {split!r}: leave it out.")
    if common["columns"] is not None:
        check_columns(common["columns"])
    part = "test" if split in (None, "all") else split
    if isinstance(source, (str, Path)):
        file = named_path(source, "the file", DataError)
        if file.is_dir():
            raise DataError(f"{str(file)!r} is a folder; give the name of its dataset with path=, or one file.")
        return _Plan(file.stem, str(part), None, str(file), Located((str(file),)), **common)
    rows = [source] if isinstance(source, EditRequest) else rows_given(source)
    if streaming and isinstance(rows, Iterator):
        raise DataError(f"a {type(rows).__name__} gives its rows once, a stream several times: pass a list of them")
    return _Plan("data", str(part), None, None, Located(()), records=rows, **common)


def _registered_plans(
    entry: DatasetEntry,
    split: str | None,
    path: str | Path | None,
    revision: str | None,
    streaming: bool,
    common: Mapping[str, Any],
) -> list[_Plan]:
    for option in common["options"]:
        if option not in entry.options:
            known = f" It has {', '.join(entry.options)}." if entry.options else " It has none."
            raise DataError(
                f"The dataset {entry.name!r} has no option {option!r}.{nearest(option, entry.options)}{known}"
            )
    split = _SPLIT_ALIASES.get(split or "", split) if split not in entry.splits else split
    wanted = entry.splits if split == "all" else (split or entry.default_split,)
    for one in wanted:
        if one not in entry.splits:
            raise DataError(
                f"The dataset {entry.name!r} has no split {one!r}.{nearest(one, entry.splits)} "
                f"It has {', '.join(entry.splits)}."
            )
    place = named_path(path, "path", DataError) if path is not None else None
    if place is not None and len(wanted) > 1 and place.is_file() and entry.source is not None:
        raise DataError(f"{str(place)!r} is one file: name the split, or pass the folder with all of them.")
    if revision is not None and (entry.source is None or entry.source.repo is None):
        raise DataError(f"{entry.name!r} does not come from the Hub: leave 'revision' out.")
    return [
        _Plan(
            entry.name, one, entry.name, str(place) if place is not None else None,
            entry.source.locate(entry.name, one, place, revision, streaming) if entry.source else Located(()),
            **common,
        )
        for one in wanted
    ]  # fmt: skip


def _table(plan: _Plan) -> Dataset:
    report, parts = plan.report(), []
    rows = plan.rows(report)
    try:
        while chunk := list(islice(rows, _CHUNK)):
            parts.append(Dataset.from_list(chunk, features=FEATURES))
    except (RequestError, DataError):
        raise
    except (pa.ArrowException, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{plan.label}/{plan.split}: a column has values of a wrong type: {error}") from error
    table = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    table.info.description = report.to_text()
    return table


def _stream(plan: _Plan) -> IterableDataset:
    try:
        stream = IterableDataset.from_generator(_generate, features=FEATURES, gen_kwargs={"plan": plan})
    except Exception as error:  # whatever its rows stumble over: a stream is known by a hash of them
        raise DataError(
            f"{plan.label}: rows of this kind cannot be streamed ({reason_of(error)}); leave streaming out"
        ) from error
    stream.info.description = plan.report().to_text()
    return stream


def _generate(plan: _Plan) -> Iterator[RawRow]:
    yield from plan.rows(plan.report())
