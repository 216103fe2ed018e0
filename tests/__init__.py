"""Tests of hf_kedit; the folders mirror the package. A package so that helpers import as ``tests.<module>``."""
