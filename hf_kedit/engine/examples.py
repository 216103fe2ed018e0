"""Edit requests as teacher-forced examples, and the loss of their targets.

What every method shares that follows the gradient of a target's likelihood: the token ids that the model reads, the
positions that predict the target, and the negative log-likelihood there. Knows nothing of what is differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..requests import EditRequest, in_row
from ..tokens import encode_pair, encode_target, pad_rows
from .forward import accepts, device_of, logits_at, model_inputs
from .rows import check_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Objective = Literal["prompt_last", "target_new"]


@dataclass(frozen=True)
class Example:
    """A request as token ids.

    Args:
        ids: what the model (or the encoder) reads; the last target token is left out, because nothing follows it.
        positions: where each target token is predicted.
        targets: the target's tokens.
        decoder_ids: what the decoder of an encoder-decoder reads; ``positions`` are then positions in it.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int, ...]
    decoder_ids: tuple[int, ...] = ()


def encode_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    *,
    separator: str | None = None,
    objective: Objective = "target_new",
) -> list[Example]:
    """Tokenise requests for a model.

    Args:
        model: decoder-only or encoder-decoder.
        tokenizer: of the model.
        requests: what to encode.
        separator: between prompt and target; ``None`` for the rule of `tokens.separator_between`.
        objective: ``target_new``: each target token is predicted after the ones before it; ``prompt_last``: all of
            them at the last token of the prompt.

    Raises:
        RequestError: naming the row, if a target has no tokens of its own.
        TargetTooLongError: if a request does not fit into the model's context.
    """
    examples = []
    for request in requests:
        example = in_row(lambda r: _encode(model, tokenizer, r, separator, objective), request)
        check_length(model, request, max(len(example.ids), len(example.decoder_ids)))
        examples.append(example)
    return examples


def _encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    separator: str | None,
    objective: Objective,
) -> Example:
    if model.config.is_encoder_decoder:
        encoded = tokenizer(request.filled_prompt)["input_ids"]
        targets = encode_target(tokenizer, request.target_new, eos=True)
        begin = model.config.decoder_start_token_id
        begin = tokenizer.pad_token_id if begin is None else begin
        shifted = (int(begin), *targets[:-1])  # the decoder sees the target shifted right by one
        if objective == "prompt_last":
            return Example(tuple(encoded), (0,) * len(targets), tuple(targets), shifted[:1])
        return Example(tuple(encoded), tuple(range(len(targets))), tuple(targets), shifted)
    pair = encode_pair(tokenizer, request.filled_prompt, request.target_new, separator)
    last = pair.prompt_length - 1
    if objective == "prompt_last":
        return Example(tuple(pair.prompt_ids), (last,) * len(pair.target_ids), tuple(pair.target_ids))
    positions = tuple(range(last, last + len(pair.target_ids)))
    return Example(tuple(pair.ids[:-1]), positions, tuple(pair.target_ids))


def token_losses(model: Any, examples: Sequence[Example], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of every target token, in one forward.

    Args:
        model: a transformers model, or something that is called like one.
        examples: of one kind, decoder-only or encoder-decoder.
        fill: padding id.

    Returns:
        The losses of all target tokens ``[tokens]`` fp32, and the example that each belongs to ``[tokens]`` int64.
    """
    device = device_of(model)
    batch = pad_rows([e.ids for e in examples], fill).to(device)
    rows = torch.tensor([i for i, e in enumerate(examples) for _ in e.targets], device=device)
    columns = torch.tensor([p for e in examples for p in e.positions], device=device)
    targets = torch.tensor([t for e in examples for t in e.targets], device=device)
    shape = tuple(batch.input_ids.shape)
    kwargs = model_inputs(model, batch)
    if examples[0].decoder_ids:
        decoder = pad_rows([e.decoder_ids for e in examples], fill).to(device)
        kwargs = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "decoder_input_ids": decoder.input_ids,
            "decoder_attention_mask": decoder.attention_mask,
        }
        if accepts(model, "use_cache"):
            kwargs["use_cache"] = False
        shape = tuple(decoder.input_ids.shape)
    logits = logits_at(model, kwargs, rows, columns, shape).float()
    return -logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1), rows


def row_means(losses: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Mean loss of each of ``count`` examples, ``[count]``."""
    total = torch.zeros(count, device=losses.device).index_add(0, rows, losses)
    return total / torch.bincount(rows, minlength=count)


@torch.no_grad()
def target_probabilities(model: Any, examples: Sequence[Example], fill: int, size: int) -> list[float]:
    """Geometric mean per token of each target's probability, teacher forced, ``size`` examples at a time."""
    found: list[float] = []
    for i in range(0, len(examples), size):
        chunk = examples[i : i + size]
        found.extend((-row_means(*token_losses(model, chunk, fill), len(chunk))).exp().tolist())
    return found
