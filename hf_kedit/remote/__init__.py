"""Models that only take and give text: what is asked of them, a client for servers, and their place in a model."""

from __future__ import annotations

from .backend import OpenAICompatibleBackend, TargetScores, TextBackend
from .model import RemoteModel

__all__ = ["OpenAICompatibleBackend", "RemoteModel", "TargetScores", "TextBackend"]
