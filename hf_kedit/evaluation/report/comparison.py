"""`Comparison`: several reports side by side, and their Markdown, HTML and table forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...storage.files import json_ready
from . import html, markdown
from .groups import Runs
from .plots import PlotKind, plot_runs
from .report import EvaluationReport, written
from .summaries import data_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Comparison(Runs[EvaluationReport]):
    """Reports by label.

    Args:
        reports: label (such as the method's name) → report; or reports, labelled by method.
        failed: label → why there is no report of this run.

    Raises:
        EvaluationError: if there is none, or two have the same label.
    """

    @property
    def moments(self) -> list[str]:
        """`times`, under the name of version 0.1.0."""
        return self.times

    def to_pandas(self) -> Any:
        """The `rows` as a ``pandas.DataFrame``.

        Raises:
            MissingExtraError: if pandas is not installed.
        """
        return data_frame(self.rows())

    def to_json(self, path: str | Path | None = None) -> str:
        """The `rows` as JSON text; also written to ``path`` if one is given."""
        return written(json.dumps(json_ready(self.rows()), ensure_ascii=False, indent=1, allow_nan=False) + "\n", path)

    def to_markdown(self, path: str | Path | None = None, *, max_cases: int = 20) -> str:
        """A table per protocol and time, and the first cases; also written to ``path`` if one is given."""
        return written(markdown.render(self, max_cases), path)

    def to_html(self, path: str | Path | None = None, *, title: str | None = None, max_cases: int = 200) -> str:
        """One self-contained HTML page; also written to ``path`` if one is given.

        Args:
            path: file to write (overwriting it).
            title: of the page; default: what was compared.
            max_cases: cases per report that are shown one by one; 0 for none.
        """
        return written(html.render(self, title, max_cases), path)

    def plot(self, kind: PlotKind | None = None, *, protocol: str | None = None, ax: Axes | None = None) -> Figure:
        """Draw the runs side by side: a chart for each number, with a bar or a curve for each run.

        Args:
            kind: ``"bars"`` or ``"curves"``, as for `EvaluationReport.plot`.
            protocol: only this one; ``None``: all, those under which the model writes its answers in the darker bars.
            ax: draw on these axes; only where there is a single chart.

        Raises:
            EvaluationError: if there is nothing to draw.
            MissingExtraError: without matplotlib (the extra ``viz``).
        """
        return plot_runs(self, kind, protocol, ax)
