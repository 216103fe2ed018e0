"""UnKE: Unstructured Knowledge Editing (Deng et al. 2024, arXiv 2405.15349). For answers of many tokens.

ROME and its relatives put a fact at the last token of a subject into one matrix. A long answer has no such subject,
so UnKE takes the last token of the prompt, and all of a layer's parameters. First the state ``h`` of that token behind
the layer ``l`` is optimised until the model says the whole answer ``y``:

    z = h + argmin_δ −(1/|y|) Σ_t log p(y_t | x, y_<t; h + δ) + w ‖δ‖ / ‖h‖²

Then the layer is trained to bring about ``z`` there, and nothing else. With its outputs ``f`` before the edit, over
all tokens of the prompts (``f*`` has ``z`` at their last ones) and of general texts ``g``:

    θ_l ← argmin_θ mean ‖f_θ(x) − f*(x)‖² + mean ‖f_θ(g) − f(g)‖²

With several layers, each takes its share of what is missing, from below, as in MEMIT.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ..books.ledger import WeightDelta
from ..config import BoundedConfig, ModelProfile, WeightConfig, adam_step
from ..config.spaces import layer_windows, times
from ..engine.capture import ModuleCall
from ..engine.examples import Example, ExampleBatch, target_probabilities
from ..engine.forward import device_of
from ..engine.rows import Row, check_lengths, prompt_end_rows
from ..engine.weights import get_module, is_offloaded, weight_shape
from ..errors import EditFailedError, WeightError
from ..logging import progress_bar
from ..requests import EditRequest
from ..tokens import TokenBatch, encode_text, pad_rows
from ..values.optimise import Values, optimise_values
from ..values.settings import ValueSettings
from .base import BothFormats, Capabilities, Method, Outcome, register_method
from .drift import WATCHED_TEXTS
from .ft import Substituted, TrainedCopies
from .locate_then_edit import value_defaults

LOOK_EVERY = 5
"""Steps of the training between two looks at what the model says."""
HELD_AT_ONCE = 60
"""General texts that a step looks at; of more, each step looks at another part."""
LONG_DRIFT = 5e-3
"""``drift_bound`` without a packaged file: a long answer needs more room than a fact (docs/methods/unke.md)."""


@dataclass
class UnKEConfig(BoundedConfig, WeightConfig):
    """Hyperparameters of UnKE; see also `BoundedConfig`. ``drift_bound`` is looked at when the training has ended.

    Args:
        layers: that are trained; the state is optimised behind the last one.
        v_num_grad_steps: evaluations of the loss while a state is optimised.
        v_lr: Adam's learning rate there.
        v_weight_decay: w.
        clamp_norm_factor: ``‖δ‖`` stays below this multiple of ``‖h‖``.
        v_stop_loss: a state is done when its loss falls below.
        num_steps: of the training of a layer, at most.
        lr: AdamW's learning rate there.
        weight_decay: of AdamW, on matrices.
        held_texts: general texts whose outputs are held; from the corpus of the statistics, so that a user's own is
            taken where there is one.
        held_weight: factor of their term.
        held_tokens: so many tokens of each, at most.
        train_vectors: norms and biases of the layers too, as published. Beside offloaded weights, matrices alone can
            be trained.
    """

    edit_type: ClassVar[str] = "unke"

    v_num_grad_steps: PositiveInt | None = None
    v_lr: PositiveFloat | None = None
    v_weight_decay: NonNegativeFloat | None = None
    clamp_norm_factor: PositiveFloat | None = None
    v_stop_loss: NonNegativeFloat = 0.0
    num_steps: PositiveInt = 50
    lr: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 0.01
    held_texts: NonNegativeInt = 20
    held_weight: PositiveFloat = 1.0
    held_tokens: PositiveInt = 64
    train_vectors: bool = True

    def validate(self) -> None:
        """Put the layers into the order in which they are trained."""
        super().validate()
        if self.layers is not None:
            self.layers = sorted(self.layers)

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """Fields filled from an hparams file or the model's depth and width."""
        return ("layers", "v_num_grad_steps", "v_lr", "v_weight_decay", "clamp_norm_factor", "lr")

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """The layer at the published depth (7 of 32)."""
        return value_defaults(profile) | {"layers": [round(0.22 * profile.num_layers)], "lr": 2e-4}

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Which layer, how far a state may go, how fast the layer learns, and how much it may move other text."""
        return {
            "layers": layer_windows(profile, self.layers, traced),
            "clamp_norm_factor": times(self.clamp_norm_factor, 0.5, 2.0),
            "lr": times(self.lr, 3.0, 0.3),
            "drift_bound": times(self.drift_bound, 4.0, 0.25),
        }

    def cautious(self, profile: ModelProfile) -> dict[str, Any]:
        """Until the answer holds, with more text held; no weight decay, which moves all of the layer for nothing.

        Deeper, and with more steps, than published for models of 7B: the states of small ones hold less.
        """
        careful: dict[str, Any] = {"lr": adam_step(profile), "num_steps": 100, "weight_decay": 0.0}
        careful |= {"layers": [round(0.47 * profile.num_layers)], "v_num_grad_steps": 60, "v_stop_loss": 0.05}
        careful |= {"held_texts": 240, "held_tokens": 24, "held_weight": 30.0, "drift_bound": LONG_DRIFT}
        return super().cautious(profile) | careful

    def value_settings(self) -> ValueSettings:
        """How states are optimised."""
        assert self.v_num_grad_steps is not None and self.v_lr is not None
        assert self.v_weight_decay is not None and self.clamp_norm_factor is not None
        return ValueSettings(
            steps=self.v_num_grad_steps,
            lr=self.v_lr,
            weight_decay=self.v_weight_decay,
            clamp=self.clamp_norm_factor,
            kl_factor=0.0,
            stop_loss=self.v_stop_loss,
        )


@dataclass(frozen=True)
class Anchored:
    """A text, and the states that some of its tokens are to have behind the last trained layer.

    Args:
        ids: the text.
        columns: of the tokens.
        states: wanted, ``[columns, d]`` fp32.
    """

    ids: tuple[int, ...]
    columns: tuple[int, ...]
    states: torch.Tensor


@register_method
class UnKE(Method):
    """UnKE."""

    both_formats: ClassVar[BothFormats | None] = "as two"
    config_class = UnKEConfig
    capabilities = Capabilities(
        name="UnKE",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        undo="call",
        paper="Deng et al. 2024, arXiv 2405.15349",
        summary="for long answers: optimises the prompt's last state and trains one whole layer to bring it about",
    )
    config: UnKEConfig

    @property
    def layers(self) -> list[int]:
        """The trained layers, from below."""
        return sorted(self.config.layers or [])

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """(module, parameter name) of what is trained: everything in the layers but banks of routed experts."""
        names = []
        for layer in self.layers:
            block = self.bench.anatomy.block(layer)
            for name, parameter in get_module(self.bench.model, block).named_parameters():
                if "." in name and (parameter.dim() == 2 or (parameter.dim() < 2 and self.config.train_vectors)):
                    module, _, own = f"{block}.{name}".rpartition(".")
                    names.append((module, own))
        return names

    def edited_modules(self) -> list[str]:
        """Modules whose parameters are trained."""
        return list(dict.fromkeys(module for module, _ in self.parameters))

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check weights and lengths."""
        for module, name in self.parameters:
            self.bench.ledger.check_editable(module, name)
            owner = get_module(self.bench.model, module)
            if is_offloaded(owner, name) and weight_shape(owner, name)[1:] == ():
                raise WeightError(
                    f"{module}.{name} is offloaded, and is trained in memory only: set train_vectors=False, or load"
                    " the model with a device_map that keeps it there"
                )
        check_lengths(self.bench.model, self._rows(requests), requests)

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Optimise one state per request, and train the layers on all of them."""
        rows = self._rows(requests)
        values = self.values([[row] for row in rows])
        states = values.value
        texts = [Anchored(row.ids[: row.fact + 1], (row.fact,), states[i : i + 1]) for i, row in enumerate(rows)]
        deltas, numbers = self.train(texts, [Example(row.ids, row.positions, row.targets) for row in rows])
        for i, diagnostics in enumerate(numbers):
            diagnostics |= {
                "loss": [round(row[0], 6) for row in values.loss[i]],
                "value_probability": values.probability[i][1],
                "value_norm_ratio": float(values.offset[i].norm() / values.initial[i].norm().clamp_min(1e-12)),
                "updates": values.updates[i],
            }
        return Outcome(deltas, numbers)

    # ------------------------------------------------------------------ states

    def _rows(self, requests: Sequence[EditRequest]) -> list[Row]:
        return prompt_end_rows(self.bench.tokenizer, requests, self.config.separator)

    def values(self, rows: Sequence[Sequence[Row]]) -> Values:
        """The states that make the model say what the rows supervise, behind the last trained layer."""
        bench = self.bench
        return optimise_values(
            bench.model,
            bench.anatomy,
            rows,
            self.layers[-1],
            "block",
            self.config.value_settings(),
            fill=bench.fill,
            batch_size=self.config.rows_per_step,
            show_progress=bench.show_progress,
        )

    # ------------------------------------------------------------------ layers

    def train(
        self, texts: Sequence[Anchored], examples: Sequence[Example]
    ) -> tuple[list[WeightDelta], list[dict[str, Any]]]:
        """Train the layers, from below, to bring about the wanted states and to leave everything else alone.

        Args:
            texts: what is read, and the wanted states.
            examples: the answer of every request: says how well it is given, and when it is enough.

        Returns:
            What changed, and numbers for the diagnostics of every request.
        """
        bench, config = self.bench, self.config
        began, size = time.perf_counter(), config.rows_per_step or 1
        copies = TrainedCopies(bench.model, self.parameters)
        restraint = self.restraint(copies.values, copies.edited())
        before = target_probabilities(bench.model, examples, bench.fill, size)
        chunks = [examples[i : i + size] for i in range(0, len(examples), size)]
        answers = [ExampleBatch.of(bench.model, chunk, bench.fill) for chunk in chunks]
        read, held = self._batch([text.ids for text in texts]), self._held()
        parts = range(-(-len(held) // HELD_AT_ONCE))
        batches = [read, *(self._batch(held[part :: len(parts)]) for part in parts)]
        rows = torch.tensor([i for i, text in enumerate(texts) for _ in text.columns])
        places = (rows, torch.tensor([column for text in texts for column in text.columns]))
        wanted = torch.cat([text.states for text in texts])
        top, steps, missing_at_first = bench.anatomy.block(self.layers[-1]), 0, torch.ones(len(rows))
        with progress_bar(len(self.layers) * config.num_steps, "training layers", show=bench.show_progress) as bar:
            for i, layer in enumerate(self.layers):
                block, left = bench.anatomy.block(layer), len(self.layers) - i
                calls = [ModuleCall.of(bench.model, block, batch, copies.edited()) for batch in batches]
                now = calls[0] if block == top else ModuleCall.of(bench.model, top, read, copies.edited())
                at = tuple(place.to(now.output.device) for place in places)
                missing = wanted.to(now.output) - now.output[at]
                targets = [call.output.clone() for call in calls]
                targets[0][tuple(place.to(targets[0].device) for place in places)] += (missing / left).to(targets[0])
                if i == 0:
                    missing_at_first = missing.norm(dim=-1)

                def enough(last: bool = left == 1) -> bool:
                    """Whether every answer is given; only a look at the last layer can tell."""
                    return last and all(self._says(batch, copies.edited()) for batch in answers)

                steps = self._fit(block, copies.now, list(zip(calls, targets, strict=True)), enough, bar.update)
                bar.update((i + 1) * config.num_steps - bar.n)
        restraint.settle(copies.edited)
        after = target_probabilities(copies.edited(), examples, bench.fill, size)
        numbers = {"steps": steps, **self.drift_report(restraint, after)}
        end = ModuleCall.of(bench.model, top, read, copies.edited()).output.cpu()[places]
        short, way = (wanted.cpu() - end).norm(dim=-1), missing_at_first.cpu()
        numbers["seconds_training"] = time.perf_counter() - began
        return copies.deltas(), [
            {
                "target_probability_before": before[i],
                "target_probability_after": after[i],
                "residual_ratio": float(short[rows == i].sum() / way[rows == i].sum().clamp_min(1e-12)),
                **numbers,
            }
            for i in range(len(examples))
        ]

    @torch.enable_grad()
    def _fit(
        self,
        block: str,
        copies: Mapping[str, torch.Tensor],
        calls: Sequence[tuple[ModuleCall, torch.Tensor]],
        enough: Callable[[], bool],
        each_step: Callable[[int], Any],
    ) -> int:
        """Train one layer by itself, on what it was called with; returns the number of steps.

        Args:
            block: its name.
            copies: all trained parameters by full name; those of this layer are moved.
            calls: what the layer is called with, and what it is to return, ``[rows, width, d]``: the texts of the
                edit, then parts of the general ones, of which a step looks at one.
            enough: whether to end here; asked now and then.
            each_step: is told of every step.
        """
        config, layer = self.config, get_module(self.bench.model, block)
        own = {k.removeprefix(f"{block}."): v for k, v in copies.items() if k.startswith(f"{block}.")}
        groups = [
            {"params": [v for v in own.values() if v.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [v for v in own.values() if v.dim() <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=config.lr or 0.0)
        for step in range(1, config.num_steps + 1):
            trained, general = Substituted(layer, own), calls[1:]
            seen = [calls[0], *([general[step % len(general)]] if general else [])]
            loss = torch.stack([call.mean_of((call.of_module(trained) - y).square().mean(-1)) for call, y in seen])
            if not math.isfinite(float(loss.detach().sum())):
                raise EditFailedError("the loss became NaN or infinite while a layer was trained; lower lr")
            optimiser.zero_grad()
            weights = loss.new_tensor([1.0, config.held_weight][: len(loss)])
            (weights * loss).sum().backward()
            optimiser.step()
            each_step(1)
            if step % LOOK_EVERY == 0 and enough():
                return step
        return config.num_steps

    @torch.no_grad()
    def _says(self, answers: ExampleBatch, model: Substituted) -> bool:
        if self.config.stop_probability is None:
            return False
        return bool(answers.held(answers.token_losses(model), self.config.stop_probability).all())

    def _held(self) -> list[Sequence[int]]:
        """The general texts as token ids."""
        # Behind those by which the drift is judged, which would be no judges otherwise.
        last = WATCHED_TEXTS + self.config.held_texts
        texts = islice(self.bench.statistics.corpus_texts(more=False), WATCHED_TEXTS, last)
        rows = (encode_text(self.bench.tokenizer, text).ids[: self.config.held_tokens] for text in texts)
        return [row for row in rows if row]

    def _batch(self, rows: Sequence[Sequence[int]]) -> TokenBatch:
        return pad_rows(rows, self.bench.fill).to(device_of(self.bench.model))
