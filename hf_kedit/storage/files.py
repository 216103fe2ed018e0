"""Folders of files that belong together: written so that a reader finds the old set or the new one, never a mixture.

How a new set takes the place of an old one (`write_folder`):

1. The new folder is made beside the old one, with links to whatever else the old one holds, and the two exchange their
   names in one step (``renameat2``).
2. Where the system cannot do that, or this process stands in the folder, or it must not be renamed: the new files are
   put into a folder *inside*, named after the content of the file ``last``. They count from the moment in which
   ``last`` is replaced, and are moved to their places then. `FileSource` looks there first, and finishes what was
   interrupted.

Writers of one folder take turns by a lock on the folder above it. Links are followed to the folder itself, never
inside of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, KeditError, reason_of, shown
from .repository import download, matches

LOCK_SECONDS = 60.0
"""How long a writer waits for another one."""
_MARK = ".kedit-"
_PENDING = re.compile(re.escape(_MARK) + r"[0-9a-f]{32}-")
_AT_CWD, _EXCHANGE = -100, 2  # of renameat2(2)


# ---------------------------------------------------------------------- writing


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


def first_time(topic: str) -> bool:
    """Whether this is asked of a topic for the first time on this machine: a small file in `cache_home` remembers it.

    Where nothing can be kept (a folder that must not be written, a file in its place), every time is the first.
    """
    note = cache_home() / "said" / hashlib.sha256(topic.encode("utf-8", "backslashreplace")).hexdigest()[:32]
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.open("x").close()
    except OSError:
        return not note.exists()
    return True


def write_folder(folder: Path, files: Mapping[str, bytes], *, last: str, owned: Collection[str] = ()) -> None:
    """Write files so that a reader sees the old set or the new set, whenever the writer is stopped.

    Whatever else is in the folder stays. A folder that exists keeps its mode and owner, and so do its files; new ones
    get those that the umask gives.

    Args:
        folder: made if needed; a link to a folder is followed.
        files: name → content.
        last: the file that describes the others.
        owned: further names (see `matches`) that may be in the folder from an earlier write, and go.

    Raises:
        ArtifactError: if the folder cannot be written, or another process is writing it all the time.
    """
    target = _followed(folder)
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{str(folder)!r} is a file; give a folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _turn(target) as alone:
            if alone:
                _clear(target)
            if not target.exists() or not _is_above_here(target):
                try:
                    _replace_whole(target, files, owned)
                    return
                except OSError as error:  # no such call, a mount point, a closed folder above: inside, then
                    if error.errno == errno.ENOSPC:
                        raise
            _replace_inside(target, files, last, owned)
    except OSError as error:
        raise ArtifactError(f"{str(folder)!r} cannot be written: {error.strerror or error}") from error


def named_path(value: Any, what: str, error: type[KeditError] = ArtifactError) -> Path:
    """A path as a user names it, looked at before anything is done with it.

    Args:
        value: what was given.
        what: is named, as a sentence begins.
        error: to raise.

    Raises:
        KeditError: ``error``, for what is no path, for an empty one (which would be the current folder), and for one
            that no file of this system can have.
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise error(f"{what} must be a path, not {shown(value)}")
    if not text.strip():
        raise error(f"{what} is empty; name it, or '.' for the current folder")
    try:
        os.lstat(os.path.expanduser(text))
    except (OSError, ValueError) as reason:
        if isinstance(reason, ValueError) or reason.errno in (errno.ENAMETOOLONG, errno.EINVAL):
            why = getattr(reason, "strerror", None) or reason_of(reason)  # which would name it again, at full length
            raise error(f"{what}: {shown(text)} cannot be a path: {why}") from reason
    return Path(value)


