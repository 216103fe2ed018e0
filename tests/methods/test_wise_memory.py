"""WISE's bookkeeping on toy matrices: shards, merges, thresholds, removal, routing; and the parts it is built on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_kedit.engine.activations import activation_distance, hidden_activation, mean_over_tokens
from hf_kedit.engine.sparse import SparseMatrix, pack_bits, unpack_bits
from hf_kedit.errors import RollbackError, UnsupportedModelError
from hf_kedit.methods.wise import WISEConfig
from hf_kedit.methods.wise_memory import Member, Policy, WiseMemories, choose_memory, draw_mask
from hf_kedit.methods.wise_training import margin_loss, positive_mean, settled
from tests.models import tiny_model

SHAPE = (4, 6)


def policy(**values: object) -> Policy:
    return replace(WISEConfig(save_freq=2, merge_freq=4, density=1.0).policy, **values)


def filled(state: WiseMemories, count: int, start: int = 0) -> WiseMemories:
    """The state after ``count`` edits; edit i adds i + 1 inside its mask and has the activation 10 - i."""
    for i in range(start, start + count):
        delta, mask, drawn = state.side(SHAPE)
        state = state.with_edit(Member(f"e{i}", 10.0 - i, "p", "t"), delta + (i + 1) * mask, mask, drawn)
    return state


def test_edits_fill_shards_and_shards_are_merged() -> None:
    one = filled(WiseMemories(policy()), 1)
    assert [len(p.members) for p in one.parts] == [1] and one.open is not None and one.mask is not None
    assert torch.equal(one.open.delta.dense(), draw_mask(SHAPE, policy(), 0).float())
    three = filled(one, 2, 1)
    assert len(three.shards) == 1 and three.open is not None and three.drawn == 2
    assert torch.equal(three.shards[0].delta.dense(), 3.0 * draw_mask(SHAPE, policy(), 0))
    five = filled(three, 2, 3)
    assert len(five.memories) == 1 and not five.shards and five.open is not None
    first, second = draw_mask(SHAPE, policy(), 0), draw_mask(SHAPE, policy(), 1)
    shared = first & second
    expected = torch.where(shared, 5.0, 3.0 * first + 7.0 * second)  # ties: the mean of those that agree
    assert torch.equal(five.memories[0].delta.dense(), expected)
    assert [m.edit_id for m in five.members] == ["e0", "e1", "e2", "e3", "e4"]


def test_reading_what_is_not_merged_yet_changes_nothing() -> None:
    state = filled(WiseMemories(policy()), 3)
    before = state.parts
    (pending,) = state.candidates
    first, second = (p.delta.dense() for p in state.parts)
    both = (first != 0) & (second != 0)
    assert torch.equal(pending.delta, torch.where(both, (first + second) / 2, first + second))
    assert state.parts == before and state.open is not None


def test_thresholds() -> None:
    retrieve = filled(WiseMemories(policy(act_ratio=0.5)), 5)
    assert [c.threshold for c in retrieve.candidates] == [3.5, 3.0]
    merge = filled(WiseMemories(policy(act_ratio=0.5, retrieve=False)), 5)
    assert [c.threshold for c in merge.candidates] == [3.0, 3.0]


def test_wise_merge_keeps_one_memory() -> None:
    state = filled(WiseMemories(policy(retrieve=False)), 8)
    assert len(state.memories) == 1 and len(state.memories[0].members) == 8
    assert len(filled(WiseMemories(policy()), 8).memories) == 2


def test_removal_is_exact_where_it_is_possible() -> None:
    four = filled(WiseMemories(policy()), 4)
    six = filled(four, 2, 4)
    seven = filled(six, 1, 6)
    assert seven.without(["e6"]).parts == six.parts, "the very same objects"
    assert seven.without(["e4", "e5", "e6"]).parts == four.parts
    assert [m.edit_id for m in seven.without(["e0", "e1", "e2", "e3"]).members] == ["e4", "e5", "e6"]
    nothing = seven.without([f"e{i}" for i in range(7)])
    assert not nothing.parts and nothing.drawn == 0, "the next edit gets the first mask again"
    for stuck in (["e4"], ["e0", "e4", "e5"]):
        with pytest.raises(RollbackError, match="rebuild_without"):
            seven.without(stuck)


def test_masks_follow_seed_and_number() -> None:
    big = (200, 300)
    mask = draw_mask(big, policy(), 3)
    assert mask.dtype == torch.bool and abs(float(mask.float().mean()) - 0.2) < 0.01
    assert torch.equal(mask, draw_mask(big, policy(), 3))
    assert not torch.equal(mask, draw_mask(big, policy(), 4))
    assert not torch.equal(mask, draw_mask(big, policy(seed=1), 3))


def test_routing() -> None:
    distances = torch.tensor([[3.0, 1.0, 3.0, 0.5], [2.0, 2.0, 4.0, 0.9]])
    assert choose_memory(distances, [2.5, 1.0]).tolist() == [0, 1, 1, -1]
    assert choose_memory(distances, [9.0, 9.0]).tolist() == [-1, -1, -1, -1]
    # Published code: memory 0 is not chosen where it lies nearer than the unfinished shard, 1.
    assert choose_memory(torch.tensor([[3.0], [4.0]]), [2.5, 5.0]).tolist() == [0]
    assert choose_memory(torch.tensor([[3.0], [4.0]]), [2.5, 5.0], side=1).tolist() == [-1]


def test_margin_loss_by_hand() -> None:
    edited, irrelevant = torch.tensor([4.0, 8.0]), torch.tensor([3.0])
    # γ=2: (3-4+2, 3-8+2) → 1 of 1 positive entry; α=2: 1; β=6: (2, -2) → 2
    assert float(margin_loss(edited, irrelevant, (2.0, 6.0, 2.0))) == 1 + 1 + 2
    assert float(margin_loss(torch.tensor([9.0]), torch.tensor([0.5]), (2.0, 6.0, 2.0))) == 0
    assert float(positive_mean(torch.tensor([-1.0, 2.0, 4.0]))) == 3


def test_training_stops_when_it_has_settled() -> None:
    assert settled([0.5, 0.01, 0.01005])
    assert not settled([0.01]) and not settled([0.5, 0.5]) and not settled([0.015, 0.01])


def test_means_leave_padding_out() -> None:
    values = torch.tensor([[float("nan"), 1.0, 3.0], [2.0, 2.0, 2.0]])
    assert mean_over_tokens(values, torch.tensor([[0, 1, 1], [1, 1, 1]])).tolist() == [2.0, 2.0]
    assert mean_over_tokens(values, torch.zeros(2, 3)).tolist() == [0.0, 0.0]


def test_activation_distance() -> None:
    changed, original = torch.tensor([[3.0, -1.0]]), torch.tensor([[0.0, -5.0]])
    assert activation_distance(changed, original, None).tolist() == [5.0]
    assert activation_distance(changed, original, torch.relu).tolist() == [3.0]


def test_activation_of_a_model() -> None:
    x = torch.tensor([1.5, -0.5])
    llama = tiny_model("llama")
    assert torch.equal(hidden_activation(llama)(x), torch.nn.functional.silu(x))
    llama.config.hidden_act = "gated-gelu"
    assert torch.allclose(hidden_activation(llama)(x), torch.nn.functional.gelu(x))
    # named in no config: a module of the model, or written into the code of a gated MLP
    assert torch.allclose(hidden_activation(tiny_model("bloom"))(x), torch.nn.functional.gelu(x, approximate="tanh"))
    assert torch.equal(hidden_activation(tiny_model("lfm2"))(x), torch.nn.functional.silu(x))
    assert torch.equal(hidden_activation(tiny_model("nemotron_h"))(x), x.relu() ** 2)
    opt = tiny_model("opt")
    opt.config.activation_function = "no such"
    for layer in opt.model.decoder.layers:
        layer.activation_fn = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="activation"):
        hidden_activation(opt)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (7, 9)])
def test_sparse_matrices_come_back(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.4)
    packed = SparseMatrix.of(dense)
    assert torch.equal(packed.dense(), dense) and packed.count == len(packed.values) == int((dense != 0).sum())
    assert packed.bits.numel() == -(-dense.numel() // 8)
    assert torch.equal(unpack_bits(pack_bits(dense > 0), shape), dense > 0)
