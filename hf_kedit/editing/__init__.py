"""A model's edits: its state, and the verbs that change it."""

from __future__ import annotations

from ..journal import EditResult
from .verbs import Editing

__all__ = ["EditResult", "Editing"]
