"""The fluency protocol: does the model still write varied text after the edit? N-gram entropy of continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import check_count
from ...tokens import context_length, encode_text
from ..asking.batching import TOKEN_BUDGET, is_encoder_decoder, stock_model
from ..asking.generation import Continuation, Sampling, generate_answers
from ..measures.texts import clean_for_fluency, ngram_entropy, word_tokenizer
from .base import Numbers, Output, Protocol, Query, Question, register_protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...requests import EditRequest


@register_protocol
@dataclass(frozen=True)
class Fluency(Protocol):
    """N-gram entropy, in bits, of a continuation together with its prompt; low means repetitive.

    The prompts are ``generation_prompts`` in the metadata of a request, else its own prompt. Texts are sampled with
    random numbers that depend on prompt and seed only, so that a run can be repeated and cut into pieces.

    Args:
        tokenizer: how words are split: ``treebank`` (the literature's; needs nltk), ``words`` or ``char``.
        max_total_tokens: length of prompt and continuation together.
        top_k: sample among so many tokens; 1 continues greedily.
        seed: of the sampling.
    """

    name: ClassVar[str] = "fluency"
    tokenizer: str = "treebank"
    max_total_tokens: int = 100
    top_k: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        word_tokenizer(self.tokenizer)("a word")  # a missing package is named now, not after the first edits
        check_count("max_total_tokens", self.max_total_tokens, 2)
        check_count("top_k", self.top_k)
        check_count("seed", self.seed, 0)

    @property
    def scorer(self) -> str:
        """Name of the metric, with the word tokenizer that it depends on."""
        return f"ngram_entropy ({self.tokenizer})"

    def questions(self, request: EditRequest) -> list[Question]:
        given = request.metadata.get("generation_prompts") or [request.filled_prompt]
        prompts = [given] if isinstance(given, str) else [str(p) for p in given]
        return [Question("fluency", None, i, prompt, ()) for i, prompt in enumerate(prompts)]

    def queries(self, question: Question) -> list[Query]:
        return [question.asked()]

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[Query],
        separator: str | None,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[Output]:
        model = stock_model(model)
        limit = context_length(model.config)
        total = self.max_total_tokens if limit is None else min(self.max_total_tokens, limit)
        sampling = None if self.top_k == 1 else Sampling(self.top_k, self.seed)
        lengths = {
            prompt: 0 if is_encoder_decoder(model) else len(encode_text(tokenizer, prompt).ids)
            for prompt in dict.fromkeys(query.prompt for query in queries)
        }
        room = {prompt: max(1, total - length) for prompt, length in lengths.items()}
        # One batch asks every row for the same number of new tokens; where that would push a longer prompt out of
        # the context, prompts of equal length go together.
        widest = max(lengths.values(), default=0) + max(room.values(), default=0)
        together = limit is None or widest <= limit
        groups: dict[int, list[str]] = {}
        for prompt in room:
            groups.setdefault(max(room.values()) if together else room[prompt], []).append(prompt)
        by_prompt: dict[str, Continuation] = {}
        for count, prompts in groups.items():
            answers = generate_answers(
                model, tokenizer, prompts, count, token_budget, cut_at_newline=False, sampling=sampling
            )
            for prompt, answer in zip(prompts, answers, strict=True):
                ids = answer.ids[: room[prompt]]
                text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
                by_prompt[prompt] = replace(answer, ids=ids, text=str(text))
        return [by_prompt[query.prompt] for query in queries]

    def accuracy(self, question: Question, outputs: Sequence[Continuation]) -> float | None:
        # The question's own prompt: what a method puts before it is not the model's text.
        return ngram_entropy(clean_for_fluency(question.prompt + outputs[0].text), self.tokenizer)

    def details(self, question: Question, outputs: Sequence[Continuation], score: float | None) -> Numbers:
        return {} if score is None else {("fluency", "ngram_entropy"): score}

    def agreement(self, before: Sequence[Continuation], after: Sequence[Continuation]) -> float:
        return float(before[0].text == after[0].text)

    def payload(self, outputs: Sequence[Continuation]) -> str:
        return outputs[0].text

    def why_unscored(self, question: Question) -> str:
        return "a text of fewer than three words has no n-gram entropy"

    def settings(self) -> dict[str, Any]:
        # The word tokenizer belongs to the score, not to the text, but stands in the report with the rest.
        return {
            "max_total_tokens": self.max_total_tokens,
            "top_k": self.top_k,
            "seed": self.seed,
            "word_tokenizer": self.tokenizer,
        }
