"""``kedit stats``: second moments of layer inputs, which ROME, MEMIT and their kin need, computed ahead of time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from .models import LayersOption, LoadOptions, MethodOption, MethodOptions, ModelOption, open_model
from .output import DebugOption, Format, FormatOption, command, emit


@command
def stats(
    model: ModelOption,
    method: MethodOption = "memit",
    layers: LayersOption = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            "-d",
            help="Text file, dataset id (org/name:config:split), finished statistics (a folder, or org/name on the"
            " Hub), or self: text that the model writes. Default: the packaged text, as for edits (for an embedded"
            " model: the text of its world).",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", "-n", min=1, help="Tokens to read; default: 100 per dimension of a text that you name."
        ),
    ] = None,
    stats_dir: Annotated[
        Path | None,
        typer.Option("--stats-dir", "--output", "-o", help="Folder of the cache; default: the library's own."),
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="REPO", help="Share them as this data set on the Hub (org/name).")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Push to a private repository.")] = False,
    load: LoadOptions = LoadOptions(),
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Collect second moments of the keys of all layers in one pass over text.

    What is there already is not computed again, and an interrupted run goes on where it was. Without --layers:
    the layers that the method edits. Started by torchrun or accelerate launch, the processes share the text, and the
    result is that of one process. With --stats-dir, give the method the same folder: --set stats_dir=DIR.
    """
    flags: dict[str, Any] = {
        "stats_dataset": dataset,
        "stats_tokens": tokens,
        "stats_dir": None if stats_dir is None else str(stats_dir),
    }
    _check_uses_statistics(str(method))
    from ..statistics.workers import join, local_device

    workers = join()
    load = replace(load, device=load.device or local_device())
    editable = open_model(model, load, MethodOptions(method=method, layers=layers), flags=flags)
    from ..engine.forward import frozen_eval

    modules = [editable.anatomy.down(layer).path for layer in editable.edit_config.layers or []]
    store = editable.statistics
    store.workers = workers
    with editable.disable_edits(), frozen_eval(editable.base_model):
        found = store.moments(modules)
    data: dict[str, Any] = {
        "model": editable.base_model_id,
        "fingerprint": store.fingerprint,
        "folder": str(store.folder),
        "modules": [
            {"module": name, "tokens": moment.count, "width": moment.total.shape[0], "corpus": moment.source}
            for name, moment in found.items()
        ],
    }
    if not workers.is_main:
        return
    if push is not None:
        data["commit"] = store.push_to_hub(push, modules, private=True if private else None).oid
        data["repository"] = push
    emit(format, data, human=lambda console: _show(console, data), quiet=[data["folder"]])


def _check_uses_statistics(method: str) -> None:
    from ..config import config_class

    if "stats_dataset" not in config_class(method).__dataclass_fields__:
        raise ConfigError(f"{method} uses no second moments; memit and rome do")


def _show(console: Console, data: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("inputs of", no_wrap=True)
    table.add_column("tokens", justify="right")
    table.add_column("width", justify="right")
    table.add_column("text")
    for row in data["modules"]:
        table.add_row(row["module"], f"{row['tokens']:,}", f"{row['width']:,}", row["corpus"])
    console.print(table)
    console.print(f"\nkept in {data['folder']}", soft_wrap=True)
    if "repository" in data:
        console.print(f"shared as {data['repository']}: --set stats_dataset={data['repository']}", soft_wrap=True)
