"""Whole folders through the Hub: saved edits, merged models, hypernetworks; versions and going back to one."""

from __future__ import annotations

from ..artifact.folders import pull_folder, push_folder, restore_version

__all__ = ["pull_folder", "push_folder", "restore_version"]
