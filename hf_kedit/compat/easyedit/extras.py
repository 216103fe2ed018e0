"""What EasyEdit's editors measure besides token accuracy, where an argument or a hyperparameter asks for it.

All of it is measured on the edited model and on the same model with its edits switched off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...engine.forward import frozen_eval
from ...errors import ConfigError, EvaluationError, check_choice
from ...evaluation import ExactMatchJudge, OpenAICompatibleJudge, Protocol, locality_divergence, score_pairs
from ...evaluation.asking.batching import stock_model
from ...evaluation.asking.scoring import encode_row, target_logits
from ...evaluation.functional import opinion_success, surprise_rate
from ...evaluation.protocols.judged import Judged
from ...evaluation.runs.plan import StepResult
from ...model import EditableModel
from ...requests import EditRequest
from .measures import test_generation_quality

Row = dict[str, Any]
ENDPOINT = "https://api.openai.com/v1"
JUDGE = "gpt-4o-mini"
SEPARATOR = "</s>"
"""What stands between question and opinion in the texts of their sentiment metrics."""
_EVALUATIONS = ("LLM-judge", "real-world", "generate-text")


def protocol_of(values: Mapping[str, Any]) -> str | Protocol:
    """The protocol that hyperparameters ask for.

    ``evaluation_type`` lets the model write, judged by an endpoint if ``api_key`` names the environment variable that
    holds its key, otherwise by comparing texts.

    Raises:
        ConfigError: for another evaluation, or if ``api_key`` is a key.
    """
    kind, key = values.get("evaluation_type"), values.get("api_key")
    if kind in (None, "", "traditional", "teacher-forcing"):
        return "teacher_forced"
    check_choice("evaluation_type", kind, _EVALUATIONS)
    if not key:
        return Judged(ExactMatchJudge(), prompt_format="qa")
    address, variable = str(values.get("api_base") or ENDPOINT), key_variable(key)
    return Judged(
        OpenAICompatibleJudge(address, str(values.get("judge_model") or JUDGE), variable), prompt_format="qa"
    )


def key_variable(key: Any) -> str:
    """The name of the environment variable that ``api_key`` has here.

    Raises:
        ConfigError: if it is a key.
    """
    if not str(key).isidentifier():
        raise ConfigError(
            "api_key: keys are taken from the environment only; put the key into a variable (OPENAI_API_KEY, say) and"
            " give its name here"
        )
    return str(key)


class Extras:
    """Measures cases while the model shows their edits, and adds the numbers to EasyEdit's rows.

    Args:
        model: that is edited.
        requests: of the cases.
        metric: ``"ppl"``, ``"ood_ppl"``; anything else: none of the two.
        opinions: per case the questions and opinions of EasyEdit's ``metric_kwargs``; ``None``: not measured.

    Raises:
        EvaluationError: if there are not as many ``opinions`` as requests.
    """

    def __init__(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        metric: str | None = None,
        opinions: Sequence[Mapping[str, Any]] | None = None,
    ):
        if opinions is not None and len(opinions) != len(requests):
            raise EvaluationError(f"metric_kwargs has {len(opinions)} entries for {len(requests)} requests")
        self.model, self.requests, self.opinions = model, requests, opinions
        self.metric = metric if metric in ("ppl", "ood_ppl") else None
        self._before: dict[int, Row] = {}
        self._after: dict[int, Row] = {}
        self._beside: dict[int, Row] = {}
        self._texts: dict[int, list[dict[str, Any]]] = {}

    def __call__(self, result: StepResult) -> None:
        """Measure the cases of a step."""
        for case in result.results:
            self._texts.setdefault(case.number, []).extend(case.texts)
        for number in dict.fromkeys(case.number for case in result.results):
            if self.metric is not None:
                with self.model.disable_edits():
                    self._before[number] = self._answers(self.requests[number])
                self._after[number] = self._answers(self.requests[number])
            if self.opinions is not None:
                self._beside[number] = opinion_metrics(self.model, self.opinions[number])

    def merge(self, rows: Sequence[Row]) -> None:
        """Add what was measured to EasyEdit's rows."""
        for row in rows:
            number = row["case_id"]
            row["pre"] |= self._before.get(number, {})
            row["post"] |= self._after.get(number, {})
            row |= self._beside.get(number, {})
            for text in self._texts.get(number, ()):
                if text["section"] in ("rewrite", "rephrase"):
                    for half in ("pre", "post"):
                        row[half].setdefault(f"{text['section']}_gen_content", text[half])

    def _answers(self, request: EditRequest) -> Row:
        """Perplexity of the answer behind each wording, or the share of its tokens that are expected."""
        row: Row = {}
        wordings = {"rewrite": [request.filled_prompt], "rephrase": request.rephrase_prompts}
        for section, prompts in wordings.items():
            pairs = [(prompt, request.target_new) for prompt in prompts]
            if pairs and self.metric == "ppl":
                scores = score_pairs(self.model, self._tokenizer, pairs, request.separator)  # type: ignore[arg-type]
                row[f"{section}_ppl"] = [math.exp(score.nll) for score in scores]
            elif pairs:
                row["ood_acc"] = [surprise_rate(self._losses(*pair, request.separator)) for pair in pairs]
        return row

    def _losses(self, prompt: str, target: str, separator: str | None) -> list[float]:
        """Negative log-likelihood of each target token, in nats."""
        base = stock_model(self.model)
        row = encode_row(base, self._tokenizer, prompt, target, separator)
        with frozen_eval(base), torch.inference_mode():
            logits = target_logits(base, self._tokenizer, [row])
            wanted = torch.tensor(row.target, device=logits.device)
            return torch.nn.functional.cross_entropy(logits, wanted, reduction="none").tolist()

    @property
    def _tokenizer(self) -> Any:
        return self.model.tokenizer


