"""Saved edits: a folder with the deltas, the journal and everything needed to check that they fit.

    edit_config.json         what was done, to which base model, with which settings; hashes of the other files
    edit_model.safetensors   factors or dense deltas, fp32, functional orientation; what methods keep for later edits
    edits.jsonl              the journal, one edit a line
    README.md                the model card

Writing is atomic. Loading checks schema, hashes, shapes and the fingerprints of the touched base weights before
anything is changed. Nothing is unpickled, and no name from a file is used as a path.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

from .card import model_card
from .config import CONFIG_NAME, AutoEditConfig, EditConfig
from .engine.ledger import Account, Piece, WeightDelta, fold
from .engine.weights import get_module, get_weight, is_transposed, tensor_digest, uninterrupted
from .errors import ArtifactError, BaseModelMismatchError, ConfigError, KeditError
from .files import read_file, write_folder
from .journal import Journal
from .loading import load_base, load_tokenizer
from .logging import get_logger
from .version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .model import EditableModel

logger = get_logger(__name__)
FORMAT_VERSION = 1
CONFIG, WEIGHTS, JOURNAL, CARD = CONFIG_NAME, "edit_model.safetensors", "edits.jsonl", "README.md"
STATE = "state."
_OURS = {CONFIG, WEIGHTS, JOURNAL, CARD, ".gitattributes"}
_LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers")


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


# ---------------------------------------------------------------------- writing


def save_artifact(model: EditableModel, folder: Path) -> None:
    """Write the edits of a model to a folder.

    Raises:
        ArtifactError: if the folder is a file, or holds a model or another adapter.
    """
    check_destination(folder)
    tensors, modules = _pack(model)
    tensors |= {STATE + name: value.cpu().contiguous() for name, value in model.method_state().items()}
    files = {
        WEIGHTS: dump_tensors(tensors, metadata={"format": "pt", "kedit_format": str(FORMAT_VERSION)}),
        JOURNAL: model.journal.to_jsonl().encode("utf-8"),
    }
    config = _describe(model, modules)
    config["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[CARD] = model_card(config, model.edits).encode("utf-8")
    files[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False, sort_keys=False) + "\n").encode("utf-8")
    write_folder(folder, files, last=CONFIG, owned=_OURS)


def check_destination(folder: Path) -> None:
    """Raise if edits must not be written here.

    Raises:
        ArtifactError: see above.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{str(folder)!r} is a file; give a folder")
    for name, meaning in (("config.json", "a complete model"), ("adapter_config.json", "an adapter")):
        if (folder / name).exists():
            raise ArtifactError(
                f"{str(folder)!r} already holds {meaning} ({name}); edits in the same folder would be applied twice"
                " when it is loaded. Choose another folder."
            )


def _pack(model: EditableModel) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and their description: factor columns of all pieces of a parameter side by side."""
    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, Any] = {}
    for key, account in model.ledger.accounts.items():
        pieces: list[dict[str, Any]] = []
        lefts: list[torch.Tensor] = []
        rights: list[torch.Tensor] = []
        column = 0
        for number, piece in enumerate(account.pieces):
            entry: dict[str, Any] = {"batch_id": piece.batch_id, "edits": list(piece.members)}
            delta = piece.delta
            if delta.left is not None and delta.right is not None:
                width = delta.left.shape[1]
                entry |= {"storage": "factors", "start": column, "stop": column + width}
                entry["columns"] = None if piece.columns is None else list(piece.columns)
                lefts.append(delta.left.cpu())
                rights.append(delta.right.cpu())
                column += width
            elif delta.dense is not None:
                name = f"{key}.delta.{number}"
                entry |= {"storage": "dense", "tensor": name}
                tensors[name] = delta.dense.cpu().contiguous()
            if delta.keys is not None:
                entry["keys"] = f"{key}.keys.{number}"
                tensors[entry["keys"]] = delta.keys.cpu().contiguous()
            pieces.append(entry)
        if lefts:
            tensors[f"{key}.delta_U"] = torch.cat(lefts, dim=1).contiguous()
            tensors[f"{key}.delta_V"] = torch.cat(rights, dim=1).contiguous()
        owner = get_module(model.base_model, account.module)
        modules[key] = {
            "module": account.module,
            "param": account.name,
            "type": "conv1d" if is_transposed(owner) else "linear",
            "shape": list(account.original.shape),
            "dtype": str(account.original.dtype).removeprefix("torch."),
            "rank": column,
            "base_sha256": tensor_digest([("", account.original)]),
            "pieces": pieces,
        }
    return tensors, modules


def _describe(model: EditableModel, modules: dict[str, Any]) -> dict[str, Any]:
    """Content of ``edit_config.json`` without the file hashes."""
    base = model.base_model
    return {
        "format_version": FORMAT_VERSION,
        "kedit_version": __version__,
        "artifact": "edits",
        "method": model.method_name,
        "hparams": model.edit_config.to_dict(),
        "base_model_name_or_path": model.base_model_id,
        "base_model_revision": model.base_model_revision,
        "base_model_class": type(base).__name__,
        "base_model_type": model.anatomy.model_type,
        "base_dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
        "anatomy": model.anatomy_overrides,
        "num_edits": len(model.journal),
        "compute_dtype": "float32",
        "context_templates": model.used_templates,
        "modules": modules,
        "library_versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


# ---------------------------------------------------------------------- reading


def find_artifact(name: str, *, revision: str | None = None, token: Any = None) -> Artifact | None:
    """Return the saved edits at a folder or Hub id, or ``None`` if it is a base model.

    Raises:
        ArtifactError: if it is a saved edit but damaged, or an existing folder without model or edits.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            if not (folder / "config.json").is_file():
                raise ArtifactError(f"{name!r} is neither a saved edit (no {CONFIG}) nor a model (no config.json)")
            return None
        return read_artifact(name, partial(read_file, name))
    if folder.is_file():
        raise ArtifactError(f"{name!r} is a file; give the folder of a model or of saved edits")
    fetch = partial(read_file, name, revision=revision, token=token)
    if fetch(CONFIG) is None:
        return None
    return read_artifact(name, fetch)


