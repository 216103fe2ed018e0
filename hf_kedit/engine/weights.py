"""The only door to a weight: reading and writing it wherever it lives and however it is laid out.

`get_weight` and `set_weight` speak the *functional* orientation ``[d_out, d_in]`` (the module computes ``W k``),
whether the module stores it so (``nn.Linear``) or transposed (``Conv1D``). Offloaded weights are read from and
written to accelerate's weights map; sharded ones are gathered and redistributed; quantised ones can be read but
never written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..anatomy.switching import Switch
from ..errors import LayerError, WeightError, nearest
from .experts import ExpertSlice, expert_slice
from .quantised import dequantise, scheme


def get_module(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule of this name, or the `ExpertSlice` of a name such as ``….experts.down_proj[3]``.

    Raises:
        LayerError: naming the nearest existing module.
    """
    expert = expert_slice(model, path)
    if expert is not None:
        return expert
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in model.named_modules()]
        raise LayerError(f"the model has no module {path!r}.{nearest(path, names)}") from None


def compute_device(module: nn.Module) -> torch.device:
    """Device on which a module computes: where its parameters are or, if they are offloaded, are brought to.

    The CPU for a module without parameters, and for one whose parameters have no values.
    """
    owner = module.bank if isinstance(module, ExpertSlice) else module
    for parameter in owner.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    for part in owner.modules():
        for hook in _accelerate_hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return torch.device("cpu")


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its matrix as ``[d_in, d_out]``; decided by its type, never by its shape."""
    inner = getattr(module, "get_base_layer", None)  # of a layer that PEFT has put around it
    module = inner() if callable(inner) else module
    return module.transposed if isinstance(module, ExpertSlice) else isinstance(module, Conv1D)


def is_quantised(module: nn.Module, name: str = "weight") -> bool:
    """Whether the parameter is stored in a form that cannot take an exact update."""
    return quantisation(module, name) is not None


def quantisation(module: nn.Module, name: str = "weight") -> str | None:
    """With what a parameter is quantised (``"bitsandbytes nf4"``); ``None``: not at all."""
    if isinstance(module, ExpertSlice):
        return scheme(module.bank, module.param)
    return scheme(module, name)


def get_weight(module: nn.Module, name: str = "weight") -> torch.Tensor:
    """Return a detached copy of a parameter in functional orientation, in the dtype it is stored in.

    Args:
        module: owner of the parameter.
        name: ``"weight"`` (``[d_out, d_in]``) or another parameter of the module, returned as it is.

    Raises:
        WeightError: if there is no such parameter.
    """
    value = stored_weight(module, name)
    return value.t().contiguous() if value.dim() == 2 and is_transposed(module) else value.clone()


def weight_shape(module: nn.Module, name: str = "weight") -> tuple[int, ...]:
    """Shape of what `get_weight` returns, without reading it where it is not packed.

    Raises:
        WeightError: if there is no such parameter.
    """
    value = getattr(module, name, None)
    if not isinstance(value, torch.Tensor) or is_quantised(module, name):
        value = stored_weight(module, name)
    shape = tuple(value.shape)
    return shape[::-1] if len(shape) == 2 and is_transposed(module) else shape


def set_weight(module: nn.Module, value: torch.Tensor, name: str = "weight") -> None:
    """Write a parameter given in functional orientation; dtype and device are those of the stored one.

    The write is in place, so that tied modules, optimisers and compiled graphs see it.

    Raises:
        WeightError: if the parameter is missing, quantised, or of another shape.
    """
    if is_quantised(module, name):
        raise WeightError(
            f"the {name} of {type(module).__name__} is quantised ({scheme(module, name)}): an edit written into it"
            " would be rounded away. EditableModel runs edits beside such a weight; to change weights, load the base"
            " model without quantisation."
        )
    if value.dim() == 2 and is_transposed(module):
        value = value.t()
    if isinstance(module, ExpertSlice):
        _write_slice(module, value)
        return
    with torch.no_grad():
        offloaded = _offload_map(module)
        parameter = getattr(module, name, None)
        if parameter is None:
            raise WeightError(f"{type(module).__name__} has no parameter {name!r}")
        if tuple(parameter.shape) != tuple(value.shape):
            raise WeightError(f"cannot write {tuple(value.shape)} into {name} of shape {tuple(parameter.shape)}")
        if offloaded is not None and parameter.device.type == "meta":
            _write_offloaded(offloaded, name, value)
        elif hasattr(parameter, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            full = value.to(parameter.dtype)
            parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))
        else:
            parameter.copy_(value.to(device=parameter.device, dtype=parameter.dtype))


def _write_slice(module: ExpertSlice, value: torch.Tensor) -> None:
    """Write one expert: in place where its bank is in memory, else by writing the whole parameter."""
    whole = getattr(module.bank, module.param)
    if tuple(whole.shape[1:]) != tuple(value.shape):
        raise WeightError(f"cannot write {tuple(value.shape)} into an expert of shape {tuple(whole.shape[1:])}")
    if whole.device.type != "meta" and not hasattr(whole, "device_mesh"):
        with torch.no_grad():
            module.weight.copy_(value.to(device=whole.device, dtype=whole.dtype))
        return
    changed = stored_weight(module.bank, module.param).clone()
    changed[module.index] = value.to(changed)
    set_weight(module.bank, changed, module.param)


def stored_weight(module: nn.Module, name: str = "weight") -> torch.Tensor:
    """Return a parameter in the layout in which it is stored, where possible itself: to look at, never to change.

    Raises:
        WeightError: if there is no such parameter, or it has no values.
    """
    if isinstance(module, ExpertSlice):
        return stored_weight(module.bank, module.param)[module.index]
    parameter = getattr(module, name, None)
    if not isinstance(parameter, torch.Tensor):
        raise WeightError(f"{type(module).__name__} has no parameter {name!r}")
    if parameter.device.type == "meta":
        offloaded = _offload_map(module)
        if offloaded is None:
            raise WeightError(f"the {name} of {type(module).__name__} is on the meta device: it has no values")
        return torch.as_tensor(offloaded[name]).detach()
    if is_quantised(module, name):
        return dequantise(module, name)
    if hasattr(parameter, "full_tensor"):
        return torch.as_tensor(parameter.full_tensor()).detach()
    return parameter.detach()


def is_offloaded(module: nn.Module, name: str = "weight") -> bool:
    """Whether the parameter is kept by accelerate on the CPU or on disk, and its module holds a stand-in only."""
    if isinstance(module, ExpertSlice):
        return is_offloaded(module.bank, module.param)
    return getattr(getattr(module, name, None), "device", None) == torch.device("meta")


def _accelerate_hooks(module: nn.Module) -> list[Any]:
    """What accelerate has hung on a module: nothing, one hook, or several behind one another."""
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook])) if hook is not None else []


def _offload_map(module: nn.Module) -> Any | None:
    maps = (getattr(hook, "weights_map", None) for hook in _accelerate_hooks(module))
    return next((found for found in maps if found is not None), None)


def _write_offloaded(weights_map: Any, name: str, value: torch.Tensor) -> None:
    """Put a new tensor into accelerate's map, whether it is a dict (CPU) or a loader over files (disk)."""
    store, key = weights_map.dataset, weights_map.prefix + name
    value = value.detach().to("cpu").contiguous()
    if isinstance(store, dict):
        store[key] = value.to(store[key].dtype)
        return
    value = value.to(torch.as_tensor(store[key]).dtype)
    if store.state_dict is None:
        store.state_dict = {}
    store.state_dict[key] = value  # the loader prefers this dict to its files
    if key not in store.all_keys:
        store.all_keys.append(key)


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Parameters that are one tensor under several names: name → the other names."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: [n for n in names if n != name] for names in groups.values() if len(names) > 1 for name in names}


