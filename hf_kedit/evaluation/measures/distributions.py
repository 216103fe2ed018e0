"""Measures of a model on texts: perplexity, and how an edit moved the next-token distributions.

Like `scoring`, this works on texts in batches and leaves model and tokenizer as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...engine.capture import Tap, as_rows, listen
from ...engine.forward import Positions, device_of, frozen_eval, gather_logits, model_inputs
from ...errors import EvaluationError, RequestError
from ...tokens import context_length, encode_text, needed_tokenizer, pad_id, pad_rows, vocabulary_size
from ..asking.batching import TOKEN_BUDGET, is_encoder_decoder, make_batches, stock_model
from ..asking.scoring import LOGIT_BUDGET, TargetRow, encode_row, target_logits
from . import likelihoods

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...model import EditableModel


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of some texts.

    Args:
        pooled: ``exp`` of the mean negative log-likelihood over all scored tokens.
        mean: mean of the texts' own perplexities.
        nlls: per text, mean negative log-likelihood per scored token, in nats.
        counts: per text, number of scored tokens.
    """

    pooled: float | None
    mean: float | None
    nlls: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class _Window:
    """A stretch of one text; the tokens from ``first`` on are scored, the ones before are context only."""

    text: int
    ids: tuple[int, ...]
    first: int


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    stride: int | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> Perplexity:
    """Perplexity of texts, longer ones in sliding windows.

    A text of N tokens has N−1 scored tokens: nothing predicts the first.

    Args:
        model: causal language model (or an `EditableModel`, with its edits).
        tokenizer: of the model.
        texts: plain texts; one of fewer than two tokens has a count of 0 and is left out of the means.
        max_length: tokens per window; default: the model's context, or 1024 where it has no limit.
        stride: new tokens per window after the first; default: half a window.
        token_budget: padded tokens per forward pass.

    Raises:
        EvaluationError: for an encoder-decoder model, or impossible window lengths.
    """
    model = stock_model(model)
    if is_encoder_decoder(model):
        raise EvaluationError("perplexity of plain text needs a causal language model")
    limit = context_length(model.config)
    length = max_length or limit or 1024
    length = min(length, limit) if limit else length
    step = stride or max(1, length // 2)
    if length < 2 or not 1 <= step < length:
        raise EvaluationError(f"windows of {length} tokens with a stride of {step} are impossible")
    windows = [w for i, text in enumerate(texts) for w in _windows(i, encode_text(tokenizer, text).ids, length, step)]
    sums, counts = [0.0] * len(texts), [0] * len(texts)
    vocabulary = vocabulary_size(model)

    with frozen_eval(model), torch.inference_mode():
        for group in make_batches(windows, lambda w: len(w.ids), min(token_budget, LOGIT_BUDGET // vocabulary)):
            batch = pad_rows([w.ids for w in group], pad_id(tokenizer)).to(device_of(model))
            positions = Positions.of([range(w.first - 1, len(w.ids) - 1) for w in group], batch.input_ids)
            logits = gather_logits(model, batch, positions).float()
            wanted = torch.tensor([t for w in group for t in w.ids[w.first :]], device=logits.device)
            losses = (logits.logsumexp(-1) - logits.gather(-1, wanted[:, None])[:, 0]).double().tolist()
            place = 0
            for window in group:
                size = len(window.ids) - window.first
                sums[window.text] += sum(losses[place : place + size])
                counts[window.text] += size
                place += size
    nlls = tuple(total / n if n else 0.0 for total, n in zip(sums, counts, strict=True))
    scored = [nll for nll, n in zip(nlls, counts, strict=True) if n]
    return Perplexity(
        likelihoods.pooled_perplexity(nlls, counts), likelihoods.mean_perplexity(scored), nlls, tuple(counts)
    )


def essence_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, snippets: Sequence[str], max_tokens: int = 100
) -> float | None:
    """Essence drift (Meng et al. 2022): perplexity of texts about the edited subject; compare before and after.

    Args:
        model: causal language model (or an `EditableModel`, with its edits).
        tokenizer: of the model.
        snippets: texts about the subject, in CounterFact the attribute snippets whose name is the subject; joined by
            a space.
        max_tokens: the joined text is cut to so many.
    """
    ids = list(encode_text(tokenizer, " ".join(snippets)).ids[:max_tokens])
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return perplexity(model, tokenizer, [str(text)]).pooled


def activation_shift(
    model: EditableModel, texts: Sequence[str], *, token_budget: int = TOKEN_BUDGET
) -> dict[str, float | None]:
    """What the edited layers put out on fixed texts, compared with the unedited model.

    Args:
        model: with its edits; a causal language model.
        texts: cut to the model's context.
        token_budget: padded tokens per forward pass.

    Returns:
        ``activation_norm_ratio``: norm of an edited module's output over all tokens, edited divided by unedited; of
        several modules the one farthest from 1; ``None`` if no weight is edited. ``nonfinite_logits``: share of
        logits that are NaN or infinite.
    """
    base, tokenizer = stock_model(model), model.tokenizer
    assert tokenizer is not None
    names = list(dict.fromkeys(account.module for account in model.ledger.accounts.values()))
    limit = context_length(base.config) or 1024
    rows = [ids for text in texts if (ids := tuple(encode_text(tokenizer, text).ids[:limit]))]
    after, nonfinite = _output_norms(base, tokenizer, names, rows, token_budget)
    if not names:
        return {"activation_norm_ratio": None, "nonfinite_logits": nonfinite}
    with model.disable_edits():
        before, _ = _output_norms(base, tokenizer, names, rows, token_budget)
    ratios = [a / b if b else math.inf for a, b in zip(after, before, strict=True)]
    far = max(ratios, key=lambda r: abs(math.log(r)) if 0 < r < math.inf else math.inf)
    return {"activation_norm_ratio": far, "nonfinite_logits": nonfinite}


def _output_norms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    rows: Sequence[tuple[int, ...]],
    token_budget: int,
) -> tuple[list[float], float]:
    """Norms of the outputs of some modules over the real tokens of all rows, and the share of non-finite logits."""
    squares, bad, count = dict.fromkeys(names, 0.0), 0, 0
    budget = min(token_budget, LOGIT_BUDGET // vocabulary_size(model))
    with frozen_eval(model), torch.inference_mode():
        for group in make_batches(rows, len, budget):
            batch = pad_rows(group, pad_id(tokenizer)).to(device_of(model))
            mask = batch.attention_mask.bool()

            def add(tap: Tap, state: torch.Tensor, mask: torch.Tensor = mask) -> None:
                real = as_rows(state, mask.shape[0])[mask.to(state.device)]
                squares[tap.module] += float(real.double().square().sum())

            with listen(model, [Tap(name) for name in names], add):
                logits = model(**model_inputs(model, batch)).logits
            real = logits[mask.to(logits.device)]
            bad, count = bad + int((~real.isfinite()).sum()), count + real.numel()
    return [math.sqrt(squares[name]) for name in names], bad / count if count else 0.0


def _windows(text: int, ids: Sequence[int], length: int, step: int) -> Iterator[_Window]:
    """Cut a text so that every token but the first is scored exactly once."""
    done = 1
    while done < len(ids):
        end = length if done == 1 else done + step
        end = min(end, len(ids))
        start = max(0, end - length)
        yield _Window(text, tuple(ids[start:end]), done - start)
        done = end


def locality_divergence(
    model: EditableModel,
    pairs: Sequence[tuple[str, str]],
    *,
    separator: str | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> list[float]:
    """KL(unedited ‖ edited) of the next-token distributions at the target positions of each (prompt, target) pair.

    A finer measure of locality than agreement: it sees changes that leave the most probable token in place. The
    unedited distributions come from the same model with its edits switched off, batch by batch.

    Args:
        model: an `EditableModel` that carries edits.
        pairs: probes and their answers.
        separator: text between them; ``None``: one space where it belongs.
        token_budget: padded tokens per forward pass.

    Returns:
        Mean over the target positions of each pair, in nats; 0 for a model without edits.

    Raises:
        EvaluationError: if a pair cannot be scored.
    """
    base, tokenizer = stock_model(model), needed_tokenizer(model.tokenizer, "the distance of answers")
    rows: dict[tuple[str, str], TargetRow] = {}
    for prompt, target in dict.fromkeys(pairs):
        try:
            rows[prompt, target] = encode_row(base, tokenizer, prompt, target, separator)
        except RequestError as error:
            raise EvaluationError(f"({prompt!r}, {target!r}): {error}") from error
    budget = min(token_budget, LOGIT_BUDGET // (2 * vocabulary_size(base)))
    results: dict[tuple[str, str], float] = {}
    with frozen_eval(base), torch.inference_mode():
        for group in make_batches(rows, lambda pair: rows[pair].width, budget):
            members = [rows[pair] for pair in group]
            after = target_logits(base, tokenizer, members)
            with model.disable_edits():
                before = target_logits(base, tokenizer, members)
            place = 0
            for pair, row in zip(group, members, strict=True):
                span = slice(place, place + len(row.target))
                results[pair] = float(likelihoods.divergence(before[span], after[span]))
                place = span.stop
    return [results[prompt, target] for prompt, target in pairs]
