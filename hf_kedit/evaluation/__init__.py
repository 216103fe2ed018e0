"""Measuring edits: reliability, generalization, locality and portability, before and after.

from hf_kedit.evaluation import evaluate_edits
report = evaluate_edits(model, dataset, protocol=("teacher_forced", "generation"))
report.summary()["post"]
"""

from __future__ import annotations

from . import functional, scenarios
from .asking.generation import Continuation, Sampling, generate_answers
from .asking.scoring import PairScore, Unscored, score_pairs, try_score_pairs
from .hub_metrics import list_metrics, load_metric, write_space
from .measures import metrics
from .measures.abilities import ABILITIES as ABILITIES
from .measures.abilities import Ability, AbilityTask, load_ability
from .measures.classifiers import LabelJudge, make_judge
from .measures.distributions import locality_divergence, perplexity
from .measures.drift import weight_drift
from .measures.harness import HarnessTask
from .measures.judges import CallableJudge, ExactMatchJudge, HFModelJudge, Judge, OpenAICompatibleJudge
from .measures.knowledge import known_facts
from .measures.side_effects import SideEffectReport, SideEffects
from .protocols.base import PROTOCOLS, Generation, Protocol, TeacherForced, register_protocol
from .protocols.fluency import Fluency
from .protocols.judged import Judged
from .protocols.likelihood import Likelihood
from .report.comparison import Comparison
from .report.report import EvaluationReport
from .runs.bench import collect_bench, run_bench
from .runs.cache import PreEditCache
from .runs.evaluate import BeforeAndAfter, evaluate_edits
from .runs.folder import collect_report
from .runs.sweep import BenchPlan
from .scenarios import SCENARIOS, Scenario, load_scenario, register_scenario

__all__ = [
    "ABILITIES",
    "Ability",
    "AbilityTask",
    "BeforeAndAfter",
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
    "LabelJudge",
    "Likelihood",
    "OpenAICompatibleJudge",
    "PROTOCOLS",
    "PairScore",
    "PreEditCache",
    "Protocol",
    "Sampling",
    "SCENARIOS",
    "Scenario",
    "SideEffectReport",
    "SideEffects",
    "TeacherForced",
    "Unscored",
    "collect_bench",
    "collect_report",
    "evaluate_edits",
    "functional",
    "generate_answers",
    "known_facts",
    "list_metrics",
    "load_ability",
    "load_metric",
    "load_scenario",
    "locality_divergence",
    "make_judge",
    "metrics",
    "perplexity",
    "register_protocol",
    "register_scenario",
    "run_bench",
    "scenarios",
    "score_pairs",
    "try_score_pairs",
    "weight_drift",
    "write_space",
]
