"""Causal tracing: against an independent implementation, against a naive one, and on every family of models."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest, embedded
from hf_kedit.anatomy import resolve_anatomy
from hf_kedit.data import load_edit_dataset
from hf_kedit.errors import ConfigError, RequestError, SubjectNotFoundError, UnsupportedModelError
from hf_kedit.locate import TRACE_KINDS, Fact, Trace, TraceReport, causal_trace
from hf_kedit.locate.tracing import default_window, window_layers
from hf_kedit.requests import load_requests
from tests.golden_cases import Case
from tests.models import FAMILIES

PROMPT = {"prompt": "By profession {} is a", "subject": "Tarosk Boayond"}


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded.path("world-gpt2"))


@cache
def world_facts(limit: int) -> list[EditRequest]:
    return load_requests(load_edit_dataset("world", split="test", limit=limit))


# ---------------------------------------------------------------------- against other implementations


@pytest.mark.golden
def test_tables_match_the_reference() -> None:
    case = Case("causal_trace_gpt2")
    model, tokenizer = case.load()
    spec, limits = case.spec, case.spec["tolerance"]["values"]
    report = causal_trace(
        model,
        {"prompt": spec["prompt"], "subject": spec["subject"]},
        tokenizer,
        window=spec["window"],
        noise_level=spec["noise_level"],
        noise=case.expected["noise"],
    )
    (trace,) = report.traces
    assert trace.answer == spec["answer"] and trace.tokens == spec["input_tokens"]
    assert list(trace.subject_range) == spec["subject_range"] and report.samples == spec["samples"]
    assert abs(trace.high - spec["high_score"]) <= limits["high_score"]
    assert abs(trace.low - spec["low_score"]) <= limits["low_score"]
    assert set(trace.scores) == {"hidden", "mlp", "attn"}
    for kind, table in trace.scores.items():
        expected = case.expected[f"scores.{kind}"]
        assert float((expected - trace.low).abs().max()) > 1e-2  # there is something to match
        assert float((table - expected).abs().max()) <= limits["scores"], kind


@pytest.mark.golden
def test_noise_level_matches_the_reference() -> None:
    case = Case("causal_trace_gpt2")
    model, tokenizer = case.load()
    facts = [{"prompt": "{} is", "subject": s} for s in case.spec["subjects_for_std"]]
    report = causal_trace(model, facts, tokenizer, kinds=["hidden"], samples=1)
    assert report.noise_level == pytest.approx(case.spec["noise_level"], rel=1e-5)


@contextlib.contextmanager
def overwritten(model: Any, plan: dict[str, tuple[int, torch.Tensor]]) -> Iterator[None]:
    """Set one position of some modules' outputs; for one sequence."""
    handles = []
    for path, (position, value) in plan.items():

        def hook(_: Any, __: Any, output: Any, position: int = position, value: torch.Tensor = value) -> Any:
            state = (output[0] if isinstance(output, tuple) else output).clone()
            state.view(1, -1, state.shape[-1])[0, position] = value
            return (state, *output[1:]) if isinstance(output, tuple) else state

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def naive_score(model: Any, ids: list[int], noised: torch.Tensor, kind: str, position: int, layer: int, answer: int):
    """P(answer) of one cell for one noise sample (on positions 1 and 2), with plain hooks and one row."""
    anatomy = resolve_anatomy(model)
    blocks = [entry.path for entry in anatomy.layers]
    mlps = [entry.down.path for entry in anatomy.layers]  # type: ignore[union-attr]
    attentions = [entry.attention_out.path for entry in anatomy.layers]  # type: ignore[union-attr]
    inputs = torch.tensor([ids])

    def states(paths: list[str]) -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}

        def hook(path: str) -> Any:
            def keep(_: Any, __: Any, output: Any) -> None:
                kept[path] = (output[0] if isinstance(output, tuple) else output).clone()

            return keep

        handles = [model.get_submodule(p).register_forward_hook(hook(p)) for p in paths]
        model(input_ids=inputs)
        for handle in handles:
            handle.remove()
        return {p: s.view(len(ids), -1)[position] for p, s in kept.items()}

    clean = states([*blocks, *mlps, *attentions])

    def noise(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, 1:3] += noised
        return output

    handle = model.get_submodule(anatomy.embeddings).register_forward_hook(noise)
    try:
        corrupted = states([*mlps, *attentions])
        plan = {}
        if kind.startswith("hidden"):
            plan[blocks[layer]] = (position, clean[blocks[layer]])
            held = {"hidden": [], "hidden_without_mlp": mlps, "hidden_without_attn": attentions}[kind]
            for path in held[layer + 1 :]:
                plan[path] = (position, corrupted[path])
        else:
            paths = mlps if kind == "mlp" else attentions
            for path in paths[max(0, layer - 1) : layer + 1]:  # window of two
                plan[path] = (position, clean[path])
        with overwritten(model, plan):
            return float(model(input_ids=inputs).logits[0, -1].softmax(-1)[answer])
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom", "gptj", "gemma2"])
@torch.no_grad()
def test_cells_equal_a_naive_implementation(family: str) -> None:
    model = FAMILIES[family](vocab_size=len(tokenizer()))
    ids = tokenizer()("By Tarosk Boayond a", return_tensors="pt").input_ids[0].tolist()
    fact = {"prompt": "By {} a", "subject": "Tarosk Boayond"}
    noise = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(3))
    report = causal_trace(
        model, fact, tokenizer(), kinds=TRACE_KINDS, window=2, noise=noise, noise_level=0.5, batch_size=6
    )
    (trace,) = report.traces
    assert trace.subject_range == (1, 3) and len(ids) == 4
    answer = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    for kind in TRACE_KINDS:
        spread = 0.0
        for position, layer in ((1, 0), (2, 1), (3, 1), (2, 2)):
            scores = [naive_score(model, ids, 0.5 * n, kind, position, layer, answer) for n in noise]
            expected = sum(scores) / 2
            assert float(trace.scores[kind][position, layer]) == pytest.approx(expected, rel=1e-4), (kind, position)
            spread = max(spread, abs(expected - trace.low) / trace.low)
        assert spread > 1e-3, kind


