"""SERAC at inference: routing and answers of the reference, hard and soft, in batches and in generation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest, SERACConfig
from hf_kedit.books import counterfactuals, retrieval
from hf_kedit.books.retrieval import EmbeddingRetriever
from hf_kedit.errors import ConfigError, UnsupportedModelError
from tests.golden_cases import Case, load_model

SCOPE, READER = "toy-scope", "toy-counterfactual"


@pytest.fixture
def case() -> Iterator[Case]:
    """The golden case, with its scope encoder and its counterfactual model registered."""
    found = Case("serac_routing_gpt2")
    model, tokenizer = found.load()
    table = found.expected["classifier/embedding"]

    def encode(texts: Any) -> torch.Tensor:
        """The [CLS] stand-in: mean over the tokens; stored scopes end with the separator."""
        return torch.stack([table[torch.tensor(tokenizer(t)["input_ids"])].mean(dim=0) for t in texts])

    class WithSeparator(EmbeddingRetriever):
        def embed(self, texts: Any) -> torch.Tensor:
            stored = set(found.spec["routing"]["classifier_texts"])
            return super().embed([t + "</s>" if t + "</s>" in stored and self.storing else t for t in texts])

        storing = True

        def similarity(self, queries: Any, passages: Any, embedded: Any) -> torch.Tensor:
            self.storing = False
            try:
                return super().similarity(queries, passages, embedded)
            finally:
                self.storing = True

    retrieval.register_retriever(WithSeparator(encode, SCOPE, kernel="exp_square"))
    counterfactuals.register_counterfactual(READER, model)
    yield found
    del retrieval._REGISTERED[SCOPE], counterfactuals._REGISTERED[READER]


def editable(case: Case, **config: Any) -> EditableModel:
    model, tokenizer = case.load()
    found = EditableModel(model, SERACConfig(scope=SCOPE, counterfactual=READER, **config), tokenizer)
    found.edit([EditRequest(**r) for r in case.spec["requests"]])
    return found


@pytest.mark.golden
@pytest.mark.parametrize("soft", [False, True])
def test_routing_and_answers_match_the_reference(case: Case, soft: bool) -> None:
    model, routing = editable(case, soft=soft), case.spec["routing"]
    assert [e.diagnostics["counterfactual_model"] for e in model.edits] == [READER] * 2
    scores = model.prompts.similarities(routing["queries"])
    case.within("log_similarity", scores.log())
    case.within("similarity", scores.amax(dim=1))
    for i, found in enumerate(model.prompts.choose(routing["queries"])):
        assert (found is not None) == (soft or routing["in_scope"][i])
        if found is not None:
            assert found[0].edit_id == model.edits[routing["selected_edit"][i]].id
            (prefix,) = model.prompts.route([routing["queries"][i]])
            row, own = model.prompts.prompter.writer.with_prefix(routing["query_ids"][i], prefix, model.base_model, 0)
            assert row == routing["counterfactual_ids"][i] and len(own) == len(routing["query_ids"][i])
    with torch.no_grad():
        last = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in routing["query_ids"]])
        with model.disable_edits():
            base = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in routing["query_ids"]])
    case.within("base_logits_last", base)
    case.within(f"{'soft' if soft else 'hard'}/output_last", last)
    assert soft or torch.equal(last[2], base[2]), "out of scope, bit for bit"


def test_another_model_answers_in_scope_and_only_there(case: Case) -> None:
    """Sub-batches in forward and generation: rows of a batch are the rows alone."""
    other = copy.deepcopy(counterfactuals._REGISTERED[READER])
    with torch.no_grad():
        other.transformer.ln_f.weight.mul_(torch.linspace(-1, 2, 64))
    counterfactuals._REGISTERED[READER] = other
    model = editable(case)
    model.tokenizer.padding_side = "left"
    texts = case.spec["routing"]["queries"]
    batch = model.tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
    width = batch["input_ids"].shape[1]
    assert torch.equal(together[:, :width], batch["input_ids"])
    for i, text in enumerate(texts):
        in_scope = case.spec["routing"]["in_scope"][i]
        ids = case.spec["routing"]["counterfactual_ids"][i] if in_scope else model.tokenizer(text)["input_ids"]
        who = other if in_scope else model.base_model
        with model.disable_edits():
            alone = who.generate(
                torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert torch.equal(together[i, width:], alone[0, len(ids) :])
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(**batch, position_ids=positions).logits
        for i, text in enumerate(texts):
            alone = model(**model.tokenizer(text, return_tensors="pt")).logits[0]
            assert torch.allclose(logits[i][batch["attention_mask"][i].bool()], alone, atol=1e-4)


@pytest.mark.parametrize("soft", [False, True])
def test_a_reader_of_another_number_format(case: Case, soft: bool) -> None:
    """Answers come in the edited model's format, whatever else is in the batch."""
    counterfactuals._REGISTERED[READER] = copy.deepcopy(counterfactuals._REGISTERED[READER])
    model = editable(case, soft=soft)
    model.base_model.to(torch.bfloat16)
    batch = model.tokenizer(case.spec["routing"]["queries"], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**batch).logits
        alone = model(**model.tokenizer(case.spec["routing"]["queries"][0], return_tensors="pt")).logits[0]
    assert logits.dtype == alone.dtype == torch.bfloat16
    own = logits[0][batch["attention_mask"][0].bool()].float()
    assert torch.allclose(own, alone.float(), atol=0.05)


def test_without_models_of_its_own_the_base_answers() -> None:
    model, tokenizer = load_model("llama")
    found = EditableModel(model, "serac", tokenizer)
    ids = found.edit(prompt="The mother tongue of {} is", subject="Mira Halvorsen", target_new="Polish").ids
    assert found.edits[0].diagnostics["scope_classifier"] == "lexical"
    query = "Mira Halvorsen grew up speaking"
    own = tokenizer(query, return_tensors="pt")
    assert found.build_prompt(query) == f"The mother tongue of Mira Halvorsen is Polish {query}"
    row, _ = found.prompts.prompter.writer.with_prefix(
        own["input_ids"][0].tolist(), found.prompts.route([query])[0], model, 0
    )
    assert tokenizer.decode(row, skip_special_tokens=True).split() == found.build_prompt(query).split()
    with torch.no_grad():
        through = found(**own).logits[0, -1]
        with found.disable_edits():
            assert torch.allclose(through, found(input_ids=torch.tensor([row])).logits[0, -1], atol=1e-4)
        found.rollback(ids)
        assert not torch.allclose(found(**own).logits[0, -1], through, atol=1e-2)


def test_what_cannot_work_is_said(case: Case) -> None:
    soft = editable(case, soft=True)
    with pytest.raises(UnsupportedModelError, match="soft"):
        soft.generate(torch.tensor([case.spec["routing"]["query_ids"][0]]), max_new_tokens=2)
    counterfactuals.register_counterfactual(
        "other-tokens", EditableModel.from_pretrained("kedit/world-gpt2").base_model
    )
    soft.set_method(SERACConfig(counterfactual="other-tokens"))
    with pytest.raises(UnsupportedModelError, match="share a tokenizer"):
        soft.edit(prompt="a b", target_new="c")
    with pytest.raises(ConfigError, match="threshold"):
        SERACConfig(threshold=0)
    with pytest.raises(ConfigError, match="base"):
        counterfactuals.register_counterfactual("base", soft)
    del counterfactuals._REGISTERED["other-tokens"]
