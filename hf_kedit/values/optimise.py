"""Optimising target values: which vector, added at the fact token, makes the model say the new target?

Shared by every locate-then-edit method with a value step (ROME eq. 4, MEMIT eq. 15 and their relatives). All
requests and context templates of a batch are optimised together, but nothing is ever averaged over requests:
each has its own loss, its own optimiser state, its own norm limit and its own stop, so that a request's result does
not depend on its company.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..engine.batches import in_batches, rows_at_once
from ..engine.capture import Tap, as_rows, listen
from ..engine.replay import Replay, ReplayRow, Route
from ..engine.rows import Row
from ..errors import EditFailedError, UnsupportedModelError
from ..logging import progress_bar, tell_loss
from .optimisers import Adam, GaussNewton, Measured
from .settings import Guide, ValueSettings
from .terms import Lane, Terms, lanes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..anatomy import Anatomy

ValuePlace = Literal["block", "down", "attention_out"]


@dataclass
class Values:
    """The optimised values of a batch of requests.

    Args:
        places: where the vectors were added; all of them have outputs of one width.
        initials: activation of each place on the bare prompt, ``[requests, places, d]`` fp32.
        offsets: the optimised δ of each place, ``[requests, places, d]`` fp32.
        loss: per request, rows of (total, nll, kl, weight decay), one per evaluation until it stopped; a fifth
            column holds the term of ``together_factor`` or of the `Guide` where there is one.
        path: per request, δ at each of these evaluations, ``[evaluations, places, d]`` (only with ``keep_path``).
        updates: per request, number of Adam steps.
        probability: geometric mean per token of the target's probability on the bare prompt, (before, after).
        taken: what the taps recorded at the fact token of every rewriting row, ``[requests, templates, d]``.
        route: how the model was run.
    """

    places: tuple[ValuePlace, ...]
    initials: torch.Tensor
    offsets: torch.Tensor
    loss: list[list[tuple[float, ...]]]
    path: list[torch.Tensor]
    updates: list[int]
    probability: list[tuple[float, float]]
    taken: dict[Tap, torch.Tensor] = field(default_factory=dict)
    route: Route = "full"

    @property
    def initial(self) -> torch.Tensor:
        """Activation before the edit at the first place, ``[requests, d]``."""
        return self.initials[:, 0]

    @property
    def offset(self) -> torch.Tensor:
        """δ at the first place, ``[requests, d]``."""
        return self.offsets[:, 0]

    @property
    def value(self) -> torch.Tensor:
        """``initial + offset`` at the first place: v* of ROME, z of MEMIT."""
        return self.initial + self.offset

    def value_at(self, place: ValuePlace) -> torch.Tensor:
        """``initial + offset`` at a place, ``[requests, d]``."""
        i = self.places.index(place)
        return self.initials[:, i] + self.offsets[:, i]


def place_path(anatomy: Anatomy, layer: int, place: ValuePlace) -> str:
    """Name of the module at whose output a place's vector enters.

    Raises:
        UnsupportedModelError: if the layer has no such module.
    """
    if place == "block":
        return anatomy.block(layer)
    if place == "down":
        return anatomy.down(layer).path
    if place != "attention_out":
        raise ValueError(f"unknown place {place!r}")
    out = anatomy.layers[layer].attention_out
    if out is None:
        raise UnsupportedModelError(
            f"layer {layer} of {anatomy.model_class} has no projection out of the attention that could be found"
        )
    return out.path


def optimise_values(
    model: PreTrainedModel,
    anatomy: Anatomy,
    rows: Sequence[Sequence[Row]],
    layer: int,
    places: ValuePlace | Sequence[ValuePlace],
    settings: ValueSettings,
    *,
    taps: Sequence[Tap] = (),
    fill: int = 0,
    batch_size: int | None = None,
    description: str = "optimising values",
    show_progress: bool = True,
    route: Route | None = None,
    guide: Guide | None = None,
) -> Values:
    """Optimise one value per request.

    Args:
        model: in evaluation mode, without weight gradients.
        anatomy: of the model.
        rows: per request, its rewriting rows (the bare prompt first) and, if ``kl_factor > 0``, its drift row.
        layer: where the vectors enter.
        places: one, or several; a vector is optimised for each: ``"block"``: output of the block; ``"down"``: of the
            projection out of the MLP; ``"attention_out"``: of the projection out of the attention.
        settings: see `ValueSettings`.
        taps: more to record at the fact tokens in the first pass.
        fill: padding id.
        batch_size: requests per batch; ``None``: chosen from the sizes and halved when memory runs out.
        description: label of the progress bar.
        show_progress: show a bar.
        route: force a replay route (tests, benchmarks).
        guide: for a single request.

    Returns:
        `Values` in the order of the requests.

    Raises:
        EditFailedError: if a loss is not finite.
    """
    if guide is not None and len(rows) != 1:
        raise ValueError(f"a guide is for one request, not for {len(rows)}")
    if settings.optimiser == "gauss_newton" and (guide is not None or settings.together_factor):
        raise ValueError("Gauss-Newton knows the terms of ROME's loss alone")
    wanted = (places,) if isinstance(places, str) else tuple(places)
    paths = {place: place_path(anatomy, layer, place) for place in wanted}
    taps = list(dict.fromkeys([*taps, *(Tap(p) for p in paths.values())]))
    order = sorted(range(len(rows)), key=lambda i: (_suffix(rows[i]), len(rows[i][0].ids)))
    results: dict[int, Values] = {}
    size = batch_size or max(1, rows_at_once(model) // max(len(group) for group in rows))

    # One unit is one step of one request: the bar moves from the first second on. Who ends early jumps to the end.
    with progress_bar(len(rows) * settings.steps, description, show=show_progress, unit="step") as bar:

        def run(chunk: Sequence[int]) -> Values:
            chosen = [rows[i] for i in chunk]
            optimisation = Optimisation(model, anatomy, chosen, layer, paths, settings, taps, fill, route, guide)
            return optimisation.run(bar.update)

        for chunk, part in in_batches(order, size, run):
            results.update({i: pick_values(part, k) for k, i in enumerate(chunk)})
            bar.update(len(results) * settings.steps - bar.n)
    return join_values([results[i] for i in range(len(rows))])


@dataclass(frozen=True)
class _Losses:
    """The loss of every request that still runs, at one δ; each tensor is ``[running]``.

    Args:
        total: what is differentiated: the sum of ``parts``.
        parts: negative log-likelihood, drift, decay, and the term of CORE or of a `Guide` where there is one.
        probability: of the target on the bare prompt, geometric mean per token.
        rows: negative log-likelihood of every rewriting row, ``[running, rows]``; empty where no optimiser asks.
        settled: whether every supervised token is the model's first choice; ``None`` where no rule asks (PMET).
    """

    total: torch.Tensor
    parts: list[torch.Tensor]
    probability: torch.Tensor
    rows: torch.Tensor
    settled: torch.Tensor | None


class Optimisation:
    """The values of one batch, with a row for every request instead of one loss for all.

    A step is: `losses` runs the rows with ``a + δ`` at their fact tokens, `record` writes down what came out and
    decides who goes on, `move` moves the δ of those, `drop_finished` makes the next forward smaller. Requests
    share forwards and nothing else. A request that has ended keeps its δ from then on.

    Tensors whose first dimension is called *running* have a row for each request in ``running``, and lose rows
    together in `drop_finished`; ``offset``, `initial` and the lists keep a row for each request of the batch.

    Args:
        rows: of every request: its rewriting rows, and its drift row.
        paths: the modules at whose outputs the vectors enter.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        rows: Sequence[Sequence[Row]],
        layer: int,
        paths: Mapping[ValuePlace, str],
        settings: ValueSettings,
        taps: Sequence[Tap],
        fill: int,
        route: Route | None,
        guide: Guide | None,
    ):
        self.settings, self.guide, self.places, self.modules = settings, guide, tuple(paths), list(paths.values())
        drift, by_row = settings.kl_factor > 0, settings.optimiser == "gauss_newton"
        self.lanes = [
            lane for i, group in enumerate(rows) for lane in lanes_of(group, i, drift=drift, shared=not by_row)
        ]
        runs = [ReplayRow(lane.ids, lane.fact, lane.positions, lane.shifts) for lane in self.lanes]
        self.replay = Replay(model, anatomy, runs, layer, self.modules, taps, fill=fill, route=route)
        self.device, count = self.replay.base_logits.device, len(rows)
        self.terms = Terms(self.lanes, count, self.device)
        watched = settings.together_layers if settings.together_factor else ()
        self.watched = [Tap(anatomy.block(i)) for i in watched]

        bare = torch.tensor([k for k, lane in enumerate(self.lanes) if lane.template == 0], device=self.device)
        activations = [self.replay.taken[Tap(m)].to(self.device)[bare] for m in self.modules]
        self.initial = torch.stack(activations, dim=1)  # a, [requests, places, d]
        norm = self.initial.norm(dim=-1)
        # two measures of a, [running, places]: ‖δ‖ is kept below the one and, in the decay, divided by the other
        self.limit, self.unit = settings.clamp * norm, norm**2
        if settings.against_all_rows:
            norm, self.unit = _norms_of_all_rows(self.replay, self.lanes, self.modules, count)
            self.limit = settings.clamp * norm

        self.running = list(range(count))
        self.active = torch.ones(count, dtype=torch.bool)  # [running], on the host: who takes another step
        self.offset = torch.zeros_like(self.initial)  # the final δ, filled in as requests are dropped
        self.delta = self.offset.clone()  # δ, [running, places, d]
        self.nll_factor = torch.full((count,), settings.nll_factor, device=self.device)
        # log p_0 at the drift positions; what the drift term compares with. The first step measures it, at δ = 0 …
        self.unedited: torch.Tensor | None = None
        self.loss: list[list[tuple[float, ...]]] = [[] for _ in range(count)]
        self.path: list[list[torch.Tensor]] = [[] for _ in range(count)]
        self.updates = [0] * count
        self.before, self.after = [math.nan] * count, [math.nan] * count  # probability of the target
        if guide is not None:  # … unless a method starts elsewhere: then the pass that recorded a has seen it
            self.delta, self.limit = (t.to(self.device).unsqueeze(0) for t in (guide.start, guide.limit))
            log_probs = self.replay.base_logits.log_softmax(-1)
            self.unedited = log_probs[self.terms.drift.at]
            self.before = self.terms.bare_probability(log_probs).tolist()
        self.optimiser: Adam | GaussNewton = Adam(self.delta, settings.lr)
        if by_row:
            weight = settings.nll_factor * count / len(self.terms.rewriting_rows)
            self.optimiser = GaussNewton(self.initial, self.limit, weight, settings.stop_loss)

    def run(self, each_step: Callable[[int], Any] = lambda requests: None) -> Values:
        """Optimise until every request has ended or the steps are used up; the last evaluation only measures.

        Args:
            each_step: is told after every step how many requests took it.

        Raises:
            EditFailedError: if a loss is not finite.
        """
        for step in range(1, self.settings.steps + 1):
            last = step == self.settings.steps
            with torch.set_grad_enabled(not last):
                # what is differentiated by: the δ of the requests, or of each of their rows
                given = self.delta[self.terms.row_slot] if self.optimiser.by_row else self.delta
                given = given.detach().requires_grad_(not last)
                losses = self.losses(given)
            self.record(losses, first=step == 1)
            tell_loss(sum(self.loss[request][-1][0] for request in self.running) / len(self.running))
            each_step(len(self.running))
            if last or not bool(self.active.any()):
                break
            self.move(losses, given)
            if not bool(self.active.any()):
                break
            self.drop_finished()
        self.offset[torch.tensor(self.running, device=self.device)] = self.optimiser.found(self.delta)
        return self.values()

    def losses(self, given: torch.Tensor) -> _Losses:
        """Every request's loss with its δ added at its fact tokens (ROME eq. 4).

        Args:
            given: δ, ``[running, places, d]``; or of an optimiser that wants to know the gradient of every row,
                ``[rows, places, d]``.
        """
        settings, terms = self.settings, self.terms
        # all rows of a request get its δ, the drift row too; [rows, places, d]
        delta, per_row = (self.delta, given) if self.optimiser.by_row else (given, given[terms.row_slot])
        states: dict[Tap, torch.Tensor] = {}
        with listen(self.replay.model, self.watched, _into(states, self.replay)):
            logits = self.replay.logits({module: per_row[:, k] for k, module in enumerate(self.modules)})
        log_probs = logits.log_softmax(-1)
        if self.unedited is None:
            self.unedited = log_probs.detach()[terms.drift.at]
        nll = self.nll_factor * terms.nll(log_probs)
        drift = settings.kl_factor * terms.drift_kl(log_probs, self.unedited)
        # vector_norm, because its gradient at δ = 0 is 0; that of a square root of a sum would be NaN
        length = torch.linalg.vector_norm(delta, dim=-1)
        decay = settings.weight_decay * (length / self.unit).sum(dim=-1)
        parts = [nll, drift, decay]
        if self.watched:  # CORE
            apart = torch.stack([terms.spread(h.to(self.device)) for h in states.values()])
            parts.append(settings.together_factor * apart.mean(dim=0))
        if self.guide is not None:  # EAMET
            parts.append(self.guide.term(delta[0]).unsqueeze(0))
        seen = log_probs.detach()
        settled = None if settings.settled_factor is None else terms.settled(seen)
        rows = terms.row_nll(seen) if self.optimiser.by_row else seen[:0]
        return _Losses(torch.stack(parts).sum(dim=0), parts, terms.bare_probability(seen), rows, settled)

    def record(self, losses: _Losses, *, first: bool) -> None:
        """Write down what a step measured, the ``first`` one or a later one, and find out which requests have ended.

        Raises:
            EditFailedError: if a loss is not finite.
        """
        settings = self.settings
        kept = self.optimiser.judge(self.delta, losses.total.detach())
        columns = [losses.total, *losses.parts, losses.probability, kept.float()]
        if losses.settled is not None:
            assert settings.settled_factor is not None
            if not self.optimiser.by_row:  # losses under different factors could not be compared
                self.nll_factor = settings.nll_factor * torch.where(losses.settled, settings.settled_factor, 1.0)
            columns.append((losses.settled & (losses.parts[1].detach() <= settings.settled_kl)).float())
        table = torch.stack(columns, dim=1).detach().cpu()  # the only thing that the host waits for in a step
        if not bool(torch.isfinite(table[:, 0]).all()):
            raise EditFailedError(
                "the loss became NaN or infinite while a value was optimised; lower v_lr or load the model in float32"
            )
        terms = 1 + len(losses.parts)
        steps = zip(self.running, table.tolist(), self.active.tolist(), strict=True)
        for k, (request, numbers, active) in enumerate(steps):
            if active:
                if first and self.guide is None:
                    self.before[request] = numbers[terms]
                self.loss[request].append(tuple(numbers[:terms]))
                if numbers[terms + 1]:
                    self.after[request] = numbers[terms]
                if settings.keep_path:
                    self.path[request].append(self.delta[k].clone())
        self.active = self.active & (table[:, 0] >= settings.stop_loss)
        if first:
            self.active = self.active & ((-table[:, 1] / settings.nll_factor).exp() < settings.holds_from)
        if losses.settled is not None:
            self.active = self.active & ((table[:, -1] == 0) | (table[:, terms + 1] == 0))

    def move(self, losses: _Losses, given: torch.Tensor) -> None:
        """Move the δ of the active requests by one step; who has little to gain from going on ends."""
        moving = self.active.to(self.device)
        # A sum, not a mean: a mean would scale every gradient by the size of the company, and Adam's ε with it.
        # Ended requests get a gradient of zero.
        gradient = torch.autograd.grad((losses.total * moving).sum(), given)[0]
        if self.optimiser.by_row:
            gradient = self._in_groups(gradient)
        total, drift, decay = (part.detach() for part in (losses.total, *losses.parts[1:3]))
        self.delta, ended = self.optimiser.move(
            Measured(self.delta, total, drift, decay, losses.rows, gradient, moving, self.limit)
        )
        for request, active in zip(self.running, self.active.tolist(), strict=True):
            self.updates[request] += active
        if ended is not None:
            self.active = self.active & ~ended.cpu()

    def _in_groups(self, by_row: torch.Tensor) -> torch.Tensor:
        """Something of every row, by request: rewriting rows and the drift row, ``[running, rows + 1, places, d]``."""
        terms, count = self.terms, len(self.running)
        rewriting = by_row[terms.rewriting_rows].unflatten(0, (count, -1))
        drift = torch.zeros_like(rewriting[:, :1])  # stays zero for requests without a drift row
        if len(terms.drift_rows):
            drift[terms.row_slot[terms.drift_rows], 0] = by_row[terms.drift_rows]
        return torch.cat([rewriting, drift], dim=1)

    def drop_finished(self) -> None:
        """Stop running the rows of requests that have ended, once these are a quarter of those that run.

        Dropping copies every kept state of the replay, so it is not done for each single one.
        """
        if int(self.active.sum()) > 0.75 * len(self.running):
            return
        assert self.unedited is not None
        self.offset[torch.tensor(self.running, device=self.device)] = self.optimiser.found(self.delta)
        kept = self.active.nonzero().flatten().tolist()
        positions = self.replay.select(self.active.to(self.device)[self.terms.row_slot])
        self.unedited = self.unedited[positions[self.terms.drift.at]]  # before the terms are renumbered
        self.terms = self.terms.select(kept)
        picked = torch.tensor(kept, device=self.device)
        self.optimiser.select(picked)
        for name in ("delta", "limit", "unit", "nll_factor"):
            setattr(self, name, getattr(self, name)[picked])
        self.running, self.active = [self.running[k] for k in kept], self.active[kept]

    def values(self) -> Values:
        """What was found, and what the taps saw in the first pass at the fact tokens of the rewriting rows."""
        count = len(self.offset)
        rewriting = torch.tensor([k for k, lane in enumerate(self.lanes) if lane.template >= 0])
        taken = {
            tap: states[rewriting.to(states.device)].view(count, len(rewriting) // count, -1)
            for tap, states in self.replay.taken.items()
        }
        return Values(
            self.places,
            self.initial,
            self.offset,
            self.loss,
            [torch.stack(p) if p else torch.empty(0) for p in self.path],
            self.updates,
            list(zip(self.before, self.after, strict=True)),
            taken,
            self.replay.route,
        )


def _norms_of_all_rows(
    replay: Replay, lanes: Sequence[Lane], modules: Sequence[str], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``‖A‖`` and ``‖A‖ / √rows``, ``A`` the activations of all rows of a request, ``[requests, places]`` each."""
    owners = torch.tensor([lane.owner for lane in lanes])
    # a drift row that was taken into its bare prompt has the same activation
    times = torch.tensor([1.0 + (any(lane.drift) and lane.template >= 0) for lane in lanes])
    rows = torch.zeros(count).index_add(0, owners, times)
    sums = []
    for module in modules:
        squares = replay.taken[Tap(module)].square().sum(dim=-1)
        zero = torch.zeros(count, device=squares.device)
        sums.append(zero.index_add(0, owners.to(squares.device), squares * times.to(squares)))
    norm = torch.stack([s.to(replay.base_logits.device) for s in sums], dim=1).sqrt()
    return norm, norm / rows.to(norm).sqrt().unsqueeze(1)


def _into(states: dict[Tap, torch.Tensor], replay: Replay) -> Callable[[Tap, torch.Tensor], None]:
    """Collect in ``states`` what taps see at the fact token of each row, ``[rows, d]`` fp32 with gradients."""
    rows, width = replay.batch.input_ids.shape

    def receive(tap: Tap, tensor: torch.Tensor) -> None:
        seen = as_rows(tensor, rows)
        columns = replay.facts - (width - seen.shape[1])  # a replayed window holds the last columns only
        index = torch.arange(rows, device=seen.device)
        states[tap] = seen[index, columns.to(seen.device)].float()

    return receive


def _suffix(rows: Sequence[Row]) -> int:
    return max(len(r.ids) - r.fact for r in rows if not r.is_drift)


def pick_values(values: Values, k: int) -> Values:
    """The values of one request of a batch."""
    return Values(
        values.places,
        values.initials[k : k + 1],
        values.offsets[k : k + 1],
        values.loss[k : k + 1],
        values.path[k : k + 1],
        values.updates[k : k + 1],
        values.probability[k : k + 1],
        {tap: states[k : k + 1] for tap, states in values.taken.items()},
        values.route,
    )


def join_values(parts: Sequence[Values]) -> Values:
    """The values of several batches of requests as one."""
    return Values(
        parts[0].places,
        torch.cat([p.initials for p in parts]),
        torch.cat([p.offsets for p in parts]),
        [row for p in parts for row in p.loss],
        [row for p in parts for row in p.path],
        [u for p in parts for u in p.updates],
        [x for p in parts for x in p.probability],
        {tap: torch.cat([p.taken[tap] for p in parts]) for tap in parts[0].taken},
        parts[0].route,
    )
