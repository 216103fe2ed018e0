"""Runs: planning, carrying out, keeping and resuming an evaluation."""
