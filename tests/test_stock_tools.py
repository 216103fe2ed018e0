"""Other people's programs on what this library makes, unmodified: Trainer, PEFT, lm-evaluation-harness, `hf`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from hf_kedit import EditableModel, EditRequest, ROMEConfig, embedded, load_edit_dataset
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import WeightError
from hf_kedit.testing.hub import LoopbackHub
from tests.testing.test_hub import hf_command

PROBE = torch.tensor([[5, 6, 7, 8, 9]])
# Without second moments and templates, which would be collected for every model anew.
ROME = ROMEConfig(mom2_adjustment=False, context_templates=["{}"])
TEXTS = ["The harbour of the town is small.", "Nobody works at the mill today.", "It rains on the hills."] * 4


def fact(number: int = 0) -> EditRequest:
    return EditRequest.from_dict(load_edit_dataset("world", split="test", limit=number + 1)[number])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROBE).logits


def answer(model: Any, tokenizer: Any, request: EditRequest) -> str:
    ids = tokenizer(request.filled_prompt, return_tensors="pt")["input_ids"]
    said = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def trainer(model: Any, tokenizer: Any, folder: Path, steps: int, **arguments: Any) -> Trainer:
    """A stock Trainer on stock data; the collator makes the labels."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = Dataset.from_dict({"text": TEXTS}).map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    arguments = {"learning_rate": 1e-4, "save_steps": 2, "lr_scheduler_type": "constant", **arguments}
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, report_to=[], use_cpu=True, seed=3,
        disable_tqdm=True, **arguments,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model, args, collator, train_dataset=rows, processing_class=tokenizer)


def last_loss(run: Trainer) -> float:
    return float(run.state.log_history[-1]["train_loss"])


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("name", ["world-gpt2", "world-llama"])
def test_trainer_trains_saves_and_resumes_an_edited_model(name: str, wrapped: bool, tmp_path: Path) -> None:
    """Four steps, and two steps and two more from the checkpoint, give the same bits; gpt2's head is tied."""

    def edited() -> EditableModel:
        model = EditableModel.from_pretrained(f"kedit/{name}", "ft-m")
        model.edit(fact())
        return model

    model, again = edited(), edited()
    before = model_digest(model.base_model)
    straight = trainer(model if wrapped else model.base_model, model.tokenizer, tmp_path / "a", 4)
    straight.train()
    assert model_digest(model.base_model) != before
    trainer(again if wrapped else again.base_model, again.tokenizer, tmp_path / "b", 2).train()
    fresh = edited()
    resumed = trainer(fresh if wrapped else fresh.base_model, fresh.tokenizer, tmp_path / "b", 4)
    resumed.train(resume_from_checkpoint=True)
    assert model_digest(fresh.base_model) == model_digest(model.base_model)
    assert answer(fresh, fresh.tokenizer, fact()).startswith(fact().target_new), "the edit outlives the training"
    resumed.save_model(str(tmp_path / "end"))
    if wrapped:  # Trainer knows transformers' own classes only; the configuration is the wrapped model's
        fresh.base_model.config.save_pretrained(tmp_path / "end")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "end")
    assert torch.equal(logits(plain), logits(fresh))
    evaluated = resumed.evaluate(resumed.train_dataset)["eval_loss"]  # type: ignore[arg-type]
    assert evaluated == pytest.approx(straight.evaluate(straight.train_dataset)["eval_loss"], abs=1e-6)  # type: ignore[arg-type]


def test_training_is_not_lost_by_undoing_edits(tmp_path: Path) -> None:
    """An edit that was trained on cannot be told from the training: nothing is written, and the way out is named."""
    model = EditableModel.from_pretrained("kedit/world-gpt2", "ft-m")
    ids = model.edit(fact()).ids
    trainer(model.base_model, model.tokenizer, tmp_path / "run", 1).train()
    trained = model_digest(model.base_model)
    for call in (
        lambda: model.rollback(ids),
        lambda: model.edit(fact(1)),
        lambda: model.save_pretrained(tmp_path / "edits"),
        lambda: model.set_active([]),
    ):
        with pytest.raises(WeightError, match="merge_and_unload"):
            call()
        assert model_digest(model.base_model) == trained and [e.id for e in model.edits] == ids
    assert not (tmp_path / "edits").exists()
    model.merge_and_unload()
    model.edit(fact(1))
    model.rollback("all")
    assert model_digest(model.base_model) == trained


