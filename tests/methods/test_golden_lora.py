"""LoRA against the reference on tiny models, from the same start: losses, factors, logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest
from hf_kedit.methods import lora
from hf_kedit.methods.lora import LoRAConfig
from tests.golden_cases import Case

START = "base_model.model."


@pytest.mark.golden
@pytest.mark.parametrize("name", ["lora_gpt2", "lora_llama"])
def test_lora_matches_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(name)
    h: dict[str, Any] = case.spec["hyperparameters"]
    model, tokenizer = case.load()
    final: dict[str, torch.Tensor] = {}
    plain = lora.injected

    @contextlib.contextmanager
    def from_the_same_start(model: Any, config: Any, paths: Sequence[str]) -> Iterator[Any]:
        with plain(model, config, paths) as tuner:
            parameters = {n: p for n, p in model.named_parameters() if ".lora_" in n}
            assert len(parameters) == sum(k.startswith("init/") for k in case.expected)
            for key, parameter in parameters.items():
                golden = f"init/{START}{key}".replace(f".{lora.ADAPTER}.", ".default.")
                parameter.data.copy_(case.expected[golden])
            yield tuner
            final.update({k: p.detach().clone() for k, p in parameters.items()})

    monkeypatch.setattr(lora, "injected", from_the_same_start)
    config = LoRAConfig(
        target_modules=h["target_modules"],
        rank=h["rank"],
        lora_alpha=h["lora_alpha"],
        lora_dropout=h["lora_dropout"],
        num_steps=h["num_steps"],
        lr=h["lr"],
        weight_decay=h["weight_decay"],
        rows_per_step=h["batch_size"],
        stop_probability=None,
        drift_bound=None,
        layers=None,
    )
    editable = EditableModel(model, config, tokenizer)
    editable.trace = {}
    requests = [EditRequest(**r) for r in case.spec["requests"]]
    editable.edit(requests)
    case.within("batch_losses", editable.trace["batch_losses"])
    for key, value in final.items():
        case.within(f"final/{START}{key}".replace(f".{lora.ADAPTER}.", ".default."), value)
    for i, request in enumerate(requests):
        ids = tokenizer(request.prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            case.within(f"post_edit/{i}/prompt_last_logits", editable(input_ids=ids).logits[0, -1])
