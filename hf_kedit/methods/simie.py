"""SimIE: any method that changes weights, made fit for long sequences of edits.

Edit ``t`` is made by the base method on the *original* weights, which it was designed for; the difference to the
weights as they are now is then taken over only where the edit's own tokens point. With the running weight ``W_{t−1}``,
the base method's edit ``W̃_t`` and the inputs ``K_t [tokens, d_in]`` of the matrix at the edit's tokens:

    P_t = P_{t−1} + K_tᵀ K_t,   P_0 = λ I
    W_t = W_{t−1} + (W̃_t − W_{t−1}) K_tᵀ K_t P_t⁻¹

The step is the product of ``(W̃_t − W_{t−1}) K_tᵀ`` and ``P_t⁻¹ K_tᵀ``: two factors with one column per token. The
keys lie in the ledger with the step that they belong to, and P is computed from them, so that it is saved with the
edits and taken back with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat

from ..books.deltas import WeightDelta
from ..config import EditConfig, ModelProfile, WeightConfig
from ..engine.capture import Tap, stream_states
from ..engine.forward import device_of
from ..errors import ConfigError, UnsupportedModelError
from ..requests import EditRequest
from ..statistics.solve import ridge_solve
from ..tokens import encode_pair, pad_rows
from .base import Capabilities, Method, Outcome, WrappingConfig, method_class, register_method


@dataclass
class SimIEConfig(WrappingConfig, WeightConfig):
    """Hyperparameters of SimIE; the ``base`` method makes the edits.

    Args:
        ridge: λ. The larger, the less an edit moves what the edits before it wrote.
        from_original: the base method edits the original weights (as published); otherwise the weights as they are.
    """

    edit_type: ClassVar[str] = "simie"

    ridge: PositiveFloat = 1e4
    from_original: bool = True

    def check_base(self, base: EditConfig) -> None:
        """Any method that changes weights, but for itself."""
        if method_class(base).capabilities.kind != "weights" or isinstance(base, SimIEConfig):
            raise ConfigError(f"SimIE needs a base method that changes weights; {base.edit_type!r} does not")

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """How much earlier edits count (keys have the model's scale), and whose edits are smoothed."""
        return {"ridge": [1e3, 1e2, 1e1, 1e0], "base": [{"edit_type": "memit"}, {"edit_type": "alphaedit"}]}


@register_method
class SimIE(Method):
    """A base method and the rule that carries its edits over."""

    config_class = SimIEConfig
    capabilities = Capabilities(
        name="SimIE",
        kind="weights",
        batch=False,
        sequential=True,
        needs_subject=False,
        undo="last",
        paper="Guo et al. 2025, Towards Lifelong Model Editing via Simulating Ideal Editor",
        summary="makes another method fit for long sequences: edits the original weights and carries the edit over",
    )
    config: SimIEConfig

    def __init__(self, bench: Any, config: SimIEConfig):
        super().__init__(bench, config)
        base = config.base_config
        self.base: Method = method_class(base)(bench, base)

    @classmethod
    def load(cls, config: SimIEConfig) -> Any:
        """What the base method is made of."""
        return method_class(config.base_config).load(config.base_config)

    def fetch(self) -> None:
        """What the base method reads."""
        self.base.fetch()

    # ------------------------------------------------------------------ what the base method answers

    def edited_modules(self) -> list[str]:
        """Names of the matrices that the base method edits."""
        return self.base.edited_modules()

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check the requests as the base method does."""
        self.base.check(requests)

    def prepare(self) -> None:
        """Prepare the base method."""
        self.base.prepare()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the base method has learnt; SimIE's own memory lies in the ledger."""
        return self.base.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Hand the base method its state."""
        self.base.load_state_dict(state)

    # ------------------------------------------------------------------ editing

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """One step of the sequence."""
        bench, base = self.bench, self.base
        with bench.ledger.emptied():  # so that the base method can work as ever
            keys = self._keys(requests)
            if self.config.from_original:
                outcome = base.regularise(base.compute(requests))
        if not self.config.from_original:
            outcome = base.regularise(base.compute(requests))
        together: dict[str, list[WeightDelta]] = {}
        for delta in outcome.deltas:
            if delta.name != "weight" or len(delta.shape) != 2 or delta.module not in keys:
                raise UnsupportedModelError(
                    f"SimIE carries matrices over; {self.base.capabilities.name} changed {delta.key}, which is none"
                    " (for fine-tuning: train_bias=False)"
                )
            together.setdefault(delta.module, []).append(delta)
        steps = [self._step(module, parts, keys[module]) for module, parts in together.items()]
        if bench.trace is not None:
            for module, parts in together.items():
                bench.note(f"base_delta/{module}", torch.stack([p.matrix() for p in parts]).sum(dim=0))
        return Outcome(steps, outcome.diagnostics)

    def _step(self, module: str, parts: Sequence[WeightDelta], keys: torch.Tensor) -> WeightDelta:
        """The change of one matrix.

        Args:
            module: its name.
            parts: what the base method did to it.
            keys: K_t, ``[tokens, d_in]``.
        """
        device = keys.device
        left = sum((_times(part, keys) for part in parts), torch.zeros((), device=device))
        running = self.bench.ledger.total(module)
        if running is not None and self.config.from_original:
            left = left - running.to(device) @ keys.T
        earlier = self.bench.ledger.keys(module)
        seen = keys.T if earlier is None else torch.cat([earlier.to(device), keys.T], dim=1)
        right = ridge_solve(seen, self.config.ridge, keys.T).float()
        self.bench.note(f"keys/{module}", keys)
        return WeightDelta(module, left=left, right=right, keys=keys.T, builds_on=self.config.from_original)

    def _keys(self, requests: Sequence[EditRequest]) -> dict[str, torch.Tensor]:
        """Inputs of the edited matrices at every token of prompt and target, ``[tokens, d_in]`` fp32."""
        bench = self.bench
        separator = self.base.config.separator
        rows = [
            encode_pair(bench.tokenizer, r.filled_prompt, r.target_new, r.separator_or(separator)).ids
            for r in requests
        ]
        keys: dict[str, torch.Tensor] = {}

        def receive(tap: Tap, states: torch.Tensor) -> None:
            keys[tap.module] = states.float().clone()

        taps = [Tap(module, "input") for module in self.edited_modules()]
        stream_states(bench.model, pad_rows(rows, bench.fill).to(device_of(bench.model)), taps, receive)
        return keys


def _times(delta: WeightDelta, keys: torch.Tensor) -> torch.Tensor:
    """``ΔW Kᵀ`` ``[d_out, tokens]`` without multiplying the factors out."""
    if delta.left is not None and delta.right is not None:
        return delta.left.to(keys.device) @ (delta.right.to(keys.device).T @ keys.T)
    return delta.matrix().to(keys.device) @ keys.T
