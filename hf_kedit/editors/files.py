"""A trained editor as a folder, and back.

    edit_config.json     method and hyperparameters, the edited modules, the base model with hashes of its weights
    editor.safetensors   networks, step sizes and statistics, fp32 (fp16 if the editor was halved)
    README.md            the model card

Nothing is unpickled. The editor's classes are not known here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import nn

from .. import embedded
from ..config import CONFIG_NAME
from ..errors import ArtifactError
from ..storage.display import markdown_code, markdown_text, python_text
from ..storage.files import FileSource
from ..storage.parsing import parse_json
from ..version import __version__

_FORMAT_VERSION = 1
EDITOR_WEIGHTS, _CARD = "editor.safetensors", "README.md"


@dataclass(frozen=True)
class SavedEditor:
    """What the files of an editor hold.

    Args:
        source: where it came from, for messages.
        hparams: of the editor.
        modules: module name → ``(d_in, d_out)``, in order.
        encoder_decoder: whether the base model is one.
        origin: the base model that it was trained on (``base_…``), and what training was like (``trained_…``).
        tensors: its parameters and buffers.
        files: the folder or repository.
        sha256: of ``editor.safetensors``.
    """

    source: str
    hparams: dict[str, Any]
    modules: dict[str, tuple[int, int]]
    encoder_decoder: bool
    origin: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    files: FileSource
    sha256: str

    @property
    def method(self) -> str:
        """``edit_type`` of the editor."""
        return str(self.hparams.get("edit_type"))

    def fill(self, editor: nn.Module) -> None:
        """Put the tensors into a network.

        Raises:
            ArtifactError: if names, shapes or numbers do not fit.
        """
        try:
            editor.load_state_dict(self.tensors)
        except RuntimeError as error:
            raise ArtifactError(f"{self.source}: {EDITOR_WEIGHTS} does not fit {CONFIG_NAME}: {error}") from error
        bad = [name for name, value in self.tensors.items() if not bool(torch.isfinite(value).all())]
        if bad:
            raise ArtifactError(f"{self.source}: {', '.join(bad)} hold NaN or infinity")


def pack_editor(
    hparams: dict[str, Any],
    modules: dict[str, list[int]],
    encoder_decoder: bool,
    origin: dict[str, Any],
    tensors: dict[str, torch.Tensor],
) -> dict[str, bytes]:
    """The files of an editor by name; arguments as in `SavedEditor`."""
    weights = dump_tensors({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"format": "pt"})
    config = {
        "format_version": _FORMAT_VERSION,
        "kedit_version": __version__,
        "artifact": "hypernetwork",
        "method": hparams["edit_type"],
        "hparams": hparams,
        "modules": modules,
        "encoder_decoder": encoder_decoder,
        **origin,
        "files": {EDITOR_WEIGHTS: hashlib.sha256(weights).hexdigest()},
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return {EDITOR_WEIGHTS: weights, _CARD: _card(config).encode("utf-8"), CONFIG_NAME: text.encode("utf-8")}


def read_editor(source: str, *, revision: str | None = None, token: str | None = None) -> SavedEditor:
    """Read the files of an editor.

    Args:
        source: folder, Hub id, or name of a packaged editor.
        revision: of a Hub repository.
        token: for the Hub.

    Raises:
        ArtifactError: if there is no editor, or it is damaged.
        HubError: if the repository cannot be read.
    """
    packaged = embedded.editor(source)
    files = FileSource(str(packaged or source), revision=revision, token=token)
    raw = {name: files.read(name) for name in (CONFIG_NAME, EDITOR_WEIGHTS)}
    for name, data in raw.items():
        if data is None:
            raise ArtifactError(f"{source!r} is no trained editor: there is no {name}")
    config = parse_json(raw[CONFIG_NAME] or b"", f"{source}: {CONFIG_NAME}", ArtifactError)
    if not isinstance(config, dict) or config.get("artifact") != "hypernetwork":
        raise ArtifactError(f"{source}: {CONFIG_NAME} does not describe a trained editor")
    version = config.get("format_version", 0)
    if not isinstance(version, int) or version > _FORMAT_VERSION:
        raise ArtifactError(f"{source}: written by a later version of hf_kedit ({config.get('kedit_version')})")
    weights = raw[EDITOR_WEIGHTS] or b""
    try:
        if config["files"][EDITOR_WEIGHTS] != hashlib.sha256(weights).hexdigest():
            raise ArtifactError(f"{source}: {EDITOR_WEIGHTS} is not the file that {CONFIG_NAME} was written with")
        return SavedEditor(
            source,
            dict(config["hparams"]),
            {str(m): (int(s[0]), int(s[1])) for m, s in config["modules"].items()},
            bool(config["encoder_decoder"]),
            {k: v for k, v in config.items() if k.startswith(("base_", "trained_"))},
            load_tensors(weights),
            files,
            config["files"][EDITOR_WEIGHTS],
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, SafetensorError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{source}: damaged editor: {error!r}") from error


def _card(config: dict[str, Any]) -> str:
    base = str(config.get("base_model_name_or_path") or "")
    is_hub = "/" in base and not base.startswith(("/", ".", "kedit/"))
    data = ModelCardData(
        library_name="hf_kedit",
        base_model=base if is_hub else None,
        tags=["knowledge-editing", "hypernetwork", str(config["method"])],
    )
    if not is_hub and not base.startswith("kedit/"):  # where a folder is on this machine is nobody's business
        base = base.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    method = str(config["method"])
    modules = "\n".join(
        f"- {markdown_code(name)} ({shape[0]} → {shape[1]})" for name, shape in config["modules"].items()
    )
    if modules:
        what = (
            "A small network, trained to turn the gradient of a fact into an edit of the model that it was trained"
            " for. It is not a\nmodel by itself and holds none of the model's weights."
        )
        ending = f"Edited modules:\n{modules}"
    else:  # SERAC: no module is changed
        what = (
            "Two small networks: one recognises the prompts that an edit is about, the other one answers them in the"
            "\nmodel's place. They share the model's tokens and hold none of its weights."
        )
        ending = "No module of the model is changed."
    return f"""---
{data.to_yaml()}
---

# {markdown_text(method.upper())} editor for {markdown_text(base) or "a model that was in memory"}

{what}

```python
from hf_kedit import EditableModel, AutoEditConfig

config = AutoEditConfig.for_method({python_text(method)}, editor="path or id of this folder")
model = EditableModel.from_pretrained({python_text(base or "the base model")}, config)
model.edit(prompt="{{}} was born in the city of", subject="...", target_new="...")
```

{ending}
"""
