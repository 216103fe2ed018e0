"""Benchmarks: our engine against a straightforward reference path, side by side in one run."""
