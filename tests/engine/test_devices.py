"""Memory, room and random numbers of a model's devices, as far as a CPU can tell."""

from __future__ import annotations

import pytest
import torch

from hf_kedit.engine import devices
from hf_kedit.engine.devices import PeakMemory, accelerators, seeded, where_there_is_room
from tests.models import tiny_model


def test_a_model_on_the_cpu_has_no_accelerators() -> None:
    model = tiny_model("llama")
    assert accelerators(model) == [] and PeakMemory(model).read() is None


def test_the_generator_goes_on_behind_a_seeded_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def everywhere(_: int) -> None:
        raise AssertionError("torch.manual_seed seeds every device of the machine, for good")

    model = tiny_model("llama")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    monkeypatch.setattr(torch, "manual_seed", everywhere)
    drawn = []
    for _ in range(2):
        with seeded(7, model):
            drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(torch.rand(4), expected)
    assert torch.equal(drawn[0], torch.rand(4, generator=torch.Generator().manual_seed(7)))


def test_what_finds_no_room_is_computed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own memory error counts; any other error is none of its business."""
    monkeypatch.setattr(devices, "_KINDS", ("cpu",))  # the CPU stands in for an accelerator
    tries: list[torch.Tensor] = []

    def compute(matrix: torch.Tensor) -> str:
        tries.append(matrix)
        if len(tries) == 1:
            raise torch.OutOfMemoryError
        return "done"

    assert where_there_is_room(tiny_model("llama"), compute, torch.eye(3)) == "done" and len(tries) == 2
    with pytest.raises(ZeroDivisionError):
        where_there_is_room(tiny_model("llama"), lambda _: 1 // 0, torch.eye(3))
