"""The editing methods: one file each, readable beside its paper. Importing this package registers them all.

A method of your own needs this import only: what it is made of is exported here, wherever it lives inside.
"""

from __future__ import annotations

import importlib
import pkgutil

from ..books.book import Saved
from ..books.deltas import WeightDelta
from ..books.site_book import SiteEntry, SiteMemory, check_finite, register_memory
from ..books.sites import SiteCall, SiteFunction, held_decision, needs_whole_prompt, prompt_lengths
from ..config import EditConfig, ModelProfile, WeightConfig
from ..engine.capture import Tap, capture_at
from ..engine.examples import Example, encode_examples
from ..requests import EditRequest
from ..tokens import pad_rows
from .base import Capabilities, Method, Outcome, Workbench, method_class, register_method, registered_methods
from .site_method import SiteConfig, SiteMethod

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Capabilities",
    "EditConfig",
    "EditRequest",
    "Example",
    "Method",
    "ModelProfile",
    "Outcome",
    "Saved",
    "SiteCall",
    "SiteConfig",
    "SiteEntry",
    "SiteFunction",
    "SiteMemory",
    "SiteMethod",
    "Tap",
    "WeightConfig",
    "WeightDelta",
    "Workbench",
    "capture_at",
    "check_finite",
    "encode_examples",
    "held_decision",
    "method_class",
    "needs_whole_prompt",
    "pad_rows",
    "prompt_lengths",
    "register_memory",
    "register_method",
    "registered_methods",
]
