"""`EditableModel.export_lora`: a folder that PEFT, transformers and vLLM load without this library.

adapter_config.json, adapter_model.safetensors   the edits, in PEFT's layout
edits.jsonl                                      what was changed; `import_lora` reads it
README.md                                        the card
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..logging import get_logger
from ..storage.files import write_folder
from .card import adapter_card
from .layout import ADAPTER_CONFIG, CARD, CONFIG, JOURNAL, refuse_folder
from .lora_tensors import LoraTarget, adapter_files, build_adapter

if TYPE_CHECKING:
    from ..editing.state import EditedModel

logger = get_logger(__name__)


@dataclass(frozen=True)
class LoraExport:
    """What `export_lora` wrote.

    Args:
        folder: where.
        rank: of every module in the file.
        needed: rank that each changed weight needs.
        losses: ‖Δ − BA‖ / ‖Δ‖ of the weights whose change was cut to a smaller rank.
        whole: modules that are stored whole, because their change has full rank.
    """

    folder: Path
    rank: int
    needed: dict[str, int]
    losses: dict[str, float]
    whole: tuple[str, ...]


def export_lora(
    model: EditedModel,
    folder: Path,
    *,
    target: LoraTarget = "peft",
    rank: int | None = None,
    modules: Iterable[str] = (),
) -> LoraExport:
    """Write the edits of a model as a plain LoRA adapter; see `EditableModel.export_lora`."""
    refuse_folder(folder, ["config.json", CONFIG], "an adapter")
    adapter = build_adapter(model, target=target, rank=rank, modules=modules)
    files = adapter_files(model, adapter)
    files[JOURNAL] = model.journal.to_jsonl().encode("utf-8")
    files[CARD] = adapter_card(model.base_model_id, model.base_model_revision, model.edits, adapter.losses).encode()
    write_folder(folder, files, last=ADAPTER_CONFIG)
    for key, loss in adapter.losses.items():
        logger.warning("%s: rank %d leaves out %.1f %% of the change", key, adapter.rank, 100 * loss)
    return LoraExport(folder, adapter.rank, adapter.needed, adapter.losses, tuple(adapter.whole))
