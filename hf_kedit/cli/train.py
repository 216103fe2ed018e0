"""``kedit train``: trains an editor (MEND and its relatives) as a YAML file says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .models import hush_transformers, loading, parse_settings
from .output import DebugOption, Format, FormatOption, command, emit

if TYPE_CHECKING:
    from ..training import EditTrainer


@command
def train(
    plan: Annotated[
        Path,
        typer.Argument(metavar="PLAN", help="YAML file: model, method, data, editor, training.", show_default=False),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="One training argument, as in YAML; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the editor; default: the file's output_dir.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Train an editor for a model, measure it on held-out facts and save it.

    Start it with torchrun or accelerate launch to use several processes. The packaged files are in hparams/TRAINING.
    """
    from ..training.plan import TrainingPlan, train_and_save

    training = parse_settings(settings)
    if output is not None:
        training["output_dir"] = str(output)
    if format is not Format.human or not sys.stderr.isatty():
        training["disable_tqdm"] = True
    todo = TrainingPlan.from_file(plan, training=training)
    hush_transformers()
    with loading(todo.model):
        trainer = todo.trainer()
    _keep_off_stdout(trainer)
    scores = train_and_save(trainer, resume)
    if not trainer.is_world_process_zero():
        return
    data: dict[str, Any] = {
        "model": todo.model,
        "method": todo.method,
        "steps": trainer.state.global_step,
        "folder": str(trainer.args.output_dir),
        "scores": {name.removeprefix("eval_"): value for name, value in scores.items()},
    }
    emit(format, data, human=lambda console: _show(console, data), quiet=[data["folder"]])


def _keep_off_stdout(trainer: EditTrainer) -> None:
    """Trainer prints what it logs between our data; it goes into the bar instead, where there is one."""
    from transformers import PrinterCallback, ProgressCallback

    class Progress(ProgressCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if self.training_bar is not None and logs:
                self.training_bar.set_postfix(logs)

    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Progress)


def _show(console: Console, data: dict[str, Any]) -> None:
    console.print(f"{data['method']} for {data['model']}, {data['steps']} steps")
    for name in ("edit_success", "generalization", "locality", "drawdown"):
        if name in data["scores"]:
            console.print(f"  {name.replace('_', ' '):<14} {data['scores'][name]:.3f}")
    console.print(f"kept in {data['folder']}", soft_wrap=True)
