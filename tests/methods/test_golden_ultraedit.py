"""UltraEdit against the authors' code on tiny models: keys, gradients, statistics, updates; and its lifelong state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest
from hf_kedit.engine.examples import encode_examples
from hf_kedit.errors import ConfigError, LayerError, UnsupportedModelError
from hf_kedit.methods.ultraedit import RunningScale, UltraEditConfig, ridge_inputs
from tests.golden_cases import Case, load_model

CASES = ["ultraedit_gpt2", "ultraedit_llama", "ultraedit_llama_all_tokens"]


def target_logprobs(model: EditableModel, request: EditRequest) -> torch.Tensor:
    ids = model.tokenizer(f"{request.prompt} {request.target_new}", return_tensors="pt").input_ids
    start = model.tokenizer(request.prompt, return_tensors="pt").input_ids.shape[1]
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
    return torch.stack([log_probs[i - 1, ids[0, i]] for i in range(start, ids.shape[1])])


def case_model(case: Case) -> EditableModel:
    h = case.spec["hyperparameters"]
    model, tokenizer = case.load()
    published = UltraEditConfig.published() | {
        "lr": h["lr"], "token": h["token"], "rows_per_step": h["batch_size"], "edit_modules": h["edit_modules"]
    }  # fmt: skip
    return EditableModel(model, UltraEditConfig(**published), tokenizer)


def turns_of(case: Case) -> list[list[EditRequest]]:
    return [[EditRequest(**request) for request in turn] for turn in case.spec["requests"]]


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_ultraedit_matches_the_reference(name: str) -> None:
    case = Case(name)
    editable, turns = case_model(case), turns_of(case)
    model = editable.base_model
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    found: dict[str, torch.Tensor] = {}

    def score(label: str) -> None:
        for t, turn in enumerate(turns):
            for i, request in enumerate(turn):
                found[f"{label}/turn{t}_edit{i}/target_logprobs"] = target_logprobs(editable, request)

    score("before")
    for t, turn in enumerate(turns):
        editable.trace = {}
        editable.edit(turn)
        found |= {f"turn{t}/{key}": value for key, value in editable.trace.items()}
        for (d_in, d_out), scales in editable._method._scales.items():  # type: ignore[attr-defined]
            prefix = f"turn{t}/normalizer({d_in}, {d_out})"
            found[f"{prefix}/n"] = torch.tensor([scales.count])
            found[f"{prefix}/mean"], found[f"{prefix}/std"] = scales.mean, scales.std
            found[f"{prefix}/var"] = scales.spread
    score("final")
    for module in case.spec["hyperparameters"]["edit_modules"]:
        found[f"final/{module}/weight_delta"] = model.get_parameter(f"{module}.weight") - start[f"{module}.weight"]
    for key in case.expected:
        case.within(key, found[key])
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert changed == {f"{m}.weight" for m in case.spec["hyperparameters"]["edit_modules"]}


@pytest.mark.golden
@pytest.mark.parametrize("name", ["ultraedit_gpt2", "ultraedit_llama"])
def test_rows_are_tokenised_as_the_reference_did(name: str) -> None:
    case = Case(name)
    editable = case_model(case)
    for turn, batches in zip(turns_of(case), case.spec["batches"], strict=True):
        examples = encode_examples(editable.base_model, editable.tokenizer, turn)
        examples.sort(key=lambda e: -len(e.ids))
        rows = [(i, m, y) for b in batches for i, m, y in zip(*(b[k] for k in BATCH), strict=True)]
        for example, (ids, mask, labels) in zip(examples, rows, strict=True):
            assert list(example.ids) == ids[: sum(mask)]
            assert list(example.targets) == [y for y in labels if y != -100]
            assert list(example.positions) == [i for i, y in enumerate(labels) if y != -100]


BATCH = ("input_ids", "attention_mask", "labels")

# ---------------------------------------------------------------------- state


@pytest.mark.golden
def test_statistics_go_on_where_they_were() -> None:
    """Two turns in one life equal a turn, a new method with the old one's state, and another turn."""
    case = Case("ultraedit_gpt2")
    first, second = turns_of(case)
    whole, broken, reset = (case_model(case) for _ in range(3))
    for model in (whole, broken, reset):
        model.edit(first)
    state = broken._method.state_dict()  # type: ignore[attr-defined]
    assert all(isinstance(t, torch.Tensor) for t in state.values()) and state
    for model in (broken, reset):
        model.set_method(UltraEditConfig(**{k: v for k, v in model.edit_config.to_dict().items() if k != "edit_type"}))
        model._method.load_state_dict({})  # type: ignore[attr-defined]
    broken._method.load_state_dict(state)  # type: ignore[attr-defined]
    for model in (whole, broken, reset):
        model.edit(second)
    assert whole.fingerprint() == broken.fingerprint() != reset.fingerprint()


