"""`EditableModel.import_lora`: a plain LoRA adapter, from a folder or the Hub, as weight deltas for the ledger.

Read are ``adapter_config.json`` and ``adapter_model.safetensors``, by their content alone (PEFT is not needed), and
``edits.jsonl`` where the adapter came from `export_lora`. Nothing is unpickled.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from ..anatomy.switching import uninterrupted
from ..books.deltas import WeightDelta
from ..books.ledger import Ledger
from ..editing.state import EditedModel
from ..engine.access import alone
from ..engine.experts import ExpertSlice
from ..engine.weights import get_module, is_transposed
from ..errors import ArtifactError, BaseModelMismatchError, KeditError, LayerError, RequestError
from ..journal import Edit, EditResult, Journal, new_id, now
from ..requests import EditRequest, RequestSource, load_requests
from ..storage.files import read_file
from ..storage.parsing import parse_json
from .layout import ADAPTER_CONFIG, ADAPTER_PREFIX, ADAPTER_WEIGHTS, JOURNAL

IMPORTED = "lora-import"
"""What the journal names as the method of edits that came in as an adapter."""
# What makes an adapter something else than a fixed change of weights, or a change relative to another base.
_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "trainable_token_indices",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
_CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_PART = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])\.(?:default\.)?(?P<kind>weight|bias)$")


def import_lora(
    model: EditedModel,
    adapter: str,
    requests: RequestSource | None = None,
    *,
    subfolder: str = "",
    revision: str | None = None,
    token: Any = None,
) -> EditResult:
    """Put an adapter on the weights of a model; see `EditableModel.import_lora`."""
    started = time.perf_counter()

    def fetch(file: str) -> bytes | None:
        return read_file(adapter, f"{subfolder}/{file}" if subfolder else file, revision=revision, token=token)

    config, tensors = _read_config(adapter, fetch), _read_tensors(adapter, fetch)
    known = requests if requests is not None else requests_of_adapter(adapter, fetch)
    if not known:
        raise RequestError(f"{adapter} does not say what it changes; give requests=[EditRequest(...)]")
    wanted = load_requests(known)
    name = Path(adapter).name if os.path.exists(adapter) else adapter  # the journal travels: no path of this machine
    with alone(model.base_model, edited=True):  # nobody waited while files came from the Hub
        deltas = read_lora(adapter, config, tensors, model.ledger)
        todo = model.journal.with_ids(wanted)
        batch_id, created = new_id("batch"), now()
        edits = [Edit(str(r.id), r, IMPORTED, batch_id, created, {"adapter": name}) for r in todo]
        with uninterrupted():
            model.ledger.apply(batch_id, deltas, [e.id for e in edits])
            model.journal.add(edits)
    return EditResult(edits, seconds=time.perf_counter() - started)


def read_lora(
    source: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], ledger: Ledger
) -> list[WeightDelta]:
    """Read an adapter as the changes that it makes to the unedited model.

    Args:
        source: folder or repository, for messages.
        config: content of ``adapter_config.json``.
        tensors: content of ``adapter_model.safetensors``.
        ledger: of the model that the adapter is for.

    Raises:
        ArtifactError: if they are damaged, or the adapter is more than a fixed change of weights.
        BaseModelMismatchError: if the model has no such module or parameter.
    """
    try:
        return _read_deltas(source, config, tensors, ledger)
    except KeditError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, re.error, ArithmeticError, AttributeError) as error:
        raise ArtifactError(f"{source}: {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} are damaged ({error!r})") from error


def _read_tensors(source: str, fetch: Callable[[str], bytes | None]) -> dict[str, torch.Tensor]:
    data = fetch(ADAPTER_WEIGHTS)
    if data is None:
        raise ArtifactError(f"{source}: {ADAPTER_WEIGHTS} is missing (adapters in pickle files are not read)")
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise ArtifactError(f"{source}: {ADAPTER_WEIGHTS} is damaged: {error}") from error


def _read_deltas(
    source: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], ledger: Ledger
) -> list[WeightDelta]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    deltas = []
    for name, tensor in tensors.items():
        path = name.removeprefix(ADAPTER_PREFIX).replace(".base_layer.", ".")
        part = _PART.match(path)
        if part:
            pairs.setdefault(part["module"], {})[part["factor"] + part["kind"]] = tensor.float()
        elif ".lora_" in path:
            raise ArtifactError(f"{source}: {path} is no factor of a matrix (LoRA on embeddings is not read)")
        else:
            deltas.append(_whole(source, path, tensor, ledger))
    for module, parts in pairs.items():
        deltas += _factors(source, config, module, parts, ledger)
    if not deltas:
        raise ArtifactError(f"{source}: {ADAPTER_WEIGHTS} holds no change of a weight")
    return deltas


def requests_of_adapter(source: str, fetch: Callable[[str], bytes | None]) -> list[EditRequest]:
    """The requests that an exported adapter was made of; empty for an adapter from elsewhere."""
    data = fetch(JOURNAL)
    if data is None:
        return []
    try:
        return [edit.request for edit in Journal.from_jsonl(data.decode("utf-8"))]
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{source}: {JOURNAL} is damaged: {error}") from error


def _read_config(source: str, fetch: Callable[[str], bytes | None]) -> dict[str, Any]:
    data = fetch(ADAPTER_CONFIG)
    if data is None:
        raise ArtifactError(f"{source}: {ADAPTER_CONFIG} is missing; this is no PEFT adapter")
    config = parse_json(data, f"{source}: {ADAPTER_CONFIG}", ArtifactError)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ArtifactError(f"{source}: only LoRA adapters can become edits of weights, this is {kind or 'none'}")
    used = [name for name in _VARIANTS if config.get(name)]
    start = str(config.get("init_lora_weights") or "").lower()
    if start.startswith(_CHANGES_THE_BASE):
        used.append(f"init_lora_weights={start!r}, which changes the base model")
    if used:
        raise ArtifactError(
            f"{source}: the adapter uses {', '.join(used)}, which is more than adding a product of two matrices."
            " Merge it with PEFT and edit the merged model."
        )
    return config


def _factors(
    source: str, config: dict[str, Any], module: str, parts: dict[str, torch.Tensor], ledger: Ledger
) -> list[WeightDelta]:
    """The change of one module's matrix (and bias)."""
    if not {"Aweight", "Bweight"} <= set(parts):
        raise ArtifactError(f"{source}: {module} has only one of its two factors")
    _module(source, module, ledger)
    a, b = parts["Aweight"], parts["Bweight"]
    if a.dim() != 2 or b.dim() != 2:
        raise ArtifactError(f"{source}: {ADAPTER_WEIGHTS} is damaged: the factors of {module} are no matrices")
    if a.shape[0] != b.shape[1]:
        raise ArtifactError(
            f"{source}: {ADAPTER_WEIGHTS} is damaged: the factors of {module} have {a.shape[0]} and {b.shape[1]} ranks"
        )
    scaling = _scaling(config, module)
    name = _bank_parameter(config, module)
    if name is not None:
        count = _original(source, module, name, ledger).shape[0]
        if name != ExpertSlice.param or a.shape[0] % count:
            raise ArtifactError(f"{source}: of fused experts only {ExpertSlice.param} can be edited, not {name}")
        lora_a = a.reshape(count, -1, a.shape[1])  # [E, r, d_in]
        lora_b = b.reshape(b.shape[0], -1, count)  # [d_out, r, E]
        slices = (
            WeightDelta(f"{module}.{name}[{e}]", left=scaling * lora_b[..., e], right=lora_a[e].T)
            for e in range(count)
            if lora_a[e].any() and lora_b[..., e].any()
        )
        return [_fitting(source, delta, ledger) for delta in slices]
    deltas = [WeightDelta(module, left=scaling * b, right=a.T)]
    if "Bbias" in parts:
        deltas.append(WeightDelta(module, "bias", dense=scaling * parts["Bbias"]))
    return [_fitting(source, delta, ledger) for delta in deltas]


