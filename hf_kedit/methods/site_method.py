"""What the methods that work at sites share: which module is wrapped, and requests as examples with a key token.

Imported by the method files; registers nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..anatomy.switching import Switch
from ..books.sites import prompt_lengths
from ..config import EditConfig
from ..engine.batches import in_batches, rows_at_once
from ..engine.capture import Tap, capture_at
from ..engine.examples import Example, ExampleBatch
from ..engine.forward import device_of
from ..engine.weights import get_module, weight_shape
from ..errors import ConfigError, EditFailedError, UnsupportedModelError, WeightError
from ..requests import EditRequest
from ..tokens import pad_rows
from .base import Method

_INDEX = re.compile(r"\[(\d+)\]")


@dataclass
class SiteConfig(EditConfig):
    """Base of the configs of methods that wrap one linear layer.

    Args:
        module: name of the wrapped layer with ``{}`` for the layer index (``h[35]`` and ``h.35`` are the same);
            ``None``: the projection out of the MLP.
    """

    module: str | None = None

    def validate(self) -> None:
        """Check that there is one layer."""
        super().validate()
        if self.layers is not None and len(self.layers) != 1:
            raise ConfigError(f"{type(self).__name__} works at one layer; layers has {len(self.layers)}")


class SiteMethod(Method):
    """A method at one linear layer of a decoder."""

    config: SiteConfig

    @property
    def path(self) -> str:
        """Name of the wrapped module."""
        (layer,) = self.config.layers or [0]
        if self.config.module is None:
            return self.bench.anatomy.down(layer).path
        return plain_name(self.config.module).replace("{}", str(layer))

    def sizes(self, path: str) -> tuple[int, int]:
        """(d_in, d_out) of a linear layer.

        Raises:
            LayerError: if there is no such module.
            UnsupportedModelError: if it is not a linear layer.
        """
        try:
            shape = weight_shape(get_module(self.bench.model, path))
        except WeightError:
            shape = ()
        if len(shape) != 2:
            raise UnsupportedModelError(f"{path} is not a linear layer; {self.capabilities.name} wraps one")
        return shape[1], shape[0]

    def edited_modules(self) -> list[str]:
        """No weight is edited."""
        return []

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check the layer, tokens and lengths."""
        self.sizes(self.path)
        self.examples(requests)

    # ------------------------------------------------------------------ measuring

    def prompts_of(self, examples: Sequence[Example], whole: bool = False) -> Switch[None]:
        """Calls inside the block have the examples as rows: the key token is the one before the target, or with
        ``whole`` the last one."""
        return prompt_lengths(self.bench.model, [len(e.ids) if whole else prompt_length(e) for e in examples])

    def at_key(self, examples: Sequence[Example], taps: Sequence[Tap]) -> dict[Tap, torch.Tensor]:
        """What goes into or comes out of modules at the key tokens, ``[rows, d]`` fp32 each."""
        model = self.bench.model

        def run(part: Sequence[int]) -> dict[Tap, torch.Tensor]:
            prompts = [examples[i].ids[: prompt_length(examples[i])] for i in part]
            batch = pad_rows(prompts, self.bench.fill).to(device_of(model))
            return capture_at(model, batch, torch.tensor([len(p) - 1 for p in prompts]), taps)

        parts = [taken for _, taken in in_batches(range(len(examples)), rows_at_once(model), run)]
        return {tap: torch.cat([taken[tap] for taken in parts]) for tap in taps}

    def scorer(self, examples: Sequence[Example], whole: bool = False) -> Callable[[], torch.Tensor]:
        """A function that runs the examples, for loops that do so at every step; see `prompts_of`.

        Returns:
            () → mean negative log-likelihood per target token of each example, ``[rows]`` fp32.
        """
        batch = ExampleBatch.of(self.bench.model, examples, self.bench.fill)

        def losses() -> torch.Tensor:
            with self.prompts_of(examples, whole):
                return batch.losses(self.bench.model)

        return losses

    @torch.no_grad()
    def probabilities(self, examples: Sequence[Example]) -> list[float]:
        """Geometric mean per token of each target's probability."""

        def run(part: Sequence[int]) -> list[float]:
            likely: list[float] = (-self.scorer([examples[i] for i in part])()).exp().tolist()
            return likely

        parts = in_batches(range(len(examples)), rows_at_once(self.bench.model), run)
        return [probability for _, likely in parts for probability in likely]


def prompt_length(example: Example) -> int:
    """Number of tokens before the target."""
    return example.positions[0] + 1


def plain_name(name: str) -> str:
    """A module name without brackets: ``h[35].mlp`` is ``h.35.mlp``."""
    return _INDEX.sub(r".\1", name)


def check_loss(loss: torch.Tensor, method: str) -> float:
    """Read a loss: the one thing in a step that waits for the device.

    Raises:
        EditFailedError: if it is not finite.
    """
    number = float(loss.detach())
    if not math.isfinite(number):
        raise EditFailedError(f"the loss became NaN or infinite while {method} trained; lower lr")
    return number


def before_and_after(before: Sequence[float], after: Sequence[float], losses: Sequence[float], **more: Any) -> Any:
    """The usual diagnostics of every request of a batch."""
    return [
        {
            "loss": [round(x, 6) for x in losses],
            "target_probability_before": first,
            "target_probability_after": last,
            "steps": len(losses),
            **more,
        }
        for first, last in zip(before, after, strict=True)
    ]
