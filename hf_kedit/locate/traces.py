"""What causal tracing works on and what it returns: facts, tables, averages; plain data that can be saved and drawn.

How the tables are made is the business of `tracing`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..drawing.marks import heat_map
from ..drawing.style import SMALL, SOFT, as_label, house_style, name_figure, new_figure
from ..errors import RequestError
from ..requests import EditRequest
from ..storage.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRACE_KINDS = ("hidden", "mlp", "attn", "hidden_without_mlp", "hidden_without_attn")
"""What can be restored; see `tracing`."""
CLASSES = ("first subject", "middle subject", "last subject", "first after", "further", "last")
"""Classes of tokens over which effects are averaged."""
LAST_SUBJECT = "last subject"
_TITLES = {
    "hidden": "hidden state",
    "mlp": "MLP output",
    "attn": "attention output",
    "hidden_without_mlp": "hidden state, MLPs severed",
    "hidden_without_attn": "hidden state, attention severed",
}


@dataclass(frozen=True)
class Fact:
    """What is traced: a prompt, where its subject stands, and possibly the known answers.

    Args:
        prompt: the filled prompt.
        subject: the subject.
        span: character span of the subject in the prompt.
        answers: accepted answers; the first that the model gives is traced. Empty: whatever token it predicts.
        separator: between prompt and answer; ``None``: see `separator_between`.
    """

    prompt: str
    subject: str
    span: tuple[int, int]
    answers: tuple[str, ...] = ()
    separator: str | None = None

    @classmethod
    def from_value(cls, value: Fact | EditRequest | Mapping[str, Any]) -> Fact:
        """Build a fact from a request, or a dict with ``prompt``, ``subject`` and possibly ``ground_truth``.

        Raises:
            RequestError: if there is no subject, or the prompt does not contain it.
        """
        if isinstance(value, Fact):
            return value
        if isinstance(value, Mapping):  # the new target plays no part in tracing
            value = EditRequest.from_dict({**value, "target_new": value.get("target_new") or "-"})
        if not isinstance(value, EditRequest):
            raise RequestError(f"a fact is an EditRequest or a dict, not {type(value).__name__}")
        answers = tuple(value.ground_truth)
        return cls(value.filled_prompt, value.subject or "", value.subject_span(), answers, value.separator)


@dataclass
class Trace:
    """The tables of one fact.

    Args:
        fact: what was traced.
        tokens: text of each token of the prompt.
        subject_range: token range ``[first, end)`` of the subject.
        answer: the answer whose probability is measured.
        high: its probability in the clean run (of all its tokens together).
        low: its mean probability in the corrupted runs.
        scores: kind → ``[tokens, layers]``: its mean probability with that state restored.
    """

    fact: Fact
    tokens: list[str]
    subject_range: tuple[int, int]
    answer: str
    high: float
    low: float
    scores: dict[str, torch.Tensor]

    @property
    def classes(self) -> list[str | None]:
        """Class of each token (see `CLASSES`); ``None`` before the subject, where nothing is corrupted.

        Each token has one class. The only token of a subject is its last; a last token of the prompt that belongs
        to the subject counts as the subject's.
        """
        start, end = self.subject_range
        names: list[str | None] = [None] * len(self.tokens)
        for i in range(start, len(self.tokens)):
            if i < end:
                name = LAST_SUBJECT if i == end - 1 else "first subject" if i == start else "middle subject"
            else:
                name = "last" if i == len(self.tokens) - 1 else "first after" if i == end else "further"
            names[i] = name
        return names

    def plot(self, window: int = 1) -> Figure:
        """Draw the tables, one heat map per kind: rows are tokens (the subject's starred), columns layers.

        The shades begin at the probability in the corrupted runs; the strongest cell of each table is framed.

        Args:
            window: layers restored together for ``mlp`` and ``attn``, which the report knows; for the titles.

        Raises:
            MissingExtraError: without matplotlib.
        """
        start, end = self.subject_range
        labels = [as_label(text, 24) + "*" * (start <= i < end) for i, text in enumerate(self.tokens)]
        asked = f"{as_label(self.fact.prompt, 90)} → {as_label(self.answer, 30)}"
        note = f"p(answer): {self.high:.2f} in the clean run, {self.low:.2f} with the subject (*) corrupted."
        unit = "p(answer) with the state put back"
        return _heat_maps(self.scores, labels, f"What carries it: {asked}", note, unit, self.low, window)

    def to_dict(self) -> dict[str, Any]:
        """Return everything JSON-ready."""
        return {
            "prompt": self.fact.prompt,
            "subject": self.fact.subject,
            "answer": self.answer,
            "tokens": self.tokens,
            "subject_range": list(self.subject_range),
            "high": self.high,
            "low": self.low,
            "scores": {kind: _rounded(table) for kind, table in self.scores.items()},
        }


@dataclass
class Curve:
    """Average indirect effect of one class of tokens by layer.

    Args:
        mean: ``[layers]``.
        band: half width of the 95 % band of the mean, ``[layers]``; NaN for a single token.
        count: number of tokens in the average.
    """

    mean: torch.Tensor
    band: torch.Tensor
    count: int


@dataclass
class TraceReport:
    """Tables of several facts and how they were made.

    Args:
        traces: one per fact that the model knows.
        skipped: (fact, reason) of the others.
        kinds: what was restored.
        window: number of layers restored together for ``mlp`` and ``attn``.
        samples: corrupted runs per fact.
        noise_level: standard deviation of the noise.
        seed: of the noise.
        model: name of the model.
    """

    traces: list[Trace]
    skipped: list[tuple[Fact, str]]
    kinds: tuple[str, ...]
    window: int
    samples: int
    noise_level: float
    seed: int
    model: str = ""
    num_layers: int = 0

    @property
    def total_effect(self) -> float:
        """Mean of ``high − low``; NaN without facts."""
        return sum(t.high - t.low for t in self.traces) / len(self.traces) if self.traces else math.nan

    def average(self) -> dict[str, dict[str, Curve]]:
        """Average indirect effect: kind → class of tokens (those that occur) → curve over the layers."""
        result: dict[str, dict[str, Curve]] = {}
        for kind in self.kinds:
            rows: dict[str, list[torch.Tensor]] = {name: [] for name in CLASSES}
            for trace in self.traces:
                for name, effect in zip(trace.classes, trace.scores[kind] - trace.low, strict=True):
                    if name is not None:
                        rows[name].append(effect)
            result[kind] = {}
            for name, effects in rows.items():
                if effects:
                    stack = torch.stack(effects)
                    band = 1.96 * stack.std(dim=0) / len(effects) ** 0.5 if len(effects) > 1 else stack[0] * math.nan
                    result[kind][name] = Curve(stack.mean(dim=0), band, len(effects))
        return result

    def plot(self) -> Figure:
        """Draw the average indirect effects, one heat map per kind: rows are classes of tokens, columns layers.

        A report of one fact draws its tables token by token.

        Raises:
            RequestError: if the report has no facts.
            MissingExtraError: without matplotlib.
        """
        return self.traces[0].plot(self.window) if len(self.traces) == 1 else plot_average(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything JSON-ready (NaN as ``None``)."""
        return {
            "model": self.model,
            "kinds": list(self.kinds),
            "window": self.window,
            "samples": self.samples,
            "noise_level": self.noise_level,
            "seed": self.seed,
            "facts": len(self.traces),
            "total_effect": None if math.isnan(self.total_effect) else self.total_effect,
            "average": {
                kind: {
                    name: {"mean": _rounded(c.mean), "band": _rounded(c.band), "count": c.count}
                    for name, c in curves.items()
                }
                for kind, curves in self.average().items()
            },
            "skipped": [{"prompt": fact.prompt, "reason": reason} for fact, reason in self.skipped],
            "traces": [trace.to_dict() for trace in self.traces],
        }

    def save(self, path: str | Path) -> Path:
        """Write `to_dict` as JSON (folders are made); returns the path.

        Raises:
            ArtifactError: if it cannot be written.
        """
        return write_text(Path(path), json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n")


def _rounded(table: torch.Tensor) -> Any:
    def tidy(value: Any) -> Any:
        if isinstance(value, list):
            return [tidy(v) for v in value]
        return None if math.isnan(value) else round(value, 7)

    return tidy(table.tolist())


# ---------------------------------------------------------------------- pictures


def plot_trace(trace: Trace, report: TraceReport | None = None) -> Figure:
    """`Trace.plot`, with the window of the report that the trace comes from."""
    return trace.plot(1 if report is None else report.window)


def plot_average(report: TraceReport) -> Figure:
    """`TraceReport.plot`, of averages also where there is one fact.

    Raises:
        RequestError: if the report has no facts.
        MissingExtraError: without matplotlib.
    """
    if not report.traces:
        raise RequestError("the report has no traced facts to draw")
    average = report.average()
    rows = [name for name in CLASSES if any(name in curves for curves in average.values())]
    tables = {kind: torch.stack([of[name].mean for name in rows]).clamp_min(0) for kind, of in average.items()}
    count = len(report.traces)
    title = f"What carries {count} fact{'s' if count > 1 else ''}"
    title += f" in {as_label(report.model)}" if report.model else ""
    note = "Indirect effect: by how much p(answer) rises when one state is put back. Means over the facts."
    return _heat_maps(tables, rows, title, note, "indirect effect on p(answer)", 0.0, report.window)


def _heat_maps(
    tables: Mapping[str, torch.Tensor],
    labels: list[str],
    title: str,
    note: str,
    unit: str,
    low: float,
    window: int,
) -> Figure:
    """One heat map per kind, all on one scale of colours."""
    layers = next(iter(tables.values())).shape[1]
    high = max(low + 1e-9, *(float(table.max()) for table in tables.values()))
    width = 1.5 + 0.075 * max(map(len, labels)) + len(tables) * (0.5 + min(max(0.16 * layers, 1.7), 4.5))
    with house_style("a trace"):
        figure = new_figure(max(width, 5.5), 1.5 + 0.25 * len(labels))
        panels: Any = figure.subplots(1, len(tables), squeeze=False)[0]
        for number, ((kind, table), axes) in enumerate(zip(tables.items(), panels, strict=True)):
            image = heat_map(axes, table, low, high, labels if number == 0 else None)
            windowed = f", {window} layers" if kind in ("mlp", "attn") and window > 1 else ""
            peak = f"at most {float(table.max()):.2f}, layer {int(table.max(dim=0).values.argmax())}"
            axes.set_title(f"{_TITLES[kind]}{windowed}\n{peak}", fontsize=SMALL + 1, linespacing=1.4)
            axes.set_xlabel("layer")
        bar = figure.colorbar(image, ax=list(panels), fraction=0.04, pad=0.02)
        ticks = [low, (low + high) / 2, high]
        bar.set_ticks(ticks, labels=[f"{tick:.2f}" for tick in ticks])
        bar.ax.tick_params(labelsize=SMALL, labelcolor=SOFT, length=0)
        bar.outline.set_visible(False)
        bar.set_label(unit, fontsize=SMALL, color=SOFT)
        name_figure(figure, title, note)
    return figure
