"""GRACE against the original implementation on tiny models: codebook, gradients, values, logits, greedy tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest
from hf_kedit.methods.grace import GRACEConfig
from hf_kedit.methods.grace_codebook import Codebook
from tests.golden_cases import Case
from tests.methods.at_sites import state_at_key

pytestmark = pytest.mark.golden


@pytest.mark.parametrize("name", ["grace_gpt2", "grace_llama"])
def test_grace_matches_the_reference(name: str) -> None:
    case = Case(name)
    h: dict[str, Any] = case.spec["hyperparameters"]
    model, tokenizer = case.load()
    path = h["inner_params"][0].removesuffix(".weight")
    layer = int(next(p for p in path.split(".") if p.isdigit()))
    config = GRACEConfig(
        layers=[layer], module=path, num_steps=h["n_iter"], lr=h["edit_lr"], eps=h["eps"], stop_probability=None
    )
    editable = EditableModel(model, config, tokenizer)
    actions = {"init": "add", "keep": "expand"}
    for number, (request, log) in enumerate(zip(case.spec["requests"], case.spec["edits"], strict=True)):
        given = case.expected.get(f"edit{number}/init_value")
        if given is not None:  # random in the reference
            editable._method.initial_value = lambda *_, given=given: given  # type: ignore[attr-defined]
        editable.trace = trace = {}
        edit = editable.edit(EditRequest(**request)).edits[0]
        (book,) = editable.sites.memories.values()
        assert isinstance(book, Codebook)
        assert edit.diagnostics["action"] == actions.get(log["action"], log["action"])
        assert len(book.entries) == log["n_keys"]
        radii = book.table(torch.device("cpu"))[0]
        found = {
            **trace,
            "keys": book.keys.tensor,
            "values": torch.stack([book.value_of(k) for k in range(len(book.entries))]),
            "epsilons": radii,
        }
        for what in ("query", "losses", "value_grad_step0", "value_after_step0", "value_after_step2", *found):
            if f"edit{number}/{what}" in case.expected:
                case.within(f"edit{number}/{what}", found[what])
    for number, query in enumerate(case.spec["queries"]):
        ids = torch.tensor([query["prompt_ids"]])
        distance = torch.cdist(state_at_key(editable, path, ids, "input")[None], book.keys.tensor)[0]
        case.within(f"query{number}/distances", distance)
        with torch.no_grad():
            for mode in ("replace_last", "replace_all", "replace_prompt"):
                book.replacement = mode  # type: ignore[assignment]
                case.within(f"query{number}/logits_{mode}", model(ids).logits[0, -1])
            book.replacement = "replace_last"
            with editable.disable_edits():
                case.within(f"query{number}/unedited_logits", model(ids).logits[0, -1])
        for cached in (True, False):
            out = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cached, eos_token_id=None)
            assert out[0, ids.shape[1] :].tolist() == query["greedy_5_tokens"]
