"""``kedit list-methods``: what can edit, and what each method needs."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import nearest
from .output import DebugOption, Format, FormatOption, command, emit


@command
def list_methods(
    kind: Annotated[
        str | None, typer.Option("--kind", help="Only methods of this kind: weights, adapter or prompt.")
    ] = None,
    family: Annotated[
        str | None, typer.Option("--family", help="Only methods for this family (transformers' model_type, as llama).")
    ] = None,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """List the editing methods and what each can do and needs."""
    if kind not in (None, "weights", "adapter", "prompt"):
        raise typer.BadParameter(f"{kind!r} is not weights, adapter or prompt", param_hint="--kind")
    rows = [row for row in method_rows() if kind in (None, row["kind"])]
    if family is not None and _is_encoder_decoder(family):
        rows = [row for row in rows if row["encoder_decoder"]]
    emit(format, rows, human=lambda console: _show(rows, console), quiet=[row["edit_type"] for row in rows])


def _is_encoder_decoder(family: str) -> bool:
    from transformers import CONFIG_MAPPING

    if family not in CONFIG_MAPPING:
        hint = nearest(family, list(CONFIG_MAPPING))
        raise typer.BadParameter(f"transformers knows no family {family!r}.{hint}", param_hint="--family")
    return bool(getattr(CONFIG_MAPPING[family](), "is_encoder_decoder", False))


def method_rows() -> list[dict[str, Any]]:
    """One JSON-ready dict per registered method, in alphabetical order."""
    from ..methods import registered_methods

    rows = [{"edit_type": name, **dataclasses.asdict(m.capabilities)} for name, m in registered_methods().items()]
    first = ("name", "edit_type", "kind", "batch", "sequential", "needs_subject", "needs_training", "paper")
    return [{**{key: row[key] for key in first}, **row} for row in rows]


def traits(row: dict[str, Any]) -> list[str]:
    """What a method can do and needs, in words."""
    words = {
        "batch": ("many facts at once", "one fact at a time"),
        "sequential": ("edit after edit", "on an unedited model only"),
        "needs_subject": ("needs the subject", ""),
        "needs_training": ("needs training first", ""),
        "encoder_decoder": ("encoder-decoder models too", ""),
    }
    chosen = [pair[0] if row[key] else pair[1] for key, pair in words.items()]
    return [word for word in chosen if word]


def _show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 1, 0), pad_edge=False, header_style="bold")
    table.add_column("--method", style="cyan", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("what it does")
    for row in rows:
        what = Text(f"{row['summary']}\n{', '.join(traits(row))}\n")
        table.add_row(row["edit_type"], row["kind"], what.append(row["paper"], "dim"))
    console.print(table)
