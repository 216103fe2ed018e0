"""Scenarios: from a file of edits to a report that answers a practical question, one file each.

Importing this package registers them all. The metrics that they rest on, functions on texts and scores, are exported
here too.
"""

from __future__ import annotations

import importlib
import pkgutil

from ..measures.scenarios import (
    Classifier,
    MultiHopCase,
    UnsafeScorer,
    ccks_score,
    closer_definition,
    distinct_ngrams,
    embedding_similarity,
    first_sentence,
    forget_scores,
    instance_change,
    lifelong_scores,
    mean_log_probability,
    membership_prompt,
    multi_hop_scores,
    opinion_success,
    personality_scores,
    ranked_agreement,
    refusal_rate,
    repetition_rate,
    safety_prompts,
    safety_scores,
    sequence_classifier,
    unsafe_scorer,
    yes_or_no,
)
from .base import SCENARIOS, Scenario, load_scenario, register_scenario

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "SCENARIOS",
    "Classifier",
    "MultiHopCase",
    "Scenario",
    "UnsafeScorer",
    "ccks_score",
    "closer_definition",
    "distinct_ngrams",
    "embedding_similarity",
    "first_sentence",
    "forget_scores",
    "instance_change",
    "lifelong_scores",
    "load_scenario",
    "mean_log_probability",
    "membership_prompt",
    "multi_hop_scores",
    "opinion_success",
    "personality_scores",
    "ranked_agreement",
    "refusal_rate",
    "register_scenario",
    "repetition_rate",
    "safety_prompts",
    "safety_scores",
    "sequence_classifier",
    "unsafe_scorer",
    "yes_or_no",
]
