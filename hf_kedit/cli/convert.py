"""``kedit convert-hparams``: hyperparameter files of EasyEdit as files of this library."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ..config import easyedit as easyedit_hparams
from ..config import read_mapping
from ..storage.files import without_tuples, write_text
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
    """Turn an EasyEdit hyperparameter file into one of this library, a training file into a plan of kedit train."""
    content = read_mapping(source)
    if "alg" in content and "alg_name" not in content:
        data, lines = _plan(content)
    else:
        data, lines = _config(content)
    model = data["model_name"]
    text = f"# From EasyEdit's {source.name}{f' for {model}' if model else ''}.\n"
    text += yaml.safe_dump(without_tuples(lines), sort_keys=False)
    if output is not None:
        write_text(output, text)
    data["output"] = None if output is None else str(output)

    def show(console: Any) -> None:
        console.print(text.rstrip() if output is None else f"written to {output}", soft_wrap=True)
        for key, reason in data["ignored"].items():
            error_console().print(f"not carried over: {key}: {reason}", soft_wrap=True)

    emit(format, data, human=show, quiet=text.splitlines() if output is None else [str(output)])


def _config(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to tell, and the content of the file."""
    converted = easyedit_hparams.convert_hparams(content)
    config = converted.config
    defaults = dataclasses.asdict(type(config)())
    changed = {k: v for k, v in dataclasses.asdict(config).items() if v != defaults[k]}
    data = {
        "edit_type": config.edit_type,
        "model_name": converted.model_name,
        "hparams": changed,
        "ignored": converted.ignored,
    }
    return data, {"edit_type": config.edit_type, **changed}


def _plan(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Likewise, of a file that says how an editor is trained."""
    from ..compat.easyedit import convert_training

    converted = convert_training(content)
    plan = converted.plan
    data = {
        "edit_type": plan["method"],
        "model_name": plan["model"],
        "plan": plan,
        "ignored": converted.ignored,
    }
    return data, plan
