"""The parts of pages that tests write: a table between ``<!-- NAME: begin … -->`` and ``<!-- NAME: end -->``."""

from __future__ import annotations

from pathlib import Path


def marked(path: Path, name: str) -> str:
    """The table."""
    return _parts(path, name)[1]


def rewrite_marked(path: Path, name: str, table: str) -> None:
    """Write another table in its place."""
    head, _, tail = _parts(path, name)
    path.write_text(f"{head}{table}{tail}", encoding="utf-8")


def _parts(path: Path, name: str) -> tuple[str, str, str]:
    head, begin, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name}: begin")
    remark, _, rest = rest.partition("\n")
    table, end, tail = rest.partition(f"<!-- {name}: end -->")
    assert begin and end, path
    return f"{head}{begin}{remark}\n", table, f"{end}{tail}"