# ---------------------------------------------------------------------- families


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"blip2"}))
def test_every_family_can_be_traced(family: str) -> None:
    """In a decoder the last block's output at the last token decides everything: restoring it restores P."""
    model = FAMILIES[family](vocab_size=len(tokenizer()))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = causal_trace(model, PROMPT, tokenizer(), samples=2)
    (trace,) = report.traces
    assert trace.high != pytest.approx(trace.low, rel=1e-3)
    for kind in ("hidden", "mlp", "attn"):
        table = trace.scores[kind]
        assert table.shape == (len(trace.tokens), resolve_anatomy(model).num_layers if not _two(model) else 2)
        assert bool(torch.isfinite(table).all()) and float((table - trace.low).abs().max()) > 0
    if not _two(model):
        assert float(trace.scores["hidden"][-1, -1]) == pytest.approx(trace.high, rel=1e-3)
        assert float(trace.scores["hidden"][trace.subject_range[0] - 1, 0]) == pytest.approx(trace.low)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    # transformers leaves hooks of its own the first time hidden states are asked for; we add none
    hooks = _hooks(model)
    causal_trace(model, PROMPT, tokenizer(), samples=1, kinds=["attn"])
    assert _hooks(model) == hooks


def _hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _two(model: Any) -> bool:
    return bool(model.config.is_encoder_decoder)


def test_flags_are_put_back() -> None:
    model = FAMILIES["gpt2"](vocab_size=len(tokenizer())).train()
    causal_trace(model, PROMPT, tokenizer(), samples=1, kinds=["hidden"])
    assert model.training and all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------- the embedded models