def read_artifact(source: str, fetch: Any) -> Artifact:
    """Read and check the files of a saved edit.

    Args:
        source: for messages.
        fetch: file name → bytes, or ``None`` if it is missing.

    Raises:
        ArtifactError: naming the file and what is wrong with it.
    """

    def get(name: str) -> bytes:
        data: bytes | None = fetch(name)
        if data is None:
            raise ArtifactError(f"{source}: {name} is missing; the saved edit is incomplete")
        return data

    try:
        config = json.loads(get(CONFIG))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{source}: {CONFIG} is not JSON: {error}") from error
    _check_schema(source, config)
    raw = {name: get(name) for name in (WEIGHTS, JOURNAL)}
    for name, digest in config["files"].items():
        if name in raw and hashlib.sha256(raw[name]).hexdigest() != digest:
            raise ArtifactError(
                f"{source}: {name} is not the file that {CONFIG} was written with (interrupted save or changed file)"
            )
    try:
        tensors = load_tensors(raw[WEIGHTS])
        journal = Journal.from_jsonl(raw[JOURNAL].decode("utf-8"))
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{source}: damaged file: {error}") from error
    return Artifact(source, config, tensors, journal)


_SCHEMA: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "artifact": str,
    "method": str,
    "hparams": dict,
    "base_model_name_or_path": str,
    "modules": dict,
    "files": dict,
}


def _check_schema(source: str, config: Any) -> None:
    if not isinstance(config, dict):
        raise ArtifactError(f"{source}: {CONFIG} must hold an object")
    if "format_version" not in config and "edit_type" in config:
        raise ArtifactError(f"{source}: {CONFIG} is a method's config, not a saved edit")
    for name, kind in _SCHEMA.items():
        if not isinstance(config.get(name), kind):
            raise ArtifactError(f"{source}: {CONFIG} has no valid {name!r}")
    if config["format_version"] > FORMAT_VERSION:
        raise ArtifactError(
            f"{source}: written in format {config['format_version']}, this version of hf_kedit reads up to"
            f" {FORMAT_VERSION}; upgrade hf_kedit"
        )
    if config["artifact"] != "edits":
        raise ArtifactError(f"{source}: holds a {config['artifact']!r}, not saved edits")


def load_artifact(
    artifact: Artifact,
    config: EditConfig | str | None,
    *,
    base_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    anatomy: Mapping[str, str] | None,
    base_model_revision: str | None,
    ignore_fingerprint: bool,
    trust_remote_code: bool,
    model_kwargs: dict[str, Any],
) -> EditableModel:
    """Build the edited model of a saved edit; see `EditableModel.from_pretrained`."""
    from .model import EditableModel

    described = artifact.config
    name = described["base_model_name_or_path"]
    revision = base_model_revision or described.get("base_model_revision")
    if base_model is None:
        if not name:
            raise ArtifactError(f"{artifact.source}: the edits were made on a model in memory; give it as base_model=")
        model_kwargs.setdefault("dtype", getattr(torch, str(described.get("base_dtype", "")), None) or "auto")
        base_model = load_base(name, revision=revision, trust_remote_code=trust_remote_code, **model_kwargs)
    if tokenizer is None and name:
        try:
            tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeditError) as error:
            logger.warning("no tokenizer could be loaded from %r (%s); pass tokenizer= to edit further", name, error)
    chosen = config if config is not None else AutoEditConfig.for_method(described["method"])
    if config is None:
        saved = {k: v for k, v in described["hparams"].items() if k != "edit_type"}
        chosen = type(chosen).from_dict(saved) if isinstance(chosen, EditConfig) else chosen
    overrides = anatomy if anatomy is not None else described.get("anatomy") or None
    model = EditableModel(
        base_model,
        chosen,
        tokenizer,
        anatomy=overrides,
        base_model_id=name,
        base_model_revision=revision,
    )
    accounts = _accounts(artifact, model, ignore_fingerprint)
    state = {name.removeprefix(STATE): value for name, value in artifact.tensors.items() if name.startswith(STATE)}
    if model.method_name == described["method"]:  # another method knows nothing of it
        try:
            model.restore_method_state(state)
        except ConfigError as error:
            raise ArtifactError(f"{artifact.source}: {error}") from error
    model.restore_templates(described.get("context_templates") or {})
    with uninterrupted():
        model.ledger.restore(accounts)
        model.journal = artifact.journal
    return model


