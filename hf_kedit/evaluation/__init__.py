"""Measuring edits: reliability, generalization, locality and portability, before and after.

from hf_kedit.evaluation import evaluate_edits
report = evaluate_edits(model, dataset, protocol=("teacher_forced", "generation"))
report.summary()["post"]
"""

from __future__ import annotations

from . import metrics
from .cache import PreEditCache
from .generation import Continuation, generate_answers
from .protocols import PROTOCOLS, Generation, Protocol, TeacherForced, register_protocol
from .report import EvaluationReport
from .runner import evaluate_edits
from .scoring import PairScore, Unscored, score_pairs, try_score_pairs

__all__ = [
    "PROTOCOLS",
    "Continuation",
    "EvaluationReport",
    "Generation",
    "PairScore",
    "PreEditCache",
    "Protocol",
    "TeacherForced",
    "Unscored",
    "evaluate_edits",
    "generate_answers",
    "metrics",
    "register_protocol",
    "score_pairs",
    "try_score_pairs",
]
