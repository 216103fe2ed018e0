"""The scoring core: teacher-forced scores of many (prompt, target) pairs in few forward passes.

Takes a stock transformers model (or an `EditableModel`, whose base model is used) and texts, and returns plain
Python values. Results do not depend on the batch size, on the order of the input, or on the padding side of the
tokenizer, which is never changed. This module knows nothing of edits, cases or metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...books.sites import prompt_lengths
from ...engine.forward import Positions, accepts, decoder_start, device_of, frozen_eval, gather_logits
from ...errors import EvaluationError, RequestError
from ...remote.model import RemoteModel
from ...tokens import (
    as_ids,
    context_length,
    decoder_lead,
    encode_pair,
    encode_target,
    encode_text,
    pad_id,
    pad_rows,
    prompt_ids,
    separator_between,
    vocabulary_size,
)
from .batching import (
    TOKEN_BUDGET,
    cut_left,
    is_encoder_decoder,
    make_batches,
    shown_batches,
    stand_in_bos,
    stock_model,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGIT_BUDGET = 2**27
"""Largest number of logits that one forward pass may produce (vocabulary × positions)."""


@dataclass(frozen=True)
class PairScore:
    """How a model answers when the target is fed to it (teacher forcing).

    Args:
        prompt: text before the target.
        target: the text that was fed.
        target_ids: its T token ids.
        pred_ids: most probable id at each of these positions; -1 where the logits were not finite.
        token_acc: share of positions where both agree.
        exact: whether all agree.
        nll: mean negative log-probability per target token, in nats.
        sum_nll: the sum over the target tokens.
        truncated: number of prompt tokens that were cut off at the left to fit the model's context.
    """

    prompt: str
    target: str
    target_ids: tuple[int, ...]
    pred_ids: tuple[int, ...]
    token_acc: float
    exact: bool
    nll: float
    sum_nll: float
    truncated: int = 0

    @property
    def probability(self) -> float:
        """Of the whole target behind the prompt."""
        return math.exp(-self.sum_nll)


@dataclass(frozen=True)
class Unscored:
    """A text that cannot be scored, and why."""

    prompt: str
    target: str | None
    reason: str


@dataclass(frozen=True)
class Predicted:
    """What a model predicts where the tokens of a fed target stand.

    Args:
        prompt: text before the target.
        target: the text that was fed.
        target_ids: its T token ids.
        log_probs: ``[T, vocab]``, fp16, in the CPU's memory.
    """

    prompt: str
    target: str
    target_ids: tuple[int, ...]
    log_probs: torch.Tensor


@dataclass(frozen=True)
class TargetRow:
    """Token ids of one pair: what is fed, where the target's logits begin, and the target."""

    inputs: tuple[int, ...]
    decoder: tuple[int, ...] | None
    first: int
    target: tuple[int, ...]
    truncated: int

    @property
    def width(self) -> int:
        return len(self.inputs) + len(self.decoder or ())

    @property
    def columns(self) -> range:
        return range(self.first, self.first + len(self.target))


# ---------------------------------------------------------------------- teacher forcing


def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    separator: str | None = None,
    token_budget: int = TOKEN_BUDGET,
    *,
    max_batch_rows: int | None = None,
) -> list[PairScore]:
    """Score (prompt, target) pairs by teacher forcing.

    Equal pairs are computed once. Rows are sorted by length and packed into batches by a token budget; only the
    logits at target positions are kept, in float32.

    Args:
        model: causal or encoder-decoder language model; put into evaluation mode meanwhile.
        tokenizer: of the model; not changed.
        pairs: (prompt, target) texts.
        separator: text between them; ``None``: one space where it belongs (see `separator_between`). Without
            effect on encoder-decoder models, where the target goes to the decoder.
        token_budget: padded tokens per forward pass.
        max_batch_rows: upper bound of the rows per forward pass.

    Returns:
        One score per pair, in the order of ``pairs``.

    Raises:
        EvaluationError: if a pair cannot be scored (`try_score_pairs` returns the reason instead).
    """
    results = try_score_pairs(
        model,
        tokenizer,
        pairs,
        separator,
        token_budget,
        max_batch_rows=max_batch_rows,
    )
    scores: list[PairScore] = []
    for i, result in enumerate(results):
        if isinstance(result, Unscored):
            raise EvaluationError(f"pair {i} ({result.prompt!r}, {result.target!r}): {result.reason}")
        scores.append(result)
    return scores


