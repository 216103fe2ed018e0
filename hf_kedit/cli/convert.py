"""``kedit convert-hparams``: hyperparameter files of EasyEdit as files of this library."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ..config import easyedit as easyedit_hparams
from .output import DebugOption, Format, FormatOption, command, emit, error_console


@command
def convert_hparams(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="EasyEdit's YAML or JSON file.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: standard output.")
    ] = None,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Turn an EasyEdit hyperparameter file into one of this library."""
    converted = easyedit_hparams.convert_hparams(source)
    config = converted.config
    defaults = dataclasses.asdict(type(config)())
    changed = {k: v for k, v in dataclasses.asdict(config).items() if v != defaults[k]}
    # As JSON would: YAML has no tuples.
    lines = yaml.safe_dump({"edit_type": config.edit_type, **_plain(changed)}, sort_keys=False)
    text = f"# From EasyEdit's {source.name}{f' for {converted.model_name}' if converted.model_name else ''}.\n{lines}"
    if output is not None:
        output.write_text(text, encoding="utf-8")
    data = {
        "edit_type": config.edit_type,
        "model_name": converted.model_name,
        "hparams": _plain(changed),
        "ignored": converted.ignored,
        "output": None if output is None else str(output),
    }

    def show(console: Any) -> None:
        console.print(text.rstrip() if output is None else f"written to {output}", soft_wrap=True)
        for key, reason in converted.ignored.items():
            error_console().print(f"not carried over: {key}: {reason}", soft_wrap=True)

    emit(format, data, human=show, quiet=[text.rstrip() if output is None else str(output)])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
