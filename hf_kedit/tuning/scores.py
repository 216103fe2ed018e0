"""What an edit is judged by while settings are searched for, and how sure a difference between two settings is.

Seven figures, each in [0, 1]: reliability, paraphrases and locality, by generation and by likelihood, and portability
by generation (a likelihood needs a second answer, which a conclusion lacks). Settings are compared by their harmonic
mean, so that none of the seven can be bought with another; beside it, by the share of general answers that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.measures.intervals import bootstrap
from ..evaluation.measures.metrics import case_mean, mean
from ..evaluation.measures.side_effects import EFFECT_TOKENS, SMALLEST_KEPT
from ..evaluation.protocols.base import Generation, Protocol
from ..evaluation.protocols.likelihood import Likelihood
from ..evaluation.report.case_result import CaseResult
from ..requests import EditRequest

GENERAL = "General text"
"""Axis of the locality probes that have nothing to do with the fact."""
LEAST_FIGURE = 0.1
"""No figure counts for less in the harmonic mean: where no conclusion is ever drawn, all settings would be equal."""
LEAST_KEPT = SMALLEST_KEPT["general"]
_CHANCE = 0.05
"""Where the derived settings keep fewer general answers than that, others may keep less by so much: that is chance."""
_PARTS = {"rewrite": "reliability", "rephrase": "paraphrases", "locality": "locality", "portability": "portability"}
FactFigures = dict[str, float]
"""Name of a figure → its value for one edited fact; names that the fact has no probes for are missing."""


def tuning_protocols() -> list[Protocol]:
    """How the model is asked: a few greedy tokens, and which of two answers it finds more likely."""
    return [Generation(max_new_tokens=EFFECT_TOKENS), Likelihood()]


def figures_of(results: Sequence[CaseResult]) -> FactFigures:
    """The figures of one edited fact, measured under both protocols."""
    figures: FactFigures = {}
    for result in results:
        scores: dict[str, Any] = dict(result.post.scores)
        axes = dict(scores.get("locality", {}))
        general = mean(axes.pop(GENERAL, []))
        scores["locality"] = axes
        for section, part in _PARTS.items():
            value = case_mean(scores.get(section))
            if value is not None:
                figures[f"{part}, {result.protocol}"] = value
        if general is not None:
            figures[GENERAL] = general
    return figures


def figures_of_failure(request: EditRequest) -> FactFigures:
    """The figures of an edit that could not be made: nothing is reached, and nothing changes."""
    both, figures = ("generation", "likelihood"), {}
    for protocol in both if request.ground_truth else both[:1]:
        figures[f"reliability, {protocol}"] = 0.0
        if request.rephrase_prompts:
            figures[f"paraphrases, {protocol}"] = 0.0
        if set(request.locality) - {GENERAL}:
            figures[f"locality, {protocol}"] = 1.0
    if any(probe.answers for probes in request.portability.values() for probe in probes):
        figures["portability, generation"] = 0.0
    if GENERAL in request.locality:
        figures[GENERAL] = 1.0
    return figures


@dataclass(frozen=True)
class TuneScore:
    """Figures over several facts.

    Args:
        figures: name → mean over the facts that have it, the general answers not among them.
        general: share of general answers that are as before; ``None`` if none were asked.
        n: facts.
    """

    figures: Mapping[str, float]
    general: float | None
    n: int

    @classmethod
    def of(cls, facts: Sequence[FactFigures]) -> TuneScore:
        """Average over facts."""
        names = dict.fromkeys(name for fact in facts for name in fact)
        means = {name: mean(fact[name] for fact in facts if name in fact) or 0.0 for name in names}
        general = means.pop(GENERAL, None)
        return cls(means, general, len(facts))

    @property
    def harmonic(self) -> float:
        """Harmonic mean of the figures, none of which counts for less than `LEAST_FIGURE`; 0 without figures."""
        values = [max(value, LEAST_FIGURE) for value in self.figures.values()]
        return len(values) / sum(1 / value for value in values) if values else 0.0

    def harms(self, derived: TuneScore) -> bool:
        """Whether general answers change more than an edit may, and more than under the derived settings."""
        if self.general is None or derived.general is None:
            return False
        return self.general < (LEAST_KEPT if derived.general >= LEAST_KEPT else derived.general - _CHANCE)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"harmonic": self.harmonic, "figures": dict(self.figures), "general": self.general, "n": self.n}


@dataclass(frozen=True)
class PairedGain:
    """How much better some settings are than others, on the same facts.

    Args:
        mean: difference of the harmonic means.
        low: of the interval that holds the true difference 95 times in 100 (`bootstrap`); ``None`` for a single fact.
        high: likewise.
    """

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, found: Sequence[FactFigures], derived: Sequence[FactFigures]) -> PairedGain:
        """Compare fact by fact: facts are drawn with what both settings made of them.

        Args:
            found: figures of each fact.
            derived: figures of the same facts in the same order.
        """
        names = [n for n in dict.fromkeys(name for fact in derived for name in fact) if n != GENERAL]
        rows = [
            [number for fact in pair for name in names for number in (fact.get(name, 0.0), float(name in fact))]
            for pair in zip(found, derived, strict=True)
        ]

        def difference(means: Any) -> Any:
            """``[draws, 2 settings × figures × (sum, share of facts)]`` → ``[draws]``."""
            parts = np.asarray(means).reshape(len(means), 2, len(names), 2)
            figures = np.maximum(parts[..., 0] / parts[..., 1], LEAST_FIGURE)  # NaN where a draw has no such fact
            harmonic = np.isfinite(figures).sum(-1) / np.nansum(1 / figures, axis=-1)
            return harmonic[:, 0] - harmonic[:, 1]

        interval = bootstrap(rows, difference) or (None, None)
        return cls(TuneScore.of(found).harmonic - TuneScore.of(derived).harmonic, *interval)
