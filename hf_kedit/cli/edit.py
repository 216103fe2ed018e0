"""``kedit edit``: apply edits to a model, measure them, save them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..storage.display import percent
from .models import (
    ConfigOption,
    DeviceOption,
    DtypeOption,
    LayersOption,
    MethodOption,
    ModelOption,
    RevisionOption,
    SeedOption,
    SetOption,
    TrustOption,
    UntieOption,
    open_model,
    parse_layers,
)
from .output import (
    BELOW_MIN_SUCCESS,
    DebugOption,
    Format,
    FormatOption,
    command,
    counted,
    emit,
    error_console,
)

if TYPE_CHECKING:
    from ..evaluation import EvaluationReport
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
    model: ModelOption,
    method: MethodOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    layers: LayersOption = None,
    seed: SeedOption = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The fact as a text to complete; {} stands for the subject.")
    ] = None,
    subject: Annotated[str | None, typer.Option("--subject", help="The entity that the fact is about.")] = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help="What the model should say.")] = None,
    ground_truth: Annotated[
        list[str] | None, typer.Option("--ground-truth", help="What is true, or what it says now; may be repeated.")
    ] = None,
    rephrase: Annotated[
        list[str] | None, typer.Option("--rephrase", help="The prompt in other words; may be repeated.")
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option("--requests", "-r", help="JSON, JSONL or CSV file with requests, instead of --prompt and so on."),
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
        str, typer.Option("--protocol", help="How success is measured: teacher_forced or generation.")
    ] = "teacher_forced",
    evaluation: Annotated[bool, typer.Option("--eval/--no-eval", help="Measure before and after.")] = True,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    untie: UntieOption = False,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Apply one edit or many, measure what they did, and save them.

    The edits are saved even when --min-success is not reached; the exit code tells.
    """
    if (requests is None) == (prompt is None and target is None):
        raise typer.BadParameter("give either --requests FILE, or --prompt and --target", param_hint="--prompt")
    if requests is None and (prompt is None or target is None):
        missing = "--target" if target is None else "--prompt"
        raise typer.BadParameter("--prompt and --target belong together", param_hint=missing)
    if requests is not None and (subject or ground_truth or rephrase):
        raise typer.BadParameter(
            "--subject, --ground-truth and --rephrase belong to --prompt", param_hint="--requests"
        )
    if min_success is not None and not evaluation:
        raise typer.BadParameter("success is not measured with --no-eval", param_hint="--min-success")
    from ..requests import EditRequest, load_requests

    if requests is not None:
        todo = load_requests(requests)
    else:
        assert prompt is not None and target is not None
        todo = [
            EditRequest(
                prompt=prompt,
                subject=subject,
                target_new=target,
                ground_truth=ground_truth or [],
                rephrase_prompts=rephrase or [],
            )
        ]
    if output is not None:
        from ..artifact.layout import check_destination

        check_destination(output)
    editable = open_model(
        model,
        method,
        config,
        set_,
        flags={"layers": parse_layers(layers), "seed": seed},
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        untie=untie,
    )
    measured = None
    if evaluation:
        from ..evaluation import BeforeAndAfter

        measured = BeforeAndAfter(editable, todo, protocol)
    result = editable.edit(todo if measured is None else measured.requests, batch_size=batch_size)
    report = None if measured is None else measured.report(result)
    made = result.edits
    if output is not None:
        editable.save_pretrained(output)
    data = _result(editable, made, report, output)
    emit(
        format,
        data,
        human=lambda console: _show(console, made, report, data, output),
        quiet=[e.id for e in made],
    )
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
        "model": editable.base_model_id,
        "n": len(made),
        "metrics": halves["post"],
        "pre": halves["pre"],
        "summary": summary,
        "seconds": sum(e.diagnostics.get("seconds") or 0.0 for e in made),
        "peak_memory": max((e.diagnostics.get("peak_memory_bytes") or 0 for e in made), default=None),
        "artifact": None if output is None else str(output),
    }


def _show(
    console: Console,
    made: list[Edit],
    report: EvaluationReport | None,
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
    console.print(f"{counted(data['n'], 'edit')} with {data['method']} in {data['seconds']:.2f} s")
    if output is None:
        console.print("not saved (give --output DIR)", style="yellow")
    else:
        console.print(f"saved to {output}   (kedit inspect {output})", soft_wrap=True)


def _probability(edit: Edit, when: str) -> float | None:
    """The target's probability as the method measured it; fine-tuning does not report it."""
    return edit.diagnostics.get(f"target_probability_{when}")
