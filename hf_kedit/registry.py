"""What is known by the name of a method: tables that are filled from above, so that this floor knows no method.

A module that defines methods announces itself, here or through the entry-point group ``hf_kedit.methods`` of an
installed package. It is imported when the first name is looked up, and registers its configs and methods then.
Nothing heavy is imported here: `import hf_kedit` reads this file.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, Generic, TypeVar

from .errors import UnknownMethodError, nearest, shown

T = TypeVar("T")
PLUGINS = "hf_kedit.methods"  # entry-point group in which an installed package names its module of methods
_WISHES = frozenset(
    "any auto best cheapest default easiest easy fast fastest good quick recommended right safe safest simple simplest"
    " standard which".split()
)
_MEANT = {
    **dict.fromkeys(("ft", "finetune", "finetuning", "sft", "training"), "ft-m"),
    **dict.fromkeys(("context", "rag", "retrieval", "memory"), "prompt"),
    **dict.fromkeys(("icl", "incontext", "incontextlearning", "ice"), "ike"),
    **dict.fromkeys(("adapter", "peft"), "lora"),
}
"""Words for a kind of method that resemble the name of another one, and a method of that kind."""
SOURCES: list[str] = []  # modules that register methods when they are imported


def normalise(name: str) -> str:
    """Return the tables' spelling of a method name: lower case, words joined by ``-``."""
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def announce(module: str) -> None:
    """Name a module that registers methods; it is imported when a method is looked up."""
    if module not in SOURCES:
        SOURCES.append(module)


def import_sources() -> None:
    """Import the modules that were announced; at no cost where that has happened."""
    for module in SOURCES:
        importlib.import_module(module)


@cache
def _import_plugins() -> None:
    import importlib.metadata  # here: it takes as long to import as the rest of `import hf_kedit`

    for entry in importlib.metadata.entry_points(group=PLUGINS):
        entry.load()


class Table(Generic[T]):
    """One thing per method, by the method's name. Looking one up imports what registers them."""

    def __init__(self) -> None:
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        """Enter something; a second entry of the same name takes the place of the first."""
        self._entries[normalise(name)] = entry

    def get(self, name: str) -> T:
        """Return the entry of a method.

        Raises:
            UnknownMethodError: naming the nearest known method.
        """
        entries = self.all()
        if not isinstance(name, str) or normalise(name) not in entries:
            known = ", ".join(entries)
            if isinstance(name, str) and normalise(name) in _WISHES:
                best = "--method auto chooses one for a model; " if "auto" in entries else ""
                raise UnknownMethodError(
                    f"{name!r} names no method, and none is the best for every model and fact: {best}the page 'Which"
                    " method?' (docs/methods/index.md) says what each one reaches and costs, and `kedit list-methods`"
                    f" shows them. Known: {known}."
                )
            meant = _MEANT.get(normalise(name).replace("-", "")) if isinstance(name, str) else None
            hint = nearest(meant if meant in entries else name, entries) if isinstance(name, str) else ""
            raise UnknownMethodError(f"unknown method {shown(name)}.{hint} Known: {known}.")
        return entries[normalise(name)]

    def all(self) -> dict[str, T]:
        """Return every entry by name, in alphabetical order."""
        import_sources()
        _import_plugins()
        return dict(sorted(self._entries.items()))


# Configs stand above this floor, and the reader of EasyEdit's files below them: hence no closer type.
CONFIGS: Table[type[Any]] = Table()
