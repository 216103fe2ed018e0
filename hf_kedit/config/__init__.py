"""`EditConfig`: the hyperparameters of an editing method; read from files, found for a model, taken from EasyEdit."""

from __future__ import annotations

from .base import (
    CONFIG_NAME,
    AutoEditConfig,
    EditConfig,
    ModelProfile,
    config_class,
    normalise,
    read_mapping,
    register_config,
)

__all__ = [
    "CONFIG_NAME",
    "AutoEditConfig",
    "EditConfig",
    "ModelProfile",
    "config_class",
    "normalise",
    "read_mapping",
    "register_config",
]
