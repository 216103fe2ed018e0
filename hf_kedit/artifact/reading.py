"""Saved edits are found, read, and put on a model. Everything is checked before the model is touched.

Read in this order: `find_artifact` (a folder or a repository → the files, checked against each other), `arguments_of`
(what the edited model is built with), `restore` (books, journal and method get back what was saved).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from ..anatomy.switching import uninterrupted
from ..books.book import Saved
from ..config import AutoEditConfig, EditConfig
from ..editing.state import EditedModel
from ..errors import (
    ArtifactError,
    BaseModelMismatchError,
    ConfigError,
    HubUnreachableError,
    KeditError,
    reason_of,
    shown,
)
from ..gguf.reading import is_gguf, origin_of
from ..journal import Journal
from ..loading import hub_options, is_local, load_base, load_processor, load_tokenizer, model_name
from ..logging import get_logger
from ..remote.model import RemoteModel
from ..storage.files import FileSource
from ..storage.parsing import parse_json
from ..storage.repository import cached_commit
from .layout import (
    ADAPTER_WEIGHTS,
    CONFIG,
    JOURNAL,
    STATE,
    WEIGHTS,
    Artifact,
    check_config,
    config_digest,
    is_merged,
    portable,
)
from .site_adapter import from_adapter_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)
M = TypeVar("M", bound=EditedModel)


# ---------------------------------------------------------------------- files


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
    if is_gguf(name):
        return None
    source = FileSource(name, revision=revision, **hub)
    config_file = _edit_config(source)
    while config_file is not None:
        try:
            return read_artifact(name, config_file, source.read)
        except ArtifactError:  # damaged, unless another process has saved other edits there meanwhile
            before, config_file = config_file, _edit_config(source)
            if config_file == before:
                raise
    return None


def holds_edits(name: str) -> bool:
    """Whether `find_artifact` would find saved edits; reads nothing but their ``edit_config.json``."""
    return not is_gguf(name) and _edit_config(FileSource(name)) is not None


def _edit_config(source: FileSource) -> bytes | None:
    """The ``edit_config.json`` of saved edits; ``None`` for a model, be it one that edits were merged into."""
    if os.path.isfile(source.name):
        raise ArtifactError(f"{source.name!r} is a file; give the folder of a model or of saved edits")
    try:
        config_file = source.read(CONFIG)
    except HubUnreachableError:
        cache = source.hub.get("cache_dir")
        if cached_commit(source.name, "config.json", revision=source.revision, cache_dir=cache):
            return None  # a model that was downloaded without ever asking for edits
        raise
    if config_file is not None and not is_merged(config_file):
        return config_file
    if source.folder is not None and not (source.folder / "config.json").is_file():
        no_edits = f"no {CONFIG}" if config_file is None else f"{CONFIG} is that of a merged model"
        raise ArtifactError(f"{source.name!r} is neither a saved edit ({no_edits}) nor a model (no config.json)")
    return None


def _why_changed(data: bytes, digest: str) -> str:
    """What became of a file whose hash is another one, as far as the file itself tells."""
    if data.startswith(b"version https://git-lfs"):
        return "it is the pointer that Git LFS leaves in the place of a file; git lfs pull fetches the file"
    if hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest() == digest:
        return "its line ends were changed, as Git does on Windows; clone with -c core.autocrlf=false"
    return "interrupted save or changed file"


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

    config = parse_json(config_file, f"{source}: {CONFIG}", ArtifactError)
    check_config(source, config)
    beside = (ADAPTER_WEIGHTS,) if config.get("tensors_in_adapter") is True else ()
    raw = {name: get(name) for name in (WEIGHTS, JOURNAL, *beside)}
    for name, digest in config["files"].items():
        if name in raw and hashlib.sha256(raw[name]).hexdigest() != digest:
            raise ArtifactError(
                f"{source}: {name} is not the file that {CONFIG} was written with ({_why_changed(raw[name], digest)})"
            )
    try:
        tensors = load_tensors(raw[WEIGHTS])
        for name in beside:
            tensors |= from_adapter_tensors(load_tensors(raw[name]))
        journal = Journal.from_jsonl(raw[JOURNAL].decode("utf-8"))
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{source}: damaged file: {error}") from error
    return Artifact(source, config, tensors, journal)


# ---------------------------------------------------------------------- models


def arguments_of(
    artifact: Artifact,
    config: EditConfig | str | None,
    *,
    base_model: PreTrainedModel | RemoteModel | str | Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    anatomy: Mapping[str, str] | None,
    base_model_revision: str | None,
    trust_remote_code: bool,
    untie: bool,
    ignore_fingerprint: bool,
    model_kwargs: dict[str, Any],
) -> dict[str, Any]:
    """What an `EditableModel` for saved edits is built with; loads base model and tokenizer where they are not given.

    The arguments are those of `EditableModel.from_pretrained`.

    Raises:
        ArtifactError: if the base model cannot be found or loaded, naming it.
        BaseModelMismatchError: if it is read from another GGUF file than the one that the edits were made on.
    """
    described = artifact.config
    recorded = described["base_model_name_or_path"]
    name, revision = _base_of(artifact), base_model_revision or described.get("base_model_revision")
    if isinstance(base_model, (str, Path)):
        name, revision = model_name(base_model), base_model_revision
    if base_model is None and described.get("base_model_class") == RemoteModel.__name__:
        raise ArtifactError(
            f"{artifact.source}: the edits were made on {recorded!r}, a model behind an API; give what asks it:"
            " base_model=OpenAICompatibleBackend(…), or on the command line --backend"
        )
    if base_model is None or isinstance(base_model, (str, Path)):
        quantised = described.get("quantization_config")
        if not quantised:
            model_kwargs.setdefault("dtype", _dtype(described.get("base_dtype")))
        elif base_model is None:  # None, if given, asks for the unquantised model
            model_kwargs.setdefault("quantization_config", _quantisation_from(artifact.source, quantised))
        given = None if base_model is None else str(base_model)
        base_model = _load(artifact, name, given, revision, trust_remote_code, model_kwargs)
    if not ignore_fingerprint:
        _check_file(artifact, base_model)
    processor = None
    if not isinstance(base_model, RemoteModel):
        own: Any = {"revision": revision, "trust_remote_code": trust_remote_code, **hub_options(model_kwargs)}
        processor = load_processor(name, base_model.config, **own) if name else None
    if tokenizer is None and processor is None and not isinstance(base_model, RemoteModel):
        tokenizer = _tokenizer(name, base_model, revision, trust_remote_code, hub_options(model_kwargs))
    chosen = config if config is not None else AutoEditConfig.for_method(described["method"])
    if config is None:
        saved = {k: v for k, v in portable(described["hparams"]).items() if k != "edit_type"}
        if "stats_dataset" in (described.get("machine_settings") or ()):
            logger.warning(
                "%s: the edits were made with statistics of a corpus on one machine, which is not saved with them; for"
                " further edits like these give the method's config with stats_dataset=",
                artifact.source,
            )
        chosen = type(chosen).from_dict(saved, saved=True) if isinstance(chosen, EditConfig) else chosen
    return {
        "base_model": base_model,
        "config": chosen,
        "tokenizer": tokenizer,
        "processor": processor,
        "anatomy": anatomy if anatomy is not None else described.get("anatomy") or None,
        "base_model_id": name or recorded,
        "base_model_revision": revision,
        "untie": untie or described.get("head_tied") is False,
    }


def _base_of(artifact: Artifact) -> str:
    """Name of the base model of saved edits: a folder or file of this machine where it is one; empty if none is."""
    recorded = artifact.config["base_model_name_or_path"]
    folder = Path(os.path.expanduser(artifact.source))
    beside = artifact.config.get("base_model_relative_path") or (recorded if recorded.startswith(".") else None)
    if (
        not os.path.exists(os.path.expanduser(recorded))
        and isinstance(beside, str)
        and os.path.exists(folder / beside)
    ):
        return model_name(folder / beside)  # both were moved together
    return model_name(recorded)


def _load(
    artifact: Artifact,
    name: str,
    given: str | None,
    revision: str | None,
    trust_remote_code: bool,
    model_kwargs: dict[str, Any],
) -> PreTrainedModel:
    """Load the base model of saved edits.

    Args:
        artifact: the edits.
        name: of the base model.
        given: what the user calls it; ``None``: it is the one that is recorded.
        revision, trust_remote_code, model_kwargs: see `load_base`.

    Raises:
        ArtifactError: saying how another one is given.
    """
    give = "give it with base_model= (a model, a folder, a GGUF file or a Hub id), or on the command line with --base"
    if given is not None and not (given.strip() and name):
        raise ArtifactError(f"{artifact.source}: base_model is empty; {give}")
    if not name:
        where = artifact.config.get("base_model_folder")
        made_on = f"in {_kind_of(where)} {where!r} of another machine" if where else "in memory"
        raise ArtifactError(f"{artifact.source}: the edits were made on a model {made_on}; {give}")
    if is_local(name) and not os.path.exists(os.path.expanduser(name)):
        what = "the edits were made on" if given is None else "their base model is to be"
        raise ArtifactError(f"{artifact.source}: {what} {name!r}, which is not there; {give}")
    try:
        return load_base(name, revision=revision, trust_remote_code=trust_remote_code, **model_kwargs)
    except KeditError:
        raise
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{artifact.source}: the base model of the edits, {name!r}, cannot be loaded ({reason_of(error)}); {give}"
        ) from error


def _kind_of(name: str) -> str:
    return "the file" if is_gguf(name) else "the folder"


def _check_file(artifact: Artifact, base_model: PreTrainedModel | RemoteModel) -> None:
    """Raise if edits were made on one GGUF file and the base model was read from another.

    A base model that comes from somewhere else is judged by its weights alone.

    Raises:
        BaseModelMismatchError: naming both files.
    """
    made_on, here = artifact.config.get("base_model_gguf"), origin_of(base_model)
    if made_on and here is not None and here.sha256 != made_on.get("sha256"):
        raise BaseModelMismatchError(
            f"{artifact.source}: the edits were made on the GGUF file {shown(made_on.get('file'))} with the SHA-256"
            f" {shown(made_on.get('sha256'))}, and {str(here.path)!r} is another one ({here.sha256}). Give that file"
            " with base_model= or --base, or accept the difference with ignore_fingerprint=True"
        )


def _tokenizer(
    name: str, base_model: PreTrainedModel, revision: str | None, trust_remote_code: bool, hub: dict[str, Any]
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the base model; ``None``, and a warning, if there is none under its names."""
    own = str(getattr(base_model.config, "name_or_path", "") or "")
    reasons = []
    for source in dict.fromkeys(n for n in (name, own) if n):
        try:
            return load_tokenizer(
                source, revision=revision if source == name else None, trust_remote_code=trust_remote_code, **hub
            )
        except (OSError, ValueError, KeditError) as error:
            reasons.append(f"{source!r} ({error})")
    if reasons:
        logger.warning("no tokenizer could be loaded from %s; pass tokenizer= to edit further", ", ".join(reasons))
    return None


