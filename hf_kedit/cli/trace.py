"""``kedit trace``: causal tracing of facts, heat maps, and the layers to edit that follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import check_extra
from ..storage.files import write_text
from .facts import SubjectOption
from .models import LoadOptions, ModelOption, open_model
from .output import DebugOption, Format, FormatOption, command, counted, emit
from .pictures import PlotOption, check_plot

if TYPE_CHECKING:
    from ..locate import LayerSuggestion, TraceReport

_SHADES = " ░▒▓█"


@command
def trace(
    model: ModelOption,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="A prompt whose completion is a fact; {} stands for the subject."),
    ] = None,
    subject: SubjectOption = None,
    ground_truth: Annotated[
        list[str] | None,
        typer.Option("--ground-truth", help="The known answer; default: the token that the model predicts."),
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option("--requests", "-r", help="JSON, JSONL or CSV file with facts, instead of --prompt."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Trace the first facts of the file.")] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            "-k",
            help="What to restore: hidden, mlp, attn, hidden_without_mlp, hidden_without_attn; may be repeated."
            " Default: the first three.",
        ),
    ] = None,
    suggest: Annotated[
        str | None, typer.Option("--suggest", help="Suggest layers for this method, such as rome or memit.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Corrupted runs per fact.")] = 10,
    window: Annotated[
        int | None,
        typer.Option(
            "--window", min=1, help="Layers restored together for mlp and attn; default: 10, less if shallow."
        ),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option("--noise", min=0.0, help="Standard deviation of the noise; default: 3 x that of the embeddings."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the noise.")] = 1,
    all_facts: Annotated[bool, typer.Option("--all", help="Trace facts that the model does not know, too.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for trace.json and the heat maps (PNG).")
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw heat maps into --output.")] = True,
    plot: PlotOption = None,
    load: LoadOptions = LoadOptions(),
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Find out which states of a model carry a fact, by causal tracing.

    The subject is corrupted with noise, and single states are put back; what brings the answer back carries the
    fact. Saved edits are traced with their edits in place.
    """
    facts = _facts(prompt, subject, ground_truth, requests, limit)
    from ..locate import TRACE_KINDS

    kinds = list(dict.fromkeys(kind or TRACE_KINDS[:3]))
    unknown = [k for k in kinds if k not in TRACE_KINDS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r}: use {', '.join(TRACE_KINDS)}", param_hint="--kind")
    if suggest is not None:
        kinds = list(dict.fromkeys([*kinds, "hidden", "mlp", "hidden_without_mlp"]))
    if output is not None and plots:
        check_extra("matplotlib", "viz", "drawing heat maps (--no-plots leaves them out)")
    check_plot(plot)
    from ..locate import causal_trace, suggest_layers

    editable = open_model(model, load)
    report = causal_trace(
        editable,
        facts,
        kinds=kinds,
        samples=samples,
        window=window,
        noise_level=noise,
        seed=seed,
        known_only=not all_facts,
    )
    suggestion = suggest_layers(editable, facts, suggest, report=report) if suggest is not None else None
    files = _write(report, suggestion, output, plots) if output is not None else []
    if plot is not None and report.traces:
        from ..drawing.style import save_figure

        files.append(save_figure(report.plot(), plot))
    data = {
        **report.to_dict(),
        "suggestion": suggestion.to_dict() if suggestion is not None else None,
        "files": [str(f) for f in files],
    }
    quiet = [",".join(map(str, suggestion.layers))] if suggestion is not None else [str(f) for f in files]
    if not quiet:  # of each kind the layer with the largest effect, at whichever token that is
        strongest = {
            kind: max((curve.mean for curve in curves.values()), key=lambda mean: float(mean.max()))
            for kind, curves in report.average().items()
            if curves
        }
        quiet = [f"{kind}={int(mean.argmax())}" for kind, mean in strongest.items()]
    emit(format, data, human=lambda console: _show(console, report, suggestion, files), quiet=quiet)


def _facts(
    prompt: str | None,
    subject: str | None,
    ground_truth: list[str] | None,
    requests: Path | None,
    limit: int | None,
) -> list[Any]:
    """The facts that the options name."""
    if (requests is None) == (prompt is None):
        raise typer.BadParameter("give either --requests FILE, or --prompt and --subject", param_hint="--prompt")
    if requests is not None:
        if subject or ground_truth:
            raise typer.BadParameter("--subject and --ground-truth belong to --prompt", param_hint="--requests")
        from ..data.loading import requests_of

        return requests_of(requests)[:limit]
    if subject is None:
        raise typer.BadParameter("tracing corrupts the subject: give --subject", param_hint="--subject")
    from ..locate import Fact

    return [Fact.from_value({"prompt": prompt, "subject": subject, "ground_truth": ground_truth or []})]


def _write(report: TraceReport, suggestion: LayerSuggestion | None, folder: Path, plots: bool) -> list[Path]:
    """Write the JSON file and the pictures."""
    import json

    from ..locate import plot_average, save_figure

    files = [report.save(folder / "trace.json")]
    if suggestion is not None:
        said = json.dumps(suggestion.to_dict(), ensure_ascii=False, indent=1) + "\n"
        files.append(write_text(folder / "layers.json", said))
    if plots and report.traces:
        if len(report.traces) > 1:
            files.append(save_figure(plot_average(report), folder / "average.png"))
        width = len(str(len(report.traces)))
        for number, one in enumerate(report.traces, start=1):
            files.append(save_figure(one.plot(report.window), folder / f"fact-{number:0{width}d}.png"))
    return files


def _show(console: Console, report: TraceReport, suggestion: LayerSuggestion | None, files: list[Path]) -> None:
    if not report.traces:
        console.print("no fact was traced")
    else:
        console.print(
            f"{counted(len(report.traces), 'fact')}, {report.samples} corrupted runs each, noise"
            f" {report.noise_level:.3g}; the answers lose {report.total_effect:.2f} of their probability",
            style="bold",
        )
    for kind, curves in report.average().items():
        console.print(f"\n{kind}: average indirect effect by layer")
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("token", no_wrap=True)
        table.add_column("n", justify="right")
        shallow = report.num_layers <= 12
        for layer in range(report.num_layers if shallow else 1):
            table.add_column(str(layer) if shallow else f"layers 0 to {report.num_layers - 1}", justify="right")
        for name, curve in curves.items():
            values = curve.mean.tolist()
            cells = [f"{v:.2f}" for v in values] if shallow else ["".join(_shade(v) for v in values)]
            table.add_row(name, str(curve.count), *cells)
        console.print(table)
    for fact, reason in report.skipped:
        console.print(f"\nskipped: {fact.prompt!r}: {reason}", style="yellow")
    if suggestion is not None:
        console.print(f"\n{suggestion}", style="bold")
    for file in files:
        console.print(f"wrote {file}", soft_wrap=True)


def _shade(value: float) -> str:
    return _SHADES[min(max(int(value * len(_SHADES)), 0), len(_SHADES) - 1)]
