"""Measuring edits: reliability, generalization, locality and portability, before and after.

from hf_kedit.evaluation import evaluate_edits
report = evaluate_edits(model, dataset, protocol=("teacher_forced", "generation"))
report.summary()["post"]
"""

from __future__ import annotations

from . import functional, metrics, scenarios
from .abilities import TASKS as ABILITIES
from .abilities import Ability, AbilityTask, load_ability
from .bench import BenchPlan, collect_bench, run_bench
from .cache import PreEditCache
from .comparison import Comparison
from .distributions import locality_divergence, perplexity
from .drift import weight_drift
from .fluency import Fluency
from .generation import Continuation, Sampling, generate_answers
from .harness import HarnessTask
from .judges import CallableJudge, ExactMatchJudge, HFModelJudge, Judge, OpenAICompatibleJudge
from .judging import Judged
from .likelihood import Likelihood
from .modules import list_metrics, load_metric, write_space
from .protocols import PROTOCOLS, Generation, Protocol, TeacherForced, register_protocol
from .report import EvaluationReport
from .runfolder import collect_report
from .runner import evaluate_edits
from .scoring import PairScore, Unscored, score_pairs, try_score_pairs

__all__ = [
    "ABILITIES",
    "Ability",
    "AbilityTask",
    "BenchPlan",
    "CallableJudge",
    "Comparison",
    "Continuation",
    "EvaluationReport",
    "ExactMatchJudge",
    "Fluency",
    "Generation",
    "HFModelJudge",
    "HarnessTask",
    "Judge",
    "Judged",
    "Likelihood",
    "OpenAICompatibleJudge",
    "PROTOCOLS",
    "PairScore",
    "PreEditCache",
    "Protocol",
    "Sampling",
    "TeacherForced",
    "Unscored",
    "collect_bench",
    "collect_report",
    "evaluate_edits",
    "functional",
    "generate_answers",
    "list_metrics",
    "load_ability",
    "load_metric",
    "locality_divergence",
    "metrics",
    "perplexity",
    "register_protocol",
    "run_bench",
    "scenarios",
    "score_pairs",
    "try_score_pairs",
    "weight_drift",
    "write_space",
]
