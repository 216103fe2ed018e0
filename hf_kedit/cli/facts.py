"""Options that say which facts are meant: typed in, or rows of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SubjectOption = Annotated[str | None, typer.Option("--subject", help="The entity that the fact is about.")]
TargetOption = Annotated[str | None, typer.Option("--target", "-t", help="What the model should say.")]
RephraseOption = Annotated[
    list[str] | None, typer.Option("--rephrase", help="The prompt in other words; may be repeated.")
]
DatasetPathOption = Annotated[
    Path | None, typer.Option("--dataset-path", help="File or folder of a named dataset that you downloaded.")
]
SplitOption = Annotated[str | None, typer.Option("--split", help="Split of the dataset; default: the dataset's own.")]
