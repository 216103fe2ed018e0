"""WISE (Wang et al. 2024, "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language
Models", arXiv 2405.14768).

The main memory, one linear layer ``W0``, is never touched. Edits are trained into side memories ``W0 + Δ``: first
into random subspaces of their own (`wise_training`), which are then merged (`wise_memory`). A query is answered by a
side memory only if it activates it differently enough from the main one (`wise_site`):

    WISE-Merge      one side memory, into which everything is merged
    WISE-Retrieve   one per ``merge_freq`` edits; the most activated one answers   (``retrieve=True``, the default)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import islice
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from ..books.site_book import SiteEntry
from ..config import ModelProfile, StoppingConfig
from ..config.spaces import layer_windows
from ..engine.activations import Activation, hidden_activation
from ..engine.capture import Tap, stream_states
from ..engine.forward import device_of
from ..engine.merging import MergeAlgorithm
from ..engine.weights import compute_device, get_module, get_weight
from ..errors import ConfigError, RequestError, TargetTooLongError
from ..requests import EditRequest, in_row
from ..tokens import as_ids, context_length, encode_pair, encode_text, pad_rows
from .base import BothFormats, Capabilities, Outcome, register_method
from .site_method import SiteConfig, SiteMethod
from .wise_memory import Member, Policy, WiseMemories
from .wise_site import TrainedEdit, WiseSite
from .wise_training import (
    Extra,
    SidePath,
    Training,
    TrainingSettings,
    WiseRow,
    positive_mean,
    text_distance,
    train_side_memory,
)

_POOL = 200
"""How many texts of the corpus irrelevant texts are chosen from."""
LONGEST = 48
"""Irrelevant texts are cut at this many tokens."""
LOC_PROMPT = "loc_prompt"
"""Entry of a request's metadata with an irrelevant text to use for it."""

Margins = Annotated[list[PositiveFloat], Field(min_length=3, max_length=3)]


