"""Files of hyperparameters: one is read, and that of a method and a model is found.

The packaged files live in the top-level folder ``hparams/<METHOD>/<model>.yaml``; a wheel carries them as
``hf_kedit/hparams``. Each names the models that it is for as patterns on the last part of the model's name. The
folder ``TRAINING`` holds plans for training editors instead. A user's own files, which ``kedit tune`` writes, lie in
the same order in `user_hparams` and come first.
"""

from __future__ import annotations

import fnmatch
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..storage.files import named_path
from ..storage.parsing import as_mapping, parse_json, parse_yaml, read_text

TRAINING = "TRAINING"
_PACKAGE = Path(__file__).resolve().parents[1]


def hparams_root() -> Path | None:
    """Return the folder of the packaged files: inside an installed package, or beside it in a checkout."""
    for folder in (_PACKAGE / "hparams", _PACKAGE.parent / "hparams"):
        if folder.is_dir():
            return folder
    return None


def user_hparams() -> Path:
    """Return the folder of the user's own files: ``$KEDIT_HOME/hparams``, else ``~/.config/kedit/hparams``.

    They lie where settings do and not in the cache, which may be deleted at will.
    """
    if home := os.environ.get("KEDIT_HOME"):
        return Path(home) / "hparams"
    return Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")) / "kedit" / "hparams"


def is_users(path: Path) -> bool:
    """Whether a file that was found is one of the user's."""
    return user_hparams() in path.parents


def place_of(path: Path) -> str:
    """How a file that was found is named to people: a packaged one as in the source tree."""
    return str(path) if is_users(path) else f"hparams/{path.parent.name}/{path.name}"


@cache
def _packaged(method: str) -> list[tuple[Path, tuple[str, ...], dict[str, Any]]]:
    return _files(hparams_root(), method)


def _files(root: Path | None, method: str) -> list[tuple[Path, tuple[str, ...], dict[str, Any]]]:
    files: list[tuple[Path, tuple[str, ...], dict[str, Any]]] = []
    if root is None or not os.path.isdir(root):
        return files
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and folder.name.lower() == method.lower():
            for path in sorted(folder.glob("*.yaml")):
                data = read_mapping(path)
                patterns = tuple(str(p).lower() for p in data.pop("match", [path.stem]))
                files.append((path, patterns, data))
    return files


def find_hparams(method: str, model_name: str) -> tuple[Path, dict[str, Any]] | None:
    """Return path and values of the file of ``method`` whose pattern matches the model, or ``None``; own files first.

    Args:
        method: ``edit_type`` of the method.
        model_name: id or local path; only its last part is compared, regardless of case, and of a GGUF file's name
            without the number format (``.Q4_K_M.gguf``).
    """
    last = model_name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].lower()
    last = re.sub(r"([.-](i?q\d\w*|b?f16|f32))?\.gguf$", "", last)
    for path, patterns, values in (*_files(user_hparams(), method), *_packaged(method)):
        if any(fnmatch.fnmatchcase(last, pattern) for pattern in patterns):
            return path, dict(values)
    return None


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping.

    Raises:
        ConfigError: if it is missing, unreadable or something else.
    """
    path = named_path(path, "the file", ConfigError)
    parse = parse_json if path.suffix == ".json" else parse_yaml
    return as_mapping(parse(read_text(path, ConfigError), repr(str(path)), ConfigError), repr(str(path)), ConfigError)
