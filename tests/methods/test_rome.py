"""ROME: several layers, and what it says of the size of its update."""

from __future__ import annotations

import pytest
import torch

from hf_kedit import EditableModel, ROMEConfig, RROMEConfig
from hf_kedit.books.ledger import WeightDelta
from hf_kedit.engine.capture import Tap, capture_at
from hf_kedit.engine.rows import rewrite_row
from hf_kedit.engine.weights import get_module, get_weight
from hf_kedit.tokens import pad_rows
from tests.methods.test_family import facts


def test_later_layers_are_measured_with_the_earlier_ones_in_place() -> None:
    config = ROMEConfig(layers=[1, 2], v_num_grad_steps=5, context_templates=["{}"])
    model = EditableModel.from_pretrained("kedit/world-gpt2", config)
    (request,) = facts(1)
    row = rewrite_row(model.tokenizer, request, "{}")  # type: ignore[arg-type]
    lower, upper = (model.anatomy.down(layer).path for layer in (1, 2))

    def key(module: str) -> torch.Tensor:
        tap = Tap(module, "input")
        return capture_at(other.base_model, pad_rows([row.ids]), torch.tensor([row.fact]), [tap])[tap][0]

    other = EditableModel.from_pretrained("kedit/world-gpt2", config)
    plain = key(upper)
    model.trace = {}
    model.edit(request, show_progress=False)
    noted = model.trace["cur_input.2"]
    change = model.ledger.total(lower)
    assert change is not None
    with other.ledger.provisional() as scope:  # the lower layer alone
        scope.add(WeightDelta(lower, dense=change))
        expected = key(upper)
    assert torch.allclose(noted, expected, atol=1e-4)
    assert (noted - plain).norm() > 0.1 * plain.norm(), "layer 1 has to matter for layer 2"
    assert torch.allclose(model.trace["cur_input.1"], key(lower), atol=1e-4)


@pytest.mark.parametrize("kind", [ROMEConfig, RROMEConfig])
def test_the_size_of_an_update_is_told_in_terms_of_the_original_weight(kind: type[ROMEConfig]) -> None:
    """Whatever was edited before in this process, and however large the update itself is."""
    config = kind(v_num_grad_steps=8, layers=[1])
    model = EditableModel.from_pretrained("kedit/world-gpt2", config)
    module = model.anatomy.down(1).path
    original = get_weight(get_module(model.base_model, module)).norm().item()
    first, second = facts(2)

    def ratios(which: list[int]) -> list[float]:
        found = []
        for i in which:
            before = model.ledger.total(module)
            edit = model.edit([first, second][i], show_progress=False).edits[0]
            after = model.ledger.total(module)
            assert after is not None
            change = after if before is None else after - before
            assert edit.diagnostics["update_norm_ratio"] == pytest.approx(change.norm().item() / original, rel=1e-3)
            found.append(edit.diagnostics["update_norm_ratio"])
        model.rollback("all")
        return found

    forward = ratios([0, 1])
    assert ratios([0, 1]) == pytest.approx(forward, rel=1e-6), "the same edits again"
    fresh = EditableModel.from_pretrained("kedit/world-gpt2", config)
    alone = fresh.edit(second, show_progress=False).edits[0].diagnostics["update_norm_ratio"]
    assert ratios([1]) == pytest.approx([alone], rel=1e-6), "in a process that has seen nothing else"
