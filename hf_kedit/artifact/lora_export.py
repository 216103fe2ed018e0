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

from ..errors import ArtifactError
from ..logging import get_logger
from ..storage.files import write_folder
from .card import CARD, adapter_card
from .lora_tensors import ADAPTER_CONFIG, Target, adapter_files, build_adapter
from .writing import CONFIG, JOURNAL

if TYPE_CHECKING:
    from ..model import EditableModel

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
    model: EditableModel,
    folder: Path,
    *,
    target: Target = "peft",
    rank: int | None = None,
    modules: Iterable[str] = (),
) -> LoraExport:
    """Write the edits of a model as a plain LoRA adapter; see `EditableModel.export_lora`."""
    check_adapter_folder(folder)
    adapter = build_adapter(model, target=target, rank=rank, modules=modules)
    files = adapter_files(model, adapter)
    files[JOURNAL] = model.journal.to_jsonl().encode("utf-8")
    files[CARD] = adapter_card(model.base_model_id, model.base_model_revision, model.edits, adapter.losses).encode()
    write_folder(folder, files, last=ADAPTER_CONFIG)
    for key, loss in adapter.losses.items():
        logger.warning("%s: rank %d leaves out %.1f %% of the change", key, adapter.rank, 100 * loss)
    return LoraExport(folder, adapter.rank, adapter.needed, adapter.losses, tuple(adapter.whole))


def check_adapter_folder(folder: Path) -> None:
    """Raise if an adapter must not be written here.

    Raises:
        ArtifactError: if the folder is a file, or holds a model or saved edits.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{str(folder)!r} is a file; give a folder")
    for name, meaning in (("config.json", "a complete model"), (CONFIG, "saved edits")):
        if (folder / name).exists():
            raise ArtifactError(
                f"{str(folder)!r} already holds {meaning} ({name}); an adapter in the same folder would apply the"
                " edits twice. Choose another folder."
            )
