"""The editing methods: one file each, readable beside its paper. Importing this package registers them all."""

from __future__ import annotations

import importlib
import pkgutil

from .base import Capabilities, Method, Outcome, Workbench, method_class, register_method, registered_methods

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Capabilities",
    "Method",
    "Outcome",
    "Workbench",
    "method_class",
    "register_method",
    "registered_methods",
]
