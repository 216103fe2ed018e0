"""Folders of files that belong together: written so that no mixture is left behind, read from a folder or the Hub."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from .repository import download, matches


def cache_home() -> Path:
    """Where the library keeps what it fetches and makes, of any size, to be deleted at will.

    ``$KEDIT_HOME``; else ``$HF_HOME/kedit``; else ``~/.cache/huggingface/kedit``.
    """
    if home := os.environ.get("KEDIT_HOME"):
        return Path(home)
    base = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "huggingface"
    )
    return Path(base) / "kedit"


def write_folder(folder: Path, files: Mapping[str, bytes], *, last: str, owned: Collection[str] = ()) -> None:
    """Write files so that a reader sees the old set or the new set, never a mixture where that can be helped.

    A new folder, or one that only holds such files, is replaced as a whole by a rename. In a folder with other
    content, each file is replaced by a rename; a mixture after a crash is found by the hashes in the file ``last``.

    Args:
        folder: made if needed.
        files: name → content.
        last: the file that describes the others.
        owned: further names (see `matches`) that may be in the folder from an earlier write, and go.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, data in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            with (temporary / name).open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
        os.chmod(temporary, 0o755)
        if not any(not matches(name, (*files, *owned)) for name in _contents(folder)):
            old = folder.with_name(f".{folder.name}-old-{os.getpid()}")
            if folder.exists():
                os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            for name in sorted(files, key=lambda n: n == last):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary / name, folder / name)
            for name in [n for n in _contents(folder) if matches(n, owned) and n not in files]:
                (folder / name).unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _contents(folder: Path) -> Iterator[str]:
    """Names of everything below a folder that is no folder with contents of its own; none if it does not exist."""
    for path in folder.rglob("*"):
        if not path.is_dir() or path.is_symlink() or not any(path.iterdir()):
            yield path.relative_to(folder).as_posix()


class FileSource:
    """Files of a folder, or of a Hub repository: then all of the commit that the first one came from.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit of a repository.
        repo_type: ``"model"`` or ``"dataset"``.
        hub: for `download`: ``token``, ``cache_dir``, ``local_files_only``.
    """

    def __init__(self, name: str, *, revision: str | None = None, repo_type: str = "model", **hub: Any):
        self.name, self.revision, self.repo_type, self.hub = name, revision, repo_type, hub
        self.commit: str | None = None

    def path(self, name: str) -> Path | None:
        """Where a file is on this machine; ``None`` if it is missing.

        Raises:
            HubError: if the repository cannot be read.
        """
        folder = Path(self.name)
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        local = download(self.name, name, revision=self.commit or self.revision, repo_type=self.repo_type, **self.hub)
        if local is not None and self.commit is None:
            self.commit = local.parents[name.count("/")].name
        return local

    def read(self, name: str) -> bytes | None:
        """Content of a file; ``None`` if it is missing.

        Raises:
            HubError: if the repository cannot be read.
        """
        local = self.path(name)
        return local.read_bytes() if local is not None else None


def read_file(source: str, name: str, *, revision: str | None = None, token: Any = None) -> bytes | None:
    """Content of a file in a folder or a Hub repository; ``None`` if it is missing.

    Args:
        source: folder or Hub id.
        name: of the file.
        revision: of the repository.
        token: for the Hub.

    Raises:
        HubError: if the repository cannot be read.
    """
    return FileSource(source, revision=revision, token=token).read(name)


def json_ready(value: Any) -> Any:
    """A copy for JSON: NaN and infinity, which JSON lacks, become ``None``; everything unknown becomes text."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return json_ready(value.tolist()) if hasattr(value, "tolist") else str(value)
