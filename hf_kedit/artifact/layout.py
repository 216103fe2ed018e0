"""What saved edits consist of: names of files, kinds of folders, and what must be in ``edit_config.json``.

    edit_config.json         what was done, to which base model, with which settings; hashes of the other files
    edit_model.safetensors   every book's tensors (deltas of weights in fp32, functional orientation; codebooks …) and
                             what methods keep for later edits
    edits.jsonl              the journal, one edit a line
    README.md                the model card
    adapter_config.json      where every change is low-rank: the same edits as a plain LoRA adapter, for PEFT,
    adapter_model.safetensors    AutoModel and pipelines without this library; not read here. Where all edits are one
                             memory at sites: its tensors, as an adapter for PEFT with this library
    edits/<edit>/adapter_*   if asked for: every low-rank edit alone, as such an adapter

`writing` makes these files, `reading` checks and reads them. Nothing is unpickled, and no name from a file is used as
a path.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import CONFIG_NAME
from ..errors import ArtifactError
from ..journal import Journal
from ..loading import is_local
from ..storage.parsing import parse_json

FORMAT_VERSION = 1
CONFIG, WEIGHTS, JOURNAL, CARD = CONFIG_NAME, "edit_model.safetensors", "edits.jsonl", "README.md"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."
"""What PEFT puts before the names of an adapter's tensors."""
EVAL_RESULTS = ".eval_results/kedit.yaml"
EDIT_KINDS, MERGED = ("lora", "dense", "stateful"), "merged"
"""What a folder may be, as its ``edit_config.json`` says under ``artifact``: saved edits that are all low-rank changes
of weights, or changes of weights of any rank, or (also) something that acts at run time; or a whole model."""
STATE = "state."
"""What the names of a method's own tensors begin with."""
SINGLE = "edits"
"""Folder for the adapters of single edits."""
OWN_FILES = {
    *(CONFIG, WEIGHTS, JOURNAL, CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS, EVAL_RESULTS),
    *(f"{SINGLE}/*/{name}" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)),
}
"""Files that saved edits may consist of; ``*`` stands for the folder of an edit."""
WHOLE_MODEL = "edits beside a whole model would be applied twice when it is loaded; choose another repository"
_TEXTS = (".txt", ".json", ".jsonl")
_HOLDS = {"config.json": "a complete model", CONFIG: "saved edits", ADAPTER_CONFIG: "an adapter"}
_LOCATION = ("base_model_name_or_path", "base_model_revision", "base_model_relative_path", "base_model_folder")
_FIELDS: dict[str, type] = {
    "format_version": int,
    "artifact": str,
    "method": str,
    "hparams": dict,
    "base_model_name_or_path": str,
    "modules": dict,
    "files": dict,
}


_MODULE: dict[str, type] = {"shape": list, "rank": int, "pieces": list}
_OPTIONAL: dict[str, type] = {
    "config_sha256": str,
    "base_model_revision": str,
    "base_model_relative_path": str,
    "base_model_folder": str,
    "base_model_class": str,
    "base_dtype": str,
    "base_model_gguf": dict,
    "quantization_config": dict,
    "head_tied": bool,
    "anatomy": dict,
    "context_templates": dict,
    "books": dict,
    "machine_settings": list,
    "decoding": dict,
}


@dataclass
class Artifact:
    """The files of a saved edit, read into memory and checked against each other.

    Args:
        source: folder or repository that it came from, for messages.
        config: content of ``edit_config.json``.
        tensors: content of ``edit_model.safetensors``.
        journal: content of ``edits.jsonl``.
    """

    source: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    journal: Journal


