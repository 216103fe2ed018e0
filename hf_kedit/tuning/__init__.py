"""Settings of a method for a model that nobody has tuned it for.

from hf_kedit import EditableModel, calibrate
config = calibrate(EditableModel.from_pretrained("org/model", "rome"), "rome")
"""

from __future__ import annotations

from .result import TriedSettings, TuneResult
from .scores import PairedGain, TuneScore
from .search import calibrate, search_settings

__all__ = ["TuneResult", "TriedSettings", "PairedGain", "TuneScore", "calibrate", "search_settings"]
