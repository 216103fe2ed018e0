"""From command-line options to a loaded `EditableModel`: which config, which model, which device."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import logging as kedit_logging
from ..config import EditConfig, config_class, read_mapping
from ..errors import ArtifactError, ConfigError, KeditError, reason_of
from ..storage.parsing import parse_yaml

if TYPE_CHECKING:
    from ..artifact.layout import Artifact
    from ..model import EditableModel
    from ..remote.backend import TextBackend


class Dtype(StrEnum):
    """Number formats of weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


_MODEL: Any = typer.Option(
    "--model",
    "-m",
    help="Hub id or folder of a model, a GGUF file, one of ours (kedit/world-gpt2, kedit/world-llama,"
    " kedit/smollm2-135m), or saved edits.",
)
ModelOption = Annotated[str, _MODEL]
OptionalModelOption = Annotated[str | None, _MODEL]
MethodOption = Annotated[
    str | None, typer.Option("--method", "-M", help="Editing method (`kedit list-methods`); default: auto.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML or JSON file with the hyperparameters of the method."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="One hyperparameter, as in YAML; may be repeated."),
]
LayersOption = Annotated[
    str | None, typer.Option("--layers", "-l", help="Layers to edit, such as 5 or 4-8 or 3,5,-1; wins over the rest.")
]
PromptFormatOption = Annotated[
    str | None,
    typer.Option(
        "--prompt-format",
        help="How the model reads prompts: plain, chat (its chat template) or both (one edit for both).",
        show_default=False,
    ),
]
SystemOption = Annotated[
    str | None, typer.Option("--system", help="System prompt of chats; default: what the chat template writes.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of the method; wins over the rest.")]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option("--dtype", help="Number format of the weights; default: the checkpoint's.", show_default=False),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu, cuda, cuda:1 … or auto (spread over all devices); default: cuda if there is one.",
        show_default=False,
    ),
]
UntieOption = Annotated[
    bool, typer.Option("--untie", help="Give a head that is tied to the input embeddings a weight of its own.")
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the model.")]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="Base model (folder, GGUF file or Hub id) of saved edits, instead of the one that they name; for edits of"
        " a quantised model also the unquantised one.",
        show_default=False,
    ),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow code from the model's repository to run.")
]


@dataclass(frozen=True)
class MethodOptions:
    """Which method edits, with which hyperparameters."""

    method: MethodOption = None
    config: ConfigOption = None
    set_: SetOption = None
    layers: LayersOption = None

    @property
    def flags(self) -> dict[str, Any]:
        """Fields of a config that have an option of their own → what it says.

        Raises:
            typer.BadParameter: for layers that cannot be read.
        """
        return {"layers": parse_layers(self.layers)}


@dataclass(frozen=True)
class EditOptions(MethodOptions):
    """Likewise, with the seed, the format of prompts and the system prompt that it edits with."""

    seed: SeedOption = None
    prompt_format: PromptFormatOption = None
    system: SystemOption = None

    @property
    def flags(self) -> dict[str, Any]:
        """See `MethodOptions.flags`."""
        return {**super().flags, "seed": self.seed, "prompt_format": self.prompt_format, "system": self.system}


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded."""

    dtype: DtypeOption = None
    device: DeviceOption = None
    revision: RevisionOption = None
    base: BaseOption = None
    trust_remote_code: TrustOption = False


# ---------------------------------------------------------------------- configs


def build_config(
    method: str | None,
    file: Path | None,
    settings: Sequence[str] | None,
    **flags: Any,
) -> EditConfig | None:
    """Put a config together: the file, then ``--set``, then explicit flags (those that are not ``None``).

    Returns:
        The config; ``None`` if the options name no method (a saved edit then continues with its own).

    Raises:
        UnknownMethodError: naming the nearest method.
        ConfigError: for an unreadable file, an unknown key or a bad value.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values = read_mapping(file)
        values = dict(values["hparams"]) if isinstance(values.get("hparams"), dict) else values
        values.pop("match", None)
        named = values.pop("edit_type", None)
        if method is None and named is None:
            raise ConfigError(f"{str(file)!r} does not name a method with 'edit_type'; give --method")
        if method is not None and named is not None and config_class(method) is not config_class(named):
            raise ConfigError(f"{str(file)!r} is a config of {named!r}, and --method says {method!r}")
        method = method or named
    if method is None:
        return None
    values |= parse_settings(settings) | {k: v for k, v in flags.items() if v is not None}
    return config_class(method).from_dict(values)


def parse_settings(settings: Sequence[str] | None, option: str = "--set") -> dict[str, Any]:
    """Turn ``KEY=VALUE`` texts of an option into a dict; values are read as YAML and coerced later, by the config.

    Raises:
        typer.BadParameter: for a text without ``=`` or a value that is not YAML.
    """
    values: dict[str, Any] = {}
    for text in settings or ():
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise typer.BadParameter(f"{text!r} is not of the form KEY=VALUE", param_hint=option)
        try:
            values[key.strip()] = parse_yaml(value, f"the value of {key.strip()!r}", ConfigError)
        except ConfigError as error:
            raise typer.BadParameter(str(error), param_hint=option) from error
    return values


