"""Folders of files that belong together: written so that no mixture is left behind, read from a folder or the Hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


def write_folder(folder: Path, files: Mapping[str, bytes], *, last: str, owned: Collection[str] = ()) -> None:
    """Write files so that a reader sees the old set or the new set, never a mixture where that can be helped.

    A new folder, or one that only holds such files, is replaced as a whole by a rename. In a folder with other
    content, each file is replaced by a rename; a mixture after a crash is found by the hashes in the file ``last``.

    Args:
        folder: made if needed.
        files: name → content.
        last: the file that describes the others.
        owned: further names that may be in the folder and go when it is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, data in files.items():
            with (temporary / name).open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
        os.chmod(temporary, 0o755)
        existing = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        if existing <= {*files, *owned}:
            old = folder.with_name(f".{folder.name}-old-{os.getpid()}")
            if folder.exists():
                os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            for name in sorted(files, key=lambda n: n == last):
                os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_file(source: str, name: str, *, revision: str | None = None, token: Any = None) -> bytes | None:
    """Content of a file in a folder or a Hub repository; ``None`` if it is missing.

    Args:
        source: folder or Hub id.
        name: of the file.
        revision: of the repository.
        token: for the Hub.
    """
    folder = Path(source)
    if folder.is_dir():
        path = folder / name
        return path.read_bytes() if path.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        source,
        name,
        revision=revision,
        token=token,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found).read_bytes() if found else None
