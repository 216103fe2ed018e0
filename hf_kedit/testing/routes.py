"""What the loopback Hub answers: one function per request that ``huggingface_hub`` makes. Knows no sockets."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml

from .cards import card_errors, front_matter
from .repos import LFS_SUFFIXES, MAIN_BRANCH, Blob, Discussion, HubFault, Repository
from .state import HubState

SAMPLE_IS_BINARY = b"\0"
_PREFIX = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


@dataclass
class Call:
    """A request.

    Args:
        hub: that got it.
        method: ``GET``, ``POST`` …
        path: still quoted, without the query.
        query: first value of each parameter.
        headers: with lower-case names.
        body: as sent.
        user: who asks; ``None``: nobody who said so.
    """

    hub: HubState
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    user: str | None

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            HubFault: if it is not.
        """
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubFault(400, f"the body is not JSON: {error}") from error

    def flag(self, name: str) -> bool:
        """Whether a parameter is set."""
        return self.query.get(name, "").lower() in ("1", "true")

    def writer(self) -> str:
        """The user.

        Raises:
            HubFault: if nobody is logged in.
        """
        if self.user is None:
            raise HubFault(401, "Invalid username or password.")
        return self.user

    def readable(self, kind: str, name: str) -> Repository:
        """A repository that the user may read.

        Raises:
            HubFault: as if it did not exist, if it is private.
        """
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not self.hub.is_member(self.user, name)):
            raise HubFault(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, kind: str, name: str) -> Repository:
        """A repository that the user may write to.

        Raises:
            HubFault: if nobody is logged in, there is none, or it belongs to others.
        """
        user = self.writer()
        repo = self.readable(kind, name)
        if not self.hub.is_member(user, name):
            raise HubFault(403, "You don't have the rights to change this repository")
        return repo

    def contents(self, kind: str, name: str) -> Repository:
        """A repository whose files the user may read.

        Raises:
            HubFault: if it is gated and the user has not been let in.
        """
        repo = self.readable(kind, name)
        if repo.gated and not self.hub.is_member(self.user, name) and self.user not in repo.granted:
            message = f"Access to {kind.removesuffix('s')} {name} is restricted: ask for access on its page"
            raise HubFault(403 if self.user else 401, message, "GatedRepo")
        return repo


@dataclass
class Answer:
    """What goes back: bytes, or data that becomes JSON."""

    data: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """As bytes."""
        return self.data if isinstance(self.data, bytes) else json.dumps(self.data, default=str).encode()


Handler = Callable[..., Any]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []
_PARTS = {
    "kind": "(?P<kind>models|datasets|spaces)",
    "repo": "(?P<repo>[^/]+/[^/]+)",
    "rev": "(?P<rev>[^/]+)",
    "name": "(?P<name>[^/]+)",
    "path": "(?P<path>.+)",
    "number": r"(?P<number>\d+)",
    "oid": "(?P<oid>[0-9a-f]{64})",
}


def route(method: str, template: str) -> Callable[[Handler], Handler]:
    """Register a handler for a method and a path; ``{rev}`` and its like become keyword arguments."""
    pattern = re.compile(re.sub(r"\{(\w+)\}", lambda match: _PARTS[match[1]], template))

    def register(handler: Handler) -> Handler:
        ROUTES.append((method, pattern, handler))
        return handler

    return register


def answer(call: Call) -> Answer:
    """Find the handler of a request and run it.

    Raises:
        HubFault: if there is none, or it refuses.
    """
    method = "GET" if call.method == "HEAD" else call.method
    for wanted, pattern, handler in ROUTES:
        match = pattern.fullmatch(call.path) if wanted == method else None
        if match:
            parts = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
            result = handler(call, **parts)
            return result if isinstance(result, Answer) else Answer(result)
    raise HubFault(404, f"nothing answers {call.method} {call.path}")


# ---------------------------------------------------------------------- accounts and repositories


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Any:
    """Who the token belongs to."""
    user = call.writer()
    orgs = [{"type": "org", "name": org, "fullname": org} for org, members in call.hub.orgs.items() if user in members]
    token = {"displayName": "loopback", "role": "write", "createdAt": "2026-01-01T00:00:00.000Z"}
    return {
        "type": "user",
        "id": hashlib.sha1(user.encode()).hexdigest()[:24],
        "name": user,
        "fullname": user,
        "email": f"{user}@example.invalid",
        "orgs": orgs,
        "auth": {"type": "access_token", "accessToken": token},
    }


