"""RLEdit (Li et al. 2025, "Reinforced Lifelong Editing for Language Models", arXiv 2502.05759).

MALMEN's network and least squares, trained for a life of edits. Training plays a sequence of batches ("turns"): the
keys and gradients of turn t are measured on the model that already carries the changes of the turns before,

    S_t = h(model with S_1 … S_{t−1}, facts of turn t)

and the network is rewarded for what the model says afterwards about this turn and, discounted, about those before it:

    L_t = Σ_{j < min(t, k)} γ^j [ CE(facts of turn t−j) + w KL(model_{t−1} ‖ model_t) ] + η ‖S_t‖²     (section 3)

The gradient reaches the network through S_t alone; earlier changes are constants, as past actions are. Used, the
network edits one batch after another on the edited model, like any other method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from ..anatomy.switching import Switch, together
from ..editors.editor import register_editor
from ..editors.output import EditorOutput, merged
from ..engine.gradients import LowRank, Rows, low_rank_paths
from ..engine.lowrank import shorten
from ..engine.supervised import Batch
from ..errors import ConfigError
from .base import Capabilities, register_method
from .malmen import MALMENConfig, MALMENEditor
from .trained_editor import HyperMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Turn = tuple[Batch, Batch, Batch]
"""Facts, other prompts and unrelated prompts of one batch."""


@dataclass
class RLEditConfig(MALMENConfig):
    """Hyperparameters of RLEdit; those of the network are MALMEN's.

    Args:
        turns: batches in a sequence; then training starts again on the unedited model. Gradients of several turns are
            taken together with ``gradient_accumulation_steps``.
        look_back: k, how many turns count in the loss of one.
        discount: γ.
        size_weight: η.
        locality_of: what unrelated prompts are compared with: the model before the turn (``previous``, as in the
            paper), or the one that carries no edits (``original``).
    """

    edit_type: ClassVar[str] = "rledit"

    locality_weight: NonNegativeFloat = 0.6
    rank: PositiveInt = 1024
    num_blocks: PositiveInt = 4
    micro_batch: PositiveInt = 4
    rows: PositiveInt = 128
    turns: PositiveInt = 20
    look_back: PositiveInt = 10
    discount: Annotated[float, Field(gt=0, le=1)] = 0.95
    size_weight: NonNegativeFloat = 1e-4
    locality_of: Literal["previous", "original"] = "previous"


@dataclass
class Sequence:
    """What a sequence of turns has left so far.

    Args:
        count: turns played.
        carried: module → sum of their changes; at most as many columns as the smaller side of the matrix.
        past: the last turns, the newest first.
    """

    count: int = 0
    carried: dict[str, LowRank] = field(default_factory=dict)
    past: list[Turn] = field(default_factory=list)

    def play(self, changes: Mapping[str, LowRank], turn: Turn, keep: int) -> None:
        """Add the changes of a turn, and remember its facts with those of the last ``keep``."""
        self.count += 1
        self.past = [turn, *self.past][:keep]
        for module, change in changes.items():
            left, right = change.left.detach(), change.right.detach()
            if module in self.carried:
                left = torch.cat([self.carried[module].left, left], dim=1)
                right = torch.cat([self.carried[module].right, right], dim=1)
            if left.shape[1] > min(left.shape[0], right.shape[0]):
                short = shorten(left, right)
                left, right = short.left, short.right
            owners = torch.zeros(left.shape[1], dtype=torch.long, device=left.device)
            self.carried[module] = LowRank(left, right, owners)


@register_editor
class RLEditEditor(MALMENEditor):
    """MALMEN's networks, trained on sequences of batches."""

    config_class = RLEditConfig
    edit_config: RLEditConfig

    def __init__(self, config: RLEditConfig, shapes: Mapping[str, tuple[int, int]], *, encoder_decoder: bool = False):
        super().__init__(config, shapes, encoder_decoder=encoder_decoder)
        self._trained, self._tried = Sequence(), Sequence()

    @property
    def sequence(self) -> Sequence:
        """The sequence that is being played: one in training, another in evaluation."""
        return self._trained if self.training else self._tried

    def train(self, mode: bool = True) -> RLEditEditor:
        """Training mode goes on with its sequence; evaluation mode begins a new one."""
        super().train(mode)
        if not mode:
            self._tried = Sequence()
        return self

    def check_arguments(self, args: Any) -> None:
        """Checkpoints have to lie between sequences, because what a sequence carries is not saved with them.

        Raises:
            ConfigError: if they do not, or if a batch has several groups.
        """
        if args.edits_per_group != args.per_device_train_batch_size or (
            args.edits_per_group != args.per_device_eval_batch_size
        ):
            raise ConfigError("RLEdit plays one batch a turn: edits_per_group must equal both batch sizes")
        strategy, turns = str(getattr(args.save_strategy, "value", args.save_strategy)), self.edit_config.turns
        if strategy == "no":
            return
        if strategy != "steps" or (int(args.save_steps) * args.gradient_accumulation_steps) % turns:
            raise ConfigError(
                f"RLEdit saves between sequences of {turns} turns: save_strategy='steps', and save_steps ×"
                f" gradient_accumulation_steps a multiple of {turns}, not {args.save_steps} ×"
                f" {args.gradient_accumulation_steps}"
            )

    # ------------------------------------------------------------------ one turn

    def observe(self, model: PreTrainedModel, edit: Batch) -> dict[str, Rows]:
        """Keys and gradients on the model that carries the turns before."""
        with low_rank_paths(model, self.sequence.carried):
            return super().observe(model, edit)

    def laid(self, changes: Mapping[str, LowRank], groups: torch.Tensor, rows: torch.Tensor) -> Switch[None]:
        """The model with the turns before and this one's changes."""
        return together(low_rank_paths(self.base, self.sequence.carried), super().laid(changes, groups, rows))

    def compared_with(self) -> contextlib.AbstractContextManager[None]:
        """The model before the turn, or without edits."""
        carried = self.sequence.carried if self.edit_config.locality_of == "previous" else {}
        return low_rank_paths(self.base, carried)

    def learn(
        self, changes: Mapping[str, LowRank], edit: Batch, rephrase: Batch, locality: Batch, groups: torch.Tensor
    ) -> EditorOutput:
        """L_t: this turn and the discounted ones before it, and the size of the change."""
        turns: list[Turn] = [(edit, rephrase, locality), *self.sequence.past][: self.edit_config.look_back]
        outputs = []
        for age, turn in enumerate(turns):
            rows = groups[:1].expand(len(turn[0]["labels"]))
            weight = self.edit_config.discount**age
            parts = [
                self.judge(changes, groups, *part, share=weight * len(part[-1]) / len(rows))
                for part in self.chunks(*turn, rows)
            ]
            outputs.append(merged(parts))
        whole = outputs[0]
        for age, output in enumerate(outputs[1:], start=1):
            whole.loss = whole.loss + self.edit_config.discount**age * output.loss
        for change in changes.values():  # ‖S‖² = ⟨L, L RᵀR⟩
            weighted = change.left.detach() @ (change.right.T @ change.right)
            whole.loss = whole.loss + self.edit_config.size_weight * (change.left.detach() * weighted).sum()
            change.left.grad = 2 * self.edit_config.size_weight * weighted + (
                0 if change.left.grad is None else change.left.grad
            )
        return whole

    def settle(self, changes: Mapping[str, LowRank], facts: Turn) -> None:
        """The sequence goes on with these changes, or starts again."""
        sequence = self.sequence
        sequence.play(changes, facts, self.edit_config.look_back - 1)
        if self.training and sequence.count >= self.edit_config.turns:
            self._trained = Sequence()


@register_method
class RLEdit(HyperMethod):
    """Edits with a trained `RLEditEditor`."""

    config_class = RLEditConfig
    editor_class = RLEditEditor
    capabilities = Capabilities(
        name="RLEdit",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=False,
        needs_training=True,
        encoder_decoder=True,
        paper="Li et al. 2025, arXiv 2502.05759",
        summary="MALMEN's network, trained on sequences of batches, edits the edited model",
    )
