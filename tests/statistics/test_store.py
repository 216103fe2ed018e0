"""Second moments: one pass for all modules, cached by weights, resumed after a kill, never silently wrong."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, ROMEConfig
from hf_kedit.data.texts import packaged_texts
from hf_kedit.errors import DataError, StatisticsError
from hf_kedit.statistics import collecting
from hf_kedit.statistics import store as module
from hf_kedit.statistics.collecting import collect_moments
from hf_kedit.statistics.corpora import (
    WRITTEN_AT_ONCE,
    WRITTEN_TOKENS,
    Corpus,
    file_corpus,
    packaged_corpus,
    packaged_tokens,
    resolve_corpus,
    self_corpus,
    text_corpus,
)
from hf_kedit.statistics.moments import SecondMoment, shrinkage
from hf_kedit.statistics.solve import factor_moment, ridge_columns
from hf_kedit.statistics.store import StatisticsStore
from tests.golden_cases import corpus, load_model

PATHS = ["model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj", "model.layers.2.self_attn.o_proj"]


@pytest.fixture(scope="module")
def llama() -> Any:
    return load_model("llama")


def direct(model: Any, tokenizer: Any, path: str, texts: list[str]) -> tuple[torch.Tensor, int]:
    """The definition, one text at a time, in float64."""
    total: Any = 0
    count = 0
    for text in texts:
        seen: list[torch.Tensor] = []
        handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        handle.remove()
        x = seen[0][0].double()
        total, count = total + x.T @ x, count + x.shape[0]
    return total, count


def test_one_padded_pass_equals_the_definition_for_every_module(llama: Any) -> None:
    model, tokenizer = llama
    texts = corpus()[:40]
    found = collect_moments(model, tokenizer, PATHS, text_corpus(texts), token_budget=200)
    for path in PATHS:
        total, count = direct(model, tokenizer, path, texts)
        assert found[path].count == count
        assert torch.allclose(found[path].total, total, rtol=1e-4, atol=1e-4)
        assert found[path].total.dtype == torch.float64


def test_collecting_goes_on_when_memory_runs_out(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forward, behind modules that have been added, and in a product: nothing is lost and nothing added twice."""
    model, tokenizer = llama
    texts = corpus()[:40]
    failures: list[str] = []

    def crowded(_: Any, args: tuple[torch.Tensor, ...], __: Any) -> None:
        if args[0].shape[0] > 2:
            failures.append("forward")
            raise torch.OutOfMemoryError

    plain = torch.Tensor.__matmul__

    def product(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if len(failures) < 3:
            failures.append("product")
            raise torch.OutOfMemoryError
        return plain(self, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    handle = model.model.layers[2].register_forward_hook(crowded)
    try:
        found = collect_moments(model, tokenizer, PATHS, text_corpus(texts), token_budget=200)
    finally:
        handle.remove()
    monkeypatch.undo()
    assert {"forward", "product"} <= set(failures)
    for path in PATHS:
        total, count = direct(model, tokenizer, path, texts)
        assert found[path].count == count and torch.allclose(found[path].total, total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 300, pytest.param(4096, marks=pytest.mark.slow), 4097])
def test_the_same_tokens_are_read_whatever_a_device_runs_at_once(llama: Any, tokens: int) -> None:
    """Exactly as many as wanted, the first ones of the text, cut in the middle of a text."""
    model, tokenizer = llama
    texts, left, first = corpus(), tokens, []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:left]
        first.append(ids)
        left -= len(ids)
        if left == 0:
            break
    assert left == 0
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(PATHS[0]).register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    with torch.no_grad():
        for ids in first:
            model(torch.tensor([ids]))
    handle.remove()
    states = torch.cat(seen)
    assert states.shape[0] == tokens
    for budget in (90, 5000):
        found = collect_moments(
            model, tokenizer, PATHS[:1], text_corpus(texts), tokens=tokens, token_budget=budget, show_progress=False
        )[PATHS[0]]
        assert found.count == tokens
        assert torch.allclose(found.total, states.T @ states, rtol=1e-4, atol=1e-4)


def test_moments_merge(llama: Any) -> None:
    model, tokenizer = llama
    texts = corpus()[:64]
    both = collect_moments(model, tokenizer, PATHS[:1], text_corpus(texts))[PATHS[0]]
    halves = [collect_moments(model, tokenizer, PATHS[:1], text_corpus(t))[PATHS[0]] for t in (texts[:32], texts[32:])]
    merged = halves[0].merged(halves[1])
    assert merged.count == both.count and torch.allclose(merged.mean(), both.mean(), rtol=1e-5, atol=1e-6)