def try_score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    separator: str | None = None,
    token_budget: int = TOKEN_BUDGET,
    *,
    max_batch_rows: int | None = None,
) -> list[PairScore | Unscored]:
    """Do what `score_pairs` does, with an `Unscored` in the place of each pair that cannot be scored."""
    model = stock_model(model)
    if isinstance(model, RemoteModel):
        return _ask_remote(model, pairs, separator)
    results: dict[tuple[str, str], PairScore | Unscored] = {}
    rows: dict[tuple[str, str], TargetRow] = {}
    for prompt, target in dict.fromkeys((p, t) for p, t in pairs):
        try:
            rows[prompt, target] = encode_row(model, tokenizer, prompt, target, separator)
        except RequestError as error:
            results[prompt, target] = Unscored(prompt, target, str(error))
    at_targets = accepts(model, "logits_to_keep")

    def positions(pair: tuple[str, str]) -> int:
        # Logits are computed at the targets only where the model can do that, else everywhere.
        row = rows[pair]
        return len(row.target) if at_targets else len(row.decoder or row.inputs)

    batches = make_batches(
        rows,
        lambda pair: rows[pair].width,
        token_budget,
        max_rows=max_batch_rows,
        positions=positions,
        max_positions=LOGIT_BUDGET // vocabulary_size(model),
    )
    with frozen_eval(model), torch.inference_mode():
        for group in shown_batches(batches, len(rows), "scoring answers"):
            for pair, score in zip(group, _score_batch(model, tokenizer, group, rows), strict=True):
                results[pair] = score
    return [results[p, t] for p, t in pairs]


def _ask_remote(
    model: RemoteModel, pairs: Sequence[tuple[str, str]], separator: str | None
) -> list[PairScore | Unscored]:
    """The same from what a backend says of given continuations. It names no ids: a token that is the most probable one
    is 1 and any other 0, where the target is 1 everywhere.

    A backend that gives one logarithm for the whole target knows less. From a probability of one half on, every token
    of it is certainly the most probable one; below that, nothing is known of the tokens, and the pair counts as wrong.

    Raises:
        EvaluationError: if the backend has no log-probabilities.
    """
    joined = [
        (prompt + (separator_between(prompt, target) if separator is None else separator), target)
        for prompt, target in dict.fromkeys(pairs)
    ]
    scores: dict[tuple[str, str], PairScore | Unscored] = {}
    for (prompt, target), found in zip(dict.fromkeys(pairs), model.scores(joined), strict=True):
        if found is None:
            raise EvaluationError(
                f"{model.name!r} is behind an API that gives no log-probabilities of given texts, which this"
                " measurement needs; use protocol='generation' (or 'judge')"
            )
        values = (found,) if isinstance(found, float) else found.log_probabilities
        count, total = len(values), -sum(values)
        said = () if isinstance(found, float) else found.most_probable
        hits = tuple(map(int, said or (value >= math.log(0.5) for value in values)))
        scores[prompt, target] = PairScore(
            prompt=prompt,
            target=target,
            target_ids=(1,) * count,
            pred_ids=hits,
            token_acc=sum(hits) / count,
            exact=sum(hits) == count,
            nll=total / count,
            sum_nll=total,
        )
    return [scores[pair] for pair in pairs]


