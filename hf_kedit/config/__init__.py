"""`EditConfig`: the hyperparameters of an editing method; read from files, found for a model, taken from EasyEdit."""

from __future__ import annotations

from ..registry import normalise
from .base import (
    CONFIG_NAME,
    AutoEditConfig,
    BoundedConfig,
    EditConfig,
    ModelProfile,
    StoppingConfig,
    UnlearningConfig,
    WeightConfig,
    adam_step,
    coerce_fields,
    config_class,
    register_config,
)
from .hparams import read_mapping

__all__ = [
    "CONFIG_NAME",
    "AutoEditConfig",
    "BoundedConfig",
    "EditConfig",
    "ModelProfile",
    "StoppingConfig",
    "UnlearningConfig",
    "WeightConfig",
    "adam_step",
    "coerce_fields",
    "config_class",
    "normalise",
    "read_mapping",
    "register_config",
]
