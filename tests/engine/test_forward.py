"""What `frozen_eval` puts back."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from hf_kedit.engine.forward import frozen_eval
from tests.models import tiny_model


def _none(*_: Any) -> None:
    return None


def test_an_interrupted_block_leaves_no_hook_behind() -> None:
    model = tiny_model("llama").train()
    layer = model.model.layers[0]
    kept = [layer.register_forward_hook(_none), model.register_forward_pre_hook(_none, with_kwargs=True)]
    with pytest.raises(KeyboardInterrupt), frozen_eval(model):
        layer.mlp.register_forward_hook(_none, with_kwargs=True, always_call=True)
        layer.register_forward_pre_hook(_none)
        raise KeyboardInterrupt
    assert list(layer._forward_hooks) == [kept[0].id] and list(model._forward_pre_hooks) == [kept[1].id]
    assert list(model._forward_pre_hooks_with_kwargs) == [kept[1].id]
    left = [layer._forward_pre_hooks, layer.mlp._forward_hooks, layer.mlp._forward_hooks_with_kwargs]
    assert not any([*left, layer.mlp._forward_hooks_always_called])
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_a_block_that_ends_well_keeps_what_it_added() -> None:
    model = tiny_model("llama")
    with frozen_eval(model):
        handle = model.model.layers[0].register_forward_hook(_none)
    assert handle.id in model.model.layers[0]._forward_hooks


def test_ctrl_c_while_flags_are_put_back_is_held_until_all_are() -> None:
    class Interrupting(torch.nn.Linear):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "training" and value and armed:
                signal.raise_signal(signal.SIGINT)

    armed: list[int] = []
    model = torch.nn.Sequential(Interrupting(2, 2), torch.nn.Linear(2, 2)).train()
    with pytest.raises(KeyboardInterrupt), frozen_eval(model):
        assert not any(p.requires_grad for p in model.parameters()) and not model[1].training
        armed.append(1)
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
