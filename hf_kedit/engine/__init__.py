"""What the editing methods share; no method is named in here."""
