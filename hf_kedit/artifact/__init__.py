"""Edits as files: written, read, described, shared; as LoRA and back."""
