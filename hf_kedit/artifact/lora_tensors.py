"""The edits of a ledger as a LoRA adapter in PEFT's own layout: its config and its tensors.

The scaling is always 1 (``lora_alpha = r``) and all modules have one rank, the shorter ones padded with zeros: exact,
and what hot swapping, linear combination and vLLM need. Nothing is written here; no model is instantiated.

What a change becomes (``U Vᵀ`` its factors, ``[d_out, d_in]``):

    factors of a Linear or Conv1D     lora_A = Vᵀ, lora_B = U; PEFT transposes for Conv1D itself
    its bias                          lora_B.bias (``lora_bias``)
    fused experts ``[E, ·, ·]``       target_parameters; lora_A rows expert-major, lora_B columns rank-major
    anything else, full-rank changes  the whole edited module (``modules_to_save``), unless a rank is asked for
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save as dump_tensors
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..books.deltas import Account, fold
from ..engine.experts import ExpertSlice, parameter_name
from ..engine.lowrank import Factors, factorise, shorten
from ..engine.weights import get_module, get_weight, is_quantised, is_transposed
from ..errors import ExportError, RollbackError
from .layout import ADAPTER_CONFIG, ADAPTER_PREFIX, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from ..editing.state import EditedModel

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LoraTarget = Literal["peft", "vllm"]


@dataclass
class Adapter:
    """What goes into an adapter, per module of the base model.

    Args:
        factors: changes of 2-D weights.
        biases: changes of biases of the same modules.
        experts: changes of fused experts: full parameter name → one pair of factors per expert.
        whole: edited modules that are stored whole: module → parameter → value, as the module stores it.
        needed: rank that each changed weight needs (before padding).
        losses: ‖Δ − BA‖ / ‖Δ‖ of every weight whose rank was cut.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    experts: dict[str, list[Factors]] = field(default_factory=dict)
    whole: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    needed: dict[str, int] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    rank: int = 1


def is_low_rank(model: EditedModel) -> bool:
    """Whether there are changes of weights, and all are factors of a Linear, a Conv1D or a fused expert."""
    accounts = model.ledger.accounts.values()
    return bool(accounts) and all(_is_matrix(model, a) and _in_factors(a) for a in accounts)