def _dtype(name: Any) -> Any:
    """The number format of this name, or ``"auto"`` if no model can be in it."""
    return getattr(torch, name) if name in ("float64", "float32", "float16", "bfloat16") else "auto"


def _quantisation_from(source: str, saved: dict[str, Any]) -> Any:
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return AutoQuantizationConfig.from_dict(dict(saved))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ArtifactError(f"{source}: {CONFIG} has no valid 'quantization_config': {error}") from error


def restore(artifact: Artifact, model: M, *, ignore_fingerprint: bool = False) -> M:
    """Put saved edits on a model without edits, and return it.

    Args:
        artifact: the saved edits.
        model: built with `arguments_of`.
        ignore_fingerprint: put them on other base weights than they were made on.

    Raises:
        ArtifactError: if something is missing or damaged.
        BaseModelMismatchError: if the base model has other weights than the edits were made on.
    """
    described = artifact.config
    contents = read_books(artifact, model, ignore_fingerprint)
    if model.method_name == described["method"]:  # another method knows nothing of the saved one's state
        state = {name.removeprefix(STATE): value for name, value in artifact.tensors.items() if name.startswith(STATE)}
        try:
            model.restore_method_state(state)
        except ConfigError as error:
            raise ArtifactError(f"{artifact.source}: {error}") from error
    try:
        model.set_decoding(described.get("decoding") or None)
    except KeditError as error:
        raise ArtifactError(f"{artifact.source}: {CONFIG} has no valid 'decoding': {error}") from error
    model.restore_templates(described.get("context_templates") or {})
    with uninterrupted():
        for kind, content in contents.items():
            model.books[kind].restore(content)
        model.journal = artifact.journal
    return model


