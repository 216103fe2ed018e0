"""Placement without an accelerator: methods on a model that is spread over a stand-in device and the CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hf_kedit.methods import registered_methods
from tests.devices.rehearsal import NOT_HERE

PROBE = """
import torch
from tests.devices import standin

standin.install()
host = torch.randn(3, 4)
there = host.to("standin")
allowed = [lambda: there + 2.0, lambda: there + torch.tensor(2.0), lambda: there[torch.tensor([0])],
           lambda: there[[0, 2]], lambda: there @ there.T, lambda: there.index_put((torch.tensor([0]),), there[:1])]
refused = [lambda: there + host, lambda: torch.cat([there, host]), lambda: host[torch.tensor([0]).to("standin")],
           lambda: there.index_put((torch.tensor([0]),), host[:1]), lambda: there.add_(host), lambda: there.numpy(),
           lambda: torch.nn.functional.embedding(torch.tensor([0]), there)]
for k, run in enumerate(allowed):
    assert run().device.type == "standin", k
for k, run in enumerate(refused):
    try:
        run()
    except RuntimeError:
        continue
    raise AssertionError(k)
assert torch.equal(there.cpu(), host) and there.tolist() == host.tolist()
layer = torch.nn.Linear(4, 2).to("standin")
layer(there).sum().backward()
assert layer.weight.grad.device.type == "standin"
print("checked")
"""


def run(*arguments: str) -> str:
    """A process of its own, as a stand-in cannot be taken away again."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_stand_in_refuses_what_an_accelerator_refuses() -> None:
    assert run("-c", PROBE).split() == ["checked"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "methods"),
    [
        ("split", [method for method in registered_methods() if method not in NOT_HERE]),
        ("disk", list(registered_methods())),
        ("turned", ["adalora", "alphaedit", "defer", "ft-m"]),
    ],
)
def test_methods_give_on_a_device_what_they_give_on_the_cpu(mode: str, methods: list[str]) -> None:
    lines = run("-m", "tests.devices.rehearsal", mode, *methods).splitlines()
    assert [line for line in lines if line.split()[:1] and line.split()[0] in methods] == [
        f"{method} same" for method in methods
    ]


def test_numbers_of_the_cpu_are_not_the_stand_ins() -> None:
    """This process knows no stand-in: other tests run without it."""
    with pytest.raises(RuntimeError):
        torch.device("standin")
