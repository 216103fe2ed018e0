"""What edits are kept in: one book per kind of edit, and what the books stand on."""
