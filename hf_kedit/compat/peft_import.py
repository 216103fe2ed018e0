"""Makes this library's adapter types known to PEFT as soon as both are imported, in whichever order.

Importing `hf_kedit` stays light: PEFT (and with it torch) is not imported here. Until it is, a finder waits for it.
Finder and loader are plain classes: their base classes in `importlib.abc` take longer to import than all of it.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from ..registry import import_sources

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def register_when_imported() -> None:
    """Register now if PEFT is imported, else right after its import."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    import_sources()  # methods bring the kinds of memory
    importlib.import_module("hf_kedit.compat.peft_tuners").register()


class _Waiting:
    """Finds PEFT as usual and registers behind its import.

    It waits until PEFT has been imported, not until it is looked for: transformers asks whether there is a PEFT long
    before anyone imports it.
    """

    def __init__(self) -> None:
        self._looking = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != "peft" or self._looking:
            return None
        from importlib.util import find_spec

        self._looking = True  # the others are asked the same
        try:
            spec = find_spec(name)
        finally:
            self._looking = False
        if spec is None or spec.loader is None:
            return None
        loader: Any = _Registering(spec.loader, self)
        spec.loader = loader
        return spec


class _Registering:
    """A loader that does what another one does, and registers."""

    def __init__(self, loader: Loader, waiting: _Waiting):
        self._loader, self._waiting = loader, waiting

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if self._waiting in sys.meta_path:
            sys.meta_path.remove(self._waiting)
        _register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
