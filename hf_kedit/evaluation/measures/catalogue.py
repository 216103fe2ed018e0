"""What the numbers of a report are that only some protocols have: unit, direction, and how reports name them.

A protocol enters its numbers here once, under the section of a record in which they stand; tables, pages and JSON then
show them without knowing the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...storage.display import percent
from .likelihoods import harmonic_score

Unit = Literal["percent", "bits", "nats", "number"]


@dataclass(frozen=True)
class Metric:
    """One number of a report.

    Args:
        about: what it says, in a sentence without a full stop; empty for numbers that need no explanation.
        unit: ``percent``: kept as a fraction of 1 and shown as a percentage; the others are shown as they are.
        better: which values are good; ``None``: neither.
        share: the value of a case is a share of its probes, so that Wilson's interval holds for the mean.
        label: name in tables and charts; ``None``: section and key.
        chart: whether it gets a chart of its own.
        parts: keys of the same section that it is made of; its own value of a case does not exist then.
        combine: makes it of the means of its parts, not of cases.
        needs_all: whether it exists only where all parts do.
    """

    about: str = ""
    unit: Unit = "percent"
    better: Literal["higher", "lower"] | None = "higher"
    share: bool = False
    label: str | None = None
    chart: bool = True
    parts: tuple[str, ...] = ()
    combine: Callable[[Sequence[float]], float] | None = None
    needs_all: bool = True

    def text(self, value: float | None) -> str:
        """The number for people."""
        if value is None or self.unit == "percent":
            return percent(value)
        return f"{value:.2f}" if self.unit == "number" else f"{value:.2f} {self.unit}"

    def combined(self, means: Mapping[str, float]) -> float | None:
        """Its value from the means of a section; ``None`` if it is no combination, or parts are missing."""
        known = [means[part] for part in self.parts if part in means]
        if self.combine is None or not known or (self.needs_all and len(known) < len(self.parts)):
            return None
        return self.combine(known)

    def describe(self) -> dict[str, Any]:
        """Unit, direction and meaning, JSON-ready."""
        return {"unit": self.unit, "better": self.better, "about": self.about}


SHARE = Metric()
"""A share of 1, the higher the better: what a number is that nobody entered."""
_METRICS: dict[str, dict[str, Metric]] = {}


def register_metrics(section: str, metrics: Mapping[str, Metric]) -> str:
    """Enter the numbers of a section; returns its name, so that a protocol can say it once.

    Args:
        section: of the record.
        metrics: key → what it is. What is entered twice is what was entered last.
    """
    _METRICS.setdefault(section, {}).update(metrics)
    return section


def metric_of(section: str, key: str) -> Metric:
    """What a number is; one that nobody entered is a share of 1, the higher the better."""
    return _METRICS.get(section, {}).get(key) or SHARE


def metrics_of(section: str) -> Mapping[str, Metric]:
    """All numbers of a section that were entered."""
    return _METRICS.get(section, {})


def combined_of(section: str, means: Mapping[str, float]) -> dict[str, float]:
    """The numbers of a section that are made of the means of others."""
    values = {key: metric.combined(means) for key, metric in metrics_of(section).items()}
    return {key: value for key, value in values.items() if value is not None}


register_metrics(
    "counterfact",
    {
        **{key: Metric(share=True, label=key) for key in ("ES", "PS", "NS")},
        **{key: Metric(chart=False, label=key) for key in ("EM", "PM", "NM")},
        **{
            f"{kind}_exact": Metric(chart=False, label=f"{kind} exact")
            for kind in ("rewrite", "paraphrase", "neighborhood")
        },
        "S": Metric(label="S", parts=("ES", "PS", "NS"), combine=harmonic_score),
    },
)
register_metrics("fluency", {"ngram_entropy": Metric(unit="bits", label="ngram entropy")})
