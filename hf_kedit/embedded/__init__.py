"""Models with a name of our own: the tiny ones that come with the package, and real ones that PyPI has.

``kedit/world-gpt2`` and ``kedit/world-llama`` (about 1.5 M parameters each) know the synthetic fact world of
:mod:`hf_kedit.data.world`; ``kedit/world-pictures`` (1.75 M) knows it too and sees the drawings of
:mod:`hf_kedit.data.picture_world`. They are ordinary transformers folders inside the installed package, for tests,
examples and trying things out offline. ``kedit/smollm2-135m`` and ``kedit/minilm-l6`` are fetched once, see `wheels`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ..errors import DataError, nearest
from . import wheels

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
        known = [*names(), *wheels.MODELS]
        raise DataError(
            f"There is no embedded model named {name!r}.{nearest(short, known)}"
            f" Known: {', '.join(PREFIX + n for n in known)}."
        ) from None


def is_embedded(name: str) -> bool:
    """Tell whether ``name`` is the id of an embedded model, such as ``"kedit/world-gpt2"``."""
    return name.startswith(PREFIX) and name.removeprefix(PREFIX) in _folders()


def resolve(name: str) -> Path | None:
    """Return the folder for an id such as ``"kedit/world-gpt2"``, or None if the id is of another kind.

    A model that PyPI has is fetched first if it is not on this machine yet.

    Raises:
        DataError: the id starts with ``kedit/`` but there is no such model.
        DownloadError: the model has to be fetched and cannot be.
        MissingExtraError: the model has to be converted, and the package for that is not installed.
    """
    if not name.startswith(PREFIX):
        return None
    fetched = wheels.MODELS.get(name.removeprefix(PREFIX))
    return path(name) if fetched is None else wheels.set_up(fetched)


def is_there(name: str) -> bool:
    """Tell whether a model of ours is on this machine, so that `resolve` fetches nothing."""
    short = name.removeprefix(PREFIX)
    return wheels.MODELS[short].is_there if short in wheels.MODELS else short in _folders()


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