def encode_row(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    target: str,
    separator: str | None = None,
) -> TargetRow:
    """Tokenise one pair and drop what must not or need not be fed.

    Raises:
        RequestError: if there is no target, or it alone does not fit into the context.
    """
    if not target.strip():
        raise RequestError("the target is empty", field="target")
    limit = context_length(model.config)
    if is_encoder_decoder(model):
        source = prompt_ids(tokenizer, prompt, encoder_decoder=True)
        source, cut = cut_left(tokenizer, source, len(source), limit)
        lead = decoder_lead(tokenizer, target)
        labels = [*lead, *encode_target(tokenizer, target)]
        decoder = (decoder_start(model), *labels[:-1])  # labels shifted right by one
        return TargetRow(as_ids(source), decoder, len(lead), tuple(labels[len(lead) :]), cut)
    try:
        pair = encode_pair(tokenizer, prompt, target, separator)
        ids, start = pair.ids, pair.prompt_length
    except RequestError as error:
        if error.field != "prompt":
            raise
        # Nothing stands before the target (empty prompt, no BOS): let the BOS or EOS token predict it.
        joint = separator_between(prompt, target) if separator is None else separator
        ids, start = [stand_in_bos(tokenizer), *encode_text(tokenizer, prompt + joint + target).ids], 1
    wanted = tuple(ids[start:])
    fed = ids[:-1]  # nothing is read off the last target token
    fed, cut = cut_left(tokenizer, fed, start, limit)
    return TargetRow(as_ids(fed), None, start - 1 - cut, wanted, cut)


def target_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, members: Sequence[TargetRow], everywhere: bool = False
) -> torch.Tensor:
    """One forward pass: the float32 logits ``[positions, vocab]`` that predict the targets, row after row.

    Args:
        model: of the rows.
        tokenizer: of the model.
        members: the rows.
        everywhere: at all positions that are fed, prompts included.
    """
    padding, device = pad_id(tokenizer), device_of(model)
    batch = pad_rows([r.inputs for r in members], padding).to(device)
    extra: dict[str, Any] = {}
    if members[0].decoder is not None:
        decoder = pad_rows([r.decoder for r in members if r.decoder is not None], padding).to(device)
        extra["decoder_input_ids"] = decoder.input_ids
        if accepts(model, "decoder_attention_mask"):
            extra["decoder_attention_mask"] = decoder.attention_mask
    scored = extra.get("decoder_input_ids", batch.input_ids)
    columns = [range(len(r.decoder or r.inputs)) if everywhere else r.columns for r in members]
    positions = Positions.of(columns, scored)
    # Edits that route by prompts must not look at the target; the encoder's input is all prompt.
    ends = [len(r.inputs) if r.decoder is not None else r.first + 1 for r in members]
    with prompt_lengths(model, ends):
        return gather_logits(model, batch, positions, **extra).float()


def _score_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    rows: dict[tuple[str, str], TargetRow],
) -> Iterator[PairScore]:
    """One forward pass; yields the scores in the order of ``pairs``."""
    members = [rows[pair] for pair in pairs]
    logits = target_logits(model, tokenizer, members)
    wanted = torch.tensor([t for r in members for t in r.target], device=logits.device)
    total = logits.logsumexp(-1)
    # A collapsed model must not look right by accident: argmax over NaN is arbitrary, so it becomes -1.
    predicted = torch.where(total.isfinite(), logits.argmax(-1), -1).tolist()
    losses = (total - logits.gather(-1, wanted[:, None])[:, 0]).double().tolist()
    place = 0
    for (prompt, target), row in zip(pairs, members, strict=True):
        count = len(row.target)
        pred, loss = tuple(predicted[place : place + count]), losses[place : place + count]
        place += count
        hits = sum(a == b for a, b in zip(pred, row.target, strict=True))
        yield PairScore(
            prompt=prompt,
            target=target,
            target_ids=row.target,
            pred_ids=pred,
            token_acc=hits / count,
            exact=hits == count,
            nll=sum(loss) / count,
            sum_nll=sum(loss),
            truncated=row.truncated,
        )