def _accounts(artifact: Artifact, model: EditableModel, ignore_fingerprint: bool) -> dict[str, Account]:
    """Rebuild the ledger's accounts, checking every name, shape and fingerprint first."""
    known = {e.id for e in artifact.journal}
    parameters = dict(model.base_model.named_parameters(remove_duplicate=False))
    accounts: dict[str, Account] = {}
    owned: set[str] = set()
    for key, entry in artifact.config["modules"].items():
        where = f"{artifact.source}: {CONFIG}, module {key!r}"
        if not isinstance(entry, dict) or not isinstance(entry.get("pieces"), list):
            raise ArtifactError(f"{where}: no valid description")
        module, name = str(entry.get("module")), str(entry.get("param"))
        if f"{module}.{name}" != key or key not in parameters:
            raise BaseModelMismatchError(
                f"{where}: {type(model.base_model).__name__} has no such parameter; the edits were made on a"
                f" {artifact.config.get('base_model_class')} ({artifact.config['base_model_name_or_path']})"
            )
        original = get_weight(get_module(model.base_model, module), name).cpu()
        if list(original.shape) != entry.get("shape"):
            raise BaseModelMismatchError(
                f"{where}: the base model's weight is {tuple(original.shape)}, the edits were made on"
                f" {tuple(entry.get('shape') or ())}"
            )
        if not ignore_fingerprint and tensor_digest([("", original)]) != entry.get("base_sha256"):
            raise BaseModelMismatchError(
                f"{where}: the base model's weight is not the one that the edits were made on (other revision, dtype,"
                f" or an already edited model). Base: {artifact.config['base_model_name_or_path']!r}, dtype"
                f" {entry.get('dtype')}. ignore_fingerprint=True applies them anyway."
            )
        pieces = [_piece(artifact, where, key, module, name, p, known, tuple(original.shape)) for p in entry["pieces"]]
        owned.update(m for p in pieces for m in p.members)
        accounts[key] = Account(module, name, original, pieces, fold(pieces))
    if owned != known:
        raise ArtifactError(f"{artifact.source}: {JOURNAL} and {CONFIG} name different edits")
    return accounts


def _piece(
    artifact: Artifact,
    where: str,
    key: str,
    module: str,
    name: str,
    entry: Any,
    known: set[str],
    shape: tuple[int, ...],
) -> Piece:
    try:
        members = tuple(entry["edits"])
        if not members or not set(members) <= known:
            raise ArtifactError(f"{where}: a piece belongs to an edit that is not in {JOURNAL}")
        if entry["storage"] == "factors":
            start, stop = int(entry["start"]), int(entry["stop"])
            u, v = artifact.tensors[f"{key}.delta_U"], artifact.tensors[f"{key}.delta_V"]
            left, right = u[:, start:stop].clone(), v[:, start:stop].clone()
            columns = None if entry["columns"] is None else tuple(entry["columns"])
            if (left.shape[0], right.shape[0]) != shape or left.shape[1] != stop - start or start < 0:
                raise ArtifactError(f"{where}: factors of shape {tuple(u.shape)} and {tuple(v.shape)} do not fit")
            if columns is not None and (len(columns) != stop - start or set(columns) != set(members)):
                raise ArtifactError(f"{where}: the columns are not those of its edits")
            delta = WeightDelta(module, name, left=left, right=right)
        elif entry["storage"] == "dense":
            delta, columns = WeightDelta(module, name, dense=artifact.tensors[str(entry["tensor"])].clone()), None
            if delta.shape != shape:
                raise ArtifactError(f"{where}: a delta of shape {delta.shape} does not fit")
        else:
            raise ArtifactError(f"{where}: unknown storage {entry['storage']!r}")
        if entry.get("keys") is not None:
            delta.keys = artifact.tensors[str(entry["keys"])].clone()
            if delta.keys.dim() != 2 or delta.keys.shape[0] != shape[-1]:
                raise ArtifactError(f"{where}: keys of shape {tuple(delta.keys.shape)} do not fit")
            if columns is not None and delta.keys.shape[1] != len(columns):
                raise ArtifactError(f"{where}: {delta.keys.shape[1]} keys for {len(columns)} columns")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, KeditError):
            raise
        raise ArtifactError(f"{where}: damaged description of a piece ({error!r})") from error
    if not delta.finite():
        raise ArtifactError(f"{where}: the saved delta holds NaN or infinity")
    return Piece(str(entry["batch_id"]), delta, members, columns)
