"""What is switched for a block is put back, wherever Ctrl-C comes; the block itself is interrupted at once."""

from __future__ import annotations

import signal
import threading
from functools import partial

import pytest
import torch
from torch import nn

from hf_kedit.anatomy import resolve_anatomy
from hf_kedit.anatomy.outputs import hooks
from hf_kedit.anatomy.switching import Switch, interrupted, switched, together, uninterrupted
from hf_kedit.engine.replay import added_at, passed_through, recorded_structures
from tests.interrupts import at_every_step
from tests.models import tiny_model


@pytest.fixture(autouse=True)
def default_handler():  # type: ignore[no-untyped-def]
    """Every test begins and ends with Python's own handler."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_switch_is_put_back_at_every_step() -> None:
    light: list[str] = []
    seen: set[tuple[str, ...]] = set()

    def run() -> None:
        with switched(lambda: light.append("on"), light.clear):
            seen.add(tuple(light))

    def check(_: int) -> None:
        assert light == []

    assert at_every_step(run, check) > 10
    assert seen == {("on",)}, "a block begins with the change made"


def test_several_switches_at_every_step() -> None:
    state = {"a": 0, "b": 0}

    def one(name: str) -> Switch[None]:
        return switched(lambda: state.update({name: 1}), lambda: state.update({name: 0}))

    def run() -> None:
        with together(one("a"), one("b")):
            assert state == {"a": 1, "b": 1}

    assert at_every_step(run, lambda _: state == {"a": 0, "b": 0} or pytest.fail(str(state))) > 20


def test_leaving_goes_on_when_one_of_several_fails() -> None:
    left = []

    def failing() -> None:
        left.append("b")
        raise RuntimeError("b cannot be put back")

    parts = (
        switched(lambda: None, partial(left.append, "a")),
        switched(lambda: None, failing),
        switched(lambda: None, partial(left.append, "c")),
    )
    with pytest.raises(RuntimeError, match="b cannot"), together(*parts):
        pass
    assert left == ["c", "b", "a"]


def test_a_change_that_fails_half_way_is_put_back() -> None:
    state: list[int] = []

    def change() -> None:
        state.append(1)
        raise ValueError

    with pytest.raises(ValueError), switched(change, state.clear):
        pytest.fail("the block must not be entered")
    assert state == []


def test_the_block_is_interrupted_at_once() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), switched(lambda: None, lambda: None):
        signal.raise_signal(signal.SIGINT)
        done.append("after")
    assert done == []


def test_an_uninterrupted_block_is_finished_first() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with switched(lambda: None, lambda: None), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
            assert interrupted()
            done.append("block")
        done.append("behind")
    assert done == ["block"] and not interrupted()


def test_an_interrupt_while_it_is_put_back_waits_for_the_end() -> None:
    steps = []

    def put_back() -> None:
        steps.append("begun")
        signal.raise_signal(signal.SIGINT)
        steps.append("done")

    with pytest.raises(KeyboardInterrupt):
        with switched(lambda: None, put_back):
            pass
    assert steps == ["begun", "done"]


def test_an_error_is_not_lost_over_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt) as info, switched(lambda: None, lambda: signal.raise_signal(signal.SIGINT)):
        raise ValueError("first")
    assert isinstance(info.value.__context__, ValueError)


def test_a_handler_of_the_user_is_called_and_stays() -> None:
    calls: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    try:
        mine = signal.getsignal(signal.SIGINT)
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert calls == []
        assert calls == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is mine
        with switched(lambda: None, lambda: None):  # one that is chosen inside the block stays too
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert calls == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_leave_the_handler_alone() -> None:
    seen = []

    def work() -> None:
        with uninterrupted(), switched(lambda: None, lambda: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_a_block_without_an_end_is_put_back() -> None:
    state: list[int] = []

    def endless():  # type: ignore[no-untyped-def]
        with switched(lambda: state.append(1), state.clear):
            yield

    generator = endless()
    next(generator)
    assert state == [1]
    switch = switched(lambda: state.append(2), state.clear)
    switch.__enter__()
    del switch  # nobody leaves it
    generator.close()
    assert state == []


# ---------------------------------------------------------------------- what is switched on a model


def fingerprint(model: nn.Module) -> object:
    """Everything that these functions touch: hooks, and methods put on an instance."""
    return [
        (
            name,
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            module.__dict__.get("forward"),
            module.training,
        )
        for name, module in model.named_modules()
    ]


def test_hooks_at_every_step() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    modules = [model.model.layers[i].mlp for i in range(3)]

    def run() -> None:
        with hooks(*(partial(m.register_forward_hook, lambda *_: None) for m in modules)):
            assert all(m._forward_hooks for m in modules)

    assert at_every_step(run, lambda n: fingerprint(model) == before or pytest.fail(f"step {n}")) > 15


def test_bypassed_blocks_at_every_step() -> None:
    """A block that stays bypassed makes the logits of an unedited model wrong for good."""
    model = tiny_model("llama")
    anatomy = resolve_anatomy(model)
    own = model.model.layers[1].forward
    model.model.layers[1].__dict__["forward"] = own  # as accelerate does
    before = fingerprint(model)
    entering = torch.zeros(1, 2, anatomy.hidden_size)

    def run() -> None:
        with (
            passed_through(model, anatomy, 2, entering, {}),
            recorded_structures(model, anatomy, 2, {}),
            added_at(model, [anatomy.layers[2].path], {}, torch.zeros(1), 1),
        ):
            assert model.model.layers[0].__dict__["forward"]() is None
            assert model.model.layers[2].__dict__["forward"]() is entering

    assert at_every_step(run, lambda n: fingerprint(model) == before or pytest.fail(f"step {n}")) > 60
    assert model.model.layers[1].__dict__["forward"] is own