def _bank_parameter(config: dict[str, Any], module: str) -> str | None:
    """Name of the 3-D parameter that the factors of a module belong to; ``target_parameters`` may be suffixes."""
    for target in config.get("target_parameters") or ():
        owner, _, name = target.rpartition(".")
        if f".{module}".endswith(f".{owner}"):
            return str(name)
    return None


def _scaling(config: dict[str, Any], module: str) -> float:
    """``alpha / r`` (``alpha / √r`` for rsLoRA), with the patterns by which modules may differ."""

    def value(name: str, default: Any) -> float:
        patterns = config.get(name) or {}
        return float(next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default))

    rank, alpha = value("rank_pattern", config.get("r", 8)), value("alpha_pattern", config.get("lora_alpha", 8))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _whole(source: str, path: str, value: torch.Tensor, ledger: Ledger) -> WeightDelta:
    """The change towards a parameter that is stored whole (``modules_to_save``, trained biases)."""
    module, _, name = path.rpartition(".")
    owner = _module(source, module, ledger)
    original = _original(source, module, name, ledger)
    if value.dim() == 2 and is_transposed(owner):
        value = value.T
    if value.shape != original.shape:
        raise BaseModelMismatchError(
            f"{source}: {path} is {tuple(value.shape)}, the model's is {tuple(original.shape)}"
        )
    return WeightDelta(module, name, dense=value.float() - original.float())


def _fitting(source: str, delta: WeightDelta, ledger: Ledger) -> WeightDelta:
    shape = tuple(_original(source, delta.module, delta.name, ledger).shape)
    if delta.shape != shape:
        raise BaseModelMismatchError(f"{source}: the change of {delta.key} is {delta.shape}, the weight {shape}")
    return delta


def _module(source: str, module: str, ledger: Ledger) -> torch.nn.Module:
    try:
        return get_module(ledger.model, module)
    except LayerError as error:
        raise BaseModelMismatchError(f"{source}: the adapter is for another model: {error}") from error


def _original(source: str, module: str, name: str, ledger: Ledger) -> torch.Tensor:
    if not isinstance(getattr(_module(source, module, ledger), name, None), torch.Tensor):
        raise BaseModelMismatchError(f"{source}: the model's {module} has no parameter {name!r}")
    return ledger.original(module, name)
