"""``kedit convert-editor``: a MEND archive of another implementation becomes an editor of this library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .models import Dtype, DtypeOption, RevisionOption, hush_transformers, loading
from .output import DebugOption, Format, FormatOption, command, emit


@command
def convert_editor(
    archive: Annotated[
        Path, typer.Argument(help="Archive of the MEND repository or of EasyEdit.", show_default=False)
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="Hub id or folder of the base model.")],
    inner_params: Annotated[
        str,
        typer.Option("--inner-params", help="Edited parameters, separated by commas, in the order of its settings."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the editor.")],
    dtype: DtypeOption = Dtype.float32,
    revision: RevisionOption = None,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Convert a MEND archive. It is read without running code that it may contain; what is written is safetensors."""
    from ..loading import load_base
    from ..methods.mend_convert import convert_mend, read_archive

    hush_transformers()
    tensors = read_archive(archive)
    with loading(model):
        base = load_base(model, revision=revision, dtype=None if dtype is None else dtype.value)
    editor = convert_mend(tensors, base, [name.strip() for name in inner_params.split(",")])
    editor.origin |= {"base_model_name_or_path": model}
    editor.save_pretrained(output)
    data = {"folder": str(output), "modules": list(editor.shapes)}
    emit(format, data, human=lambda console: console.print(f"kept in {output}", soft_wrap=True), quiet=[str(output)])
