"""Folders of files: old or new at every instant, whoever is stopped, interrupted or writes at the same time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_kedit.errors import ArtifactError
from hf_kedit.storage import files as storage
from hf_kedit.storage.files import FileSource, write_folder, write_text

LAST = "edit_config.json"
OWNED = {LAST, "weights", "card", "adapter", "edits/*/adapter"}
OLD = {LAST: b"old", "weights": b"old" * 9, "adapter": b"old adapter", "edits/one/adapter": b"old one"}
NEW = {LAST: b"new", "weights": b"new" * 9, "card": b"new card", "edits/two/adapter": b"new two"}
FOREIGN = {"notes.txt": b"mine", "sub/deep/n.txt": b"mine too"}
PLACES = sorted({*OLD, *NEW})


def no_exchange(one: Path, other: Path) -> None:
    raise OSError(errno.ENOSYS, "not here")


def seen(folder: Path) -> dict[str, bytes]:
    """What a reader finds."""
    source = FileSource(str(folder))
    contents = {name: source.read(name) for name in PLACES}
    return {name: content for name, content in contents.items() if content is not None}


def foreign(folder: Path) -> dict[str, bytes]:
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {name: (folder / name).read_bytes() for name in names if name not in PLACES and ".kedit-" not in name}


def prepare(root: Path, with_foreign: bool) -> Path:
    folder = root / "edits"
    write_folder(folder, OLD, last=LAST, owned=OWNED)
    for name, content in FOREIGN.items() if with_foreign else ():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def kill_everywhere(root: str, with_foreign: bool, exchange: bool) -> None:
    """Run in a process of its own: fork a writer for every operation on files, and end it there."""
    if not exchange:
        storage._exchange = no_exchange  # type: ignore[assignment]
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    changes = {f"os.{name}" for name in "mkdir rename remove rmdir link chmod chown".split()}
    outcomes = []
    for kill_at in range(10_000):
        folder = prepare(Path(root) / str(kill_at), with_foreign)
        child = os.fork()
        if child == 0:
            count = 0

            def hook(event: str, args: Any, kill_at: int = kill_at) -> None:
                nonlocal count
                if event in changes or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
                    count += 1
                    if count > kill_at:
                        os._exit(9)

            sys.addaudithook(hook)
            write_folder(folder, NEW, last=LAST, owned=OWNED)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        outcomes.append(seen(folder) == NEW)
        assert seen(folder) in (OLD, NEW), f"a mixture after {kill_at} operations: {seen(folder)}"
        assert foreign(folder) == (FOREIGN if with_foreign else {}), f"after {kill_at} operations"
        write_folder(folder, NEW, last=LAST, owned=OWNED)
        assert seen(folder) == NEW and foreign(folder) == (FOREIGN if with_foreign else {})
        left = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert left == {*NEW, *(FOREIGN if with_foreign else ())}, f"after {kill_at} operations"
        assert [p.name for p in folder.parent.iterdir()] == ["edits"], f"left behind after {kill_at} operations"
        if status == 0:
            break
    assert len(outcomes) > 20 and not outcomes[0] and outcomes[-1]
    assert outcomes == sorted(outcomes), "new, then old again"


@pytest.mark.parametrize("with_foreign", [False, True], ids=["alone", "beside other files"])
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "inside"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_is_killed_at_every_operation(with_foreign: bool, exchange: bool, tmp_path: Path) -> None:
    call = f"from {__name__} import kill_everywhere; kill_everywhere({str(tmp_path)!r}, {with_foreign}, {exchange})"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "inside"])
def test_many_writers_and_readers(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(storage, "_exchange", no_exchange)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    folder = prepare(tmp_path, True)
    failures: list[BaseException] = []
    stop = threading.Event()

    def repeat(action: Callable[[], Any]) -> None:
        try:
            while not stop.is_set():
                action()
        except BaseException as error:
            failures.append(error)

    def write(files: dict[str, bytes]) -> None:
        write_folder(folder, files, last=LAST, owned=OWNED)

    def read() -> None:
        assert FileSource(str(folder)).read(LAST) in (b"old", b"new")
        assert FileSource(str(folder)).read("weights") in (OLD["weights"], NEW["weights"])

    actions = [lambda: write(OLD), lambda: write(NEW), lambda: write(NEW), read, read]
    threads = [threading.Thread(target=repeat, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for _ in range(10):
        write(OLD)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    write(NEW)
    assert seen(folder) == NEW and foreign(folder) == FOREIGN
    assert [p.name for p in tmp_path.iterdir()] == ["edits"]


def test_a_writer_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(tmp_path, False)
    monkeypatch.setattr(storage, "LOCK_SECONDS", 0.05)
    with storage._turn(folder) as alone:
        assert alone
        with pytest.raises(ArtifactError, match="another process"):
            write_folder(folder, NEW, last=LAST, owned=OWNED)
        assert seen(folder) == OLD
    write_folder(folder, NEW, last=LAST, owned=OWNED)
    assert seen(folder) == NEW


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "inside"])
def test_folders_of_others_inside_keep_their_modes(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(storage, "_exchange", no_exchange)
    folder = prepare(tmp_path / "folder", False)
    (folder / "notes" / "private").mkdir(parents=True)
    (folder / "notes" / "empty").mkdir(mode=0o711)
    (folder / "notes" / "private" / "diary").write_text("mine")
    (folder / "notes" / "elsewhere").symlink_to(tmp_path, target_is_directory=True)
    (folder / "notes" / "private").chmod(0o700)
    (folder / "notes").chmod(0o750)
    write_folder(folder, NEW, last=LAST, owned=OWNED)
    modes = {name: (folder / name).stat().st_mode & 0o777 for name in ("notes", "notes/private", "notes/empty")}
    assert modes == {"notes": 0o750, "notes/private": 0o700, "notes/empty": 0o711}
    assert (folder / "notes/private/diary").read_text() == "mine"
    assert (folder / "notes/elsewhere").readlink() == tmp_path


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "inside"])
def test_links_modes_and_the_umask(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(storage, "_exchange", no_exchange)
    before = os.umask(0o027)
    try:
        folder = prepare(tmp_path / "real", False)
        assert folder.stat().st_mode & 0o777 == 0o750 and (folder / LAST).stat().st_mode & 0o777 == 0o640
        folder.chmod(0o700)
        (folder / "weights").chmod(0o600)
        outside = tmp_path / "outside"
        outside.mkdir()
        (folder / "edits/one/adapter").unlink()
        (folder / "edits/one").rmdir()
        (folder / "edits").rmdir()
        (folder / "edits").symlink_to(outside)
        (folder / "adapter").unlink()
        (folder / "adapter").symlink_to(outside / "adapter")
        link = tmp_path / "link"
        link.symlink_to(folder)
        write_folder(link, NEW, last=LAST, owned=OWNED)
    finally:
        os.umask(before)
    assert link.is_symlink() and seen(folder) == NEW
    assert not list(outside.iterdir()) and not (folder / "edits").is_symlink()
    assert folder.stat().st_mode & 0o777 == 0o700 and (folder / "weights").stat().st_mode & 0o777 == 0o600
    assert (folder / "card").stat().st_mode & 0o777 == 0o640
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "not yet")
    write_folder(dangling, NEW, last=LAST, owned=OWNED)
    assert dangling.is_symlink() and seen(tmp_path / "not yet") == NEW


def test_the_folder_in_which_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(tmp_path, True)
    monkeypatch.chdir(folder)
    write_folder(Path("."), NEW, last=LAST, owned=OWNED)
    assert Path.cwd() == folder and seen(Path(".")) == seen(folder) == NEW and foreign(folder) == FOREIGN


def test_a_folder_above_the_one_in_which_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(tmp_path, True)
    (folder / "deep" / "down").mkdir(parents=True)
    monkeypatch.chdir(folder / "deep" / "down")
    write_folder(folder, NEW, last=LAST, owned=OWNED)
    assert Path.cwd() == folder / "deep" / "down" and os.path.samefile(".", folder / "deep" / "down")
    assert {name: (folder / name).read_bytes() for name in NEW} == NEW


@pytest.mark.parametrize("exchange", [True, False])
def test_what_killed_writers_have_left_is_cleared(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare(tmp_path, True)
    if not exchange:
        monkeypatch.setattr(storage, "_exchange", no_exchange)
    drafts = [tmp_path / ".edits.kedit-0123456789abcdef", folder / ".kedit-0123456789abcdef"]
    others = [tmp_path / ".edits2.kedit-0123456789abcdef", tmp_path / ".edits"]
    for place in (*drafts, *others):
        (place / "inside").mkdir(parents=True)
        (place / "inside" / "weights").write_bytes(b"half")
    write_folder(folder, NEW, last=LAST, owned=OWNED)
    assert seen(folder) == NEW and foreign(folder) == FOREIGN
    assert not any(place.exists() for place in drafts) and all((place / "inside/weights").exists() for place in others)


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"):
        write_folder(tmp_path / "file", NEW, last=LAST)
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_folder(tmp_path / "file" / "inside", NEW, last=LAST)
    folder = prepare(tmp_path, True)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left"):
        write_folder(folder, NEW, last=LAST, owned=OWNED)
    assert seen(folder) == OLD and foreign(folder) == FOREIGN
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edits", "file"]


def test_a_text_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "made" / "facts.jsonl"
    assert write_text(path, "old") == path and path.read_text() == "old"
    with pytest.raises(ArtifactError, match="is a folder"):
        write_text(tmp_path, "x")
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_text(path / "inside", "x")
    with pytest.raises(ArtifactError, match="surrogates"):
        write_text(path, "new \ud83d")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(ArtifactError, match="No space left"):
        patched.setattr(os, "fsync", full)
        write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == [path.name]
    write_text(path, "new \ud83d", errors="backslashreplace")
    assert path.read_text() == "new \\ud83d"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "x")
    assert os.read(reader, 9) == b"x" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
