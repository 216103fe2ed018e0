"""The ledger: any sequence of edits and rollbacks ends at the bits it should; every change is all or nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_kedit import EditableModel
from hf_kedit.books import ledger as ledger_module
from hf_kedit.books.ledger import Ledger, WeightDelta
from hf_kedit.books.ledger_files import describe_accounts, tensors_of
from hf_kedit.engine.weights import get_weight, set_weight
from hf_kedit.errors import MergeError, NonFiniteError, RollbackError, TiedWeightError, UnknownEditError, WeightError


class Small(nn.Module):
    """Three matrices: a Linear, a square Conv1D, and a head tied to the embedding."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(5, 4)
        self.conv = Conv1D(4, 4)
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.linear.weight.data[0, 0] = -0.0
        self.to(dtype)
        self.head.weight = self.embed.weight


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    views = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return {n: p.detach().clone().view(views[p.dtype]) for n, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def low_rank(seed: int, owners: tuple[int, ...], module: str = "linear") -> WeightDelta:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (4, 5) if module == "linear" else (4, 4)
    left = torch.randn(rows, len(owners), generator=generator)
    right = torch.randn(columns, len(owners), generator=generator)
    return WeightDelta(module, left=left, right=right, owners=owners)


def dense(seed: int, module: str = "conv", name: str = "weight") -> WeightDelta:
    shape = {"conv": (4, 4), "linear": (4, 5)}[module] if name == "weight" else (4,)
    return WeightDelta(module, name, dense=torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv1d_and_linear_are_written_in_the_same_orientation(dtype: torch.dtype) -> None:
    model = Small(dtype)
    assert get_weight(model.conv).shape == (4, 4)
    assert torch.equal(get_weight(model.conv), model.conv.weight.t())
    key = torch.randn(4, dtype=torch.float32)
    before = model.float().conv(key)
    ledger = Ledger(model)
    ledger.apply("b", [dense(3)], ["e"])
    assert torch.allclose(model.conv(key) - before, dense(3).matrix() @ key, atol=1e-5)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("low"), st.integers(1, 3), st.integers(0, 1000)),
        st.tuples(st.just("dense"), st.integers(1, 2), st.integers(0, 1000)),
        st.tuples(st.just("both"), st.integers(1, 2), st.integers(0, 1000)),
        st.tuples(st.just("remove"), st.integers(0, 9), st.integers(0, 1)),
        st.tuples(st.just("toggle"), st.just(0), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(DTYPES), actions)
def test_any_sequence_ends_at_the_bits_that_its_surviving_edits_define(dtype: torch.dtype, steps: list) -> None:
    model = Small(dtype)
    pristine = bits(model)
    ledger = Ledger(model)
    batches: list[tuple[str, list[WeightDelta], list[str], set[str]]] = []
    counter = itertools.count()
    for kind, number, seed in steps:
        if kind == "toggle":
            edited = bits(model)
            with ledger.disabled():
                assert same(bits(model), pristine)
                with ledger.disabled():
                    assert same(bits(model), pristine)
            assert same(bits(model), edited)
        elif kind == "remove":
            alive = [e for _, _, ids, gone in batches for e in ids if e not in gone]
            if not alive:
                continue
            victim = alive[number % len(alive)]
            batch = next(b for b in batches if victim in b[2])
            joint = any(d.owners is None for d in batch[1])
            wanted = [e for e in batch[2] if e not in batch[3]] if joint else [victim]
            if joint and len(wanted) > 1 and seed:
                state = bits(model)
                with pytest.raises(RollbackError, match="together"):
                    ledger.remove([victim])
                assert same(bits(model), state)
                continue
            ledger.remove(wanted)
            batch[3].update(wanted)
        else:
            ids = [f"e{next(counter)}" for _ in range(number)]
            deltas = []
            if kind in ("low", "both"):
                deltas.append(low_rank(seed, tuple(range(number))))
            if kind in ("dense", "both"):
                deltas += [dense(seed), dense(seed + 1, "linear", "bias")]
            ledger.apply(f"b{len(batches)}", deltas, ids)
            batches.append((f"b{len(batches)}", deltas, ids, set()))
    # A fresh model that only ever saw the survivors must have the same bits.
    fresh = Small(dtype)
    other = Ledger(fresh)
    for name, deltas, ids, gone in batches:
        if set(ids) == gone:
            continue
        other.apply(name, deltas, ids)
        if gone:
            other.remove(sorted(gone))
    assert same(bits(model), bits(fresh))
    ledger.remove(ledger.edit_ids)
    assert same(bits(model), pristine)
    assert not ledger.accounts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_does_not_accumulate_over_edits(dtype: torch.dtype) -> None:
    model = Small(dtype)
    original = model.linear.weight.detach().float().clone()
    ledger = Ledger(model)
    step = torch.full((4, 5), 1e-3)
    for i in range(200):
        ledger.apply(f"b{i}", [WeightDelta("linear", dense=step)], [f"e{i}"])
    exact = (original + 0.2).to(dtype).float()
    assert torch.allclose(model.linear.weight.float(), exact, atol=2e-3)
    naive = original.to(dtype)
    for _ in range(200):
        naive = naive + step.to(dtype)
    assert (naive.float() - exact).abs().max() > 5 * (model.linear.weight.float() - exact).abs().max()


def test_a_failed_write_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for failing in (1, 2):
        for error in (RuntimeError("disk"), KeyboardInterrupt(), MemoryError()):
            model = Small(torch.float32)
            ledger = Ledger(model)
            ledger.apply("first", [low_rank(1, (0,))], ["kept"])
            state, calls = bits(model), itertools.count(1)

            def broken(module, value, name="weight", calls=calls, failing=failing, error=error):  # type: ignore[no-untyped-def]
                if next(calls) == failing:
                    raise error
                set_weight(module, value, name)

            monkeypatch.setattr(ledger_module, "set_weight", broken)
            with pytest.raises(type(error)):
                ledger.apply("second", [low_rank(2, (0,)), dense(3)], ["lost"])
            monkeypatch.undo()
            assert same(bits(model), state)
            assert ledger.edit_ids == ["kept"]
            ledger.remove(["kept"])
            assert same(bits(model), bits(Small(torch.float32)))


def test_provisional_deltas_give_the_final_bits_and_leave_no_trace() -> None:
    model = Small(torch.bfloat16)
    ledger = Ledger(model)
    ledger.apply("b0", [low_rank(5, (0,))], ["e0"])
    state = bits(model)
    seen = {}
    with pytest.raises(ZeroDivisionError), ledger.provisional() as scope:
        scope.add(low_rank(6, (0,)))
        scope.add(low_rank(7, (0,), "conv"))
        seen = bits(model)
        raise ZeroDivisionError
    assert same(bits(model), state) and not same(seen, state)
    ledger.apply("b1", [low_rank(6, (0,)), low_rank(7, (0,), "conv")], ["e1"])
    assert same(bits(model), seen)


def test_pieces_are_saved_side_by_side() -> None:
    """Factors of several pieces are one pair of tensors, ``[d_out, ranks]`` and ``[d_in, ranks]``."""
    model = Small(torch.float32)
    ledger = Ledger(model)
    first, second = low_rank(1, (0,)), low_rank(2, (0, 1))
    ledger.apply("a", [first], ["a"])
    ledger.apply("b", [second, dense(3)], ["b", "c"])
    tensors = tensors_of(ledger.accounts)
    assert set(tensors) == {"linear.weight.delta_U", "linear.weight.delta_V", "conv.weight.delta.0"}
    assert torch.equal(tensors["linear.weight.delta_U"], torch.cat([first.left, second.left], 1))
    assert torch.equal(tensors["linear.weight.delta_V"], torch.cat([first.right, second.right], 1))
    described = describe_accounts(model, ledger.accounts)
    pieces = described["linear.weight"]["pieces"]
    assert [(p["start"], p["stop"], p["columns"]) for p in pieces] == [(0, 1, ["a"]), (1, 3, ["b", "c"])]
    assert (described["linear.weight"]["type"], described["conv.weight"]["type"]) == ("linear", "conv1d")
    assert described["linear.weight"]["shape"] == [4, 5] and described["linear.weight"]["rank"] == 3


def test_what_must_not_be_written() -> None:
    model = Small(torch.float32)
    ledger = Ledger(model)
    state = bits(model)
    with pytest.raises(NonFiniteError, match="linear"):
        ledger.apply("b", [WeightDelta("linear", dense=torch.full((4, 5), float("nan")))], ["e"])
    huge = WeightDelta("linear", left=torch.full((4, 1), 1e25), right=torch.full((5, 1), 1e25))
    with pytest.raises(NonFiniteError, match="linear"):  # finite factors, 1e50 as their product
        ledger.apply("b", [huge], ["e"])
    with pytest.raises(TiedWeightError, match=r"embed\.weight"):
        ledger.apply("b", [WeightDelta("head", dense=torch.ones(7, 4))], ["e"])
    with pytest.raises(WeightError, match="shape"):
        ledger.apply("b", [WeightDelta("linear", dense=torch.ones(5, 4))], ["e"])
    with pytest.raises(UnknownEditError):
        ledger.remove(["never"])
    with ledger.disabled(), pytest.raises(WeightError, match="switched off"):
        ledger.apply("b", [low_rank(1, (0,))], ["e"])
    assert same(bits(model), state) and not ledger.accounts
    model.linear.weight.data[1, 1] = float("inf")
    with pytest.raises(NonFiniteError, match="base model"):
        ledger.apply("b", [low_rank(1, (0,))], ["e"])


def test_a_sum_beyond_the_weights_own_format_is_refused() -> None:
    model = Small(torch.float16)
    ledger, state = Ledger(model), bits(model)
    with pytest.raises(NonFiniteError, match="float16"):  # fp16 ends at 65,504
        ledger.apply("b", [WeightDelta("linear", dense=torch.full((4, 5), 70_000.0))], ["e"])
    assert same(bits(model), state) and not ledger.accounts


def test_quantised_weights_are_refused() -> None:
    model = Small(torch.float32)
    model.linear.weight = nn.Parameter(torch.ones(4, 5, dtype=torch.int8), requires_grad=False)
    with pytest.raises(WeightError, match="quantised"):
        Ledger(model).apply("b", [low_rank(1, (0,))], ["e"])
    with pytest.raises(WeightError, match="quantised"):
        set_weight(model.linear, torch.ones(4, 5))


def test_the_sum_of_a_weight_and_its_change_is_made_in_fp32() -> None:
    """In bf16 the change alone would be rounded first: 0.003914 to 0.00390625, which 1.0 then swallows."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    model.weight.data.fill_(1.0)
    whole = nn.ModuleDict({"linear": model})
    ledger = Ledger(whole)
    ledger.apply("b", [WeightDelta("linear", dense=torch.tensor([[0.003914]]))], ["e"])
    # neighbours of 1.0 in bf16: 1 and 1 + 2⁻⁷; 1.003914 lies beyond their middle, 1.00390625
    assert model.weight.item() == 1.0078125 == torch.tensor(1.003914, dtype=torch.float32).to(torch.bfloat16).item()
    ledger.apply("c", [WeightDelta("linear", dense=torch.tensor([[-0.0001]]))], ["f"])
    assert model.weight.item() == 1.0, "both changes are summed before anything is rounded"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_value_is_the_cast_of_the_sum(dtype: torch.dtype) -> None:
    """Computed here in float64 and NumPy's order of nothing: one matrix product, one sum, one cast."""
    model = Small(dtype)
    original = model.conv.weight.detach().clone()
    ledger = Ledger(model)
    a, b = low_rank(1, (0, 0), "conv"), dense(2)
    ledger.apply("b", [a], ["e"])
    ledger.apply("c", [b], ["f"])
    assert a.left is not None and a.right is not None and b.dense is not None
    exact = original.double().t() + a.left.double() @ a.right.double().t() + b.dense.double()
    step = torch.finfo(dtype).eps * exact.abs().clamp_min(1e-2)
    assert ((model.conv.weight.detach().double().t() - exact).abs() <= 0.51 * step + 1e-6).all()


def test_edits_stay_off_until_the_outermost_block_ends() -> None:
    model = Small(torch.bfloat16)
    pristine = bits(model)
    ledger = Ledger(model)
    ledger.apply("b", [low_rank(1, (0,)), dense(2)], ["e"])
    edited = bits(model)
    outer, inner = ledger.disabled(), ledger.disabled()
    outer.__enter__()
    inner.__enter__()
    inner.__exit__(None, None, None)
    assert same(bits(model), pristine), "between the two exits"
    outer.__exit__(None, None, None)
    assert same(bits(model), edited)


def test_originals_are_those_of_the_model_while_deltas_are_measured() -> None:
    """A norm that is taken now and kept must not be that of the measured weight."""
    model = Small(torch.float32)
    pristine = bits(model)
    original = model.linear.weight.detach().clone()
    ledger = Ledger(model)
    ledger.apply("b", [dense(5)], ["e"])
    edited = bits(model)
    with ledger.provisional() as scope:
        scope.add(low_rank(1, (0,)))
        measured = bits(model)
        assert torch.equal(ledger.original("linear"), original)
        assert torch.equal(ledger.new_account("linear", "weight").original, original)
        with ledger.provisional() as deeper:
            deeper.add(low_rank(2, (0,)))
            assert torch.equal(ledger.original("linear"), original)
        assert same(bits(model), measured)
        with ledger.disabled():
            assert same(bits(model), pristine), "the original model, not that of the measurement"
        assert same(bits(model), measured)
    assert same(bits(model), edited)
    assert torch.equal(ledger.original("linear"), model.linear.weight) and not ledger._measured


def test_nothing_is_changed_or_made_permanent_while_edits_are_off() -> None:
    model = Small(torch.float32)
    ledger = Ledger(model)
    empty = ledger.snapshot()
    ledger.apply("b", [low_rank(1, (0,))], ["e"])
    edited = bits(model)
    with ledger.disabled():
        with pytest.raises(MergeError, match="switched off"):
            ledger.check_mergeable()
        with pytest.raises(WeightError, match="switched off"):
            ledger.restore(empty)
        with pytest.raises(WeightError, match="switched off"):
            ledger.remove(["e"])
        ledger.restore(ledger.snapshot())  # the state that is there
    assert same(bits(model), edited) and ledger.edit_ids == ["e"]


def test_the_fingerprint_is_of_the_originals_while_deltas_are_measured() -> None:
    model = Small(torch.float32)
    ledger = Ledger(model)
    pristine = ledger.base_fingerprint()
    with ledger.provisional() as scope:
        scope.add(low_rank(0, (0,)))
        assert not torch.equal(model.linear.weight, Small(torch.float32).linear.weight)
        assert ledger.base_fingerprint() == pristine


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_is_called_a_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    """Rounding since the edit is no training: the words say how to come by edits in that dtype."""
    model = EditableModel.from_pretrained("kedit/world-gpt2", "ft-m")
    model.edit(prompt="By profession {} is a", subject="Tarosk Boayond", target_new="plumber", show_progress=False)
    model.save_pretrained(tmp_path)
    model.base_model.to(dtype)
    with pytest.raises(WeightError, match=rf"was cast from torch.float32 to {dtype}.*load them with dtype={dtype}"):
        model.rollback("all")
    assert len(EditableModel.from_pretrained(tmp_path, dtype=dtype, ignore_fingerprint=True).edits) == 1
