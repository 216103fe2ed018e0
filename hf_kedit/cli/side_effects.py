"""What an edit broke, as people see it: one row per kind of question, red where it hurts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..evaluation import SideEffectReport


def show_side_effects(console: Console, report: SideEffectReport) -> None:
    """Print a compact table, and the harm in red."""
    from ..evaluation.measures.side_effects import MEANINGS

    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    table.add_column("by generation", no_wrap=True)
    table.add_column("good", no_wrap=True)
    table.add_column("for example", no_wrap=True, overflow="ellipsis", ratio=1)
    for kind, meaning in MEANINGS.items():
        answers = report.of(kind)
        if not answers:
            continue
        good = sum(a.good for a in answers)
        bad = next((a for a in answers if not a.good), None)
        example = "" if bad is None else f"{bad.before[:24]!r} → {bad.after[:24]!r} ({bad.question.prompt!r})"
        style = "" if bad is None else "yellow"
        table.add_row(meaning, f"{good} of {len(answers)}", example, style=style)
    console.print(table)
    for sentence in report.harm:
        console.print(f"harm: {sentence}", style="bold red")
