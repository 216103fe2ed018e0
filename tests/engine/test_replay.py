"""Restarting a model from the middle gives the logits and gradients of a full forward, on every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from hf_kedit.anatomy import check_anatomy, resolve_anatomy
from hf_kedit.engine import replay as replay_module
from hf_kedit.engine.capture import Tap
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.replay import LastColumn, Replay, ReplayRow, Route
from tests.models import FAMILIES, HIDDEN, HYBRIDS, tiny_model

DECODERS = [f for f in FAMILIES if f not in ("t5", "t5_v1_1", "bart", "blip2")]
ROWS = [
    ReplayRow((5, 6, 7, 8, 9, 10, 11), 3, (5, 6)),
    ReplayRow((20, 21, 22, 23), 1, (2, 3)),
    ReplayRow((30, 31, 32, 33, 34, 35, 36, 37, 38), 6, (7, 8)),
    ReplayRow((40, 41, 42), 2, (2,)),
]


def loss_and_gradient(replay: Replay, site: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = replay.taken[Tap(site)].shape[-1]
    offset = torch.randn(len(ROWS), width, generator=torch.Generator().manual_seed(0)).mul_(0.3).requires_grad_()
    logits = replay.logits({site: offset})
    (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[:, 3].sum(), offset)
    return logits.detach(), gradient


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("layer", [0, 1])
def test_replay_equals_a_full_forward(family: str, layer: int) -> None:
    model = tiny_model(family)
    anatomy = check_anatomy(model, resolve_anatomy(model))
    down = anatomy.layers[layer].down
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    before = hooks(model)  # transformers keeps some of its own
    with frozen_eval(model):
        for site in [anatomy.layers[layer].path] + ([down.path] if down else []):
            fast = Replay(model, anatomy, ROWS, layer, [site])
            assert fast.route != "full", "this family was verified to be restartable"
            full = Replay(model, anatomy, ROWS, layer, [site], route="full")
            logits, gradient = loss_and_gradient(fast, site)
            expected, expected_gradient = loss_and_gradient(full, site)
            assert torch.allclose(logits, expected, atol=2e-5), site
            assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm(), site
            assert (expected - full.base_logits).abs().max() > 1e-3, "the vector has to matter for the test to mean it"
            for tap, states in full.taken.items():
                assert torch.allclose(fast.taken[tap], states, atol=1e-5)
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == forwards
    assert hooks(model) == before


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "qwen3_5_text"])
@pytest.mark.parametrize("route", [None, "layers", "full"])
def test_what_stays_added_is_there_in_every_route(family: str, route: Route | None) -> None:
    """Against a hook that adds everything at once in a plain forward, one row at a time."""
    model = tiny_model(family)
    anatomy = check_anatomy(model, resolve_anatomy(model))
    block = anatomy.layers[1].path
    noise = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1)).mul_(0.5)
    shifts: list[tuple[tuple[int, torch.Tensor], ...]] = [((0, noise[0]), (2, noise[1])), (), ((3, noise[2]),), ()]
    rows = [replace(row, shifts=given) for row, given in zip(ROWS, shifts, strict=True)]

    def plain(row: ReplayRow, change: dict[int, torch.Tensor]) -> torch.Tensor:
        def add(_: nn.Module, __: object, output: object) -> object:
            states = (output[0] if isinstance(output, tuple) else output).clone()  # type: ignore[attr-defined]
            for column, vector in change.items():
                states[0, column] += vector
            return (states, *output[1:]) if isinstance(output, tuple) else states

        handle = model.get_submodule(block).register_forward_hook(add)
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0, list(row.positions)]
        handle.remove()
        return logits.float()

    with frozen_eval(model):
        replay = Replay(model, anatomy, rows, 1, [block], route=route)
        assert torch.allclose(replay.base_logits, torch.cat([plain(r, dict(r.shifts)) for r in rows]), atol=2e-5)
        running = [0, 1, 2, 3]
        for kept in ([0, 1, 2, 3], [0, 2, 3], [2]):
            replay.select(torch.tensor([i in kept for i in running]))
            running = kept
            offset = noise[3 : 3 + len(kept)]
            found = replay.logits({block: offset})
            wanted = [plain(rows[i], {**dict(rows[i].shifts), rows[i].fact: offset[k]}) for k, i in enumerate(kept)]
            assert torch.allclose(found, torch.cat(wanted), atol=2e-5)
    with pytest.raises(ValueError, match="at a block"):
        Replay(model, anatomy, rows, 1, [anatomy.down(0).path])


@pytest.mark.parametrize("family", HYBRIDS)
def test_models_with_recurrent_state_are_replayed_exactly(family: str) -> None:
    model = tiny_model(family)
    anatomy = check_anatomy(model, resolve_anatomy(model))
    routes = set()
    with frozen_eval(model):
        for layer in range(anatomy.num_layers):
            site = anatomy.layers[layer].path
            fast, full = (Replay(model, anatomy, ROWS, layer, [site], route=r) for r in (None, "full"))
            routes.add(fast.route)
            (logits, gradient), (expected, expected_gradient) = (loss_and_gradient(r, site) for r in (fast, full))
            assert torch.allclose(logits, expected, atol=2e-5), layer
            assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm(), layer
    assert routes == {"prefix", "layers"}, "a state above the cut needs every column; below it, it does not matter"


def test_a_state_above_the_cut_is_not_left_to_the_comparison() -> None:
    """A recurrent state may have decayed on the rows that are compared, and matter on the next ones."""
    model = tiny_model("qwen3_5_text")
    anatomy = resolve_anatomy(model)
    with frozen_eval(model):
        Replay(model, anatomy, [ReplayRow((5,) * 9, 8, (8,))], 0, [anatomy.layers[0].path])
        assert Replay(model, anatomy, ROWS, 0, [anatomy.layers[0].path]).route == "layers"


def test_a_window_from_the_first_column_on_says_nothing_of_prefixes() -> None:
    model = tiny_model("llama")
    model.model.layers[2] = _Recurrent(model.model.layers[2])
    anatomy = resolve_anatomy(tiny_model("llama"))
    site = anatomy.layers[0].path
    with frozen_eval(model):
        assert Replay(model, anatomy, [ReplayRow((5, 6, 7), 0, (2,))], 0, [site]).route == "layers"
        later = Replay(model, anatomy, ROWS, 0, [site])
        full = Replay(model, anatomy, ROWS, 0, [site], route="full")
        assert later.route == "layers", "the route of the first rows would be wrong for these"
        assert torch.allclose(loss_and_gradient(later, site)[0], loss_and_gradient(full, site)[0], atol=2e-5)


class _NoCache(nn.Module):
    """A block that cannot be run with a cache that is not of its own making."""

    def __init__(self, inner: nn.Module, error: type[Exception]):
        super().__init__()
        self.inner, self.error = inner, error

    def forward(self, hidden_states, *args, **kwargs):  # type: ignore[no-untyped-def]
        if kwargs.get("past_key_values") is not None:
            raise self.error("not with this cache")
        return self.inner(hidden_states, *args, **kwargs)


@pytest.mark.parametrize("error", [IndexError, KeyError, AssertionError, ZeroDivisionError])
def test_whatever_goes_wrong_in_the_first_pass_leads_to_a_slower_route(error: type[Exception]) -> None:
    model = tiny_model("llama")
    anatomy = resolve_anatomy(model)
    model.model.layers[1] = _NoCache(model.model.layers[1], error)
    site = anatomy.layers[0].path
    with frozen_eval(model):
        fast, full = (Replay(model, anatomy, ROWS, 0, [site], route=r) for r in (None, "full"))
        assert fast.route == "layers"
        assert torch.allclose(loss_and_gradient(fast, site)[0], loss_and_gradient(full, site)[0], atol=2e-5)
        texts = [[5, 6, 7], [8, 9]]
        picked = torch.tensor([0, 1])
        last, whole = (LastColumn(model, a, texts).logits(1, picked) for a in (anatomy, None))
        assert torch.equal(last, whole)


def test_an_error_of_the_model_itself_reaches_the_user() -> None:
    model = tiny_model("llama")
    anatomy = resolve_anatomy(model)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("whatever the route")

    model.model.layers[1].forward = broken
    with frozen_eval(model), pytest.raises(ZeroDivisionError):
        Replay(model, anatomy, ROWS, 0, [anatomy.layers[0].path])


def test_running_out_of_memory_is_not_a_matter_of_routes() -> None:
    model = tiny_model("llama")
    anatomy = resolve_anatomy(model)
    model.model.layers[1] = _NoCache(model.model.layers[1], torch.OutOfMemoryError)
    with frozen_eval(model), pytest.raises(torch.OutOfMemoryError):  # whoever called halves the batch
        Replay(model, anatomy, ROWS, 0, [anatomy.layers[0].path])


def test_dropping_rows_keeps_the_others() -> None:
    model = tiny_model("llama")
    anatomy = check_anatomy(model, resolve_anatomy(model))
    site = anatomy.layers[1].path
    with frozen_eval(model), torch.no_grad():
        replay = Replay(model, anatomy, ROWS, 1, [site])
        offset = torch.randn(len(ROWS), anatomy.hidden_size, generator=torch.Generator().manual_seed(1))
        everything = replay.logits({site: offset})
        keep = torch.tensor([True, False, True, False])
        positions = replay.select(keep)
        assert torch.allclose(replay.logits({site: offset[keep]}), everything[positions], atol=1e-5)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class _Recurrent(nn.Module):
    """Breaks the assumption of replaying: the block's output depends on a running sum over all columns."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, *args, **kwargs):  # type: ignore[no-untyped-def]
        out = self.inner(hidden_states, *args, **kwargs)
        return out + hidden_states.cumsum(dim=1) * 0.1


