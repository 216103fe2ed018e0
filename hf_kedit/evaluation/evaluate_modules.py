"""The metrics as classes of Hugging Face's `evaluate`: thin wrappers around `functional`.

The only module that needs the optional package `evaluate`; `modules.load_metric` imports it when it is asked for, and
the scripts that `modules.write_space` writes import one class each. A variant of a metric (its ``config_name``)
decides the columns. `evaluate.combine` hands every metric the columns of all of them, hence the ``**_``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate

from ..errors import DataError, EvaluationError, check_choice
from ..requests import load_requests
from ..storage.parsing import parse_json
from .asking.batching import TOKEN_BUDGET
from .measures import likelihoods, metrics, texts
from .protocols.base import Protocol, resolve_protocols
from .report.summaries import means_of
from .runs.asked import Asked, queries_of
from .runs.plan import Case

_TEXT, _NUMBER = datasets.Value("string"), datasets.Value("float64")
_TEXTS, _IDS = datasets.List(_TEXT), datasets.List(datasets.Value("int64"))
_INTEGER = datasets.Value("int64")
_ACCURACIES = {"token": "token_acc", "exact": "exact_acc", "contains": "contains_acc", "f1": "f1_acc"}
"""Variant of `KeditAccuracy` → name of its number."""


class KeditMetric(evaluate.Metric):
    """Base class.

    Args:
        args: of ``evaluate.Metric``; the first is the variant (default: the first of `variants`).
        prefix: put before the names of the numbers, with an underscore.
        kwargs: of ``evaluate.Metric``, such as ``cache_dir`` or ``keep_in_memory``.

    Raises:
        EvaluationError: for an unknown variant; the nearest known one is given.
    """

    variants: ClassVar[dict[str, dict[str, Any]]]
    """Name of a variant → column → type."""
    example: ClassVar[dict[str, Any]] = {}
    """Columns of the first variant, for the documentation and the tests."""

    def __init__(self, *args: Any, prefix: str | None = None, **kwargs: Any):
        self.prefix = prefix  # before super(), which calls _info()
        super().__init__(*args, **kwargs)

    @property
    def variant(self) -> str:
        """Name of the variant; ``evaluate`` calls the first one "default"."""
        if self.config_name == "default":
            return next(iter(self.variants))
        check_choice(f"variant of {type(self).__name__}", self.config_name, self.variants)
        return self.config_name

    def _info(self) -> Any:
        columns = self.variants[self.variant]
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=f"\n\nColumns of the variant {self.variant!r}: {', '.join(columns)}.",
            features=datasets.Features(columns),
        )

    def _compute(self, **columns: Any) -> dict[str, Any]:
        numbers = self.numbers(**columns)
        return {f"{self.prefix}_{k}": v for k, v in numbers.items()} if self.prefix else numbers

    def numbers(self, *args: Any, **columns: Any) -> dict[str, Any]:
        """The numbers of these columns."""
        raise NotImplementedError


class KeditAccuracy(KeditMetric):
    """Whether answers are right: token ids, or texts (`exact`, `contains`, `f1`) with several references."""

    variants: ClassVar = {
        "token": {"predictions": _IDS, "references": _IDS},
        **{scorer: {"predictions": _TEXT, "references": _TEXTS} for scorer in metrics.ANSWER_SCORERS},
    }
    example: ClassVar = {"predictions": [[1, 2], [3]], "references": [[1, 9], [3]]}

    def numbers(self, predictions: Sequence[Any], references: Sequence[Any], **_: Any) -> dict[str, Any]:
        pairs = list(zip(predictions, references, strict=True))
        if self.variant == "token":
            scores = [metrics.token_accuracy(predicted, wanted) for predicted, wanted in pairs]
        else:
            scorer = metrics.answer_scorer(self.variant)
            scores = [max((scorer(text, answer) for answer in answers), default=0.0) for text, answers in pairs]
        return {_ACCURACIES[self.variant]: metrics.mean(scores), "n": len(scores)}


class KeditLocality(KeditMetric):
    """How far an edited model (predictions) says what the unedited one said (references): token ids, or texts."""

    variants: ClassVar = {
        "token": {"predictions": _IDS, "references": _IDS},
        "text": {"predictions": _TEXT, "references": _TEXT},
    }
    example: ClassVar = {"predictions": [[1, 2]], "references": [[1, 3]]}

    def numbers(self, predictions: Sequence[Any], references: Sequence[Any], **_: Any) -> dict[str, Any]:
        compare = metrics.agreement if self.variant == "token" else metrics.text_agreement
        scores = [compare(before, after) for before, after in zip(references, predictions, strict=True)]
        return {"locality_agreement": metrics.mean(scores), "n": len(scores)}


class KeditCounterfact(KeditMetric):
    """ES, PS, NS, EM, PM, NM and S from negative log-likelihoods per token of the new and the true answer.

    A row is a prompt: its case, its kind (``rewrite``, ``paraphrase``, ``neighborhood``), and the two values.
    """

    variants: ClassVar = {
        "default": {"case_id": _INTEGER, "kind": _TEXT, "nll_new": _NUMBER, "nll_true": _NUMBER},
    }
    example: ClassVar = {
        "case_id": [0, 0, 0],
        "kind": ["rewrite", "paraphrase", "neighborhood"],
        "nll_new": [1.0, 3.0, 3.0],
        "nll_true": [2.0, 2.0, 2.0],
    }

    def numbers(
        self,
        case_id: Sequence[int],
        kind: Sequence[str],
        nll_new: Sequence[float],
        nll_true: Sequence[float],
        **_: Any,
    ) -> dict[str, Any]:
        cases: dict[int, dict[str, list[tuple[float, float]]]] = {}
        for case, name, new, true in zip(case_id, kind, nll_new, nll_true, strict=True):
            if name not in likelihoods.COUNTERFACT_NAMES:
                raise EvaluationError(f"unknown kind {name!r}; use {', '.join(likelihoods.COUNTERFACT_NAMES)}")
            cases.setdefault(case, {}).setdefault(name, []).append((new, true))
        return {**likelihoods.counterfact_scores(list(cases.values())), "n": len(cases)}


class KeditFluency(KeditMetric):
    """Weighted entropy of bigrams and trigrams of texts (with their prompts), in bits; low means repetitive."""

    variants: ClassVar = {tokenizer: {"predictions": _TEXT} for tokenizer in texts.WORD_TOKENIZERS}
    example: ClassVar = {"predictions": ["The old bridge was closed for the winter.", "la la la la"]}

    def numbers(self, predictions: Sequence[str], **_: Any) -> dict[str, Any]:
        return dict(texts.fluency(predictions, self.variant))


class KeditConsistency(KeditMetric):
    """Cosine of TF-IDF vectors of generated texts and of reference texts (the reference score RS of CounterFact).

    ``compute(…, vectorizer=folder)`` names the folder with ``tfidf_vocab.json`` and ``idf.npy`` of the CounterFact
    release; without it, words are weighted equally and all of the references' words are known.
    """

    variants: ClassVar = {"default": {"predictions": _TEXTS, "references": _TEXTS}}
    example: ClassVar = {
        "predictions": [["He works in Rome."]],
        "references": [["She lives in Rome.", "Rome is old."]],
    }

    def numbers(
        self, predictions: Sequence[Any], references: Sequence[Any], vectorizer: str | None = None, **_: Any
    ) -> dict[str, Any]:
        scores = []
        for written, given in zip(predictions, references, strict=True):
            vocabulary, idf = texts.equal_weights(given) if vectorizer is None else texts.read_vectorizer(vectorizer)
            scores.append(texts.consistency(written, given, vocabulary, idf))
        return {"reference_score": metrics.mean(scores), "n": len(scores)}


class KeditPerplexity(KeditMetric):
    """Pooled and mean perplexity from negative log-likelihoods per token and numbers of tokens of texts."""

    variants: ClassVar = {"default": {"nll": _NUMBER, "n_tokens": _INTEGER}}
    example: ClassVar = {"nll": [1.0, 3.0], "n_tokens": [30, 10]}

    def numbers(self, nll: Sequence[float], n_tokens: Sequence[int], **_: Any) -> dict[str, Any]:
        scored = [value for value, n in zip(nll, n_tokens, strict=True) if n]
        return {
            "perplexity_pooled": likelihoods.pooled_perplexity(nll, n_tokens),
            "perplexity_mean": likelihoods.mean_perplexity(scored),
            "n": len(scored),
        }


class KeditSentiment(KeditMetric):
    """Edit success (ES) of sentiment and personality edits, from mean log-probabilities per token.

    Of texts with the wanted attitude and with others under the edited model, and of the wanted ones before the edit.
    """

    variants: ClassVar = {"default": {"wanted": _NUMBER, "unwanted": _NUMBER, "wanted_before": _NUMBER}}
    example: ClassVar = {"wanted": [-1.0], "unwanted": [-3.0], "wanted_before": [-2.0]}

    def numbers(
        self, wanted: Sequence[float], unwanted: Sequence[float], wanted_before: Sequence[float], **_: Any
    ) -> dict[str, Any]:
        rows = zip(wanted, unwanted, wanted_before, strict=True)
        scores = [likelihoods.edit_success(*row) for row in rows]
        return {"edit_success": metrics.mean(scores), "n": len(scores)}


class KeditTextOverlap(KeditMetric):
    """ROUGE-1, -2 and -L (F and recall; the best reference counts), or BLEU."""

    variants: ClassVar = {score: {"predictions": _TEXT, "references": _TEXTS} for score in ("rouge", "bleu")}
    example: ClassVar = {"predictions": ["the cat sat"], "references": [["a dog", "the cat sat down"]]}

    def numbers(self, predictions: Sequence[str], references: Sequence[Any], **_: Any) -> dict[str, Any]:
        pairs = list(zip(predictions, references, strict=True))
        if self.variant == "bleu":
            return {"bleu": metrics.mean(texts.bleu(text, answers) for text, answers in pairs), "n": len(pairs)}
        best = [
            max((texts.rouge(text, answer) for answer in answers), key=lambda score: score["rougeL"]["f"])
            for text, answers in pairs
        ]
        numbers: dict[str, Any] = {}
        for name in ("rouge1", "rouge2", "rougeL"):
            numbers[name] = metrics.mean(score[name]["f"] for score in best)
            numbers[f"{name}_recall"] = metrics.mean(score[name]["recall"] for score in best)
        return {**numbers, "n": len(pairs)}


class Kedit(KeditMetric):
    """Reliability, generalization, locality (accuracy) and portability of a model as it is, on edit requests.

    ``compute(requests=[…], model=model, tokenizer=tokenizer, protocol="teacher_forced")``. A request is a JSON text
    with the fields of `hf_kedit.EditRequest`. Nothing is edited: call it before and after an edit. Agreement of
    before and after is the business of `hf_kedit.evaluate_edits`.
    """

    variants: ClassVar = {"default": {"requests": _TEXT}}

    def numbers(
        self,
        requests: Sequence[str],
        model: Any = None,
        tokenizer: Any = None,
        protocol: str | Protocol = "teacher_forced",
        **_: Any,
    ) -> dict[str, Any]:
        if model is None or tokenizer is None:
            raise EvaluationError("the metric 'kedit' asks a model: compute(requests=…, model=…, tokenizer=…)")
        (chosen,) = resolve_protocols(protocol)
        given = load_requests([parse_json(text, f"request {i}", DataError) for i, text in enumerate(requests)])
        cases = [Asked(Case(number, request), chosen) for number, request in enumerate(given)]
        queries = queries_of(cases)
        answers = dict(zip(queries, chosen.run(model, tokenizer, queries, None, TOKEN_BUDGET), strict=True))
        for case in cases:
            case.answer(answers, answers)
        halves = [case.result("now").pre for case in cases]
        means, _counts = means_of(halves, pre=True)
        return {**{k: v for k, v in means.items() if isinstance(v, float)}, "n": len(cases)}
