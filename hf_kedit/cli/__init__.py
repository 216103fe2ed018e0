"""The console script ``kedit``. Importing it is quick: what needs torch is imported inside the commands."""

from __future__ import annotations

from .app import app, main

__all__ = ["app", "main"]
