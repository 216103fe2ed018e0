"""How far training moves a model on text that has nothing to do with it, and a bound on that.

Fine-tuning a handful of tokens to certainty leaves a model free to say them everywhere. So it is watched on a few
general sentences: with the next-token distributions ``p`` of the unedited and ``q`` of the trained model, the drift is

    D = mean over all tokens of KL(p ‖ q)      [nats per token]

``D`` joins the loss, and what the training leaves has a ``D`` below a limit (`Restraint`). Constraining
fine-tuning by the change elsewhere: Zhu et al. 2020, arXiv 2012.00363 (eq. 3, there by an L∞ ball around the weights).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from ..engine.examples import Example, ExampleBatch
from ..engine.forward import logits_at
from ..tokens import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WATCHED_TEXTS, WATCHED_TOKENS = 48, 12
"""So many texts are watched, at most so many tokens of each."""
WATCHED_PARTS = 4
"""A step of the training looks at one of so many parts of them."""
DRIFT_WEIGHT = 200.0
"""Factor of ``D`` in the loss: five thousandths of a nat of drift weigh as much as a nat of the target."""
SHORTENINGS = 8


@dataclass(frozen=True)
class GeneralText:
    """A few texts, and what the unedited model says to them.

    Args:
        parts: the texts in batches.
        log_probs: ``log p`` at all positions of each, ``[tokens, vocab]`` fp32. In fp16 the last bit of a logit would
            decide about the last one kept of ``log p``, which is thousands of times as large.
    """

    parts: list[ExampleBatch]
    log_probs: list[torch.Tensor]

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], fill: int
    ) -> GeneralText:
        """Read some texts with a model as it is: the caller switches edits off.

        Args:
            model: decoder-only or encoder-decoder (its encoder reads the first half of a text, its decoder the rest).
            tokenizer: of the model.
            texts: more than enough.
            fill: padding id.
        """
        examples = general_examples(model, tokenizer, texts)
        parts = [
            ExampleBatch.of(model, chunk, fill) for i in range(WATCHED_PARTS) if (chunk := examples[i::WATCHED_PARTS])
        ]
        return cls(parts, [log_probs_of(model, part) for part in parts])

    def drift(self, model: Any, part: int | None = None) -> torch.Tensor:
        """``D`` of a model, a differentiable scalar.

        Args:
            model: the trained one.
            part: look at this part only (any number, they follow one another in a circle); ``None``: at all.
        """
        if part is None:
            return torch.stack([self.drift(model, i) for i in range(len(self.parts))]).mean()
        part %= len(self.parts)
        now = log_probs_of(model, self.parts[part])
        before = self.log_probs[part].to(now.device)
        return divergences(before, now).mean()


def log_probs_of(model: Any, batch: ExampleBatch) -> torch.Tensor:
    """Log-probabilities at all positions, ``[tokens, vocab]`` fp32."""
    return logits_at(model, batch.inputs, batch.positions).float().log_softmax(-1)


def divergences(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """``KL(before ‖ now)`` of log-probabilities ``[tokens, vocab]``, ``[tokens]``."""
    return (before.exp() * (before - now)).sum(-1)


def general_examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], count: int = WATCHED_TEXTS
) -> list[Example]:
    """The beginnings of some texts, every token (but the first) to be predicted."""
    rows = [tuple(encode_text(tokenizer, text).ids[: WATCHED_TOKENS + 1]) for text in islice(texts, count)]
    return [_example(row, encoder_decoder=bool(model.config.is_encoder_decoder)) for row in rows if len(row) > 3]


def _example(row: tuple[int, ...], *, encoder_decoder: bool) -> Example:
    """A text whose every token (but the first) is to be predicted."""
    if not encoder_decoder:
        return Example(row[:-1], tuple(range(len(row) - 1)), row[1:])
    half = len(row) // 2
    return Example(row[:half], tuple(range(len(row) - half - 1)), row[half + 1 :], row[half:-1])


class Restraint:
    """Holds a training within a limit.

    Edits that the model carries have moved it already; what counts is what the training adds: ``D ≤ D₀ + bound``. A
    step sees only a part of the texts. Where the steps end beyond the limit, the way from the start is shortened until
    all texts are within it (`settle`).

    Args:
        text: what is watched; ``None``: nothing, and everything is within.
        bound: of what is added, nats per token.
        parameters: that are trained, as they are before the training.
        model: at the start of the training.
        start: values of the parameters that change nothing, where these are not those before the training.
    """

    def __init__(
        self,
        text: GeneralText | None,
        bound: float,
        parameters: Sequence[torch.Tensor],
        model: Any,
        start: Sequence[torch.Tensor] | None = None,
    ):
        self.text, self.bound, self.parameters = text, bound, list(parameters)
        self.before = self.added = 0.0
        self._step = 0
        self._looks: deque[float] = deque(maxlen=WATCHED_PARTS)  # what the last steps saw, each of its part
        if text is not None:
            with torch.no_grad():
                self.before = float(text.drift(model))
            self._start = [p.detach().clone() for p in (parameters if start is None else start)]

    def look(self, model: Any) -> torch.Tensor | float:
        """``D`` on the next part of the texts; notes how far the present state has moved."""
        if self.text is None:
            return 0.0
        self._step += 1
        drift = self.text.drift(model, self._step)
        self._looks.append(float(drift.detach()))
        self.added = self._looks[-1] - self.before
        return drift

    def penalty(self, model: Any) -> torch.Tensor | float:
        """The term of the loss; `look` at the same time."""
        return DRIFT_WEIGHT * self.look(model)

    @property
    def within(self) -> bool:
        """Whether the state that was looked at last is within the limit."""
        return self.added <= self.bound

    @torch.no_grad()
    def allows(self, model: Any) -> bool:
        """Whether the present state is within the limit on all texts.

        To read them all costs as much as two steps of the training. Where the last steps, each with its part of them,
        saw more than the limit on average, they are not read: the drift changes little from one step to the next.
        """
        if self.text is not None and self.within:
            self.added = sum(self._looks) / len(self._looks) - self.before
            if self.within:
                self.added = float(self.text.drift(model)) - self.before
        return self.within

    @torch.no_grad()
    def settle(self, model: Callable[[], Any]) -> None:
        """Look at the last state with all texts, and shorten the way to it until it is within the limit.

        Args:
            model: gives the model with the parameters as they are.
        """
        if self.text is None:
            return
        self.added = float(self.text.drift(model())) - self.before
        for _ in range(SHORTENINGS if self.parameters else 0):
            if self.within:
                return
            part = 0.95 * math.sqrt(self.bound / self.added)  # to second order, D grows with the square of the way
            for parameter, start in zip(self.parameters, self._start, strict=True):
                parameter.copy_(torch.lerp(start, parameter, part))
            self.added = float(self.text.drift(model())) - self.before
