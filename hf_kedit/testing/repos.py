"""Repositories as the Hub keeps them: commits of files, branches, tags, pull requests. In memory; knows no HTTP."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from yaml import YAMLError

from .cards import front_matter

MAIN_BRANCH = "main"
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".h5", ".msgpack", ".npz", ".onnx", ".pt", ".zip", ".gz")
_GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class HubFault(Exception):
    """A request that the Hub refuses.

    Args:
        status: HTTP status.
        message: for people.
        code: for the client, which picks its exception by it (``RepoNotFound``, ``EntryNotFound`` …).
        data: more for the body of the answer.
        headers: more for the head of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "",
        data: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.data, self.headers = status, code, dict(data or {}), dict(headers or {})


@dataclass(frozen=True)
class Blob:
    """The content of a file; ``lfs`` says that git holds only a pointer to it."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content, by which the large-file store keeps it."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds in place of a large file."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @cached_property
    def oid(self) -> str:
        """The id of the git blob."""
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        """What the client compares with what it has."""
        return self.sha256 if self.lfs else self.oid

    def describe(self, path: str) -> dict[str, Any]:
        """The file as an entry of a tree."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    """A state of all files, and where it came from."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Blob]

    def last_commit(self) -> dict[str, str]:
        """The commit as the trees' ``expand`` shows it."""
        return {"id": self.id, "title": self.title, "date": self.date}


