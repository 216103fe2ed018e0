"""Scenarios: a practical question, the fields of a request that it reads, and the protocols that answer it.

A scenario adds no way of measuring of its own: it chooses protocols with their settings, and prepares the requests
that they ask about. Numbers before the edit therefore come from the unedited model, as everywhere.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_origin, get_type_hints

from ...data.loading import load_edit_dataset
from ...errors import EvaluationError, nearest, shown
from ...requests import EditRequest
from ...storage.records import read_all
from ...storage.shapes import of_type
from ..protocols.base import Protocol


@dataclass(frozen=True)
class Scenario(ABC):
    """Base class. A scenario is a dataclass whose fields are its options; `register_scenario` makes it known.

    Class attributes:
        name: for ``scenario=`` and ``--scenario``.
        question: what a user asks, in one sentence.
        reads: field of a request → what the scenario takes from it.
        layouts: key of a file's first record → registered data set whose layout such a file has. The first data set
            is the one that is meant where only a path is given.
        standin: what is used where the user brings no judge or classifier; empty if none is needed.
    """

    name: ClassVar[str]
    question: ClassVar[str]
    reads: ClassVar[Mapping[str, str]] = {}
    layouts: ClassVar[Mapping[str, str]] = {}
    standin: ClassVar[str] = ""

    @abstractmethod
    def protocols(self) -> list[Protocol]:
        """What is asked of every case before and after its edit. The first protocol has the scenario's own numbers."""

    def requests(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """The requests as they are edited and asked about; by default, as they are.

        Raises:
            RequestError: if one lacks what the scenario cannot do without; nothing has been edited then.
        """
        return list(requests)

    def settings(self) -> dict[str, Any]:
        """What decides the results, JSON-ready: name and options; of judges and functions, their names."""
        options = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {"name": self.name, **options}

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """What the scenario is for and what it takes, JSON-ready."""
        return {
            "question": cls.question,
            "options": [field.name for field in fields(cls)],
            "reads": dict(cls.reads),
            "layouts": list(dict.fromkeys(cls.layouts.values())),
            "standin": cls.standin or None,
        }

    def read(self, source: Any = None, path: str | Path | None = None, **options: Any) -> Any:
        """Load the edits: a registered data set, or a file in a layout of the scenario or of the library.

        Args:
            source: as for `load_edit_dataset`; the path of a file may have a layout of the scenario.
            path: of the files of ``source``; without a source, of a file in a layout of the scenario.
            options: of `load_edit_dataset`.

        Raises:
            DataError: if there is no such file or data set.
        """
        file = source if path is None else path
        if isinstance(file, (str, Path)) and os.path.isfile(file) and (source is None or path is None):
            source, path = self._layout(Path(file)), file
        elif source is None:
            source = next(iter(self.layouts.values()), None)
        return load_edit_dataset(source, path=path, **options)

    def _layout(self, file: Path) -> str | None:
        """Name of the data set whose layout a file has; ``None``: the library's own."""
        first = next(iter(read_all((str(file),))), None)
        keys = first if isinstance(first, Mapping) else {}
        return next((dataset for key, dataset in self.layouts.items() if key in keys), None)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return str(getattr(value, "name", None) or getattr(value, "__name__", None) or type(value).__name__)


S = TypeVar("S", bound=type[Scenario])
SCENARIOS: dict[str, type[Scenario]] = {}


def register_scenario(cls: S) -> S:
    """Class decorator: make a scenario known under its name."""
    SCENARIOS[cls.name] = cls
    return cls


def load_scenario(scenario: str | Scenario, **options: Any) -> Scenario:
    """The scenario of a name, with options; a scenario object is returned as it is.

    Raises:
        EvaluationError: for an unknown name or option (the nearest is given), or a value that does not fit.
    """
    if isinstance(scenario, Scenario):
        return scenario
    if not isinstance(scenario, str) or scenario not in SCENARIOS:
        hint = nearest(scenario, SCENARIOS) if isinstance(scenario, str) else ""
        raise EvaluationError(f"unknown scenario {shown(scenario)}.{hint} Known: {', '.join(sorted(SCENARIOS))}.")
    cls = SCENARIOS[scenario]
    known = [field.name for field in fields(cls)]
    for name in options:
        if name not in known:
            raise EvaluationError(
                f"scenario {scenario!r} has no option {shown(name)}.{nearest(str(name), known)}"
                f" It has: {', '.join(known) or 'none'}."
            )
    kinds = get_type_hints(cls)
    options = {n: tuple(v) if isinstance(v, list) and get_origin(kinds[n]) is tuple else v for n, v in options.items()}
    for name, value in options.items():
        of_type(kinds[name], value, f"the option {name} of scenario {scenario!r}", EvaluationError)
    return cls(**options)
