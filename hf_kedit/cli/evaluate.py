"""``kedit eval``: edit by edit through a dataset, measured before and after; or saved edits as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

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
    open_model,
    parse_layers,
)
from .output import DebugOption, Format, FormatOption, command, emit

if TYPE_CHECKING:
    from ..evaluation import EvaluationReport
    from ..journal import Edit
    from ..model import EditableModel, EditResult
    from ..requests import EditRequest


SAVED = "saved"
"""What stands for the setting when saved edits are measured as they are."""


class Setting(StrEnum):
    """How edits follow one another."""

    single = "single"
    batch = "batch"
    sequential = "sequential"


class Moment(StrEnum):
    """When a sequence of edits is measured."""

    immediate = "immediate"
    final = "final"


@command
def evaluate(
    model: ModelOption,
    method: MethodOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    layers: LayersOption = None,
    seed: SeedOption = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", "--requests", "-d", help="Name of a dataset (world), or a JSON, JSONL or CSV file."),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Split of the dataset; default: the dataset's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="Only the first so many rows.")] = None,
    setting: Annotated[
        Setting, typer.Option("--setting", help="Edit one, measure, restore; or batch by batch; or on and on.")
    ] = Setting.single,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", min=1, help="Edits made together (batch, sequential).")
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option("--protocol", help="teacher_forced (default) or generation; may be repeated."),
    ] = None,
    when: Annotated[
        list[Moment] | None,
        typer.Option("--when", help="Sequential: measure each edit at once, or all at the end; may be repeated."),
    ] = None,
    no_edit: Annotated[
        bool,
        typer.Option("--no-edit", help="Make no edits: measure those that the saved edits in --model contain."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file for the whole report, case by case.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Measure reliability, generalization, locality and portability.

    With a method, every row of the dataset is edited, measured and undone. With --no-edit, the saved edits are
    measured against their base model, by default on their own requests.
    """
    if dataset is None and not no_edit:
        raise typer.BadParameter("name a dataset or a file", param_hint="--dataset")
    if no_edit and (method or config or set_ or layers or seed is not None):
        raise typer.BadParameter("with --no-edit no method is used; leave its options out", param_hint="--no-edit")
    if no_edit and (batch_size or setting is not Setting.single or when):
        raise typer.BadParameter("with --no-edit the edits are measured as they are", param_hint="--no-edit")
    if output is not None and output.is_dir():
        raise typer.BadParameter(f"{output} is a folder; name a file", param_hint="--output")
    from ..data import load_edit_dataset
    from ..evaluation import evaluate_edits

    rows = load_edit_dataset(dataset, split=split, limit=limit) if dataset is not None else None
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
        needs_method=not no_edit,
    )
    protocols = list(dict.fromkeys(protocol or ["teacher_forced"]))
    if no_edit:
        report = _evaluate_saved(editable, rows, protocols, limit)
    else:
        report = evaluate_edits(
            editable,
            rows,
            setting=setting.value,
            batch_size=batch_size,
            protocol=protocols,
            when=[m.value for m in when or [Moment.final]],
        )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        report.to_json(output)
    data = _result(report, dataset, split, output)
    emit(
        format,
        data,
        human=lambda console: _show(console, report, output),
        quiet=[f"{name}={value}" for name, value in data["post"].items() if isinstance(value, float)],
    )


def _result(report: EvaluationReport, dataset: str | None, split: str | None, output: Path | None) -> dict[str, Any]:
    """The JSON result: the summary of the first protocol at the last moment, and all of them in ``results``."""
    results = [report.summary(p, w) for p in report.protocols for w in report.moments]
    first = report.summary()
    return {
        "model": report.meta.get("model"),
        "method": report.meta.get("method"),
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


def _show(console: Console, report: EvaluationReport, output: Path | None) -> None:
    report.print_table(console)
    if output is not None:
        console.print(f"every case is in {output}", soft_wrap=True)


# ---------------------------------------------------------------------- saved edits as they are


def _evaluate_saved(
    editable: EditableModel, rows: Any, protocols: Sequence[str], limit: int | None
) -> EvaluationReport:
    """Measure the edits that a model carries: before = switched off, after = as loaded."""
    from ..errors import EvaluationError
    from ..evaluation import evaluate_edits
    from ..requests import load_requests

    if rows is None and not editable.edits:
        raise EvaluationError(
            f"{editable.base_model_id!r} carries no saved edits, so there are no requests to measure; give --dataset"
        )
    todo = load_requests(rows) if rows is not None else [e.request for e in editable.edits][:limit]
    with contextlib.ExitStack() as stack:
        switch = _Switch(editable, stack)
        # Ids do not matter here, and those of the journal's own requests are taken.
        unnamed = [replace(request, id=None) for request in todo]
        report = evaluate_edits(
            switch,  # type: ignore[arg-type]
            unnamed,
            setting="sequential",
            batch_size=len(todo),
            protocol=list(protocols),
        )
    report.meta["setting"] = SAVED
    for record in report.records:  # nothing was edited now, so there is no setting and no time
        record.update(setting=SAVED, time=None, seconds_edit=None, peak_memory_bytes=None)
    return report


class _Switch:
    """Stands in for a model in `evaluate_edits`; its "editing" switches the saved edits on.

    Args:
        model: carries the edits.
        stack: holds the edits switched off until `edit`.
    """

    def __init__(self, model: EditableModel, stack: contextlib.ExitStack):
        self._model, self._stack = model, stack
        self.base_model, self.tokenizer, self.edit_config = model.base_model, model.tokenizer, model.edit_config
        self.base_model_id = model.base_model_id
        self.method_name = ", ".join(dict.fromkeys(e.method for e in model.edits)) or "no edits"
        self.edits: list[Edit] = []
        stack.enter_context(model.disable_edits())

    def fingerprint(self) -> str:
        """Of the weights as they are now."""
        return self._model.fingerprint()

    def edit(self, requests: Sequence[EditRequest], **_: Any) -> EditResult:
        """Switch the saved edits on; one entry per request, because the caller counts them."""
        from ..journal import Edit, new_id, now
        from ..model import EditResult

        self._stack.close()
        self.edits = [Edit(new_id("saved"), request, self.method_name, "saved", now()) for request in requests]
        return EditResult(list(self.edits))

    def rollback(self, which: Any) -> None:
        """Nothing to undo: the edits are the model's own."""
        self.edits = []