def _named(call: Call) -> tuple[str, str, dict[str, Any]]:
    """Kind and full name of the repository that the body of a request names, and the body."""
    body = call.json()
    name = f"{body.get('organization') or call.writer()}/{body['name']}"
    return f"{body.get('type') or 'model'}s", name, body


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Any:
    """Make a repository, or say that it is there (with its address, which the client reads)."""
    kind, name, body = _named(call)
    url = {"url": f"{call.hub.endpoint}/{_PREFIX[kind]}{name}", "name": name}
    if not call.hub.is_member(call.writer(), name):
        raise HubFault(403, f"You don't have the rights to create a {kind[:-1]} under this namespace")
    if (kind, name) in call.hub.repos:
        raise HubFault(409, "You already created this repository", data=url)
    call.hub.repos[kind, name] = Repository(
        kind, name, call.writer(), private=body.get("visibility") == "private", sdk=body.get("sdk")
    )
    return url


@route("DELETE", "/api/repos/delete")
def delete_repo(call: Call) -> Any:
    """Remove a repository."""
    kind, name, _ = _named(call)
    call.writable(kind, name)
    del call.hub.repos[kind, name]
    return {}


@route("PUT", "/api/{kind}/{repo}/settings")
def settings(call: Call, kind: str, repo: str) -> Any:
    """Change visibility and gating."""
    target, body = call.writable(kind, repo), call.json()
    target.private = body.get("visibility", "private" if target.private else "public") == "private"
    target.gated = body.get("gated", target.gated)
    return {"private": target.private, "gated": target.gated}


@route("POST", "/api/{kind}/{repo}/user-access-request/grant")
def grant(call: Call, kind: str, repo: str) -> Any:
    """Let a user into a gated repository."""
    call.writable(kind, repo).granted.add(call.json()["user"])
    return {}


@route("GET", "/api/{kind}/{repo}/auth-check(?:/write)?")
def auth_check(call: Call, kind: str, repo: str) -> Any:
    """Whether the user may read the files, or write."""
    (call.writable if call.path.endswith("/write") else call.contents)(kind, repo)
    return {}


@route("GET", "/api/{kind}")
def list_repos(call: Call, kind: str) -> Any:
    """The repositories that the user may see."""
    infos = []
    for (of, name), repo in sorted(call.hub.repos.items()):
        visible = not repo.private or call.hub.is_member(call.user, name)
        if of == kind and visible and call.query.get("search", "") in name:
            infos.append(repo.describe())
    author = call.query.get("author")
    infos = [info for info in infos if author in (None, info["author"])]
    return infos[: int(call.query.get("limit", len(infos)))]


# ---------------------------------------------------------------------- looking into a repository


@route("GET", "/api/{kind}/{repo}/revision/{rev}")
@route("GET", "/api/{kind}/{repo}")
def repo_info(call: Call, kind: str, repo: str, rev: str = MAIN_BRANCH) -> Any:
    """What ``repo_info`` returns."""
    return call.readable(kind, repo).describe(rev, blobs="blobs" in call.query)


@route("GET", "/api/{kind}/{name}(?:/revision/{rev})?")
@route("GET", "/{name}/resolve/{rev}/{path}")
def without_namespace(call: Call, **_: str) -> Any:
    """Every repository here has a namespace."""
    raise HubFault(404 if call.user else 401, "Repository not found", "RepoNotFound")


@route("GET", "/api/{kind}/{repo}/tree/{rev}(?:/{path})?")
def tree(call: Call, kind: str, repo: str, rev: str, path: str = "") -> Any:
    """Files and folders."""
    return call.readable(kind, repo).tree(
        rev, path.strip("/"), recursive=call.flag("recursive"), expand=call.flag("expand")
    )


@route("POST", "/api/{kind}/{repo}/paths-info/{rev}")
def paths_info(call: Call, kind: str, repo: str, rev: str) -> Any:
    """Files and folders by name; the request is a form."""
    form = parse_qs(call.body.decode("utf-8"))
    expand = form.get("expand", [""])[0].lower() in ("1", "true")
    return call.readable(kind, repo).paths(rev, form.get("paths", ()), expand=expand)


@route("GET", "/api/{kind}/{repo}/refs")
def refs(call: Call, kind: str, repo: str) -> Any:
    """Branches, tags and pull requests."""
    repository = call.readable(kind, repo)
    pulls = [d for d in repository.discussions.values() if d.base]
    return {
        "branches": [_ref(n, f"refs/heads/{n}", c) for n, c in repository.branches.items()],
        "tags": [_ref(n, f"refs/tags/{n}", c) for n, c in repository.tags.items()],
        "converts": [],
        "pullRequests": [_ref(d.ref, d.ref, d.head) for d in pulls],
    }


