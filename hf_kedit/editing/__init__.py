"""A model's edits: its state, and the verbs that change it."""

from __future__ import annotations

from .verbs import Editing, EditResult

__all__ = ["EditResult", "Editing"]