def opinion_metrics(model: EditableModel, texts: Mapping[str, Any]) -> Row:
    """Edit success, drawdown and fluency of EasyEdit's ``compute_sent_metric``.

    Args:
        model: with the edit.
        texts: ``inner_all_qa`` (question, `SEPARATOR`, opinion on the edited topic), ``inner_target`` and
            ``all_target`` (the attitude wanted, and that of each text), ``outer_all_qa`` (on another topic),
            ``inner_q`` (a question to write on).

    Returns:
        ``es`` (`opinion_success`), ``dd`` (mean KL divergence from the unedited model on the other topic, in nats),
        and ``fluency``.

    Raises:
        EvaluationError: if a key is missing, or all texts have one attitude.
    """
    tokenizer: Any = model.tokenizer
    try:
        inner, outer = _pairs(texts["inner_all_qa"]), _pairs(texts["outer_all_qa"])
        alike = [a == b for a, b in zip(texts["inner_target"], texts["all_target"], strict=True)]
        question = texts["inner_q"]
    except KeyError as error:
        raise EvaluationError(f"metric_kwargs lacks {error}") from error
    wanted = [pair for pair, same in zip(inner, alike, strict=True) if same]
    other = [pair for pair, same in zip(inner, alike, strict=True) if not same]
    base: Any = model
    with model.disable_edits():
        before = score_pairs(base, tokenizer, wanted)
    success = opinion_success(score_pairs(base, tokenizer, wanted), score_pairs(base, tokenizer, other), before)
    moved = locality_divergence(model, outer)
    prompts = [question] if isinstance(question, str) else list(question)
    fluent = test_generation_quality(model, tokenizer, prompts)
    return {"es": success, "dd": sum(moved) / len(moved) if moved else None, "fluency": fluent}


def _pairs(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Question and opinion of each text."""
    pairs = []
    for text in texts:
        question, separator, opinion = str(text).partition(SEPARATOR)
        if not separator:
            raise EvaluationError(f"{text!r} has no {SEPARATOR!r} between question and opinion")
        pairs.append((question.strip(), opinion.strip()))
    return pairs