def _ref(name: str, ref: str, commit: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": commit}


@route("GET", "/api/{kind}/{repo}/commits/{rev}")
def commits(call: Call, kind: str, repo: str, rev: str) -> Any:
    """The history."""
    return [
        {"id": c.id, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
        for c in call.readable(kind, repo).history(rev)
    ]


@route("GET", "/(?:{kind}/)?{repo}/resolve/{rev}/{path}")
def resolve_file(call: Call, repo: str, rev: str, path: str, kind: str = "models") -> Any:
    """A file, or a part of it."""
    commit, blob = call.contents(kind, repo).file(rev, path)
    headers = {
        "X-Repo-Commit": commit.id,
        "ETag": f'"{blob.etag}"',
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
    }
    if blob.lfs:
        headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
    wanted = call.headers.get("range")
    if wanted is None:
        return Answer(blob.data, headers=headers)
    first, last = _span(wanted, len(blob.data))
    headers["Content-Range"] = f"bytes {first}-{last}/{len(blob.data)}"
    return Answer(blob.data[first : last + 1], 206, headers)


def _span(header: str, size: int) -> tuple[int, int]:
    """First and last byte that a ``Range`` header asks for.

    Raises:
        HubFault: if it is not of the form ``bytes=a-b``, or lies behind the end.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if match is None or match[1] == match[2] == "":
        raise HubFault(416, f"not a range: {header}")
    if match[1] == "":
        return max(size - int(match[2]), 0), size - 1
    first, last = int(match[1]), min(int(match[2] or size), size - 1)
    if first > last:
        raise HubFault(416, f"{header} lies behind the end", headers={"Content-Range": f"bytes */{size}"})
    return first, last


# ---------------------------------------------------------------------- commits


@route("POST", "/api/{kind}/{repo}/preupload/{rev}")
def preupload(call: Call, kind: str, repo: str, rev: str) -> Any:
    """Which files go to the large-file store, and what the repository has of them already."""
    present = call.writable(kind, repo).resolve(rev).files
    files = []
    for entry in call.json()["files"]:
        path, sample = entry["path"], base64.b64decode(entry.get("sample", ""))
        large = path.endswith(LFS_SUFFIXES) or SAMPLE_IS_BINARY in sample
        old = present.get(path)
        mode = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        files.append(mode | ({"oid": old.etag} if old else {}))
    return {"files": files}


@route("POST", r"/(?:{kind}/)?{repo}\.git/info/lfs/objects/batch")
def lfs_batch(call: Call, repo: str, kind: str = "models") -> Any:
    """Where to put large files that are not there yet."""
    call.writable(kind, repo)
    objects = []
    for entry in call.json()["objects"]:
        transfer = {"oid": entry["oid"], "size": entry["size"]}
        if entry["oid"] not in call.hub.objects:
            href = f"{call.hub.endpoint}/lfs/{entry['oid']}"
            actions = {"upload": {"href": href, "header": {}}, "verify": {"href": f"{href}/verify", "header": {}}}
            transfer["actions"] = actions
        objects.append(transfer)
    return {"transfer": "basic", "objects": objects}


@route("PUT", "/lfs/{oid}")
def lfs_put(call: Call, oid: str) -> Any:
    """Keep a large file. The address is the permission, as on the Hub."""
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise HubFault(400, "the content does not have the promised SHA-256")
    call.hub.objects[oid] = call.body
    return Answer(b"")


@route("POST", "/lfs/{oid}/verify")
def lfs_verify(call: Call, oid: str) -> Any:
    """Confirm that a large file has arrived."""
    if len(call.hub.objects.get(oid, b"")) != call.json()["size"]:
        raise HubFault(404, "the object has not arrived")
    return {}


@route("POST", "/api/{kind}/{repo}/commit/{rev}")
def commit(call: Call, kind: str, repo: str, rev: str) -> Any:
    """Record a commit: a line of JSON for its head, and one for each file."""
    target = call.writable(kind, repo)
    head: dict[str, Any] = {}
    changes: dict[str, Blob | None] = {}
    try:
        for line in call.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                head = value
            elif item["key"] == "file":
                changes[_checked(value["path"])] = Blob(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                changes[_checked(value["path"])] = _large(call, value["oid"])
            elif item["key"] == "deletedFile":
                changes[_checked(value["path"])] = None
            elif item["key"] == "deletedFolder":
                changes[_checked(value["path"]).rstrip("/") + "/"] = None
            else:
                raise HubFault(400, f"unknown operation {item['key']!r}")
    except (ValueError, KeyError, binascii.Error) as error:
        raise HubFault(400, f"not a commit: {error!r}") from error
    new, pull = target.commit(
        rev,
        changes,
        title=head.get("summary", ""),
        message=head.get("description", ""),
        author=call.writer(),
        parent=head.get("parentCommit"),
        create_pr=call.flag("create_pr"),
    )
    page = f"{call.hub.endpoint}/{_PREFIX[kind]}{repo}"
    reply = {"success": True, "commitOid": new.id, "commitUrl": f"{page}/commit/{new.id}", "hookOutput": ""}
    return reply | ({"pullRequestUrl": f"{page}/discussions/{pull.number}"} if pull else {})


def _checked(path: str) -> str:
    """A path that stays inside the repository."""
    if path.startswith("/") or any(part in ("", ".", "..", ".git") for part in path.rstrip("/").split("/")):
        raise HubFault(400, f"not a path: {path!r}")
    return path


def _large(call: Call, oid: str) -> Blob:
    """A file of the large-file store."""
    if oid not in call.hub.objects:
        raise HubFault(400, f"the large file {oid} was not uploaded")
    return Blob(call.hub.objects[oid], lfs=True)


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Any:
    """Check the head of a README."""
    errors, warnings = [], []
    try:
        card = front_matter(call.json()["content"])
        errors = card_errors(card)
        if not card:
            warnings.append({"message": "empty or missing yaml metadata in repo card"})
    except (ValueError, yaml.YAMLError) as error:
        errors = [str(error)]
    body = {"errors": [{"message": message} for message in errors], "warnings": warnings}
    return Answer(body, 400 if errors else 200)


# ---------------------------------------------------------------------- branches, tags, pull requests


@route("POST", "/api/{kind}/{repo}/branch/{name}")
def create_branch(call: Call, kind: str, repo: str, name: str) -> Any:
    """Start a branch."""
    target = call.writable(kind, repo)
    target.point(target.branches, name, call.json().get("startingPoint") or MAIN_BRANCH)
    return {}


@route("DELETE", "/api/{kind}/{repo}/branch/{name}")
def delete_branch(call: Call, kind: str, repo: str, name: str) -> Any:
    """Drop a branch."""
    target = call.writable(kind, repo)
    target.unpoint(target.branches, name)
    return {}


@route("POST", "/api/{kind}/{repo}/tag/{rev}")
def create_tag(call: Call, kind: str, repo: str, rev: str) -> Any:
    """Name a commit."""
    target = call.writable(kind, repo)
    target.point(target.tags, call.json()["tag"], rev)
    return {}


@route("DELETE", "/api/{kind}/{repo}/tag/{name}")
def delete_tag(call: Call, kind: str, repo: str, name: str) -> Any:
    """Drop a tag."""
    target = call.writable(kind, repo)
    target.unpoint(target.tags, name)
    return {}


@route("GET", "/api/{kind}/{repo}/discussions")
def discussions(call: Call, kind: str, repo: str) -> Any:
    """All discussions and pull requests, on one page."""
    repository = call.readable(kind, repo)
    status, wanted = call.query.get("status"), call.query.get("type")
    chosen = [d for d in repository.discussions.values() if status in (None, "all", d.status)]
    chosen = [d for d in chosen if wanted in (None, "all", "pull_request" if d.base else "discussion")]
    return {"discussions": [_described(repository, d) for d in chosen], "count": len(chosen), "start": 0}


@route("POST", "/api/{kind}/{repo}/discussions")
def create_discussion(call: Call, kind: str, repo: str) -> Any:
    """Open a discussion or an empty pull request."""
    body, repository = call.json(), call.readable(kind, repo)
    base = MAIN_BRANCH if body.get("pullRequest") else None
    opened = repository.discuss(body["title"], body.get("description", ""), call.writer(), base=base)
    if base:
        opened.status = "draft"
    return {"num": opened.number, "url": f"{call.hub.endpoint}/{_PREFIX[kind]}{repo}/discussions/{opened.number}"}


@route("GET", "/api/{kind}/{repo}/discussions/{number}")
def discussion(call: Call, kind: str, repo: str, number: str) -> Any:
    """One discussion with its history."""
    repository = call.readable(kind, repo)
    one = repository.discussion(int(number))
    details: dict[str, Any] = {**_described(repository, one), "events": one.events}
    if one.base:
        details["changes"] = {"base": f"refs/heads/{one.base}", "mergeCommitId": one.merged}
        details["filesWithConflicts"] = repository.conflicts(one) if one.merged is None else []
    return details


@route("POST", "/api/{kind}/{repo}/discussions/{number}/merge")
def merge(call: Call, kind: str, repo: str, number: str) -> Any:
    """Merge a pull request."""
    repository = call.writable(kind, repo)
    return _described(repository, repository.merge(int(number), call.writer()))


@route("POST", "/api/{kind}/{repo}/discussions/{number}/status")
def change_status(call: Call, kind: str, repo: str, number: str) -> Any:
    """Close or open a discussion."""
    one = call.writable(kind, repo).discussion(int(number))
    one.status = call.json()["status"]
    return {"newStatus": one.add_event("status-change", call.writer(), {"status": one.status})}


def _described(repo: Repository, one: Discussion) -> dict[str, Any]:
    return {
        "title": one.title,
        "num": one.number,
        "author": {"name": one.author},
        "createdAt": one.created,
        "status": one.status,
        "repo": {"name": repo.name, "type": repo.kind.removesuffix("s")},
        "isPullRequest": one.base is not None,
    }
