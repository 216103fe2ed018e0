"""``kedit tune``: finds settings of a method for a model, and keeps them where they are found by the model's name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .models import (
    DeviceOption,
    DtypeOption,
    LoadOptions,
    MethodOptions,
    RevisionOption,
    SeedOption,
    TrustOption,
    open_model,
)
from .output import DebugOption, Format, FormatOption, command, emit

if TYPE_CHECKING:
    from ..tuning import TuneResult, TuneScore


@command
def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or folder of a model, or one of ours.")],
    method: Annotated[str, typer.Option("--method", "-M", help="Editing method; `kedit list-methods` shows them.")],
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="Minutes, check included; default: as long as it takes.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="YAML file for the settings; default: where they are found by the model's name."
        ),
    ] = None,
    facts: Annotated[
        str | None,
        typer.Option(
            "--facts",
            help="facts or world (packaged), or a file of requests with subject and ground_truth; default: what of the"
            " packaged facts the model knows.",
            show_default=False,
        ),
    ] = None,
    candidates: Annotated[int, typer.Option("--candidates", min=1, help="Settings that are tried.")] = 18,
    first_facts: Annotated[int, typer.Option("--first-facts", min=1, help="Facts that every candidate edits.")] = 4,
    search_facts: Annotated[int, typer.Option("--search-facts", min=1, help="Facts that the last few edit.")] = 16,
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Facts of the check, which no other edits.")] = 16,
    packaged: Annotated[
        bool, typer.Option("--packaged/--no-packaged", help="Also try the file that there is for the model.")
    ] = True,
    seed: SeedOption = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew instead of going on where an earlier search ended.")
    ] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Find the settings of a method for a model that nobody has tuned it for. No data set is needed.

    The model is asked which packaged facts it knows; they are edited to something else with different settings, and
    measured by generation and likelihood; the best settings are checked on facts that the search never saw. An
    interrupted search goes on where it was when the command is repeated.
    """
    load = LoadOptions(dtype, device, revision, trust_remote_code=trust_remote_code)
    editable = open_model(model, load, MethodOptions("prompt"))
    from ..tuning import search_settings

    found = search_settings(
        editable,
        method,
        facts=facts,
        minutes=budget,
        candidates=candidates,
        first_facts=first_facts,
        search_facts=max(search_facts, first_facts),
        held_out=held_out,
        packaged=packaged,
        seed=seed or 0,
        fresh=fresh,
    )
    file = found.write(output) if found.is_news or output is not None else None
    data = {**found.to_dict(), "file": None if file is None else str(file)}
    quiet = [] if file is None else [str(file)]
    emit(format, data, human=lambda console: _show(console, found, file, output is None), quiet=quiet)


def _show(console: Console, found: TuneResult, file: Path | None, by_name: bool) -> None:
    console.print(
        f"{found.method} on {found.model}: {len(found.tried)} settings tried, {found.edits} edits,"
        f" {found.seconds / 60:.1f} minutes",
        style="bold",
    )
    for name, value in found.best.changes.items() if found.replaced else ():
        console.print(f"  {name}: {getattr(found.derived_config, name)} -> {value}", soft_wrap=True)
    scores = {"derived": found.check_derived, "found": found.check_best}
    known: dict[str, TuneScore] = {name: score for name, score in scores.items() if score is not None}
    if known:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("on facts that the search never saw")
        for name in known:
            table.add_column(name, justify="right")
        table.add_row("harmonic mean", *(f"{100 * score.harmonic:.1f}" for score in known.values()))
        for figure in next(iter(known.values())).figures:
            table.add_row(figure, *(f"{100 * score.figures.get(figure, 0):.1f}" for score in known.values()))
        general = [score.general for score in known.values()]
        table.add_row("general answers kept", *("-" if g is None else f"{100 * g:.1f}" for g in general))
        console.print(table)
    console.print(found.verdict, soft_wrap=True)
    if file is None:
        console.print("nothing was written: the file that there is for the model stays")
        return
    console.print(f"written to {file}", soft_wrap=True)
    if by_name:
        name = found.method.lower()
        console.print(f'EditableModel.from_pretrained("{found.model}", "{name}") takes it', soft_wrap=True)
