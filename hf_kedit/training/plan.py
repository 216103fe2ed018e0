"""A whole training run as one YAML file: base model, method, data, editor and training arguments.

model: kedit/world-gpt2
method: mend
data: {dataset: world, train: train, eval: validation, eval_size: 100}
editor: {rank: 64, edit_lr: 1.0e-3}
training: {output_dir: mend-world-gpt2, learning_rate: 1.0e-3, max_steps: 700}
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import interleave_datasets
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from ..config import coerce_fields, config_class, read_mapping
from ..data import load_edit_dataset
from ..data.loading import requests_of
from ..editors.editor import editor_class
from ..errors import ConfigError, KeditError, nearest, shown
from ..loading import load_base, load_processor, load_tokenizer
from ..requests import EditRequest, load_requests
from ..storage.parsing import parse_yaml
from .arguments import EditTrainingArguments
from .data import EditFacts
from .trainer import EditTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


_DATA: dict[str, Any] = {
    "dataset": str | list[str],
    "path": str,
    "train": str,
    "eval": str,
    "eval_size": NonNegativeInt,
    "train_seeds": PositiveInt,
    "weights": list[PositiveFloat],
}
"""What the entries of ``data`` must be."""


@dataclass
class TrainingPlan:
    """What to train on what.

    Args:
        model: Hub id, folder or embedded name of the base model.
        method: ``edit_type`` of the editor.
        data: ``dataset`` (a name of `load_edit_dataset`, or a file of facts), the splits ``train`` and ``eval``,
            ``eval_size`` facts of the latter (0: no evaluation), and ``train_seeds`` for data sets that are made from
            a seed: how many versions of the training split to take. A list of data sets is mixed, each as often as
            its weight in ``weights`` says (default: all alike). ``path`` is where a data set's file lies.
        editor: fields of the method's config.
        training: fields of `EditTrainingArguments`.
        dtype: of the base model.
        device_map: of the base model.

    Raises:
        ConfigError: for an unknown key.
    """

    model: str
    method: str
    data: dict[str, Any]
    training: dict[str, Any]
    editor: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    device_map: str | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        coerce_fields(self)
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ConfigError(f"TrainingPlan.dtype = {self.dtype!r}: torch has no such number format; 'float32', say")
        for name, kind in _DATA.items():
            if name in self.data:
                try:
                    TypeAdapter(kind).validate_python(self.data[name], strict=True)
                except ValidationError as error:
                    reason = error.errors()[0]["msg"]
                    raise ConfigError(f"TrainingPlan.data: {name} = {shown(self.data[name])}: {reason}") from error

    @classmethod
    def from_file(cls, path: str | Path, **changes: Any) -> TrainingPlan:
        """Read a plan; ``changes`` replace top-level entries, and the keys of a dict are merged into the file's.

        Raises:
            ConfigError: for an unreadable file, or an unknown or a missing key.
        """
        values = read_mapping(path)
        for name, value in changes.items():
            known = values.get(name)
            values[name] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
        names = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ConfigError(f"{path}: a training plan has no {name!r}.{nearest(name, names)}")
        missing = [n for n in ("model", "method", "data", "training") if n not in values]
        if missing:
            raise ConfigError(f"{path}: a training plan needs {', '.join(missing)}")
        return cls(**values)

    @classmethod
    def from_command_line(cls, default: str | Path, arguments: Sequence[str] | None = None) -> TrainingPlan:
        """Read the plan that a script is started with: ``[PLAN.yaml] [--name value …]``, training arguments by name.

        Args:
            default: the plan, if none is named.
            arguments: of the script; ``None``: those that it was started with.

        Raises:
            ConfigError: for an option without a value, or as in `from_file`.
        """
        words = list(sys.argv[1:] if arguments is None else arguments)
        path = words.pop(0) if words and not words[0].startswith("--") else default
        names, values = words[::2], words[1::2]
        if len(names) != len(values) or not all(name.startswith("--") for name in names):
            raise ConfigError("options are pairs: --name value, with the name of a training argument")
        return cls.from_file(
            path,
            training={
                n.removeprefix("--"): parse_yaml(v, f"the value of {n}", ConfigError)
                for n, v in zip(names, values, strict=True)
            },
        )

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
        """The base model, which knows by which name it was asked for, and its tokenizer; if it sees, its processor."""
        base = load_base(self.model, dtype=self.dtype, device_map=self.device_map)
        base.config.name_or_path = self.model
        return base, load_processor(self.model, base.config) or load_tokenizer(self.model)

    def arguments(self) -> EditTrainingArguments:
        """The training arguments.

        Raises:
            ConfigError: for one that does not exist, or as `EditTrainingArguments` itself.
        """
        known = [f.name for f in dataclasses.fields(EditTrainingArguments)]
        for name in self.training:
            if name not in known:
                raise ConfigError(f"EditTrainingArguments has no field {name!r}.{nearest(name, known)}")
        try:
            return EditTrainingArguments(**self.training)
        except (TypeError, ValueError, ImportError, ArithmeticError, RecursionError) as error:
            if isinstance(error, KeditError):
                raise
            raise ConfigError(f"TrainingPlan.training: {error}") from error

    def trainer(
        self,
        train: Sequence[EditRequest] | EditFacts | None = None,
        held_out: Sequence[EditRequest] | EditFacts | None = None,
    ) -> EditTrainer:
        """Load model and data, make the editor, and return the trainer, ready to train.

        Args:
            train: facts to train on instead of the plan's; ``held_out``, which may be ``None``, then counts as well.
            held_out: facts to measure on.
        """
        config: Any = config_class(self.method).from_dict(self.editor)
        kind, args = editor_class(config.edit_type), self.arguments()
        base, tokenizer = self.load()
        if train is None:
            train, held_out = self.train_facts(), self.eval_facts()
        return EditTrainer(kind.for_model(base, config), args, _listed(train), _listed(held_out), tokenizer)

    def train_facts(self) -> list[EditRequest]:
        """The facts to train on."""
        seeds = self.data.get("train_seeds")
        split = self.data.get("train", "train")
        if seeds is None:
            return self._facts(split)
        return [fact for seed in range(seeds) for fact in self._facts(split, seed=seed)]

    def eval_facts(self) -> list[EditRequest] | None:
        """The facts to measure on; ``None`` if nothing is to be measured."""
        size = self.data.get("eval_size", 100)
        return self._facts(self.data.get("eval", "validation"))[:size] if size else None

    def _facts(self, split: str, **options: Any) -> list[EditRequest]:
        name = self.data.get("dataset", "")
        if isinstance(name, list):
            parts = [load_edit_dataset(n, split=split, **options).remove_columns("id") for n in name]
            share = self.data.get("weights", [1 / len(parts)] * len(parts))
            return load_requests(interleave_datasets(parts, share, seed=0, stopping_strategy="all_exhausted"))
        if os.path.isfile(str(name)):
            return requests_of(str(name))
        if "path" in self.data:
            options["path"] = self.data["path"]
        return load_requests(load_edit_dataset(str(name), split=split, **options).remove_columns("id"))


def _listed(facts: Sequence[EditRequest] | EditFacts | None) -> Any:
    return facts if isinstance(facts, EditFacts) else (facts and list(facts))


def train_and_save(trainer: EditTrainer, resume: bool | str | None = None) -> dict[str, float]:
    """Train, measure, write the editor to ``output_dir``.

    Args:
        trainer: from a plan, or a script's own.
        resume: go on from a checkpoint: a folder, or the last one in ``output_dir``.

    Returns:
        What the measurement found (``eval_…``); nothing without facts to measure on.
    """
    trainer.train(resume_from_checkpoint=resume or None)
    scores = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.save_model()
    return scores
