"""Settings with which an edit by any method takes a moment: it goes every way that others go, and learns little."""

from __future__ import annotations

from typing import Any

from hf_kedit import AutoEditConfig
from hf_kedit.config import EditConfig, config_class

SHORT = {"num_steps": 2, "v_num_grad_steps": 2, "num_epochs": 1, "n_iter": 2, "max_epochs": 2, "held_texts": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "anyedit": {"base": {"edit_type": "unke", "num_steps": 2, "held_texts": 2}},
    "auto": {"base": {"edit_type": "rome", "v_num_grad_steps": 2}},
    "kn": {"steps": 2},
    "simie": {"base": {"edit_type": "rome", "v_num_grad_steps": 2}},
    # as published: what is packaged for this model gives every edit a memory of its own
    "wise": {"n_iter": 2, "save_freq": 500, "merge_freq": 1000},
}


def short_config(name: str) -> EditConfig:
    """The config of a method for an edit that is made for its way, not for what comes of it."""
    known = config_class(name).__dataclass_fields__
    settings = SETTINGS.get(name) or {field: value for field, value in SHORT.items() if field in known}
    return AutoEditConfig.for_method(name, **settings)
