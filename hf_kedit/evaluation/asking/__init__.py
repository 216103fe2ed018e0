"""Asking a model: scoring given texts, generating, in batches."""
