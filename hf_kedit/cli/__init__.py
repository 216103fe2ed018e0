"""The console script ``kedit``. Importing it is quick: what needs torch is imported inside the commands."""

from __future__ import annotations

import sys

try:
    from .app import app, main
except KeyboardInterrupt:  # while Python still reads it: there is no command yet that could say so
    sys.stderr.write("kedit: interrupted\n")
    raise SystemExit(130) from None

__all__ = ["app", "main"]