def test_a_model_that_cannot_be_restarted_falls_back_and_is_still_right(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    model.model.layers[2] = _Recurrent(model.model.layers[2])
    anatomy = resolve_anatomy(tiny_model("llama"))
    site = anatomy.layers[0].path
    with frozen_eval(model), caplog.at_level("DEBUG", logger="hf_kedit"):
        fast = Replay(model, anatomy, ROWS, 0, [site])
        assert fast.route == "layers"  # the prefix cannot be skipped, the lower layers can
        full = Replay(model, anatomy, ROWS, 0, [site], route="full")
        assert torch.allclose(loss_and_gradient(fast, site)[0], loss_and_gradient(full, site)[0], atol=2e-5)


def test_half_precision_models_are_replayed_within_their_precision() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    anatomy = resolve_anatomy(model)
    site = anatomy.layers[1].path
    with frozen_eval(model):
        fast, full = (Replay(model, anatomy, ROWS, 1, [site], route=r) for r in (None, "full"))
        assert (loss_and_gradient(fast, site)[0] - loss_and_gradient(full, site)[0]).abs().max() < 0.1


def test_a_blocks_own_forward_is_put_back() -> None:
    """accelerate's hooks are a ``forward`` on the instance."""
    model = tiny_model("llama")
    anatomy = check_anatomy(model, resolve_anatomy(model))
    for layer in model.model.layers[:2]:
        add_hook_to_module(layer, ModelHook())
    own = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    assert sum(forward is not None for forward in own.values()) == 2
    site = anatomy.layers[2].path
    with frozen_eval(model):
        replay = Replay(model, anatomy, ROWS, 2, [site])
        assert replay.route != "full"
        replay.logits({site: torch.zeros(len(ROWS), anatomy.hidden_size)})
    after = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    assert all(after[name] is forward for name, forward in own.items())


def test_an_exception_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    anatomy = check_anatomy(model, resolve_anatomy(model))
    site = anatomy.layers[1].path
    with frozen_eval(model):
        replay = Replay(model, anatomy, ROWS, 1, [site])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(replay_module, "logits_at", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            replay.logits({site: torch.zeros(len(ROWS), anatomy.hidden_size)})
    assert not any("forward" in module.__dict__ for module in model.modules())
