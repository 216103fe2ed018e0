"""Outputs trained from the middle of the model are those of whole forwards, text by text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_kedit.anatomy import check_anatomy, resolve_anatomy
from hf_kedit.engine import trained_outputs as module
from hf_kedit.engine.capture import as_rows, with_first
from hf_kedit.engine.examples import Example
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.trained_outputs import TrainedOutputs, train_outputs
from hf_kedit.engine.weights import get_module
from hf_kedit.errors import EditFailedError
from tests.models import tiny_model

EXAMPLES = [
    Example((5, 6, 7, 8, 9, 10, 11), (4, 5, 6), (12, 13, 14)),
    Example((20, 21, 22), (2,), (30,)),
    Example((40, 41, 42, 43, 44), (3, 4), (50, 51)),
]
STEPS, LR = 6, 0.1
# decoder layouts, square and gated MLPs, parallel blocks, norms behind the MLP, experts beside a shared one
FAMILIES = ["gpt2", "llama", "gptj", "gpt_neox", "gemma2", "olmo2", "granite", "bloom", "falcon", "opt"]


def straightforward(model: Any, path: str, start: torch.Tensor, example: Example) -> tuple[torch.Tensor, list[float]]:
    """One text at a time, whole forwards, the value in the output's place."""
    value = start.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([value], lr=LR)
    losses = []

    def put(_: Any, __: Any, output: Any) -> Any:
        given = output[0] if isinstance(output, tuple) else output
        states = as_rows(given, 1).clone()
        states[0, example.positions[0]] = value
        return with_first(output, states.view_as(given))

    with get_module(model, path).register_forward_hook(put):
        for _ in range(STEPS):
            logits = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0, list(example.positions)]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(example.targets))
            losses.append(float(loss.detach()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return value.detach(), losses


def setup(family: str, layer: int = 1) -> tuple[Any, Any, str]:
    model = tiny_model(family)
    anatomy = check_anatomy(model, resolve_anatomy(model))
    return model, anatomy, anatomy.down(layer).path


def starts_for(model: Any, path: str) -> torch.Tensor:
    width = get_module(model, path)(torch.zeros(1, 1, _width(get_module(model, path)))).shape[-1]
    return torch.rand(len(EXAMPLES), width, generator=torch.Generator().manual_seed(0))


def _width(linear: Any) -> int:
    return int(linear.weight.shape[0] if type(linear).__name__ == "Conv1D" else linear.weight.shape[1])


def train(model: Any, anatomy: Any, path: str, starts: torch.Tensor, **options: Any) -> TrainedOutputs:
    with frozen_eval(model):
        return train_outputs(model, anatomy, EXAMPLES, 1, path, starts, steps=STEPS, lr=LR, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_together_from_the_middle_is_one_by_one_from_the_tokens(family: str) -> None:
    model, anatomy, path = setup(family)
    starts = starts_for(model, path)
    found = train(model, anatomy, path, starts)
    assert found.route != "full"
    for k, example in enumerate(EXAMPLES):
        with frozen_eval(model):
            value, losses = straightforward(model, path, starts[k], example)
        assert found.losses[k] == pytest.approx(losses, abs=2e-4)
        assert (found.values[k] - value).norm() <= 1e-3 * value.norm()
        assert found.losses[k][-1] < found.losses[k][0] and 0 < found.probabilities[k] < 1


def test_a_step_runs_neither_the_layers_below_nor_the_columns_before() -> None:
    """Counted, not timed: operations of three steps for all texts, from the middle and by whole forwards."""
    model, anatomy, path = setup("llama")
    starts = starts_for(model, path)

    def counted(steps: int, route: Any) -> int:
        with frozen_eval(model), FlopCounterMode(display=False) as counter:
            train_outputs(model, anatomy, EXAMPLES, 1, path, starts, steps=steps, lr=LR, route=route)
        return counter.get_total_flops()

    counted(1, None)  # the route is checked once per model
    fast, slow = (counted(6, route) - counted(3, route) for route in (None, "full"))
    # of three layers one is left, and of 6, 3 and 4 columns 3, 1 and 2
    assert 0 < fast < 0.35 * slow


def test_company_and_order_do_not_matter() -> None:
    model, anatomy, path = setup("llama")
    starts = starts_for(model, path)
    together = train(model, anatomy, path, starts)
    for size in (1, 2):
        parts = train(model, anatomy, path, starts, batch_size=size)
        assert torch.allclose(parts.values, together.values, atol=1e-4)
        assert torch.tensor(parts.losses).allclose(torch.tensor(together.losses), atol=1e-4)


def test_running_out_of_memory_halves_the_batch_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, anatomy, path = setup("gpt2")
    starts = starts_for(model, path)
    expected = train(model, anatomy, path, starts)
    real, sizes = module._descend, []

    def small(replay: Any, examples: Any, *rest: Any) -> TrainedOutputs:
        sizes.append(len(examples))
        if len(examples) > 1:
            raise torch.OutOfMemoryError("too much")
        return real(replay, examples, *rest)

    monkeypatch.setattr(module, "_descend", small)
    found = train(model, anatomy, path, starts)
    assert sizes == [3, 1, 1, 1] and torch.allclose(found.values, expected.values, atol=1e-4)


def test_a_loss_that_is_no_number() -> None:
    model, anatomy, path = setup("gpt2")
    starts = starts_for(model, path)
    starts[1, 0] = float("nan")
    with pytest.raises(EditFailedError, match="lower lr"):
        train(model, anatomy, path, starts)
