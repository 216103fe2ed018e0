"""``kedit eval``: edit by edit through a dataset, measured before and after; or saved edits as they are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import EvaluationError
from .facts import DatasetPathOption, SplitOption
from .models import EditOptions, LoadOptions, OptionalModelOption, open_model, parse_settings
from .output import DebugOption, Format, FormatOption, ReportToOption, command, emit
from .pictures import PlotOption, check_plot
from .remote import BackendOptions

if TYPE_CHECKING:
    from ..evaluation import EvaluationReport


class SettingChoice(StrEnum):
    """How edits follow one another: `Setting` of the evaluation without saved edits, for which there is --no-edit."""

    single = "single"
    batch = "batch"
    sequential = "sequential"


class OnError(StrEnum):
    """What to do with an edit that cannot be made."""

    error = "raise"
    skip = "skip"


class When(StrEnum):
    """When a sequence of edits is measured."""

    immediate = "immediate"
    final = "final"


class Ask(StrEnum):
    """In which format everything is asked."""

    plain = "plain"
    chat = "chat"


@command
def evaluate(
    model: OptionalModelOption = None,
    how: EditOptions = EditOptions(),
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", "--requests", "-d", help="Name of a dataset (world), or a JSON, JSONL or CSV file."),
    ] = None,
    dataset_path: DatasetPathOption = None,
    dataset_option: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset-option",
            metavar="KEY=VALUE",
            help="Argument of load_edit_dataset, such as drop_conflicts=first or target=answers; may be repeated.",
        ),
    ] = None,
    split: SplitOption = None,
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="Only the first so many rows.")] = None,
    skip: Annotated[int, typer.Option("--skip", min=0, help="Leave out the first so many rows.")] = 0,
    setting: Annotated[
        SettingChoice,
        typer.Option(
            "--setting",
            help="Undo each edit before the next one; or batch by batch; or keep all.",
        ),
    ] = SettingChoice.single,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", min=1, help="Edits made together (batch, sequential).")
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option("--protocol", help="teacher_forced (default) or generation; may be repeated."),
    ] = None,
    ask: Annotated[
        Ask | None,
        typer.Option("--ask", help="How everything is asked: plain or chat; default: as it is edited."),
    ] = None,
    scenario: Annotated[
        str | None,
        typer.Option(
            "--scenario",
            "--preset",
            help="Measure what a scenario (or preset: one thing, two words) asks; --list-scenarios lists them.",
            metavar="NAME",
        ),
    ] = None,
    scenario_option: Annotated[
        list[str] | None,
        typer.Option("--scenario-option", metavar="KEY=VALUE", help="Option of the scenario; may be repeated."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", metavar="NAME", help="Classifier of the scenario: folder or Hub name."),
    ] = None,
    list_scenarios: Annotated[
        bool, typer.Option("--list-scenarios", help="List the scenarios with their options, and run nothing.")
    ] = False,
    decoding: Annotated[
        str | None,
        typer.Option(
            "--decoding", metavar="NAME[:LAYERS]", help="Contrast layers in all answers: dola, dola:low, deco:18,20."
        ),
    ] = None,
    when: Annotated[
        list[When] | None,
        typer.Option("--when", help="Sequential: measure each edit at once, or all at the end; may be repeated."),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="N,N", help="Sequential: after so many edits, measure all made so far; 10,100."),
    ] = None,
    on_error: Annotated[
        OnError, typer.Option("--on-error", help="skip leaves out edits that fail, and lists them.")
    ] = OnError.error,
    no_edit: Annotated[
        bool,
        typer.Option("--no-edit", help="Make no edits: measure those that the saved edits in --model contain."),
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", help="Folder for results as they come; the same command continues there."),
    ] = None,
    report_to: ReportToOption = None,
    shard: Annotated[
        str | None,
        typer.Option("--shard", help="2/4: the second of four parts (single, batch); auto: as torchrun says."),
    ] = None,
    collect: Annotated[
        bool, typer.Option("--collect", help="Run nothing; put the parts in --output-dir together.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File for the whole report: JSON, or ….html or ….md."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="HTML file for the report: charts, and every case with its texts.")
    ] = None,
    plot: PlotOption = None,
    load: LoadOptions = LoadOptions(),
    server: BackendOptions = BackendOptions(),
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Measure reliability, generalization, locality and portability.

    With a method, every row of the dataset is edited, measured and undone. With --no-edit, the saved edits are
    measured against their base model, by default on their own requests. With --output-dir, an interrupted command is
    continued by repeating it; with --shard, several processes share the folder and --collect puts the parts together.
    """
    if list_scenarios:
        return _list_scenarios(format)
    if collect:
        if output_dir is None:
            raise typer.BadParameter("name the folder of the parts", param_hint="--output-dir")
    elif model is None and server.backend is None:
        raise typer.BadParameter("name a model", param_hint="--model")
    elif dataset is None and not no_edit and not (scenario and dataset_path):
        raise typer.BadParameter("name a dataset or a file", param_hint="--dataset")
    if (scenario_option or judge) and scenario is None:
        raise typer.BadParameter("name the scenario that this belongs to", param_hint="--scenario")
    if dataset is None and scenario is None and (dataset_path or dataset_option):
        raise typer.BadParameter("name the dataset whose file or options these are", param_hint="--dataset")
    if no_edit and replace(how, system=None) != EditOptions():
        raise typer.BadParameter("with --no-edit no method is used; leave its options out", param_hint="--no-edit")
    if no_edit and (batch_size or setting is not SettingChoice.single or when or at or shard):
        raise typer.BadParameter("with --no-edit the edits are measured as they are", param_hint="--no-edit")
    for option, file in (("--output", output), ("--html", html)):
        if file is not None and os.path.isdir(file):
            raise typer.BadParameter(f"{file} is a folder; name a file", param_hint=option)
    check_plot(plot)
    counts = _counts(at)
    from ..data import load_edit_dataset
    from ..evaluation import collect_report, evaluate_edits, load_scenario

    chosen = None
    if scenario is not None and not collect:
        options = parse_settings(scenario_option, "--scenario-option") | ({} if judge is None else {"judge": judge})
        chosen = load_scenario(scenario, **options)

    if collect:
        assert output_dir is not None
        report = collect_report(output_dir)
    else:
        arguments = parse_settings(dataset_option, "--dataset-option")
        rows = None
        if dataset is not None or dataset_path is not None:
            given = {"split": split, "limit": limit, "skip": skip, "path": dataset_path}
            read = load_edit_dataset if chosen is None else chosen.read
            rows = read(dataset, **{**given, **arguments})
        editable = open_model(model, load, how, backend=server.open(how.system))
        if decoding is not None:
            editable.set_decoding(decoding)
        if no_edit and rows is None and not editable.edits:
            raise EvaluationError(f"{model!r} carries no saved edits, so there are no requests; give --dataset")
        report = evaluate_edits(
            editable,
            rows,
            "saved" if no_edit else setting.value,
            batch_size,
            list(dict.fromkeys(protocol)) if protocol else None,
            [entry.value for entry in when or [When.final]],
            limit,
            at=counts,
            on_error=on_error.value,
            prompt_format=None if ask is None else ask.value,
            system=how.system,
            output_dir=output_dir,
            shard=shard,
            scenario=chosen,
            report_to=report_to,
        )
        if rows is not None:
            report.meta["dataset"] = dataset or (dataset_path.name if dataset_path else "")
    files = [file for file in (output, html) if file is not None]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    if output is not None:
        written = {".html": report.to_html, ".htm": report.to_html, ".md": report.to_markdown}
        written.get(output.suffix.lower(), report.to_json)(output)
    if html is not None:
        report.to_html(html)
    if plot is not None:
        from ..drawing.style import save_figure

        files.append(save_figure(report.plot(), plot))
    data = _result(report, dataset, split, output)
    emit(
        format,
        data,
        human=lambda console: _show(console, report, files),
        quiet=list(_quiet(data["post"])),
    )


