"""All metrics as pure functions, in one place. None of them needs the package `evaluate`, most not even a model.

`metrics` (one probe, aggregation), `texts` (words and n-grams), `likelihoods` (log-probabilities) and `drift`
(weights, cost) hold the code.
"""

from __future__ import annotations

from .distributions import Perplexity, locality_divergence, perplexity
from .drift import (
    collapse_state,
    drift_summary,
    efficiency,
    matrix_drift,
    nonfinite_share,
    weight_drift,
)
from .likelihoods import (
    counterfact_pair,
    counterfact_scores,
    divergence,
    drawdown,
    edit_success,
    harmonic_score,
    mean_perplexity,
    pooled_perplexity,
    surprise_rate,
)
from .metrics import (
    agreement,
    answer_score,
    axis_means,
    best_alias,
    case_mean,
    contains,
    dataset_mean,
    exact,
    f1,
    mean,
    normalise_answer,
    prefix_agreement,
    text_agreement,
    token_accuracy,
)
from .texts import (
    bleu,
    clean_for_fluency,
    consistency,
    entropy,
    fluency,
    ngram_entropy,
    rouge,
    token_f1,
    top_k_overlap,
)

__all__ = [
    "Perplexity",
    "agreement",
    "answer_score",
    "axis_means",
    "best_alias",
    "bleu",
    "case_mean",
    "clean_for_fluency",
    "collapse_state",
    "consistency",
    "contains",
    "counterfact_pair",
    "counterfact_scores",
    "dataset_mean",
    "divergence",
    "drawdown",
    "drift_summary",
    "edit_success",
    "efficiency",
    "entropy",
    "exact",
    "f1",
    "fluency",
    "harmonic_score",
    "locality_divergence",
    "matrix_drift",
    "mean",
    "mean_perplexity",
    "ngram_entropy",
    "nonfinite_share",
    "normalise_answer",
    "perplexity",
    "pooled_perplexity",
    "prefix_agreement",
    "rouge",
    "surprise_rate",
    "text_agreement",
    "token_accuracy",
    "token_f1",
    "top_k_overlap",
    "weight_drift",
]
