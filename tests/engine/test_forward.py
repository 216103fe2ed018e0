"""What `frozen_eval` puts back, and logits at chosen positions."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from hf_kedit.engine.forward import Positions, frozen_eval, logits_at, recomputed_blocks
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


@pytest.mark.parametrize("was_on", [False, True])
def test_blocks_that_were_recomputed_are_as_before(was_on: bool) -> None:
    model = tiny_model("gpt2", resid_pdrop=0.3, attn_pdrop=0.2)
    if was_on:
        model.gradient_checkpointing_enable()
    block = model.transformer.h[0]

    def state() -> Any:
        rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        return (
            model.is_gradient_checkpointing,
            block.gradient_checkpointing,
            [m.training for m in model.modules()],
            rates,
        )

    before = state()
    assert before[:2] == (was_on, was_on) and 0.3 in before[3]
    with recomputed_blocks(model):
        assert model.is_gradient_checkpointing and block.gradient_checkpointing and block.training
    assert state() == before


WANTED = [[4, 1, 4], [], [0, 1, 2, 3], [2]]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("wanted", [WANTED, [[0, 1, 2, 3, 4]] * 4, [[], [], [], []]])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "t5"])
def test_logits_at_positions_are_those_of_a_full_forward(family: str, wanted: Any, masked: bool) -> None:
    """In the order that was asked for, twice where asked twice, none of a row that wants none."""
    model = tiny_model(family)
    ids = torch.arange(20).reshape(4, 5) + 5
    kwargs = {"input_ids": ids} | ({"decoder_input_ids": ids + 30} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        whole = model(**kwargs).logits
        found = logits_at(model, kwargs, Positions.of(wanted, ids, masked=masked))
    expected = [whole[row, column] for row, columns in enumerate(wanted) for column in columns]
    assert found.shape == (len(expected), whole.shape[-1])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("masked", [True, False])
def test_the_head_is_computed_at_the_wanted_positions_only(masked: bool) -> None:
    model, ids, seen = tiny_model("llama"), torch.arange(20).reshape(4, 5) + 5, []
    model.lm_head.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[:-1].numel()))
    with torch.no_grad():
        logits_at(model, {"input_ids": ids}, Positions.of(WANTED, ids, masked=masked))
    # a mask of 7 positions; or as many columns of each of 4 rows as the longest wish has
    assert seen == [7 if masked else 16]


def test_positions_are_a_mask_on_a_cpu_only() -> None:
    """The number of positions in a mask is known to the device alone: reading it would stop the host."""
    ids = torch.zeros(4, 5, dtype=torch.long)
    assert Positions.of(WANTED, ids).kept.dtype == torch.bool
    assert Positions.of(WANTED, ids, masked=False).kept.tolist() == [[4, 1, 4, 4], [0] * 4, [0, 1, 2, 3], [2] * 4]
    short = Positions.of([[2], [0, 1, 3]], ids[:2], masked=False)  # filled up with what the row wants anyway
    assert short.kept.tolist() == [[2, 2, 2], [0, 1, 3]] and short.places.tolist() == [0, 0, 1, 2]
