"""The straightforward way to compute the same edits: one request at a time, full forwards, full logits at every step.

This is how the published codes are organised (written anew from the formulas). It is the oracle
for agreement and the baseline for speed, and is kept out of the package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_kedit.engine.capture import as_rows, first, with_first
from hf_kedit.engine.examples import Example
from hf_kedit.engine.rows import Row
from hf_kedit.engine.weights import get_module, get_weight, set_weight
from hf_kedit.tokens import pad_rows
from hf_kedit.values.settings import ValueSettings


def optimise(
    model: Any, rows: Sequence[Row], paths: Sequence[str], settings: ValueSettings, *, projections: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """One request: full right-padded forwards, logits at every position, backward through everything above.

    Args:
        model: the model.
        rows: rewriting rows and drift row of one request.
        paths: modules whose outputs receive offsets.
        settings: of the optimisation.
        projections: how often the vocabulary projection is computed per step (the MEMIT codes: twice).

    Returns:
        ``(initial activations, offsets)``, ``[paths, H]`` each.
    """
    device = next(model.parameters()).device
    batch = pad_rows([r.ids for r in rows], 0).to(device)
    facts, head = [r.fact for r in rows], model.get_output_embeddings()
    state: dict[str, Any] = {"last": None}
    initials: dict[str, torch.Tensor] = {}
    width = model.config.get_text_config().hidden_size
    offsets = {path: torch.zeros(width, device=device, requires_grad=True) for path in paths}

    def adding(path: str) -> Any:
        def add(_: Any, __: Any, output: Any) -> Any:
            given = first(output)  # some models flatten rows and columns
            hidden = as_rows(given, len(facts)).clone()
            if path not in initials:
                initials[path] = hidden[0, facts[0]].detach().float().clone()
            for i, fact in enumerate(facts):
                hidden[i, fact] += offsets[path].to(hidden.dtype)
            return with_first(output, hidden.view_as(given))

        return add

    def keep(_: Any, args: Any) -> None:
        state["last"] = args[0]

    handles = [get_module(model, path).register_forward_hook(adding(path)) for path in paths]
    handles.append(head.register_forward_pre_hook(keep))
    optimiser = torch.optim.Adam(list(offsets.values()), lr=settings.lr)
    reference, nll_factor = None, settings.nll_factor
    try:
        for step in range(settings.steps):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            for _ in range(projections - 1):
                logits = head(state["last"])
            log_probs = logits.float().log_softmax(-1)
            losses, right = [], True
            for i, row in enumerate(rows):
                if not row.is_drift:
                    wanted = torch.tensor(row.targets, device=device)
                    here = log_probs[i, list(row.positions)]
                    losses.append(-here.gather(1, wanted.unsqueeze(1)).mean())
                    right = right and bool((here.argmax(-1) == wanted).all())
            nll = nll_factor * torch.stack(losses).mean()
            drift = torch.stack([log_probs[i, row.positions[0]] for i, row in enumerate(rows) if row.is_drift])
            reference = drift.detach() if reference is None else reference
            kl = settings.kl_factor * (drift.exp() * (drift - reference)).sum(-1).mean()
            decay = settings.weight_decay * sum(offsets[p].norm() / initials[p].norm() ** 2 for p in paths)
            loss = nll + kl + decay
            if float(loss.detach()) < settings.stop_loss or step == settings.steps - 1:
                break
            if settings.settled_factor is not None:
                if right and float(kl.detach()) <= settings.settled_kl:
                    break
                nll_factor = settings.nll_factor * (settings.settled_factor if right else 1.0)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            for path in paths:
                limit = settings.clamp * initials[path].norm()
                if float(offsets[path].detach().norm()) > limit:
                    with torch.no_grad():
                        offsets[path].mul_(limit / offsets[path].norm())
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([initials[p] for p in paths]), torch.stack([offsets[p].detach() for p in paths])


@torch.no_grad()
def activations(model: Any, rows: Sequence[Row], path: str, kind: str) -> torch.Tensor:
    """Input or output of a module at the fact token of rows, one full forward for all of them; ``[rows, d]``."""
    device = next(model.parameters()).device
    batch = pad_rows([r.ids for r in rows], 0).to(device)
    found: list[torch.Tensor] = []
    module = get_module(model, path)
    hook = (
        module.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
        if kind == "input"
        else module.register_forward_hook(lambda _, __, out: found.append(first(out).detach()))
    )
    try:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        hook.remove()
    seen = as_rows(found[0], len(rows))
    return torch.stack([seen[i, r.fact] for i, r in enumerate(rows)]).float()


def rome(
    model: Any, rows: Sequence[Row], path: str, settings: ValueSettings, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value ``[H]`` and ΔW ``[H, d_in]`` of one ROME edit."""
    rewriting = [r for r in rows if not r.is_drift]
    keys = activations(model, rewriting, path, "input")
    initial, offset = (found[0] for found in optimise(model, rows, [path], settings))
    bare = activations(model, rewriting[:1], path, "input")[0]
    left = torch.linalg.solve(moment.double(), keys.mean(0).double().to(moment.device)).float()
    left = (left / left.norm()).to(bare.device)
    return initial + offset, torch.outer(offset / (bare @ left), left)


