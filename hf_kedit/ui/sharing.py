"""What leaves the page: a folder of edits to download or push, and the lines that do the same without the page."""

from __future__ import annotations

import json
import shlex
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import HubError, RequestError
from ..hub import push_folder
from ..storage.display import python_text
from .visitors import HistoryEntry, Visitor


def save_folder(visitor: Visitor, folder: Path) -> Path:
    """Write the edits that are on into a folder, as `EditableModel.save_pretrained` does.

    Raises:
        RequestError: if there are none.
    """
    if not visitor.shared:
        raise RequestError("there is nothing to share yet: change a fact first, or switch an edit on")
    with visitor.session.inside(without=visitor.off) as model:
        model.save_pretrained(folder)
    return folder


def save_archive(visitor: Visitor, home: Path, name: str = "edits") -> Path:
    """The same as a ZIP file, for a download; it takes the place of the one before.

    Args:
        visitor: whose edits.
        home: a folder of the visitor's own, made if needed.
        name: of the folder in the archive.
    """
    home.mkdir(parents=True, exist_ok=True)
    target = home / f"{name}.zip"
    with tempfile.TemporaryDirectory(prefix="kedit-ui-") as place:
        folder = save_folder(visitor, Path(place) / name)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                archive.write(file, f"{name}/{file.relative_to(folder)}")
    return target


def push(visitor: Visitor, repo_id: str, token: str, *, private: bool) -> str:
    """Push the edits that are on to the Hub with a token that is used once and kept nowhere.

    The files are written first, so that nobody waits for the network while the model is held.

    Args:
        visitor: whose edits.
        repo_id: ``org/name``.
        token: of the visitor; never the one of whoever runs the page.
        private: of a new repository.

    Returns:
        The repository.

    Raises:
        HubError: if it cannot be written; the message does not hold the token.
        RequestError: if something is missing.
    """
    repo_id, token = repo_id.strip(), token.strip()
    if not repo_id or not token:
        raise RequestError("a repository (name/of-it) and a token that may write there are needed")
    with tempfile.TemporaryDirectory(prefix="kedit-ui-") as home:
        folder = save_folder(visitor, Path(home) / "edits")
        try:
            push_folder(folder, repo_id, private=private or None, token=token)
        except HubError as error:
            raise type(error)(str(error).replace(token, "***")) from None
    return repo_id


def as_python(model: str, entries: Sequence[HistoryEntry], repo_id: str = "") -> str:
    """The Python program that makes the same edits, of which there is at least one."""
    method = entries[0].edit.method
    lines = ["from hf_kedit import EditableModel", ""]
    lines.append(f'model = EditableModel.from_pretrained({python_text(model)}, "{method}")')
    for entry in entries:
        if entry.edit.method != method or entry.settings:
            method = entry.edit.method
            values = "".join(f", {name}={value!r}" for name, value in entry.settings.items())
            lines.append(f'model.set_method(AutoEditConfig.for_method("{method}"{values}))')
        request = entry.edit.request
        given = {"prompt": request.prompt, "subject": request.subject, "target_new": request.target_new}
        inside = ", ".join(f"{name}={python_text(text)}" for name, text in given.items() if text)
        lines.append(f"model.edit({inside})")
    if any("AutoEditConfig" in line for line in lines):
        lines[0] = "from hf_kedit import AutoEditConfig, EditableModel"
    lines.append('model.save_pretrained("edits")')
    if repo_id.strip():
        lines.append(f"model.push_to_hub({python_text(repo_id.strip())})")
    return "\n".join(lines) + "\n"


def as_command(model: str, entries: Sequence[HistoryEntry], repo_id: str = "") -> str:
    """The command lines that make the same edits, each on the folder that the one before has written."""
    lines, source = [], model
    for number, entry in enumerate(entries):
        request = entry.edit.request
        target = "edits" if number == len(entries) - 1 else f"edits-{number + 1}"
        words = ["kedit", "edit", "--model", source, "--method", entry.edit.method, "--prompt", request.prompt]
        words += ["--subject", request.subject] if request.subject else []
        words += ["--target", request.target_new]
        for name, value in entry.settings.items():
            words += ["--set", f"{name}={json.dumps(value)}"]
        lines.append(shlex.join([*words, "--output", target]))
        source = target
    if repo_id.strip():
        lines.append(shlex.join(["kedit", "push", "edits", repo_id.strip()]))
    return "\n".join(lines) + "\n"
