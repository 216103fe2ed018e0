"""``kedit metrics``: lists the metrics for Hugging Face's `evaluate`, and writes them as folders to publish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .output import DebugOption, Format, FormatOption, command, emit


@command
def metrics(
    names: Annotated[
        list[str] | None, typer.Argument(help="Metrics; default: all of them.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write a folder per metric, for evaluate.load or a Space."),
    ] = None,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """List the metrics with their variants and columns, or write each as a folder.

    Such a folder is loaded with evaluate.load(path) and can be pushed to the Hub as a Space as it is.
    """
    from ..evaluation import list_metrics, load_metric, write_space

    rows: list[dict[str, Any]] = []
    for name in names or list_metrics():
        metric = load_metric(name)
        folder = None if output is None else str(write_space(name, output))
        variants = {variant: list(columns) for variant, columns in metric.variants.items()}
        rows.append({"name": metric.name, "summary": _summary(metric), "variants": variants, "folder": folder})
    quiet = [row["folder"] or row["name"] for row in rows]
    emit(format, {"metrics": rows}, human=lambda console: _show(console, rows), quiet=quiet)


def _summary(metric: Any) -> str:
    return str(metric.description).strip().splitlines()[0]


def _show(console: Console, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        console.print(row["name"], style="cyan")
        console.print(f"  {row['summary']}")
        for variant, columns in row["variants"].items():
            console.print(f"  {variant}: {', '.join(columns)}", style="dim")
        if row["folder"]:
            console.print(f"  written to {row['folder']}", soft_wrap=True)
