"""``kedit rollback``, ``kedit merge`` and ``kedit export-lora``: what is done with saved edits."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ArtifactError
from ..storage.display import percent
from ..storage.files import write_text
from .hub import back_to
from .models import BaseOption, DeviceOption, Dtype, DtypeOption, LoadOptions, TrustOption, edits_at, open_model
from .output import DebugOption, Format, FormatOption, command, counted, emit, error_console
from .remote import NobodyAsked

if TYPE_CHECKING:
    from ..model import EditableModel

EditsArgument = Annotated[str, typer.Argument(metavar="DIR", help="Folder (or Hub id) of saved edits.")]
RankOption = Annotated[
    int | None, typer.Option("--rank", min=1, help="Rank of the adapter; default: what the edits need.")
]


@command
def rollback(
    source: EditsArgument,
    edit_ids: Annotated[list[str] | None, typer.Argument(metavar="[EDIT_ID]...", help="Edits to undo.")] = None,
    last: Annotated[int | None, typer.Option("--last", min=1, help="Undo the last so many edits.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Undo all edits.")] = False,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="TAG", help="Go back to this version (tag or commit) of a Hub repository."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for what is left; default: DIR itself, or for --to a new commit."),
    ] = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Undo saved edits, and save what is left; or go back to an earlier version of a Hub repository."""
    if sum((bool(edit_ids), last is not None, all_, to is not None)) != 1:
        raise typer.BadParameter("say what to undo: edit ids, --last N, --all, or --to TAG", param_hint="EDIT_ID")
    if to is not None:
        back_to(source, to, output, format)
        return
    if output is None and not os.path.isdir(source):
        raise typer.BadParameter(f"{source} is no folder: say where what is left goes", param_hint="--output")
    model = _open_edits(source, device, trust_remote_code, base)
    which: Any = "all" if all_ else last if last is not None else edit_ids
    gone = model.rollback(which)
    target = output or Path(source)
    model.save_pretrained(target)
    data = {
        "rolled_back": [e.id for e in gone],
        "remaining": [e.id for e in model.edits],
        "artifact": str(target),
    }

    def show(console: Any) -> None:
        for e in gone:
            console.print(f"undone   {e.id}   {e.request.filled_prompt} → {e.request.target_new}")
        console.print(f"{counted(len(model.edits), 'edit')} left in {target}", soft_wrap=True)

    emit(format, data, human=show, quiet=data["rolled_back"])


