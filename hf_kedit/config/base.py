"""`EditConfig`: the hyperparameters of an editing method, as a dataclass.

A config is validated when it is made. It can be saved next to an edit (``edit_config.json``), read from a YAML
or JSON file, and completed for a model: fields that are ``None`` because they depend on the model are filled
from a packaged hparams file if one matches the model's name, and otherwise derived from the depth of the model.
This module knows nothing of models; the derivation gets the few numbers it needs in a `ModelProfile`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_type_hints

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from ..errors import ConfigError, LayerError, nearest, shown
from ..logging import get_logger, info_once, warn_once
from ..registry import CONFIGS, normalise
from ..storage.files import first_time, named_path, write_text
from ..text.chat import TextFormat
from ..text.scripts import HALF, is_writable
from .easyedit import convert_hparams
from .hparams import find_hparams, is_users, place_of, read_mapping

logger = get_logger(__name__)
CONFIG_NAME = "edit_config.json"
STOP_PROBABILITY = 0.8
DRIFT_BOUND = 5e-4
"""Chosen on SmolLM2-135M (docs/real_models.md): at such a drift nine of ten greedy answers stay as they were."""
C = TypeVar("C", bound="EditConfig")
_RENAMED = {"batch_size": "rows_per_step"}  # fields by the names that they had in 0.1.0


@dataclass(frozen=True)
class ModelProfile:
    """What the derivation of defaults may know of a model.

    Args:
        name: id or path of the model, as the user gave it.
        num_layers: number of decoder layers.
        hidden_size: width of the residual stream.
        norm: ``"rms"`` or ``"layer"``, the kind of the normalisation layers.
        model_type: transformers' ``config.model_type``.
        mlp_layers: the layers that have a projection out of an MLP of their own; empty where that is not known.
    """

    name: str
    num_layers: int
    hidden_size: int
    norm: str = "layer"
    model_type: str | None = None
    mlp_layers: tuple[int, ...] = ()

    def with_mlp(self, layers: Sequence[int]) -> list[int]:
        """Layers with an MLP in the place of some layers: itself, else the next one above, else the next below.

        Hybrid models have layers that are nothing but a mixer, and mixtures of experts may have layers without a
        matrix that every token reads. Each layer is used once; there may be fewer of them than ``layers``. The last
        layer of the model takes no other's place while there is a choice: nothing above it could use what it adds.
        """
        if not self.mlp_layers:
            return list(layers)
        chosen: set[int] = set()
        for layer in layers:
            free = [i for i in self.mlp_layers if i not in chosen]
            if free:
                last = self.num_layers - 1
                chosen.add(min(free, key=lambda i: (i == last != layer, i < layer, abs(i - layer))))
        return sorted(chosen)


def _renamed(kind: type[Any], values: Mapping[str, Any], owner: str, *, quietly: bool = False) -> dict[str, Any]:
    """Return values under the present names of a config's fields; unless quiet, say once that a name is an old one.

    Raises:
        ConfigError: if a field is given under both names.
    """
    named: dict[str, Any] = {}
    for key, value in kind.from_earlier(values).items():
        name = _RENAMED.get(key, key) if isinstance(key, str) else key
        if name in named or (name != key and name in values):
            raise ConfigError(f"{owner}: '{key}' is the old name of '{name}'; give only one of them")
        if name != key and not quietly:
            warn_once(logger, f"{owner}: '{key}' is called '{name}' now; the old name will go")
        named[name] = value
    return named


class _OldNames(type):
    """Lets a config be made with the old names of its fields."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        return super().__call__(*args, **_renamed(cls, values, cls.__name__))


