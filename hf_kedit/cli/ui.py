"""``kedit ui``: the page in the browser, and the same page as a folder for a Space."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import check_extra
from .models import LoadOptions, hush_transformers, open_model
from .output import DebugOption, Format, FormatOption, command, emit

_MODEL = "kedit/world-llama"


@command
def ui(
    model: Annotated[
        str,
        typer.Argument(help="A model or saved edits, as for --model elsewhere; default: one that comes along."),
    ] = _MODEL,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; 0.0.0.0 lets the whole network in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Default: the first free one from 7860 on.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder that the page's “Save” writes to.")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open it in the browser.")] = True,
    export_space: Annotated[
        Path | None, typer.Option("--export-space", help="Write the page as a Space into this folder, and stop.")
    ] = None,
    load: LoadOptions = LoadOptions(),
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Change facts in the browser: edit, ask, look inside, undo, share. Nothing is downloaded and nobody is told."""
    if export_space is not None:
        from ..ui.space import export_space as write

        files = [str(file) for file in write(export_space, model)]
        emit(
            format,
            {"folder": str(export_space), "files": files},
            human=lambda console: console.print(f"wrote {', '.join(files)}", soft_wrap=True),
            quiet=files,
        )
        return
    check_extra("gradio", "demo", "the page in the browser")
    hush_transformers()
    editable = open_model(model, load)
    from ..ui.layout import serve

    app = serve(editable, host=host, port=port, output=output, browser=browser and format is Format.human, wait=False)
    emit(
        format,
        {"url": app.local_url, "model": editable.base_model_id},
        human=lambda console: console.print(f"{editable.base_model_id} is at {app.local_url}  (Ctrl-C ends it)"),
        quiet=[app.local_url],
    )
    app.block_thread()