def untie_head(model: Any) -> bool:
    """Give a head that shares its weight with the input embeddings a copy of its own, so that it can be edited alone.

    `EditableModel` does it for ``untie=True``; by hand, it is to be done before the model is wrapped. The outputs do
    not change; the model is saved with both weights, and its saved edits are put on an untied base when loaded.

    Returns:
        Whether there was something to untie.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or getattr(head, "weight", None) is not embeddings.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
        config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return True


class head_kept(Switch[None]):
    """A block after whose failure the head is what it was before, whatever `untie_head` did inside."""

    def __init__(self, model: Any):
        self._model = model

    def change(self) -> None:
        """Remember the head and what the configs say of it."""
        model = self._model
        self._head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self._weight, self._keys = getattr(self._head, "weight", None), getattr(model, "all_tied_weights_keys", None)
        configs = {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values()
        self._tied = [(config, getattr(config, "tie_word_embeddings", None)) for config in configs]

    def put_back(self, failed: bool) -> None:
        """After a failure, give all of it back."""
        if failed and self._head is not None and getattr(self._head, "weight", None) is not self._weight:
            self._head.weight = self._weight
            self._model.all_tied_weights_keys = self._keys
            for config, value in self._tied:
                config.tie_word_embeddings = value


def tensor_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors; equal on every machine."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().to("cpu").contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def parameters_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of a model with its values, read where it lives (memory, accelerate's offload map, shards)."""
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if parameter.device.type == "meta":
            yield name, get_weight(get_module(model, owner), leaf)
        elif hasattr(parameter, "full_tensor"):
            yield name, parameter.full_tensor().detach()
        elif is_quantised(get_module(model, owner), leaf):
            yield name, dequantise(get_module(model, owner), leaf)
        else:
            yield name, parameter.detach()


def model_digest(model: nn.Module) -> str:
    """SHA-256 over every parameter of a model."""
    return tensor_digest(parameters_of(model))


def model_fingerprint(model: nn.Module, instead: Mapping[str, torch.Tensor] = MappingProxyType({})) -> str:
    """A short hash that changes when a weight matrix is trained or replaced.

    Every parameter contributes its name, shape, dtype and 1,024 evenly spaced elements, so that a model of
    billions of parameters takes a moment. Full hashes of the edited tensors are stored with saved edits.

    Args:
        model: any model.
        instead: values to take for some parameters, by name, laid out as they are stored.
    """
    digest = hashlib.sha256()
    for (name, value), parameter in zip(parameters_of(model), model.parameters(), strict=True):
        flat = instead.get(name, value).reshape(-1)
        step = max(flat.numel() // 1024, 1)
        digest.update(f"{name}|{tuple(parameter.shape)}|{parameter.dtype}|".encode())
        digest.update(flat[::step][:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:24]