@pytest.mark.parametrize("name", ["world-gpt2", "world-llama"])
def test_embedded_models_have_an_early_and_a_late_site(name: str) -> None:
    """As their training intends: the subject's last token carries the fact in layers 0 to 3, the last token after."""
    editable = EditableModel.from_pretrained(f"kedit/{name}", "ft-m")
    report = causal_trace(editable, world_facts(4), kinds=["hidden"], samples=4)
    assert len(report.traces) == 4 and not report.skipped
    assert report.total_effect > 0.7
    curves = report.average()["hidden"]
    early, late = curves["last subject"].mean, curves["last"].mean
    assert int(early.argmax()) <= 3 and float(early[:4].max()) > 0.4 and float(early[4:].max()) < 0.2
    assert float(late[5]) > 0.8 and float(late[:2].max()) < 0.1


def test_edits_are_traced_with(world_gpt2: EditableModel) -> None:
    request = world_facts(1)[0]
    world_gpt2.edit(request)
    now = causal_trace(world_gpt2, {**PROMPT, "prompt": request.filled_prompt, "subject": request.subject}, samples=1)
    assert request.target_new.startswith(now.traces[0].answer.strip())
    skipped = causal_trace(world_gpt2, request, samples=1)
    assert not skipped.traces and "not" in skipped.skipped[0][1]
    assert math.isnan(skipped.total_effect) and skipped.to_dict()["total_effect"] is None
    with world_gpt2.disable_edits():
        assert len(causal_trace(world_gpt2, request, samples=1).traces) == 1


def test_answers_of_several_tokens_count_jointly(world_gpt2: EditableModel) -> None:
    for request in world_facts(30):
        ids = world_gpt2.tokenizer(" " + request.ground_truth[0], add_special_tokens=False)["input_ids"]
        if len(ids) > 1:
            break
    trace = causal_trace(world_gpt2, request, samples=2, kinds=["hidden"]).traces[0]
    assert trace.answer.strip() == request.ground_truth[0]
    prompt = world_gpt2.tokenizer(request.filled_prompt, return_tensors="pt").input_ids
    full = torch.cat([prompt, torch.tensor([ids])], dim=1)
    with torch.no_grad():
        log_probs = world_gpt2(input_ids=full).logits[0].log_softmax(-1)
    joint = sum(float(log_probs[prompt.shape[1] - 1 + i, t]) for i, t in enumerate(ids))
    assert trace.high == pytest.approx(math.exp(joint), rel=1e-4)
    assert len(trace.tokens) == prompt.shape[1]


def test_batches_seeds_and_aliases(world_gpt2: EditableModel) -> None:
    fact = {**PROMPT, "ground_truth": ["no such thing", "sculptor"]}
    settings = ((3, 1), (500, 1), (64, 2))
    one, other, seeded = (
        causal_trace(world_gpt2, fact, samples=3, batch_size=b, seed=s).traces[0] for b, s in settings
    )
    assert one.answer.strip() == "sculptor"
    for kind in one.scores:
        assert torch.allclose(one.scores[kind], other.scores[kind], atol=1e-5)
    assert one.low == pytest.approx(other.low, abs=1e-6) != pytest.approx(seeded.low, abs=1e-6)
    unknown = {**PROMPT, "ground_truth": ["plumber"]}
    assert causal_trace(world_gpt2, unknown, samples=1, known_only=False).traces[0].answer.strip() == "plumber"
    assert causal_trace(world_gpt2, unknown, samples=1).skipped


# ---------------------------------------------------------------------- reports


def fake_trace(tokens: int, subject: tuple[int, int], low: float, value: float) -> Trace:
    table = torch.full((tokens, 3), low)
    table[:, 1] += value * torch.arange(tokens)
    return Trace(Fact("p", "s", (0, 1)), ["t"] * tokens, subject, "a", 0.9, low, {"hidden": table})


def fake_report(*traces: Trace) -> TraceReport:
    return TraceReport(list(traces), [], ("hidden",), 1, 1, 0.1, 1, "m", 3)


