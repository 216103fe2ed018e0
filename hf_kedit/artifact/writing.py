"""The edits of a model become files: those that `layout` lists. The same edits give the same bytes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save as dump_tensors

from ..editing.state import EditedModel
from ..engine.access import together_with_others
from ..errors import ArtifactError, ExportError
from ..gguf.reading import GgufFile
from ..journal import Edit
from ..loading import is_local
from ..logging import get_logger
from ..storage.files import write_folder
from ..storage.parsing import parse_json
from ..version import __version__
from .card import HasModelIndex, card_files, merged_card
from .layout import (
    ADAPTER_CONFIG,
    CARD,
    CONFIG,
    FORMAT_VERSION,
    JOURNAL,
    MERGED,
    OWN_FILES,
    SINGLE,
    STATE,
    WEIGHTS,
    bound_settings,
    check_destination,
    config_digest,
    portable,
)
from .lora_tensors import adapter_files, beside_weights, edit_adapter, is_low_rank, whole_adapter
from .site_adapter import site_adapter_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = get_logger(__name__)
_LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers")

_version = functools.cache(importlib.metadata.version)  # which reads a library's files each time


@dataclass(frozen=True)
class _Contents:
    """What a model's edits are; found out once for a save, however many files say it.

    Args:
        described: kind of edit → what its book says of them.
        beside: ids of the edits that are no part of any weight.
        low_rank: whether all of them are low-rank changes of weights.
    """

    described: dict[str, dict[str, Any]]
    beside: list[str]
    low_rank: bool

    @classmethod
    def of(cls, model: EditedModel) -> _Contents:
        """Look at all books."""
        described = {kind: book.describe() for kind, book in model.books.items()}
        beside = beside_weights(model)
        return cls(described, beside, not beside and is_low_rank(model))


def save_artifact(
    model: EditedModel, folder: Path, *, report: HasModelIndex | None = None, per_edit: bool = False
) -> None:
    """Write the edits of a model to a folder; see `artifact_files`.

    Raises:
        ArtifactError: if the folder is a file, or holds a model or another adapter.
    """
    check_destination(folder)
    files = artifact_files(model, folder=folder, report=report, per_edit=per_edit)
    write_folder(folder, files, last=CONFIG, owned=OWN_FILES)


@together_with_others
def artifact_files(
    model: EditedModel,
    *,
    folder: Path | None = None,
    repo_id: str | None = None,
    report: HasModelIndex | None = None,
    per_edit: bool = False,
) -> dict[str, bytes]:
    """Everything that is saved of a model's edits: file name → content.

    Args:
        model: with the edits.
        folder: where they will be, so that a base model in a folder is found if both are moved.
        repo_id: the repository in which they will be, for the card.
        report: an evaluation of them, for the card.
        per_edit: add every edit alone as a LoRA adapter, in a folder of its own.

    Raises:
        ExportError: if ``per_edit`` is asked of edits that cannot be such adapters.
        WeightError: if an edited weight was trained since.
    """
    model.ledger.check_unchanged()
    journal = model.journal.to_jsonl().encode("utf-8")
    contents = _Contents.of(model)
    if per_edit and not contents.low_rank:
        raise ExportError(
            "per_edit=True writes every edit as a LoRA adapter, which needs edits that are all low-rank changes of"
            " weights (ROME, MEMIT and their kin, KN, LoRA …); these are not"
        )
    at_sites = site_adapter_files(model)  # they hold the site book's tensors, which are saved once
    tensors = {STATE + name: value.cpu().contiguous() for name, value in model.method_state().items()}
    for kind, book in model.books.items():
        tensors |= {} if at_sites and kind == "adapter" else book.tensors()
    files = {
        # One entry of metadata only: safetensors writes several in an order that changes from run to run.
        WEIGHTS: dump_tensors(tensors, metadata={"format": "pt"}),
        JOURNAL: journal,
    }
    files |= adapter_files(model, whole_adapter(model)) if contents.low_rank else at_sites
    config = _describe(model, contents) | {"tensors_in_adapter": bool(at_sites)}
    if folder is not None and is_local(model.base_model_id):
        with contextlib.suppress(ValueError):  # on another drive
            config["base_model_relative_path"] = Path(
                os.path.relpath(model.base_model_id, os.path.realpath(folder))
            ).as_posix()
    if per_edit:
        config["edit_folders"] = _edit_folders(model.edits)
        for edit_id, place in config["edit_folders"].items():
            alone = adapter_files(model, edit_adapter(model, edit_id))
            files |= {f"{place}/{name}": data for name, data in alone.items()}
    config["files"] = _digests(files)
    config = json.loads(json.dumps(config))  # names that are numbers become text
    config["config_sha256"] = config_digest(config)
    files |= card_files(config, model.edits, repo_id=repo_id, report=report)
    files[CONFIG] = _config_file(config)
    return files


def merged_files(model: EditedModel) -> dict[str, bytes]:
    """What is written beside a whole model that the edits become part of: where it comes from, the journal, the card.

    To be called before the edits are merged.
    """
    files = {JOURNAL: model.journal.to_jsonl().encode("utf-8")}
    config = {**_describe(model, _Contents.of(model)), "artifact": MERGED, "files": _digests(files)}
    files[CARD] = merged_card(config, model.edits).encode("utf-8")
    files[CONFIG] = _config_file(config)
    return files


def without_local_base(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files for others: where the base model is on this machine means nothing there, and is nobody's business.

    Args:
        files: name → content, an ``edit_config.json`` among them.

    Returns:
        The same files; where the base model is a folder or a file, its name stays and the way to it goes.
    """
    config = parse_json(files[CONFIG], CONFIG, ArtifactError)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not is_local(base):
        return dict(files)
    folder = re.split(r"[\\/]", base.rstrip("/\\"))[-1]
    logger.warning(
        "the base model is on this machine alone (%s): whoever loads the edits has to give it, with base_model= or"
        " --base. Push the model too, and make the edits on the pushed one, to spare them that",
        base,
    )
    changed = dict(files)
    config |= {"base_model_name_or_path": "", "base_model_folder": folder}
    config.pop("base_model_relative_path", None)
    for name in (name for name in files if Path(name).name == ADAPTER_CONFIG):
        adapter = {**parse_json(files[name], name, ArtifactError), "base_model_name_or_path": None}
        changed[name] = (json.dumps(adapter, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
        if name in config.get("files", {}):
            config["files"][name] = hashlib.sha256(changed[name]).hexdigest()
    if "config_sha256" in config:
        config["config_sha256"] = config_digest(config)
    if CARD in files:  # those of 0.1.0 name the whole way
        changed[CARD] = files[CARD].replace(base.encode("utf-8", "replace"), folder.encode("utf-8", "replace"))
    return changed | {CONFIG: _config_file(config)}


def _describe(model: EditedModel, contents: _Contents) -> dict[str, Any]:
    """Content of ``edit_config.json`` without the file hashes."""
    base, books = model.base_model, contents.described
    whole = model.edit_config.to_dict()
    return {
        "format_version": FORMAT_VERSION,
        "kedit_version": __version__,
        "artifact": "stateful" if contents.beside else "lora" if contents.low_rank else "dense",
        "method": model.method_name,
        "hparams": portable(whole),
        "machine_settings": bound_settings(whole),
        "base_model_name_or_path": model.base_model_id,
        "base_model_revision": model.base_model_revision,
        "base_model_class": type(base).__name__,
        "base_model_type": model.anatomy.model_type,
        "task_type": "SEQ_2_SEQ_LM" if model.anatomy.is_encoder_decoder else "CAUSAL_LM",
        "mergeable": not contents.beside,
        "base_dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
        **({} if model.gguf is None else {"base_model_gguf": _file_of(model.gguf)}),
        "quantization_config": _quantisation_of(base),
        "head_tied": model.anatomy.head_tied,
        "anatomy": model.anatomy_overrides,
        "num_edits": len(model.journal),
        "compute_dtype": "float32",
        "context_templates": model.used_templates,
        "modules": books["weights"],
        "books": {kind: described for kind, described in books.items() if described and kind != "weights"},
        "library_versions": {name: _version(name) for name in _LIBRARIES},
        **({} if model.decoding_config is None else {"decoding": model.decoding_config.to_dict()}),
    }


def _file_of(gguf: GgufFile) -> dict[str, str]:
    """What tells the GGUF file of a base model from others, wherever it lies."""
    return {"file": gguf.path.name, "sha256": gguf.sha256}


def _quantisation_of(base: PreTrainedModel) -> dict[str, Any] | None:
    """How the base model was quantised when it was loaded, JSON-ready; ``None``: not, or not by transformers."""
    config: Any = getattr(base.config, "quantization_config", None)
    if config is None:
        return None
    return json.loads(json.dumps(config if isinstance(config, dict) else config.to_dict(), default=str))


def _edit_folders(edits: list[Edit]) -> dict[str, str]:
    """Edit → the folder of its adapter. An id may be any text, hence the number where two would share a name."""
    places: dict[str, str] = {}
    for number, edit in enumerate(edits):
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", edit.id).strip("-")
        place = f"{SINGLE}/{name or number}"
        places[edit.id] = f"{place}-{number}" if place in places.values() else place
    return places


def _digests(files: dict[str, bytes]) -> dict[str, str]:
    """File name → SHA-256 of its content."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def _config_file(config: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # the name of a folder that is no UTF-8
        return (json.dumps(config, indent=2) + "\n").encode("ascii")
