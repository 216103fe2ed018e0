"""transformers, peft, datasets and evaluate against the loopback Hub, unmodified."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi

from hf_kedit import embedded
from hf_kedit.testing.hub import LoopbackHub
from tests.models import tiny_model

pytestmark = pytest.mark.hub
PROBE = torch.tensor([[5, 6, 7, 8]])
METRIC = '''
"""Share of equal pairs."""
import datasets
import evaluate


class Share(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="equal pairs", citation="", features=features)

    def _compute(self, predictions, references):
        return {"share": sum(p == r for p, r in zip(predictions, references)) / len(references)}
'''


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROBE).logits


def test_a_sharded_model_and_its_tokenizer(hub: LoopbackHub) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(embedded.path("world-gpt2"))
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.push_to_hub("org/base", max_shard_size="100KB")
    tokenizer.push_to_hub("org/base")
    assert len([f for f in HfApi().list_repo_files("org/base") if f.endswith(".safetensors")]) > 1
    again = AutoModelForCausalLM.from_pretrained("org/base")
    assert torch.equal(logits(again), logits(model))
    said = pipeline("text-generation", model="org/base", max_new_tokens=2, do_sample=False)("The")
    assert said[0]["generated_text"].startswith("The")


def test_a_peft_adapter(hub: LoopbackHub) -> None:
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    tiny_model("llama").push_to_hub("org/base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained("org/base"), config)
        model.push_to_hub("org/adapter")
        expected = logits(model)
        for loaded in (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/base"), "org/adapter"),
            AutoPeftModelForCausalLM.from_pretrained("org/adapter"),
            AutoModelForCausalLM.from_pretrained("org/adapter"),
        ):
            torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)


def test_datasets(hub: LoopbackHub) -> None:
    from datasets import Dataset, load_dataset

    Dataset.from_dict({"n": list(range(50)), "t": [f"row {i}" for i in range(50)]}).push_to_hub("org/rows")
    HfApi().create_tag("org/rows", tag="v1", repo_type="dataset")
    assert load_dataset("org/rows", split="train")["n"] == list(range(50))
    assert next(iter(load_dataset("org/rows", split="train", streaming=True, revision="v1")))["t"] == "row 0"
    assert len(load_dataset("org/rows", data_files="data/*.parquet", split="train[:10]")) == 10


def test_a_metric(hub: LoopbackHub, tmp_path: Path) -> None:
    import evaluate

    HfApi().create_repo("org/share", repo_type="space", space_sdk="gradio")
    (tmp_path / "share.py").write_text(METRIC)
    HfApi().upload_folder(repo_id="org/share", repo_type="space", folder_path=tmp_path)
    found = evaluate.load("org/share").compute(predictions=["a", "b"], references=["a", "c"])
    assert found == {"share": 0.5}
