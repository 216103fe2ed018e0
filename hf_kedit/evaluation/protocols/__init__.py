"""Protocols: what a case asks, and how answers become metrics."""
