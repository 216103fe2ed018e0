"""What leaves the page: archives, folders, repositories, programs, command lines; and the page itself as a Space."""

from __future__ import annotations

import ast
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

from hf_kedit import EditableModel
from hf_kedit.cli import app as commands
from hf_kedit.errors import ConfigError, HubError, RequestError
from hf_kedit.testing.hub import LoopbackHub
from hf_kedit.ui import sharing
from hf_kedit.ui.changing import change, switch
from hf_kedit.ui.examples import Examples
from hf_kedit.ui.space import export_space
from hf_kedit.ui.visitors import Visitor
from tests.ui.test_changing import form_of, quiet


@pytest.fixture
def edited(examples: Examples, visitor: Visitor) -> Visitor:
    """Somebody with two edits, of which one is off."""
    for number in (0, 1):
        change(visitor, form_of(examples, number, settings={"v_num_grad_steps": 22}), examples, quiet)
    switch(visitor, visitor.entries[1].edit.id, False)
    return visitor


def test_an_archive_holds_what_is_on(edited: Visitor, tmp_path: Path) -> None:
    zipfile.ZipFile(sharing.save_archive(edited, tmp_path / "files")).extractall(tmp_path)
    again = EditableModel.from_pretrained(tmp_path / "edits")
    assert [e.id for e in again.edits] == [edited.entries[0].edit.id]


def test_nothing_to_share(visitor: Visitor, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing to share"):
        sharing.save_folder(visitor, tmp_path / "edits")
    with pytest.raises(RequestError, match="nothing to share"):
        sharing.push(visitor, "org/edits", "hf_x", private=True)
    assert not list(tmp_path.iterdir())


def test_a_push_uses_the_token_of_the_visitor(edited: Visitor, hub: LoopbackHub) -> None:
    for repo, token in (("", "hf_x"), ("org/edits", " ")):
        with pytest.raises(RequestError, match="repository"):
            sharing.push(edited, repo, token, private=True)
    with pytest.raises(HubError) as caught:
        sharing.push(edited, "org/edits", "hf_wrong_token", private=True)
    assert "hf_wrong_token" not in str(caught.value)
    for repo, token in (("org/\ud83d", "hf_x"), ("org/edits", "hf_é")):
        with pytest.raises(HubError, match=r"character|neither"):
            sharing.push(edited, repo, token, private=True)
    assert sharing.push(edited, " org/edits ", hub.token(), private=True) == "org/edits"
    again = EditableModel.from_pretrained("org/edits", token=hub.token())
    assert [e.id for e in again.edits] == [edited.entries[0].edit.id]


def test_the_program_makes_the_same_edits(edited: Visitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch(edited, edited.entries[1].edit.id, True)
    code = sharing.as_python("kedit/world-gpt2", edited.entries)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(code, scope)  # what people paste
    with edited.session.inside() as mine:
        assert scope["model"].fingerprint() == mine.fingerprint()  # type: ignore[attr-defined]
    assert (tmp_path / "edits" / "edit_config.json").is_file()
    assert sharing.as_python("m", edited.entries, "org/x").endswith('model.push_to_hub("org/x")\n')


def test_the_commands_make_the_same_edits(edited: Visitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch(edited, edited.entries[1].edit.id, True)
    monkeypatch.chdir(tmp_path)
    lines = sharing.as_command("kedit/world-gpt2", edited.entries).splitlines()
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "kedit"
        commands([*words, "--no-eval", "--no-side-effects", "--format", "quiet"], standalone_mode=False)
    again = EditableModel.from_pretrained(tmp_path / "edits")
    with edited.session.inside() as mine:
        assert again.fingerprint() == mine.fingerprint()
    assert shlex.split(sharing.as_command("m", edited.entries, "org/x").splitlines()[-1])[-1] == "org/x"


@pytest.mark.parametrize("text", ["$(touch x)", "'; touch x; '", "a\nb", '"""', "<img src=x onerror=alert(1)>", "{}'"])
def test_texts_stay_texts_in_programs(edited: Visitor, text: str) -> None:
    request = edited.entries[0].edit.request
    request.target_new = text
    words = shlex.split(sharing.as_command("m", edited.entries[:1]))
    assert words[words.index("--target") + 1] == text
    program = ast.parse(sharing.as_python("m", edited.entries[:1]))
    assert text in [node.value for node in ast.walk(program) if isinstance(node, ast.Constant)]


# ---------------------------------------------------------------------- the Space


def test_a_space_is_three_files(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    files = export_space(tmp_path / "space", "kedit/world-llama")
    assert sorted(file.name for file in files) == ["README.md", "app.py", "requirements.txt"]
    head = (tmp_path / "space" / "README.md").read_text(encoding="utf-8").split("---")[1]
    fields = dict(line.split(": ", 1) for line in head.strip().splitlines())
    assert fields["sdk"] == "gradio" and fields["app_file"] == "app.py"
    assert len(fields["short_description"]) <= 60  # the Hub refuses a longer one
    import gradio

    assert fields["sdk_version"].split(".")[0] == gradio.__version__.split(".")[0]
    with pytest.raises(ConfigError, match="folder of this machine"):
        export_space(tmp_path / "other", str(tmp_path))
    assert not (tmp_path / "other").exists()


def test_the_exported_app_starts(tmp_path: Path) -> None:
    """In a process of its own, as the Hub runs it."""
    pytest.importorskip("gradio")
    commands(["ui", "kedit/world-gpt2", "--export-space", str(tmp_path), "--format", "quiet"], standalone_mode=False)
    port = _free_port()
    environment = {**os.environ, "HOST": "127.0.0.1", "PORT": str(port)}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    try:
        page = _wait_for(f"http://127.0.0.1:{port}/", process)
    finally:
        process.kill()
        process.communicate()
    assert "kedit/world-gpt2" in page and "Change the fact" in page


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> str:
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            if process.poll() is not None:
                raise AssertionError(process.communicate()[1].decode()) from None
            time.sleep(0.2)
    raise AssertionError("it did not start")