def refuse_folder(folder: Path, foreign: Iterable[str], what: str) -> None:
    """Raise if files must not be written to a folder, before anything is computed.

    Args:
        folder: that they are meant for.
        foreign: files that must not lie beside them: together they would apply edits twice.
        what: that is to be written, for the message.

    Raises:
        ArtifactError: if the folder is a file, or has one of ``foreign``.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):  # no error for what can be no path
        raise ArtifactError(f"{str(folder)!r} is a file; give a folder")
    for name in foreign:
        if os.path.exists(folder / name):
            raise ArtifactError(
                f"{str(folder)!r} already holds {_HOLDS[name]} ({name}); {what} in the same folder would apply edits"
                " twice when it is loaded. Choose another folder."
            )


def check_destination(folder: Path) -> None:
    """Raise if edits must not be saved to a folder.

    Raises:
        ArtifactError: if it is a file, or holds a whole model or an adapter of another origin.
    """
    has_edits = os.path.exists(folder / CONFIG)  # then an adapter beside them is the one that was saved with them
    refuse_folder(folder, ["config.json", *([] if has_edits else [ADAPTER_CONFIG])], "edits")


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of what an ``edit_config.json`` says, but for where the base model is: that may be changed by hand.

    Args:
        config: as it is read from the file.
    """
    own = {name: value for name, value in config.items() if name not in (*_LOCATION, "config_sha256")}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def portable(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters without paths of one machine: where statistics are kept, and a corpus in a file or folder."""
    corpus = hparams.get("stats_dataset")
    local = isinstance(corpus, str) and (is_local(corpus) or Path(corpus).suffix in _TEXTS or os.path.exists(corpus))
    gone = ("stats_dir", *(("stats_dataset",) if local else ()))
    kept = {name: value for name, value in hparams.items() if value is None or name not in gone}
    if isinstance(inner := kept.get("base"), Mapping):  # of a method that another one works for
        kept["base"] = portable(inner)
    return kept


def bound_settings(hparams: Mapping[str, Any]) -> list[str]:
    """Names of the hyperparameters that `portable` leaves out."""
    kept, inner = portable(hparams), hparams.get("base")
    gone = {name for name in hparams if name not in kept}
    return sorted(gone | set(bound_settings(inner) if isinstance(inner, Mapping) else ()))


def is_merged(config_file: bytes) -> bool:
    """Whether an ``edit_config.json`` only tells which edits a whole model was merged with."""
    try:
        return bool(parse_json(config_file, CONFIG, ArtifactError)["artifact"] == MERGED)
    except (ValueError, KeyError, TypeError):
        return False  # what is wrong with it is said when it is read


def check_config(source: str, config: Any) -> None:
    """Raise if the content of an ``edit_config.json`` does not describe saved edits.

    Raises:
        ArtifactError: naming the field.
    """
    if not isinstance(config, dict):
        raise ArtifactError(f"{source}: {CONFIG} must hold an object")
    if "format_version" not in config and "edit_type" in config:
        raise ArtifactError(f"{source}: {CONFIG} is a method's config, not a saved edit")
    for name, kind in {**_FIELDS, **_OPTIONAL}.items():
        value = config.get(name)
        if not (isinstance(value, kind) or (value is None and name in _OPTIONAL)) or (kind is int and value is True):
            raise ArtifactError(f"{source}: {CONFIG} has no valid {name!r}")
    for name in ("anatomy", "files"):
        if not all(isinstance(text, str) for text in (config.get(name) or {}).values()):
            raise ArtifactError(f"{source}: {CONFIG} has no valid {name!r}")
    for key, entry in config["modules"].items():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(n), t) for n, t in _MODULE.items()):
            raise ArtifactError(f"{source}: {CONFIG}, module {key!r}: no valid description")
    for groups in (config.get("context_templates") or {}).values():
        texts = [text for group in groups for text in group] if _is_list_of(list, groups) else [None]
        if not all(isinstance(text, str) and "{}" in text for text in texts):
            raise ArtifactError(f"{source}: {CONFIG} has no valid 'context_templates'")
    if config["format_version"] < 1:
        raise ArtifactError(f"{source}: {CONFIG} has no valid 'format_version'")
    if config["format_version"] > FORMAT_VERSION:
        raise ArtifactError(
            f"{source}: written in format {config['format_version']}, this version of hf_kedit reads up to"
            f" {FORMAT_VERSION}; upgrade hf_kedit"
        )
    if config["artifact"] not in EDIT_KINDS:
        raise ArtifactError(f"{source}: holds a {config['artifact']!r}, not saved edits")
