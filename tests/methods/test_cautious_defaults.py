"""Edits of a model without an hparams file: they stop when the fact holds, and change little else."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from hf_kedit import AutoEditConfig, EditableModel, EditRequest, load_edit_dataset
from hf_kedit.config import BoundedConfig, EditConfig, ModelProfile, base, config_class
from hf_kedit.engine.weights import model_digest
from hf_kedit.tokens import encode_pair

UNKNOWN = ModelProfile("somebody/new-model", 30, 576)
REQUESTS = [EditRequest.from_dict(row) for row in load_edit_dataset("world", split="test", limit=4)]


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is one that no packaged file knows."""
    monkeypatch.setattr(base, "find_hparams", lambda method, name: None)


def log_probs(model: EditableModel, texts: list[str]) -> list[torch.Tensor]:
    """What the model says after every token of some texts, ``[tokens, vocab]`` each."""
    with torch.no_grad():
        return [
            model(input_ids=model.tokenizer(t, return_tensors="pt").input_ids[:, :12])
            .logits[0]
            .double()
            .log_softmax(-1)
            for t in texts
        ]


def drift(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """Mean divergence per token."""
    p, q = torch.cat(before), torch.cat(after)
    return float((p.exp() * (p - q)).sum(-1).mean())


def least_likely(model: EditableModel, request: EditRequest) -> float:
    """Probability of the least likely target token."""
    pair = encode_pair(model.tokenizer, request.filled_prompt, request.target_new)
    with torch.no_grad():
        said = model(input_ids=torch.tensor([pair.ids])).logits[0].softmax(-1)[pair.prompt_length - 1 : -1]
    return float(said.gather(1, torch.tensor(pair.target_ids)[:, None]).min())


@pytest.mark.parametrize("method", ["ft-m", "ft-l", "lora", "adalora", "calinet"])
def test_an_unknown_model_is_trained_within_bounds(method: str, unknown: None) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", method)
    config: Any = model.edit_config
    assert config.stop_probability and config.drift_bound
    texts = list(islice(model.statistics.corpus_texts(), 48))
    before, digest = log_probs(model, texts), model_digest(model.base_model)
    (edit,) = model.edit(REQUESTS[:1], show_progress=False).edits
    assert edit.diagnostics["steps"] < config.num_steps  # it stopped early …
    assert least_likely(model, REQUESTS[0]) > 0.5  # … because the fact holds
    moved = drift(before, log_probs(model, texts))
    assert 0 < moved <= 1.05 * config.drift_bound
    assert edit.diagnostics["drift"] == pytest.approx(moved, rel=0.05, abs=1e-5)
    model.rollback()
    assert model_digest(model.base_model) == digest


def test_an_edit_that_the_bound_stops_says_so(unknown: None, caplog: pytest.LogCaptureFixture) -> None:
    model = EditableModel.from_pretrained(
        "kedit/world-llama", AutoEditConfig.for_method("ft-m", drift_bound=1e-6, num_steps=10)
    )
    texts = list(islice(model.statistics.corpus_texts(), 48))
    before = log_probs(model, texts)
    with caplog.at_level("WARNING"):
        model.edit(REQUESTS[:1], show_progress=False)
    assert least_likely(model, REQUESTS[0]) < 0.5
    assert any("1 of 1 facts" in r.getMessage() and "drift_bound" in r.getMessage() for r in caplog.records)
    assert drift(before, log_probs(model, texts)) < 3e-6


def test_what_a_user_or_a_file_says_comes_first() -> None:
    lora: Any = config_class("lora")
    assert lora().complete(UNKNOWN).lr < 5e-3
    own = lora(lr=5e-3, num_steps=7, target_modules=["q_proj"], drift_bound=None).complete(UNKNOWN)
    assert (own.lr, own.num_steps, own.target_modules, own.layers, own.drift_bound) == (
        5e-3,
        7,
        ["q_proj"],
        None,
        None,
    )
    known = config_class("ft-m")().complete(ModelProfile("gpt2-xl", 48, 1600))
    assert isinstance(known, BoundedConfig) and known.drift_bound is None and known.stop_probability is None
    theirs: Any = EditConfig.from_easyedit({"alg_name": "LoRA", "model_name": "new-model", "lora_type": "lora"})
    assert theirs.complete(UNKNOWN).to_dict() == {**lora().to_dict(), "target_modules": ["attention"]}
    saved: Any = EditConfig.from_dict({"edit_type": "ft-m", "layers": [3], "lr": 1e-3}, saved=True)  # by 0.1.0
    assert saved.complete(UNKNOWN).drift_bound is None


def test_ultraedit_writes_a_single_fact_of_one_token(unknown: None) -> None:
    """As published, the first vector ever seen is standardised to zero."""
    model = EditableModel.from_pretrained("kedit/world-llama", "ultraedit")
    request = next(r for r in REQUESTS if r.subject)
    model.edit([request], show_progress=False)
    assert least_likely(model, request) > 0.5
