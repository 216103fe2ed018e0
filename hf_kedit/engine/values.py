"""Optimising target values: which vector, added at the fact token, makes the model say the new target?

Shared by every locate-then-edit method with a value step (ROME eq. 4, MEMIT eq. 15 and their relatives). All
requests and context templates of a batch are optimised together, but nothing is ever averaged over requests:
each has its own loss, its own Adam state, its own norm limit and its own stop, so that a request's result does
not depend on its company.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from ..errors import EditFailedError, UnsupportedModelError
from ..logging import progress_bar
from .batches import in_batches, rows_at_once
from .capture import Tap, as_rows, listen
from .replay import Replay, ReplayRow, Route
from .rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..anatomy import Anatomy

Site = Literal["block", "down", "attention_out"]
STOP_LOSS = 0.05
_BETAS = (0.9, 0.999)
_EPS = 1e-8


@dataclass(frozen=True)
class ValueSettings:
    """How a value is optimised.

    Args:
        steps: evaluations of the loss; the last one is only measured, so there are at most ``steps - 1`` updates.
        lr: Adam's learning rate.
        weight_decay: factor of ``‖δ‖ / ‖a‖²``, ``a`` the activation before the edit.
        clamp: ``‖δ‖`` is kept below ``clamp · ‖a‖``.
        against_all_rows: measure δ by the activations ``A`` of all rows of a request, the drift row included, instead
            of by the bare prompt's: the decay is the factor times ``√rows · ‖δ‖ / ‖A‖``, the limit ``clamp · ‖A‖``
            (NAMET).
        kl_factor: factor of the drift term ``KL(p_δ ‖ p_0)`` on the row "<subject> is a".
        stop_loss: a request stops when its loss falls below.
        nll_factor: factor of the negative log-likelihood.
        settled_factor: once every supervised token of a request is the model's first choice, ``nll_factor`` is
            multiplied by this in the next step, and the request stops if its drift term is at most ``settled_kl``
            (PMET); ``None`` switches the rule off.
        settled_kl: see ``settled_factor``.
        together_factor: factor of the term that pulls a fact's hidden states in different contexts together (CORE).
        together_layers: the layers whose outputs that term compares.
        keep_path: record δ at every step (tests).
    """

    steps: int
    lr: float
    weight_decay: float
    clamp: float
    kl_factor: float
    against_all_rows: bool = False
    stop_loss: float = STOP_LOSS
    nll_factor: float = 1.0
    settled_factor: float | None = None
    settled_kl: float = 0.01
    together_factor: float = 0.0
    together_layers: tuple[int, ...] = ()
    keep_path: bool = False


@dataclass(frozen=True)
class Guide:
    """What a method decides about the value of one request, beyond the settings that all requests share (EAMET).

    Args:
        start: δ to begin with, ``[sites, d]`` fp32.
        limit: ``‖δ‖`` is kept below this instead of ``clamp · ‖a‖``, ``[sites]``.
        term: one more term of the loss, ``[]``, from δ ``[sites, d]``; differentiable.
    """

    start: torch.Tensor
    limit: torch.Tensor
    term: Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Values:
    """The optimised values of a batch of requests.

    Args:
        sites: where the vectors were added; all of them have outputs of one width.
        initials: activation of each site on the bare prompt, ``[requests, sites, d]`` fp32.
        offsets: the optimised δ of each site, ``[requests, sites, d]`` fp32.
        loss: per request, rows of (total, nll, kl, weight decay), one per evaluation until it stopped; a fifth
            column holds the term of ``together_factor`` or of the `Guide` where there is one.
        path: per request, δ at each of these evaluations, ``[evaluations, sites, d]`` (only with ``keep_path``).
        updates: per request, number of Adam steps.
        probability: geometric mean per token of the target's probability on the bare prompt, (before, after).
        taken: what the taps recorded at the fact token of every rewriting row, ``[requests, templates, d]``.
        route: how the model was run.
    """

    sites: tuple[Site, ...]
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
        """Activation before the edit at the first site, ``[requests, d]``."""
        return self.initials[:, 0]

    @property
    def offset(self) -> torch.Tensor:
        """δ at the first site, ``[requests, d]``."""
        return self.offsets[:, 0]

    @property
    def value(self) -> torch.Tensor:
        """``initial + offset`` at the first site: v* of ROME, z of MEMIT."""
        return self.initial + self.offset

    def value_at(self, site: Site) -> torch.Tensor:
        """``initial + offset`` at a site, ``[requests, d]``."""
        i = self.sites.index(site)
        return self.initials[:, i] + self.offsets[:, i]


def site_path(anatomy: Anatomy, layer: int, site: Site) -> str:
    """Name of the module at whose output a site's vector enters.

    Raises:
        UnsupportedModelError: if the layer has no such module.
    """
    if site == "block":
        return anatomy.layers[layer].path
    if site == "down":
        return anatomy.down(layer).path
    if site != "attention_out":
        raise ValueError(f"unknown site {site!r}")
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
    sites: Site | Sequence[Site],
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
        sites: one, or several; a vector is optimised for each: ``"block"``: output of the block; ``"down"``: output of
            the projection out of the MLP; ``"attention_out"``: output of the projection out of the attention.
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
    wanted = (sites,) if isinstance(sites, str) else tuple(sites)
    paths = {site: site_path(anatomy, layer, site) for site in wanted}
    taps = list(dict.fromkeys([*taps, *(Tap(p) for p in paths.values())]))
    order = sorted(range(len(rows)), key=lambda i: (_suffix(rows[i]), len(rows[i][0].ids)))
    results: dict[int, Values] = {}
    size = batch_size or max(1, rows_at_once(model) // max(len(group) for group in rows))

    def run(chunk: Sequence[int]) -> Values:
        chosen = [rows[i] for i in chunk]
        return _optimise(model, anatomy, chosen, layer, paths, settings, taps, fill, route, guide)

    with progress_bar(len(rows), description, show=show_progress and len(rows) > 1, unit="edit") as bar:
        for chunk, part in in_batches(order, size, run):
            results.update({i: _pick(part, k) for k, i in enumerate(chunk)})
            bar.update(len(chunk))
    return join_values([results[i] for i in range(len(rows))])


def _optimise(
    model: PreTrainedModel,
    anatomy: Anatomy,
    rows: Sequence[Sequence[Row]],
    layer: int,
    paths: Mapping[Site, str],
    settings: ValueSettings,
    taps: Sequence[Tap],
    fill: int,
    route: Route | None,
    guide: Guide | None,
) -> Values:
    lanes = [lane for i, group in enumerate(rows) for lane in _lanes(group, i, drift=settings.kl_factor > 0)]
    modules = list(paths.values())
    runs = [ReplayRow(lane.ids, lane.fact, lane.positions) for lane in lanes]
    replay = Replay(model, anatomy, runs, layer, modules, taps, fill=fill, route=route)
    device = replay.base_logits.device
    count = len(rows)
    bare = torch.tensor([k for k, lane in enumerate(lanes) if lane.template == 0])
    initial = torch.stack([replay.taken[Tap(m)].to(device)[bare.to(device)] for m in modules], dim=1)  # [n, sites, d]
    terms = _Terms(lanes, count, device)
    norm = initial.norm(dim=-1)
    unit = norm**2  # by which the decay divides ‖δ‖; [requests, sites]
    if settings.against_all_rows:
        norm, unit = _norms_of_all_rows(replay, lanes, modules, count)
    watched = [Tap(anatomy.layers[i].path) for i in settings.together_layers] if settings.together_factor else []
    offset = torch.zeros_like(initial)
    alive = list(range(count))  # requests that the replay still holds; the tensors of the loop have a row for each
    active = torch.ones(count, dtype=torch.bool)  # on the host; one entry per request in alive
    delta, limit = offset.clone(), settings.clamp * norm  # limit: [requests, sites]
    first_moment, second_moment = torch.zeros_like(offset), torch.zeros_like(offset)
    nll_factor = torch.full((count,), settings.nll_factor, device=device)
    reference: torch.Tensor | None = None
    loss_rows: list[list[tuple[float, ...]]] = [[] for _ in range(count)]
    steps_taken: list[list[torch.Tensor]] = [[] for _ in range(count)]
    updates = [0] * count
    probability = [(math.nan, math.nan)] * count
    if guide is not None:  # the unedited model is then not what the first step measures
        delta, limit = guide.start.to(device).unsqueeze(0), guide.limit.to(device).unsqueeze(0)
        unedited = replay.base_logits.log_softmax(-1)
        reference = unedited[terms.drift.at]
        probability = [(p, p) for p in terms.bare_probability(unedited).tolist()]

    for step in range(settings.steps):
        last = step == settings.steps - 1
        variable = delta.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            per_row = variable[terms.row_slot]
            with _watching(model, replay, watched) as states:
                logits = replay.logits({module: per_row[:, k] for k, module in enumerate(modules)})
            log_probs = logits.log_softmax(-1)
            if reference is None:
                reference = log_probs.detach()[terms.drift.at]
            nll = nll_factor * terms.nll(log_probs)
            kl = settings.kl_factor * terms.drift_kl(log_probs, reference)
            lengths = torch.linalg.vector_norm(variable, dim=-1)
            decay = settings.weight_decay * (lengths / unit).sum(dim=-1)
            columns = [nll, kl, decay]
            if watched:
                spread = torch.stack([terms.spread(h.to(device)) for h in states.values()])
                columns.append(settings.together_factor * spread.mean(dim=0))
            if guide is not None:
                columns.append(guide.term(variable[0]).unsqueeze(0))
            loss = torch.stack(columns).sum(dim=0)
        seen = [loss, *columns, terms.bare_probability(log_probs.detach())]
        if settings.settled_factor is not None:
            settled = terms.settled(log_probs.detach())
            nll_factor = settings.nll_factor * torch.where(settled, settings.settled_factor, 1.0)
            seen.append((settled & (kl.detach() <= settings.settled_kl)).float())
        table = torch.stack(seen, dim=1).detach().cpu()  # the only thing that the host waits for in a step
        if not bool(torch.isfinite(table[:, 0]).all()):
            raise EditFailedError(
                "the loss became NaN or infinite while a value was optimised; lower v_lr or load the model in float32"
            )
        for k, (i, numbers, running) in enumerate(zip(alive, table.tolist(), active.tolist(), strict=True)):
            if running:
                loss_rows[i].append(tuple(numbers[: 1 + len(columns)]))
                now = numbers[1 + len(columns)]
                probability[i] = (probability[i][0] if step or guide is not None else now, now)
                if settings.keep_path:
                    steps_taken[i].append(delta[k].clone())
        active = active & (table[:, 0] >= settings.stop_loss)
        if settings.settled_factor is not None:
            active = active & (table[:, -1] == 0)
        if last or not bool(active.any()):
            break
        moving = active.to(device)
        gradient = torch.autograd.grad((loss * moving).sum(), variable)[0]
        moving = moving.view(-1, 1, 1)
        first_moment = torch.where(moving, _BETAS[0] * first_moment + (1 - _BETAS[0]) * gradient, first_moment)
        second_moment = torch.where(
            moving, _BETAS[1] * second_moment + (1 - _BETAS[1]) * gradient * gradient, second_moment
        )
        unbiased = first_moment / (1 - _BETAS[0] ** (step + 1))
        moved = delta - settings.lr * unbiased / ((second_moment / (1 - _BETAS[1] ** (step + 1))).sqrt() + _EPS)
        length, bound = moved.norm(dim=-1, keepdim=True), limit.unsqueeze(-1)
        delta = torch.where(moving, torch.where(length > bound, moved * (bound / length), moved), delta)
        for i, running in zip(alive, active.tolist(), strict=True):
            updates[i] += running
        if int(active.sum()) <= 0.75 * len(alive):
            offset[torch.tensor(alive, device=device)] = delta
            keep_position = replay.select(active.to(device)[terms.row_slot])
            reference = reference[keep_position[terms.drift.at]]
            kept = active.nonzero().flatten().tolist()
            alive = [alive[k] for k in kept]
            terms = terms.select(kept)
            picked = torch.tensor(kept, device=device)
            delta, unit, limit, nll_factor = delta[picked], unit[picked], limit[picked], nll_factor[picked]
            first_moment, second_moment = first_moment[picked], second_moment[picked]
            active = active[kept]
    offset[torch.tensor(alive, device=device)] = delta

    rewriting = torch.tensor([k for k, lane in enumerate(lanes) if lane.template >= 0])
    per_request = len(rewriting) // count
    taken = {
        tap: states[rewriting.to(states.device)].view(count, per_request, -1) for tap, states in replay.taken.items()
    }
    stacked = [torch.stack(p) if p else torch.empty(0) for p in steps_taken]
    return Values(tuple(paths), initial, offset, loss_rows, stacked, updates, probability, taken, replay.route)


def _norms_of_all_rows(
    replay: Replay, lanes: Sequence[_Lane], modules: Sequence[str], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``‖A‖`` and ``‖A‖ / √rows`` of the activations ``A`` of all rows of each request, ``[requests, sites]`` each."""
    owners = torch.tensor([lane.owner for lane in lanes])
    # a drift row that was taken into its bare prompt has the same activation
    times = torch.tensor([1.0 + (any(lane.drift) and lane.template >= 0) for lane in lanes])
    rows = torch.zeros(count).index_add(0, owners, times)
    sums = []
    for module in modules:
        squares = replay.taken[Tap(module)].square().sum(dim=-1)
        found = torch.zeros(count, device=squares.device)
        sums.append(found.index_add(0, owners.to(squares.device), squares * times.to(squares)))
    norm = torch.stack([s.to(replay.base_logits.device) for s in sums], dim=1).sqrt()
    return norm, norm / rows.to(norm).sqrt().unsqueeze(1)


