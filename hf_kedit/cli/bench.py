"""``kedit bench``: methods × models × datasets × settings from one YAML file, with one report of everything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .models import hush_transformers
from .output import FAILURE, DebugOption, Format, FormatOption, command, counted, emit

if TYPE_CHECKING:
    from ..evaluation.runs.bench import BenchResult

_CASES_IN_ALL = 1000


@command
def bench(
    plan: Annotated[Path, typer.Argument(help="YAML file: models, methods, datasets, settings, protocols.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results; default: the file's output_dir.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", help="2/4: only every fourth run, beginning with the second.")
    ] = None,
    collect: Annotated[
        bool, typer.Option("--collect", help="Run nothing; write the report of the runs that are finished.")
    ] = False,
    max_cases: Annotated[
        int | None,
        typer.Option(
            "--max-cases",
            min=0,
            help="Cases per run that the HTML report shows with all probes and texts; default: 100, fewer in a sweep"
            " of more than ten runs, so that the page stays small.",
        ),
    ] = None,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Run a sweep, and write report.html, report.md and report.json into its folder.

    Repeat the command to continue a sweep that was interrupted: what is finished is not measured again. With
    --shard, several processes or machines share one folder; --collect then puts their results together.
    """
    if collect and shard:
        raise typer.BadParameter("--collect puts all shards together; leave --shard out", param_hint="--collect")
    from ..evaluation import BenchPlan, collect_bench, run_bench

    todo = BenchPlan.from_file(plan)
    hush_transformers()
    folder = output or todo.output_dir
    result = collect_bench(todo, folder) if collect else run_bench(todo, folder, shard, format is not Format.quiet)
    files: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    # A shard knows its own runs only: the report of everything is written by the last step, or by --collect.
    if result.reports and shard is None:
        comparison = result.comparison()
        rows = comparison.rows()
        files = {kind: str(folder / f"report.{kind}") for kind in ("html", "md", "json")}
        if max_cases is None:
            max_cases = max(10, min(100, _CASES_IN_ALL // len(result.reports)))
        comparison.to_html(files["html"], max_cases=max_cases)
        comparison.to_markdown(files["md"])
        comparison.to_json(files["json"])
    data = {
        "finished": [about for about, _ in result.reports],
        "failed": [{**about, "reason": reason} for about, reason in result.failed],
        "missing": result.missing,
        "results": rows,
        "files": files,
    }
    emit(format, data, human=lambda console: _show(console, result, files), quiet=files.values())
    if result.failed or (not collect and result.missing):
        raise typer.Exit(FAILURE)


def _show(console: Console, result: BenchResult, files: dict[str, str]) -> None:
    for about, report in result.reports:
        console.print(f"[{', '.join(about.values())}]", style="bold")
        for protocol in report.protocols:
            if report.records:
                console.print(report.table(protocol))
    console.print(f"{counted(len(result.reports), 'run')} finished, {len(result.failed)} failed,", end=" ")
    console.print(f"{len(result.missing)} not begun or not finished")
    for about, reason in result.failed:
        console.print(f"failed: {', '.join(about.values())}: {reason}", style="red", soft_wrap=True)
    if files:
        console.print(f"report: {files['html']}", soft_wrap=True)
