"""``kedit edit``: apply edits to a model, measure them, save them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..storage.display import percent
from .facts import DatasetPathOption, RephraseOption, SplitOption, SubjectOption, TargetOption
from .models import EditOptions, LoadOptions, OptionalModelOption, UntieOption, open_model
from .output import (
    BELOW_MIN_SUCCESS,
    HARM,
    DebugOption,
    Format,
    FormatOption,
    ReportToOption,
    command,
    counted,
    emit,
    error_console,
    moments_line,
)
from .pictures import PlotOption, check_plot
from .remote import BackendOptions
from .side_effects import show_side_effects

if TYPE_CHECKING:
    from ..evaluation import EvaluationReport, SideEffectReport
    from ..journal import Edit

SUCCESS_NAMES = {
    "edit_success": "rewrite_acc",
    "rephrase": "rephrase_acc",
    "locality": "locality",
    "portability": "portability",
}
"""Name in the JSON result → name in the summary of an evaluation report."""
_SHOWN = 20


@command
def edit(
    model: OptionalModelOption = None,
    how: EditOptions = EditOptions(),
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The fact as a text to complete; {} stands for the subject.")
    ] = None,
    subject: SubjectOption = None,
    target: TargetOption = None,
    erase: Annotated[
        bool,
        typer.Option(
            "--erase", help="Take the old answer away (--ground-truth, else what it says now); no --target needed."
        ),
    ] = False,
    ground_truth: Annotated[
        list[str] | None, typer.Option("--ground-truth", help="What is true, or what it says now; may be repeated.")
    ] = None,
    rephrase: RephraseOption = None,
    neighbour: Annotated[
        list[str] | None,
        typer.Option("--neighbour", "--locality", help="A prompt whose answer should not change; may be repeated."),
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option("--requests", "-r", help="JSON, JSONL or CSV file with requests, instead of --prompt and so on."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Name of a dataset whose rows are edited (facts, world).")
    ] = None,
    dataset_path: DatasetPathOption = None,
    split: SplitOption = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="Only the first so many rows of the dataset.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "-b", min=1, help="Requests solved for together; default: all, where possible."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to save the edits in.")] = None,
    min_success: Annotated[
        float | None,
        typer.Option(
            "--min-success",
            min=0.0,
            max=1.0,
            help="End with exit code 3 if fewer targets are reached.",
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", help="How success is measured: teacher_forced (default) or generation."),
    ] = None,
    evaluation: Annotated[bool, typer.Option("--eval/--no-eval", help="Measure before and after.")] = True,
    side_effects: Annotated[
        bool | None,
        typer.Option(
            "--side-effects/--no-side-effects",
            help="See, by generation, what else changed; default: yes, but not of a --backend.",
            show_default=False,
        ),
    ] = None,
    plot: PlotOption = None,
    report_to: ReportToOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="End with exit code 4 if something else was hurt.")] = False,
    load: LoadOptions = LoadOptions(),
    untie: UntieOption = False,
    server: BackendOptions = BackendOptions(),
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Apply one edit or many, measure what they did and what else they changed, and save them.

    The edits are saved even when --min-success is not reached, or --strict finds harm; the exit code tells.
    """
    given = [requests is not None, dataset is not None, prompt is not None or target is not None]
    if sum(given) != 1:
        raise typer.BadParameter(
            "give one of --requests FILE, --dataset NAME, or --prompt and --target", param_hint="--prompt"
        )
    one = requests is None and dataset is None
    if one and erase and target is None:
        from ..requests import ERASED as target
    if one and (prompt is None or target is None):
        missing = "--target" if target is None else "--prompt"
        raise typer.BadParameter("--prompt and --target belong together", param_hint=missing)
    if not one and (subject or ground_truth or rephrase or neighbour or erase):
        raise typer.BadParameter(
            "--subject, --erase, --ground-truth, --rephrase and --neighbour belong to --prompt",
            param_hint="--requests" if dataset is None else "--dataset",
        )
    if dataset is None and (split or limit or dataset_path):
        raise typer.BadParameter("--split, --limit and --dataset-path belong to --dataset", param_hint="--dataset")
    if side_effects is None:
        side_effects = server.backend is None or strict
    if strict and not side_effects:
        raise typer.BadParameter("side effects are not measured with --no-side-effects", param_hint="--strict")
    if min_success is not None and not evaluation:
        raise typer.BadParameter("success is not measured with --no-eval", param_hint="--min-success")
    from ..requests import EditRequest, Probe, load_requests

    if requests is not None:
        from ..data.loading import requests_of

        todo = requests_of(requests)
    elif dataset is not None:
        from ..data import load_edit_dataset

        todo = load_requests(load_edit_dataset(dataset, split=split, path=dataset_path, limit=limit))
    else:
        assert prompt is not None and target is not None
        todo = [
            EditRequest(
                prompt=prompt,
                subject=subject,
                target_new=target,
                ground_truth=ground_truth or [],
                rephrase_prompts=rephrase or [],
                locality={"Neighborhood": [Probe(text) for text in neighbour]} if neighbour else {},
                metadata={"erase": True} if erase else {},
            )
        ]
    check_plot(plot)
    if output is not None:
        from ..artifact.layout import check_destination

        check_destination(output)
    editable = open_model(model, load, how, untie=untie, backend=server.open(how.system))
    from ..evaluation.measures.side_effects import watcher_of

    measured = None
    if evaluation:
        from ..evaluation import BeforeAndAfter

        measured = BeforeAndAfter(editable, todo, protocol)
    result = editable.edit(
        todo if measured is None else measured.requests,
        batch_size=batch_size,
        watch=watcher_of(editable.base_model_id) if side_effects else None,
        report_to=report_to,
    )
    effects: SideEffectReport | None = result.side_effects
    report = None if measured is None else measured.report(result)
    made = result.edits
    if output is not None:
        editable.save_pretrained(output)
    if plot is not None:
        from ..drawing.style import save_figure

        save_figure(result.plot(), plot)
    data = {**_result(editable, made, report, output), "side_effects": effects.to_dict() if effects else None}
    emit(
        format,
        data,
        human=lambda console: _show(console, made, report, effects, data, output),
        quiet=[e.id for e in made],
    )
    if plot is not None:
        error_console().print(f"wrote {plot}", soft_wrap=True)
    if strict and effects is not None and effects.harm:
        error_console().print("kedit: " + "; ".join(effects.harm), style="red")
        raise typer.Exit(HARM)
    reached = (data["metrics"] or {}).get("edit_success")
    if min_success is not None and (reached is None or reached < min_success):
        error_console().print(
            f"kedit: the edit success {percent(reached, ' %')} is below --min-success {percent(min_success, ' %')}",
            style="yellow",
        )
        raise typer.Exit(BELOW_MIN_SUCCESS)


