"""Fine-tuning of a few matrices: FT-L and FT-M.

Both train the projections out of the MLP of chosen layers with Adam until the loss falls below 0.01, optionally
inside an L∞ ball around the weights (Zhu et al. 2020, "Modifying Memories in Transformer Models",
arXiv 2012.00363; the baseline of ROME, arXiv 2202.05262). They differ in the loss of a request with target
tokens ``y_1 … y_n``:

    FT-L   −(1/n) Σ_t log p(y_t | prompt)              one distribution, at the last prompt token
    FT-M   −(1/n) Σ_t log p(y_t | prompt, y_<t)        teacher forced, prompt masked

For targets of several tokens FT-L's loss is not a likelihood; it is kept because it is the published baseline.
FT-M is the better choice. The weights are trained as fp32 copies outside the model, whatever its dtype.

FT-M with ``breadth_first`` is LocFT-BF (arXiv 2509.22072): epochs over all requests of a call in shuffled
mini-batches, not one at a time in a fixed order, and targets that end with the end-of-text token.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch.func import functional_call

from ..anatomy.sight import ModuleScope, last_projections
from ..books.beside import Change, running
from ..books.ledger import WeightDelta
from ..config import EditConfig, ModelProfile, UnlearningConfig, WeightConfig, adam_step
from ..config.spaces import layer_windows, times
from ..engine.capture import top_experts
from ..engine.examples import Example, ExampleBatch, Objective, mean_of_open, target_probabilities
from ..engine.experts import ExpertSlice, parameter_name
from ..engine.rows import check_length
from ..engine.unlikelihood import Unlikelihood
from ..engine.weights import get_module, get_weight, is_offloaded, is_quantised, is_transposed
from ..errors import ConfigError, EditFailedError, WeightError
from ..logging import progress_bar, tell_loss
from ..requests import EditRequest
from ..tokens import TokenIds
from .base import BothFormats, Capabilities, Method, Outcome, Workbench, check_scope, register_method

_STOP_LOSS = 1e-2
BREADTH = 100
"""Requests that share a step of LocFT-BF."""


@dataclass
class FTConfig(UnlearningConfig, WeightConfig):
    """Hyperparameters of fine-tuning; see also `UnlearningConfig`.

    ``rows_per_step`` requests share a step (``None``: one at a time).

    Args:
        num_steps: passes over the requests.
        lr: Adam's learning rate.
        weight_decay: of Adam.
        norm_constraint: no element of a weight moves further than this from where the call found it; ``None``:
            unconstrained.
        modules: module names with ``{}`` for the layer index, instead of the projection out of the MLP.
        module_scope: of a model that sees, the part that is trained: ``language``: the layers above; ``connector``
            (projector, merger, Q-Former) or ``vision``: the last matrices of that part, or those in ``modules``.
        expert_policy: what is trained in layers with routed experts. ``shared``: the shared expert; layers without one
            are an error. ``top1``: for each request the expert with the largest weight where its first target token is
            predicted.
        train_bias: train the biases of these modules too (as published for GPT-2 and GPT-J).
        stop_loss: training ends when the mean loss of a pass falls below; smaller losses are not trained on.
    """

    num_steps: PositiveInt = 25
    lr: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 0.0
    norm_constraint: PositiveFloat | None = None
    modules: list[str] | None = None
    module_scope: ModuleScope = "language"
    expert_policy: Literal["shared", "top1"] = "shared"
    train_bias: bool = False
    stop_loss: NonNegativeFloat = _STOP_LOSS

    objective: ClassVar[Objective]

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """Fields filled from an hparams file or the model's depth."""
        return ("layers", "lr")

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """Two thirds up the stack, as in most published configurations."""
        return {"layers": [min(round(0.66 * profile.num_layers), profile.num_layers - 1)], "lr": 5e-4}

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Which matrix, how fast, and where training ends."""
        return {
            "layers": layer_windows(profile, self.layers, traced),
            "lr": times(self.lr, 3.0, 0.3, 10.0),
            "drift_bound": times(self.drift_bound, 4.0, 0.25),
            "stop_probability": [0.9, 0.97],
        }

    def cautious(self, profile: ModelProfile) -> dict[str, Any]:
        """Lower, where facts are read: high in the stack a matrix serves every prompt that ends alike."""
        careful = {"layers": [round(0.25 * profile.num_layers)], "lr": adam_step(profile), "num_steps": 100}
        return super().cautious(profile) | careful


@dataclass
class FTLConfig(FTConfig):
    """FT-L: all target tokens are scored at the last prompt token."""

    edit_type: ClassVar[str] = "ft-l"
    objective: ClassVar[Objective] = "prompt_last"


@dataclass
class FTMConfig(FTConfig):
    """FT-M: masked, teacher-forced cross-entropy.

    Args:
        breadth_first: LocFT-BF: the requests of a call are shuffled in every epoch and share steps, 100 at a time
            (``rows_per_step``), and their targets end with the end-of-text token. Made for many requests in one call.
    """

    edit_type: ClassVar[str] = "ft-m"
    objective: ClassVar[Objective] = "target_new"

    breadth_first: bool = False


class FineTuning(Method):
    """The training loop that FT-L and FT-M share."""

    both_formats: ClassVar[BothFormats | None] = "as two"
    pictures = True
    config: FTConfig

    def __init__(self, bench: Workbench, config: EditConfig):
        super().__init__(bench, config)
        self._experts: dict[str | None, dict[int, int]] = {}  # of the present call: request → layer → expert

    def parameters(self, requests: Sequence[EditRequest] | None = None) -> list[tuple[str, str]]:
        """(module, parameter name) of everything that is trained, for some requests of the present call or all."""
        config, anatomies = self.config, [self.bench.anatomy]
        if config.module_scope != "language":
            paths = config.modules or last_projections(self.bench.model, self.bench.anatomy, config.module_scope)
            return [(path, name) for path in paths for name in self._trained(path)]
        if self._routed:
            ids = self._experts if requests is None else [request.id for request in requests]
            anatomies = [self.bench.anatomy.with_experts(self._experts[i]) for i in ids]
        names = []
        for layer in config.layers or []:
            templates = config.modules or [anatomy.down(layer).path for anatomy in anatomies]
            for template in templates:
                path = template.replace("{}", str(layer))
                names += [(path, name) for name in self._trained(path)]
        return list(dict.fromkeys(names))

    def _trained(self, path: str) -> list[str]:
        biased = getattr(get_module(self.bench.model, path), "bias", None) is not None
        return ["weight", "bias"] if self.config.train_bias and biased else ["weight"]

    @property
    def _routed(self) -> bool:
        routed = self.config.expert_policy == "top1" and self.config.module_scope == "language"
        return routed and not self.config.modules

    def edited_modules(self) -> list[str]:
        """Modules whose parameters are trained."""
        return list(dict.fromkeys(path for path, _ in self.parameters()))

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check weights and requests."""
        bench, examples = self.bench, self.examples(requests, self.config.objective)
        check_scope(self.config.module_scope, requests)
        if self.breadth_first and not examples[0].decoder_ids:
            for request, example in zip(requests, self._ended(examples), strict=True):
                check_length(bench.model, request, len(example.ids))
        self.unlikelihood(requests)
        if self._routed:
            places = [(example.ids, example.positions[0]) for example in examples]
            chosen = top_experts(bench.model, bench.anatomy, self.config.layers or [], places, bench.fill)
            self._experts = {request.id: experts for request, experts in zip(requests, chosen, strict=True)}
        for path, name in self.parameters():
            bench.ledger.check_editable(path, name)
            module = get_module(bench.model, path)
            if is_offloaded(module, name) and (name == "bias" or isinstance(module, ExpertSlice)):
                raise WeightError(
                    f"{path}.{name} is offloaded, and is trained in memory only: load the model with a device_map that"
                    " keeps it there, or leave out train_bias"
                )

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Train on a batch of requests and return what changed."""
        bench, config = self.bench, self.config
        assert config.lr is not None
        examples = self.examples(requests, config.objective)
        teacher_forced = examples
        if config.objective != "target_new":
            teacher_forced = self.examples(requests)
        if self.breadth_first:
            examples = self._ended(examples)
        copies = TrainedCopies(bench.model, self.parameters(requests))
        optimiser = torch.optim.Adam(copies.values, lr=config.lr, weight_decay=config.weight_decay)
        size, order = config.rows_per_step or (BREADTH if self.breadth_first else 1), list(range(len(examples)))

        def mini_batches() -> list[tuple[list[int], ExampleBatch, Unlikelihood]]:
            parts = [order[i : i + size] for i in range(0, len(order), size)]
            batches = [ExampleBatch.of(bench.model, [examples[i] for i in part], bench.fill) for part in parts]
            unwanted = [self.unlikelihood([requests[i] for i in part]) for part in parts]
            return list(zip(parts, batches, unwanted, strict=True))

        steps, shuffled = mini_batches(), random.Random(config.seed)
        losses: list[list[float]] = [[] for _ in examples]
        epoch_losses: list[float] = []
        backward_passes = 0
        began = time.perf_counter()
        before = target_probabilities(bench.model, teacher_forced, bench.fill, size)
        restraint = self.restraint(copies.values, copies.edited())
        with progress_bar(config.num_steps, "fine-tuning", show=bench.show_progress) as bar:
            for _ in range(config.num_steps):
                done = lost = True
                if self.breadth_first and len(steps) > 1:
                    shuffled.shuffle(order)
                    steps = mini_batches()
                for chunk, batch, less in steps:
                    edited = copies.edited()
                    nll = batch.token_losses(edited)
                    per_row, held = batch.means(nll), batch.held(nll, config.stop_probability)
                    loss = mean_of_open(per_row, held)
                    # all that the host waits for in a step, but for the drift
                    *numbers, mean = torch.cat([per_row.detach(), loss.detach().unsqueeze(0)]).tolist()
                    if not math.isfinite(mean):
                        raise EditFailedError("the loss became NaN or infinite while fine-tuning; lower lr")
                    for i, value in zip(chunk, numbers, strict=True):
                        losses[i].append(value)
                    penalty = restraint.penalty(edited)
                    unlikely, gone = less.term(edited)
                    lost &= gone
                    if mean >= config.stop_loss or not gone or not restraint.allows(edited):
                        done = False
                        optimiser.zero_grad()
                        (loss + penalty + unlikely).backward()
                        backward_passes += 1
                        self._note_gradients(copies.now, backward_passes)
                        optimiser.step()
                    copies.keep_within(config.norm_constraint)
                epoch_losses.append(sum(row[-1] for row in losses) / len(losses))
                tell_loss(epoch_losses[-1])
                bar.update(1)
                if done or (epoch_losses[-1] < config.stop_loss and lost and restraint.within):
                    break
        restraint.settle(copies.edited)
        bench.note("epoch_losses", torch.tensor(epoch_losses))
        after = target_probabilities(copies.edited(), teacher_forced, bench.fill, size)
        drift = self.drift_report(restraint, after)
        seconds = time.perf_counter() - began
        diagnostics = [
            {
                "loss": [round(x, 6) for x in losses[i]],
                "target_probability_before": before[i],
                "target_probability_after": after[i],
                "steps": len(losses[i]),
                "seconds_training": seconds,
                **drift,
            }
            for i in range(len(examples))
        ]
        return Outcome(copies.deltas(), diagnostics)

    # ------------------------------------------------------------------ steps

    @property
    def breadth_first(self) -> bool:
        """Whether requests are trained as LocFT-BF does."""
        return isinstance(self.config, FTMConfig) and self.config.breadth_first

    def _ended(self, examples: Sequence[Example]) -> list[Example]:
        """Examples whose targets end with the end-of-text token; an encoder-decoder's do already.

        Raises:
            ConfigError: if the tokenizer has none.
        """
        if examples[0].decoder_ids:
            return list(examples)
        end = self.bench.tokenizer.eos_token_id
        if end is None:
            raise ConfigError("FTMConfig.breadth_first ends targets with the tokenizer's eos_token, and it has none")
        ended = []
        for example in examples:
            ids: tuple[int, ...] = (*example.ids, example.targets[-1])
            if isinstance(example.ids, TokenIds):  # takes its pictures along
                ids = example.ids.spread(ids, range(len(example.ids)))
            positions = (*example.positions, example.positions[-1] + 1)
            ended.append(replace(example, ids=ids, positions=positions, targets=(*example.targets, int(end))))
        return ended

    def _note_gradients(self, copies: Mapping[str, torch.Tensor], step: int) -> None:
        """Leave the first two gradients in the trace."""
        if self.bench.trace is not None and step <= 2:
            for key, value in copies.items():
                if value.grad is not None:
                    self.bench.note(f"grad_{'first' if step == 1 else 'second'}/{key}", value.grad)


class TrainedCopies:
    """Copies in fp32 of some parameters of a model, which are trained in the place of these.

    Args:
        model: is not touched.
        names: module and name of every parameter.

    Attributes:
        start: full name → the value that was found, as `get_weight` gives it.
        now: full name → the copy, which collects a gradient.
    """

    def __init__(self, model: torch.nn.Module, names: Sequence[tuple[str, str]]):
        self.model, self.names = model, tuple(names)
        self.start = {f"{m}.{n}": get_weight(get_module(model, m), n).float() for m, n in names}
        self.now = {key: value.clone().requires_grad_(True) for key, value in self.start.items()}

    @property
    def values(self) -> list[torch.Tensor]:
        """The copies, for an optimiser."""
        return list(self.now.values())

    def edited(self) -> Substituted:
        """The model with the copies as they are."""
        return Substituted(self.model, self.now)

    @torch.no_grad()
    def keep_within(self, bound: float | None) -> None:
        """Bring every element back that is further than ``bound`` from where it was found; ``None``: none."""
        if bound is None:
            return
        for start, now in zip(self.start.values(), self.now.values(), strict=True):
            now.copy_(torch.maximum(torch.minimum(now, start + bound), start - bound))

    def deltas(self) -> list[WeightDelta]:
        """What the training changed."""
        keys = ((module, name, f"{module}.{name}") for module, name in self.names)
        return [WeightDelta(m, n, dense=(self.now[key] - self.start[key]).detach()) for m, n, key in keys]


class Substituted:
    """The model, or a part of it, with some parameters replaced by trained copies; it is itself not touched.

    Of a parameter that is quantised or offloaded, the difference between the copy and it runs beside it.
    """

    def __init__(self, model: torch.nn.Module, copies: Mapping[str, torch.Tensor]):
        self.model = model
        self.replaced: dict[str, torch.Tensor] = {}
        self.beside: list[tuple[torch.nn.Module, Change]] = []
        for key, value in copies.items():
            path, _, name = key.rpartition(".")
            module, whole = get_module(model, path), parameter_name(path, name)
            if is_quantised(module, name) or is_offloaded(module, name):
                difference = value - get_weight(module, name).to(value)
                self.beside.append((module, Change.of_parameter(difference)))
                continue
            stored = getattr(module, name)
            turned = value.t() if value.dim() == 2 and is_transposed(module) else value
            turned = turned.to(device=stored.device, dtype=stored.dtype)
            if isinstance(module, ExpertSlice):
                turned = module.put_into(self.replaced.get(whole, getattr(module.bank, module.param)), turned)
            self.replaced[whole] = turned

    def get_base_model(self) -> torch.nn.Module:
        """The model, for questions about its signature."""
        inner = getattr(self.model, "get_base_model", None)
        return cast(torch.nn.Module, inner() if callable(inner) else self.model)

    def get_input_embeddings(self) -> Any:
        """The model's own, for the question on which device inputs are expected."""
        return self.model.get_input_embeddings()  # type: ignore[operator]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with running(self.beside):
            return functional_call(self.model, self.replaced, args, kwargs)


@register_method
class FTL(FineTuning):
    """FT-L."""

    config_class = FTLConfig
    capabilities = Capabilities(
        name="FT-L",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        undo="call",
        encoder_decoder=True,
        paper="Zhu et al. 2020, arXiv 2012.00363; as in Meng et al. 2022, arXiv 2202.05262",
        summary="fine-tunes one MLP projection, all target tokens scored at the last prompt token",
    )


@register_method
class FTM(FineTuning):
    """FT-M."""

    config_class = FTMConfig
    capabilities = Capabilities(
        name="FT-M",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        undo="call",
        encoder_decoder=True,
        paper="Zhang et al. 2024, arXiv 2401.01286",
        summary="fine-tunes one MLP projection with the usual masked, teacher-forced loss",
    )
