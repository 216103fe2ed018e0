"""KE, KnowledgeEditor (De Cao et al. 2021, "Editing Factual Knowledge in Language Models", arXiv 2104.08164).

A recurrent network reads what is to change, ``"old >> new || prompt"``, and its last state h decides, for every edited
matrix, which entries of the gradient pass and what is added (section 3.2):

    ΔW = max_scale · σ(e) · (A ⊙ ∇W + B),     A = softmax(r_a) c_aᵀ,     B = softmax(r_b) c_bᵀ

with (c_a, r_a, c_b, r_b, e) from h by a small network per matrix. Both masks are rank one, so the change has the rank
of the gradient plus one: with p = softmax(r_a) and q = softmax(r_b), token by token,

    ΔW = max_scale · σ(e) · [ Σ_n (p ⊙ δ_n)(c_a ⊙ u_n)ᵀ + q c_bᵀ ]

Rows and columns are those of the matrix as it is stored: for a ``Conv1D``, rows are inputs.

The networks are trained under a constraint (section 3.1): the new answer, as long as other prompts change little,

    min CE(edit)  subject to  KL(p ‖ p') ≤ m

by gradient descent on ``CE + α (KL − m)`` in the networks and gradient ascent in the multiplier α ≥ 0. The margin m
shrinks whenever an evaluation finds that nearly all edits succeed. The comparison in MEND's paper trains the same
networks on a weighted sum of the two losses and calls that EFK.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from ..editors.editor import Editor, EditorConfig, register_editor
from ..editors.output import mean_of_groups
from ..engine.examples import present_answer
from ..engine.gradients import LowRank
from ..engine.supervised import IGNORE, Batch, Scores, logits_where, score_logits
from ..engine.weights import get_module, is_transposed
from ..errors import ConfigError
from ..logging import get_logger
from ..requests import EditRequest
from ..tokens import pad_id, pad_rows
from .base import Capabilities, register_method
from .trained_editor import HyperMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger(__name__)


@dataclass
class KEConfig(EditorConfig):
    """Hyperparameters of KE.

    Args:
        objective: ``constrained``, the paper's; ``weighted``: MEND's losses with ``edit_weight`` and
            ``locality_weight``, which count here only.
        label_smoothing: of the constrained objective's cross-entropy.
        multiplier_lr: learning rate of α, which starts at 1.
        margin: m at the start.
        margin_min: m does not go below it.
        margin_decay: m is multiplied by this after an evaluation in which more than ``margin_success`` of the edits
            say the new answer.
        margin_success: see above.
        lstm_size: of each direction of the recurrent network.
        condition_size: of h.
        hidden_size: of the network of each matrix.
        max_scale: bound on the size of a change.
        vocabulary: number and width of the base model's word embeddings; filled in when an editor is made.
    """

    edit_type: ClassVar[str] = "ke"

    locality_at: Literal["all", "answer"] = "answer"
    objective: Literal["constrained", "weighted"] = "constrained"
    label_smoothing: Annotated[float, Field(ge=0, le=1)] = 0.1
    multiplier_lr: PositiveFloat = 0.1
    margin: PositiveFloat = 1e-3
    margin_min: PositiveFloat = 1e-5
    margin_decay: Annotated[float, Field(ge=0, le=1)] = 0.8
    margin_success: Annotated[float, Field(ge=0, le=1)] = 0.9
    lstm_size: PositiveInt = 128
    condition_size: PositiveInt = 1024
    hidden_size: PositiveInt = 128
    max_scale: PositiveFloat = 1.0
    vocabulary: tuple[int, int] | None = None


class Condition(nn.Module):
    """Reads the text of a change; its word embeddings start as the base model's."""

    def __init__(self, config: KEConfig):
        super().__init__()
        assert config.vocabulary is not None
        self.embedding = nn.Embedding(*config.vocabulary)
        self.lstm = nn.LSTM(config.vocabulary[1], config.lstm_size, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * config.lstm_size, config.condition_size)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """h ``[facts, condition_size]`` of texts ``[facts, width]`` padded on the right."""
        words = pack_padded_sequence(self.embedding(ids), mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        _, (state, _) = self.lstm(words)
        return torch.tanh(self.linear(torch.cat([state[0], state[1]], dim=1)))


class MaskNet(nn.Module):
    """From h to the masks of one matrix.

    Args:
        size: rows plus columns of the matrix.
        config: of the editor.
    """

    def __init__(self, size: int, config: KEConfig):
        super().__init__()
        self.first = weight_norm(nn.Linear(config.condition_size, config.hidden_size))
        self.second = weight_norm(nn.Linear(config.hidden_size, 2 * size + 1))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """z ``[facts, 2 (rows + columns) + 1]``."""
        return self.second(torch.tanh(self.first(h)))


@register_editor
class KEEditor(Editor):
    """The recurrent network of KE, and the networks of the edited matrices of one model."""

    config_class = KEConfig
    edit_config: KEConfig
    margin: torch.Tensor

    def __init__(self, config: KEConfig, shapes: Mapping[str, tuple[int, int]], *, encoder_decoder: bool = False):
        super().__init__(config, shapes, encoder_decoder=encoder_decoder)
        if config.vocabulary is None:
            raise ConfigError("a KE editor needs the model's vocabulary: make it with KEEditor.for_model(model)")
        self.condition = Condition(config)
        self.masks = nn.ModuleDict({m.replace(".", "/"): MaskNet(sum(s), config) for m, s in self.shapes.items()})
        if config.objective == "constrained":
            self.multiplier = nn.Parameter(torch.ones(()))
            self.register_buffer("margin", torch.tensor(config.margin))

    @classmethod
    def fitted(cls, config: EditorConfig, model: PreTrainedModel) -> EditorConfig:
        """The config with the size of the model's vocabulary."""
        return dataclasses.replace(config, vocabulary=tuple(_embeddings(model).shape))  # type: ignore[call-arg]

    def start_from(self, model: PreTrainedModel) -> None:
        """Begin with the model's own word embeddings."""
        with torch.no_grad():
            self.condition.embedding.weight.copy_(_embeddings(model))

    def edit_batch(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
    ) -> Batch:
        """The facts, and the texts that say what changes."""
        batch = super().edit_batch(model, tokenizer, requests)
        texts = []
        for request in requests:
            old = request.ground_truth[0] if request.ground_truth else present_answer(model, tokenizer, request)
            texts.append(f"{old} >> {request.target_new} || {request.filled_prompt}")
        rows = pad_rows([tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts], pad_id(tokenizer))
        return {**batch, "condition_ids": rows.input_ids, "condition_mask": rows.attention_mask}

    def propose(self, model: PreTrainedModel, edit: Batch, groups: torch.Tensor) -> dict[str, LowRank]:
        """One change per fact, in the low-rank form of the equation above."""
        rows = self.collect(model, edit, groups, "example_mean")
        with torch.autocast(groups.device.type, enabled=False):
            h = self.condition(edit["condition_ids"], edit["condition_mask"])
            facts = torch.arange(len(h), device=h.device)
            changes = {}
            for module, (d_in, d_out) in self.shapes.items():
                inputs, gradients, owners = rows[module].inputs, rows[module].gradients, rows[module].owners
                stored = is_transposed(get_module(model, module))
                n_rows, n_columns = (d_in, d_out) if stored else (d_out, d_in)
                z = self.masks[module.replace(".", "/")](h)
                c_a, r_a, c_b, r_b, e = z.split([n_columns, n_rows, n_columns, n_rows, 1], dim=1)
                p, q = r_a.softmax(1), r_b.softmax(1)
                on_rows, on_columns = (inputs, gradients) if stored else (gradients, inputs)
                scale = self.edit_config.max_scale * torch.sigmoid(e)
                owner = torch.cat([owners, facts])
                of_rows = torch.cat([p[owners] * on_rows, q]) * scale[owner]
                of_columns = torch.cat([c_a[owners] * on_columns, c_b])
                left, right = (of_columns, of_rows) if stored else (of_rows, of_columns)
                changes[module] = LowRank(left.T, right.T, owner)
        return changes

    # ------------------------------------------------------------------ the constrained objective

    def edit_loss(self, edit: Batch, rephrase: Batch, rows: torch.Tensor) -> tuple[torch.Tensor, Scores]:
        """Cross-entropy against smoothed labels, the mean of the edited prompt and of its other wording."""
        if self.edit_config.objective == "weighted":
            return super().edit_loss(edit, rephrase, rows)
        losses = []
        for batch in (edit, rephrase):
            labelled = batch["labels"] != IGNORE
            logits = logits_where(self.base, batch, labelled)
            scores = score_logits(logits, batch["labels"])
            smooth = self.edit_config.label_smoothing
            # every word of the vocabulary gets the same part of `smooth`, on top of what is left for the label
            values = (1 - smooth) * scores.nll - smooth * logits.log_softmax(-1).mean(-1)
            losses.append(mean_of_groups(values, scores.rows, rows))
        return torch.stack(losses).mean(), scores

    def objective(self, edit_loss: torch.Tensor, locality_loss: torch.Tensor) -> torch.Tensor:
        """``CE + α (KL − m)``, whose gradient in α is turned around: the multiplier climbs."""
        if self.edit_config.objective == "weighted":
            return super().objective(edit_loss, locality_loss)
        excess = locality_loss - self.margin
        alpha = self.multiplier
        return edit_loss + alpha.detach() * excess - (alpha - alpha.detach()) * excess.detach()

    def own_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """The multiplier's."""
        return [([self.multiplier], self.edit_config.multiplier_lr)] if hasattr(self, "multiplier") else []

    def after_step(self) -> None:
        """α stays at 0 or above."""
        if hasattr(self, "multiplier"):
            with torch.no_grad():
                self.multiplier.clamp_(min=0)

    def after_evaluation(self, metrics: Mapping[str, float]) -> None:
        """A smaller margin once nearly all edits succeed."""
        config = self.edit_config
        if hasattr(self, "multiplier") and metrics["edit_success"] > config.margin_success:
            self.margin.mul_(config.margin_decay).clamp_(min=config.margin_min)
            logger.info("KE's margin is now %.2e", float(self.margin))


def _embeddings(model: PreTrainedModel) -> torch.Tensor:
    weight = cast(torch.Tensor, model.get_input_embeddings().weight)
    return weight.detach().float()


@register_method
class KE(HyperMethod):
    """Edits with a trained `KEEditor`."""

    config_class = KEConfig
    editor_class = KEEditor
    capabilities = Capabilities(
        name="KE",
        kind="weights",
        batch=False,
        sequential=True,
        needs_subject=False,
        needs_training=True,
        encoder_decoder=True,
        paper="De Cao et al. 2021, arXiv 2104.08164",
        summary="a recurrent network reads the change and masks the gradient of one fact",
    )