def build_adapter(
    model: EditedModel,
    *,
    target: LoraTarget = "peft",
    rank: int | None = None,
    modules: Iterable[str] = (),
) -> Adapter:
    """Collect the edits of a model as adapter tensors; see `hf_kedit.EditableModel.export_lora`.

    Raises:
        ExportError: if the edits cannot be expressed as asked.
    """
    if target not in ("peft", "vllm"):
        raise ExportError(f"target must be 'peft' or 'vllm', not {target!r}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ExportError(f"rank must be a whole number from 1 on, not {rank!r}")
    if target == "vllm" and rank is not None and rank not in VLLM_RANKS:
        raise ExportError(f"vLLM takes the ranks {', '.join(map(str, VLLM_RANKS))}, not {rank}")
    beside = beside_weights(model)
    if beside:
        raise ExportError(f"the edits {', '.join(beside)} are no changes of weights, so no LoRA can hold them")
    if not model.ledger.accounts:
        raise ExportError("the model carries no edits of weights; there is nothing to export")
    return _assemble(model, model.ledger.accounts.values(), target, rank, modules)


def whole_adapter(model: EditedModel) -> Adapter:
    """All edits of a model for which `is_low_rank` holds, exactly."""
    return _assemble(model, model.ledger.accounts.values())


def edit_adapter(model: EditedModel, edit_id: str) -> Adapter:
    """One edit of a model for which `is_low_rank` holds, exactly.

    Raises:
        ExportError: if it was computed together with others, as one change.
    """
    alone = (_alone(account, edit_id) for account in model.ledger.accounts.values())
    return _assemble(model, [account for account in alone if account.pieces])


def _assemble(
    model: EditedModel,
    accounts: Iterable[Account],
    target: LoraTarget = "peft",
    rank: int | None = None,
    modules: Iterable[str] = (),
) -> Adapter:
    adapter = Adapter()
    for account in accounts:
        _add(adapter, model, account, rank)
    for module in adapter.whole:  # such a module brings its edited bias and weight along
        adapter.biases.pop(module, None)
    if target == "vllm":
        check_factors_only(adapter, "vLLM")
    _choose_rank(adapter, target, rank)
    _cover(adapter, model, [*modules, *adapter.biases])
    return adapter


def _add(adapter: Adapter, model: EditedModel, account: Account, rank: int | None) -> None:
    """Sort one parameter's change into the adapter."""
    module, total = get_module(model.base_model, account.module), account.total
    assert total is not None
    if account.name == "bias" and _is_linear(module):
        adapter.biases[account.module] = total
    elif not _is_matrix(model, account) or (not _in_factors(account) and rank is None and _can_stand_whole(module)):
        _add_whole(adapter, model, account.module)
    else:
        factors = factors_of(account, rank)
        if isinstance(module, ExpertSlice):
            bank = adapter.experts.setdefault(parameter_name(account.module, "weight"), _no_change(module))
            bank[module.index] = factors
        else:
            adapter.factors[account.module] = factors
        key = f"{account.module}.{account.name}"
        adapter.needed[key] = factors.rank
        adapter.losses |= {key: factors.loss} if factors.loss else {}


def _alone(account: Account, edit_id: str) -> Account:
    """What one edit has changed of a parameter.

    Raises:
        ExportError: if it was computed together with others, as one change.
    """
    shared = [piece for piece in account.pieces if edit_id in piece.members]
    try:
        pieces = [own for p in shared if (own := p.without(set(p.members) - {edit_id})) is not None]
    except RollbackError as error:
        raise ExportError(f"the edit {edit_id} cannot be an adapter of its own: {error}") from error
    return replace(account, pieces=pieces, total=fold(pieces))


def _in_factors(account: Account) -> bool:
    return all(piece.delta.left is not None for piece in account.pieces)


def factors_of(account: Account, rank: int | None) -> Factors:
    """A weight's change as factors: its pieces side by side, shorter where columns can be spared, or of a rank."""
    if not _in_factors(account):
        assert account.total is not None
        return factorise(account.total, rank)
    left, right = (_side_by_side(getattr(p.delta, name) for p in account.pieces) for name in ("left", "right"))
    short = shorten(left, right, rank)
    # The columns themselves where none can be spared: then merging gives the edited bits.
    return short if short.rank < left.shape[1] else Factors(left, right)


def _no_change(expert: ExpertSlice) -> list[Factors]:
    """Empty factors for every expert of a bank."""
    count = getattr(expert.bank, expert.param).shape[0]
    d_out, d_in = get_weight(expert).shape
    return [Factors(torch.zeros(d_out, 0), torch.zeros(d_in, 0)) for _ in range(count)]


def _add_whole(adapter: Adapter, model: EditedModel, path: str) -> None:
    """Take over every parameter of a module as it is with its edits, in the orientation that it is stored in.

    Raises:
        ExportError: if the module is a bank of experts, which an adapter cannot replace.
    """
    module = get_module(model.base_model, path)
    if any(p.dim() > 2 for p in module.parameters(recurse=False)):
        raise ExportError(f"the change of {path} is no sum of changes of single experts; merge the edits instead")
    values = {}
    for name, _ in module.named_parameters(recurse=False):
        account = model.ledger.accounts.get(f"{path}.{name}")
        value = get_weight(module, name) if account is None else account.value(account.total)
        values[name] = value.T.contiguous() if value.dim() == 2 and is_transposed(module) else value
    adapter.whole[path] = values


def check_factors_only(adapter: Adapter, server: str) -> None:
    """Raise for what vLLM and llama.cpp refuse in an adapter: all but factors of single matrices.

    Raises:
        ExportError: naming the modules.
    """
    problems = []
    if adapter.whole:
        problems.append(f"full-rank changes (of {', '.join(adapter.whole)}); give a rank to approximate them")
    if adapter.biases:
        problems.append(f"changes of biases (of {', '.join(adapter.biases)}); edit without train_bias")
    if adapter.experts:
        problems.append(f"changes of fused experts ({', '.join(adapter.experts)}); merge the edits into the model")
    if problems:
        raise ExportError(f"{server} does not load adapters with {', nor with '.join(problems)}")


def _choose_rank(adapter: Adapter, target: LoraTarget, rank: int | None) -> None:
    """One rank for all modules: the one asked for, else the largest that is needed (vLLM: the next it allows)."""
    needed = max(adapter.needed.values(), default=1)
    if rank is None and target == "vllm":
        allowed = [r for r in VLLM_RANKS if r >= needed]
        if not allowed:
            raise ExportError(
                f"the edits need rank {needed}, vLLM takes at most {VLLM_RANKS[-1]}; give rank={VLLM_RANKS[-1]} to"
                " approximate them, or merge them into the model"
            )
        rank = allowed[0]
    adapter.rank = max(1, rank or needed)


def _cover(adapter: Adapter, model: EditedModel, modules: Iterable[str]) -> None:
    """Add modules without a change, as zeros: for hot swapping, lone biases, and because PEFT wants a target."""
    if not adapter.factors and not adapter.experts:
        spare = (n for n, m in model.base_model.named_modules() if _is_linear(m) and n not in adapter.whole)
        modules = [*modules] or [next(spare)]
    for path in modules:
        module = get_module(model.base_model, path)
        if not _is_linear(module) or path in adapter.whole:
            raise ExportError(f"{path} is not a matrix that LoRA can stand beside ({type(module).__name__})")
        if path not in adapter.factors:
            d_out, d_in = get_weight(module).shape
            adapter.factors[path] = Factors(torch.zeros(d_out, 1), torch.zeros(d_in, 1))


# ---------------------------------------------------------------------- files


def adapter_files(model: EditedModel, adapter: Adapter) -> dict[str, bytes]:
    """The two files of an adapter, byte for byte the same for the same edits."""
    tensors = {ADAPTER_PREFIX + name: value.contiguous() for name, value in _tensors(adapter).items()}
    return {
        ADAPTER_WEIGHTS: dump_tensors(tensors, metadata={"format": "pt"}),
        ADAPTER_CONFIG: (json.dumps(_config(model, adapter), indent=2, sort_keys=True) + "\n").encode("utf-8"),
    }


def _tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path, factors in adapter.factors.items():
        full = factors.padded(adapter.rank)
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = full.right.T, full.left
        if adapter.biases:
            zero = torch.zeros(full.left.shape[0])
            tensors[f"{path}.lora_B.bias"] = adapter.biases.get(path, zero)
    for key, slices in adapter.experts.items():
        path = key.rpartition(".")[0]
        padded = [s.padded(adapter.rank) for s in slices]
        tensors[f"{path}.lora_A.weight"] = torch.cat([s.right.T for s in padded])  # row e·r + k
        stacked = torch.stack([s.left for s in padded], dim=2)  # [d_out, r, E]: column k·E + e
        tensors[f"{path}.lora_B.weight"] = stacked.flatten(1)
    for path, values in adapter.whole.items():
        tensors |= {f"{path}.{name}": value for name, value in values.items()}
    return tensors


def _config(model: EditedModel, adapter: Adapter) -> dict[str, Any]:
    """Content of ``adapter_config.json``; what is left out has PEFT's defaults. Lists are sorted, for equal bytes."""
    base = model.base_model
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if model.anatomy.is_encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": model.base_model_id or None,
        "revision": model.base_model_revision,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": bool(adapter.biases),
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(isinstance(get_module(base, path), Conv1D) for path in adapter.factors),
        "target_modules": sorted(adapter.factors),
        "target_parameters": sorted(adapter.experts) or None,
        "modules_to_save": sorted(adapter.whole) or None,
    }


def beside_weights(model: EditedModel) -> list[str]:
    """Ids of the edits that are kept in other books than the weights'."""
    return [i for kind, book in model.books.items() if kind != "weights" for i in book.edit_ids]


def _side_by_side(parts: Iterable[torch.Tensor | None]) -> torch.Tensor:
    return torch.cat([p.to("cpu") for p in parts if p is not None], dim=1)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _can_stand_whole(module: nn.Module) -> bool:
    """Whether a full-rank change may take the place of the module; beside a quantised one it becomes factors."""
    return _is_linear(module) and not is_quantised(module)


def _is_matrix(model: EditedModel, account: Account) -> bool:
    module = get_module(model.base_model, account.module)
    return account.name == "weight" and (_is_linear(module) or isinstance(module, ExpertSlice))