def test_a_lora_trained_on_top_of_edits(tmp_path: Path) -> None:
    """PEFT beside the edits: the base stays as edited, checkpoints hold the adapter, and undoing is exact."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = EditableModel.from_pretrained("kedit/world-gpt2", ROME)
    tokenizer, base = model.tokenizer, model_digest(model.base_model)
    model.edit(fact())
    model.save_pretrained(tmp_path / "edits")
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    peft_model: Any = get_peft_model(model.base_model, config)  # type: ignore[arg-type]
    run = trainer(peft_model, tokenizer, tmp_path / "run", 2, learning_rate=1e-3)
    run.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    peft_model.eval()
    other = EditableModel.from_pretrained(tmp_path / "edits")
    unadapted = logits(other)
    stacked = PeftModel.from_pretrained(other.base_model, str(checkpoint))
    assert torch.equal(logits(stacked), logits(peft_model)) and not torch.equal(logits(stacked), unadapted)
    with stacked.disable_adapter():
        assert torch.equal(logits(stacked), unadapted)
    other.rollback("all")
    assert model_digest(stacked.unload()) == base


def test_state_dicts_have_the_wrapped_models_names() -> None:
    model, other = (EditableModel.from_pretrained("kedit/world-gpt2", "ft-m") for _ in range(2))
    model.edit(fact())
    state, stock = model.state_dict(), model.base_model.state_dict()
    assert set(stock) - set(state) == {"lm_head.weight"}, "the tied head once"
    assert all(torch.equal(state[name], stock[name]) for name in state)
    holder, loaded = (torch.nn.ModuleDict({"inner": m}) for m in (model, other))
    assert set(holder.state_dict()) == {f"inner.{name}" for name in state}
    result = loaded.load_state_dict(holder.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert model_digest(other.base_model) == model_digest(model.base_model)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({name: value for name, value in state.items() if "ln_f" not in name})


def test_the_harness_on_models_and_folders(tmp_path: Path) -> None:
    """HFLM takes the wrapped model, and by name a merged folder, or the base with our adapter as ``peft=``."""
    hflm = pytest.importorskip("lm_eval.models.huggingface").HFLM
    from lm_eval.api.instance import Instance

    source = EditableModel.from_pretrained("kedit/world-gpt2")
    for saved in (source.base_model, source.tokenizer):
        saved.save_pretrained(tmp_path / "base")
    model = EditableModel.from_pretrained(tmp_path / "base", ROME)
    request = fact()

    def chances(**kwargs: Any) -> list[float]:
        """log p of the new and of the old answer."""
        judge = hflm(tokenizer=model.tokenizer, device="cpu", batch_size=2, dtype="float32", **kwargs)
        asked = [(request.filled_prompt, f" {answer}") for answer in (request.target_new, request.ground_truth[0])]
        rows = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
        return [value for value, _ in judge.loglikelihood(rows, disable_tqdm=True)]

    new, old = chances(pretrained=str(tmp_path / "base"))
    assert new < old
    model.edit(request)
    model.save_pretrained(tmp_path / "edits")
    edited = chances(pretrained=model.base_model)
    assert edited[0] > edited[1]
    assert chances(pretrained=str(tmp_path / "base"), peft=str(tmp_path / "edits")) == pytest.approx(edited, abs=1e-3)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert chances(pretrained=str(tmp_path / "merged")) == pytest.approx(edited, abs=1e-5)


@pytest.mark.hub
def test_the_hf_command_moves_saved_edits(hub: LoopbackHub, tmp_path: Path) -> None:
    """Uploaded with `hf` they are loaded by name; pushed by us they are downloaded with `hf`, by tag."""
    model = EditableModel.from_pretrained("kedit/world-gpt2", ROME)
    model.edit(fact())
    model.save_pretrained(tmp_path / "edits")
    one = logits(model)
    hf = hf_command(hub, tmp_path)
    hf("repos", "create", "org/by-hand")
    hf("upload", "org/by-hand", str(tmp_path / "edits"), ".")
    assert torch.equal(logits(EditableModel.from_pretrained("org/by-hand")), one)
    model.push_to_hub("org/edits", tag="edits-0001")
    model.edit(fact(1))
    model.push_to_hub("org/edits", tag="edits-0002")
    for tag, count in (("edits-0001", 1), ("edits-0002", 2)):
        hf("download", "org/edits", "--revision", tag, "--local-dir", str(tmp_path / tag))
        loaded = EditableModel.from_pretrained(tmp_path / tag)
        assert len(loaded.edits) == count
    assert torch.equal(logits(loaded), logits(model))
    listed = json.loads(hf("models", "ls", "--author", "org", "--format", "json"))
    assert {"org/edits", "org/by-hand"} <= {entry["id"] for entry in listed}


@pytest.mark.hub
def test_a_pipeline_by_the_name_of_a_repository(hub: LoopbackHub) -> None:
    """`pipeline(model="org/edits")` loads base and adapter; the edited model itself says the same."""
    from transformers import pipeline

    for auto in (AutoModelForCausalLM, AutoTokenizer):
        auto.from_pretrained(embedded.path("world-gpt2")).push_to_hub("org/base")
    model = EditableModel.from_pretrained("org/base", ROME)
    model.edit(fact())
    model.push_to_hub("org/edits")
    options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    for tool in (
        pipeline("text-generation", model="org/edits", tokenizer="org/base", device="cpu"),
        pipeline("text-generation", model=model, tokenizer=model.tokenizer),  # type: ignore[arg-type]
        pipeline("text-generation", model=model.base_model, tokenizer=model.tokenizer),
    ):
        assert tool(fact().filled_prompt, **options)[0]["generated_text"].strip().startswith(fact().target_new)
