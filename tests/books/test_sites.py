"""Sites: wrapping without a trace, and where prompts end in every way of calling a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_kedit import EditableModel
from hf_kedit.books.sites import Frame, SiteCall, SiteFunction, Sites, held_decision, prompt_lengths
from hf_kedit.errors import ConfigError, LayerError
from hf_kedit.tokens import pad_rows
from tests.models import tiny_model

PATHS = {
    "gpt2": "transformer.h.1.mlp.c_proj",
    "llama": "model.layers.1.mlp.down_proj",
    "opt": "model.decoder.layers.1.fc2",
}
LONG, SHORT = [5, 6, 7, 8, 9], [11, 12, 13]


def replace_at_key(strength: float, wanted: int | None = None) -> SiteFunction:
    """A codebook of one entry: another output at the key token, for all rows or those whose prompt has one length."""

    def function(call: SiteCall) -> torch.Tensor | None:
        if call.frame.phase != "prompt":
            return None
        hit = torch.ones(call.frame.rows, dtype=torch.bool)
        if wanted is not None:
            hit = call.frame.prompt_mask.sum(dim=1).cpu() == wanted
        output = call.output.clone()
        rows = torch.arange(call.frame.rows)[hit]
        output[rows, call.frame.key_columns[rows]] = strength
        return output

    return function


def held_everywhere(strength: float) -> SiteFunction:
    """A route that is decided by the prompt and acts on every position, generated ones included."""

    def function(call: SiteCall) -> torch.Tensor | None:
        if call.frame.phase == "prompt":
            call.frame.held["test"] = 1 + call.at_key(call.inputs).mean(dim=-1)
        route = held_decision(call.frame, "test")
        pattern = torch.linspace(-1, 1, call.output.shape[-1])
        return None if route is None else call.output + strength * route[:, None, None] * pattern

    return function


@pytest.fixture(params=["gpt2", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def wrapped(family: str) -> Iterator[tuple[Any, Sites, str]]:
    model = tiny_model(family)
    yield model, Sites(model), PATHS[family]


def logits(model: Any, *rows: list[int], side: Any = "right", **kwargs: Any) -> torch.Tensor:
    batch = pad_rows(rows, 0, side)
    with torch.no_grad():
        return model(
            batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, **kwargs
        ).logits


def seen(sites: Sites, path: str) -> list[Frame]:
    frames: list[Frame] = []

    def function(call: SiteCall) -> None:
        frames.append(call.frame)

    sites.attach("watch", {path: function})
    return frames


def continued(model: Any, rows: list[list[int]], **kwargs: Any) -> list[list[int]]:
    batch = pad_rows(rows, 0, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **kwargs}
    out = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)
    return out[:, batch.input_ids.shape[1] :].tolist()


# ---------------------------------------------------------------------- wrapping


def test_wrapping_leaves_no_trace(wrapped: Any) -> None:
    model, sites, path = wrapped
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    plain = logits(model, LONG)
    sites.attach("edit", {path: replace_at_key(3.0)})
    assert not torch.equal(logits(model, LONG), plain)
    assert dict(model.named_modules()) == modules and list(model.state_dict()) == keys
    with sites.disabled():
        assert torch.equal(logits(model, LONG), plain)
        with sites.disabled():
            pass
        assert torch.equal(logits(model, LONG), plain)
    assert not torch.equal(logits(model, LONG), plain)
    sites.detach("edit")
    assert torch.equal(logits(model, LONG), plain)
    assert "generate" not in model.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_flattened_and_transposed_layers() -> None:
    for name, path in PATHS.items():  # OPT's MLP sees [rows · width, d]
        model = tiny_model(name)
        sites = Sites(model)
        shapes = []

        def function(call: SiteCall, shapes: list[Any] = shapes) -> torch.Tensor:
            shapes.append((tuple(call.inputs.shape[:2]), tuple(call.output.shape[:2])))
            return call.output + 1

        plain = logits(model, LONG, SHORT)
        sites.attach("edit", {path: function})
        assert not torch.allclose(logits(model, LONG, SHORT), plain)
        assert shapes == [((2, 5), (2, 5))], name


def test_trials_take_the_place_of_an_owner(wrapped: Any) -> None:
    model, sites, path = wrapped
    plain = logits(model, LONG)
    sites.attach("edit", {path: replace_at_key(3.0)})
    edited = logits(model, LONG)
    with pytest.raises(RuntimeError, match="stop"), sites.trying({path: lambda call: None}, instead_of="edit"):
        assert torch.equal(logits(model, LONG), plain)
        raise RuntimeError("stop")
    assert torch.equal(logits(model, LONG), edited) and sites.paths == {path: "edit"}


def test_wrong_wrappings(wrapped: Any) -> None:
    _, sites, path = wrapped
    sites.attach("one", {path: replace_at_key(1.0)})
    with pytest.raises(ConfigError, match="wrapped already, for one"):
        sites.attach("two", {path: replace_at_key(2.0)})
    with pytest.raises(LayerError, match="no module"):
        sites.attach("three", {path + "x": replace_at_key(2.0)})
    assert sites.paths == {path: "one"}


def test_a_copy_of_the_model_is_a_model_of_its_own(wrapped: Any) -> None:
    model, sites, path = wrapped
    sites.attach("edit", {path: replace_at_key(3.0)})
    twin = copy.deepcopy(model)
    edited = logits(model, LONG)
    assert torch.equal(logits(twin, LONG), edited)
    plain = continued(model, [LONG])
    sites.detach("edit")
    assert torch.equal(logits(twin, LONG), edited) and not torch.equal(logits(model, LONG), edited)
    assert continued(twin, [LONG]) == plain and twin.generate.__self__ is not sites


# ---------------------------------------------------------------------- where prompts end


@pytest.mark.parametrize("side", ["left", "right"])
def test_key_tokens_of_plain_calls(side: str, wrapped: Any) -> None:
    model, sites, path = wrapped
    frames = seen(sites, path)
    logits(model, LONG, SHORT, side=side)
    assert frames[-1].key_columns.tolist() == ([4, 2] if side == "right" else [4, 4])
    with prompt_lengths(model, [2, 1]):
        logits(model, LONG, SHORT, side=side)
        assert frames[-1].key_columns.tolist() == ([1, 0] if side == "right" else [1, 2])
        assert frames[-1].prompt_mask.sum(dim=1).tolist() == [2, 1]
    batch = pad_rows([LONG, SHORT], 0, side)  # type: ignore[arg-type]
    labels = torch.where(batch.attention_mask.bool(), batch.input_ids, -100)
    start = batch.starts.tolist()
    labels[0, : start[0] + 3] = -100
    logits(model, LONG, SHORT, side=side, labels=labels)
    assert frames[-1].key_columns[0] == start[0] + 2
    assert frames[-1].key_columns[1] == start[1] + 2  # nothing is masked in this row: the last token


def test_prompt_lengths_belong_to_one_model(wrapped: Any) -> None:
    model, sites, path = wrapped
    other = tiny_model("llama")
    frames = seen(sites, path)
    with prompt_lengths(other, [1]):
        logits(model, LONG)
    assert frames[-1].key_columns.tolist() == [4]
    with prompt_lengths(model, [1, 1]), pytest.raises(ConfigError, match="names 2 rows"):
        logits(model, LONG)
    with prompt_lengths(model, [6]), pytest.raises(ConfigError, match="at most"):
        logits(model, LONG)
    logits(model, LONG)  # nothing is left over from the calls that failed
    assert frames[-1].key_columns.tolist() == [4]


def test_rows_of_a_batch_are_as_alone(wrapped: Any) -> None:
    model, sites, path = wrapped
    plain = logits(model, LONG, SHORT)
    sites.attach("edit", {path: replace_at_key(3.0, wanted=3)})
    mixed = logits(model, LONG, SHORT)
    assert torch.equal(mixed[0], plain[0])
    alone = logits(model, SHORT)
    torch.testing.assert_close(mixed[1, :3], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model, LONG, SHORT, side="left")[1, 2:], alone[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed[1, 2], plain[1, 2])


# ---------------------------------------------------------------------- generation


@pytest.mark.parametrize("function", [replace_at_key(4.0), replace_at_key(4.0, wanted=3), held_everywhere(6.0)])
def test_cached_generation_is_uncached_generation(function: Any, wrapped: Any) -> None:
    model, sites, path = wrapped
    plain = continued(model, [LONG, SHORT])
    sites.attach("edit", {path: function})
    cached = continued(model, [LONG, SHORT])
    assert cached != plain
    assert continued(model, [LONG, SHORT], use_cache=False) == cached
    assert [continued(model, [LONG])[0], continued(model, [SHORT])[0]] == cached
    assert continued(model, [LONG, SHORT], cache_implementation="static", disable_compile=True) == cached


def test_frames_of_generation(wrapped: Any) -> None:
    model, sites, path = wrapped
    frames = seen(sites, path)
    continued(model, [LONG, SHORT], max_new_tokens=3)
    assert [f.phase for f in frames] == ["prompt", "decode", "decode"] and frames[0].key_columns.tolist() == [4, 4]
    assert frames[0].mask.sum().item() == 8 and (frames[0].phase, frames[0].past) == ("prompt", 0)
    frames.clear()
    continued(model, [LONG, SHORT], max_new_tokens=3, use_cache=False)
    assert [(f.phase, f.width, f.key_columns.tolist()) for f in frames] == [("prompt", n, [4, 4]) for n in (5, 6, 7)]
    frames.clear()
    continued(model, [LONG], max_new_tokens=3, num_beams=2, num_return_sequences=2)
    assert [f.rows for f in frames] == [2, 2, 2]
    frames.clear()
    continued(model, [LONG, SHORT], max_new_tokens=2, do_sample=True, num_return_sequences=2)
    assert frames[0].rows == 4 and frames[0].mask.sum(dim=1).tolist() == [5, 5, 3, 3]
    frames.clear()
    model.generate(inputs_embeds=model.get_input_embeddings()(torch.tensor([LONG])), max_new_tokens=2, pad_token_id=0)
    assert [f.phase for f in frames] == ["prompt", "decode"] and frames[0].key_columns.tolist() == [4]


def test_a_prefix_cache_and_chunks_of_a_prompt(wrapped: Any) -> None:
    model, sites, path = wrapped
    frames = seen(sites, path)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([LONG[:2]]), past_key_values=cache)
    frames.clear()
    out = model.generate(
        torch.tensor([LONG]), past_key_values=cache, max_new_tokens=2, pad_token_id=0, do_sample=False
    )
    assert out.shape == (1, 7)
    assert [(f.phase, f.width, f.past > 0) for f in frames] == [("prompt", 3, True), ("decode", 1, True)]
    assert frames[0].key_columns.tolist() == [2]
    frames.clear()
    continued(model, [LONG], max_new_tokens=2, prefill_chunk_size=2)
    assert [f.phase for f in frames] == ["chunk", "chunk", "prompt", "decode"]


def test_decisions_belong_to_a_cache(wrapped: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, sites, path = wrapped
    sites.attach("edit", {path: held_everywhere(6.0)})
    alone = continued(model, [LONG], max_new_tokens=4) + continued(model, [SHORT], max_new_tokens=4)
    caches, tokens, steps = [None, None], [LONG, SHORT], [[], []]
    for _ in range(4):  # two sequences, turn by turn, by hand
        for i in range(2):
            with torch.no_grad():
                out = model(torch.tensor([tokens[i]]), past_key_values=caches[i], use_cache=True)
            caches[i], tokens[i] = out.past_key_values, [int(out.logits[0, -1].argmax())]
            steps[i] += tokens[i]
    assert steps == alone
    sites.drop_held()
    with torch.no_grad():
        stale = model(torch.tensor([[3]]), past_key_values=copy.deepcopy(caches[0])).logits
    with sites.disabled(), torch.no_grad():
        assert torch.equal(model(torch.tensor([[3]]), past_key_values=caches[0]).logits, stale)


def test_a_static_cache_by_hand(wrapped: Any) -> None:
    model, sites, path = wrapped
    frames = seen(sites, path)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(torch.tensor([LONG]), past_key_values=cache)
        model(torch.tensor([[3]]), past_key_values=cache)
    assert [f.phase for f in frames] == ["prompt", "decode"]


# ---------------------------------------------------------------------- compiling


@pytest.mark.slow
def test_compiled_models_see_sites_that_come_and_go() -> None:
    model, path = tiny_model("gpt2"), PATHS["gpt2"]
    sites = Sites(model)
    compiled = torch.compile(model, backend="eager")
    plain = logits(compiled, LONG)
    sites.attach("edit", {path: replace_at_key(3.0)})
    edited = logits(model, LONG)
    assert not torch.equal(edited, plain)
    torch.testing.assert_close(logits(compiled, LONG), edited)
    torch.testing.assert_close(logits(compiled, SHORT), logits(model, SHORT))
    sites.detach("edit")
    torch.testing.assert_close(logits(compiled, LONG), plain)


@pytest.mark.slow
def test_an_upper_layer_is_not_compiled_as_a_lower_one() -> None:
    """The compiler takes one graph for all layers of a kind, and did not ask whether one of them has a site."""
    model = EditableModel.from_pretrained("kedit/world-llama", "grace")
    model.edit(prompt="By profession {} is a", subject="Tarosk Boayond", target_new="plumber")
    ids = model.tokenizer("By profession Tarosk Boayond is a", return_tensors="pt")["input_ids"]  # type: ignore[misc]
    compiled: Any = torch.compile(model.base_model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