@contextlib.contextmanager
def _watching(model: PreTrainedModel, replay: Replay, taps: Sequence[Tap]) -> Iterator[dict[Tap, torch.Tensor]]:
    """Collect what taps see at the fact token of each row, ``[rows, d]`` fp32 with gradients, in this forward."""
    states: dict[Tap, torch.Tensor] = {}
    rows, width = replay.batch.input_ids.shape

    def receive(tap: Tap, tensor: torch.Tensor) -> None:
        seen = as_rows(tensor, rows)
        columns = replay.facts - (width - seen.shape[1])  # a replayed window holds the last columns only
        index = torch.arange(rows, device=seen.device)
        states[tap] = seen[index, columns.to(seen.device)].float()

    if not taps:
        yield states
        return
    with listen(model, taps, receive):
        yield states


@dataclass(frozen=True)
class _Lane:
    """One sequence to run, and what is read from it.

    Args:
        ids: token ids.
        fact: index of the fact token.
        positions: indices whose logits are read.
        drift: per position, whether its whole distribution is compared (else one target's probability is read).
        targets: per position, the token it should predict (0 where ``drift``).
        owner: the request's place in the batch.
        template: index of the context template; -1 for a drift row.
    """

    ids: tuple[int, ...]
    fact: int
    positions: tuple[int, ...]
    drift: tuple[bool, ...]
    targets: tuple[int, ...]
    owner: int
    template: int


