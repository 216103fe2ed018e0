"""Edits at sites as PEFT adapters: a saved GRACE, WISE, T-Patcher … folder loads with ``PeftModel.from_pretrained``.

Every kind of site memory is a PEFT type of its own (``KEDIT_GRACE`` …), registered from outside when `hf_kedit` is
imported. A tuner layer holds the memory's tensors as buffers and passes its input through; the memory itself is read
from them as from any saved edit, and acts through the same `Sites` as in an `EditableModel`. Adapters can be switched,
disabled and unloaded, not merged, and edits are made and undone with `EditableModel` only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import peft.mapping
import torch
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..artifact.site_adapter import ADAPTER_KINDS, peft_type
from ..books.book import Saved
from ..books.site_book import memory_kind
from ..books.sites import SiteCall, SiteFunction, Sites
from ..engine.weights import compute_device
from ..errors import MergeError


class KeditPeftType(StrEnum):
    """The PEFT types of this library; equal to the strings in ``adapter_config.json``."""

    GRACE = peft_type("grace")
    DEFER = peft_type("defer")
    MELO = peft_type("melo")
    WISE = peft_type("wise")
    TPATCH = peft_type("tpatch")
    CALINET = peft_type("calinet")


@dataclass
class SiteAdapterConfig(PeftConfig):
    """Content of ``adapter_config.json``.

    Args:
        target_modules: names of the wrapped modules.
        exclude_modules: none; PEFT asks for it.
        kind: of the memory.
        paths: the wrapped modules in the memory's order.
        state: what the memory's `describe` said.
        tensor_shapes: module → name of a tensor → shape; PEFT makes the layers before it loads their tensors.
        tensor_dtypes: name of a tensor → dtype, of those that hold no fractions.
    """

    target_modules: list[str] | None = None
    exclude_modules: list[str] | None = None
    kind: str = ""
    paths: list[str] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    tensor_shapes: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    tensor_dtypes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = KeditPeftType(peft_type(self.kind))


class SiteAdapter:
    """One adapter: its description, and the layers that hold its tensors.

    Args:
        model: the base model.
        config: of the adapter.
        name: of the adapter.
    """

    def __init__(self, model: nn.Module, config: SiteAdapterConfig, name: str):
        self.model, self.config, self.name = model, config, name
        self.layers: dict[str, SiteLayer] = {}
        self._versions: tuple[tuple[int, int], ...] = ()
        self._functions: dict[str, SiteFunction] = {}

    def function(self, path: str) -> SiteFunction:
        """What the memory does at a module; the memory is read again when the tensors have changed."""
        tensors = {
            f"{where}.{name}": getattr(layer, name)[self.name]
            for where, layer in self.layers.items()
            for name in self.config.tensor_shapes[where]
        }
        versions = tuple((t.data_ptr(), t._version) for t in tensors.values())
        if versions != self._versions:
            source = f"adapter {self.name!r}"
            saved = Saved(source, self.config.state, tensors, frozenset())
            memory = memory_kind(self.config.kind).read(self.model, self.config.paths, self.config.state, saved)
            self._functions, self._versions = memory.functions(), versions
        return self._functions[path]


class SiteLayer(nn.Module, BaseTunerLayer):
    """Stands in the place of a wrapped module and holds the tensors of its adapters.

    Args:
        base_layer: the module.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.adapters: dict[str, SiteAdapter] = {}

    def update_layer(self, adapter: SiteAdapter, path: str) -> None:
        """Make room for an adapter's tensors."""
        device = compute_device(self.base_layer)
        for name, shape in adapter.config.tensor_shapes[path].items():
            dtype = getattr(torch, adapter.config.tensor_dtypes.get(name, "float32"))
            if not hasattr(self, name):
                setattr(self, name, BufferDict(persistent=True))
                self.other_param_names = (*self.other_param_names, name)
            getattr(self, name)[adapter.name] = torch.zeros(shape, dtype=dtype, device=device)
        self.adapters[adapter.name] = adapter
        adapter.layers[path] = self

    def run(self, call: SiteCall) -> torch.Tensor | None:
        """The site function: that of the active adapters."""
        changed = None
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.adapters and name in getattr(self, self.other_param_names[0], {name: None}):
                new = self.adapters[name].function(call.path)(
                    call if changed is None else replace(call, output=changed)
                )
                changed = changed if new is None else new
        return changed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own output; what edits make of it is done by the hook around this layer."""
        return self.base_layer(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: what a prompt gets is decided at run time."""
        raise MergeError("edits that are decided at run time cannot be merged into weights; use unload()")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """They are no low-rank change either."""
        return False


class SiteTuner(BaseTuner):
    """Injects the layers and attaches them to the model's sites; one subclass per kind of memory."""

    tuner_layer_cls = SiteLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012 (as in PEFT)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Put the layers into the model, then let their site functions act."""
        config: Any = self.peft_config[adapter_name]
        self._adapter = SiteAdapter(model, config, adapter_name)
        done = super().inject_adapter(model, adapter_name, *args, **kwargs)
        sites = Sites.of(model)
        for path, layer in self._adapter.layers.items():
            sites.attach(f"adapters at {path}", {path: layer.run})
        return done

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SiteLayer):
            target.update_layer(self._adapter, current_key)
            return
        layer = SiteLayer(target)
        layer.update_layer(self._adapter, current_key)
        layer.set_adapter(self.active_adapters)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own takes the weight of the module; feed-forward modules have none.
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            raise MergeError("edits that are decided at run time cannot be merged into weights; use unload()")
        sites = Sites.of(self.model)
        for path, module in list(self.model.named_modules()):
            if isinstance(module, SiteLayer):
                sites.detach(f"adapters at {path}")
        return super()._unload_and_optionally_merge(False, *args, **kwargs)


def register() -> None:
    """Make the types known to PEFT; doing it again changes nothing."""
    kinds = dict(zip(KeditPeftType, ADAPTER_KINDS, strict=True))
    mappings: Sequence[tuple[dict[Any, Any], Mapping[str, Any]]] = [
        (peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, dict.fromkeys(kinds, SiteAdapterConfig)),
        (peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, {member: _tuner(kind) for member, kind in kinds.items()}),
        (peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING, {member: f"kedit_{kind}_" for member, kind in kinds.items()}),
    ]
    for known, values in mappings:
        for member, value in values.items():
            known.setdefault(member, value)


def _tuner(kind: str) -> type[SiteTuner]:
    return type(f"{kind.capitalize()}Tuner", (SiteTuner,), {"prefix": f"kedit_{kind}_"})
