"""Trained networks that turn gradients into edits."""
