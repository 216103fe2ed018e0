"""The settings of a method as fields of a form, taken from its config: name, value, kind of control, explanation."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..config import AutoEditConfig, ModelProfile, config_class
from ..errors import ConfigError
from ..methods import registered_methods
from ..storage.parsing import parse_yaml

FIRST = ("auto", "rome", "memit", "ft-m", "lora", "grace", "wise", "ike")
"""Methods at the top of the list: one of each kind, the one for most people first."""
_ELSEWHERE = {"qlora", "simie", "serac"}
"""Methods that need a quantised model, another method, or a classifier of their own."""
# Names of files, folders, data sets and models: who may visit a page is not to choose what its machine reads.
_OURS = {"stats_dataset", "stats_dir", "stats_tokens", "stats_ridge", "editor", "encoder", "retriever", "reader"}
_OURS |= {"base", "separator", "rows_per_step", "demonstrations"}
Kind = Literal["switch", "whole", "number", "choice", "text"]


@dataclass(frozen=True)
class FormSetting:
    """One field of a config.

    Args:
        name: of the field.
        value: that it has for this model.
        kind: of control.
        about: what it does.
        choices: for ``"choice"``.
    """

    name: str
    value: Any
    kind: Kind
    about: str
    choices: tuple[str, ...] = ()


def method_choices() -> list[tuple[str, str]]:
    """Name for people and ``edit_type`` of every method that needs nothing but a model."""
    known = {
        name: method.capabilities
        for name, method in registered_methods().items()
        if not method.capabilities.needs_training and name not in _ELSEWHERE
    }
    order = [*(name for name in FIRST if name in known), *sorted(set(known) - set(FIRST))]
    return [(f"{known[name].name} (recommended)" if name == "auto" else known[name].name, name) for name in order]


def settings_of(method: str, profile: ModelProfile) -> list[FormSetting]:
    """The settings of a method that a visitor may change, with the values that they have for a model.

    Raises:
        UnknownMethodError: for a method that is not registered.
        ConfigError: if the method cannot be used on the model.
    """
    kind, values = config_class(method), AutoEditConfig.for_method(method).complete(profile).to_dict()
    types, texts = typing.get_type_hints(kind), _explanations(kind)
    found = []
    for name in (field.name for field in fields(kind) if field.name not in _OURS):
        control, choices = _control(types[name], values[name])
        found.append(FormSetting(name, values[name], control, texts.get(name, ""), choices))
    return found


def chosen_values(method: str, profile: ModelProfile, filled: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a form that differ from what the method would take for a model.

    Args:
        method: ``edit_type``.
        profile: of the model.
        filled: name → what somebody has put into the field; texts are read as YAML. Blank fields are left out.

    Raises:
        ConfigError: for a value that does not fit, or a field that is not in the form.
    """
    known = {setting.name: setting for setting in settings_of(method, profile)}
    values: dict[str, Any] = {}
    for name, value in filled.items():
        if name not in known:
            raise ConfigError(f"{name!r} cannot be set here")
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if known[name].kind in ("text", "whole", "number") and isinstance(value, str):
            value = parse_yaml(value, f"the value of {name!r}", ConfigError)
        elif known[name].kind == "whole" and isinstance(value, float) and value.is_integer():
            value = int(value)  # the page's field of numbers knows no whole ones
        if value != known[name].value:
            values[name] = value
    AutoEditConfig.for_method(method, **values)  # raises for what does not fit
    return values


def _control(kind: Any, value: Any) -> tuple[Kind, tuple[str, ...]]:
    """Kind of control and choices of a field, from its type and its value."""
    parts = [kind, *typing.get_args(kind)]
    literal = next((part for part in parts if typing.get_origin(part) is Literal), None)
    if isinstance(value, bool) or kind is bool:
        return "switch", ()
    if literal is not None:
        return "choice", tuple(map(str, typing.get_args(literal)))
    if isinstance(value, int):
        return "whole", ()
    return ("number" if isinstance(value, float) else "text"), ()


def _explanations(kind: type[Any]) -> dict[str, str]:
    """Field → its text in the docstring of the class that has it, in one line."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__doc__ or "") if base.__dict__.get("__doc__") else ""
        _, _, arguments = text.partition("Args:\n")
        for entry in re.split(r"\n(?= {4}\w+: )", "\n" + arguments.partition("\n\n")[0]):
            hit = re.match(r"\s{4}(\w+): (.*)", entry, re.DOTALL)
            if hit:
                line = " ".join(hit[2].split()).replace("``", "")
                found[hit[1]] = re.split(r"(?<=[.;])\s", line, maxsplit=1)[0].rstrip(";.")
    return found
