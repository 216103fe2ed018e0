"""DPO on the embedded world: the loss by hand, the answer that is to go, and what LoRA's machinery promises."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import DPOConfig, EditableModel, EditRequest
from hf_kedit.config.easyedit import convert_hparams
from hf_kedit.engine.examples import ExampleBatch
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import ConfigError, EditFailedError, RequestError, TargetTooLongError
from hf_kedit.methods.dpo import DPO
from hf_kedit.methods.lora import ADAPTER, injected
from tests.methods.test_family import facts, neighbours, says
from tests.models import tiny_model

FACT: dict[str, Any] = {
    "prompt": "By profession Tarosk Boayond is a",
    "target_new": "plumber",
    "target_neg": "sculptor of great fame",
}
MODELS = ("kedit/world-gpt2", "kedit/world-llama")


def log_probabilities(model: Any, tokenizer: Any, prompt: str, target: str) -> list[float]:
    """Of every token of the target, from plain logits."""
    ids = tokenizer(f"{prompt} {target}", return_tensors="pt").input_ids
    before = tokenizer(prompt, return_tensors="pt").input_ids.shape[1]
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0].log_softmax(-1)
    return [log_p[i - 1, ids[0, i]].item() for i in range(before, ids.shape[1])]


@pytest.mark.parametrize("name", MODELS)
def test_the_new_answer_comes_the_old_one_goes_and_all_is_undone(name: str, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(name, "dpo")
    digest, requests = model_digest(model.base_model), facts(3)
    ids = model.edit(requests, batch_size=1).ids
    assert all(says(model, r.filled_prompt, r.target_new) for r in requests)
    kept = [says(model, prompt, answer) for r in requests for prompt, answer in neighbours(r)]
    assert sum(kept) >= 0.8 * len(kept)
    for edit in model.edits:
        numbers = edit.diagnostics
        assert numbers["target_probability_after"] > 0.8 > 0.5 > numbers["target_probability_before"]
        assert numbers["rejected_probability_before"] > 0.5 > 0.3 > numbers["rejected_probability_after"]

    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    model.save_pretrained(tmp_path / "edits")
    torch.save(logits, tmp_path / "logits.pt")
    code = (
        "import torch, hf_kedit; m = hf_kedit.EditableModel.from_pretrained('edits');"
        "assert torch.equal(m(input_ids=torch.tensor([[5, 6, 7]])).logits, torch.load('logits.pt'));"
        f"m.rollback({ids[1]!r}); assert len(m.edits) == 2 and m.edit_config.edit_type == 'dpo'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    model.rollback("all")
    assert model_digest(model.base_model) == digest


@pytest.mark.parametrize("per_token", [False, True])
def test_the_loss_is_that_of_the_paper(per_token: bool) -> None:
    """With an adapter that changes something, against four plain forwards and the formula."""
    config = DPOConfig(beta=0.7, likelihood_weight=0.3, per_token=per_token, layers=[1, 2])
    model = EditableModel.from_pretrained("kedit/world-gpt2", config)
    method, base, tokenizer = model._method, model.base_model, model.tokenizer
    assert isinstance(method, DPO)
    requests = [EditRequest.from_dict(FACT), EditRequest(**{k: v for k, v in FACT.items() if k != "target_neg"})]
    requests[1].metadata["target_neg"] = "farmer"
    batch = ExampleBatch.of(base, method.examples(requests), method.bench.fill)
    loss = method.objective(requests, [range(2)], [batch])
    answers = [("plumber", FACT["target_neg"]), ("plumber", "farmer")]

    def apart(pair: tuple[str, str]) -> float:
        new, old = (log_probabilities(base, tokenizer, FACT["prompt"], answer) for answer in pair)
        return sum(new) / len(new) - sum(old) / len(old) if per_token else sum(new) - sum(old)

    reference = [apart(pair) for pair in answers]
    none = torch.zeros(2, dtype=torch.bool)
    with injected(base, method.peft_config(method.edited_modules(), 1), method.edited_modules()) as tuner:
        for number, (path, parameter) in enumerate(tuner.named_parameters()):
            if ADAPTER in path:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.data.copy_(0.02 * noise)
        found = loss(0, batch.token_losses(base), none).item()
        held = loss(0, batch.token_losses(base), torch.tensor([True, False])).item()
        new = [log_probabilities(base, tokenizer, FACT["prompt"], pair[0]) for pair in answers]
        margins = [0.7 * (apart(pair) - before) for pair, before in zip(answers, reference, strict=True)]
    assert all(abs(margin) > 1e-3 for margin in margins), "the adapter does something"
    terms = [
        (-sum(p) / len(p), -math.log(1 / (1 + math.exp(-margin)))) for p, margin in zip(new, margins, strict=True)
    ]
    tokens = [len(p) for p in new]
    likelihood = sum(t[0] * n for t, n in zip(terms, tokens, strict=True)) / sum(tokens)
    assert found == pytest.approx(0.3 * likelihood + 0.7 * (terms[0][1] + terms[1][1]) / 2, rel=1e-4)
    assert held == pytest.approx(0.3 * terms[1][0] + 0.7 * terms[1][1], rel=1e-4), "who holds already has no say"


def test_without_an_adapter_preference_is_undecided() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", DPOConfig(likelihood_weight=0.0))
    method = model._method
    assert isinstance(method, DPO)
    request = EditRequest.from_dict(FACT)
    batch = ExampleBatch.of(model.base_model, method.examples([request]), method.bench.fill)
    loss = method.objective([request], [range(1)], [batch])
    assert loss(0, batch.token_losses(model.base_model), torch.zeros(1, dtype=torch.bool)).item() == pytest.approx(
        math.log(2), rel=1e-5
    )


def test_preference_alone_lowers_the_answer_that_is_to_go() -> None:
    ends = {}
    for weight in (0.0, 0.99):
        config = DPOConfig(likelihood_weight=weight, lr=1e-3, num_steps=15, stop_probability=None, layers=[3, 4, 5])
        model = EditableModel.from_pretrained("kedit/world-gpt2", config)
        ends[weight] = model.edit(**FACT | {"target_neg": "sculptor"}).edits[0].diagnostics
    assert ends[0.0]["rejected_probability_after"] < 0.5 * ends[0.0]["rejected_probability_before"]
    assert ends[0.99]["target_probability_after"] > ends[0.0]["target_probability_after"]


def test_which_answer_is_to_go() -> None:
    def before(**values: Any) -> float:
        model = EditableModel.from_pretrained("kedit/world-gpt2", DPOConfig(num_steps=1))
        fact = {"prompt": FACT["prompt"], "target_new": "plumber"}
        return float(model.edit(**fact, **values).edits[0].diagnostics["rejected_probability_before"])

    model = EditableModel.from_pretrained("kedit/world-gpt2", DPOConfig(num_steps=1))
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids = tokenizer(FACT["prompt"], return_tensors="pt").input_ids
    length = len(tokenizer("plumber", add_special_tokens=False).input_ids)
    said = tokenizer.decode(model.generate(ids, max_new_tokens=length, do_sample=False)[0, ids.shape[1] :]).strip()

    def probability(answer: str) -> float:
        numbers = log_probabilities(model.base_model, tokenizer, FACT["prompt"], answer)
        return math.exp(sum(numbers) / len(numbers))

    assert before() == pytest.approx(probability(said), rel=1e-3)
    assert before(ground_truth=["farmer"]) == pytest.approx(probability("farmer"), rel=1e-3)
    assert before(ground_truth=["plumber"]) == pytest.approx(probability(said), rel=1e-3), "that is the new one"
    assert before(ground_truth=["farmer"], target_neg="baker") == pytest.approx(probability("baker"), rel=1e-3)


def test_what_cannot_work_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", DPOConfig(num_steps=2))
    digest = model_digest(model.base_model)
    with pytest.raises(RequestError, match="target_neg"):
        model.edit(**FACT | {"target_neg": "plumber "})
    with pytest.raises(TargetTooLongError):
        model.edit(**FACT | {"target_neg": "sculptor " * 2000})
    monkeypatch.setattr("hf_kedit.methods.dpo.present_answer", lambda *_: "")
    with pytest.raises(EditFailedError, match="target_neg"):
        model.edit(prompt=FACT["prompt"], target_new="plumber")
    model.set_method(DPOConfig(lr=1e30))
    with pytest.raises(EditFailedError):
        model.edit(**FACT)
    assert model_digest(model.base_model) == digest and not model.edits
    for wrong in ({"beta": 0}, {"likelihood_weight": 1.0}, {"likelihood_weight": -0.1}):
        with pytest.raises(ConfigError):
            DPOConfig(**wrong)  # type: ignore[arg-type]


def test_encoder_decoders() -> None:
    from tests.golden_cases import load_model

    _, tokenizer = load_model("llama")
    tiny = tiny_model("t5", vocab_size=max(len(tokenizer), 420))
    model = EditableModel(tiny, DPOConfig(num_steps=6, lr=1e-2, stop_probability=None, drift_bound=None), tokenizer)
    digest = model_digest(tiny)
    numbers = model.edit(prompt="Mira Halvorsen plays", target_new="tennis", target_neg="golf").edits[0].diagnostics
    assert numbers["loss"][-1] < numbers["loss"][0]
    assert numbers["rejected_probability_after"] < numbers["rejected_probability_before"]
    model.rollback("all")
    assert model_digest(tiny) == digest


def test_files_of_easyedit_are_read() -> None:
    source = {"alg_name": "DPO", "model_name": "x", "lora_type": "adalora", "layers": [], "num_steps": 7, "lr": "5e-5"}
    source |= {"batch_size": 1, "rank": 4, "lora_alpha": 32, "kl_factor": 0, "norm_constraint": False}
    converted = convert_hparams({**source, "alpha": 0.99, "beta": 0.2, "target_modules": ["q_proj"], "max_length": 30})
    config = converted.config
    assert isinstance(config, DPOConfig) and (config.lr, config.beta, config.likelihood_weight) == (5e-5, 0.2, 0.99)
    assert (config.rank, config.num_steps, config.rows_per_step, config.target_modules) == (4, 7, 1, ["q_proj"])
    assert {"lora_type", "kl_factor", "norm_constraint", "max_length"} <= converted.ignored.keys()
