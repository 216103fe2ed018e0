"""The rows that a locate-then-edit method runs the model on: requests × context templates, and drift rows.

Every row is a full text tokenised once, with the column of the fact token, the positions that predict the
target, and the request that it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from ..errors import TargetTooLongError
from ..requests import SLOT, EditRequest, in_row
from ..tokens import (
    EncodedPair,
    FactToken,
    as_ids,
    context_length,
    encode_pair,
    encode_prompt,
    fact_position,
    span_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DRIFT_TEXT = " is a"


@dataclass(frozen=True)
class Row:
    """One sequence.

    Args:
        ids: token ids that the model sees; for a rewriting row the last target token is left out.
        fact: index of the fact token.
        positions: indices whose logits are supervised (rewriting rows) or compared (drift rows).
        targets: token ids that the positions should predict; empty for drift rows.
        owner: index of the request.
        template: index of the context template; -1 for a drift row.
        prompt_length: number of tokens of the prompt, the target excluded.
        bare: whether the prompt stands in no context; of a request in two formats, one row of each does.
        weights: factor of the loss at each supervised position; empty: 1.
        shifts: ``(index, vector)`` of what is added already, at the block whose value is optimised, to tokens before
            the fact token; ``[d]`` fp32.
    """

    ids: tuple[int, ...]
    fact: int
    positions: tuple[int, ...]
    targets: tuple[int, ...]
    owner: int
    template: int
    prompt_length: int
    bare: bool = False
    weights: tuple[float, ...] = ()
    shifts: tuple[tuple[int, torch.Tensor], ...] = field(default=(), compare=False)

    @property
    def is_drift(self) -> bool:
        """Whether the row only watches the essence of the subject."""
        return self.template < 0


def rewrite_row(
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    template: str,
    *,
    owner: int = 0,
    template_index: int = 0,
    fact_token: FactToken = "subject_last",
    separator: str | None = None,
) -> Row:
    """Build the row of one request in one context template.

    Raises:
        RequestError: if the subject is missing, or no token is left for the target.
    """

    def place(request: EditRequest) -> tuple[EncodedPair, int]:
        prompt, shift = request.in_context(template, template_index)
        pair = encode_pair(tokenizer, prompt, request.target_new, request.separator_or(separator))
        where: FactToken = "last" if request.without_subject else fact_token
        start, end = (0, 0) if where == "last" else request.plain_span()
        return pair, fact_position(tokenizer, pair, (start + shift, end + shift), where)

    pair, fact = in_row(place, request)
    count = len(pair.ids) - pair.prompt_length
    return Row(
        ids=as_ids(pair.ids[:-1]),
        fact=fact,
        positions=tuple(range(pair.prompt_length - 1, pair.prompt_length - 1 + count)),
        targets=tuple(pair.target_ids),
        owner=owner,
        template=template_index,
        prompt_length=pair.prompt_length,
        bare=template == SLOT,
    )


def prompt_end_rows(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest], separator: str | None = None
) -> list[Row]:
    """Prompt and whole answer of every request as they are, read and written at the prompt's last token.

    Raises:
        RequestError: naming the row, if no token is left for the target.
    """
    return [
        rewrite_row(tokenizer, request, SLOT, owner=i, fact_token="last", separator=separator)
        for i, request in enumerate(requests)
    ]


def drift_row(
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    *,
    owner: int = 0,
    at: Literal["subject", "end"] = "subject",
) -> Row:
    """Build the row ``"{subject} is a"`` on which the next-token distribution should not drift.

    The published code compares the distribution at the subject's last token (``at="subject"``); the paper
    describes the one after the whole text (``at="end"``).
    """
    subject = request.subject or ""
    encoded = encode_prompt(tokenizer, subject + DRIFT_TEXT)
    _, end = span_tokens(tokenizer, encoded, (0, len(subject)))
    last = len(encoded.ids) - 1
    return Row(
        ids=as_ids(encoded.ids),
        fact=end - 1,
        positions=(end - 1 if at == "subject" else last,),
        targets=(),
        owner=owner,
        template=-1,
        prompt_length=len(encoded.ids),
    )


def check_lengths(model: PreTrainedModel, rows: Sequence[Row], requests: Sequence[EditRequest]) -> None:
    """Raise if a row does not fit into the model's context.

    Raises:
        TargetTooLongError: naming the request.
    """
    for row in rows:
        check_length(model, requests[row.owner], len(row.ids) + 1)


def check_length(
    model: PreTrainedModel,
    request: EditRequest,
    tokens: int,
    *,
    what: str = "prompt and target have",
    field: str = "target_new",
) -> None:
    """Raise if a text of a request (by default its prompt with its target) does not fit into the model's context.

    Raises:
        TargetTooLongError: naming the request.
    """
    limit = context_length(model.config)
    if limit is not None and tokens > limit:
        raise TargetTooLongError(
            f"{what} {tokens} tokens, the model's context has {limit}",
            row=request.row,
            field=field,
            request_id=request.id,
        )