def _followed(path: Path) -> Path:
    """Where a path leads to.

    Raises:
        ArtifactError: for characters that no path has, and where there is no current folder any more.
    """
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{str(path)!r} cannot be a path: {error}") from error


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A path to write a file to, which takes the place of ``path`` when the block ends well; else nothing is left.

    Raises:
        ArtifactError: if there is a folder of this name, or the file cannot be written.
    """
    target = _followed(path)
    if target.is_dir():
        raise ArtifactError(f"{str(path)!r} is a folder; give the name of a file")
    draft = target.with_name(f".{target.name}{_MARK}{secrets.token_hex(8)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        with draft.open("rb") as handle:
            os.fsync(handle.fileno())
        if target.exists():
            _look_like(draft, target)
        os.replace(draft, target)
    except OSError as error:
        raise ArtifactError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, errors: str = "strict") -> Path:
    """Write a text file, whole or not at all, into folders that are made if needed; returns the path.

    Args:
        path: of the file; a device or a pipe is written to as it is.
        text: its content.
        errors: what becomes of half a character, which UTF-8 lacks; see `str.encode`.

    Raises:
        ArtifactError: if it cannot be written.
    """
    try:
        data = text.encode("utf-8", errors)
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(data)
            return path
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{str(path)!r} cannot be written: {error}") from error
    with replaced_file(path) as draft:
        draft.write_bytes(data)
    return path


def _replace_whole(target: Path, files: Mapping[str, bytes], owned: Collection[str]) -> None:
    """Make the new folder beside the old one and let them change names; nothing has changed on any error."""
    new = target.with_name(f".{target.name}{_MARK}{secrets.token_hex(8)}")
    os.mkdir(new)
    try:
        for name, data in files.items():
            _write_file(new / name, data, like=target / name)
        if target.exists():
            _link_rest(target, new, (*files, *owned))
            _look_like(new, target)
            _exchange(new, target)
            _link_rest(new, target, (*files, *owned))  # what was put into the old one meanwhile
        else:
            os.rename(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # the new one if that failed, else the old one


def _replace_inside(target: Path, files: Mapping[str, bytes], last: str, owned: Collection[str]) -> None:
    """Put the new files inside the folder; from the moment in which ``last`` is replaced, they are what it holds."""
    target.mkdir(exist_ok=True)
    for pending in _pending(target):
        _settle(target, pending)
    draft = target / f"{_MARK}{secrets.token_hex(8)}"
    try:
        for name in (name for name in files if name != last):
            _write_file(draft / "files" / name, files[name], like=target / name)
        gone = [name for name in _leaves(target) if matches(name, owned) and name not in files]
        _write_file(draft / "gone.json", json.dumps(gone).encode())
        _write_file(draft / last, files[last], like=target / last)
        pending = target / _pending_name(last, files[last])
        os.rename(draft, pending)
        os.replace(pending / last, target / last)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    _settle(target, pending)


def _settle(folder: Path, pending: Path) -> None:
    """Move the files of an interrupted write to their places if they count already; else drop them."""
    if _counts(folder, pending):
        for name in _gone(pending):
            _place(folder, name).unlink(missing_ok=True)
            for parent in Path(name).parents[:-1]:  # as far as nothing else is in them
                with contextlib.suppress(OSError):
                    (folder / parent).rmdir()
        for path in [path for path in (pending / "files").rglob("*") if path.is_file()]:
            os.replace(path, _place(folder, path.relative_to(pending / "files").as_posix()))
    shutil.rmtree(pending, ignore_errors=True)


def _place(folder: Path, name: str) -> Path:
    """Where a file goes; folders on the way are made, and links on the way are taken off."""
    *parents, _ = Path(name).parts
    place = folder
    for part in parents:
        place = place / part
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            place.unlink()
        place.mkdir(exist_ok=True)
    return folder / name


def _clear(target: Path) -> None:
    """Remove what writers have left beside a folder; to be called by the only one."""
    for name in os.listdir(target.parent):  # there may be thousands of other folders
        if name.startswith(f".{target.name}{_MARK}") and (target.parent / name).is_dir():
            shutil.rmtree(target.parent / name, ignore_errors=True)
    for left in target.glob(f"{_MARK}*"):
        if not _PENDING.match(left.name):
            shutil.rmtree(left, ignore_errors=True)


def _write_file(path: Path, data: bytes, like: Path | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    if like is not None and like.is_file() and not like.is_symlink():
        _look_like(path, like)


def _look_like(path: Path, other: Path) -> None:
    """Give a file or folder the mode of another one, and the owner where that is allowed."""
    shutil.copymode(other, path)
    with contextlib.suppress(OSError, AttributeError):
        os.chown(path, other.stat().st_uid, other.stat().st_gid)


def _link_rest(old: Path, new: Path, ours: Collection[str]) -> None:
    """Link what else a folder holds into another one; what that has already stays as it is there."""
    for name in _leaves(old):
        place = new / name
        if matches(name, ours) or name.startswith(_MARK) or os.path.lexists(place):
            continue
        for parent in reversed(Path(name).parents[:-1]):
            if not os.path.lexists(new / parent):
                os.mkdir(new / parent)
                _look_like(new / parent, old / parent)
        if not all((new / parent).is_dir() for parent in Path(name).parents):
            continue  # a name of ours has taken the place of a folder, or of a link to one
        if (old / name).is_dir() and not (old / name).is_symlink():
            os.mkdir(place)
            _look_like(place, old / name)
        else:
            os.link(old / name, place, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change names in one step.

    Raises:
        OSError: if the system cannot.
    """
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError) as error:
        raise OSError(errno.ENOSYS, "no exchange of names") from error
    if call(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def _turn(folder: Path, seconds: float | None = None) -> Iterator[bool]:
    """Wait until no other writer is at work on a folder, and keep others out.

    Yields:
        Whether nobody else can be at work; ``False`` where the system has no such locks.

    Raises:
        ArtifactError: if it took too long.
    """
    try:
        import fcntl

        handle = os.open(folder.parent, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    deadline = time.monotonic() + (LOCK_SECONDS if seconds is None else seconds)
    alone = True
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise ArtifactError(
                        f"{str(folder)!r} is being written by another process; it was waited for, in vain. Try again,"
                        " or choose another folder"
                    ) from error
                time.sleep(0.02)
            except OSError:
                alone = False
                break
        yield alone
    finally:
        os.close(handle)


def _is_above_here(folder: Path) -> bool:
    """Whether this process stands in a folder, which it would lose if another one took its name."""
    try:
        here = Path.cwd()
    except OSError:
        return False
    return folder == here or folder in here.parents


def _leaves(folder: Path) -> Iterator[str]:
    """Names of everything below a folder that is no folder with contents of its own; links are not followed."""
    for root, folders, files in os.walk(folder):
        inside = Path(root).relative_to(folder)
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        yield from ((inside / name).as_posix() for name in (*files, *links))
        if not folders and not files and inside.parts:
            yield inside.as_posix()


# ---------------------------------------------------------------------- what an interrupted writer has left inside


def _pending_name(last: str, content: bytes) -> str:
    return f"{_MARK}{hashlib.sha256(content).hexdigest()[:32]}-{last}"


def _pending(folder: Path) -> list[Path]:
    """Folders with files that wait for being moved to their places."""
    return [path for path in folder.glob(f"{_MARK}*") if _PENDING.match(path.name)]


def _counts(folder: Path, pending: Path) -> bool:
    """Whether these files are what a folder holds: the file that they are named after has been replaced."""
    last = folder / _PENDING.sub("", pending.name)
    return last.is_file() and _pending_name(last.name, last.read_bytes()) == pending.name


def _gone(pending: Path) -> list[str]:
    """Files of the folder that do not belong to the new set."""
    try:
        return [str(name) for name in json.loads((pending / "gone.json").read_bytes())]
    except (OSError, ValueError):
        return []


def finish(folder: Path) -> None:
    """Finish what an interrupted writer has left inside a folder, if nobody is at work there."""
    if not _pending(folder):
        return
    target = Path(os.path.realpath(folder))
    with contextlib.suppress(OSError, ArtifactError), _turn(target, seconds=0.0) as alone:
        for pending in _pending(target) if alone else ():
            _settle(target, pending)


def present(folder: Path, name: str) -> Path | None:
    """Where a file of a folder is; ``None`` if it is missing. Sees what an interrupted writer has left as finished."""
    for pending in _pending(folder):
        if _counts(folder, pending):
            if (pending / "files" / name).is_file():
                return pending / "files" / name
            if name in _gone(pending):
                return None
    return folder / name if (folder / name).is_file() else None


# ---------------------------------------------------------------------- reading


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
        folder = Path(os.path.expanduser(name))
        self.folder = folder if os.path.isdir(folder) else None  # no error for names that no folder can have
        if self.folder is not None:
            finish(self.folder)

    def path(self, name: str) -> Path | None:
        """Where a file is on this machine; ``None`` if it is missing.

        Raises:
            HubError: if the repository cannot be read.
        """
        if self.folder is not None:
            return present(self.folder, name)
        path = download(self.name, name, revision=self.commit or self.revision, repo_type=self.repo_type, **self.hub)
        if path is not None and self.commit is None:
            self.commit = path.parents[name.count("/")].name
        return path

    def read(self, name: str) -> bytes | None:
        """Content of a file; ``None`` if it is missing.

        Raises:
            HubError: if the repository cannot be read.
        """
        while (path := self.path(name)) is not None:
            try:
                return path.read_bytes()
            except FileNotFoundError:  # a writer has moved it to its place, or replaced the folder
                continue
        return None


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


def without_tuples(value: Any) -> Any:
    """A copy in which tuples are lists, for YAML, which has no tuples."""
    if isinstance(value, Mapping):
        return {key: without_tuples(each) for key, each in value.items()}
    return [without_tuples(each) for each in value] if isinstance(value, (list, tuple)) else value


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
