"""The editing methods: one file each, readable beside its paper. Importing this package registers them all."""

from . import ft, memit, rome
from .base import Capabilities, Method, Outcome, Workbench, method_class, registered_methods

__all__ = [
    "Capabilities",
    "Method",
    "Outcome",
    "Workbench",
    "ft",
    "memit",
    "method_class",
    "registered_methods",
    "rome",
]
