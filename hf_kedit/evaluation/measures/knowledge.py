"""Which facts a model knows: asked one greedy continuation each, before anything is edited."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from ...data.extra import extra_of
from ...errors import EvaluationError
from ...requests import EditRequest
from ..asking.batching import TOKEN_BUDGET
from ..asking.generation import PromptFormat, generate_answers
from .metrics import answer_score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 10
"""Enough for a name, too few to come across the answer by rambling."""


def known_facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    *,
    questions: bool = False,
    at_once: bool = False,
    prompt_format: PromptFormat = "raw",
    max_new_tokens: int = NEW_TOKENS,
    token_budget: int = TOKEN_BUDGET,
) -> list[bool]:
    """Tell for each request whether the model gives one of its old or true answers (``ground_truth``).

    A fact counts as known if one of the answers occurs, as whole words, in a short greedy continuation; of facts that
    are then shown to people with the continuation, ``at_once``.

    Args:
        model: causal or encoder-decoder language model, as it is.
        tokenizer: of the model.
        requests: with at least one answer each.
        questions: ask the first question that the request brings along (``metadata["extra"]["questions"]``, or
            ``metadata["questions"]``) instead of continuing the prompt.
        at_once: only what a continuation begins with counts, to the letter.
        prompt_format: see `generate_answers`; ``"chat"`` or ``"qa"`` go with questions.
        max_new_tokens: of a continuation.
        token_budget: padded tokens per batch.

    Raises:
        EvaluationError: if a request has no answer, or no question where one is to be asked.
    """
    prompts = []
    for request in requests:
        if not request.ground_truth:
            raise EvaluationError(f"there is no answer to compare with for {request.filled_prompt!r} (ground_truth)")
        prompts.append(_question(request) if questions else request.filled_prompt)
    answers = generate_answers(
        model, tokenizer, prompts, max_new_tokens, token_budget=token_budget, prompt_format=prompt_format
    )
    scorer: str | Callable[[str, str], float] = _begins_with if at_once else "contains"
    return [
        answer_score(answer.text, [request.ground_truth], scorer=scorer) == 1.0
        for request, answer in zip(requests, answers, strict=True)
    ]


def _begins_with(text: str, answer: str) -> float:
    return float(text.startswith(answer))


class _Questions(TypedDict, total=False):
    questions: list[str] | None


def _question(request: EditRequest) -> str:
    beside = request.metadata.get("questions")
    asked = extra_of(request, _Questions).get("questions") or (beside if isinstance(beside, list) else None)
    if not asked:
        raise EvaluationError(f"there is no question to ask for {request.filled_prompt!r}")
    return str(asked[0])
