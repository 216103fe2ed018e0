"""T-Patcher (Huang et al. 2023, "Transformer-Patcher: One Mistake Worth One Neuron", arXiv 2301.09785).

Every target token that the model gets wrong is worth one neuron, a *patch*, beside the last feed-forward layer:

    FFN'(x) = FFN(x) + act(k x + b) v

Its key starts at the input ``q`` of the mistake, ``k = q / ‖q‖²``, ``b = 0``, its value is ``v = a ⊙ u``. With the
activations ``a_q = k q + b`` of the mistakes and ``a_m`` of memorised inputs that the patch must leave alone,

    L = CE + c_a · mean top-5 exp(−a_q) + c_m · [mean top-1000 exp(a_m − a_q + 3) + mean top-1000 exp(a_m + 3)]

Everything else, earlier patches included, stays frozen. Patches of a gated layer (Llama) are not gated themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from ..books.site_book import SiteEntry
from ..config import BoundedConfig, ModelProfile
from ..config.spaces import layer_windows, times
from ..engine.activations import hidden_activation
from ..engine.capture import Tap, stream_states
from ..engine.examples import Example, all_likely
from ..engine.forward import device_of
from ..engine.neurons import NeuronGroup
from ..engine.replay import Replay, ReplayRow
from ..errors import ConfigError, EditFailedError
from ..logging import get_logger, info_once, progress_bar
from ..requests import EditRequest
from ..tokens import context_length, encode_text, pad_rows
from .base import Capabilities, Method, Outcome, register_method
from .side_neurons import Patches, mlp_path

logger = get_logger(__name__)
TEXTS = 64
"""Texts of the corpus that are run together to collect memorised inputs."""
HELD_OUT = 10
"""Every tenth memorised input validates and is not trained on."""


@dataclass
class TPatcherConfig(BoundedConfig):
    """Hyperparameters of T-Patcher; see also `BoundedConfig`. ``layers`` names one layer, the last one as published.

    Args:
        lr: Adam's learning rate; halved when the validation loss stops falling.
        max_epochs: largest number of steps.
        first_validation: step of the first validation.
        validate_every: steps between validations; training ends at one where the edit is right and the memory loss
            falls no longer.
        max_patches: most neurons per edit.
        amplify: start of ``a``.
        act_factor: ``c_a``.
        act_margin: of the activation loss, ``exp(margin − a_q)``.
        act_top: how many of the largest entries the activation loss averages.
        memory_factor: ``c_m``; 5 (FEVER) and 10 (zsRE) in the paper.
        memory_margin: distance of memories to the edit's activation, and below zero.
        memory_top: how many of the largest entries the memory losses average.
        memory_tokens: memorised inputs, taken from the corpus of the statistics.
        grad_clip: largest norm of a gradient.
    """

    edit_type: ClassVar[str] = "t-patcher"

    lr: PositiveFloat = 1e-2
    max_epochs: PositiveInt = 2000
    first_validation: PositiveInt = 100
    validate_every: PositiveInt = 25
    max_patches: PositiveInt = 5
    amplify: PositiveFloat = 10.0
    act_factor: NonNegativeFloat = 1.0
    act_margin: float = 0.0
    act_top: PositiveInt = 5
    memory_factor: NonNegativeFloat = 10.0
    memory_margin: NonNegativeFloat = 3.0
    memory_top: PositiveInt = 1000
    memory_tokens: Annotated[int, Field(ge=HELD_OUT)] = 40_000
    grad_clip: PositiveFloat = 5.0

    def validate(self) -> None:
        """Check that there is one layer."""
        super().validate()
        if self.layers is not None and len(self.layers) != 1:
            raise ConfigError(f"TPatcherConfig.layers: T-Patcher edits one layer, not {self.layers}")

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """The last layer."""
        return {"layers": [profile.num_layers - 1]}

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Which layer, how fast, and how far a patch stays from memorised text."""
        return {
            "layers": layer_windows(profile, self.layers, traced),
            "lr": times(self.lr, 3.0, 0.3),
            "memory_margin": [3.0, 10.0],
            "amplify": [3.0, 10.0],
        }

    def cautious(self, profile: ModelProfile) -> dict[str, Any]:
        """A short training beside as many memories as the packaged text has, looked at often.

        Smooth activations (SiLU, GELU) are never quite silent: patches need a wider margin below zero than with the
        paper's ReLU, and smaller values.
        """
        careful = {"max_epochs": 400, "first_validation": 10, "validate_every": 10, "memory_tokens": 4000}
        return super().cautious(profile) | careful | {"memory_margin": 6.0, "amplify": 1.0}


# ---------------------------------------------------------------------- losses


