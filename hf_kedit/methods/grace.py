"""GRACE (Hartvigsen et al. 2023, "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors",
arXiv 2211.11031).

A codebook at one linear layer. An entry has a key (the layer's input at the last token of an edit's prompt), a
value, a radius ε and the target that it stands for. A prompt whose key token lies within the radius of the nearest
key gets the value instead of the layer's output; every other prompt passes through bit for bit. No weight changes.

An edit with query q, whose nearest entry k is at distance d (section 3 of the paper, ε0 the initial radius):

    add        d > ε0 + ε_k        a new entry with radius ε0
    split      other target        a new entry with radius d/2; ε_k becomes d/2 − 1e-5
    overwrite  other target, d ≈ 0 the entry gets the new target and a fresh value (a split would disable both)
    expand     same target         ε_k becomes d where that is more; the value is trained further

Then the value is trained by gradient descent on the target's likelihood. Every entry keeps what happened to it, so
that taking one edit back restores its neighbours' radii and the value from before. The codebook is in
grace_codebook.py.

Several edits at once end up as they do one after another: keys do not depend on the codebook, so all are read in one
pass; where each edit goes is decided in their order; then the values are trained together, except that one which goes
on from the value of another waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch.nn.utils.rnn import pad_sequence

from ..books.site_book import SiteEntry
from ..books.sites import SiteCall
from ..config import ModelProfile, StoppingConfig
from ..config.spaces import layer_windows
from ..engine.capture import Tap
from ..engine.examples import Example, ExampleBatch
from ..engine.forward import logits_at
from ..engine.trained_outputs import TrainedOutputs, train_outputs
from ..errors import ConfigError
from ..logging import get_logger, warn_once
from ..requests import EditRequest
from .base import BothFormats, Capabilities, Outcome, register_method
from .grace_codebook import Codebook, CodeChange, Event, Placement, Replacement, replaced
from .site_method import SiteConfig, SiteMethod, before_and_after, check_loss

logger = get_logger(__name__)


@dataclass
class GRACEConfig(StoppingConfig, SiteConfig):
    """Hyperparameters of GRACE; see also `StoppingConfig`.

    Args:
        num_steps: Adam steps on the value.
        lr: of Adam.
        eps: ε0, the radius of a new entry; also how far beyond an entry's radius a query still concerns it.
        value_init: ``cold``: uniform in [0, 1); ``warm``: the layer's own output.
        replacement: which positions get the value: ``replace_last``: the key token; ``replace_all``: every position,
            generated ones included; ``replace_prompt``: the prompt without its last token.
        skip_if_correct: leave the codebook alone where the model already says the target.
        seed: of cold values.
    """

    edit_type: ClassVar[str] = "grace"

    num_steps: PositiveInt | None = None
    lr: PositiveFloat = 1.0
    eps: PositiveFloat = 1.0
    value_init: Literal["cold", "warm"] = "cold"
    replacement: Replacement = "replace_last"
    skip_if_correct: bool = False
    seed: int = 0

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """Fields filled from an hparams file or the model's depth."""
        return ("layers", "num_steps")

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Where keys are compared, how far an entry reaches (in the model's own scale), and how its value is found."""
        return {
            "layers": layer_windows(profile, self.layers, traced),
            "eps": [20.0, 5.0, 80.0],
            "num_steps": [100, 30],
            "lr": [0.3, 3.0],
        }

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """Two thirds up the stack: high enough for keys that mean something, with layers above to use the value."""
        return {"layers": [min(round(0.66 * profile.num_layers), max(profile.num_layers - 2, 0))], "num_steps": 50}


# ---------------------------------------------------------------------- the method


@register_method
class GRACE(SiteMethod):
    """Edits as entries of a codebook."""

    pictures = True
    both_formats: ClassVar[BothFormats | None] = "as two"
    config_class = GRACEConfig
    capabilities = Capabilities(
        name="GRACE",
        kind="adapter",
        batch=True,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        paper="Hartvigsen et al. 2023, arXiv 2211.11031",
        summary="a codebook at one layer replaces its output for prompts close to an edit; the weights stay",
    )
    config: GRACEConfig

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check the layer, the codebook that is there, tokens and lengths."""
        super().check(requests)
        self._codebook()
        (layer,) = self.config.layers or [0]
        if layer == self.bench.anatomy.num_layers - 1 and self.config.replacement == "replace_last":
            warn_once(
                logger,
                "GRACE at the last layer with replace_last changes only the first token of an answer, because no layer"
                " above can carry the value on; choose a lower layer, or replace_all",
            )

    def _codebook(self) -> Codebook:
        """The codebook at this layer, or a new one."""
        config = self.config
        codebook = self.bench.sites.find(f"{Codebook.kind}@{self.path}")
        if codebook is None:
            return Codebook(self.path, self.sizes(self.path), config.eps, config.replacement)
        assert isinstance(codebook, Codebook)
        if (codebook.eps, codebook.replacement) != (config.eps, config.replacement):
            raise ConfigError(
                f"the codebook at {self.path} was begun with eps={codebook.eps} and"
                f" replacement={codebook.replacement!r};"
                " go on with these, or roll its edits back first"
            )
        return codebook

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Find the entries that the edits concern, and train their values."""
        examples, codebook = self.examples(requests), self._codebook()
        before = self.probabilities(examples)
        taps = Tap(self.path, "input"), Tap(self.path, "output")
        with self.bench.sites.trying({}, instead_of=codebook):
            states = self.at_key(examples, taps)
        self.bench.note("query", states[taps[0]].squeeze(0))
        plan = _Plan(codebook.draft())
        for i, (example, query, output) in enumerate(zip(examples, *(states[t] for t in taps), strict=True)):
            placement = plan.draft.place(query, example.targets)
            if plan.waits_for(placement, measured=self.config.skip_if_correct):
                self._train_waiting(plan, examples, codebook)
            if self.config.skip_if_correct and self._says_it(example, plan.draft, codebook):
                placement, start = Placement("none"), output
            elif placement.action == "expand":
                assert placement.entry is not None
                start = plan.draft.value_of(placement.entry).to(query.device)
            else:
                start = self.initial_value(output, len(plan.draft.values))
            plan.take(str(requests[i].id), CodeChange(placement, query, start, example.targets))
        self._train_waiting(plan, examples, codebook)
        reports, entries = [], []
        for i, (change, lost) in enumerate(zip(plan.changes, plan.uncovered, strict=True)):
            losses, after = plan.outcomes.get(i, ([], before[i]))
            place = change.placement
            more = {"distance": place.distance, "uncovers": lost} if place.action != "none" else {}
            reports += before_and_after([before[i]], [after], losses, action=place.action, **more)
            entries.append(SiteEntry(codebook, change))
        return Outcome([], reports, entries)

    def initial_value(self, output: torch.Tensor, number: int) -> torch.Tensor:
        """The value ``[d_out]`` that training starts from; ``number`` chooses among the random ones."""
        if self.config.value_init == "warm":
            return output.clone()
        generator = torch.Generator().manual_seed(self.config.seed + number)
        return torch.rand(output.shape, generator=generator).to(output.device)

    def _train_waiting(self, plan: _Plan, examples: Sequence[Example], codebook: Codebook) -> None:
        """Train the values that the plan has not trained yet."""
        if plan.waiting:
            starts = torch.stack([plan.changes[i].value for i in plan.waiting])
            plan.trained(self._train([examples[i] for i in plan.waiting], codebook, starts))

    def _train(self, examples: Sequence[Example], codebook: Codebook, starts: torch.Tensor) -> TrainedOutputs:
        """Adam on the values alone, ``[edits, d_out]`` each.

        One output at the key token can be trained from the layer on. A value in several places, or sites of other
        methods on the way, need whole forwards.
        """
        config, bench = self.config, self.bench
        assert config.num_steps is not None
        layer = next((i for i, b in enumerate(bench.anatomy.layers) if self.path.startswith(f"{b.path}.")), None)
        others = any(memory.key != codebook.key for memory in bench.sites.memories.values())
        if config.replacement != "replace_last" or others or layer is None:
            return _joined([self._train_whole(e, codebook, start) for e, start in zip(examples, starts, strict=True)])
        with bench.sites.trying({}, instead_of=codebook):
            outputs = train_outputs(
                bench.model, bench.anatomy, examples, layer, self.path, starts,
                steps=config.num_steps, lr=config.lr, until=config.stop_probability, fill=bench.fill,
                watch=self._watch, description="training values (GRACE)", show_progress=bench.show_progress,
            )  # fmt: skip
        losses = [torch.tensor(steps) for steps in outputs.losses]  # which may end at different steps
        bench.note("losses", pad_sequence(losses, batch_first=True, padding_value=math.nan).squeeze(0))
        return outputs

    def _watch(self, step: int, values: torch.Tensor, gradients: torch.Tensor) -> None:
        if step == 0:
            self.bench.note("value_grad_step0", gradients.squeeze(0))
        self.bench.note(f"value_after_step{step}", values.squeeze(0))

    def _train_whole(self, example: Example, codebook: Codebook, start: torch.Tensor) -> TrainedOutputs:
        """The same with forwards of the whole text, for one edit."""
        config = self.config
        assert config.num_steps is not None
        value = start.detach().float().clone().requires_grad_(True)
        optimiser = torch.optim.Adam([value], lr=config.lr)
        losses = []

        def in_place(call: SiteCall) -> torch.Tensor:
            return replaced(call, value[None], config.replacement)

        batch, bench = ExampleBatch.of(self.bench.model, [example], self.bench.fill), self.bench
        with bench.sites.trying({self.path: in_place}, instead_of=codebook), self.prompts_of([example]):
            for _ in range(config.num_steps):
                nll = batch.token_losses(bench.model)
                loss = batch.means(nll)[0]
                if bool(batch.held(nll, config.stop_probability).all()):
                    break
                losses.append(check_loss(loss, "GRACE"))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        with bench.sites.trying({self.path: in_place}, instead_of=codebook):
            after = self.probabilities([example])
        return TrainedOutputs(value.detach()[None], [losses], after, "full")

    def _says_it(self, example: Example, draft: Codebook, codebook: Codebook) -> bool:
        """Whether every target token is the model's first choice already, with ``draft`` for the codebook."""
        site = self.bench.sites.trying(draft.functions(), instead_of=codebook)
        with site, self.prompts_of([example]), torch.no_grad():
            batch = ExampleBatch.of(self.bench.model, [example], self.bench.fill)
            best = logits_at(self.bench.model, batch.inputs, batch.positions).argmax(-1)
        return tuple(best.tolist()) == example.targets


def _newly_uncovered(codebook: Codebook, placement: Placement) -> list[str]:
    """Members that a split puts outside the radius of their entry."""
    if placement.action != "split" or placement.entry is None or placement.distance is None:
        return []
    entry = codebook.entries[placement.entry]
    after = replace(entry, events=(*entry.events, Event("", "split", placement.distance)))
    return [edit_id for edit_id in after.uncovered if edit_id not in entry.uncovered]


class _Plan:
    """What the edits of a batch do to a codebook, in their order, and which of their values are still to be trained.

    Args:
        draft: the codebook as it will be.
    """

    def __init__(self, draft: Codebook):
        self.draft = draft
        self.changes: list[CodeChange] = []
        self.uncovered: list[list[str]] = []
        self.outcomes: dict[int, tuple[list[float], float]] = {}
        self.waiting: dict[int, int] = {}  # number of the edit → row of its value

    def waits_for(self, placement: Placement, *, measured: bool) -> bool:
        """Whether an edit needs a value that is still to be trained: to go on from it, or (``measured``) to be run."""
        if placement.entry is None or not (measured or placement.action == "expand"):
            return False
        return self.draft.entries[placement.entry].value in self.waiting.values()

    def take(self, edit_id: str, change: CodeChange) -> None:
        """Note the next edit; its value is where training starts."""
        self.uncovered.append(_newly_uncovered(self.draft, change.placement))
        if change.placement.action != "none":
            self.waiting[len(self.changes)] = len(self.draft.values)
        self.draft.apply("draft", [change], [edit_id])
        self.changes.append(change)

    def trained(self, found: TrainedOutputs) -> None:
        """Put trained values in the place of those that wait for them."""
        for k, edit in enumerate(self.waiting):
            self.changes[edit] = replace(self.changes[edit], value=found.values[k])
            self.outcomes[edit] = found.losses[k], found.probabilities[k]
        self.draft.values = self.draft.values.with_changed(list(self.waiting.values()), found.values)
        self.waiting = {}


def _joined(parts: Sequence[TrainedOutputs]) -> TrainedOutputs:
    """Several outcomes as one."""
    losses, probabilities = [x for p in parts for x in p.losses], [x for p in parts for x in p.probabilities]
    return TrainedOutputs(torch.cat([p.values for p in parts]), losses, probabilities, "full")
