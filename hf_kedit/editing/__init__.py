"""A model's edits: its state, the verbs that change it, and sessions of several people."""

from __future__ import annotations

from ..journal import EditResult
from .sessions import EditSession
from .verbs import Editing

__all__ = ["EditResult", "EditSession", "Editing"]
