"""What a sweep consists of: methods × models × data sets × settings, read from one YAML file and checked as a whole.

Whatever can be told to be wrong from the file alone is an error before the first run begins.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ...config import config_class, read_mapping
from ...errors import EvaluationError, check_choice, check_count, shown
from ...storage.shapes import of_type
from ..measures.abilities import ABILITIES, Ability, load_ability
from ..measures.harness import HarnessTask
from ..measures.judges import ExactMatchJudge, OpenAICompatibleJudge
from ..protocols.base import PROTOCOLS, Protocol
from .plan import SETTINGS, TIMES

_KEYS = tuple("models methods datasets settings protocols output_dir on_error collapse_text abilities".split())
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_MODEL_KEYS = ("name", "label", "dtype", "device", "revision")
_ABILITY_KEYS = ("task", "source", "split", "config", "limit", "max_new_tokens", "name")
_HARNESS_KEYS = ("harness", "metric", "limit", "num_fewshot", "include_path", "batch_size")
_SETTING_OPTIONS = ("batch_size", "when", "at", "limit")
_SETTING_KEYS = ("name", "label", "setting", *_SETTING_OPTIONS)


class _ModelOptions(TypedDict, total=False):
    dtype: str
    device: str
    revision: str


class _AbilityOptions(TypedDict, total=False):
    source: str | list[dict[str, Any]]
    split: str
    config: str
    name: str
    harness: str
    metric: str
    include_path: str


@dataclass(frozen=True)
class Part:
    """A model, method, data set or setting of a sweep: its name, what it is called, and its options."""

    name: str
    label: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class BenchRun:
    """One combination."""

    model: Part
    method: Part
    dataset: Part
    setting: Part

    @property
    def about(self) -> dict[str, str]:
        """The labels of its parts."""
        return {k: getattr(self, k).label for k in ("model", "method", "dataset", "setting")}

    @property
    def folder(self) -> str:
        """Name of its folder: readable, and different for different options."""
        parts = (self.model, self.method, self.dataset, self.setting)
        content = json.dumps([[p.name, p.label, p.options] for p in parts], sort_keys=True, default=str)
        readable = "-".join(re.sub(r"[^A-Za-z0-9]+", "_", p.label).strip("_") for p in parts)
        return f"{readable[:80]}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class BenchPlan:
    """What a sweep consists of.

    Args:
        models: names or paths.
        methods: names, with hyperparameters as options.
        datasets: registered names or files, with ``split``, ``limit`` … as options.
        settings: ``single``, ``batch`` or ``sequential``, with ``batch_size``, ``when``, ``at`` and ``limit`` (the
            first so many rows of the data set only) as options.
        protocols: asked in every run.
        output_dir: where the runs go; relative to the file that the plan was read from.
        on_error: ``skip`` leaves out edits that fail.
        collapse_text: texts for the perplexity of runs in batches or sequences.
        abilities: general tasks, measured in the same runs: arguments of `load_ability`, or of `HarnessTask` with the
            task under ``harness``.
    """

    models: tuple[Part, ...]
    methods: tuple[Part, ...]
    datasets: tuple[Part, ...]
    settings: tuple[Part, ...]
    protocols: tuple[Protocol, ...]
    output_dir: Path
    on_error: str = "skip"
    collapse_text: tuple[str, ...] | None = None
    abilities: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def from_file(cls, path: str | Path) -> BenchPlan:
        """Read a plan from a YAML or JSON file.

        Raises:
            ConfigError: if the file cannot be read.
            EvaluationError: for an unknown key or name (the nearest known one is given), or a value of a wrong type.
        """
        plan = cls.from_dict(read_mapping(path))
        return replace(plan, output_dir=Path(path).parent / plan.output_dir)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> BenchPlan:
        """Build a plan from plain data; see `from_file`."""
        _check_keys("the sweep", content, _KEYS)
        for key in ("models", "methods", "datasets"):
            if not content.get(key):
                raise EvaluationError(f"the sweep has no '{key}'; give a list of names")
        output_dir = of_type(str, content.get("output_dir", "bench-results"), "'output_dir'", EvaluationError)
        on_error = content.get("on_error", "skip")
        check_choice("on_error", on_error, ("raise", "skip"))
        texts = _listed(content.get("collapse_text") or [])
        of_type(list[str], texts, "'collapse_text'", EvaluationError)
        plan = cls(
            models=tuple(_model(e) for e in _listed(content["models"])),
            methods=tuple(_method(e) for e in _listed(content["methods"])),
            datasets=tuple(_part(e, "datasets") for e in _listed(content["datasets"])),
            settings=tuple(_setting(e) for e in _listed(content.get("settings") or ["single"])),
            protocols=tuple(
                _protocol(e) for e in _listed(content.get("protocols") or ["teacher_forced", "generation"])
            ),
            output_dir=Path(output_dir),
            on_error=on_error,
            collapse_text=tuple(texts) or None,
            abilities=tuple(_ability_entry(entry) for entry in _listed(content.get("abilities") or [])),
        )
        for key in ("models", "methods", "datasets", "settings"):
            labels = [part.label for part in getattr(plan, key)]
            double = next((label for label in labels if labels.count(label) > 1), None)
            if double is not None:
                raise EvaluationError(f"'{key}' has two entries called {double!r}; give them a 'label'")
        return plan

    @property
    def runs(self) -> list[BenchRun]:
        """All combinations; runs on one model and data set follow one another."""
        return [
            BenchRun(model, method, dataset, setting)
            for model, dataset, method, setting in itertools.product(
                self.models, self.datasets, self.methods, self.settings
            )
        ]


def ability_of(options: Mapping[str, Any]) -> Ability:
    """Load the general task that an entry of ``abilities`` names."""
    if "harness" in options:
        return HarnessTask(options["harness"], **{k: v for k, v in options.items() if k != "harness"})
    return load_ability(**options)


# ---------------------------------------------------------------------- entries of the file


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _check_keys(what: str, content: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in content:
        check_choice(f"key in {what}", key, known)


def _part(entry: Any, where: str, known: Sequence[str] | None = None) -> Part:
    if isinstance(entry, str) and entry:
        return Part(entry, entry)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise EvaluationError(f"an entry of '{where}' must be a name, or a mapping with 'name', not {shown(entry)}")
    if known is not None:
        _check_keys(f"'{where}'", entry, known)
    options = {str(k): v for k, v in entry.items() if k not in ("name", "label")}
    return Part(entry["name"], _label(entry, where) or entry["name"], options)


def _label(entry: Mapping[str, Any], where: str) -> str:
    label = entry.get("label")
    if label is not None and not isinstance(label, (str, int, float)):
        raise EvaluationError(f"a 'label' in '{where}' must be text, not {shown(label)}")
    return "" if label is None else str(label)


def _model(entry: Any) -> Part:
    part = _part(entry, "models", _MODEL_KEYS)
    of_type(_ModelOptions, part.options, f"the model {part.name!r}", EvaluationError)
    if "dtype" in part.options:
        check_choice("dtype", part.options["dtype"], _DTYPES)
    return part


def _method(entry: Any) -> Part:
    part = _part(entry, "methods")
    config_class(part.name).from_dict(part.options)  # a mistake is an error now, not after the first runs
    return part


def _setting(entry: Any) -> Part:
    if not isinstance(entry, Mapping):
        check_choice("setting", entry, SETTINGS[:3])
        return Part(entry, entry, {"setting": entry})
    _check_keys("'settings'", entry, _SETTING_KEYS)
    given = entry.get("setting") or entry.get("name")
    check_choice("setting", given, SETTINGS[:3])
    name = str(given)
    options = {str(k): v for k, v in entry.items() if k in _SETTING_OPTIONS}
    for key in ("batch_size", "limit"):
        if key in options:
            check_count(f"'{key}' of the setting {name!r}", options[key])
    for key in ("when", "at"):
        for value in _listed(options.get(key, ())):
            if key == "at":
                check_count(f"'at' of the setting {name!r}", value)
            else:
                check_choice("entry of 'when':", value, TIMES)
    batches = f", batches of {options['batch_size']}" if "batch_size" in options else ""
    return Part(name, _label(entry, "settings") or name + batches, {"setting": name, **options})


def _ability_entry(entry: Any) -> dict[str, Any]:
    """Check what can be checked before data are loaded."""
    options = {"task": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    if "harness" in options:
        _check_keys("a harness task", options, _HARNESS_KEYS)
    else:
        _check_keys("an ability", options, _ABILITY_KEYS)
        check_choice("ability", options.get("task"), ABILITIES)
    of_type(_AbilityOptions, options, "an ability", EvaluationError)
    for key in ("limit", "max_new_tokens", "batch_size", "num_fewshot"):
        if key in options:
            check_count(f"'{key}' of an ability", options[key], 0 if key == "num_fewshot" else 1)
    return options


def _protocol(entry: Any) -> Protocol:
    if not isinstance(entry, (str, Mapping)):
        raise EvaluationError(f"an entry of 'protocols' must be a name, or a mapping with 'name', not {shown(entry)}")
    options: dict[str, Any] = {} if isinstance(entry, str) else {str(k): v for k, v in entry.items()}
    name = options.pop("name", None) if isinstance(entry, Mapping) else entry
    check_choice("protocol", name, PROTOCOLS)
    judge = options.pop("judge", None)
    try:
        if judge == "exact":
            options["scorer"] = ExactMatchJudge()
        elif isinstance(judge, Mapping):
            options["scorer"] = OpenAICompatibleJudge(**judge)
        elif judge is not None:
            raise EvaluationError("'judge' must be 'exact', or a mapping with 'base_url' and 'model'")
        return PROTOCOLS[str(name)](**options)
    except TypeError as error:  # an argument that there is not, or of a type that cannot be compared
        raise EvaluationError(f"protocol {name!r}: {error}") from error
