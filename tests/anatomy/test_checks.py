"""The self-check: what it refuses, and that it leaves a model as it found it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from hf_kedit.anatomy import Anatomy, check_anatomy, resolve_anatomy
from hf_kedit.errors import AnatomyError
from tests.models import tiny_model


def _hooks(module: nn.Module) -> int:
    """Number of hooks, except those with which transformers collects hidden states: it never removes them."""
    ours = [h for h in module._forward_hooks.values() if not h.__module__.startswith("transformers.")]
    return len(ours) + len(module._forward_pre_hooks)


def _state(model: nn.Module) -> dict[str, object]:
    return {
        "training": [m.training for m in model.modules()],
        "hooks": [_hooks(m) for m in model.modules()],
        "forward": ["forward" in vars(m) for m in model.modules()],
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def _assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for key in ("training", "hooks", "forward", "requires_grad", "grad"):
        assert before[key] == after[key], key
    assert torch.equal(before["random"], after["random"])
    assert all(torch.equal(before["weights"][name], tensor) for name, tensor in after["weights"].items())


@pytest.mark.parametrize("family", ["gpt2", "falcon", "mixtral", "t5"])
def test_model_is_left_as_it_was(family: str) -> None:
    model = tiny_model(family)
    model.train()
    model.get_submodule(resolve_anatomy(model).layers_path).eval()  # a mixture of flags
    before = _state(model)
    check_anatomy(model, resolve_anatomy(model))
    _assert_same(before, _state(model))


@pytest.mark.parametrize("where", ["observe", "additivity"])
def test_model_is_left_as_it_was_after_an_exception(where: str) -> None:
    model = tiny_model("llama").train()
    anatomy = resolve_anatomy(model)
    calls = {"observe": 1, "additivity": 2}[where]
    seen = 0

    def fail(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == calls:
            torch.rand(1)  # the random state must be put back, too
            raise RuntimeError("broken on purpose")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    before = _state(model)
    with pytest.raises(AnatomyError, match="broken on purpose"):
        check_anatomy(model, anatomy)
    assert seen == calls
    _assert_same(before, _state(model))
    handle.remove()


def test_an_interrupt_also_leaves_the_model_clean() -> None:
    model = tiny_model("gpt2").train()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.transformer.h[2].register_forward_pre_hook(interrupt)
    before = _state(model)
    with pytest.raises(KeyboardInterrupt):
        check_anatomy(model, resolve_anatomy(model))
    _assert_same(before, _state(model))
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "t5"])
def test_other_dtypes(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    anatomy = check_anatomy(model, resolve_anatomy(model))
    assert anatomy.additive == (family not in ("gemma2", "granite"),) * 3
    assert anatomy.residual_scale is not None
    if family == "granite":
        assert anatomy.residual_scale == pytest.approx((0.22,) * 3, rel=0.02)
    if family == "gemma2":
        assert anatomy.residual_scale == (None,) * 3


def test_own_input_ids() -> None:
    model = tiny_model("gpt2")
    anatomy = check_anatomy(model, resolve_anatomy(model), torch.tensor([5, 6, 7]))
    assert anatomy.additive == (True,) * 3
    with pytest.raises(AnatomyError, match="could not be run"):
        check_anatomy(model, resolve_anatomy(model), torch.tensor([[5, 10_000]]))


def _replace_down(anatomy: Anatomy, **changes: object) -> Anatomy:
    layers = tuple(dataclasses.replace(la, down=dataclasses.replace(la.down, **changes)) for la in anatomy.layers)
    return dataclasses.replace(anatomy, layers=layers)


def test_wrong_layout_is_refused() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(AnatomyError, match=r"maps 128 -> 32 in a forward pass, not 32 -> 128"):
        check_anatomy(model, resolve_anatomy(model, {"layout": "out_in"}))


def test_wrong_layout_of_a_square_matrix_is_refused() -> None:
    """Sizes cannot tell here; the numbers do."""
    model = tiny_model("llama", intermediate_size=32)
    with pytest.raises(AnatomyError, match="does not compute k·W in layout in_out"):
        check_anatomy(model, resolve_anatomy(model, {"layout": "in_out"}))


def test_a_projection_that_is_more_than_linear_is_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = tiny_model("llama")
    for layer in model.model.layers:
        doubled = Doubled(80, 32, bias=False)
        doubled.weight = layer.mlp.down_proj.weight
        layer.mlp.down_proj = doubled
    with pytest.raises(AnatomyError, match=r"down_proj does not compute k·W .*relative error 0.5"):
        check_anatomy(model, resolve_anatomy(model))


def test_swapped_up_and_down_are_refused() -> None:
    model = tiny_model("llama", intermediate_size=32)
    overrides = {"down": "model.layers.{}.mlp.gate_proj", "up": "model.layers.{}.mlp.down_proj"}
    with pytest.raises(AnatomyError, match="called before"):
        check_anatomy(model, resolve_anatomy(model, overrides))


def test_blocks_that_are_not_the_hidden_states_are_refused() -> None:
    model = tiny_model("llama")
    anatomy = resolve_anatomy(model)
    shuffled = tuple(
        dataclasses.replace(la, path=anatomy.layers[(la.index + 1) % 3].path, down=None, ups=())
        for la in anatomy.layers
    )
    with pytest.raises(AnatomyError, match="is not hidden state 1"):
        check_anatomy(model, dataclasses.replace(anatomy, layers=shuffled))


def test_blocks_that_never_run_are_refused() -> None:
    model = tiny_model("llama")
    model.spare = nn.ModuleList(tiny_model("llama", seed=1).model.layers)
    with pytest.raises(AnatomyError, match="no block of 'spare' was called"):
        check_anatomy(model, resolve_anatomy(model, {"layers": "spare"}))


def test_in_place_changes_after_the_projection_do_not_disturb_the_check() -> None:
    """Falcon adds the attention output in place to what the projection returned."""
    model = tiny_model("falcon")
    handle = model.transformer.h[0].mlp.dense_4h_to_h.register_forward_hook(lambda m, a, out: seen.append(out))
    seen: list[torch.Tensor] = []
    anatomy = check_anatomy(model, resolve_anatomy(model))
    handle.remove()
    assert anatomy.additive == (True,) * 3
    assert not torch.equal(seen[0], model.transformer.h[0].mlp.dense_4h_to_h(torch.zeros(1, 8, 80)))


def test_swapped_gate_is_corrected_by_the_numbers() -> None:
    model = tiny_model("llama")
    anatomy = resolve_anatomy(model, {"gate": "model.layers.{}.mlp.up_proj"})
    assert anatomy.layer(0).gate is not None and anatomy.layer(0).gate.name == "up_proj"
    checked = check_anatomy(model, anatomy)
    assert checked.layer(0).gate is not None and checked.layer(0).gate.name == "gate_proj"
