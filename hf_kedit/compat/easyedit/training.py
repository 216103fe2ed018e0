"""EasyEdit's files on how an editor is trained, as plans of `kedit train`, and its `EditTrainer` on top of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...config import config_class, normalise
from ...config.easyedit import NOT_CARRIED_OVER, VALUES, module_names
from ...errors import ConfigError, nearest
from ...model import EditableModel
from ...requests import EditRequest
from ...training.data import EditFacts, OpinionFacts
from ...training.plan import TrainingPlan, train_and_save
from .facts import Facts
from .hparams import HyperParams, values_of

METHODS = {"mend": "mend", "mend-multi": "mend", "serac": "serac", "serac-multi": "serac", "ke": "ke"}
METHODS |= {"malmen": "malmen", "instructedit": "instructedit"}

# Their key → field of the editor's config, where the config has it.
EDITOR = {
    "cedit": "edit_weight",
    "cloc": "locality_weight",
    "loc_coef": "locality_weight",
    "edit_lr": "edit_lr",
    "rank": "rank",
    "shared": "shared",
    "combine": "combine",
    "n_blocks": "num_blocks",
    "editor_batch_size": "rows",
    "token": "token",
    "small_name": "small_model",
    "cls_name": "encoder",
    "soft_weighting": "soft",
    "use_all_negatives": "all_negatives",
}
# Their key → training argument.
TRAINING = {
    "lr": "learning_rate",
    "lr_lr": "step_size_lr",
    "meta_lr": "learning_rate",
    "grad_clip": "max_grad_norm",
    "max_grad_norm": "max_grad_norm",
    "accumulate_bs": "gradient_accumulation_steps",
    "batch_size": "per_device_train_batch_size",
    "val_batch_size": "per_device_eval_batch_size",
    "n_edits": "edits_per_group",
    "max_epochs": "num_train_epochs",
    "seed": "seed",
}
# They count forward passes; an optimiser step here is ``accumulate_bs`` of them.
STEPS = {"max_iters": "max_steps", "log_interval": "logging_steps", "val_interval": "eval_steps"}
STEPS["model_save_pt"] = "save_steps"

_PICTURES = (
    "of pictures: the plan trains on texts; name a set with pictures (mmedit/vqa, mmedit/caption) in its `data`"
)
_PUBLISHED = "the networks are built as published"
_LOOP = "how long is trained, what is shown and what is kept say the training arguments"
REASONS = {
    **dict.fromkeys(("qformer_checkpoint", "qformer_name_or_path", "state_dict_file", "pretrained_ckpt"), _PICTURES),
    **dict.fromkeys(("coco_image", "rephrase_image", "iedit", "exact_match", "freeze_qformer"), _PICTURES),
    **dict.fromkeys(("n_hidden", "hidden_dim", "init", "norm", "x_only", "delta_only", "act"), _PUBLISHED),
    **dict.fromkeys(("mlp_class", "one_sided", "no_grad_layers", "dropout", "cos", "square"), _PUBLISHED),
    **dict.fromkeys(("bound_embeds", "cross_attend", "dist_heads", "cls_class", "freeze", "lora"), _PUBLISHED),
    **dict.fromkeys(("early_stop_patience", "early_stop_key", "silent", "verbose", "debug", "save"), _LOOP),
    **dict.fromkeys(("eval_only", "final_eval", "eval_log_interval", "log_errors", "opt", "edit_bs"), _LOOP),
    "train_base": "the model itself is never trained",
    "cbase": "the model itself is never trained",
    "archive": "training goes on with `kedit train --resume`; `kedit convert-editor` reads a finished archive",
}


@dataclass
class ConvertedPlan:
    """A training file of EasyEdit in this library's terms.

    Args:
        plan: content of a plan of ``kedit train``.
        ignored: key → why its value does not count here.
    """

    plan: dict[str, Any]
    ignored: dict[str, str] = field(default_factory=dict)


def convert_training(source: str | Path | Mapping[str, Any]) -> ConvertedPlan:
    """Read a file of EasyEdit's that says how an editor is trained.

    Their scripts name the facts, not the file: the plan trains on ZsRE, as most of them do.

    Args:
        source: YAML or JSON file (``.yaml`` may be left out), or its content.

    Raises:
        ConfigError: if the file cannot be read, names no model or no method whose editor is trained here, or a value
            is unusable.
    """
    values = dict(source) if isinstance(source, Mapping) else values_of(HyperParams.from_hparams(source))
    method = _method(values)
    # A file for an image-text model has the language model under `name`.
    model = values.pop("name", None) or values.get("model_name")
    values.pop("model_name", None)
    if not isinstance(model, str):
        raise ConfigError("the hyperparameters name no model (model_name)")
    defaults: Any = config_class(method)()
    editor: dict[str, Any] = {}
    training: dict[str, Any] = {}
    ignored: dict[str, str] = {}
    passes = max(1, _whole(values, "accumulate_bs", 1))
    for key, value in values.items():
        # MALMEN's `lr` is the step size of the editor, its `meta_lr` that of the training.
        name = "edit_lr" if method == "malmen" and key == "lr" else EDITOR.get(key)
        if value is None or value == [] or key in ("results_dir", "val_steps", "half"):
            continue
        if key == "inner_params" and hasattr(defaults, "modules") and method != "serac":
            editor["modules"] = module_names(value)
        elif name is not None and hasattr(defaults, name):
            editor[name] = VALUES.get(method, {}).get(name, {}).get(value, value)
        elif key in TRAINING:
            training[TRAINING[key]] = _number(value)
        elif key in STEPS:
            training[STEPS[key]] = max(1, math.ceil(_whole(values, key, 1) / passes))
        else:
            ignored[key] = (
                REASONS.get(key) or NOT_CARRIED_OVER.get(key) or f"{type(defaults).__name__} has no such field"
            )
    if method in ("mend", "instructedit") and _whole(values, "n_hidden", 1) != defaults.num_blocks - 1:
        editor["num_blocks"] = _whole(values, "n_hidden", 1) + 1
        del ignored["n_hidden"]
    if "encoder" in editor:
        editor["pooling"] = "first"  # as published with the encoder that they name
    training["output_dir"] = str(Path(str(values.get("results_dir") or "results")) / "models" / method)
    if "eval_steps" in training:
        training["eval_strategy"] = "steps"
    plan = {
        "model": model,
        "method": method,
        "data": {"dataset": "zsre", "train": "train", "eval": "test", "eval_size": _whole(values, "val_steps", 100)},
        "editor": dict(_numbers(defaults, editor)),
        "training": training,
    }
    if values.get("half"):
        plan["dtype"] = "bfloat16"  # in fp16 the gradients that an editor reads are lost
    ignored["data"] = "the file names none; the plan trains on ZsRE: change its `data`"
    return ConvertedPlan(plan, ignored)


def _method(values: dict[str, Any]) -> str:
    name = values.pop("alg", None) or values.get("alg_name")
    values.pop("alg_name", None)
    if not isinstance(name, str) or normalise(name) not in METHODS:
        known = ", ".join(sorted({m.upper() for m in METHODS.values()}))
        raise ConfigError(
            f"alg {name!r} is no method whose editor is trained here.{nearest(str(name), METHODS)} {known}"
        )
    return METHODS[normalise(name)]


def _number(value: Any) -> Any:
    """YAML takes ``1e-6`` for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _whole(values: Mapping[str, Any], key: str, default: int) -> int:
    value = values.get(key)
    try:
        return default if value is None else int(float(value))
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{key} must be a number, not {value!r}") from error


