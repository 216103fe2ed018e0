"""Results as data, and their pages."""