@dataclass
class EditConfig(metaclass=_OldNames):
    """Base class of the configs of all methods.

    A subclass sets ``edit_type`` and adds the method's hyperparameters as fields. Fields of type ``… | None``
    with default ``None`` depend on the model and are filled by `complete`.

    Args:
        layers: decoder layers to edit (0-based, negative counts from the end); ``None``: from the model.
        separator: text between prompt and target, for facts that bring none of their own; ``None``: a space or
            nothing, by what stands on both sides (`separator_between`).
        seed: seed of everything random in the method (generated context templates).
        rows_per_step: how many requests (with their wordings) pass the model together in one step; ``None``: as many
            as the method's own default or the memory allows. How many are solved for together is another number, the
            ``batch_size`` of `EditableModel.edit`.
        prompt_format: how the model reads requests that do not say it themselves: ``"plain"`` (also ``None``), as
            texts to go on with; ``"chat"``, through the tokenizer's chat template; ``"both"``: one edit for both.
        system: the system prompt of chats without one; ``None``: what the template writes by itself.

    Raises:
        ConfigError: for an unknown key, a wrong type or a value out of range.
    """

    edit_type: ClassVar[str] = ""

    layers: list[int] | None = None
    separator: str | None = None
    seed: int = 0
    rows_per_step: PositiveInt | None = None
    prompt_format: TextFormat | None = None
    system: str | None = None

    def __new__(cls, *args: Any, **values: Any) -> Self:
        """Note which fields the caller sets, whatever to: `complete` leaves these alone."""
        made = super().__new__(cls)
        made.__dict__["_given"] = frozenset([f.name for f in fields(cls)][: len(args)]) | frozenset(values)
        return made

    def __post_init__(self) -> None:
        coerce_fields(self)
        self.validate()
        for name, value in self.to_dict().items():  # what could be edited with but never be saved
            try:
                writable = is_writable(json.dumps(value, ensure_ascii=False))
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(f"{type(self).__name__}.{name} cannot be saved as JSON: {error}") from error
            if not writable:
                raise ConfigError(f"{type(self).__name__}.{name} {HALF}")

    def validate(self) -> None:
        """Check what the types of the fields do not say; subclasses extend it.

        Raises:
            ConfigError: naming the field.
        """
        for f in fields(self):
            if f.default is None and getattr(self, f.name) == []:
                raise ConfigError(f"{type(self).__name__}.{f.name} is empty; leave it out to use the default")
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise ConfigError(f"{type(self).__name__}.layers names a layer twice: {self.layers}")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"{type(self).__name__}.seed has more than 64 bits: {self.seed}")

    @classmethod
    def from_earlier(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Values under names that the fields had earlier, where one field has become of several."""
        return values

    @property
    def batch_size(self) -> int | None:
        """The old name of ``rows_per_step``."""
        return self.rows_per_step

    @batch_size.setter
    def batch_size(self, value: int | None) -> None:
        (self.rows_per_step,) = _renamed(type(self), {"batch_size": value}, type(self).__name__).values()

    # ------------------------------------------------------------------ model-dependent values

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """Names of the fields that `complete` fills when they are ``None``."""
        return ("layers",)

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """Return values for the model-dependent fields of a model without an hparams file."""
        return {}

    def cautious(self, profile: ModelProfile) -> dict[str, Any]:
        """Return values that take the place of class defaults for a model without an hparams file.

        Class defaults are published values, which were tuned on a few large models. On a model that nobody has tried,
        an edit should stop when the fact holds and change little else.
        """
        return {}

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Return other values worth trying on a model that nobody has tuned the method for, by field.

        `hf_kedit.tuning` asks a complete config. A field's best guess stands first; the config's own value may be
        among them. Empty where nothing can be searched.

        Args:
            profile: of the model.
            traced: where causal tracing finds facts: one layer for a method that edits one, else a range; empty where
                it finds nothing.
        """
        return {}

    @classmethod
    def published(cls) -> dict[str, Any]:
        """Return the values with which the method does as published, of fields whose default may mean another.

        For configs that do not know these fields: those of other libraries and of earlier versions.
        """
        names = cls().cautious(ModelProfile("", 1, 1))
        return {f.name: _default(f) for f in fields(cls) if f.name in names}

    @property
    def in_words(self) -> str:
        """The method and where it edits, in a few words."""
        where = f" at layer {', '.join(map(str, self.layers))}" if self.layers else ""
        return f"{self.edit_type}{where}"

    @property
    def reads_files(self) -> bool:
        """Whether fields that were not given may come from a file of the model."""
        return True

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were set when the config was made, or changed since, with their values."""
        named: frozenset[str] = self.__dict__["_given"]
        values = {f.name: (getattr(self, f.name), _default(f)) for f in fields(self)}
        return {name: value for name, (value, default) in values.items() if name in named or value != default}

    def complete(self: C, profile: ModelProfile, *, files: bool = True) -> C:
        """Return a copy in which every model-dependent field has a value; all its fields count as given.

        The user's own values win, then the file of the model, then the derivation and the class defaults. A
        model-dependent field that is set to ``None`` is an open one. Without a file, `cautious` values come before
        class defaults. The user is told once where the values came from.

        Args:
            profile: of the model.
            files: look for a file; otherwise nothing is said either.

        Raises:
            ConfigError: if a layer does not exist in the model.
        """
        dependent = self.model_dependent_fields()
        given = {name for name, value in self.given.items() if value is not None or name not in dependent}
        chosen: dict[str, Any] = {}
        packaged = find_hparams(self.edit_type, profile.name) if files and self.reads_files else None
        if packaged is not None:
            path, values = packaged
            known = type(self)._known(values, str(path))
            chosen = {name: value for name, value in known.items() if name not in given and value is not None}
            if chosen:
                # What a user made is easily forgotten: it is said aloud, once on a machine.
                aloud = is_users(path) and first_time(f"own hparams: {path}")
                told_by = warn_once if aloud else info_once
                told_by(logger, f"{self.edit_type}: hyperparameters for {profile.name!r} from {place_of(path)}")
        careful = {n: v for n, v in self.cautious(profile).items() if packaged is None and n not in self.given}
        rest = [n for n in dict.fromkeys((*dependent, *careful)) if n not in given and n not in chosen]
        if rest:
            derived = {**self.derive(profile), **careful}
            if "layers" in derived:
                derived["layers"] = profile.with_mlp(derived["layers"])
            chosen.update({n: derived[n] for n in rest if n in derived})
            told = ", ".join(f"{n}={chosen[n]}" for n in rest if n in chosen)
            if told and files and packaged is None:
                look = f"kedit inspect {shlex.quote(profile.name)} --method {self.edit_type}"
                where = f"`{look}` shows all of them" if profile.name else "model.edit_config holds all of them"
                tune = f"`kedit tune {shlex.quote(profile.name)} --method {self.edit_type}`"
                new = logger.isEnabledFor(logging.WARNING) and (
                    not profile.name or first_time(f"no hparams file: {profile.name}")
                )
                (warn_once if new else info_once)(
                    logger,
                    f"{self.edit_type}: there is no hparams file for {profile.name or 'this model'!r}; derived from"
                    f" its depth: {told}. {where}; set these fields of {type(self).__name__} to choose yourself, or"
                    f" let {tune if profile.name else '`hf_kedit.calibrate`'} find them.",
                )
        full = dataclasses.replace(self, **chosen)
        if full.layers is not None:
            full.layers = [_layer_index(i, profile.num_layers, type(self).__name__) for i in full.layers]
        return full

    # ------------------------------------------------------------------ files

    def to_dict(self) -> dict[str, Any]:
        """Return all fields with ``edit_type`` first; JSON-ready."""
        return {"edit_type": self.edit_type, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any], *, saved: bool = False) -> C:
        """Build a config from a dict; on the base class, ``edit_type`` names the method.

        Args:
            values: the fields by name.
            saved: the values were written by this library, perhaps by an earlier version: old names of fields are
                taken without a word, and fields that it did not know have the values of `published`.

        Raises:
            ConfigError: for an unknown key; the nearest known one is named.
            UnknownMethodError: if ``edit_type`` is not registered.
        """
        data = dict(values)
        edit_type = data.pop("edit_type", None)
        target: type[Any] = cls
        if not cls.edit_type:
            if edit_type is None:
                raise ConfigError("a config file needs 'edit_type', the name of the method")
            target = config_class(edit_type)
        elif edit_type is not None and normalise(str(edit_type)) != cls.edit_type:
            raise ConfigError(f"this is a config of {shown(edit_type)}, not of '{cls.edit_type}'")
        known = target._known(_renamed(target, data, "the config", quietly=saved), "the config")
        config: C = target(**{**(target.published() if saved else {}), **known})
        return config

    def changed(self: C, values: Mapping[str, Any]) -> C:
        """Return a copy with other values in some fields.

        Raises:
            ConfigError: for an unknown key or a bad value.
        """
        return type(self).from_dict({**self.to_dict(), **_renamed(type(self), values, "the call")})

    @classmethod
    def _known(cls, values: Mapping[str, Any], source: str) -> dict[str, Any]:
        names = [f.name for f in fields(cls)]
        for key in values:
            if key not in names:
                raise ConfigError(f"{source}: {cls.__name__} has no field '{key}'.{nearest(str(key), names)}")
        return dict(values)

    @classmethod
    def from_hparams(cls: type[C], path: str | Path) -> C:
        """Read a YAML or JSON hparams file (numbers such as ``5e-1`` are understood).

        Raises:
            ConfigError: if the file is missing, unreadable, or has an unknown key or a bad value.
        """
        data = read_mapping(Path(path))
        data.pop("match", None)
        return cls.from_dict(data)

    @classmethod
    def from_easyedit(cls: type[C], source: str | Path | Mapping[str, Any]) -> C:
        """Read an EasyEdit hparams file (YAML or JSON) or its content; what does not carry over is logged, with why.

        Raises:
            UnknownMethodError: if its ``alg_name`` is no method of this library.
            ConfigError: if it cannot be read, a value is unusable, or it is of another method than this class.
        """
        converted = convert_hparams(source)
        if not isinstance(converted.config, cls):
            raise ConfigError(f"these are hyperparameters of '{converted.config.edit_type}', not of '{cls.edit_type}'")
        for key, reason in converted.ignored.items():
            logger.warning("%s: ignored: %s", key, reason)
        return converted.config

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``edit_config.json`` into a folder (made if needed).

        Raises:
            ArtifactError: if it cannot be written.
        """
        write_text(named_path(save_directory, "the folder") / CONFIG_NAME, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls: type[C], path: str | Path) -> C:
        """Read the config from a folder with ``edit_config.json`` (a saved config or a saved edit) or from the file.

        Raises:
            ConfigError: if there is no such file, or its content is not a config.
        """
        file = named_path(path, "the config", ConfigError)
        if file.is_dir():
            file = file / CONFIG_NAME
        data = read_mapping(file)
        if isinstance(data.get("hparams"), dict):  # a saved edit keeps its config there
            data = data["hparams"]
        return cls.from_dict(data, saved=True)


@dataclass
class WeightConfig(EditConfig):
    """Base of the configs of methods that change weights.

    Args:
        rect_keep: fraction of a matrix's entries that an edit may change: those with the largest change relative to
            their value; the others stay (RECT, Gu et al. 2024, arXiv 2401.04700). ``None``: no restriction. A
            restricted change has full rank, is stored densely, and edits of one batch are undone together.
    """

    rect_keep: Annotated[float, Field(gt=0, le=1)] | None = None


def adam_step(profile: ModelProfile) -> float:
    """A moderate learning rate for Adam on matrices of a model.

    Adam moves every entry of a row by about the learning rate, and the entries of a row add up in an output: the step
    of an output grows with the width (Yang et al. 2022, arXiv 2203.03466), so the rate falls with it.
    """
    return float(f"{min(max(0.3 / profile.hidden_size, 5e-5), 1e-3):.1g}")


@dataclass
class StoppingConfig(EditConfig):
    """Base of the configs of methods that train on a fact by gradient descent.

    Args:
        stop_probability: a fact is trained until each token of its target has this probability, which is looked at in
            every step; ``None``: for the published number of steps. Above a half, so that the token comes first.
    """

    stop_probability: Annotated[float, Field(gt=0.5, lt=1)] | None = None

    def cautious(self, profile: ModelProfile) -> dict[str, Any]:
        """Until the fact holds."""
        return super().cautious(profile) | {"stop_probability": STOP_PROBABILITY}


@dataclass
class BoundedConfig(StoppingConfig):
    """Base of the configs of methods that train what every prompt runs through.

    Args:
        drift_bound: how far an edit may move the model on general text: nats per token of the divergence between what
            the unedited model says and the edited one (`methods.drift`), beside what edits before it have moved;
            ``None``: as far as it does. An edit that cannot be made within the bound is made as far as the bound
            allows, with a warning.
    """

    drift_bound: PositiveFloat | None = None

    def cautious(self, profile: ModelProfile) -> dict[str, Any]:
        """Until the fact holds, within a small drift."""
        return super().cautious(profile) | {"drift_bound": DRIFT_BOUND}


@dataclass
class UnlearningConfig(BoundedConfig):
    """Base of the configs of methods that can take probability from an answer while they train another.

    Args:
        unlikelihood: weight of the term that takes it (`engine.unlikelihood`) from every answer that is to go
            (``target_neg``, or what a request erases); ``None``: 1 for requests that erase, 0 for others.
    """

    unlikelihood: NonNegativeFloat | None = None


class AutoEditConfig:
    """Find the config class by the name of the method."""

    def __init__(self) -> None:
        raise TypeError("AutoEditConfig is not instantiated; use for_method, for_model or from_pretrained")

    @staticmethod
    def for_method(method: str, **values: Any) -> EditConfig:
        """Return the config of ``method`` with the given values.

        Raises:
            UnknownMethodError: if there is no such method; the nearest name is given.
        """
        cls = config_class(method)
        return cls(**cls._known(_renamed(cls, values, "the call"), "the call"))

    @staticmethod
    def for_model(model: str, method: str, **values: Any) -> EditConfig:
        """Return the config of ``method`` with the packaged hyperparameters of ``model``, if there are any."""
        cls = config_class(method)
        packaged = find_hparams(cls.edit_type, model)
        own = cls._known(_renamed(cls, values, "the call"), "the call")
        data = cls._known(packaged[1], str(packaged[0])) if packaged and cls(**own).reads_files else {}
        return cls(**{**data, **own})

    @staticmethod
    def from_pretrained(path: str | Path) -> EditConfig:
        """Read a saved config or edit; ``edit_type`` in the file decides the class."""
        return EditConfig.from_pretrained(path)


# ---------------------------------------------------------------------- by name


def register_config(cls: type[C]) -> type[C]:
    """Class decorator: make the config known under its ``edit_type``."""
    CONFIGS.add(cls.edit_type, cls)
    return cls


def config_class(method: str) -> type[EditConfig]:
    """Return the config class of a method.

    Raises:
        UnknownMethodError: naming the nearest registered method.
    """
    return CONFIGS.get(method)


# ---------------------------------------------------------------------- helpers


def coerce_fields(values: Any) -> None:
    """Check the fields of a dataclass against their types, and turn what can be turned (``"5e-4"`` into a number).

    Raises:
        ConfigError: naming class, field, value and what is wrong with it.
    """
    kind: Any = type(values)
    for name, adapter in _adapters(kind).items():
        try:
            setattr(values, name, adapter.validate_python(getattr(values, name)))
        except ValidationError as error:
            raise ConfigError(_what_is_wrong(f"{kind.__name__}.{name}", error)) from error


@cache
def _adapters(cls: Any) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(cls, include_extras=True)  # the ranges are in the annotations
    return {f.name: TypeAdapter(hints[f.name]) for f in fields(cls)}


def _what_is_wrong(field: str, error: ValidationError) -> str:
    """The first complaint about a field, with the value and, inside a list, its place."""
    first = error.errors()[0]
    place = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
    return f"{field}{place} = {shown(first['input'])}: {first['msg']}"


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default is not dataclasses.MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else None


def _layer_index(index: int, count: int, owner: str) -> int:
    if not -count <= index < count:
        raise LayerError(f"{owner}.layers: there is no layer {index}; the model has layers 0 … {count - 1}")
    return index % count
