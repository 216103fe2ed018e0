"""Reading MEND archives of other implementations (the authors' repository, EasyEdit).

Their archives are pickles. They are read with ``weights_only=True``, which runs no code and refuses everything but
tensors and plain containers; nothing of the kind is ever written. What an archive does not say must be given: the
model, and the edited parameters in the order of its training settings (``inner_params``).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ArtifactError
from .mend import MENDConfig, MENDEditor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODES = {"mode_scale.weight": "scale", "mode_shift.weight": "shift"}
_NETS = {"mlp": 0, "mlp1": 0, "mlp2": 1}


def read_archive(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a MEND archive, by the names that they have there without the leading ``mend.`` or ``gtn.``.

    Raises:
        ArtifactError: if it is no such archive, or cannot be read without running code that it contains.
    """
    try:
        archive = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{str(path)!r} holds more than tensors, and reading that would run code from the file. Where you trust"
            " it, write its tensors anew:"
            " torch.save({k: v for k, v in archive['model'].items() if torch.is_tensor(v)}, …)"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise ArtifactError(f"{str(path)!r} cannot be read as an archive: {error}") from error
    tensors = archive.get("model", archive) if isinstance(archive, dict) else None
    if not isinstance(tensors, dict) or "edit_lrs" not in tensors:
        raise ArtifactError(f"{str(path)!r} is no MEND archive: it has no 'edit_lrs'")
    named = {str(k): v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    return {name.removeprefix("mend.").removeprefix("gtn."): value for name, value in named.items()}


def convert_mend(
    tensors: Mapping[str, torch.Tensor], model: PreTrainedModel, inner_params: Sequence[str]
) -> MENDEditor:
    """Build a `MENDEditor` from the tensors of an archive.

    The authors add their updates and we subtract ours, so the step sizes change sign. Components that hardly ever
    moved are divided all the same, as in the training that the archive comes from.

    Args:
        tensors: from `read_archive`.
        model: the base model.
        inner_params: names of the edited parameters, in the order of the archive's settings.

    Raises:
        ArtifactError: if the tensors do not fit these parameters, or belong to a variant that is not supported.
    """
    modules = [name.removesuffix(".weight") for name in inner_params]
    state, ranks, nets = renamed(tensors)
    if not ranks:
        raise ArtifactError(
            "the archive holds no low-rank residual networks; other variants of MEND are not supported"
        )
    config = MENDConfig(
        modules=modules,
        rank=max(ranks),
        num_blocks=1 + max(int(name.split(".")[4]) for name in state if name.endswith(".u")),
        shared=any(name.endswith(".scale") for name in state),
        combine=nets == {"mlp"},
        dead_std=0.0,
    )
    editor = MENDEditor.for_model(model, config)
    try:
        editor.load_state_dict(state)
    except RuntimeError as error:
        raise ArtifactError(f"the archive does not fit these parameters of the model: {error}") from error
    return editor.eval()


def renamed(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], set[int], set[str]]:
    """Tensors by our names, the ranks of the networks, and the archive's names of the networks."""
    state: dict[str, torch.Tensor] = {}
    norms: dict[str, dict[str, torch.Tensor]] = {}
    ranks: set[int] = set()
    nets: set[str] = set()
    for name, value in tensors.items():
        if name == "edit_lrs":
            state[name] = -value.float()
            continue
        key, _, leaf = name.partition(".")
        key = key.removesuffix("#weight").replace("#", "/").strip("()").replace(", ", "x")
        net, _, rest = leaf.partition(".layers.")
        if net in _NETS:
            nets.add(net)
            block, _, tensor = rest.partition(".")
            state[f"nets.{key}.nets.{_NETS[net]}.{block}.{_MODES.get(tensor, tensor)}"] = value.float()
            if tensor == "u":
                ranks.add(value.shape[1])
        elif leaf in ("u_mean", "v_mean", "u_s", "v_s", "k"):
            norms.setdefault(key, {})[leaf] = value
    for key, parts in norms.items():
        norm: dict[str, Any] = {
            "mean": torch.cat([parts["u_mean"], parts["v_mean"]]).float(),
            "spread": torch.cat([parts["u_s"], parts["v_s"]]).float(),
            "count": parts["k"].double().reshape(()),
        }
        state |= {f"nets.{key}.norm.{part}": value for part, value in norm.items()}
    return state, ranks, nets
