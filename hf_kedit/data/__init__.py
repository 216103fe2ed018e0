"""Edit requests as data: one table layout, loaders by name, and the synthetic fact world.

Example::

    from hf_kedit.data import load_edit_dataset, world_text
    requests = load_edit_dataset("world", split="test", limit=50)
"""

from __future__ import annotations

# Importing a module registers its datasets.
from hf_kedit.data import (
    akew,  # noqa: F401
    counterfact,  # noqa: F401
    fever,  # noqa: F401
    halluedit,  # noqa: F401
    knowedit,  # noqa: F401
    leme,  # noqa: F401
    mmedit,  # noqa: F401
    mquake,  # noqa: F401
    opinions,  # noqa: F401
    plus,  # noqa: F401
    qa_sets,  # noqa: F401
    ripple,  # noqa: F401
    sanitation,  # noqa: F401
    world_requests,  # noqa: F401
    zjunlp_sets,  # noqa: F401
    zsre,  # noqa: F401
)
from hf_kedit.data.conflicts import Conflict, find_conflicts
from hf_kedit.data.easyedit import from_easyedit, to_easyedit, to_easyedit_arguments
from hf_kedit.data.features import FEATURES, TASKS, blank, probe, row_from_request
from hf_kedit.data.loading import (
    DatasetEntry,
    dataset_entry,
    dataset_names,
    load_edit_dataset,
    register_dataset,
    register_records,
)
from hf_kedit.data.publishing import as_hub_parquet
from hf_kedit.data.report import LoadReport, load_report
from hf_kedit.data.sources import Source
from hf_kedit.data.world import World, get_world
from hf_kedit.data.world_text import world_text

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