@dataclass
class WISEConfig(StoppingConfig, SiteConfig):
    """Hyperparameters of WISE; see also `StoppingConfig`. ``layers`` names one layer.

    Args:
        lr: step of gradient descent on the side memory.
        n_iter: largest number of steps per edit.
        weight_decay: of the side memory.
        mask_weight_decay: decay only what the shard's mask covers; off: everything, as in the published code.
        norm_constraint: no entry of a side memory moves further than this; ``None``: unlimited.
        act_margin: α, β, γ: distances of irrelevant texts stay below α, those of edits above β, γ apart.
        act_ratio: a memory answers from this part of the smallest distance that its edits had after training.
        act_on_output: distances between activations of the layer's output, as in the published code, to which its
            margins belong; off: between the outputs, as in the paper's formula.
        mask_ratio: probability of an entry to be in a shard's mask.
        save_freq: edits per shard.
        merge_freq: edits per merge, a multiple of ``save_freq``.
        retrieve: WISE-Retrieve; off: WISE-Merge.
        merge_alg: how shards are merged.
        density: part of a shard's entries that is merged (TIES, DARE, magnitude).
        reference_routing: choose among memories as the published code of WISE-Retrieve does: only those farther away
            than the unfinished shard.
        replay: WISE-Retrieve: from the second memory on, keep earlier edits quiet in the new one, and rehearse one
            of its own edits at every step.
        irrelevant_texts: texts that edits must not affect, one is used per edit; ``None``: the corpus of the
            statistics (``EditableModel(corpus=…)``), else the model's own text. A request can bring one of its own as
            ``loc_prompt``.
        irrelevant_per_edit: how many of them are used for an edit.
        context_templates: texts with ``{}`` to put edits in; ``None``: the bare prompt and short generated contexts.
        context_lengths: (tokens, number) of generated contexts.
    """

    edit_type: ClassVar[str] = "wise"

    lr: PositiveFloat = 1.0
    n_iter: PositiveInt = 70
    weight_decay: NonNegativeFloat = 1e-5
    mask_weight_decay: bool = True
    norm_constraint: PositiveFloat | None = 1.0
    act_margin: Margins = field(default_factory=lambda: [5.0, 20.0, 10.0])
    act_ratio: PositiveFloat = 0.88
    act_on_output: bool = True
    mask_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    save_freq: PositiveInt = 500
    merge_freq: PositiveInt = 1000
    retrieve: bool = True
    merge_alg: MergeAlgorithm = "ties"
    density: Annotated[float, Field(gt=0, le=1)] = 0.53
    reference_routing: bool = False
    replay: bool = False
    irrelevant_texts: list[str] | None = None
    irrelevant_per_edit: PositiveInt = 1
    context_templates: list[str] | None = None
    context_lengths: list[tuple[int, int]] = field(default_factory=lambda: [(5, 5), (10, 5)])

    def validate(self) -> None:
        """Check what belongs together."""
        super().validate()
        if self.merge_freq % self.save_freq:
            raise ConfigError(
                f"WISEConfig.merge_freq ({self.merge_freq}) must be a multiple of save_freq ({self.save_freq})"
            )
        if self.replay and not self.retrieve:
            raise ConfigError("WISEConfig.replay needs retrieve=True: WISE-Merge has no finished memories to replay")
        if self.irrelevant_texts is not None and not any(t.strip() for t in self.irrelevant_texts):
            raise ConfigError("WISEConfig.irrelevant_texts is empty; leave it out to use the corpus")

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """High in the stack, as published for the 32-layer models (27)."""
        return {"layers": [min(round(0.84 * profile.num_layers), profile.num_layers - 1)]}

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Which layer, how fast, and which prompts the side memory answers (distances have the model's scale)."""
        return {
            "layers": layer_windows(profile, self.layers, traced),
            "lr": [0.1, 0.3],
            "act_margin": [[2.0, 8.0, 4.0], [1.0, 4.0, 2.0], [10.0, 40.0, 20.0]],
            "act_ratio": [0.95, 0.75],
            "irrelevant_per_edit": [8],
        }

    def cautious(self, profile: ModelProfile) -> dict[str, Any]:
        """Half the steps: where the margins are too wide for a model, the rest of them changes little."""
        return super().cautious(profile) | {"n_iter": 35}

    @property
    def policy(self) -> Policy:
        """What the memories need of it."""
        return Policy(**{f.name: getattr(self, f.name) for f in fields(Policy)})


@register_method
class WISE(SiteMethod):
    """WISE."""

    pictures = True
    both_formats: ClassVar[BothFormats | None] = "itself"
    config: WISEConfig
    config_class = WISEConfig
    capabilities = Capabilities(
        name="WISE",
        kind="adapter",
        batch=False,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        undo="call",
        paper="Wang et al. 2024, arXiv 2405.14768",
        summary="side memories in random subspaces of one layer, merged; prompts are routed by their activations",
    )

    # ------------------------------------------------------------------ the layer

    def edited_modules(self) -> list[str]:
        """The edited layer."""
        return [self.path]

    @cached_property
    def activation(self) -> Activation | None:
        """σ of the distances."""
        return hidden_activation(self.bench.model) if self.config.act_on_output else None

    def site(self) -> WiseSite:
        """The model's side memories at the layer, or new ones.

        Raises:
            ConfigError: if the model's were made with other settings of merging and routing.
        """
        new = WiseSite(self.path, WiseMemories(self.config.policy), self.activation)
        existing = self.bench.sites.find(new.key)
        if existing is None:
            return new
        assert isinstance(existing, WiseSite)
        ours, theirs = self.config.policy, existing.state.policy
        changed = [f.name for f in fields(Policy) if getattr(ours, f.name) != getattr(theirs, f.name)]
        if changed:
            raise ConfigError(
                f"the WISE memories in the model were made with {changed[0]}={getattr(theirs, changed[0])!r}, the"
                f" config says {getattr(ours, changed[0])!r}; use the same, or roll those edits back first"
            )
        return existing

    # ------------------------------------------------------------------ editing

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check the layer, the settings, and every row."""
        self.sizes(self.path)
        self.site()
        for request in requests:
            for form in request.formats():
                in_row(lambda r: self._row(r.filled_prompt, r.target_new, r.separator_or(None)), form)
            self._own_irrelevant(request)

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Train one edit into the open shard."""
        (request,) = requests
        bench, config, site = self.bench, self.config, self.site()
        layer = get_module(bench.model, self.path)
        weight = get_weight(layer).to(compute_device(layer))
        delta, mask, drawn = site.state.side((weight.shape[0], weight.shape[1]))
        rows = [
            self._row(form.in_context(template, i)[0], form.target_new, form.separator_or(None))
            for form in request.formats()
            for i, template in enumerate(self.templates())
        ]
        number = len(site.state.members)
        path = SidePath(
            bench.model,
            bench.anatomy,
            (config.layers or [0])[0],
            lambda function: bench.sites.trying({self.path: function}, instead_of=site),
            rows,
            [self._states(site, self._text_row(t)) for t in self.irrelevant(request, number)],
            self.activation,
            bench.fill,
        )
        extra = self._replay(site, number) if config.replay and site.state.memories else None
        done = train_side_memory(path, weight, delta, mask, self._settings(), extra, show_progress=bench.show_progress)
        self._note(done, mask)
        fact = request.filled_prompt, request.target_new, request.separator_or(None)
        edit = TrainedEdit(*fact, done.activation, done.delta, mask, drawn)
        return Outcome([], [_diagnostics(done)], [SiteEntry(site, edit)])

    def _settings(self) -> TrainingSettings:
        c = self.config
        alpha, beta, gamma = c.act_margin
        return TrainingSettings(
            c.n_iter,
            c.lr,
            c.weight_decay,
            c.mask_weight_decay,
            c.norm_constraint,
            (alpha, beta, gamma),
            self.activation,
            c.stop_probability,
            c.act_ratio,
        )

    def templates(self) -> list[str]:
        """Context templates: the user's, or the bare prompt and generated contexts."""
        groups = self.bench.context_templates(
            self.config.context_templates, self.config.context_lengths, self.config.seed
        )
        return [template for group in groups for template in group]

    def _row(self, text: str, target: str, separator: str | None = None) -> WiseRow:
        joint = self.config.separator if separator is None else separator
        pair = encode_pair(self.bench.tokenizer, text, target, joint)
        limit = context_length(self.bench.model.config)
        if limit is not None and len(pair.ids) > limit:
            raise TargetTooLongError(
                f"prompt and target have {len(pair.ids)} tokens, the model's context has {limit}", field="target_new"
            )
        return WiseRow(as_ids(pair.ids), pair.prompt_length)

    def _text_row(self, text: str) -> WiseRow:
        limit = min(LONGEST, context_length(self.bench.model.config) or LONGEST)
        ids = tuple(encode_text(self.bench.tokenizer, text).ids[:limit])
        return WiseRow(ids, len(ids))

    # ------------------------------------------------------------------ irrelevant texts

    def irrelevant(self, request: EditRequest, number: int) -> list[str]:
        """The irrelevant texts of an edit: its own, or some of the pool that do not name its subject.

        Args:
            request: the edit.
            number: how many edits came before it; decides which texts are taken.
        """
        own = self._own_irrelevant(request)
        if own is not None:
            return [own]
        texts = [t for t in self.pool if request.subject is None or request.subject not in t] or self.pool
        return random.Random(f"{self.config.seed} {number}").sample(
            texts, min(self.config.irrelevant_per_edit, len(texts))
        )

    @staticmethod
    def _own_irrelevant(request: EditRequest) -> str | None:
        text = request.metadata.get(LOC_PROMPT)
        if text is not None and (not isinstance(text, str) or not text.strip()):
            raise RequestError("must be a non-empty text", row=request.row, field=LOC_PROMPT, request_id=request.id)
        return text

    @cached_property
    def pool(self) -> list[str]:
        """Texts that edits must not affect."""
        if self.config.irrelevant_texts is not None:
            return list(self.config.irrelevant_texts)
        with self.bench.unedited():
            return list(islice(self.bench.statistics.corpus_texts(more=False), _POOL))

    # ------------------------------------------------------------------ replay

    def _replay(self, site: WiseSite, number: int) -> Extra:
        """Further terms of the loss: ``[d − α]₊`` of an edit of each finished memory, ``[β − d]₊`` of one of ours."""
        alpha, beta, _ = self.config.act_margin
        chosen = random.Random(f"{self.config.seed} replay {number}")
        current = [m for part in site.state.unmerged for m in part.members]
        states = {}

        def distance(member: Member, delta: torch.Tensor) -> torch.Tensor:
            if member.edit_id not in states:
                row = self._row(member.prompt, member.target, member.separator)
                states[member.edit_id] = self._states(site, row)
            return text_distance(*states[member.edit_id], delta, self.activation)

        def extra(step: int, delta: torch.Tensor) -> torch.Tensor:
            past = [m.members[(number * self.config.n_iter + step) % len(m.members)] for m in site.state.memories]
            loss = positive_mean(torch.stack([distance(m, delta) - alpha for m in past]))
            if current:
                loss = loss + (beta - distance(chosen.choice(current), delta)).clamp(min=0)
            return loss

        return extra

    def _states(self, site: WiseSite, row: WiseRow) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and own output of the layer on a text, ``[tokens, d]`` each."""
        states_of: dict[str, torch.Tensor] = {}
        batch = pad_rows([row.ids], self.bench.fill).to(device_of(self.bench.model))
        with self.bench.sites.trying({self.path: lambda call: None}, instead_of=site):
            stream_states(
                self.bench.model,
                batch,
                [Tap(self.path, "input"), Tap(self.path)],
                lambda tap, states: states_of.update({tap.kind: states.clone()}),
            )
        return states_of["input"], states_of["output"]

    # ------------------------------------------------------------------ reports

    def _note(self, done: Training, mask: torch.Tensor) -> None:
        if self.bench.trace is None:
            return
        parts = {
            "mask": mask,
            "token_losses": torch.tensor(done.token_losses),
            "margin_losses": torch.tensor(done.margin_losses),
            "edit_distances": torch.stack(done.edit_distances),
            "irrelevant_distances": torch.stack(done.irrelevant_distances),
            "first_gradient": done.first_gradient,
            "first_delta": done.first_delta,
            "delta": done.delta,
        }
        for name, value in parts.items():
            if value is not None:
                self.bench.note(name, value)


def _diagnostics(done: Training) -> dict[str, Any]:
    losses = [a + b for a, b in zip(done.token_losses, done.margin_losses, strict=True)]
    return {
        "loss": [round(x, 6) for x in losses],
        "target_probability_before": done.probability[0],
        "target_probability_after": done.probability[-1],
        "activation": done.activation,
        "irrelevant_activation": float(done.irrelevant_distances[-1].mean())
        if len(done.irrelevant_distances[-1])
        else 0.0,
        "steps": len(losses),
    }
