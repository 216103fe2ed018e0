"""Where the files of a dataset are: on the Hub at a fixed revision, or in a place the user has to download from.

A :class:`Source` knows the file names of each split. It finds them under ``path=`` (a file, or a folder that is
searched by file name, so that mirrors with other folders work), or downloads them with ``huggingface_hub``, which
also serves what is in its cache when there is no network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import DataError
from ..storage.records import SUFFIXES

_WILD = re.compile(r"[*?\[]")
_COMMIT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")
_SHOWN = 12  # file names in an error message


@dataclass(frozen=True)
class Located:
    """Files of one split, local paths or ``hf://`` addresses, and the commit they are from."""

    files: tuple[str, ...]
    revision: str | None = None


@dataclass(frozen=True)
class Source:
    """Published files of a dataset.

    Args:
        files: split → names a file may have, the best first; ``*`` and ``?`` stand for any characters.
        published: where people find it.
        licence: of the data, in words.
        repo: id of the Hub dataset; None if it is not on the Hub (``path=`` is needed then).
        revision: full commit hash that is loaded unless the user names another; None: the main branch, whose
            commit is recorded in the load report.
        folder: folder in the repository.
        many: a split consists of all matching files, in order of their names, not of the first one.
        gated: the Hub asks for an agreement and a token.
    """

    files: Mapping[str, tuple[str, ...]]
    published: str
    licence: str
    repo: str | None = None
    revision: str | None = None
    folder: str = ""
    many: bool = False
    gated: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in order."""
        return tuple(self.files)

    def locate(
        self, name: str, split: str, path: Path | None = None, revision: str | None = None, streaming: bool = False
    ) -> Located:
        """Find the files of a split.

        Args:
            name: name of the dataset, for messages.
            split: one of :attr:`splits`.
            path: file or folder of the user; nothing is downloaded then.
            revision: branch, tag or full commit hash instead of :attr:`revision`.
            streaming: do not download: return an ``hf://`` address of what is not in the cache.

        Raises:
            DataError: there is no such file, or it cannot be downloaded; says where it is published.
        """
        patterns = self.files[split]
        if path is not None:
            if revision is not None:
                raise DataError("'revision' is for data from the Hub; with 'path' leave it out.")
            return Located(self._under(path, name, split))
        if self.repo is None:
            raise DataError(
                f"{name!r} is not on the Hub. Download {' or '.join(patterns)} from {self.published} "
                f"(licence: {self.licence}) and pass its place as path=<file or folder>."
            )
        revision = revision or self.revision
        try:
            if streaming:
                return self._stream(patterns, revision)
            return self._download(patterns, revision)
        except LocalEntryNotFoundError as error:
            reason = "it is not in the local cache and the Hub cannot be reached"
            cause: Exception = error
        except GatedRepoError as error:
            reason = "accept its terms on the page of the dataset, and log in with `hf auth login`"
            cause = error
        except RepositoryNotFoundError as error:
            reason = "there is no such repository, or it is private"
            cause = error
        except RevisionNotFoundError as error:
            reason = "there is no such revision (give a branch, a tag or a full commit hash)"
            cause = error
        except (EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
            cause = error
        raise DataError(
            f"{name!r}: cannot load {' or '.join(patterns)} from the Hub dataset {self.repo!r} "
            f"(revision {revision or 'main'}): {reason}. "
            f"Or download the file from {self.published} and pass its place as path=<file or folder>."
        ) from cause

    # ------------------------------------------------------------------ local

    def _under(self, path: Path, name: str, split: str) -> tuple[str, ...]:
        if path.is_file():
            return (str(path),)
        if not path.is_dir():
            raise DataError(f"{name!r}: there is no file or folder {str(path)!r}.")
        present = [str(p.relative_to(path).as_posix()) for p in path.rglob("*") if p.is_file()]
        files = self._matching(present, self.files[split])
        if not files:
            readable = sorted(p for p in present if PurePosixPath(p).suffix.lower() in SUFFIXES)
            raise DataError(
                f"{name!r}: the folder {str(path)!r} has no file {' or '.join(self.files[split])} for the split "
                f"{split!r}; it has {_listed(readable)}. Pass the file itself if it has another name."
            )
        if len(files) > 1 and not self.many:
            raise DataError(f"{name!r}: several files fit: {_listed(files)}. Pass one of them as path=.")
        return tuple(str(path / p) for p in files)

    def _matching(self, present: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
        """Return the files with the best fitting name; also mirrors that write folders into the name."""
        names = sorted(present)
        tests: list[Callable[[str, str], bool]] = [
            lambda base, pattern: fnmatchcase(base, pattern),
            lambda base, pattern: fnmatchcase(base, "*_" + pattern),
        ]
        for fits in tests:
            for pattern in patterns:
                hits = [n for n in names if fits(PurePosixPath(n).name.lower(), pattern.lower())]
                inside = [n for n in hits if self.folder and n.startswith(self.folder + "/")]
                if hits:
                    return inside or hits
        return []

    # ------------------------------------------------------------------ Hub

    def _get(self, pattern: str, revision: str | None, local_only: bool = False) -> list[str]:
        """Return local paths of the files with this name, downloaded if need be; none if there are none.

        Raises:
            LocalEntryNotFoundError: the Hub cannot be reached (or must not be), and the cache does not know.
        """
        assert self.repo is not None
        inside = str(PurePosixPath(self.folder) / pattern)
        if not _WILD.search(pattern):
            try:
                return [self._one(inside, revision, local_only)]
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return []
        folder = Path(
            huggingface_hub.snapshot_download(
                self.repo, repo_type="dataset", revision=revision, allow_patterns=[inside], local_files_only=local_only
            )
        )
        present = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        return [str(folder / p) for p in self._matching(present, (pattern,))]

    def _one(self, file: str, revision: str | None, local_only: bool = False) -> str:
        assert self.repo is not None
        return str(
            huggingface_hub.hf_hub_download(
                self.repo, file, repo_type="dataset", revision=revision, local_files_only=local_only
            )
        )

    def _first(self, patterns: tuple[str, ...], revision: str | None, local_only: bool) -> Located | None:
        """Try the names in order; after the first sign that there is no network only in the cache."""
        missing: LocalEntryNotFoundError | None = None
        for pattern in patterns:
            try:
                copies = self._get(pattern, revision, local_only or missing is not None)
            except LocalEntryNotFoundError as error:
                missing = missing or error
            else:
                if copies:
                    return _located(copies if self.many else copies[:1])
        if missing is not None:
            raise missing
        return None

    def _download(self, patterns: tuple[str, ...], revision: str | None) -> Located:
        assert self.repo is not None
        located = self._first(patterns, revision, local_only=False)
        if located is not None:
            return located
        present = huggingface_hub.list_repo_files(self.repo, repo_type="dataset", revision=revision)
        return _located([self._one(p, revision) for p in self._chosen(present, patterns)])

    def _stream(self, patterns: tuple[str, ...], revision: str | None) -> Located:
        assert self.repo is not None
        try:
            located = self._first(patterns, revision, local_only=True)
        except LocalEntryNotFoundError:
            located = None
        if located is not None:
            return located
        info = huggingface_hub.HfApi().dataset_info(self.repo, revision=revision)
        chosen = self._chosen([s.rfilename for s in info.siblings or ()], patterns)
        commit = info.sha or revision or "main"
        return Located(tuple(f"hf://datasets/{self.repo}@{commit}/{p}" for p in chosen), info.sha)

    def _chosen(self, present: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
        """Return which files of the repository to read.

        Raises:
            EntryNotFoundError: none fits; the message lists what there is.
        """
        names = list(present)
        files = self._matching(names, patterns)
        if not files:
            readable = sorted(p for p in names if PurePosixPath(p).suffix.lower() in SUFFIXES)
            raise EntryNotFoundError(f"the repository has no such file; it has {_listed(readable)}")
        return files if self.many else files[:1]


def _located(files: list[str]) -> Located:
    hit = _COMMIT.search(files[0])
    return Located(tuple(files), hit.group(1) if hit else None)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return (shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")) or "no data files"