@dataclass
class Discussion:
    """A discussion, or a pull request: then with the branch it is for, where it left it, and its newest commit."""

    number: int
    title: str
    author: str
    created: str
    status: str = "open"
    base: str | None = None
    start: str = ""
    head: str = ""
    merged: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ref(self) -> str:
        """The git reference of a pull request."""
        return f"refs/pr/{self.number}"

    def add_event(self, kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
        """Append to the history of the discussion and return the new entry."""
        number = len(self.events) + 1
        event = {
            "id": f"{self.number:08x}{number:016x}",
            "type": kind,
            "createdAt": timestamp(),
            "author": {"name": author},
            "data": data,
        }
        self.events.append(event)
        return event


class Repository:
    """One model, dataset or space.

    Args:
        kind: ``models``, ``datasets`` or ``spaces``.
        name: ``namespace/name``.
        author: user who creates it.
        private: only members of the namespace may read it.
        sdk: of a space.
    """

    def __init__(self, kind: str, name: str, author: str, *, private: bool = False, sdk: str | None = None):
        self.kind, self.name, self.private, self.sdk = kind, name, private, sdk
        self.gated: str | bool = False
        self.granted: set[str] = set()
        self.created = timestamp()
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.discussions: dict[int, Discussion] = {}
        self.branches[MAIN_BRANCH] = self._record(
            None, {".gitattributes": Blob(_GITATTRIBUTES)}, "initial commit", "", author
        )

    # ------------------------------------------------------------------ reading

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request or (abbreviated) commit id.

        Raises:
            HubFault: if there is none.
        """
        short = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        pulls = {d.ref: d.head for d in self.discussions.values() if d.base}
        commit = self.branches.get(short) or self.tags.get(short) or pulls.get(revision)
        if commit is None and len(revision) >= 7:
            commit = next((c for c in self.commits if c.startswith(revision)), None)
        if commit is None:
            raise HubFault(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[commit]

    def file(self, revision: str, path: str) -> tuple[Commit, Blob]:
        """A file and the commit that it is of.

        Raises:
            HubFault: if there is no such file; with the commit, so that the client can remember the absence.
        """
        commit = self.resolve(revision)
        if path not in commit.files:
            raise HubFault(404, "Entry not found", "EntryNotFound", headers={"X-Repo-Commit": commit.id})
        return commit, commit.files[path]

    def history(self, revision: str) -> Iterator[Commit]:
        """A commit and those that it descends from, newest first."""
        commit: Commit | None = self.resolve(revision)
        while commit is not None:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None

    def tree(self, revision: str, folder: str, *, recursive: bool, expand: bool) -> list[dict[str, Any]]:
        """Entries of files and folders below a folder.

        Raises:
            HubFault: if the folder does not exist.
        """
        commit = self.resolve(revision)
        entries = [e for e in all_entries(commit) if not folder or e["path"].startswith(folder + "/")]
        if folder and not entries:
            raise HubFault(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        depth = folder.count("/") + 1 if folder else 0
        return [self._expanded(e, commit, expand) for e in entries if recursive or e["path"].count("/") == depth]

    def paths(self, revision: str, paths: Iterable[str], *, expand: bool) -> list[dict[str, Any]]:
        """Entries of those among some paths that exist."""
        commit, wanted = self.resolve(revision), set(paths)
        return [self._expanded(e, commit, expand) for e in all_entries(commit) if e["path"] in wanted]

    def _expanded(self, entry: dict[str, Any], commit: Commit, expand: bool) -> dict[str, Any]:
        """An entry, with the commit that changed it last if that is asked for."""
        if not expand:
            return entry
        changed = commit
        for older in self.history(commit.id):
            blob = older.files.get(entry["path"])
            if blob is None or blob.oid != entry["oid"]:
                break
            changed = older
        return {**entry, "lastCommit": changed.last_commit()}

    def card(self, commit: Commit) -> dict[str, Any]:
        """The YAML head of the README, or nothing."""
        readme = commit.files.get("README.md")
        try:
            return front_matter(readme.data.decode("utf-8")) if readme else {}
        except (ValueError, YAMLError):
            return {}

    def describe(self, revision: str = MAIN_BRANCH, *, blobs: bool = False) -> dict[str, Any]:
        """What ``model_info`` and its relatives return."""
        commit = self.resolve(revision)
        card = self.card(commit)
        tags = [t for t in (*card.get("tags", ()), card.get("library_name")) if isinstance(t, str)]
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(commit.files.items()):
            entry = blob.describe(path)
            extra = {"size": entry["size"], "blobId": entry["oid"]} if blobs else {}
            if blobs and "lfs" in entry:
                extra["lfs"] = {**entry["lfs"], "sha256": entry["lfs"]["oid"]}
            siblings.append({"rfilename": path, **extra})
        return {
            "_id": hashlib.sha1(f"{self.kind}/{self.name}".encode()).hexdigest()[:24],
            "id": self.name,
            "modelId": self.name,
            "author": self.name.rpartition("/")[0],
            "sha": commit.id,
            "private": self.private,
            "gated": self.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "sdk": self.sdk,
            "tags": tags,
            "cardData": card,
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "siblings": siblings,
            "createdAt": self.created,
            "lastModified": commit.date,
        }

    # ------------------------------------------------------------------ writing

    def commit(
        self,
        revision: str,
        changes: Mapping[str, Blob | None],
        *,
        title: str,
        message: str,
        author: str,
        parent: str | None = None,
        create_pr: bool = False,
    ) -> tuple[Commit, Discussion | None]:
        """Record changes (path → content, ``None`` deletes) on a branch or pull request, or as a new pull request.

        Raises:
            HubFault: if ``revision`` is no branch, or has moved on from ``parent``.
        """
        head = self.resolve(revision)
        if parent is not None and not create_pr and not head.id.startswith(parent):
            raise HubFault(412, f"{revision} has moved on to {head.id}: a commit has happened since {parent}")
        if create_pr and parent is not None:
            head = self.resolve(parent)
        place = revision.removeprefix("refs/heads/")
        pull = next((d for d in self.discussions.values() if d.base and d.ref == revision), None)
        if pull is None and place not in self.branches:
            raise HubFault(404, f"{revision} is not a branch", "RevisionNotFound")
        files = apply_changes(head.files, changes)
        new = self.commits[self._record(head.id, files, title, message, author)]
        if create_pr:
            pull = self.discuss(title, message, author, base=place, head=new.id, start=head.id)
        elif pull is not None:
            pull.head = new.id
        else:
            self.branches[place] = new.id
            return new, None
        pull.add_event("commit", author, {"subject": title, "oid": new.id})
        return new, pull

    def discuss(
        self, title: str, text: str, author: str, *, base: str | None = None, head: str = "", start: str = ""
    ) -> Discussion:
        """Open a discussion, or a pull request if ``base`` is given."""
        tip = self.resolve(base).id if base else ""
        number = len(self.discussions) + 1
        discussion = Discussion(number, title, author, timestamp(), base=base, head=head or tip, start=start or tip)
        comment = {"edited": False, "hidden": False, "latest": {"raw": text}}
        discussion.add_event("comment", author, comment)
        self.discussions[number] = discussion
        return discussion

    def discussion(self, number: int) -> Discussion:
        """Return a discussion.

        Raises:
            HubFault: if there is none of this number.
        """
        if number not in self.discussions:
            raise HubFault(404, f"there is no discussion {number}")
        return self.discussions[number]

    def conflicts(self, pull: Discussion) -> list[str]:
        """Paths that a pull request and its branch have both changed since it left it."""
        assert pull.base is not None
        before = self.commits[pull.start].files
        theirs = difference(before, self.resolve(pull.base).files)
        ours = difference(before, self.commits[pull.head].files)
        return sorted(path for path in ours.keys() & theirs.keys() if ours[path] != theirs[path])

    def merge(self, number: int, author: str) -> Discussion:
        """Put the changes of a pull request on its branch.

        Raises:
            HubFault: if it is not an open pull request, or conflicts with what happened on the branch since.
        """
        pull = self.discussion(number)
        if not pull.base or pull.status not in ("open", "draft"):
            raise HubFault(409, f"discussion {number} is no open pull request")
        conflicting = self.conflicts(pull)
        if conflicting:
            raise HubFault(409, f"conflicts in {', '.join(conflicting)}")
        changes = difference(self.commits[pull.start].files, self.commits[pull.head].files)
        title = f"{pull.title} (#{number})"
        new, _ = self.commit(pull.base, changes, title=title, message="", author=author)
        pull.status, pull.merged = "merged", new.id
        pull.add_event("status-change", author, {"status": "merged"})
        return pull

    def point(self, table: dict[str, str], name: str, revision: str) -> None:
        """Add a branch or a tag: an entry of ``branches`` or ``tags``.

        Raises:
            HubFault: if the name is taken, or the revision does not exist.
        """
        if name in self.branches or name in self.tags:
            raise HubFault(409, f"Reference already exists: {name}")
        table[name] = self.resolve(revision).id

    def unpoint(self, table: dict[str, str], name: str) -> None:
        """Remove a branch or a tag.

        Raises:
            HubFault: if there is none of this name, or it is the main branch.
        """
        if name not in table:
            raise HubFault(404, f"there is no reference {name}", "RevisionNotFound")
        if table is self.branches and name == MAIN_BRANCH:
            raise HubFault(403, "the main branch cannot be deleted")
        del table[name]

    def _record(self, parent: str | None, files: Mapping[str, Blob], title: str, message: str, author: str) -> str:
        date = timestamp()
        digest = hashlib.sha1(f"{self.kind}/{self.name}|{parent}|{len(self.commits)}|{title}|{date}".encode())
        for path, blob in sorted(files.items()):
            digest.update(f"{path} {blob.oid}\n".encode())
        commit = Commit(digest.hexdigest(), parent, title, message, author, date, dict(files))
        self.commits[commit.id] = commit
        return commit.id


# ---------------------------------------------------------------------- trees and texts


def apply_changes(files: Mapping[str, Blob], changes: Mapping[str, Blob | None]) -> dict[str, Blob]:
    """Files after changes. A deleted path that ends in ``/`` is a folder.

    Raises:
        HubFault: if something that does not exist is to be deleted.
    """
    result = dict(files)
    for path, blob in changes.items():
        if blob is not None:
            result[path] = blob
            continue
        gone = [p for p in result if p == path or (path.endswith("/") and p.startswith(path))]
        if not gone:
            raise HubFault(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del result[name]
    return result


def difference(before: Mapping[str, Blob], after: Mapping[str, Blob]) -> dict[str, Blob | None]:
    """The changes that lead from one set of files to another."""
    return {p: after.get(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p)}


def all_entries(commit: Commit) -> list[dict[str, Any]]:
    """Entries of all files and folders of a commit, sorted by path."""
    folders = {"/".join(parts) for path in commit.files for parts in _parents(path)}
    entries = [blob.describe(path) for path, blob in commit.files.items()]
    for folder in folders:
        inside = "".join(sorted(b.oid for p, b in commit.files.items() if p.startswith(folder + "/")))
        oid = hashlib.sha1(f"{folder}|{inside}".encode()).hexdigest()
        entries.append({"type": "directory", "path": folder, "oid": oid, "size": 0})
    return sorted(entries, key=lambda entry: entry["path"])


def _parents(path: str) -> Iterator[list[str]]:
    parts = path.split("/")[:-1]
    return itertools.accumulate(([part] for part in parts), lambda a, b: [*a, *b])


def timestamp() -> str:
    """Now, as the Hub writes dates."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