def read_books(artifact: Artifact, model: EditedModel, ignore_fingerprint: bool) -> dict[str, Any]:
    """Let every book check its part of saved edits; the model is not touched.

    Returns:
        For every kind of edit what the book's `restore` takes.

    Raises:
        ArtifactError: if something is missing or damaged.
        BaseModelMismatchError: if the base model has other weights than the edits were made on.
    """
    described = {"weights": artifact.config["modules"], **(artifact.config.get("books") or {})}
    unknown = described.keys() - model.books.keys()
    if unknown:
        raise ArtifactError(f"{artifact.source}: {CONFIG} has edits of an unknown kind: {', '.join(sorted(unknown))}")
    known = frozenset(e.id for e in artifact.journal)
    base = artifact.config
    contents: dict[str, Any] = {}
    owned: set[str] = set()
    used: set[str] = set()
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
            used=used,
        )
        contents[kind], edit_ids = model.books[kind].read(saved)
        owned |= edit_ids
    if owned != known:
        raise ArtifactError(f"{artifact.source}: {JOURNAL} and {CONFIG} name different edits")
    unnamed = [name for name in artifact.tensors if name not in used and not name.startswith(STATE)]
    if unnamed:
        raise ArtifactError(f"{artifact.source}: {CONFIG} does not say what the tensor {unnamed[0]!r} is")
    if "config_sha256" in base and base["config_sha256"] != config_digest(base):  # 0.1.0 has not written it
        raise ArtifactError(
            f"{artifact.source}: {CONFIG} was changed after it was written. If that was on purpose, take"
            " 'config_sha256' out of it"
        )
    return contents
