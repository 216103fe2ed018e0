"""Edits as LoRA adapters and back: the part of `EditableModel` that writes and reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..editing.state import EditedModel
from ..engine.access import exclusively, together_with_others
from ..journal import EditResult
from ..requests import RequestSource
from ..storage.files import named_path
from .lora_compile import CompiledEdits, compile_edits
from .lora_export import LoraExport, export_lora
from .lora_import import import_lora
from .lora_tensors import LoraTarget


class LoraExchange(EditedModel):
    """Methods of `EditableModel` for LoRA adapters."""

    @together_with_others
    def export_lora(
        self,
        folder: str | Path,
        *,
        target: LoraTarget = "peft",
        rank: int | None = None,
        modules: Sequence[str] = (),
    ) -> LoraExport:
        """Write the edits as a plain LoRA adapter that needs no ``hf_kedit`` to load.

        Args:
            folder: for the adapter; made if needed.
            target: ``"peft"``, or ``"vllm"`` for a rank that vLLM allows and a check for what it refuses.
            rank: rank of every module; a change that needs more is approximated, and the loss is reported. ``None``:
                what the edits need. Full-rank changes (fine-tuning, RECT) are then stored as whole modules.
            modules: further modules that the adapter covers, with zeros where nothing was edited. Adapters over the
                same modules with the same rank can be hot-swapped.

        Raises:
            ExportError: if the edits cannot be written so.
            ArtifactError: if the folder holds a model or saved edits.
        """
        return export_lora(self, named_path(folder, "the folder"), target=target, rank=rank, modules=modules)

    @exclusively
    def compile_edits(
        self, folder: str | Path | None = None, *, rank: int, target: LoraTarget = "peft"
    ) -> CompiledEdits:
        """All edits as one LoRA of a chosen rank, for servers that run adapters and nothing else.

        Every weight's change is cut to its ``rank`` largest singular directions. Then each fact is asked for, with the
        edits and with what is left of them, so that what is lost has a name before it is served.

        Args:
            folder: for the adapter, written as by `export_lora`; ``None``: only measure.
            rank: of every module.
            target: as for `export_lora`.

        Returns:
            The energy that was kept per weight, the targets' probabilities, and the edits that would be lost.

        Raises:
            ExportError: if the edits are no changes of weights, or there is no tokenizer.
            ArtifactError: if the folder holds a model or saved edits.
        """
        return compile_edits(self, None if folder is None else Path(folder), rank=rank, target=target)

    def import_lora(
        self,
        adapter: str | Path,
        requests: RequestSource | None = None,
        **where: Any,
    ) -> EditResult:
        """Put a plain LoRA adapter on the weights as one edit (or a group of edits) that can be rolled back.

        The model goes on answering other threads until the files are here.

        Args:
            adapter: folder or Hub id with ``adapter_config.json`` and ``adapter_model.safetensors``.
            requests: what the adapter changes, for the journal, the model card and the evaluation; ``None``: the
                ``edits.jsonl`` that `export_lora` wrote beside it. They can only be undone together.
            where: ``subfolder``, ``revision`` and ``token``, for a repository.

        Raises:
            RequestError: if it is not known what the adapter changes.
            ArtifactError: if the adapter is damaged, or is more than a fixed change of weights.
            BaseModelMismatchError: if it belongs to another model.
        """
        return import_lora(self, str(adapter), requests, **where)
