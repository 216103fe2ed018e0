"""Edit requests as teacher-forced examples, and the loss of their targets.

What every method shares that follows the gradient of a target's likelihood: the token ids that the model reads, the
positions that predict the target, and the negative log-likelihood there. Knows nothing of what is differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..requests import EditRequest, in_row
from ..tokens import as_ids, decoder_lead, encode_pair, encode_target, pad_id, pad_rows, prompt_ids
from .forward import Positions, decoder_start, device_of, generation_inputs, logits_at, model_inputs
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
        separator: between prompt and target, for requests that bring none; ``None``: see `separator_between`.
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
        encoded = prompt_ids(tokenizer, request.filled_prompt, encoder_decoder=True)
        targets = encode_target(tokenizer, request.target_new, eos=True)
        begin = (decoder_start(model), *decoder_lead(tokenizer, request.target_new))
        last, count = len(begin) - 1, len(targets)
        if objective == "prompt_last":
            return Example(as_ids(encoded), (last,) * count, tuple(targets), begin)
        positions = tuple(range(last, last + count))  # the decoder sees the target shifted right by one
        return Example(as_ids(encoded), positions, tuple(targets), (*begin, *targets[:-1]))
    pair = encode_pair(tokenizer, request.filled_prompt, request.target_new, request.separator_or(separator))
    last = pair.prompt_length - 1
    if objective == "prompt_last":
        return Example(as_ids(pair.prompt_ids), (last,) * len(pair.target_ids), tuple(pair.target_ids))
    positions = tuple(range(last, last + len(pair.target_ids)))
    return Example(as_ids(pair.ids[:-1]), positions, tuple(pair.target_ids))


@dataclass(frozen=True)
class ExampleBatch:
    """Examples on the device of a model's inputs, ready to be scored again and again.

    Args:
        inputs: arguments of a forward.
        positions: where the target tokens are predicted, example after example.
        targets: the target tokens, ``[tokens]`` int64.
        count: number of examples.
    """

    inputs: dict[str, Any]
    positions: Positions
    targets: torch.Tensor
    count: int

    @classmethod
    def of(cls, model: Any, examples: Sequence[Example], fill: int) -> ExampleBatch:
        """Pad examples and bring them to the model.

        Args:
            model: a transformers model, or something that is called like one.
            examples: of one kind, decoder-only or encoder-decoder.
            fill: padding id.
        """
        device = device_of(model)
        batch = pad_rows([e.ids for e in examples], fill).to(device)
        inputs, scored = model_inputs(model, batch), batch.input_ids
        if examples[0].decoder_ids:
            decoder = pad_rows([e.decoder_ids for e in examples], fill).to(device)
            inputs, scored = {k: v for k, v in inputs.items() if k != "position_ids"}, decoder.input_ids
            inputs |= {"decoder_input_ids": scored, "decoder_attention_mask": decoder.attention_mask}
        targets = torch.tensor([t for e in examples for t in e.targets], device=device)
        return cls(inputs, Positions.of([e.positions for e in examples], scored), targets, len(examples))

    def token_losses(self, model: Any) -> torch.Tensor:
        """Negative log-likelihood of every target token in one forward, ``[tokens]`` fp32."""
        logits = logits_at(model, self.inputs, self.positions).float()
        return -logits.log_softmax(-1).gather(1, self.targets.to(logits.device).unsqueeze(1)).squeeze(1)

    def means(self, losses: torch.Tensor) -> torch.Tensor:
        """Mean per example of what `token_losses` returned, ``[examples]``."""
        return row_means(losses, self.positions.rows, self.count)

    def held(self, losses: torch.Tensor, probability: float | None) -> torch.Tensor:
        """`all_likely` of what `token_losses` returned, ``[examples]``."""
        return all_likely(losses, self.positions.rows, self.count, probability)

    def losses(self, model: Any) -> torch.Tensor:
        """Mean negative log-likelihood per target token of each example in one forward, ``[examples]`` fp32."""
        return self.means(self.token_losses(model))


def row_means(losses: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Mean loss of each of ``count`` examples, ``[count]``."""
    rows, none = rows.to(losses.device), losses.new_zeros(count)
    return none.index_add(0, rows, losses) / none.index_add(0, rows, torch.ones_like(losses))


def all_likely(losses: torch.Tensor, rows: torch.Tensor, count: int, probability: float | None) -> torch.Tensor:
    """Which examples hold: every target token has at least this probability; bool ``[examples]``.

    Args:
        losses: negative log-likelihood of every target token.
        rows: example of each token.
        count: number of examples.
        probability: ``None``: none is said to hold.
    """
    if probability is None:
        return torch.zeros(count, dtype=torch.bool, device=losses.device)
    # "not at most", so that what is not a number does not hold
    unlikely = (~(losses.detach() <= -math.log(probability))).to(losses.dtype)
    return unlikely.new_zeros(count).index_add(0, rows.to(losses.device), unlikely) == 0


def mean_of_open(losses: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Mean over what does not hold yet, a scalar: what holds is left alone; 0 (with a gradient) where all holds.

    Args:
        losses: of tokens or examples.
        held: bool, same shape.
    """
    return losses.masked_fill(held, 0).sum() / (~held).sum().clamp_min(1)


@torch.no_grad()
def target_probabilities(model: Any, examples: Sequence[Example], fill: int, size: int) -> list[float]:
    """Geometric mean per token of each target's probability, teacher forced, ``size`` examples at a time."""
    probabilities: list[float] = []
    for i in range(0, len(examples), size):
        chunk = examples[i : i + size]
        probabilities.extend((-ExampleBatch.of(model, chunk, fill).losses(model)).exp().tolist())
    return probabilities


def present_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: EditRequest) -> str:
    """What the model says now, as many tokens as the new answer has."""
    both = bool(model.config.is_encoder_decoder)
    ids = prompt_ids(tokenizer, request.filled_prompt, encoder_decoder=both)
    asked = generation_inputs(model, pad_rows([ids]).to(device_of(model)))
    length = len(tokenizer(request.target_new, add_special_tokens=False)["input_ids"])
    said = model.generate(  # type: ignore[operator]
        **asked,
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=pad_id(tokenizer),
    )
    start = 0 if both else len(ids)
    return str(tokenizer.decode(said[0, start:], skip_special_tokens=True)).strip()
