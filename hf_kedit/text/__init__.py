"""Prompts as plain text: words and scripts, where a subject stands, what stands between a prompt and its target."""
