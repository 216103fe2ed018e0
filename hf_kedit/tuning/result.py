"""The result of a search: settings, what they were measured to do, and how sure that is; a file, found by name."""

from __future__ import annotations

import dataclasses
import datetime
import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from ..config import EditConfig
from ..config.hparams import user_hparams
from ..errors import TuneError
from ..storage.files import without_tuples
from ..version import __version__
from .facts import ChosenFacts
from .scores import LEAST_FIGURE, LEAST_KEPT, PairedGain, TuneScore


@dataclass(frozen=True)
class TriedSettings:
    """Settings with what they reached.

    Args:
        changes: field → value, of the fields that differ from the derived settings.
        score: over the facts that they were tried on last.
    """

    changes: Mapping[str, Any]
    score: TuneScore


@dataclass(frozen=True)
class TuneResult:
    """What a search has found.

    Args:
        best_config: the best settings of the search, complete.
        derived_config: the derived ones, complete.
        method: name of the method.
        model: name of the model.
        revision: commit of the model, if it is known.
        fingerprint: hash of its weights.
        facts: that settings were chosen and checked on.
        derived: the derived settings on the facts of the search.
        best: the best settings on the facts of the search.
        check_derived: the derived settings on the held-out facts; ``None`` if there was no time for the check.
        check_best: the best settings there; ``None`` too where the derived ones are the best.
        gain: of the best settings over the derived ones, on the held-out facts.
        tried: all candidates, in the order of their invention.
        traced: layers that causal tracing names; empty without tracing.
        seconds: of the search.
        seed: of everything random in it.
        edits: so many edits were measured.
        has_file: there is a file for the model, whose settings were tried, too.
    """

    best_config: EditConfig
    derived_config: EditConfig
    method: str
    model: str
    revision: str | None
    fingerprint: str
    facts: ChosenFacts
    derived: TriedSettings
    best: TriedSettings
    check_derived: TuneScore | None
    check_best: TuneScore | None
    gain: PairedGain | None
    tried: Sequence[TriedSettings] = field(repr=False)
    traced: Sequence[int]
    seconds: float
    seed: int
    edits: int
    has_file: bool

    @property
    def config(self) -> EditConfig:
        """The settings to use: the best of the search, or the derived ones where the check does not confirm them."""
        return self.best_config if self.replaced else self.derived_config

    @property
    def replaced(self) -> bool:
        """Whether the settings are others than the derived ones."""
        return not self._refused

    @property
    def is_news(self) -> bool:
        """Whether the settings should be found by name: derived ones must not take the place of a file's."""
        return self.replaced or not self.has_file

    @property
    def _refused(self) -> str:
        """Why the best settings of the search do not take the derived ones' place; empty if they do."""
        if not self.best.changes:
            return "no other settings were better on the facts of the search"
        if self.check_derived is None or self.check_best is None or self.gain is None:
            return "there was no time to check the best ones on facts that the search never saw"
        if self.check_best.harms(self.check_derived):
            return "on facts that the search never saw, the best ones change more of the general answers"
        if self.gain.mean <= 0:
            return "on facts that the search never saw, the best ones of the search are not better"
        return ""

    @property
    def verdict(self) -> str:
        """In one or two sentences: what was found, and how sure it is."""
        refused = self._refused
        if refused:
            return f"The derived settings are kept: {refused}."
        assert self.gain is not None and self.check_best is not None
        sure = "a single fact tells little"
        if self.gain.low is not None and self.gain.high is not None:
            sure = f"95% interval {100 * self.gain.low:+.1f} to {100 * self.gain.high:+.1f}"
            sure += "" if self.gain.low > 0 else ", so it may be chance"
        return (
            f"Better than the derived settings by {100 * self.gain.mean:.1f} points on {self.check_best.n} facts that"
            f" the search never saw ({sure})."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""

        def told(measured: TriedSettings) -> dict[str, Any]:
            return {"changes": dict(measured.changes), **measured.score.to_dict()}

        return {
            "method": self.method,
            "model": self.model,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "replaced": self.replaced,
            "verdict": self.verdict,
            "changes": dict(self.best.changes) if self.replaced else {},
            "config": self.config.to_dict(),
            "facts": {
                "source": self.facts.source,
                "asked": self.facts.asked,
                "known": self.facts.known,
                "search": len(self.facts.search),
                "held_out": len(self.facts.held_out),
            },
            "search": {"derived": told(self.derived), "best": told(self.best)},
            "held_out": {
                "derived": None if self.check_derived is None else self.check_derived.to_dict(),
                "best": None if self.check_best is None else self.check_best.to_dict(),
                "gain": None if self.gain is None else dataclasses.asdict(self.gain),
            },
            "tried": [told(measured) for measured in self.tried],
            "traced": list(self.traced),
            "edits": self.edits,
            "seconds": self.seconds,
            "seed": self.seed,
        }

    # ------------------------------------------------------------------ the file

    def to_yaml(self) -> str:
        """The settings as a file of hyperparameters, with the measurements as comments before them."""
        lines = [*self._header(), *self._table(), self.verdict]
        defaults = type(self.config)().to_dict()
        values = {k: v for k, v in self.config.to_dict().items() if v != defaults[k]}
        last = self.model.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].lower()
        content = {"match": [glob.escape(last)], **without_tuples(values)}
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True)
        return "".join(f"# {line}".rstrip() + "\n" for line in lines) + text

    def _header(self) -> list[str]:
        facts = self.facts
        revision = f", revision {self.revision}" if self.revision else ""
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        return [
            f"{self.method} on {self.model}.",
            f"Source: kedit tune, {today}; hf_kedit {__version__}, torch {torch.__version__}, transformers"
            f" {transformers.__version__}.",
            f"Model: weights {self.fingerprint}{revision}.",
            f"Facts: {facts.source}, of which the model knew {facts.known} of {facts.asked}; single edits of"
            f" {len(facts.search)} to search with, of {len(facts.held_out)} others to check with; seed {self.seed}.",
            f"Protocol: greedy generation of a few tokens, and likelihood; harmonic mean of all figures (none counted"
            f" below {LEAST_FIGURE:g}); at least {LEAST_KEPT:g} of the general answers stay (or about as derived).",
            f"Tried: {len(self.tried)} settings, {self.edits} edits, {self.seconds / 60:.1f} minutes.",
        ]

    def _table(self) -> list[str]:
        """Figures in percent, held-out facts first."""
        columns = {
            "held-out: derived": self.check_derived,
            "found": self.check_best,
            "search: derived": self.derived.score,
            "found ": self.best.score if self.best.changes else None,
        }
        shown = {name: score for name, score in columns.items() if score is not None}
        names = list(dict.fromkeys(name for score in shown.values() for name in score.figures))
        rows = [("", *(name.strip() for name in shown))]
        rows += [("facts", *(str(score.n) for score in shown.values()))]
        rows += [("harmonic mean", *(_percent(score.harmonic) for score in shown.values()))]
        rows += [(name, *(_percent(score.figures.get(name)) for score in shown.values())) for name in names]
        rows += [("general answers kept", *(_percent(score.general) for score in shown.values()))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(["  " + row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]

    def place(self) -> Path:
        """Where the file goes by itself: the user's own folder, in which it is found by the model's name."""
        last = self.model.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].lower() or "model"
        return user_hparams() / self.method / f"{last}.yaml"

    def write(self, path: str | Path | None = None) -> Path:
        """Write `to_yaml`.

        Args:
            path: the file; ``None``: `place`.

        Returns:
            Where it is.

        Raises:
            TuneError: if it cannot be written.
        """
        file = self.place() if path is None else Path(path)
        new = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(self.to_yaml(), encoding="utf-8")
            os.replace(new, file)
        except OSError as error:
            raise TuneError(f"{str(file)!r} cannot be written: {error}") from error
        return file


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
