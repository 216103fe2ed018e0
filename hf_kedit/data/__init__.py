"""Edit requests as data: one table layout, loaders by name, and the synthetic fact world.

Example::

    from hf_kedit.data import load_edit_dataset, world_text
    requests = load_edit_dataset("world", split="test", limit=50)
"""

from __future__ import annotations

# Importing a module registers its datasets.
from . import (  # noqa: F401
    akew,
    counterfact,
    demonstrations,
    facts,
    fever,
    halluedit,
    knowedit,
    leme,
    mmedit,
    mquake,
    opinions,
    picture_requests,
    pitfalls,
    plus,
    qa_sets,
    ripple,
    sanitation,
    world_requests,
    zjunlp_sets,
    zsre,
)
from .conflicts import Conflict, find_conflicts
from .easyedit import from_easyedit, to_easyedit, to_easyedit_arguments
from .features import FEATURES, TASKS, blank, probe, row_from_request
from .loading import DatasetEntry, dataset_entry, dataset_names, load_edit_dataset, register_dataset, register_records
from .publishing import as_hub_parquet
from .report import LoadReport, load_report
from .sources import Source
from .world import World, get_world
from .world_text import world_text

__all__ = [
    "FEATURES",
    "TASKS",
    "Conflict",
    "DatasetEntry",
    "LoadReport",
    "Source",
    "World",
    "as_hub_parquet",
    "blank",
    "dataset_entry",
    "dataset_names",
    "find_conflicts",
    "from_easyedit",
    "get_world",
    "load_edit_dataset",
    "load_report",
    "probe",
    "register_dataset",
    "register_records",
    "row_from_request",
    "to_easyedit",
    "to_easyedit_arguments",
    "world_text",
]
