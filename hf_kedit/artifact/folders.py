"""Folders that the library has written, pushed and pulled without loading a model.

What a folder is, its ``edit_config.json`` says: saved edits, a merged model (``kedit merge``), a trained editor. Of
saved edits only the files that belong to them are pushed; of the others everything that is safe to load.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError
from ..storage.files import FileSource, named_path, write_folder
from ..storage.parsing import parse_json
from ..storage.repository import list_files, matches, push_files
from .card import PLACEHOLDER
from .layout import ADAPTER_CONFIG, CARD, CONFIG, EDIT_KINDS, MERGED, OWN_FILES, WHOLE_MODEL, is_merged
from .reading import read_artifact
from .writing import without_local_base

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_UNPICKLED = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_TWICE = "a whole model beside it would carry the edits twice when it is loaded; choose another repository"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    tag: str | None = None,
    token: Any = None,
) -> CommitInfo:
    """Push a folder that `save_pretrained` or ``kedit merge`` has written, as one commit.

    Args:
        folder: with an ``edit_config.json``.
        repo_id: ``org/name``; made if it does not exist.
        private: of a new repository; ``True`` also refuses to push to an existing public one.
        revision: branch; made if it does not exist.
        create_pr: open a pull request instead of writing to the branch.
        commit_message: default: what the folder holds.
        tag: name of this version.
        token: for the Hub; default: your login.

    Returns:
        The client's description of the commit.

    Raises:
        ArtifactError: if the folder holds nothing of this library, is damaged, or has files that only unpickling can
            read.
        HubError: if the repository cannot be written.
    """
    folder = named_path(folder, "the folder")
    config_file = FileSource(str(folder)).read(CONFIG) if folder.is_dir() else None
    if config_file is None:
        raise ArtifactError(f"{str(folder)!r} holds nothing to push (no {CONFIG})")
    kind = _kind_of(folder, config_file)
    paths = {path.relative_to(folder).as_posix(): path for path in _all_files(folder)}
    files: dict[str, bytes | Path]
    if kind in EDIT_KINDS:  # what is checked is what is pushed
        own = {name: path.read_bytes() for name, path in paths.items() if matches(name, OWN_FILES) and name != CONFIG}
        read_artifact(str(folder), config_file, own.get)
        files = {CONFIG: config_file, **own}
    else:
        unsafe = [name for name, path in paths.items() if path.suffix in _UNPICKLED]
        if unsafe:
            raise ArtifactError(f"{str(folder)!r} has files that must be unpickled to be read: {', '.join(unsafe)}")
        files = {**paths}
    if kind in EDIT_KINDS or kind == MERGED:
        texts = {name: files[name] for name in files if name.endswith((".json", ".md"))}
        read = {name: text if isinstance(text, bytes) else text.read_bytes() for name, text in texts.items()}
        files |= without_local_base(read)
    if CARD in files:
        card = files[CARD]
        card = card.read_bytes() if isinstance(card, Path) else card
        files[CARD] = card.replace(PLACEHOLDER.encode(), repo_id.encode(errors="backslashreplace"))
    refuse = {ADAPTER_CONFIG: _TWICE} if kind == MERGED else {"config.json": WHOLE_MODEL}
    return push_files(
        repo_id,
        files,
        message=commit_message or f"{'edits' if kind in EDIT_KINDS else kind} from {folder.name}",
        owned=OWN_FILES,
        refuse=refuse,
        private=private,
        revision=revision,
        create_pr=create_pr,
        tag=tag,
        token=token,
    )


def pull_folder(repo_id: str, folder: str | Path, *, revision: str | None = None, token: Any = None) -> list[str]:
    """Write the saved edits of a repository to a folder.

    Args:
        repo_id: ``org/name``.
        folder: replaced if it holds saved edits already.
        revision: branch, tag or commit.
        token: for the Hub.

    Returns:
        The ids of the edits.

    Raises:
        ArtifactError: if the repository holds no saved edits, or they are damaged.
        HubError: if the repository cannot be read.
    """
    files, edit_ids = _version(repo_id, revision, token)
    write_folder(Path(folder), files, last=CONFIG, owned=OWN_FILES)
    return edit_ids


def restore_version(
    repo_id: str, to: str, *, revision: str | None = None, commit_message: str | None = None, token: Any = None
) -> CommitInfo:
    """Make an earlier version of saved edits the present one again, as a new commit: nothing is lost from the history.

    Args:
        repo_id: ``org/name``.
        to: tag, branch or commit of the version.
        revision: branch that goes back; default: the main one.
        commit_message: default: ``Back to …``.
        token: for the Hub.

    Raises:
        ArtifactError: if that version holds no saved edits, or they are damaged.
        HubError: if there is no such version, or the repository cannot be written.
    """
    files, _ = _version(repo_id, to, token)
    return push_files(
        repo_id,
        files,
        message=commit_message or f"Back to {to}",
        owned=OWN_FILES,
        refuse={"config.json": WHOLE_MODEL},
        revision=revision,
        token=token,
    )


def _version(repo_id: str, revision: str | None, token: Any) -> tuple[dict[str, bytes], list[str]]:
    """The files of the saved edits at a revision, checked, and the ids of the edits."""
    names = [name for name in list_files(repo_id, revision=revision, token=token) if matches(name, OWN_FILES)]
    source = FileSource(repo_id, revision=revision, token=token)
    contents = {name: source.read(name) for name in sorted(names, key=lambda name: (name != CONFIG, name))}
    files = {name: content for name, content in contents.items() if content is not None}
    if CONFIG not in files or is_merged(files[CONFIG]):
        raise ArtifactError(f"{repo_id!r} holds no saved edits at {revision or 'main'}")
    artifact = read_artifact(repo_id, files[CONFIG], files.get)
    return files, [edit.id for edit in artifact.journal]


def _kind_of(folder: Path, config_file: bytes) -> str:
    """The ``artifact`` of a folder's ``edit_config.json``."""
    try:
        return str(parse_json(config_file, CONFIG, ArtifactError)["artifact"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{str(folder)!r}: {CONFIG} does not say what the folder is: {error!r}") from error


def _all_files(folder: Path) -> list[Path]:
    hidden = (".git", ".cache")
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if path.relative_to(folder).parts[0] not in hidden)
