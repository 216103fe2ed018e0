"""The version, in one place: setup.cfg and the package read it from here without importing anything else."""

__version__ = "0.1.0"