def _lanes(rows: Sequence[Row], owner: int, *, drift: bool = True) -> list[_Lane]:
    """What has to be run for the rows of one request, with or without its drift row.

    A drift row that is read at its fact token needs nothing behind it. Where the bare prompt begins with the same
    tokens (it starts with the subject), its own fact token gives that distribution, and no row is needed at all.
    """
    lanes = []
    for row in rows:
        if not row.is_drift:
            nothing = (False,) * len(row.positions)
            lanes.append(_Lane(row.ids, row.fact, row.positions, nothing, row.targets, owner, row.template))
    for row in rows:
        if not row.is_drift or not drift:
            continue
        ids = row.ids[: row.fact + 1] if row.positions == (row.fact,) else row.ids
        bare = next(k for k, lane in enumerate(lanes) if lane.template == 0)
        lane = lanes[bare]
        if ids == lane.ids[: lane.fact + 1] and row.fact == lane.fact:
            lanes[bare] = replace(
                lane,
                positions=(row.fact, *lane.positions),
                drift=(True, *lane.drift),
                targets=(0, *lane.targets),
            )
        else:
            zeros = (0,) * len(row.positions)
            lanes.append(_Lane(ids, row.fact, row.positions, (True,) * len(row.positions), zeros, owner, row.template))
    return lanes