def test_the_last_token_of_the_subject_alone(world_gpt2: EditableModel) -> None:
    """The same row of the table as when all tokens are traced, and nothing where nothing was restored."""
    (whole,) = causal_trace(world_gpt2, PROMPT, samples=3).traces
    (part,) = causal_trace(world_gpt2, PROMPT, samples=3, last_subject_only=True).traces
    last = whole.subject_range[1] - 1
    for kind, table in whole.scores.items():
        torch.testing.assert_close(part.scores[kind][last], table[last])
        others = [i for i in range(len(whole.tokens)) if i != last]
        assert part.scores[kind][others].isnan().all()


def test_classes_of_tokens() -> None:
    assert fake_trace(8, (1, 5), 0, 0).classes == [
        None,
        "first subject",
        "middle subject",
        "middle subject",
        "last subject",
        "first after",
        "further",
        "last",
    ]
    assert fake_trace(3, (1, 2), 0, 0).classes == [None, "last subject", "last"]
    assert fake_trace(2, (0, 2), 0, 0).classes == ["first subject", "last subject"]


def test_averages_pool_the_tokens_of_a_class() -> None:
    report = fake_report(fake_trace(8, (1, 5), 0.1, 0.01), fake_trace(3, (1, 2), 0.2, 0.1))
    curves = report.average()["hidden"]
    assert curves["middle subject"].count == 2 and curves["first subject"].count == 1
    assert torch.allclose(curves["middle subject"].mean, torch.tensor([0.0, 0.025, 0.0]), atol=1e-6)
    both = torch.tensor([0.04, 0.1])
    last = curves["last subject"]
    assert float(last.mean[1]) == pytest.approx(float(both.mean()), abs=1e-6)
    assert float(last.band[1]) == pytest.approx(1.96 * float(both.std()) / 2**0.5, abs=1e-6)
    assert bool(curves["first subject"].band.isnan().all())
    assert report.total_effect == pytest.approx(0.75)


def test_reports_are_saved_as_json(tmp_path: Path) -> None:
    report = fake_report(fake_trace(8, (1, 5), 0.1, 0.01))
    data = json.loads(report.save(tmp_path / "new" / "trace.json").read_text())
    assert data == report.to_dict()
    assert data["average"]["hidden"]["first subject"]["band"] == [None] * 3
    assert torch.allclose(torch.tensor(data["traces"][0]["scores"]["hidden"]), report.traces[0].scores["hidden"])


def test_windows() -> None:
    assert [list(window_layers(i, 3, 6)) for i in (0, 2, 5)] == [[0, 1], [1, 2, 3], [4, 5]]
    assert [list(window_layers(i, 10, 48)) for i in (0, 17)] == [[0, 1, 2, 3, 4], list(range(12, 22))]
    assert [default_window(n) for n in (1, 6, 12, 28, 48)] == [1, 2, 4, 10, 10]


# ---------------------------------------------------------------------- bad input


def test_bad_input_is_refused(world_gpt2: EditableModel) -> None:
    with pytest.raises(ConfigError, match="hidden, mlp"):
        causal_trace(world_gpt2, PROMPT, kinds=["residual"])
    with pytest.raises(ConfigError, match="at least 1"):
        causal_trace(world_gpt2, PROMPT, samples=0)
    with pytest.raises(ConfigError, match="single fact"):
        causal_trace(world_gpt2, [PROMPT, PROMPT], noise=torch.zeros(1, 2, 128))
    with pytest.raises(ConfigError, match="tokenizer"):
        causal_trace(world_gpt2.base_model, PROMPT)
    with pytest.raises(SubjectNotFoundError):
        causal_trace(world_gpt2, {"prompt": "By profession he is a", "subject": "Nobody"})
    with pytest.raises(RequestError, match="subject"):
        causal_trace(world_gpt2, EditRequest(prompt="By profession he is a", target_new="plumber"))
    with pytest.raises(UnsupportedModelError, match="language model"):
        causal_trace(FAMILIES["blip2"](vocab_size=len(tokenizer())), PROMPT, tokenizer())
    with pytest.raises(RequestError, match="EditRequest or a dict"):
        causal_trace(world_gpt2, ["By profession he is a"])  # type: ignore[list-item]
