"""Optimising target values: which vector, added at the fact token, makes the model say the new target."""
