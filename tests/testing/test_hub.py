"""The loopback Hub, through the unmodified client: whatever a test of sharing relies on is checked here first."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    ModelCard,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_kedit.testing.hub import LoopbackHub

pytestmark = pytest.mark.hub
BIG = b"\0weights" * 1000


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    api = HfApi(endpoint=hub.endpoint, token=hub.token())
    api.create_repo("org/model")
    return api


def add(**files: bytes | str) -> list[CommitOperationAdd]:
    """``name__suffix=content`` → operations that add ``name.suffix``."""
    contents = {n.replace("__", "."): c.encode() if isinstance(c, str) else c for n, c in files.items()}
    return [CommitOperationAdd(name, content) for name, content in contents.items()]


def commit(api: HfApi, *operations: Any, **kwargs: Any) -> Any:
    return api.create_commit("org/model", [*operations], commit_message=kwargs.pop("commit_message", "work"), **kwargs)


def text(api: HfApi, name: str, **kwargs: Any) -> str:
    return Path(api.hf_hub_download("org/model", name, **kwargs)).read_text()


def test_a_commit_comes_back_file_by_file(api: HfApi) -> None:
    info = commit(api, *add(README__md="# hello", weights__safetensors=BIG))
    assert text(api, "README.md") == "# hello"
    assert Path(api.hf_hub_download("org/model", "weights.safetensors")).read_bytes() == BIG
    found = api.model_info("org/model", files_metadata=True)
    assert found.sha == info.oid and found.author == "org" and found.private is False
    sizes = {s.rfilename: (s.size, s.lfs and s.lfs.sha256) for s in found.siblings}
    assert sizes["weights.safetensors"] == (len(BIG), hashlib.sha256(BIG).hexdigest())
    assert sizes["README.md"] == (7, None)
    folder = Path(snapshot_download("org/model"))
    assert sorted(p.name for p in folder.iterdir()) == [".gitattributes", "README.md", "weights.safetensors"]
    assert folder.name == info.oid


def test_the_same_content_makes_no_commit(api: HfApi, hub: LoopbackHub) -> None:
    first = commit(api, *add(a__txt="one", b__bin=BIG))
    again = commit(api, *add(a__txt="one", b__bin=BIG))
    assert again.oid == first.oid and len(api.list_repo_commits("org/model")) == 2  # with the initial one
    hub.requests.clear()
    commit(api, *add(a__txt="two", c__bin=BIG))  # known content under another name is not sent again
    assert not [path for method, path in hub.requests if method == "PUT"]
    assert len(api.list_repo_commits("org/model")) == 3


def test_an_upload_must_have_its_hash(hub: LoopbackHub) -> None:
    oid = hashlib.sha256(BIG).hexdigest()
    request = urllib.request.Request(f"{hub.endpoint}/lfs/{oid}", data=b"something else", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert not hub.objects


def test_folders_deletions_copies_and_trees(api: HfApi, tmp_path: Path) -> None:
    for name in ("a.txt", "deep/b.txt", "deep/er/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    api.upload_folder(repo_id="org/model", folder_path=tmp_path, path_in_repo="sub", ignore_patterns="a.*")
    assert api.list_repo_files("org/model") == [".gitattributes", "sub/deep/b.txt", "sub/deep/er/c.txt"]
    top = {e.path for e in api.list_repo_tree("org/model", "sub/deep")}
    assert top == {"sub/deep/b.txt", "sub/deep/er"}
    entry = api.get_paths_info("org/model", ["sub/deep/b.txt", "no"], expand=True)
    assert [e.path for e in entry] == ["sub/deep/b.txt"] and "Upload" in entry[0].last_commit.title
    commit(api, CommitOperationCopy("sub/deep/b.txt", "copy.txt"), CommitOperationDelete("sub/deep/er/"))
    assert api.list_repo_files("org/model") == [".gitattributes", "copy.txt", "sub/deep/b.txt"]
    assert text(api, "copy.txt") == "deep/b.txt"
    assert not api.file_exists("org/model", "sub/deep/er/c.txt")
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("org/model", "nowhere"))
    with pytest.raises(RemoteEntryNotFoundError):
        commit(api, CommitOperationDelete("nothing.txt"))


def test_revisions(api: HfApi) -> None:
    first = commit(api, *add(a__txt="one"))
    api.create_tag("org/model", tag="v1")
    api.create_branch("org/model", branch="try/it", revision="v1")
    commit(api, *add(a__txt="two"), revision="try/it")
    commit(api, *add(a__txt="three"))
    read = {rev: text(api, "a.txt", revision=rev) for rev in ("v1", first.oid, first.oid[:8], "try/it", "main")}
    assert list(read.values()) == ["one", "one", "one", "two", "three"]
    refs = api.list_repo_refs("org/model")
    assert {b.name for b in refs.branches} == {"main", "try/it"} and refs.tags[0].target_commit == first.oid
    assert [c.title for c in api.list_repo_commits("org/model")] == ["work", "work", "initial commit"]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("org/model", tag="v1")
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(api, *add(a__txt="four"), parent_commit=first.oid)
    with pytest.raises(RevisionNotFoundError):
        commit(api, *add(a__txt="four"), revision="v1")  # a tag does not move
    api.delete_tag("org/model", tag="v1")
    api.delete_branch("org/model", branch="try/it")
    for gone in ("v1", "try/it"):
        with pytest.raises(RevisionNotFoundError):
            text(api, "a.txt", revision=gone)


def test_pull_requests(api: HfApi) -> None:
    commit(api, *add(a__txt="one", b__txt="one"))
    pull = commit(api, *add(a__txt="two"), create_pr=True, commit_message="better")
    assert pull.pr_num == 1 and text(api, "a.txt") == "one"
    assert text(api, "a.txt", revision=pull.pr_revision) == "two"
    commit(api, *add(c__txt="three"), revision=pull.pr_revision)
    commit(api, *add(b__txt="meanwhile"))
    details = api.get_discussion_details("org/model", 1)
    assert details.is_pull_request and details.title == "better" and details.conflicting_files == []
    api.merge_pull_request("org/model", 1)
    assert [text(api, f"{name}.txt") for name in "abc"] == ["two", "meanwhile", "three"]
    other = commit(api, *add(a__txt="x"), create_pr=True)
    commit(api, *add(a__txt="y"))
    assert api.get_discussion_details("org/model", other.pr_num).conflicting_files == ["a.txt"]
    with pytest.raises(HfHubHTTPError, match="conflicts"):
        api.merge_pull_request("org/model", other.pr_num)
    api.change_discussion_status("org/model", other.pr_num, "closed")
    assert [(d.num, d.status) for d in api.get_repo_discussions("org/model")] == [(1, "merged"), (2, "closed")]
    assert api.create_pull_request("org/model", "an empty one").status == "draft"
    assert not api.create_discussion("org/model", "only talk").is_pull_request


def test_what_is_not_there(api: HfApi) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/nothing")
    for name in ("org/nothing", "nothing"):
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download(name, "config.json")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("org/model", "config.json", revision="v9")
    with pytest.raises(RemoteEntryNotFoundError) as error:
        api.hf_hub_download("org/model", "config.json")
    assert error.value.response.headers["X-Repo-Commit"] == api.model_info("org/model").sha


def test_who_may_do_what() -> None:
    with LoopbackHub(("ann", "bob"), {"lab": ["ann"]}) as hub:
        ann, bob = (HfApi(endpoint=hub.endpoint, token=hub.token(user)) for user in ("ann", "bob"))
        nobody, stranger = HfApi(endpoint=hub.endpoint, token=False), HfApi(endpoint=hub.endpoint, token="hf_stolen")
        assert ann.whoami()["name"] == "ann" and [o["name"] for o in ann.whoami()["orgs"]] == ["lab"]
        for api in (nobody, stranger):
            with pytest.raises(HfHubHTTPError, match="401"):
                api.create_repo("lab/x")
        with pytest.raises(HfHubHTTPError, match="403"):
            bob.create_repo("lab/x")
        ann.create_repo("lab/secret", private=True)
        ann.create_repo("lab/secret", private=True, exist_ok=True)
        with pytest.raises(HfHubHTTPError, match="409"):
            ann.create_repo("lab/secret")
        assert ann.repo_exists("lab/secret") and not bob.repo_exists("lab/secret")
        assert [m.id for m in ann.list_models()] == ["lab/secret"] and not list(bob.list_models())
        ann.update_repo_settings("lab/secret", private=False, gated="manual")
        assert bob.model_info("lab/secret").gated == "manual"
        for api in (bob, nobody):
            with pytest.raises(GatedRepoError):
                api.hf_hub_download("lab/secret", ".gitattributes")
        with pytest.raises(HfHubHTTPError, match="403"):
            bob.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="lab/secret")
        ann.grant_access("lab/secret", "bob")
        assert bob.hf_hub_download("lab/secret", ".gitattributes")
        bob.auth_check("lab/secret")
        ann.delete_repo("lab/secret")
        assert not ann.repo_exists("lab/secret")


def test_parts_of_files(api: HfApi, hub: LoopbackHub) -> None:
    api.create_repo("org/table", repo_type="dataset")
    api.upload_file(path_or_fileobj=BIG, path_in_repo="data/x.bin", repo_id="org/table", repo_type="dataset")
    with HfFileSystem(endpoint=hub.endpoint, token=hub.token()).open("datasets/org/table/data/x.bin") as file:
        file.seek(5)
        assert file.read(7) == BIG[5:12]
    url = hf_hub_url("org/table", "data/x.bin", repo_type="dataset", endpoint=hub.endpoint)

    def ask(span: str) -> tuple[int, str | None, bytes]:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": span})) as response:
            return response.status, response.headers["Content-Range"], response.read()

    assert ask("bytes=2-4") == (206, f"bytes 2-4/{len(BIG)}", BIG[2:5])
    assert ask("bytes=-3") == (206, f"bytes {len(BIG) - 3}-{len(BIG) - 1}/{len(BIG)}", BIG[-3:])
    assert ask(f"bytes={len(BIG) - 2}-")[2] == BIG[-2:]
    for wrong in (f"bytes={len(BIG)}-", "bytes=-", "lines=1-2"):
        with pytest.raises(urllib.error.HTTPError, match="416"):
            ask(wrong)


def test_cards_are_checked(api: HfApi) -> None:
    ModelCard("---\ntags:\n- a\nlibrary_name: hf_kedit\npipeline_tag: text-generation\n---\n# x").push_to_hub(
        "org/model"
    )
    info = api.model_info("org/model")
    assert info.card_data.library_name == "hf_kedit" and info.tags == ["a", "hf_kedit"]
    assert info.pipeline_tag == "text-generation"
    for wrong, message in (
        ("---\ntags: [3]\n---\n", "tags"),
        ("---\ntags: [\n---\n", "flow"),
        ("---\n- a\n---\n", "mapping"),
        ("---\nmodel-index:\n- name: x\n  results:\n  - task: {}\n---\n", "model-index"),
    ):
        with pytest.raises(ValueError, match=message):
            commit(api, *add(README__md=wrong))
    assert len(api.list_repo_commits("org/model")) == 2


@pytest.mark.parametrize("path", ["../x", "a//b", ".git/config", "/etc/x"])
def test_paths_stay_inside(path: str, hub: LoopbackHub, api: HfApi) -> None:
    lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "file", "value": {"path": path, "content": ""}}]
    body = "\n".join(json.dumps(line) for line in lines).encode()
    request = urllib.request.Request(f"{hub.endpoint}/api/models/org/model/commit/main", data=body, method="POST")
    request.add_header("Authorization", f"Bearer {hub.token()}")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert api.list_repo_files("org/model") == [".gitattributes"]


def hf_command(hub: LoopbackHub, folder: Path) -> Callable[..., str]:
    """The ``hf`` program as a function of its words, with a home of its own; returns what it prints."""
    environment = {**os.environ, **hub.environment(str(folder / "home"))}

    def hf(*words: str) -> str:
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return hf


def test_the_command_line_of_the_client(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "w.bin").write_bytes(BIG)
    hf = hf_command(hub, tmp_path)
    assert "user" in hf("auth", "whoami")
    hf("repos", "create", "org/by-hand", "--private")
    hf("upload", "org/by-hand", str(tmp_path / "up"), ".")
    hf("repos", "tag", "create", "org/by-hand", "v1")
    hf("download", "org/by-hand", "--revision", "v1", "--local-dir", str(tmp_path / "down"))
    assert (tmp_path / "down" / "w.bin").read_bytes() == BIG
    assert "org/by-hand" in hf("models", "ls", "--author", "org", "--format", "json")


def test_as_a_program() -> None:
    command = [sys.executable, "-u", "-m", "hf_kedit.testing.hub", "--port", "0", "--user", "ann", "--org", "lab"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None and program.stderr is not None
        exported = {}
        while "NO_PROXY" not in exported:
            name, _, value = program.stdout.readline().removeprefix("export ").strip().partition("=")
            exported[name] = value
        api = HfApi(endpoint=exported["HF_ENDPOINT"], token=exported["HF_TOKEN"])
        assert api.create_repo("lab/x").repo_id == "lab/x" and api.whoami()["name"] == "ann"
        program.send_signal(signal.SIGINT)
        assert program.wait(30) == 0 and "stopped" in program.stderr.read()
