"""Weight edits as plain PEFT adapters, and plain LoRA adapters as edits."""
