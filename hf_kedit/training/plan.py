"""A whole training run as one YAML file: base model, method, data, editor and training arguments.

model: kedit/world-gpt2
method: mend
data: {dataset: world, train: train, eval: validation, eval_size: 100}
editor: {rank: 64, edit_lr: 1.0e-3}
training: {output_dir: mend-world-gpt2, learning_rate: 1.0e-3, max_steps: 700}
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import interleave_datasets

from ..config import config_class, read_mapping
from ..data import load_edit_dataset
from ..errors import ConfigError, nearest
from ..loading import load_base, load_tokenizer
from ..methods.editor import editor_class
from ..requests import EditRequest, load_requests
from .arguments import EditTrainingArguments
from .trainer import EditTrainer


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
    device_map: str | None = None

    @classmethod
    def from_file(cls, path: str | Path, **changes: Any) -> TrainingPlan:
        """Read a plan; ``changes`` replace top-level entries, and the keys of a dict are merged into the file's.

        Raises:
            ConfigError: for an unreadable file, or an unknown or a missing key.
        """
        values = read_mapping(Path(path))
        for name, value in changes.items():
            values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
        names = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ConfigError(f"{path}: a training plan has no {name!r}.{nearest(name, names)}")
        missing = [n for n in ("model", "method", "data", "training") if n not in values]
        if missing:
            raise ConfigError(f"{path}: a training plan needs {', '.join(missing)}")
        return cls(**values)

    def trainer(self) -> EditTrainer:
        """Load model and data, make the editor, and return the trainer, ready to train."""
        known = [f.name for f in dataclasses.fields(EditTrainingArguments)]
        for name in self.training:
            if name not in known:
                raise ConfigError(f"EditTrainingArguments has no field {name!r}.{nearest(name, known)}")
        config: Any = config_class(self.method).from_dict(self.editor)
        args = EditTrainingArguments(**self.training)
        base = load_base(self.model, dtype=self.dtype, device_map=self.device_map)
        editor = editor_class(config.edit_type).for_model(base, config)
        editor.origin["base_model_name_or_path"] = self.model
        return EditTrainer(
            model=editor,
            args=args,
            train_dataset=self._train_facts(),
            eval_dataset=self._eval_facts(),
            processing_class=load_tokenizer(self.model),
        )

    def _train_facts(self) -> list[EditRequest]:
        seeds = self.data.get("train_seeds")
        split = self.data.get("train", "train")
        if seeds is None:
            return self._facts(split)
        return [fact for seed in range(seeds) for fact in self._facts(split, seed=seed)]

    def _eval_facts(self) -> list[EditRequest] | None:
        size = int(self.data.get("eval_size", 100))
        return self._facts(self.data.get("eval", "validation"))[:size] if size else None

    def _facts(self, split: str, **options: Any) -> list[EditRequest]:
        name = self.data.get("dataset", "")
        if isinstance(name, list):
            parts = [load_edit_dataset(n, split=split, **options).remove_columns("id") for n in name]
            share = self.data.get("weights", [1 / len(parts)] * len(parts))
            return load_requests(interleave_datasets(parts, share, seed=0, stopping_strategy="all_exhausted"))
        if Path(str(name)).is_file():
            return load_requests(str(name))
        if "path" in self.data:
            options["path"] = self.data["path"]
        return load_requests(load_edit_dataset(str(name), split=split, **options).remove_columns("id"))
