"""Saved edits: a folder with the deltas, the journal and everything needed to check that they fit.

    edit_config.json         what was done, to which base model, with which settings; hashes of the other files
    edit_model.safetensors   every book's tensors (deltas of weights in fp32, functional orientation; codebooks …) and
                             what methods keep for later edits
    edits.jsonl              the journal, one edit a line
    README.md                the model card
    adapter_config.json      where every change is low-rank: the same edits as a plain LoRA adapter, for PEFT,
    adapter_model.safetensors    AutoModel and pipelines without this library; not read here. Where all edits are one
                             memory at sites: its tensors, as an adapter for PEFT with this library
    edits/<edit>/adapter_*   if asked for: every low-rank edit alone, as such an adapter

Writing is atomic. Loading checks schema, hashes, shapes and the fingerprints of the touched base weights before
anything is changed. Nothing is unpickled, and no name from a file is used as a path.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

from ..books.book import Saved, all_disabled
from ..config import CONFIG_NAME, AutoEditConfig, EditConfig
from ..engine.weights import uninterrupted
from ..errors import ArtifactError, ConfigError, ExportError, HubUnreachableError, KeditError
from ..journal import Journal
from ..loading import hub_options, load_base, load_tokenizer
from ..logging import get_logger
from ..storage.files import FileSource, write_folder
from ..storage.repository import cached_commit
from ..version import __version__
from .card import CARD, EVAL_RESULTS, HasModelIndex, card_files, merged_card
from .lora_tensors import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_files, beside_weights, build_adapter, is_low_rank
from .site_adapter import adapter_config_of, as_adapter_tensors, config_bytes, from_adapter_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..model import EditableModel

logger = get_logger(__name__)
FORMAT_VERSION = 1
CONFIG, WEIGHTS, JOURNAL = CONFIG_NAME, "edit_model.safetensors", "edits.jsonl"
EDIT_KINDS, MERGED = ("lora", "dense", "stateful"), "merged"
"""What a folder may be, as its ``edit_config.json`` says under ``artifact``: saved edits that are all low-rank changes
of weights, or changes of weights of any rank, or (also) something that acts at run time; or a whole model."""
STATE = "state."
SINGLE = "edits"
"""Folder for the adapters of single edits."""
OURS = {
    *(CONFIG, WEIGHTS, JOURNAL, CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS, EVAL_RESULTS, ".gitattributes"),
    *(f"{SINGLE}/*/{name}" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)),
}
"""Files that saved edits may consist of; ``*`` stands for the folder of an edit."""
WHOLE_MODEL = "edits beside a whole model would be applied twice when it is loaded; choose another repository"
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


def save_artifact(
    model: EditableModel, folder: Path, *, report: HasModelIndex | None = None, per_edit: bool = False
) -> None:
    """Write the edits of a model to a folder; see `artifact_files`.

    Raises:
        ArtifactError: if the folder is a file, or holds a model or another adapter.
    """
    check_destination(folder)
    write_folder(folder, artifact_files(model, report=report, per_edit=per_edit), last=CONFIG, owned=OURS)


def artifact_files(
    model: EditableModel, *, repo_id: str | None = None, report: HasModelIndex | None = None, per_edit: bool = False
) -> dict[str, bytes]:
    """Everything that is saved of a model's edits: file name → content. The same edits give the same bytes.

    Args:
        model: with the edits.
        repo_id: where they will be, for the card.
        report: an evaluation of them, for the card.
        per_edit: add every edit alone as a LoRA adapter, in a folder of its own.

    Raises:
        ExportError: if ``per_edit`` is asked of edits that cannot be such adapters.
        WeightError: if an edited weight was trained since.
    """
    model.ledger.check_unchanged()
    tensors = {STATE + name: value.cpu().contiguous() for name, value in model.method_state().items()}
    adapter = adapter_config_of(model)
    for kind, book in model.books.items():
        tensors |= {} if adapter and kind == "adapter" else book.tensors()
    files = {
        # One entry of metadata only: safetensors writes several in an order that changes from run to run.
        WEIGHTS: dump_tensors(tensors, metadata={"format": "pt"}),
        JOURNAL: model.journal.to_jsonl().encode("utf-8"),
    }
    if is_low_rank(model):
        files |= adapter_files(model, build_adapter(model))
    if adapter is not None:
        files[ADAPTER_CONFIG] = config_bytes(adapter)
        files[ADAPTER_WEIGHTS] = dump_tensors(as_adapter_tensors(model.sites.tensors()), metadata={"format": "pt"})
    config = _describe(model) | {"tensors_in_adapter": adapter is not None}
    if per_edit:
        config["edit_folders"] = _edit_folders(model)
        for edit_id, place in config["edit_folders"].items():
            alone = adapter_files(model, build_adapter(model, edit_id=edit_id))
            files |= {f"{place}/{name}": data for name, data in alone.items()}
    config["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files |= card_files(config, model.edits, repo_id=repo_id, report=report)
    files[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False, sort_keys=False) + "\n").encode("utf-8")
    return files


def _edit_folders(model: EditableModel) -> dict[str, str]:
    """Edit → the folder of its adapter. An id is anything, hence the number where two would share a name.

    Raises:
        ExportError: if the edits are no adapters.
    """
    if not is_low_rank(model):
        raise ExportError(
            "per_edit=True writes every edit as a LoRA adapter, which needs edits that are all low-rank changes of"
            " weights (ROME, MEMIT and their kin, KN, LoRA …); these are not"
        )
    places: dict[str, str] = {}
    for number, edit in enumerate(model.edits):
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", edit.id).strip("-")
        place = f"{SINGLE}/{name or number}"
        places[edit.id] = f"{place}-{number}" if place in places.values() else place
    return places


def merged_files(model: EditableModel) -> dict[str, bytes]:
    """What is written beside a whole model that the edits become part of: where it comes from, the journal, the card.

    To be called before the edits are merged.
    """
    config = {**_describe(model), "artifact": MERGED}
    config["files"] = {JOURNAL: hashlib.sha256(journal := model.journal.to_jsonl().encode("utf-8")).hexdigest()}
    return {
        JOURNAL: journal,
        CARD: merged_card(config, model.edits).encode("utf-8"),
        CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8"),
    }


def check_destination(folder: Path) -> None:
    """Raise if edits must not be written here.

    Raises:
        ArtifactError: see above.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{str(folder)!r} is a file; give a folder")
    foreign = [("config.json", "a complete model")]
    if not (folder / CONFIG).exists():  # beside it, an adapter is the one that was saved with the edits
        foreign.append((ADAPTER_CONFIG, "an adapter"))
    for name, meaning in foreign:
        if (folder / name).exists():
            raise ArtifactError(
                f"{str(folder)!r} already holds {meaning} ({name}); edits in the same folder would be applied twice"
                " when it is loaded. Choose another folder."
            )


