"""`Results`: everything that an evaluation measured, and the questions that can be put to it.

Plain data: one `CaseResult` per case, protocol and time, and what was run (``meta``). Means are formed within one
protocol and one time only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import EvaluationError, nearest
from ..measures import metrics
from ..measures.catalogue import metric_of
from ..measures.cost import efficiency
from .case_result import CaseResult
from .summaries import extra_sections, look_up, means_of, refuse_mixture


@dataclass
class Results:
    """What was measured.

    Args:
        results: one per case, protocol and time.
        meta: what was run: setting, protocols with their settings and scorers, method, model, seconds.
    """

    results: list[CaseResult]
    meta: dict[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------ selecting

    @property
    def protocols(self) -> list[str]:
        """Names of the protocols, in the order in which they were asked for."""
        return list(self.meta.get("protocols") or dict.fromkeys(r.protocol for r in self.results))

    @property
    def times(self) -> list[str]:
        """When it was measured: ``immediate``, ``at N`` for checkpoints, ``final``."""
        return list(dict.fromkeys(self.meta.get("when") or (r.when for r in self.results)))

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The edits that could not be made, each with ``case_id`` and ``reason``."""
        return list(self.meta.get("failed") or ())

    @property
    def scenario(self) -> str | None:
        """Name of the scenario; ``None`` for edits of facts."""
        about = self.meta.get("scenario")
        return str(about["name"]) if about else None

    @property
    def label(self) -> str:
        """Name among other results: the method's."""
        return str(self.meta.get("method") or "edits")

    def has(self, protocol: str, when: str) -> bool:
        """Whether anything was measured under this protocol at this time."""
        return any(r.protocol == protocol and r.when == when for r in self.results)

    def writes(self, protocol: str) -> bool:
        """Whether the model wrote its answers under this protocol."""
        return any(r.texts and "rewrite" in r.post.scores for r in self.results if r.protocol == protocol)

    def chosen(self, protocol: str | None = None, when: str | None = None) -> list[CaseResult]:
        """The results under one protocol (default: the first) at one time (default: the last).

        Raises:
            EvaluationError: if there is no such protocol or time.
        """
        protocol = self._one("protocol", protocol, self.protocols, 0)
        when = self._one("when", when, self.times, -1)
        return [r for r in self.results if r.protocol == protocol and r.when == when]

    @staticmethod
    def _one(what: str, value: str | None, known: Sequence[str], default: int) -> str:
        if not known:
            raise EvaluationError("the report is empty")
        if value is None:
            return known[default]
        if value not in known:
            raise EvaluationError(
                f"this report has no {what}={value!r}.{nearest(str(value), known)} It has: {', '.join(known)}."
            )
        return value

    # ------------------------------------------------------------------ summarising

    def summary(self, protocol: str | None = None, when: str | None = None) -> dict[str, Any]:
        """Means over the cases, as fractions of 1.

        Per case the probes of an axis are averaged, then the axes; then the cases that have the section at all. A
        section that no case has is absent.

        Args:
            protocol: default: the first of the report.
            when: default: the last time at which it was measured.

        Returns:
            ``{"pre": {...}, "post": {"rewrite_acc", "rephrase_acc", "locality", "locality_accuracy",
            "portability", "per_axis": {"locality": {axis: mean}, "portability": {axis: mean}}, section: {key: mean}},
            "metrics": {"section/key": {"unit", "better", "about"}} of these sections, "n": cases,
            "n_per_entry": {...}, "protocol", "scorer", "setting", "when"}``.

        Raises:
            EvaluationError: if the report has no such protocol or time, or mixes what must not be averaged.
        """
        results = self.chosen(protocol, when)
        refuse_mixture(results)
        pre, _ = means_of([r.pre for r in results], pre=True)
        post, counts = means_of([r.post for r in results], pre=False)
        first = results[0]
        return {
            "pre": pre,
            "post": post,
            "metrics": {
                f"{section}/{key}": metric_of(section, key).describe()
                for section in extra_sections(post)
                for key in post[section]
            },
            "n": len(results),
            "n_per_entry": counts,
            "n_failed": len(self.failed),
            "n_skipped_probes": sum(len(r.skipped) for r in results),
            "protocol": first.protocol,
            "scorer": first.scorer,
            "setting": first.setting,
            "when": first.when,
            "seconds_edit": metrics.mean(r.cost.seconds for r in results if r.cost.seconds is not None),
            "seconds_eval": metrics.mean(r.seconds_eval for r in results if r.seconds_eval is not None),
        }

    def retention(self, protocol: str | None = None) -> dict[str, float]:
        """How much of each mean is left after all edits: final minus immediate.

        Raises:
            EvaluationError: if not both were measured.
        """
        if not {"immediate", "final"} <= set(self.times):
            raise EvaluationError(
                "retention compares two times; evaluate with setting='sequential', when=('immediate', 'final')"
            )
        first, last = (self.summary(protocol, when)["post"] for when in ("immediate", "final"))
        return {key: last[key] - first[key] for key in last if key in first and isinstance(last[key], float)}

    def curve(self, name: str, protocol: str | None = None) -> list[tuple[int, float]]:
        """One mean along the number of edits: the checkpoints of ``at=[…]``, and the end of the sequence.

        Args:
            name: key of ``summary()["post"]`` (``rewrite_acc``), or ``section/key`` (``counterfact/S``,
                ``locality/Neighborhood``); ``abilities/NAME`` is the score of a general ability, from 0 edits on.
            protocol: default: the first of the report.

        Returns:
            (number of edits, mean over all edits made until then), in order. Times without the mean are left out.
        """
        if name.startswith("abilities/"):
            return self._ability_curve(name.removeprefix("abilities/"))
        points = []
        for when in self.times:
            if when == "immediate":
                continue
            value = look_up(self.summary(protocol, when)["post"], name)
            if value is not None:
                points.append((len(self.chosen(protocol, when)), value))
        return sorted(points)

    @property
    def checkpoints(self) -> list[dict[str, Any]]:
        """Wear and abilities of the model as a whole, along the edits."""
        return list(self.meta.get("checkpoints") or ())

    @property
    def abilities(self) -> list[str]:
        """Names of the general abilities that were measured."""
        return list(dict.fromkeys(name for point in self.checkpoints for name in point.get("abilities", ())))

    def _ability_curve(self, name: str) -> list[tuple[int, float]]:
        """Several batches of one size are one point: their mean."""
        points: dict[int, list[float]] = {}
        for point in self.checkpoints:
            if name in point.get("abilities", ()):
                known = point.get("abilities_before", {}).get(name, {"score": None})
                before, after = known["score"], point["abilities"][name]["score"]
                points[0] = [before] if before is not None else []
                if after is not None:
                    points.setdefault(point["n_edits"], []).append(after)
        return sorted((n, sum(scores) / len(scores)) for n, scores in points.items() if scores)

    def efficiency(self) -> dict[str, Any]:
        """What the edits cost: seconds, edits per second, memory; see `cost.efficiency`."""
        return {**efficiency([r.costs() for r in self.chosen()]), "seconds_setup": self.meta.get("seconds_setup")}