def test_foreign_state_is_refused() -> None:
    model, tokenizer = load_model("gpt2")
    method = EditableModel(model, "ultraedit", tokenizer)._method
    good = {
        "normaliser.3x2.count": torch.tensor([2.0]),
        "normaliser.3x2.mean": torch.zeros(5),
        "normaliser.3x2.spread": torch.ones(5),
    }
    method.load_state_dict(good)  # type: ignore[attr-defined]
    assert set(method.state_dict()) == set(good)  # type: ignore[attr-defined]
    for bad in ({"cache.3": torch.zeros(3)}, {**good, "normaliser.3x2.mean": torch.zeros(4)}):
        with pytest.raises(ConfigError, match="running statistics"):
            method.load_state_dict(bad)  # type: ignore[attr-defined]
    assert set(method.state_dict()) == set(good)  # type: ignore[attr-defined]


def test_running_scales_of_one_row_are_finite() -> None:
    scales = RunningScale.empty(3).add(torch.tensor([[1.0, 2.0, 3.0]]))
    assert torch.equal(scales.standardise(torch.tensor([[1.0, 2.0, 3.0]])), torch.zeros(1, 3))
    more = scales.add(torch.tensor([[3.0, 2.0, 1.0]]))
    assert torch.allclose(more.mean, torch.full((3,), 2.0))
    assert torch.allclose(more.std, torch.tensor([2.0, 0, 2]) ** 0.5)


def test_running_scales_approach_those_of_all_rows() -> None:
    rows = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 3, 4]) + 5
    scales = RunningScale.empty(4)
    for chunk in rows.split(40):
        scales = scales.add(chunk)
    assert torch.allclose(scales.mean, rows.mean(0), rtol=1e-4)
    assert torch.allclose(scales.std, rows.std(0), rtol=0.03) and bool((scales.std >= rows.std(0)).all())


# ---------------------------------------------------------------------- edits


@pytest.mark.parametrize("n", [3, 12])
def test_both_sides_of_the_ridge_solve(n: int) -> None:
    keys = torch.randn(n, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.linalg.solve(keys.T @ keys + torch.eye(7).double(), keys.T @ values)
    assert torch.allclose(ridge_inputs(keys).double() @ values, expected, atol=1e-6)


@pytest.mark.golden
def test_single_edits_of_a_turn_can_be_taken_back() -> None:
    case = Case("ultraedit_llama")
    editable = case_model(case)
    start = {n: p.detach().clone() for n, p in editable.base_model.named_parameters()}
    ids = editable.edit(turns_of(case)[0]).ids
    path = case.spec["hyperparameters"]["edit_modules"][0]
    pieces = editable.ledger.accounts[f"{path}.weight"].pieces[0]
    assert pieces.columns is not None and set(pieces.columns) == set(ids)
    counts = {i: pieces.columns.count(i) for i in ids}
    assert [counts[i] for i in ids] == [3, 3, 3, 3]
    editable.rollback(ids[0])
    left = editable.ledger.accounts[f"{path}.weight"].pieces[0]
    assert set(left.columns or ()) == set(ids[1:])
    editable.rollback()
    assert all(torch.equal(p, start[n]) for n, p in editable.base_model.named_parameters())


def test_module_names() -> None:
    model, tokenizer = load_model("llama")

    def modules(**values: Any) -> list[str]:
        return EditableModel(model, UltraEditConfig(**values), tokenizer)._method.edited_modules()

    mlp = "model.layers.{}.mlp.{}_proj".format
    assert modules() == [mlp(4, "down")]
    assert modules(layers=[1, -1]) == [mlp(1, "down"), mlp(5, "down")]
    assert modules(edit_modules=["gate.{1-2}", "up.{3}"]) == [mlp(1, "gate"), mlp(2, "gate"), mlp(3, "up")]
    assert modules(edit_modules=["model.layers.{1-2}.mlp.up_proj"]) == [mlp(1, "up"), mlp(2, "up")]
    assert modules(edit_modules=["model.layers.{}.mlp.up_proj", "gate"], layers=[0]) == [mlp(0, "up"), mlp(0, "gate")]
    assert modules(edit_modules=[mlp(2, "down"), "down.{2}"]) == [mlp(2, "down")]


def test_bad_input_is_refused() -> None:
    for values in (
        {"lr": 0},
        {"edit_modules": []},
        {"edit_modules": ["down.{3-1}"]},
        {"edit_modules": ["down.{a}"]},
        {"edit_modules": ["down.{1}"], "layers": [2]},
    ):
        with pytest.raises(ConfigError):
            UltraEditConfig(**values)  # type: ignore[arg-type]
    model, tokenizer = load_model("gpt2")
    with pytest.raises(ConfigError, match="set `layers`"):
        EditableModel(model, UltraEditConfig(edit_modules=["down"]), tokenizer)
    request = EditRequest(prompt="The mother tongue of Mira is", target_new="Polish")
    for modules, error in (
        (["down.{6}"], LayerError),
        (["gate.{1}"], UnsupportedModelError),
        (["transformer.h.1.mlp"], UnsupportedModelError),
        (["transformer.h.1.mlp.c_prj"], LayerError),
    ):
        with pytest.raises(error):
            EditableModel(model, UltraEditConfig(edit_modules=modules), tokenizer).edit(request)