def _list_scenarios(format: Format) -> None:
    from ..evaluation import SCENARIOS

    rows = {name: cls.describe() for name, cls in sorted(SCENARIOS.items())}

    def show(console: Console) -> None:
        for name, about in rows.items():
            console.print(name, style="cyan")
            console.print(f"  {about['question']}", soft_wrap=True)
            for label in ("options", "reads", "layouts"):
                if about[label]:
                    console.print(f"  {label}: {', '.join(about[label])}", style="dim", soft_wrap=True)
            if about["standin"]:
                console.print(f"  without a judge: {about['standin']}", style="dim", soft_wrap=True)

    emit(format, {"scenarios": rows}, human=show, quiet=list(rows))


def _quiet(post: Mapping[str, Any]) -> Iterator[str]:
    """One line per mean."""
    for name, value in post.items():
        if isinstance(value, float):
            yield f"{name}={value}"
        elif isinstance(value, dict) and name != "per_axis":
            yield from (f"{name}/{key}={number}" for key, number in value.items())


def _counts(text: str | None) -> list[int]:
    """Turn ``10,100`` into a list."""
    try:
        return [int(part) for part in (text or "").split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: write numbers of edits as 10,100", param_hint="--at") from error


def _result(report: EvaluationReport, dataset: str | None, split: str | None, output: Path | None) -> dict[str, Any]:
    """The JSON result: the summary of the first protocol at the last time, and all of them in ``results``."""
    results = [report.summary(p, w) for p in report.protocols for w in report.times]
    first = report.summary()
    return {
        "model": report.meta.get("model"),
        "method": report.meta.get("method"),
        "scenario": report.meta.get("scenario"),
        "dataset": dataset,
        "split": split,
        "setting": report.meta.get("setting"),
        "n": first["n"],
        "pre": first["pre"],
        "post": first["post"],
        "results": results,
        "seconds": report.meta.get("seconds"),
        "report": None if output is None else str(output),
    }


def _show(console: Console, report: EvaluationReport, files: Sequence[Path]) -> None:
    report.print_table(console)
    for failed in report.meta.get("failed") or ():
        console.print(f"left out: case {failed['case_id']}: {failed['reason']}", style="red", soft_wrap=True)
    if files:
        console.print(f"wrote {' and '.join(map(str, files))}", soft_wrap=True)
