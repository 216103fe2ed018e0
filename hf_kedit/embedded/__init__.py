"""The tiny language models that come with the package, for tests, examples and trying things out offline.

``kedit/world-gpt2`` and ``kedit/world-llama`` (about 1.5 M parameters each) know the synthetic fact world of
:mod:`hf_kedit.data.world`. They are ordinary transformers folders inside the installed package.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ..errors import DataError, nearest

PREFIX = "kedit/"
_ROOT = Path(__file__).resolve().parent


@cache
def _folders() -> dict[str, Path]:
    return {folder.name: folder for folder in sorted(_ROOT.iterdir()) if (folder / "config.json").is_file()}


def names() -> list[str]:
    """Return the names of all embedded models, without the prefix ``kedit/``."""
    return list(_folders())


def path(name: str) -> Path:
    """Return the folder of an embedded model.

    Args:
        name: ``"world-gpt2"``, with or without the prefix ``kedit/``.

    Raises:
        DataError: there is no such model; names the nearest.
    """
    short = name.removeprefix(PREFIX)
    try:
        return _folders()[short]
    except KeyError:
        known = ", ".join(PREFIX + n for n in names()) or "none in this installation"
        raise DataError(
            f"There is no embedded model named {name!r}.{nearest(short, names())} Known: {known}."
        ) from None


def is_embedded(name: str) -> bool:
    """Tell whether ``name`` is the id of an embedded model, such as ``"kedit/world-gpt2"``."""
    return name.startswith(PREFIX) and name.removeprefix(PREFIX) in _folders()


def resolve(name: str) -> Path | None:
    """Return the folder for an id such as ``"kedit/world-gpt2"``, or None if the id is of another kind.

    Raises:
        DataError: the id starts with ``kedit/`` but there is no such model.
    """
    return path(name) if name.startswith(PREFIX) else None


def instructions() -> Path:
    """Return the file with the packaged instructions of editing tasks: task → descriptions."""
    return _ROOT / "instructions.json"


def editor(name: str) -> Path | None:
    """Return the folder of a packaged editor such as ``"kedit/mend-world-gpt2"``, or None if the name is another.

    Raises:
        DataError: the name starts with ``kedit/`` but there is no such editor.
    """
    if not name.startswith(PREFIX):
        return None
    folder = _ROOT / "editors" / name.removeprefix(PREFIX)
    if not (folder / "edit_config.json").is_file():
        known = sorted(PREFIX + p.name for p in (_ROOT / "editors").glob("*"))
        raise DataError(f"There is no packaged editor named {name!r}. Known: {', '.join(known) or 'none'}.")
    return folder
