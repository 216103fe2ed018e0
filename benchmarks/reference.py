"""The straightforward way to compute the same edits: one request at a time, full forwards, full logits at every step.

This is how the published codes of ROME and MEMIT are organised (written anew from the formulas). It is the oracle
for agreement and the baseline for speed, and is kept out of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_kedit.engine.capture import first, with_first
from hf_kedit.engine.rows import Row
from hf_kedit.engine.values import ValueSettings
from hf_kedit.engine.weights import get_module, get_weight, set_weight
from hf_kedit.tokens import pad_rows


def optimise(
    model: Any, rows: Sequence[Row], path: str, settings: ValueSettings, *, projections: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """One request: full right-padded forwards, logits at every position, backward through everything above.

    Args:
        model: the model.
        rows: rewriting rows and drift row of one request.
        path: module whose output receives the offset.
        settings: of the optimisation.
        projections: how often the vocabulary projection is computed per step (the MEMIT codes: twice).

    Returns:
        ``(initial activation, offset)``, ``[H]`` each.
    """
    device = next(model.parameters()).device
    batch = pad_rows([r.ids for r in rows], 0).to(device)
    facts = [r.fact for r in rows]
    module, head = get_module(model, path), model.get_output_embeddings()
    state: dict[str, Any] = {"initial": None, "last": None}
    width = get_weight(module).shape[0] if hasattr(module, "weight") else model.config.hidden_size
    offset = torch.zeros(width, device=device, requires_grad=True)

    def add(_: Any, __: Any, output: Any) -> Any:
        hidden = first(output)
        if state["initial"] is None:
            state["initial"] = hidden[0, facts[0]].detach().float().clone()
        hidden = hidden.clone()
        for i, fact in enumerate(facts):
            hidden[i, fact] += offset.to(hidden.dtype)
        return with_first(output, hidden)

    def keep(_: Any, args: Any) -> None:
        state["last"] = args[0]

    handles = [module.register_forward_hook(add), head.register_forward_pre_hook(keep)]
    optimiser = torch.optim.Adam([offset], lr=settings.lr)
    reference = None
    try:
        for step in range(settings.steps):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            for _ in range(projections - 1):
                logits = head(state["last"])
            log_probs = logits.float().log_softmax(-1)
            losses = []
            for i, row in enumerate(rows):
                if not row.is_drift:
                    picked = log_probs[i, list(row.positions)].gather(
                        1, torch.tensor(row.targets, device=device).unsqueeze(1)
                    )
                    losses.append(-picked.mean())
            nll = torch.stack(losses).mean()
            drift = torch.stack([log_probs[i, row.positions[0]] for i, row in enumerate(rows) if row.is_drift])
            reference = drift.detach() if reference is None else reference
            kl = settings.kl_factor * (drift.exp() * (drift - reference)).sum(-1).mean()
            decay = settings.weight_decay * offset.norm() / state["initial"].norm() ** 2
            loss = nll + kl + decay
            if float(loss) < settings.stop_loss or step == settings.steps - 1:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            limit = settings.clamp * state["initial"].norm()
            if float(offset.detach().norm()) > limit:
                with torch.no_grad():
                    offset.mul_(limit / offset.norm())
    finally:
        for handle in handles:
            handle.remove()
    return state["initial"], offset.detach()


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
    return torch.stack([found[0][i, r.fact] for i, r in enumerate(rows)]).float()


def rome(
    model: Any, rows: Sequence[Row], path: str, settings: ValueSettings, moment: torch.Tensor
) -> torch.Tensor:
    """ΔW of one ROME edit, ``[H, d_in]``."""
    rewriting = [r for r in rows if not r.is_drift]
    keys = activations(model, rewriting, path, "input")
    _, offset = optimise(model, rows, path, settings)
    bare = activations(model, rewriting[:1], path, "input")[0]
    left = torch.linalg.solve(moment.double(), keys.mean(0).double().to(moment.device)).float()
    left = (left / left.norm()).to(bare.device)
    return torch.outer(offset / (bare @ left), left)


def memit(
    model: Any,
    rows: Sequence[Sequence[Row]],
    blocks: Sequence[str],
    paths: Sequence[str],
    settings: ValueSettings,
    moments: Sequence[torch.Tensor],
    weight: float,
    groups: Sequence[int],
) -> list[torch.Tensor]:
    """ΔW of a MEMIT batch per layer, ``[H, d_in]``; weights are restored.

    Args:
        model: the model.
        rows: per request, rewriting rows and drift row.
        blocks: block paths of all edited layers.
        paths: projection paths of all edited layers.
        settings: of the value optimisation.
        moments: second moment per layer.
        weight: λ.
        groups: sizes of the template groups.
    """
    targets = []
    for group in rows:
        initial, offset = optimise(model, group, blocks[-1], settings, projections=2)
        targets.append(initial + offset)
    z = torch.stack(targets)
    saved = [get_weight(get_module(model, p)) for p in paths]
    updates = []
    try:
        for i, path in enumerate(paths):
            keys = []
            for group in rows:
                flat = activations(model, [r for r in group if not r.is_drift], path, "input")
                parts, start = [], 0
                for size in groups:
                    parts.append(flat[start : start + size].mean(0))
                    start += size
                keys.append(torch.stack(parts).mean(0))
            k = torch.stack(keys).T.double()
            current = torch.cat([activations(model, group[:1], blocks[-1], "output") for group in rows])
            residual = ((z - current) / (len(paths) - i)).T.double()
            c = moments[i].to(k.device).double()
            adjusted = torch.linalg.solve(weight * c + k @ k.T, k)
            update = (residual @ adjusted.T).float()
            updates.append(update)
            module = get_module(model, path)
            set_weight(module, get_weight(module).float() + update)
    finally:
        for path, value in zip(paths, saved, strict=True):
            set_weight(get_module(model, path), value)
    return updates


@torch.no_grad()
def covariance(model: Any, tokenizer: Any, texts: Sequence[str], paths: Sequence[str]) -> list[torch.Tensor]:
    """Second moments, one pass over the text per module, one text per forward."""
    device = next(model.parameters()).device
    found = []
    for path in paths:
        total, count = torch.zeros(0), 0
        inputs: list[torch.Tensor] = []
        hook = get_module(model, path).register_forward_pre_hook(lambda _, args, keep=inputs: keep.append(args[0]))
        try:
            for text in texts:
                inputs.clear()
                ids = tokenizer(text, return_tensors="pt").input_ids.to(device)
                model(input_ids=ids, use_cache=False)
                x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
                total = x.T @ x if not count else total + x.T @ x
                count += x.shape[0]
        finally:
            hook.remove()
        found.append(total / count)
    return found
