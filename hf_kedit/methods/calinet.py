"""CaliNet (Dong et al. 2022, "Calibrating Factual Knowledge in Pretrained Language Models", arXiv 2210.03329).

A second, small feed-forward layer runs beside the one of chosen layers and is trained on a batch of facts, everything
else frozen:

    FFN'(x) = FFN(x) + act(x K) V

The paper calibrates T5; here the layers are those of decoder-only models. Where the model's own feed-forward layers
are gated, so is the new one: ``act(x K) ⊙ (x G)``. ``V`` starts at 0, so that an untrained layer changes nothing.
Every batch brings ``slots`` neurons of its own and leaves those of earlier batches frozen, so that batches follow one
another and each can be taken back exactly. Trained with Adam (the paper: Adafactor).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from ..books.site_book import SiteEntry
from ..config import BoundedConfig, ModelProfile
from ..config.spaces import layer_windows, times
from ..engine.activations import hidden_activation
from ..engine.examples import all_likely, mean_of_open, row_means
from ..engine.neurons import NeuronGroup
from ..engine.replay import Replay, ReplayRow
from ..engine.rows import Row, check_lengths, prompt_end_rows, rewrite_row
from ..engine.weights import compute_device
from ..errors import EditFailedError
from ..logging import progress_bar
from ..requests import EditRequest
from .base import BothFormats, Capabilities, Method, Outcome, register_method
from .side_neurons import Calibration, mlp_path


@dataclass
class CaliNetConfig(BoundedConfig):
    """Hyperparameters of CaliNet; see also `BoundedConfig`.

    ``rows_per_step`` rows share a forward pass (64 by default).

    Args:
        slots: neurons per batch of edits and layer; the paper takes 64 for 100 facts.
        lr: Adam's learning rate.
        num_steps: largest number of passes over the batch.
        stop_loss: training ends when the mean loss of a pass falls below.
        gated: gate the new neurons; ``None``: where the model's own layer is gated.
        context_templates: texts with ``{}`` to put edits in; ``None``: the bare prompt and short generated contexts.
        context_lengths: (tokens, number) of generated contexts.
    """

    edit_type: ClassVar[str] = "calinet"

    slots: PositiveInt = 64
    lr: PositiveFloat = 1e-3
    num_steps: PositiveInt = 200
    stop_loss: NonNegativeFloat = 1e-2
    gated: bool | None = None
    context_templates: list[str] | None = None
    context_lengths: list[tuple[int, int]] = field(default_factory=lambda: [(5, 2)])

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Which layer, how fast, how many neurons, and where training ends."""
        return {
            "layers": layer_windows(profile, self.layers, traced),
            "lr": times(self.lr, 3.0, 0.3),
            "slots": [16, 4],
            "drift_bound": times(self.drift_bound, 4.0, 0.25),
            "stop_probability": [0.9],
        }

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """The last layer, as published for T5-base."""
        return {"layers": [profile.num_layers - 1]}


