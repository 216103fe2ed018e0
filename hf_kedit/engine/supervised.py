"""Examples as padded tensors with labels, for losses that a trainer computes batch by batch.

Labels are aligned with the logits: ``labels[b, t]`` is the token that position ``t`` of the decoder predicts, `IGNORE`
elsewhere; nothing is shifted afterwards. Nothing here knows what an edit is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..tokens import ALIGNED, pad_rows
from .examples import Example, row_means
from .forward import Positions, accepts, logits_at, picture_inputs, text_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORE = -100
Batch = dict[str, torch.Tensor]
SHARES_OF = "shares of "
"""Begins the names of what says how many images or patches of a tensor belong to each row, ``[rows]`` int64."""


def collate(examples: Sequence[Example], fill: int) -> Batch:
    """Pad examples on the right.

    Args:
        examples: of one kind, decoder-only or encoder-decoder.
        fill: padding id.

    Returns:
        ``input_ids`` and ``attention_mask`` ``[rows, width]``, ``labels`` ``[rows, label width]`` and, for an
        encoder-decoder, ``decoder_input_ids`` of the labels' shape; int64. Of rows with pictures also what belongs
        to these, and how it is shared out among the rows (`SHARES_OF`); `rows_of` takes it apart again.
    """
    read = pad_rows([e.ids for e in examples], fill)
    batch = {"input_ids": read.input_ids, "attention_mask": read.attention_mask, **read.pictures()}
    for name in [n for n in batch if n not in _READ and n not in ALIGNED]:
        held = [len(row[name]) if name in row else 0 for row in read.beside]
        batch[SHARES_OF + name] = torch.tensor(held)
    scored = batch["input_ids"]
    if examples[0].decoder_ids:
        scored = batch["decoder_input_ids"] = pad_rows([e.decoder_ids for e in examples], fill).input_ids
    batch["labels"] = torch.full_like(scored, IGNORE)
    for row, example in enumerate(examples):
        batch["labels"][row, list(example.positions)] = torch.tensor(example.targets)
    return batch


def rows_of(batch: Batch, rows: slice | torch.Tensor) -> Batch:
    """Some of the rows of a batch, with their own pictures.

    Args:
        batch: from `collate`, or more that has a first axis of rows.
        rows: a slice, or their numbers ``[n]`` int64.
    """
    chosen = torch.arange(len(batch["labels"]))[rows.cpu() if isinstance(rows, torch.Tensor) else rows].tolist()
    part = {}
    for name, value in batch.items():
        if SHARES_OF + name not in batch:
            part[name] = value[rows]
            continue
        pieces = value.split(batch[SHARES_OF + name].tolist())
        if any(len(pieces[i]) for i in chosen):  # rows of text alone have nothing that a tower could read
            part[name] = torch.cat([pieces[i] for i in chosen])
    return part


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}


def inputs_of(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """What a model reads of a batch: ids, mask and pictures."""
    kwargs: dict[str, Any] = {name: value for name, value in batch.items() if name in _READ}
    pictures = {name: value for name, value in batch.items() if name in ALIGNED or SHARES_OF + name in batch}
    kwargs |= picture_inputs(model, kwargs["input_ids"], pictures)
    shares = [value for name, value in batch.items() if name.startswith(SHARES_OF)]
    return kwargs | text_types(model, kwargs, torch.stack(shares).bool().any(0).tolist() if shares else ())


def logits_where(model: PreTrainedModel, batch: Batch, mask: torch.Tensor) -> torch.Tensor:
    """Run the model and return its logits at the positions of a mask over the labels, ``[positions, vocab]`` fp32."""
    kwargs = inputs_of(model, batch)
    if accepts(model, "use_cache"):
        kwargs["use_cache"] = False
    wanted = [[column for column, on in enumerate(row) if on] for row in mask.tolist()]
    return logits_at(model, kwargs, Positions.of(wanted, mask)).float()


_READ = ("input_ids", "attention_mask", "decoder_input_ids")


@dataclass(frozen=True)
class Scores:
    """How a model scores the labels of a batch.

    Args:
        nll: negative log-likelihood of each labelled token, ``[tokens]`` fp32.
        rows: the row of the batch that each token belongs to, ``[tokens]`` int64.
        right: whether the token is the most likely one, ``[tokens]`` bool.
        count: rows of the batch.
    """

    nll: torch.Tensor
    rows: torch.Tensor
    right: torch.Tensor
    count: int

    def per_row(self) -> torch.Tensor:
        """Mean negative log-likelihood of each row, ``[rows]``, detached."""
        return row_means(self.nll.detach(), self.rows, self.count)

    def all_right(self) -> torch.Tensor:
        """1 where every token of a row is the most likely one, else 0, ``[rows]`` fp32."""
        return all_of_row(self.right, self.rows, self.count)


def score(model: PreTrainedModel, batch: Batch) -> Scores:
    """Score the labels of a batch; differentiable wherever the model is."""
    return score_logits(logits_where(model, batch, batch["labels"] != IGNORE), batch["labels"])


def score_logits(logits: torch.Tensor, labels: torch.Tensor) -> Scores:
    """Score labels by the logits ``[tokens, vocab]`` at the labelled positions."""
    mask = labels != IGNORE
    wanted = labels[mask]
    nll = -logits.log_softmax(-1).gather(1, wanted.unsqueeze(1)).squeeze(1)
    return Scores(nll, mask.nonzero()[:, 0], logits.argmax(-1) == wanted, labels.shape[0])


def all_of_row(true: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """1 for each row all of whose tokens are true, else 0, ``[count]`` fp32."""
    return (row_means(true.float(), rows, count) == 1).float()