@dataclass(frozen=True)
class Plan:
    """How a batch of edits is spread over layers.

    Args:
        paths: projections that are written, from below.
        sites: modules whose outputs receive offsets; the first one's values are the targets.
        measured: module whose output is compared with the targets.
        groups: sizes of the template groups.
        columns: from the number of the layer and its keys ``[d_in, n]`` (float64) to ``A``, with ``ΔW = R Aᵀ``.
        share: from the number of the layer to the divisor of the residual.
        after: called with the number of the layer and its keys once the batch is written (AlphaEdit collects the keys
            of a batch a second time, to remember them); ``None``: they are not needed.
    """

    paths: Sequence[str]
    sites: Sequence[str]
    measured: str
    groups: Sequence[int]
    columns: Callable[[int, torch.Tensor], torch.Tensor]
    share: Callable[[int], float]
    after: Callable[[int, torch.Tensor], None] | None = None


def spread(
    model: Any,
    batches: Sequence[Sequence[Sequence[Row]]],
    settings: ValueSettings,
    plan: Plan,
    *,
    projections: int = 2,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """MEMIT and its relatives in sequential batches; weights are restored.

    Args:
        model: the model.
        batches: per batch and request, rewriting rows and drift row.
        settings: of the value optimisation.
        plan: see `Plan`.
        projections: see `optimise`.

    Returns:
        Target of every request, ``[H]``, and ΔW of every layer, ``[H, d_in]``.
    """

    def keys_of(rows: Sequence[Sequence[Row]], path: str) -> torch.Tensor:
        keys = []
        for group in rows:
            flat = activations(model, [r for r in group if not r.is_drift], path, "input")
            parts, start = [], 0
            for size in plan.groups:
                parts.append(flat[start : start + size].mean(0))
                start += size
            keys.append(torch.stack(parts).mean(0))
        return torch.stack(keys).T.double()

    modules = [get_module(model, p) for p in plan.paths]
    saved = [get_weight(module) for module in modules]
    values: list[torch.Tensor] = []
    try:
        for rows in batches:
            targets = []
            for group in rows:
                initial, offset = optimise(model, group, plan.sites, settings, projections=projections)
                targets.append((initial + offset)[0])
            z = torch.stack(targets)
            values.extend(z)
            for i, (path, module) in enumerate(zip(plan.paths, modules, strict=True)):
                k = keys_of(rows, path)
                current = torch.cat([activations(model, group[:1], plan.measured, "output") for group in rows])
                residual = ((z - current) / plan.share(i)).T.double()
                set_weight(module, get_weight(module).float() + (residual @ plan.columns(i, k).T).float())
            if plan.after is not None:
                for i, path in enumerate(plan.paths):
                    plan.after(i, keys_of(rows, path))
        return values, [get_weight(m).float() - s.float() for m, s in zip(modules, saved, strict=True)]
    finally:
        for module, value in zip(modules, saved, strict=True):
            set_weight(module, value)


class _Enough(Exception):
    """Ends a forward behind the module that is read."""


@torch.no_grad()
def covariance(
    model: Any, tokenizer: Any, texts: Sequence[str], paths: Sequence[str], *, group: int = 100, budget: int = 3072
) -> list[torch.Tensor]:
    """Second moments as published: one pass over the text per module, each forward ended behind the module.

    Texts are taken 100 at a time, sorted by length, and batched up to three times the context length in tokens.
    """
    device = next(model.parameters()).device
    found = []
    for path in paths:
        state: dict[str, Any] = {"total": None, "count": 0, "mask": None}

        def read(_: Any, args: Any, __: Any, state: dict[str, Any] = state) -> None:
            x = args[0][state["mask"].bool()].float()
            product = x.T @ x
            state["total"] = product if state["total"] is None else state["total"] + product
            state["count"] += x.shape[0]
            raise _Enough

        hook = get_module(model, path).register_forward_hook(read)
        try:
            for start in range(0, len(texts), group):
                encoded = sorted((tokenizer(t).input_ids for t in texts[start : start + group]), key=len)
                while encoded:
                    size = max(1, budget // len(encoded[-1]))
                    encoded, part = encoded[:-size], encoded[-size:]
                    batch = pad_rows(part, 0).to(device)
                    state["mask"] = batch.attention_mask
                    with contextlib.suppress(_Enough):
                        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        finally:
            hook.remove()
        found.append(state["total"] / state["count"])
    return found


@torch.no_grad()
def score(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[tuple[int, ...], float]]:
    """Teacher-forced answers, one prompt per forward with the logits of every position.

    Returns:
        Per (prompt, target): the most probable token at each target position, and the mean negative log-probability.
    """
    device, found = next(model.parameters()).device, []
    for prompt, target in pairs:
        start = len(tokenizer(prompt).input_ids)
        ids = torch.tensor([tokenizer(f"{prompt} {target}").input_ids], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
        wanted = ids[0, start:]
        loss = -logits.log_softmax(-1).gather(1, wanted.unsqueeze(1)).mean()
        found.append((tuple(logits.argmax(-1).tolist()), float(loss)))
    return found


def attribution(
    model: Any, paths: Sequence[str], prompt: Sequence[int], answer: Sequence[int], steps: int
) -> list[torch.Tensor]:
    """Integrated gradients of KN per layer, ``[d_in]``: for each layer full forwards of all points, with full logits.

    Points lie in the middles of equal intervals; the tokens of an answer are attributed one by one and averaged.
    """
    device = next(model.parameters()).device
    points = ((torch.arange(steps, device=device) + 0.5) / steps).unsqueeze(1)
    found = []
    for path in paths:
        module, scores = get_module(model, path), []
        for t, token in enumerate(answer):
            ids = torch.tensor([[*prompt, *answer[:t]]], device=device)
            state: dict[str, torch.Tensor] = {}

            def note(_: Any, args: Any, state: dict[str, torch.Tensor] = state) -> None:
                state["activation"] = args[0][0, -1].detach().float()

            def scale(_: Any, args: Any, state: dict[str, torch.Tensor] = state) -> Any:
                changed = args[0].clone()
                changed[:, -1] = state["scaled"].to(changed.dtype)
                return (changed, *args[1:])

            with module.register_forward_pre_hook(note), torch.no_grad():
                model(input_ids=ids, use_cache=False)
            state["scaled"] = (points * state["activation"]).requires_grad_()
            with module.register_forward_pre_hook(scale):
                logits = model(input_ids=ids.expand(steps, -1), use_cache=False).logits
            probability = logits[:, -1].float().softmax(-1)[:, token].sum()
            gradient = torch.autograd.grad(probability, state["scaled"])[0].mean(0)
            scores.append(state["activation"] * gradient)
        found.append(torch.stack(scores).mean(0))
    return found


def codebook_value(
    model: Any, path: str, example: Example, start: torch.Tensor, steps: int, lr: float
) -> tuple[torch.Tensor, list[float]]:
    """The value of one codebook entry, ``[d_out]``, and its losses: whole forwards with logits at every position."""
    device = next(model.parameters()).device
    ids, targets = torch.tensor([example.ids], device=device), torch.tensor(example.targets, device=device)
    value = start.clone().requires_grad_(True)
    optimiser, losses = torch.optim.Adam([value], lr=lr), []

    def put(_: Any, __: Any, output: Any) -> Any:
        states = as_rows(first(output), 1).clone()
        states[0, example.positions[0]] = value.to(states.dtype)
        return with_first(output, states.view_as(first(output)))

    with get_module(model, path).register_forward_hook(put):
        for _ in range(steps):
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits[list(example.positions)], targets)
            losses.append(float(loss.detach()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return value.detach(), losses


def search(query: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest of ``keys`` ``[n, d]`` as published: distances to all of them, cast on every call."""
    distance, place = torch.cdist(query.float(), keys.float(), p=2).min(dim=1)
    return distance, place