@command
def export_finetune(
    source: Annotated[
        str, typer.Argument(metavar="EDITS", help="Folder (or Hub id) of saved edits, or a file of requests.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file to write.")],
    system: Annotated[str | None, typer.Option("--system", help="What the system says in every conversation.")] = None,
    least: Annotated[int, typer.Option("--least", min=0, help="Lines; fewer conversations are repeated.")] = 10,
    rephrasings: Annotated[
        bool, typer.Option("--rephrasings/--no-rephrasings", help="A conversation for each other wording, too.")
    ] = True,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Write edits as conversations for a provider's own fine-tuning; nothing is sent to anybody."""
    from ..data.finetune import finetune_lines
    from ..data.loading import requests_of

    artifact = None if os.path.isfile(source) else edits_at(source)
    if artifact is None and not os.path.isfile(source):
        raise ArtifactError(f"{source!r} holds no saved edits (no edit_config.json), and is no file of requests")
    requests = requests_of(source) if artifact is None else [edit.request for edit in artifact.journal]
    lines = finetune_lines(requests, system=system, least=least, rephrasings=rephrasings)
    write_text(output, "".join(line + "\n" for line in lines))
    data = {"output": str(output), "edits": len(requests), "lines": len(lines)}

    def show(console: Any) -> None:
        console.print(f"{counted(len(requests), 'edit')} written to {output}, {len(lines)} lines", soft_wrap=True)

    emit(format, data, human=show, quiet=[str(output)])


@command
def merge(
    folder: EditsArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the plain transformers model.")],
    base: BaseOption = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Add the edits as a LoRA adapter of the base model, in adapter/.")
    ] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Write base model + edits as a plain transformers model, with its tokenizer.

    --dtype is the number format of the written weights. What rounding loses of the edits is measured and shown.
    """
    _check_model_folder(output)
    model = _open_edits(folder, device, trust_remote_code, base)
    from ..artifact.writing import merged_files
    from ..books.ledger import LOSSY

    count, tokenizer, provenance = len(model.edits), model.tokenizer, merged_files(model)
    wanted = None if dtype in (None, Dtype.auto) else dtype
    model.ledger.check_mergeable()
    losses = model.ledger.rounding_losses(_torch_dtype(wanted))
    deltas = _exact_values(model, wanted)
    if adapter:
        model.export_lora(output / "adapter")
    merged = model.merge_and_unload()
    if wanted is not None:
        from ..engine.weights import get_module, set_weight

        merged.to(_torch_dtype(wanted))
        for (module, name), value in deltas.items():  # from the exact sum, not from an already rounded weight
            set_weight(get_module(merged, module), value, name)
    merged.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    for name, content in provenance.items():
        (output / name).write_bytes(content)
    worst = max(losses.values(), default=0.0)
    if worst > LOSSY and format is not Format.quiet:
        error_console().print(
            f"kedit: rounding loses up to {percent(worst, ' %')} of the change of a weight; --dtype float32 keeps it",
            style="yellow",
        )
    data = {
        "output": str(output),
        "edits": count,
        "dtype": str(next(merged.parameters()).dtype).removeprefix("torch."),
        "rounding_loss": losses,
    }

    def show(console: Any) -> None:
        console.print(
            f"{count} edit{'' if count == 1 else 's'} merged into {output} ({data['dtype']})", soft_wrap=True
        )
        for key, loss in losses.items():
            console.print(f"  {key}: {percent(loss, ' %')} of the change lost by rounding", soft_wrap=True)

    emit(format, data, human=show, quiet=[str(output)])


class LoraTarget(StrEnum):
    """Who is to load the adapter."""

    peft = "peft"
    vllm = "vllm"


@command
def export_lora(
    folder: EditsArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter.")],
    target: Annotated[LoraTarget, typer.Option("--target", help="Who is to load it.")] = LoraTarget.peft,
    rank: RankOption = None,
    modules: Annotated[
        list[str] | None,
        typer.Option("--module", help="A further module to cover, with zeros; adapters over the same swap in place."),
    ] = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Write saved edits as a plain LoRA adapter for PEFT, transformers or vLLM."""
    model = _open_edits(folder, device, trust_remote_code, base)
    report = model.export_lora(output, target=target.value, rank=rank, modules=modules or ())
    data = {
        "output": str(output),
        "edits": len(model.edits),
        "rank": report.rank,
        "needed": report.needed,
        "losses": report.losses,
        "whole": list(report.whole),
    }

    def show(console: Any) -> None:
        console.print(f"{counted(len(model.edits), 'edit')} written to {output}, rank {report.rank}", soft_wrap=True)
        for key, needed in report.needed.items():
            lost = f", {percent(report.losses[key], ' %')} of the change left out" if key in report.losses else ""
            console.print(f"  {key}: rank {needed}{lost}", soft_wrap=True)
        for module in report.whole:
            console.print(f"  {module}: stored whole", soft_wrap=True)

    emit(format, data, human=show, quiet=[str(output)])


def _torch_dtype(dtype: Dtype | None) -> Any:
    import torch

    return getattr(torch, dtype.value) if dtype else None


def _exact_values(model: EditableModel, dtype: Dtype | None) -> dict[tuple[str, str], Any]:
    """The edited weights in fp32, functional orientation, where they have to be written again."""
    if dtype is None:
        return {}
    return {
        (a.module, a.name): a.original.float() + a.total for a in model.ledger.accounts.values() if a.total is not None
    }


def _open_edits(name: str, device: str | None, trust_remote_code: bool, base: str | None) -> EditableModel:
    artifact = edits_at(name)
    if artifact is None:
        raise ArtifactError(f"{name!r} holds no saved edits (no edit_config.json)")
    silent = None
    if artifact.config["base_model_class"] == "RemoteModel" and base is None:
        silent = NobodyAsked(artifact.config["base_model_name_or_path"])
    load = LoadOptions(device=device, base=base, trust_remote_code=trust_remote_code)
    return open_model(name, load, artifact=artifact, backend=silent)


def _check_model_folder(folder: Path) -> None:
    from ..artifact.layout import ADAPTER_CONFIG, CONFIG, refuse_folder
    from ..artifact.reading import holds_edits

    has_edits = (folder / CONFIG).exists() and holds_edits(str(folder))  # not so for a model merged here before
    refuse_folder(folder, [*([CONFIG] if has_edits else []), ADAPTER_CONFIG], "a whole model")