def _describe(model: EditableModel) -> dict[str, Any]:
    """Content of ``edit_config.json`` without the file hashes."""
    base = model.base_model
    with all_disabled(model.books.values()):  # fingerprints are those of the unedited weights
        books = {kind: book.describe() for kind, book in model.books.items()}
    return {
        "format_version": FORMAT_VERSION,
        "kedit_version": __version__,
        "artifact": "stateful" if beside_weights(model) else "lora" if is_low_rank(model) else "dense",
        "method": model.method_name,
        "hparams": model.edit_config.to_dict(),
        "base_model_name_or_path": model.base_model_id,
        "base_model_revision": model.base_model_revision,
        "base_model_class": type(base).__name__,
        "base_model_type": model.anatomy.model_type,
        "task_type": "SEQ_2_SEQ_LM" if model.anatomy.is_encoder_decoder else "CAUSAL_LM",
        "mergeable": not beside_weights(model),
        "base_dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
        "quantization_config": _quantisation_of(base),
        "head_tied": model.anatomy.head_tied,
        "anatomy": model.anatomy_overrides,
        "num_edits": len(model.journal),
        "compute_dtype": "float32",
        "context_templates": model.used_templates,
        "modules": books.pop("weights"),
        "books": {kind: described for kind, described in books.items() if described},
        "library_versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def _quantisation_of(base: PreTrainedModel) -> dict[str, Any] | None:
    """How the base model was quantised when it was loaded, JSON-ready; ``None``: not, or not by transformers."""
    config: Any = getattr(base.config, "quantization_config", None)
    if config is None:
        return None
    return json.loads(json.dumps(config if isinstance(config, dict) else config.to_dict(), default=str))


# ---------------------------------------------------------------------- reading


def find_artifact(name: str, *, revision: str | None = None, **hub: Any) -> Artifact | None:
    """Return the saved edits at a folder or Hub id, or ``None`` if it is a model.

    Args:
        name: folder or Hub id.
        revision: of a repository; all files are read from the commit that it names.
        hub: ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        ArtifactError: if it is a saved edit but damaged, or an existing folder without model or edits.
        HubError: if the repository is missing, closed, or neither cached nor reachable.
    """
    source = FileSource(name, revision=revision, **hub)
    config = _edit_config(source)
    return None if config is None else read_artifact(name, config, source.read)


def holds_edits(name: str, *, revision: str | None = None, **hub: Any) -> bool:
    """Whether `find_artifact` would find saved edits; reads nothing but their ``edit_config.json``."""
    return _edit_config(FileSource(name, revision=revision, **hub)) is not None


def _edit_config(source: FileSource) -> bytes | None:
    """The ``edit_config.json`` of saved edits; ``None`` for a model, be it one that edits were merged into."""
    folder = Path(source.name)
    if folder.is_file():
        raise ArtifactError(f"{source.name!r} is a file; give the folder of a model or of saved edits")
    try:
        config = source.read(CONFIG)
    except HubUnreachableError:
        cache = source.hub.get("cache_dir")
        if cached_commit(source.name, "config.json", revision=source.revision, cache_dir=cache):
            return None  # a model that was downloaded without ever asking for edits
        raise
    if config is not None and not _is_merged(config):
        return config
    if folder.is_dir() and not (folder / "config.json").is_file():
        no_edits = f"no {CONFIG}" if config is None else f"{CONFIG} is that of a merged model"
        raise ArtifactError(f"{source.name!r} is neither a saved edit ({no_edits}) nor a model (no config.json)")
    return None


def _is_merged(config_file: bytes) -> bool:
    """Whether an ``edit_config.json`` only tells which edits a whole model was merged with."""
    try:
        return bool(json.loads(config_file)["artifact"] == MERGED)
    except (ValueError, KeyError, TypeError):
        return False  # what is wrong with it is said when it is read


def read_artifact(source: str, config_file: bytes, fetch: Callable[[str], bytes | None]) -> Artifact:
    """Read and check the files of a saved edit.

    Args:
        source: for messages.
        config_file: content of ``edit_config.json``.
        fetch: file name → bytes, or ``None`` if it is missing.

    Raises:
        ArtifactError: naming the file and what is wrong with it.
    """

    def get(name: str) -> bytes:
        data = fetch(name)
        if data is None:
            raise ArtifactError(f"{source}: {name} is missing; the saved edit is incomplete")
        return data

    try:
        config = json.loads(config_file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{source}: {CONFIG} is not JSON: {error}") from error
    _check_schema(source, config)
    beside = (ADAPTER_WEIGHTS,) if config.get("tensors_in_adapter") is True else ()
    raw = {name: get(name) for name in (WEIGHTS, JOURNAL, *beside)}
    for name, digest in config["files"].items():
        if name in raw and hashlib.sha256(raw[name]).hexdigest() != digest:
            raise ArtifactError(
                f"{source}: {name} is not the file that {CONFIG} was written with (interrupted save or changed file)"
            )
    try:
        tensors = load_tensors(raw[WEIGHTS])
        for name in beside:
            tensors |= from_adapter_tensors(load_tensors(raw[name]))
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
    if config["artifact"] not in EDIT_KINDS:
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
    untie: bool,
    model_kwargs: dict[str, Any],
) -> EditableModel:
    """Build the edited model of a saved edit; see `EditableModel.from_pretrained`."""
    from ..model import EditableModel

    described = artifact.config
    name = described["base_model_name_or_path"]
    revision = base_model_revision or described.get("base_model_revision")
    if base_model is None:
        if not name:
            raise ArtifactError(f"{artifact.source}: the edits were made on a model in memory; give it as base_model=")
        model_kwargs.setdefault("dtype", getattr(torch, str(described.get("base_dtype", "")), None) or "auto")
        if described.get("quantization_config"):  # None, if given, asks for the unquantised model
            model_kwargs.setdefault("quantization_config", _quantisation_from(described["quantization_config"]))
        base_model = load_base(name, revision=revision, trust_remote_code=trust_remote_code, **model_kwargs)
    if tokenizer is None and name:
        try:
            tokenizer = load_tokenizer(
                name, revision=revision, trust_remote_code=trust_remote_code, **hub_options(model_kwargs)
            )
        except (OSError, ValueError, KeditError) as error:
            logger.warning("no tokenizer could be loaded from %r (%s); pass tokenizer= to edit further", name, error)
    chosen = config if config is not None else AutoEditConfig.for_method(described["method"])
    if config is None:
        saved = {k: v for k, v in described["hparams"].items() if k != "edit_type"}
        chosen = type(chosen).from_dict(saved, saved=True) if isinstance(chosen, EditConfig) else chosen
    overrides = anatomy if anatomy is not None else described.get("anatomy") or None
    model = EditableModel(
        base_model,
        chosen,
        tokenizer,
        anatomy=overrides,
        base_model_id=name,
        base_model_revision=revision,
        untie=untie or described.get("head_tied") is False,
    )
    states = read_books(artifact, model, ignore_fingerprint)
    state = {name.removeprefix(STATE): value for name, value in artifact.tensors.items() if name.startswith(STATE)}
    if model.method_name == described["method"]:  # another method knows nothing of it
        try:
            model.restore_method_state(state)
        except ConfigError as error:
            raise ArtifactError(f"{artifact.source}: {error}") from error
    model.restore_templates(described.get("context_templates") or {})
    with uninterrupted():
        for kind, state in states.items():
            model.books[kind].restore(state)
        model.journal = artifact.journal
    return model


def _quantisation_from(saved: dict[str, Any]) -> Any:
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(dict(saved))


def read_books(artifact: Artifact, model: EditableModel, ignore_fingerprint: bool) -> dict[str, Any]:
    """Let every book check its part; the model is not touched."""
    described = {"weights": artifact.config["modules"], **artifact.config.get("books", {})}
    unknown = described.keys() - model.books.keys()
    if unknown:
        raise ArtifactError(f"{artifact.source}: {CONFIG} has edits of an unknown kind: {', '.join(sorted(unknown))}")
    known = frozenset(e.id for e in artifact.journal)
    base = artifact.config
    states: dict[str, Any] = {}
    owned: set[str] = set()
    for kind, part in described.items():
        if not isinstance(part, dict):
            raise ArtifactError(f"{artifact.source}: {CONFIG} has no valid description of the {kind!r} edits")
        saved = Saved(
            artifact.source,
            part,
            artifact.tensors,
            known,
            made_on=f"a {base.get('base_model_class')} ({base['base_model_name_or_path'] or 'in memory'})",
            ignore_fingerprint=ignore_fingerprint,
        )
        states[kind], edit_ids = model.books[kind].read(saved)
        owned |= edit_ids
    if owned != known:
        raise ArtifactError(f"{artifact.source}: {JOURNAL} and {CONFIG} name different edits")
    return states
