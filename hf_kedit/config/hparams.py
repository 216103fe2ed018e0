"""Files of hyperparameters: one is read, and the packaged one of a method and a model is found.

The files live in the top-level folder ``hparams/<METHOD>/<model>.yaml``; a wheel carries them as
``hf_kedit/hparams``. Each names the models that it is for as patterns on the last part of the model's name. The
folder ``TRAINING`` holds plans for training editors instead.
"""

from __future__ import annotations

import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..storage.parsing import as_mapping, parse_json, parse_yaml, read_text

TRAINING = "TRAINING"
_PACKAGE = Path(__file__).resolve().parents[1]


def hparams_root() -> Path | None:
    """Return the folder of the packaged files: inside an installed package, or beside it in a checkout."""
    for folder in (_PACKAGE / "hparams", _PACKAGE.parent / "hparams"):
        if folder.is_dir():
            return folder
    return None


@cache
def _files(method: str) -> tuple[tuple[Path, tuple[str, ...], dict[str, Any]], ...]:
    root = hparams_root()
    if root is None:
        return ()
    files = []
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and folder.name.lower() == method.lower():
            for path in sorted(folder.glob("*.yaml")):
                data = read_mapping(path)
                patterns = tuple(str(p).lower() for p in data.pop("match", [path.stem]))
                files.append((path, patterns, data))
    return tuple(files)


def find_hparams(method: str, model_name: str) -> tuple[Path, dict[str, Any]] | None:
    """Return path and values of the file of ``method`` whose pattern matches the model, or ``None``.

    Args:
        method: ``edit_type`` of the method.
        model_name: id or local path; only its last part is compared, regardless of case.
    """
    last = model_name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].lower()
    for path, patterns, values in _files(method):
        if any(fnmatch.fnmatchcase(last, pattern) for pattern in patterns):
            return path, dict(values)
    return None


def list_hparams() -> list[Path]:
    """Return every packaged hparams file of a method."""
    root = hparams_root()
    return sorted(p for p in root.glob("*/*.yaml") if p.parent.name != TRAINING) if root else []


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping.

    Raises:
        ConfigError: if it is missing, unreadable or something else.
    """
    parse = parse_json if path.suffix == ".json" else parse_yaml
    return as_mapping(parse(read_text(path, ConfigError), repr(str(path)), ConfigError), repr(str(path)), ConfigError)