def test_a_killed_run_goes_on_where_it_was(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = llama
    monkeypatch.setattr(collecting, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(collecting, "SAVE_SHARE", 0.0)
    texts, read = corpus()[:256], []

    def counted(limit: int | None) -> Iterator[str]:
        for i, text in enumerate(texts):
            if limit is not None and i == limit:
                raise KeyboardInterrupt
            read.append(i)
            yield text

    checkpoint = tmp_path / "partial.safetensors"
    with pytest.raises(KeyboardInterrupt):
        collect_moments(model, tokenizer, PATHS, Corpus("c", lambda: counted(200)), checkpoint=checkpoint)
    assert checkpoint.exists()
    forwards: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    resumed = collect_moments(model, tokenizer, PATHS, Corpus("c", lambda: counted(None)), checkpoint=checkpoint)
    used, _ = len(forwards), forwards.clear()
    whole = collect_moments(model, tokenizer, PATHS, text_corpus(texts))
    handle.remove()
    assert used < len(forwards), "the second run repeated everything"
    assert not checkpoint.exists()
    for path in PATHS:
        assert resumed[path].count == whole[path].count
        assert torch.allclose(resumed[path].total, whole[path].total)


def test_statistics_are_found_again_and_belong_to_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model("llama")
    calls = []
    real = module.collect_moments
    monkeypatch.setattr(module, "collect_moments", lambda *a, **k: calls.append(1) or real(*a, **k))
    chosen = text_corpus(corpus())

    def store() -> StatisticsStore:
        return StatisticsStore(model, tokenizer, corpus=chosen, tokens=4000, cache_dir=tmp_path, show_progress=False)

    first = store().moments(PATHS[:2])
    again = store().moments(PATHS[:2])
    assert len(calls) == 1
    assert all(torch.equal(first[p].total, again[p].total) and again[p].count == first[p].count for p in PATHS[:2])
    StatisticsStore(model, tokenizer, corpus=chosen, cache_dir=tmp_path).moments(PATHS[:1])  # any number will do
    StatisticsStore(model, tokenizer, corpus=chosen, tokens=3000, cache_dir=tmp_path).moments(PATHS[:1])
    assert len(calls) == 1
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    store().moments(PATHS[:1])
    assert len(calls) == 2, "other weights have other statistics"
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    store().moments(PATHS[:1])
    assert len(calls) == 3


def test_a_moment_is_factorised_once(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = llama
    made = []
    real = module.factor_beside
    monkeypatch.setattr(module, "factor_beside", lambda *a, **k: made.append(1) or real(*a, **k))
    store = StatisticsStore(model, tokenizer, cache_dir=tmp_path, show_progress=False)
    store.put(PATHS[0], SecondMoment(torch.eye(160, dtype=torch.float64) * 5000, 5000))
    first = store.factor(PATHS[0])
    assert store.factor(PATHS[0]) is first and len(made) == 1 and first.kind == "cholesky"
    store.put(PATHS[0], SecondMoment(torch.eye(160, dtype=torch.float64) * 20_000, 5000))
    assert store.factor(PATHS[0]) is not first, "another moment has another factor"


@pytest.mark.parametrize(
    ("named", "held", "per_width", "expected", "written"),
    [
        (True, 0, 3, 100 * 160, False),  # a hundred tokens per dimension of a text that the user names
        (False, 1000, 3, 1000, False),  # all of the packaged text …
        (False, 100, 3, 3 * 160, True),  # … with as much of the model's own as is missing …
        (False, 1000, 10, 10 * 160, True),
        (False, 9999, 3, 20 * 160, False),  # … or a part of it, where it has more than helps
    ],
)
def test_so_many_tokens_are_taken_by_default(
    named: bool,
    held: int,
    per_width: int,
    expected: int,
    written: bool,
    llama: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = llama
    asked = []

    def collect(model: Any, tokenizer: Any, modules: Any, corpus: Any, *, tokens: int, **_: Any) -> Any:
        asked.append((tokens, "self" in corpus.name))
        return {m: SecondMoment(torch.eye(160, dtype=torch.float64) * tokens, tokens) for m in modules}

    monkeypatch.setattr(module, "collect_moments", collect)
    monkeypatch.setattr(module, "packaged_tokens", lambda tokenizer: held)
    chosen = text_corpus(corpus()) if named else None
    store = StatisticsStore(model, tokenizer, corpus=chosen, cache_dir=tmp_path, show_progress=False)
    store.moments(PATHS[:2], per_width=per_width)
    assert asked == [(expected, written)]


def test_a_moment_over_few_tokens_is_drawn_towards_an_identity(llama: Any, tmp_path: Path) -> None:
    """The keys of text that was not read are disturbed less than by the moment as it is."""
    model, tokenizer = llama
    path, texts = PATHS[0], corpus()
    unseen = collect_moments(model, tokenizer, [path], text_corpus(texts[600:]), tokens=20_000)[path].mean()
    keys = torch.randn(160, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys = torch.linalg.cholesky(unseen + 1e-9 * torch.eye(160, dtype=torch.float64)) @ keys

    def disturbance(**settings: Any) -> float:
        store = StatisticsStore(model, tokenizer, corpus=text_corpus(texts[:600]), cache_dir=tmp_path, **settings)
        u = store.factor(path).solve(keys)  # ROME: the change is u / (kᵀ u) times what the value lacks
        return float(((u * (unseen @ u)).sum(0) / (keys * u).sum(0) ** 2).mean())

    few = {"tokens": 3 * 160, "show_progress": False}
    shrunk, plain = disturbance(**few), disturbance(**few, ridge=0.0)
    assert shrunk < 0.7 * plain
    moment = StatisticsStore(model, tokenizer, corpus=text_corpus(texts[:600]), cache_dir=tmp_path, **few)
    estimate, mean = moment.estimate(path), moment.moments([path])[path].mean()
    rho = 0.8 / 3**0.5
    assert torch.allclose(estimate, (1 - rho) * mean + rho * mean.trace() / 160 * torch.eye(160, dtype=torch.float64))
    assert [shrinkage(n, 160) for n in (10, 160, 100 * 160, 10**6)] == [0.5, 0.5, 0.0, 0.0]


def test_statistics_are_taken_from_the_unedited_model(world_gpt2: EditableModel, tmp_path: Path) -> None:
    from hf_kedit import load_edit_dataset

    def config(layer: int, folder: str) -> ROMEConfig:
        return ROMEConfig(layers=[layer], stats_tokens=12_000, stats_dir=str(tmp_path / folder))

    pristine = world_gpt2.statistics.fingerprint
    rows = load_edit_dataset("world", split="test", limit=2)
    world_gpt2.set_method(config(2, "edited")).edit(rows[0])
    # the layer above, whose keys the first edit would change
    world_gpt2.set_method(config(3, "edited")).edit(rows[1])
    path = world_gpt2.anatomy.down(3).path
    edited = world_gpt2.statistics.moments([path])[path]
    assert world_gpt2.statistics.fingerprint == pristine
    fresh = EditableModel.from_pretrained("kedit/world-gpt2", config(3, "fresh"))
    expected = fresh.statistics.moments([path])[path]
    assert torch.equal(edited.total, expected.total) and edited.count == expected.count


def test_too_few_tokens_are_refused_with_both_numbers(llama: Any, tmp_path: Path) -> None:
    model, tokenizer = llama
    store = StatisticsStore(
        model, tokenizer, corpus=text_corpus(["Just a few words."]), cache_dir=tmp_path, show_progress=False
    )
    with pytest.raises(StatisticsError, match=r"160"):
        store.moments(PATHS[:1])
    empty = StatisticsStore(model, tokenizer, corpus=Corpus("none", lambda: iter([])), cache_dir=tmp_path)
    with pytest.raises(StatisticsError, match="no text"):
        empty.moments(PATHS[:1])


def test_moments_over_another_text_are_not_taken_silently(
    llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = llama
    other = StatisticsStore(model, tokenizer, corpus=text_corpus(corpus()), tokens=4000, cache_dir=tmp_path)
    taken = other.moments(PATHS[:1])[PATHS[0]]
    unnamed = StatisticsStore(model, tokenizer, cache_dir=tmp_path, tokens=3000)
    with caplog.at_level("WARNING", "hf_kedit"):
        found = unnamed.moments(PATHS[:1])[PATHS[0]]
    assert found.source.startswith("packaged-") and found.source != taken.source
    assert unnamed.provenance(PATHS[:1]) == {"corpus": found.source, "tokens": 3000}
    assert f"{taken.source} (4,000 tokens)" in caplog.text and "They are not used" in caplog.text
    again = StatisticsStore(model, tokenizer, cache_dir=tmp_path, tokens=3000).moments(PATHS[:1])[PATHS[0]]
    assert torch.equal(again.total, found.total), "what was collected is found again"
    named = StatisticsStore(model, tokenizer, corpus=text_corpus(["x"]), cache_dir=tmp_path, tokens=3000)
    with pytest.raises(StatisticsError, match="fewer than its 160"):
        named.moments(PATHS[:1])


def test_a_short_text_says_so_and_is_read_once(
    llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = llama
    texts = corpus()[:100]
    held = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    calls = []
    real = module.collect_moments
    monkeypatch.setattr(module, "collect_moments", lambda *a, **k: calls.append(1) or real(*a, **k))
    for _ in range(2):
        store = StatisticsStore(model, tokenizer, corpus=text_corpus(texts), tokens=held + 1, cache_dir=tmp_path)
        assert store.moments(PATHS[:1])[PATHS[0]].count == held
    assert calls == [1]
    assert f"holds {held:,} tokens, not the {held + 1:,}" in caplog.text


def test_a_text_that_is_too_short_is_followed_by_the_models_own(llama: Any) -> None:
    model, tokenizer = llama
    packaged = packaged_texts()
    assert packaged_tokens(tokenizer) == sum(len(tokenizer(text)["input_ids"]) for text in packaged)
    enough, more = (packaged_corpus(model, tokenizer, more=more) for more in (False, True))
    assert list(enough.texts()) == packaged
    assert more.name == enough.name + "+self-0"
    assert list(islice(more.texts(), len(packaged))) == packaged
    own = list(islice(self_corpus(model, tokenizer).texts(), 3))
    assert list(islice(more.from_text(len(packaged)), 3)) == own
    assert list(islice(more.from_text(len(packaged) - 1), 3)) == [packaged[-1], *own[:2]]


def test_text_that_the_model_writes_is_the_same_from_any_place(llama: Any) -> None:
    """Each batch has its own random numbers: a run that goes on does not write again what it has read."""
    model, tokenizer = llama
    whole = list(islice(self_corpus(model, tokenizer).texts(), WRITTEN_AT_ONCE + 5))
    assert len(set(whole)) > 0.8 * len(whole)
    written: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: written.append(1))
    assert next(self_corpus(model, tokenizer).from_text(WRITTEN_AT_ONCE + 4)) == whole[-1]
    handle.remove()
    assert len(written) <= WRITTEN_TOKENS, "the first batch was written again"
    assert next(self_corpus(model, tokenizer, seed=1).texts()) != whole[0]


def test_a_user_can_ask_for_text_of_the_models_own(tmp_path: Path) -> None:
    config = ROMEConfig(layers=[2], stats_dataset="self", stats_tokens=2000, stats_dir=str(tmp_path))
    model = EditableModel.from_pretrained("kedit/world-gpt2", config)
    path = model.anatomy.down(2).path
    moment = model.statistics.moments([path])[path]
    assert (moment.source, moment.count) == ("self-0", 2000)


def test_corpora(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\n\ntwo\n")
    assert list(file_corpus(path).texts()) == ["one", "two"]
    assert resolve_corpus(str(path)).name == file_corpus(path).name  # type: ignore[union-attr]
    assert resolve_corpus(None) is None
    assert resolve_corpus(["a"]).name != resolve_corpus(["b"]).name  # type: ignore[union-attr]
    with pytest.raises(DataError, match="no corpus file"):
        resolve_corpus("missing.txt")
    published = resolve_corpus("wikipedia")
    assert published is not None and "wikimedia--wikipedia" in published.name


@pytest.mark.parametrize("n", [1, 7, 40])
def test_ridge_columns_solve_the_normal_equations(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(200, 32, generator=generator, dtype=torch.float64)
    c, k = x.T @ x / 200, torch.randn(32, n, generator=generator, dtype=torch.float64)
    columns = ridge_columns(factor_moment(c), k, 15.0)
    # More keys than dimensions are solved for in float64 and given back in float32.
    assert torch.allclose((15.0 * c + k @ k.T) @ columns.double(), k, atol=1e-9 if n <= 32 else 1e-5)


def test_awkward_moments(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(400, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0  # a neuron that never fires
    dead = x.T @ x / 400
    factor = factor_moment(dead, name="dead")
    assert factor.ridge > 0
    assert torch.isfinite(factor.solve(torch.ones(16, 1, dtype=torch.float64))).all()
    x[:, 3] = x[:, 2] * 0.5 + x[:, 4]  # two directions too few, but no empty row
    good = x.T @ x / 400
    slightly = good - torch.eye(16, dtype=torch.float64) * (torch.linalg.eigvalsh(good)[0] + 1e-6)
    indefinite = factor_moment(slightly, name="indefinite")
    assert indefinite.kind == "lu"
    b = torch.ones(16, 1, dtype=torch.float64)
    assert torch.allclose(slightly @ indefinite.solve(b), b, atol=1e-6)
    with pytest.raises(StatisticsError):
        factor_moment(torch.full((4, 4), float("nan")))
    with pytest.raises(StatisticsError):
        factor_moment(torch.zeros(4, 4))
    assert SecondMoment(torch.eye(2, dtype=torch.float64) * 6, 3).mean()[0, 0] == 2
