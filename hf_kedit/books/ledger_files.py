"""The ledger's part of a saved edit: the deltas of every parameter as tensors and their description.

<parameter>.delta_U, .delta_V   factor columns of all pieces side by side
<parameter>.delta.<number>      a dense piece
<parameter>.keys.<number>       keys that came with a piece
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..engine.experts import ExpertSlice, parameter_name
from ..engine.weights import get_module, is_transposed, quantisation, tensor_digest
from ..errors import ArtifactError, BaseModelMismatchError, KeditError
from .deltas import Account, Piece, WeightDelta, fold

if TYPE_CHECKING:
    from torch import nn

    from .book import Saved


# ---------------------------------------------------------------------- writing


def tensors_of(accounts: Mapping[str, Account]) -> dict[str, torch.Tensor]:
    """All deltas and keys by name, fp32 on the CPU."""
    tensors: dict[str, torch.Tensor] = {}
    for key, account in accounts.items():
        lefts: list[torch.Tensor] = []
        rights: list[torch.Tensor] = []
        for number, piece in enumerate(account.pieces):
            delta = piece.delta
            if delta.left is not None and delta.right is not None:
                lefts.append(delta.left.cpu())
                rights.append(delta.right.cpu())
            elif delta.dense is not None:
                tensors[_dense_name(key, number)] = delta.dense.cpu().contiguous()
            if delta.keys is not None:
                tensors[_keys_name(key, number)] = delta.keys.cpu().contiguous()
        if lefts:
            tensors[f"{key}.delta_U"] = torch.cat(lefts, dim=1).contiguous()
            tensors[f"{key}.delta_V"] = torch.cat(rights, dim=1).contiguous()
    return tensors


def describe_accounts(model: nn.Module, accounts: Mapping[str, Account]) -> dict[str, Any]:
    """What the tensors mean, by parameter; JSON-ready."""
    described: dict[str, Any] = {}
    for key, account in accounts.items():
        pieces: list[dict[str, Any]] = []
        column = 0
        for number, piece in enumerate(account.pieces):
            entry: dict[str, Any] = {"batch_id": piece.batch_id, "edits": list(piece.members)}
            delta = piece.delta
            if delta.left is not None:
                width = delta.left.shape[1]
                entry |= {"storage": "factors", "start": column, "stop": column + width}
                entry["columns"] = None if piece.columns is None else list(piece.columns)
                column += width
            else:
                entry |= {"storage": "dense", "tensor": _dense_name(key, number)}
            if delta.keys is not None:
                entry["keys"] = _keys_name(key, number)
            if delta.builds_on:
                entry["builds_on"] = True
            pieces.append(entry)
        described[key] = {
            "module": account.module,
            "param": account.name,
            "type": _type(get_module(model, account.module)),
            "shape": list(account.original.shape),
            "dtype": str(account.original.dtype).removeprefix("torch."),
            "rank": column,
            "base_sha256": tensor_digest([("", account.original)]),
            "quantised": quantisation(get_module(model, account.module), account.name),
            "pieces": pieces,
        }
    return described


def _type(owner: nn.Module) -> str:
    """How the owner keeps its weight; what is saved is in functional orientation in any case."""
    if isinstance(owner, ExpertSlice):
        return "expert"
    return "conv1d" if is_transposed(owner) else "linear"


def _dense_name(key: str, number: int) -> str:
    return f"{key}.delta.{number}"


def _keys_name(key: str, number: int) -> str:
    return f"{key}.keys.{number}"


# ---------------------------------------------------------------------- reading


def read_accounts(
    model: nn.Module, saved: Saved, original_of: Callable[[str, str], torch.Tensor]
) -> dict[str, Account]:
    """Rebuild the accounts, checking every name, shape and fingerprint; the model is not touched.

    Args:
        model: that the edits are for.
        saved: the ledger's part of the saved edit.
        original_of: module, parameter → its unedited value.

    Raises:
        ArtifactError: if something is missing or does not fit.
        BaseModelMismatchError: if the base model is another one.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    accounts: dict[str, Account] = {}
    for key, entry in saved.description.items():
        where = f"{saved.source}: edit_config.json, module {key!r}"
        if not isinstance(entry, dict) or not isinstance(entry.get("pieces"), list):
            raise ArtifactError(f"{where}: no valid description")
        module, name = str(entry.get("module")), str(entry.get("param"))
        if f"{module}.{name}" != key or parameter_name(module, name) not in parameters:
            raise BaseModelMismatchError(
                f"{where}: {type(model).__name__} has no such parameter; the edits were made on {saved.made_on}"
            )
        original = original_of(module, name).cpu()
        if list(original.shape) != entry.get("shape"):
            raise BaseModelMismatchError(
                f"{where}: the base model's weight is {tuple(original.shape)}, the edits were made on"
                f" {tuple(entry.get('shape') or ())}"
            )
        if not saved.ignore_fingerprint and tensor_digest([("", original)]) != entry.get("base_sha256"):
            raise BaseModelMismatchError(
                f"{where}: the base model's weight is not the one that the edits were made on (other revision, dtype,"
                f" or an already edited model). They were made on {saved.made_on}, dtype {entry.get('dtype')}."
                f"{_other_form(entry.get('quantised'), quantisation(get_module(model, module), name))}"
                " ignore_fingerprint=True applies them anyway."
            )
        shape = tuple(original.shape)
        try:
            factors = _factors(saved, key, entry["pieces"], shape)
            pieces = [_piece(saved, where, module, name, piece, shape, factors) for piece in entry["pieces"]]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, KeditError):
                raise
            raise ArtifactError(f"{where}: damaged description of a piece ({error!r})") from error
        account = Account(module, name, original, pieces, fold(pieces))
        # Finite factors may have a product, or a sum with the weight, that is not finite or that no norm survives.
        if not pieces or not bool(torch.isfinite(account.value(account.total).float().square().sum())):
            raise ArtifactError(f"{where}: the changed weight holds NaN, infinity, or numbers close to it")
        accounts[key] = account
    return accounts