@register_method
class CaliNet(Method):
    """CaliNet."""

    both_formats: ClassVar[BothFormats | None] = "itself"
    config: CaliNetConfig
    config_class = CaliNetConfig
    capabilities = Capabilities(
        name="CaliNet",
        kind="adapter",
        batch=True,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        undo="call",
        paper="Dong et al. 2022, arXiv 2210.03329",
        summary="a small feed-forward layer beside the last one, trained on a batch of facts",
    )

    @cached_property
    def paths(self) -> dict[str, int]:
        """Feed-forward module → index of its layer, from the bottom up."""
        return {mlp_path(self.bench.anatomy, layer, "CaliNet"): layer for layer in sorted(self.config.layers or [])}

    def edited_modules(self) -> list[str]:
        """The feed-forward modules."""
        return list(self.paths)

    def site(self) -> Calibration:
        """The side layers in the model, or none yet."""
        new = Calibration(list(self.paths), {}, hidden_activation(self.bench.model))
        existing = self.bench.sites.find(new.key)
        return existing if isinstance(existing, Calibration) and existing.paths == new.paths else new

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check the layers and every request."""
        self.site()
        check_lengths(self.bench.model, prompt_end_rows(self.bench.tokenizer, requests), requests)

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Train new neurons on a batch."""
        bench, config, site = self.bench, self.config, self.site()
        rows = self._rows(requests)
        size = config.rows_per_step or 64
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        replays = [self._replay(chunk) for chunk in chunks]
        neurons = self._start(len(site.edit_ids))
        parameters = [t for g in neurons.values() for t in (g.keys, g.values, g.gates) if t is not None]
        for parameter in parameters:
            parameter.requires_grad_(True)
        before = [_means(_token_losses(r.base_logits, c), c) for r, c in zip(replays, chunks, strict=True)]
        optimiser = torch.optim.Adam(parameters, lr=config.lr)
        losses: list[float] = []
        with (
            bench.sites.trying(site.functions_with(lambda path: neurons[path]), instead_of=site),
            progress_bar(config.num_steps, "calibrating", show=bench.show_progress) as bar,
        ):
            restraint = self.restraint(parameters)
            for _ in range(config.num_steps):
                total, done = 0.0, True
                for replay, chunk in zip(replays, chunks, strict=True):
                    nll = _token_losses(replay.logits({}), chunk)
                    per_row, held = _means(nll, chunk), all_likely(*nll, len(chunk), config.stop_probability)
                    if not bool(torch.isfinite(per_row).all()):
                        raise EditFailedError("CaliNet: the loss became NaN or infinite; lower lr")
                    total += float(per_row.detach().sum())
                    drift = restraint.penalty(bench.model)
                    if bool(held.all()) and restraint.allows(bench.model):
                        continue
                    done = False
                    optimiser.zero_grad()
                    (mean_of_open(per_row, held) + drift).backward()
                    optimiser.step()
                losses.append(total / len(rows))
                bar.update(1)
                if done or (losses[-1] < config.stop_loss and restraint.within):
                    break
            restraint.settle(lambda: bench.model)
            with torch.no_grad():
                after = [_means(_token_losses(r.logits({}), c), c) for r, c in zip(replays, chunks, strict=True)]
        trained = {path: group.detached() for path, group in neurons.items()}
        probabilities = [_bare(torch.cat(losses_), rows, len(requests)) for losses_ in (before, after)]
        drift_report = self.drift_report(restraint, probabilities[1])
        diagnostics = [
            {
                "loss": [round(x, 6) for x in losses],
                "target_probability_before": first,
                "target_probability_after": last,
                "steps": len(losses),
                **drift_report,
            }
            for first, last in zip(*probabilities, strict=True)
        ]
        return Outcome([], diagnostics, [SiteEntry(site, trained)])

    def _replay(self, rows: Sequence[Row]) -> Replay:
        """The model from the lowest calibrated layer on, earlier batches in effect."""
        replayed = [ReplayRow(r.ids, 0, r.positions) for r in rows]
        bench = self.bench
        return Replay(bench.model, bench.anatomy, replayed, min(self.paths.values()), (), fill=bench.fill)

    def _rows(self, requests: Sequence[EditRequest]) -> list[Row]:
        """Every request in every context; the bare prompt first, unless the user left it out."""
        groups = self.bench.context_templates(
            self.config.context_templates, self.config.context_lengths, self.config.seed
        )
        templates = [t for group in groups for t in group]
        return [
            rewrite_row(
                self.bench.tokenizer,
                form,
                template,
                owner=i,
                template_index=j,
                fact_token="last",
                separator=self.config.separator,
            )
            for i, request in enumerate(requests)
            for form in request.formats()
            for j, template in enumerate(templates)
        ]

    def _start(self, number: int) -> dict[str, NeuronGroup]:
        """New neurons at every layer; ``number`` edits came before them."""
        bench, config = self.bench, self.config
        generator = torch.Generator().manual_seed(config.seed + number)
        width = bench.anatomy.hidden_size
        groups = {}
        for path, layer in self.paths.items():
            device = compute_device(bench.model.get_submodule(path))
            gated = bench.anatomy.layer(layer).gated if config.gated is None else config.gated
            keys, gates = (torch.randn(config.slots, width, generator=generator) * width**-0.5 for _ in range(2))
            values = torch.zeros(config.slots, width, device=device)
            groups[path] = NeuronGroup((), keys.to(device), values, gates=gates.to(device) if gated else None)
        return groups


def _token_losses(logits: torch.Tensor, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of every target token, ``[tokens]``, and the row of each, ``[tokens]`` int64."""
    targets = torch.tensor([t for r in rows for t in r.targets], device=logits.device)
    owners = torch.tensor([i for i, r in enumerate(rows) for _ in r.targets], device=logits.device)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none"), owners


def _means(losses: tuple[torch.Tensor, torch.Tensor], rows: Sequence[Row]) -> torch.Tensor:
    """Mean negative log-likelihood of each row's target, ``[rows]``."""
    return row_means(*losses, len(rows))


def _bare(losses: torch.Tensor, rows: Sequence[Row], count: int) -> list[float]:
    """Probability of each request's target in its first context."""
    probability = dict[int, float]()
    for loss, row in zip(losses.tolist(), rows, strict=True):
        probability.setdefault(row.owner, float(torch.tensor(-loss).exp()))
    return [probability[i] for i in range(count)]