def parse_layers(text: str | None) -> list[int] | None:
    """Turn ``5``, ``4-8``, ``3,5,-1`` or ``[3, 5]`` into a list; ``None`` stays.

    Raises:
        typer.BadParameter: for anything else.
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in text.strip().strip("[]").split(","):
        part = part.strip()
        span = re.fullmatch(r"(\d+)\s*[-:]\s*(\d+)", part)
        if span and int(span[1]) <= int(span[2]):
            layers.extend(range(int(span[1]), int(span[2]) + 1))
        elif re.fullmatch(r"-?\d+", part):
            layers.append(int(part))
        else:
            raise typer.BadParameter(f"{text!r}: write layers as 5 or 4-8 or 3,5,-1", param_hint="--layers")
    return layers


# ---------------------------------------------------------------------- models


def open_model(
    name: str | None,
    load: LoadOptions,
    method: MethodOptions = MethodOptions(),
    *,
    flags: Mapping[str, Any] | None = None,
    untie: bool = False,
    artifact: Artifact | None = None,
    backend: TextBackend | None = None,
) -> EditableModel:
    """Load a model, or saved edits with their base model, with the config that the options describe.

    Args:
        name: what ``--model`` says.
        load: how. A base model that is given for saved edits must have the weights of their own one; if that was
            quantised, another form of the same model is taken as well.
        method: and its hyperparameters.
        flags: further fields of the config with an option of their own.
        untie: give a tied head a weight of its own.
        artifact: the saved edits that ``name`` means, if they were read already.
        backend: the model behind an API that is meant; ``name``, if given, is saved edits of it.

    Raises:
        typer.BadParameter: if no model is named, or options do not go together.
        ArtifactError: if there is no such model or it cannot be loaded.
    """
    given = {k: v for k, v in {**method.flags, **(flags or {})}.items() if v is not None}
    if backend is not None:
        given.pop("system", None)  # the backend says it
    config = build_config(method.method, method.config, method.set_, **given)
    if backend is not None:
        edits = artifact or (None if name is None else edits_at(name, load.revision))
        return _open_remote(backend, config, edits, name)
    if name is None:
        raise typer.BadParameter("name a model", param_hint="--model")
    if artifact is None and load.base is not None:
        artifact = edits_at(name, load.revision)
    hush_transformers()
    from ..model import EditableModel

    kwargs: dict[str, Any] = {"revision": load.revision, "trust_remote_code": load.trust_remote_code, "untie": untie}
    if load.dtype is not None:
        kwargs["dtype"] = load.dtype.value
    place = load.device or _default_device()
    if place != "cpu":
        kwargs["device_map"] = place
    if load.base is not None:
        if artifact is None:
            raise typer.BadParameter("--base belongs to saved edits", param_hint="--base")
        modules = artifact.config["modules"].values()
        # Its fingerprint counts, unless the edits were made on a quantised form of it.
        kwargs |= {"base_model": load.base, "ignore_fingerprint": any(m.get("quantised") for m in modules)}
    with loading(name):
        model = EditableModel.from_pretrained(artifact or name, config, **kwargs)
    if config is None and (method.set_ or given):
        model.set_method(model.edit_config.changed({**parse_settings(method.set_), **given}))
    return model


def _open_remote(
    backend: TextBackend, config: EditConfig | None, artifact: Artifact | None, name: str | None
) -> EditableModel:
    """A model behind an API, with saved edits if there are any."""
    from ..model import EditableModel

    if artifact is not None:
        return EditableModel.from_pretrained(artifact, config, base_model=backend)
    if name is not None:
        raise typer.BadParameter(
            f"{name!r} is a model; with --backend, --model means saved edits, and --api-model the model there",
            param_hint="--model",
        )
    return EditableModel.from_backend(backend, config or "auto")


def edits_at(name: str, revision: str | None = None) -> Artifact | None:
    """The saved edits in a folder or repository, read once for a command; ``None`` for a model."""
    from .. import embedded
    from ..artifact.reading import find_artifact

    if embedded.resolve(name) is not None:
        return None
    with loading(name):
        return find_artifact(name, revision=revision)


def hush_transformers() -> None:
    """Give transformers and the Hub client the verbosity of this library, and bars only where somebody sees them."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as theirs

    level = kedit_logging.get_verbosity()
    for library in (theirs, hub):
        library.set_verbosity(level if level <= logging.DEBUG else logging.ERROR)
    if not sys.stderr.isatty() or level >= logging.ERROR:
        theirs.disable_progress_bar()


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn what transformers raises for a missing or unusable model into one clear line.

    Raises:
        ArtifactError: see above.
    """
    try:
        yield
    except KeditError:
        raise
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ArtifactError(f"cannot load {name!r}: {reason_of(error)}") from error


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
