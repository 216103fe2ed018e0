"""Edit requests as data: one table layout, loaders by name, and the synthetic fact world.

Example::

    from hf_kedit.data import load_edit_dataset, world_text
    requests = load_edit_dataset("world", split="test", limit=50)
"""

from __future__ import annotations

from hf_kedit.data import world_requests as _world_requests  # noqa: F401  (registers "world")
from hf_kedit.data.features import FEATURES, TASKS, blank, probe, row_from_request
from hf_kedit.data.loading import dataset_entry, dataset_names, load_edit_dataset, register_dataset
from hf_kedit.data.world import World, get_world
from hf_kedit.data.world_text import world_text

__all__ = [
    "FEATURES",
    "TASKS",
    "World",
    "blank",
    "dataset_entry",
    "dataset_names",
    "get_world",
    "load_edit_dataset",
    "probe",
    "register_dataset",
    "row_from_request",
    "world_text",
]
