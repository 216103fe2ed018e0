"""How far a training has moved a model on general text, against forwards of each text alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit.methods.drift import WATCHED_PARTS, WATCHED_TOKENS, GeneralText, Restraint
from tests.golden_cases import load_model

TEXTS = [f"{who} walks beside the {what} and looks at the old wall." for who in ("Otto", "Ida", "She") for what in
         ("river", "small garden", "town")]  # fmt: skip


@pytest.fixture
def moved() -> tuple[Any, GeneralText, list[float]]:
    """A model after a change, the texts as it read them before, and ``D`` of each part."""
    model, tokenizer = load_model("gpt2")
    text = GeneralText.of(model, tokenizer, TEXTS, 0)
    rows = [torch.tensor([tokenizer(t).input_ids[:WATCHED_TOKENS]]) for t in TEXTS]
    with torch.no_grad():
        before = [model(row).logits[0].log_softmax(-1) for row in rows]
        model.transformer.h[1].mlp.c_proj.weight.mul_(1.5)
        after = [model(row).logits[0].log_softmax(-1) for row in rows]
    each = [(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)]
    return model, text, [float(torch.cat(each[i::WATCHED_PARTS]).mean()) for i in range(WATCHED_PARTS)]


@torch.no_grad()
def test_the_mean_divergence_of_every_part(moved: tuple[Any, GeneralText, list[float]]) -> None:
    model, text, parts = moved
    assert len(set(parts)) == WATCHED_PARTS and min(parts) > 1e-3
    assert [float(text.drift(model, i)) for i in range(WATCHED_PARTS)] == pytest.approx(parts, rel=1e-2)
    assert float(text.drift(model)) == pytest.approx(sum(parts) / WATCHED_PARTS, rel=1e-2)


@torch.no_grad()
def test_each_step_looks_at_the_next_part(moved: tuple[Any, GeneralText, list[float]]) -> None:
    model, text, parts = moved
    restraint = Restraint(text, 1.0, [], load_model("gpt2")[0])
    seen = []
    for _ in range(WATCHED_PARTS + 1):
        restraint.look(model)
        seen.append(restraint.added)
    assert seen == pytest.approx([*parts[1:], *parts[:2]], rel=1e-2)