def top_mean(values: torch.Tensor, count: int) -> torch.Tensor:
    """Mean of the largest ``count`` entries, or of all of them if there are fewer."""
    flat = values.flatten()
    return flat.topk(min(count, len(flat))).values.mean()


def activation_loss(edit: torch.Tensor, margin: float, count: int) -> torch.Tensor:
    """``mean top-count exp(margin − a_q)``; ``edit`` are the patches' activations at their own mistakes, ``[n]``."""
    return top_mean((margin - edit).exp(), count)


def memory_loss(edit: torch.Tensor, memory: torch.Tensor, margin: float, count: int) -> torch.Tensor:
    """``mean top-count exp(a_m − a_q + margin) + mean top-count exp(a_m + margin)``.

    Args:
        edit: ``a_q`` ``[n]``.
        memory: ``a_m`` ``[memories, n]``.
        margin: how far memories stay below the edit, and below zero.
        count: how many of the largest entries are averaged.
    """
    return top_mean((memory - edit + margin).exp(), count) + top_mean((memory + margin).exp(), count)


# ---------------------------------------------------------------------- the method


class _Trained:
    """Patches in training.

    Args:
        queries: inputs of the mistakes, ``[n, H]``.
        amplify: start of ``a``.
        generator: of ``u``.
    """

    def __init__(self, queries: torch.Tensor, amplify: float, generator: torch.Generator):
        self.queries = queries
        self.keys = queries / queries.square().sum(dim=1, keepdim=True)
        self.bias = queries.new_zeros(len(queries))
        self.scale = torch.full_like(queries, amplify)
        self.direction = torch.randn(queries.shape, generator=generator).to(queries)
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Everything that is trained."""
        return [self.keys, self.bias, self.scale, self.direction]

    def group(self) -> NeuronGroup:
        """The patches as they are now."""
        return NeuronGroup((), self.keys, self.scale * self.direction, self.bias, queries=self.queries)

    def activations(self, inputs: torch.Tensor) -> torch.Tensor:
        """``k x + b`` of every patch, ``[inputs, n]``."""
        return torch.nn.functional.linear(inputs, self.keys, self.bias)

    def own(self) -> torch.Tensor:
        """``a_q``: of every patch at its own mistake, ``[n]``."""
        return (self.keys * self.queries).sum(dim=1) + self.bias


@register_method
class TPatcher(Method):
    """T-Patcher."""

    pictures = True
    config: TPatcherConfig
    config_class = TPatcherConfig
    capabilities = Capabilities(
        name="T-Patcher",
        kind="adapter",
        batch=False,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        paper="Huang et al. 2023, arXiv 2301.09785",
        summary="one neuron beside the last feed-forward layer for every wrong token",
    )

    @cached_property
    def layer(self) -> int:
        """Index of the edited layer."""
        return (self.config.layers or [0])[0]

    @cached_property
    def path(self) -> str:
        """Name of its feed-forward module."""
        return mlp_path(self.bench.anatomy, self.layer, "T-Patcher")

    def edited_modules(self) -> list[str]:
        """The feed-forward module."""
        return [self.path]

    def site(self) -> Patches:
        """The patches in the model, or none yet."""
        new = Patches([self.path], {}, hidden_activation(self.bench.model))
        existing = self.bench.sites.find(new.key)
        return existing if isinstance(existing, Patches) else new

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check the layer and every request."""
        self.site()
        self.examples(requests)

    @cached_property
    def memory(self) -> torch.Tensor:
        """Inputs of the layer over texts that have nothing to do with edits, ``[memory_tokens, H]`` on the CPU."""
        bench, wanted = self.bench, self.config.memory_tokens
        device, limit = device_of(bench.model), context_length(bench.model.config) or 512
        inputs: list[torch.Tensor] = []
        with bench.unedited():
            texts = bench.statistics.corpus_texts()
            while sum(map(len, inputs)) < wanted and (chosen := list(islice(texts, TEXTS))):
                rows = [encode_text(bench.tokenizer, t).ids[:limit] for t in chosen]
                batch = pad_rows(rows, bench.fill).to(device)
                tap = Tap(self.path, "input")
                stream_states(bench.model, batch, [tap], lambda _, s: inputs.append(s.float().cpu()))
        info_once(logger, f"T-Patcher: {min(sum(map(len, inputs)), wanted):,} memorised inputs")
        return torch.cat(inputs)[:wanted]

    # ------------------------------------------------------------------ editing

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Train patches for the tokens that the model gets wrong."""
        (request,) = requests
        bench, site = self.bench, self.site()
        (example,) = self.examples([request])
        replay = Replay(
            bench.model,
            bench.anatomy,
            [ReplayRow(example.ids, 0, example.positions)],
            self.layer,
            (),
            fill=bench.fill,
        )
        targets = torch.tensor(example.targets, device=replay.base_logits.device)
        wrong = (replay.base_logits.argmax(-1) != targets).nonzero().squeeze(1)[: self.config.max_patches]
        inputs = self._inputs(example)
        queries = inputs[torch.tensor(example.positions)[wrong.cpu()].to(inputs.device)]
        before = self._probability(replay.base_logits, targets)
        losses: list[float] = []
        if len(wrong):
            group, losses, after, drift = self._train(site, replay, queries, targets)
        else:  # the model says it already
            empty, drift = queries.new_zeros(0, queries.shape[1]), {}
            group, after = NeuronGroup((), empty, empty, empty[:, 0], queries=empty), before
        numbers = {
            "loss": [round(x, 6) for x in losses[:: max(len(losses) // 50, 1)]],
            "target_probability_before": before,
            "target_probability_after": after,
            "patches": group.count,
            "steps": len(losses),
            **drift,
        }
        return Outcome([], [numbers], [SiteEntry(site, {self.path: group})])

    def _inputs(self, example: Example) -> torch.Tensor:
        """What enters the layer at every token, ``[tokens, H]`` fp32."""
        inputs: list[torch.Tensor] = []
        batch = pad_rows([example.ids], self.bench.fill).to(device_of(self.bench.model))
        stream_states(self.bench.model, batch, [Tap(self.path, "input")], lambda _, s: inputs.append(s.float()))
        return inputs[0]

    @staticmethod
    def _probability(logits: torch.Tensor, targets: torch.Tensor) -> float:
        """Geometric mean per token of the target's probability."""
        return float((-torch.nn.functional.cross_entropy(logits, targets)).exp())

    def _train(
        self, site: Patches, replay: Replay, queries: torch.Tensor, targets: torch.Tensor
    ) -> tuple[NeuronGroup, list[float], float, dict[str, Any]]:
        """Train patches; returns them, the losses, the target's probability, and what is to be said of the drift."""
        config, bench = self.config, self.bench
        generator = torch.Generator().manual_seed(config.seed + len(site.edit_ids))
        patches = _Trained(queries, config.amplify, generator)
        earlier = [g.queries for g in site.groups.get(self.path, ()) if g.queries is not None and g.count]
        memory = torch.cat([self.memory, *(q.to(self.memory) for q in earlier)])
        held_out = torch.arange(len(memory)) % HELD_OUT == HELD_OUT - 1
        trained_on, validation = memory[~held_out].to(queries), memory[held_out].to(queries)
        optimiser = torch.optim.Adam(patches.parameters, lr=config.lr)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=1)
        losses: list[float] = []
        best = float("inf")
        functions = site.functions_with(lambda path: patches.group())
        bar = progress_bar(config.max_epochs, "training patches", show=bench.show_progress)
        nothing = [torch.zeros_like(patches.scale)]  # untrained patches act already
        restraint = self.restraint([patches.scale], start=nothing)
        with bench.sites.trying(functions, instead_of=site), bar:
            for epoch in range(1, config.max_epochs + 1):
                logits = replay.logits({})
                own = patches.own()
                beside = config.act_factor * activation_loss(own, config.act_margin, config.act_top)
                beside = beside + config.memory_factor * self._memory_loss(own, patches.activations(trained_on))
                loss = torch.nn.functional.cross_entropy(logits, targets) + beside.to(logits.device)
                losses.append(float(loss.detach()))  # the only thing that the host waits for in a step
                if not math.isfinite(losses[-1]):
                    raise EditFailedError("T-Patcher: the loss became NaN or infinite; lower lr or amplify")
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(patches.parameters, config.grad_clip)
                optimiser.step()
                bar.update(1)
                if epoch < config.first_validation or (epoch - config.first_validation) % config.validate_every:
                    continue
                with torch.no_grad():
                    logits = replay.logits({})
                    right = bool((logits.argmax(-1) == targets).all())
                    quiet = float(self._memory_loss(patches.own(), patches.activations(validation)))
                    restraint.look(bench.model)
                    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                    held = bool(all_likely(nll, torch.zeros_like(targets), 1, config.stop_probability).all())
                done = right and quiet >= best if config.stop_probability is None else held
                if done and restraint.allows(bench.model):
                    break
                best = min(best, quiet)
                schedule.step(quiet)
            restraint.settle(lambda: bench.model)
            with torch.no_grad():
                after = self._probability(replay.logits({}), targets)
        return patches.group().detached(), losses, after, self.drift_report(restraint, [after])

    def _memory_loss(self, own: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return memory_loss(own, memory, self.config.memory_margin, self.config.memory_top)
