"""Running the last column alone, from any layer on, gives what whole texts give, with hooks in place."""

from __future__ import annotations

import pytest
import torch

from hf_kedit.anatomy import check_anatomy, resolve_anatomy
from hf_kedit.engine.capture import Tap
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.replay import LastColumn
from hf_kedit.locate.attribution import attribute_neurons, replaced_at
from tests.models import LAYERS, tiny_model

TEXTS = [[5, 6, 7, 8, 9], [20, 21, 22], [30]]
FAMILIES = ["gpt2", "llama", "gptj", "gpt_neox", "opt", "gemma2", "qwen3", "falcon", "mixtral", "bloom"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_column_alone_gives_the_same_logits_and_gradients(family: str) -> None:
    model = tiny_model(family)
    anatomy = check_anatomy(model, resolve_anatomy(model))
    picked = torch.tensor([0, 2, 1, 0])
    with frozen_eval(model):
        fast, whole = LastColumn(model, anatomy, TEXTS), LastColumn(model, None, TEXTS)
        for layer in range(LAYERS):
            path, found = anatomy.layers[layer].path, []
            width = anatomy.hidden_size
            for runner in (fast, whole):
                state = torch.randn(4, width, generator=torch.Generator().manual_seed(layer)).requires_grad_()
                with replaced_at(model, Tap(path), runner.columns(layer, picked), state):
                    logits = runner.logits(layer, picked)
                found.append((logits.detach(), torch.autograd.grad(logits.log_softmax(-1)[:, 3].sum(), state)[0]))
            assert fast.columns(layer, picked).unique().tolist() == [0], "this family was seen to be restartable"
            assert torch.allclose(found[0][0], found[1][0], atol=2e-5)
            assert (found[0][1] - found[1][1]).norm() <= 1e-5 * found[1][1].norm().clamp_min(1e-3)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attributions_do_not_depend_on_the_way_they_are_computed(family: str) -> None:
    model = tiny_model(family)
    anatomy = check_anatomy(model, resolve_anatomy(model))
    taps = [Tap(anatomy.down(i).path, "input") for i in range(LAYERS)]
    with frozen_eval(model):
        fast = attribute_neurons(model, taps, [5, 6, 7, 8], [9, 10], steps=6, anatomy=anatomy, layers=range(LAYERS))
        slow = attribute_neurons(model, taps, [5, 6, 7, 8], [9, 10], steps=6)
    for a, b in zip(fast.scores, slow.scores, strict=True):
        assert float(b.abs().max()) > 0
        assert (a - b).norm() <= 1e-4 * b.norm()
    for a, b in zip(fast.activations, slow.activations, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
