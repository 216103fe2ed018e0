"""The Typer application: one function per command, each in the module of its subject."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..version import __version__
from . import (
    artifacts,
    bench,
    chat,
    convert,
    convert_editor,
    demo,
    doctor,
    edit,
    evaluate,
    gguf,
    hub,
    inspect,
    methods,
    metrics,
    serve,
    stats,
    trace,
    train,
    tune,
    ui,
)
from .output import INTERRUPTED

app = typer.Typer(
    name="kedit",
    help="Knowledge editing for Hugging Face models: change a fact, see it, undo it, save it, measure it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Data goes to standard output, logs to standard error. Exit codes: 0 done, 1 failure, 2 wrong usage,"
    " 3 edit below --min-success.",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"kedit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command("demo")(demo.demo)
app.command("edit")(edit.edit)
app.command("eval")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("rollback")(artifacts.rollback)
app.command("merge")(artifacts.merge)
app.command("push")(hub.push)
app.command("export-lora")(artifacts.export_lora)
app.command("export-finetune")(artifacts.export_finetune)
app.command("export-gguf")(gguf.export_gguf)
app.command("convert-hparams")(convert.convert_hparams)
app.command("list-methods")(methods.list_methods)
app.command("stats")(stats.stats)
app.command("precompute", hidden=True)(stats.stats)
app.command("trace")(trace.trace)
app.command("bench")(bench.bench)
app.command("train")(train.train)
app.command("tune")(tune.tune)
app.command("convert-editor")(convert_editor.convert_editor)
app.command("metrics")(metrics.metrics)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.command("ui")(ui.ui)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except KeyboardInterrupt:  # before a command was begun, which says it itself
        sys.stderr.write("kedit: interrupted\n")
        raise SystemExit(INTERRUPTED) from None