def _other_form(then: Any, now: str | None) -> str:
    """What to know where edits of a quantised weight meet an unquantised one, or another quantisation."""
    if then == now:
        return ""
    return (
        f" There it was {f'quantised ({then})' if then else 'not quantised'}, here it is"
        f" {f'quantised ({now})' if now else 'not'}: the same edits are right for it as far as the quantisation is."
    )


def _factors(saved: Saved, key: str, pieces: Sequence[Any], shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """The factor columns of all pieces of a parameter, side by side; none if no piece has any."""
    unknown = {str(p["storage"]) for p in pieces} - {"factors", "dense"}
    if unknown:
        raise ArtifactError(f"{saved.source}: {key}: unknown storage {min(unknown)!r}")
    dense = [p["tensor"] for p in pieces if p["storage"] == "dense"]
    if len(set(dense)) < len(dense):
        raise ArtifactError(f"{saved.source}: {key}: two pieces are one tensor")
    spans = [(p["start"], p["stop"]) for p in pieces if p["storage"] == "factors"]
    if not spans:
        return ()
    left = saved.tensor(f"{key}.delta_U", (shape[0], None))
    right = saved.tensor(f"{key}.delta_V", (shape[-1], left.shape[1]))
    ends = [0, *(stop for _, stop in spans)]
    if len(shape) != 2 or ends != [*(start for start, _ in spans), left.shape[1]] or ends != sorted(ends):
        raise ArtifactError(f"{saved.source}: {key}: {left.shape[1]} columns do not fit the pieces {spans}")
    return left, right


def _piece(
    saved: Saved,
    where: str,
    module: str,
    name: str,
    entry: Any,
    shape: tuple[int, ...],
    factors: Sequence[torch.Tensor],
) -> Piece:
    batch_id, members, columns = entry["batch_id"], tuple(entry["edits"]), None
    if not isinstance(batch_id, str):
        raise TypeError("batch_id must be a string")
    if not members or not set(members) <= saved.edit_ids:
        raise ArtifactError(f"{where}: a piece belongs to an edit that is not in edits.jsonl")
    if entry["storage"] == "factors":
        left, right = (side[:, entry["start"] : entry["stop"]].clone() for side in factors)
        columns = None if entry["columns"] is None else tuple(entry["columns"])
        if columns is not None and (len(columns) != left.shape[1] or set(columns) != set(members)):
            raise ArtifactError(f"{where}: the columns are not those of its edits")
        delta = WeightDelta(module, name, left=left, right=right)
    else:
        delta = WeightDelta(module, name, dense=saved.tensor(entry["tensor"], shape))
    delta.builds_on = entry.get("builds_on") is True
    if entry.get("keys") is not None:
        delta.keys = saved.tensor(entry["keys"], (shape[-1], None if columns is None else len(columns)))
    return Piece(batch_id, delta, members, columns)
