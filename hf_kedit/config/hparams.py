"""Find the packaged hparams file of a method and a model.

The files live in the top-level folder ``hparams/<METHOD>/<model>.yaml``; a wheel carries them as
``hf_kedit/hparams``. Each names the models that it is for as patterns on the last part of the model's name. The
folder ``TRAINING`` holds plans for training editors instead.
"""

from __future__ import annotations

import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import yaml

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
    found = []
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and folder.name.lower() == method.lower():
            for path in sorted(folder.glob("*.yaml")):
                data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
                patterns = tuple(str(p).lower() for p in data.pop("match", [path.stem]))
                found.append((path, patterns, data))
    return tuple(found)


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