def _numbers(defaults: Any, editor: Mapping[str, Any]) -> Mapping[str, Any]:
    """The editor's fields as its config reads them: ``1e-4``, which YAML takes for text, is a number."""
    config = type(defaults).from_dict(dict(editor))
    return {name: getattr(config, name) for name in editor}


class EditTrainer:
    """EasyEdit's trainer on top of ours: trains the editor that the hyperparameters describe, and keeps it.

    Args:
        config: of a training file.
        train_set: facts to train on.
        val_set: facts to measure on; ``None``: nothing is measured.

    Raises:
        ConfigError: as `convert_training`.
    """

    def __init__(self, config: HyperParams, train_set: Facts, val_set: Facts | None = None):
        self.config = config
        converted = convert_training(values_of(config))
        if val_set is None:
            converted.plan["training"] |= {"eval_strategy": "no"}
        self.plan = TrainingPlan(**converted.plan)
        size = int(self.plan.data["eval_size"])
        held_out = None if val_set is None else self._facts(val_set.requests()[:size], False)
        self.trainer = self.plan.trainer(self._facts(train_set.requests(), True), held_out)

    def _facts(self, requests: Sequence[EditRequest], training: bool) -> Sequence[EditRequest] | EditFacts:
        """What is trained on, or measured on."""
        return requests

    def run(self) -> dict[str, float]:
        """Train, measure, and write the editor to ``results_dir``; what was measured."""
        return train_and_save(self.trainer)

    @cached_property
    def model(self) -> EditableModel:
        """The base model with the method and the editor that `run` has trained."""
        config: Any = config_class(self.plan.method).from_dict({"editor": str(self.trainer.args.output_dir)})
        return EditableModel(self.trainer.model.base, config, self.trainer.processing_class)  # type: ignore[arg-type]


class PEREditTrainer(EditTrainer):
    """EasyEdit's trainer of editors of personality: on opinions (`OpinionFacts`)."""

    def _facts(self, requests: Sequence[EditRequest], training: bool) -> Sequence[EditRequest] | EditFacts:
        return OpinionFacts(requests, int(self.plan.training.get("seed", 0)), unlikelihood=training)
