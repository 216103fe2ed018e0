"""``kedit export-gguf``: an edited model, or its edits alone, for llama.cpp and Ollama."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..storage.display import percent
from .artifacts import RankOption
from .models import BaseOption, DeviceOption, LoadOptions, RevisionOption, TrustOption, edits_at, open_model
from .output import DebugOption, Format, FormatOption, command, counted, emit, size_of


class FileDtype(StrEnum):
    """Number formats of the matrices in a file."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"


@command
def export_gguf(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Saved edits, or a whole model (folder, Hub id …).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write (….gguf).")],
    dtype: Annotated[FileDtype, typer.Option("--dtype", help="Number format of the matrices.")] = FileDtype.f16,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the edits alone, as a LoRA adapter of the base model.")
    ] = False,
    rank: RankOption = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Write base model + edits as one GGUF file, or with --adapter the edits alone, for llama.cpp and Ollama."""
    if rank is not None and not adapter:
        raise typer.BadParameter("--rank belongs to --adapter", param_hint="--rank")
    from ..gguf.reading import require_gguf

    require_gguf("writing GGUF")
    load = LoadOptions(device=device, revision=revision, base=base, trust_remote_code=trust_remote_code)
    model = open_model(source, load, artifact=edits_at(source, revision))
    done = model.export_gguf_adapter(output, rank=rank) if adapter else model.export_gguf(output, dtype=dtype.value)
    data = {
        "output": str(output),
        "edits": len(model.edits),
        "architecture": done.architecture,
        "dtype": done.dtype,
        "tensors": done.tensors,
        "bytes": done.size,
        "rank": done.rank or None,
        "losses": done.losses,
        "modelfile": done.modelfile,
    }

    def show(console: Any) -> None:
        what = (
            f"as an adapter of rank {done.rank}" if adapter else f"in a whole {done.architecture} model, {done.dtype}"
        )
        console.print(
            f"{counted(len(model.edits), 'edit')} written to {output} {what} ({size_of(done.size)})", soft_wrap=True
        )
        for key, loss in done.losses.items():
            console.print(f"  {key}: {percent(loss, ' %')} of the change left out", soft_wrap=True)
        console.print("\nModelfile for Ollama, beside the file:")
        console.print(done.modelfile, soft_wrap=True)
        if adapter:
            console.print("\nbase.gguf stands for any GGUF file of the base model.")

    emit(format, data, human=show, quiet=[str(output)])
