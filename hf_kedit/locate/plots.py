"""Heat maps of causal traces as PNG files. Needs matplotlib (the extra ``viz``); nothing is shown on a screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import RequestError, require_extra
from .traces import CLASSES, Trace, TraceReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {
    "hidden": "Purples",
    "mlp": "Greens",
    "attn": "Reds",
    "hidden_without_mlp": "Greens",
    "hidden_without_attn": "Reds",
}
TITLES = {
    "hidden": "hidden state",
    "mlp": "MLP output",
    "attn": "attention output",
    "hidden_without_mlp": "hidden state, MLPs severed",
    "hidden_without_attn": "hidden state, attention severed",
}
_DPI = 150


def plot_trace(trace: Trace, report: TraceReport | None = None) -> Figure:
    """Draw the tables of one fact, one panel per kind: rows are tokens (the subject's starred), columns layers.

    Args:
        trace: the fact.
        report: where it comes from; used for the width of the windows in the titles.

    Returns:
        A matplotlib figure; ``save_figure`` writes it.

    Raises:
        MissingExtraError: without matplotlib.
    """
    start, end = trace.subject_range
    labels = [text.strip() + "*" if start <= i < end else text.strip() for i, text in enumerate(trace.tokens)]
    panels = [(kind, table) for kind, table in trace.scores.items()]
    high = max(trace.low + 1e-9, *(float(table.max()) for _, table in panels))
    title = f"{trace.fact.prompt} … {trace.answer.strip()}   (clean {trace.high:.2f}, corrupted {trace.low:.2f})"
    return _draw(panels, labels, title, "p(answer)", trace.low, high, report)


def plot_average(report: TraceReport) -> Figure:
    """Draw the average indirect effects, one panel per kind: rows are classes of tokens, columns layers.

    All panels share one colour scale, which starts at zero.

    Raises:
        RequestError: if the report has no facts.
        MissingExtraError: without matplotlib.
    """
    if not report.traces:
        raise RequestError("the report has no traced facts to draw")
    average = report.average()
    rows = [name for name in CLASSES if any(name in curves for curves in average.values())]
    panels = [
        (kind, torch.stack([curves[name].mean for name in rows]).clamp_min(0)) for kind, curves in average.items()
    ]
    high = max(1e-9, *(float(table.max()) for _, table in panels))
    count = len(report.traces)
    title = f"Average indirect effect over {count} fact{'s' if count > 1 else ''}"
    if report.model:
        title += f", {report.model}"
    return _draw(panels, rows, title, "indirect effect on p(answer)", 0.0, high, report)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG (folders are made); returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    return path


def _draw(
    panels: list[tuple[str, torch.Tensor]],
    labels: list[str],
    title: str,
    unit: str,
    low: float,
    high: float,
    report: TraceReport | None,
) -> Figure:
    figure = _figure(len(panels), len(labels), panels[0][1].shape[1], max(len(label) for label in labels))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for number, ((kind, table), axis) in enumerate(zip(panels, axes, strict=True)):
        image = axis.imshow(table.numpy(), cmap=_COLOURS[kind], vmin=low, vmax=high, aspect="auto")
        axis.set_title(_titled(kind, report), fontsize=9)
        axis.set_xlabel("layer", fontsize=8)
        step = max(1, -(-table.shape[1] // 12))
        axis.set_xticks(range(0, table.shape[1], step))
        axis.set_yticks(range(len(labels)))
        axis.set_yticklabels(labels if number == 0 else [])
        axis.tick_params(labelsize=8, length=2)
        bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.03)
        bar.ax.tick_params(labelsize=7)
        if number == len(panels) - 1:
            bar.set_label(unit, fontsize=8)
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)
    return figure


def _titled(kind: str, report: TraceReport | None) -> str:
    if report is not None and kind in ("mlp", "attn") and report.window > 1:
        return f"{TITLES[kind]}, {report.window} layers"
    return TITLES[kind]


def _figure(panels: int, rows: int, columns: int, label: int) -> Figure:
    try:
        from matplotlib.figure import Figure as MatplotlibFigure
    except ImportError as error:
        raise require_extra("matplotlib", "viz", "drawing a trace") from error
    width = 0.4 + 0.075 * label + panels * (1.3 + min(0.16 * columns, 4.5) + 0.5)
    arguments: dict[str, Any] = {"figsize": (max(width, 5.0), 1.4 + 0.24 * rows), "layout": "constrained"}
    return MatplotlibFigure(**arguments)