def _result(editable: Any, made: list[Edit], report: EvaluationReport | None, output: Path | None) -> dict[str, Any]:
    """The JSON result."""
    summary = report.summary() if report is not None else None
    halves: dict[str, dict[str, float | None] | None] = {"pre": None, "post": None}
    if summary is not None:
        for half in halves:
            halves[half] = {name: summary[half].get(key) for name, key in SUCCESS_NAMES.items()}
    return {
        "edit_id": made[0].id if len(made) == 1 else None,
        "edit_ids": [e.id for e in made],
        "method": editable.method_name,
        "with": editable.edit_config.in_words,
        "model": editable.base_model_id,
        "n": len(made),
        "metrics": halves["post"],
        "pre": halves["pre"],
        "summary": summary,
        "seconds": sum(e.diagnostics.get("seconds") or 0.0 for e in made),
        "peak_memory": max((e.diagnostics.get("peak_memory_bytes") or 0 for e in made), default=None),
        "moments": made[0].diagnostics.get("moments") if made else None,
        "artifact": None if output is None else str(output),
    }


def _show(
    console: Console,
    made: list[Edit],
    report: EvaluationReport | None,
    effects: SideEffectReport | None,
    data: dict[str, Any],
    output: Path | None,
) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("edit", "prompt", "new target"):
        table.add_column(name)
    times = [when for when in ("before", "after") if any(_probability(e, when) is not None for e in made)]
    for when in times:
        table.add_column(f"p {when}", justify="right")
    for e in made[:_SHOWN]:
        chances = [percent(_probability(e, when), " %") for when in times]
        table.add_row(e.id, e.request.filled_prompt, e.request.target_new, *chances)
    console.print(table)
    if len(made) > _SHOWN:
        console.print(f"… and {len(made) - _SHOWN} more")
    console.print()
    if report is not None:
        report.print_table(console)
        console.print()
    if effects is not None:
        show_side_effects(console, effects)
        console.print()
    console.print(f"{counted(data['n'], 'edit')} with {data['with']} in {data['seconds']:.2f} s", soft_wrap=True)
    if data["moments"]:
        console.print(moments_line(data["moments"]), soft_wrap=True)
    if output is None:
        console.print("not saved (give --output DIR)", style="yellow")
    else:
        console.print(f"saved to {output}   (kedit inspect {output})", soft_wrap=True)


def _probability(edit: Edit, when: str) -> float | None:
    """The target's probability as the method measured it; fine-tuning does not report it."""
    return edit.diagnostics.get(f"target_probability_{when}")