@dataclass(frozen=True)
class _Read:
    """Positions of one kind: where they are among the logits, whose they are, what they predict, their weight."""

    at: torch.Tensor
    slot: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


class _Terms:
    """The loss terms of a batch as index arithmetic over the wanted positions of its lanes.

    Args:
        lanes: in the order in which the replay runs them.
        count: number of requests; their lanes carry 0 … count - 1 as owners.
        device: of the logits.
    """

    def __init__(self, lanes: Sequence[_Lane], count: int, device: torch.device):
        self.lanes, self.count, self.device = list(lanes), count, device
        templates = [sum(lane.owner == i and lane.template >= 0 for lane in lanes) for i in range(count)]
        cells = [
            (lane, lane.drift[k], lane.targets[k], lane.drift.count(lane.drift[k]))
            for lane in lanes
            for k in range(len(lane.positions))
        ]

        def read(which: Sequence[int], weights: Sequence[float]) -> _Read:
            def index(values: Sequence[int]) -> torch.Tensor:
                return torch.tensor(values, dtype=torch.long, device=device)

            return _Read(
                index(which),
                index([cells[k][0].owner for k in which]),
                index([cells[k][2] for k in which]).unsqueeze(1),
                torch.tensor(weights, dtype=torch.float32, device=device),
            )

        rewriting = [k for k, (_, drift, _, _) in enumerate(cells) if not drift]
        bare = [k for k in rewriting if cells[k][0].template == 0]
        drifting = [k for k, cell in enumerate(cells) if cell[1]]
        # mean over the target tokens of a row, then over the rows of a request
        self.rewriting = read(rewriting, [1.0 / (cells[k][3] * templates[cells[k][0].owner]) for k in rewriting])
        self.bare = read(bare, [1.0 / cells[k][3] for k in bare])
        self.drift = read(drifting, [1.0] * len(drifting))
        self.row_slot = torch.tensor([lane.owner for lane in lanes], device=device)  # [rows]
        self.rewriting_rows = torch.tensor([k for k, lane in enumerate(lanes) if lane.template >= 0], device=device)

    def _sum(self, values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return torch.zeros(self.count, device=values.device, dtype=values.dtype).index_add(0, slots, values)

    def _picked(self, log_probs: torch.Tensor, read: _Read) -> torch.Tensor:
        return log_probs[read.at].gather(1, read.target).squeeze(1) * read.weight

    def nll(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Mean over templates of the mean over target tokens of −log p, ``[count]``."""
        return -self._sum(self._picked(log_probs, self.rewriting), self.rewriting.slot)

    def drift_kl(self, log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """KL(current ‖ initial) on the drift rows, ``[count]``."""
        current = log_probs[self.drift.at]
        return self._sum((current.exp() * (current - reference)).sum(-1), self.drift.slot)

    def bare_probability(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Geometric mean per token of the target's probability on the bare prompts, ``[count]``."""
        return self._sum(self._picked(log_probs, self.bare), self.bare.slot).exp()

    def settled(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Whether every supervised token is the model's first choice, ``[count]`` bool."""
        wrong = log_probs[self.rewriting.at].argmax(-1) != self.rewriting.target.squeeze(1)
        return self._sum(wrong.float(), self.rewriting.slot) == 0

    def spread(self, states: torch.Tensor) -> torch.Tensor:
        """``(1/d) Σ_{a<b} ‖h_a − h_b‖²`` over the rewriting rows of each request, ``[count]``.

        Equal to ``(N/d) Σ_a ‖h_a − h̄‖²``, which loses fewer digits.

        Args:
            states: ``[rows, d]``.
        """
        h, owner = states[self.rewriting_rows], self.row_slot[self.rewriting_rows]
        number = self._sum(torch.ones_like(h[:, 0]), owner)
        mean = torch.zeros(self.count, h.shape[1], device=h.device).index_add(0, owner, h) / number.unsqueeze(1)
        squares = (h - mean[owner]).square().sum(-1)
        return number / h.shape[1] * self._sum(squares, owner)

    def select(self, kept: Sequence[int]) -> _Terms:
        """The terms of some of the requests, renumbered, as `Replay.select` leaves the rows."""
        place = {owner: k for k, owner in enumerate(kept)}
        lanes = [replace(lane, owner=place[lane.owner]) for lane in self.lanes if lane.owner in place]
        return _Terms(lanes, len(kept), self.device)


def _suffix(rows: Sequence[Row]) -> int:
    return max(len(r.ids) - r.fact for r in rows if not r.is_drift)


def _pick(values: Values, k: int) -> Values:
    return Values(
        values.sites,
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
        parts[0].sites,
        torch.cat([p.initials for p in parts]),
        torch.cat([p.offsets for p in parts]),
        [row for p in parts for row in p.loss],
        [row for p in parts for row in p.path],
        [u for p in parts for u in p.updates],
        [x for p in parts for x in p.probability],
        {tap: torch.cat([p.taken[tap] for p in parts]) for tap in parts[0].taken},
        parts[0].route,
    )
