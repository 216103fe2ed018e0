"""SERAC's training losses and the answers of its two networks against the recorded numbers of the authors' trainer."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from hf_kedit import EditableModel, EditRequest, SERACConfig
from hf_kedit.books import counterfactuals, retrieval
from hf_kedit.methods.serac import SERACEditor
from hf_kedit.methods.serac_networks import TrainedScope
from tests.golden_cases import Case

pytestmark = pytest.mark.golden
NAME = "recorded-serac"


class TableEncoder(torch.nn.Module):
    """The toy encoder of the case: a row of a table per token; the classifier takes the mean."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = torch.nn.Parameter(table.clone())
        self.config = type("Sizes", (), {"max_position_embeddings": 512})()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        return type("Out", (), {"last_hidden_state": self.table[input_ids]})()


@pytest.fixture(scope="module")
def case() -> Case:
    return Case("serac_training_t5")


@pytest.fixture
def editor(case: Case) -> SERACEditor:
    return recorded_editor(case)


def recorded_editor(case: Case, **fields: object) -> SERACEditor:
    """The editor of the case: labels have a blank in front, and another one separates them from what is before."""
    base, tokenizer = case.load()
    config = SERACConfig(scope_text="{prompt}</s> {target}</s>", separator="  ", **fields)  # type: ignore[arg-type]
    editor = SERACEditor.for_model(base, config)
    editor.scope.encoder = TableEncoder(case.expected["classifier.embedding"])
    editor.reader = copy.deepcopy(base)
    editor.use_tokenizer(tokenizer)
    return editor


def triples(case: Case) -> tuple[list[EditRequest], list[EditRequest], list[EditRequest]]:
    rows = case.spec["requests"]
    return (
        [EditRequest(prompt=r["prompt"], target_new=r["target_new"]) for r in rows],
        [EditRequest(prompt=r["rephrase_prompt"], target_new=r["target_new"]) for r in rows],
        [EditRequest(prompt=r["locality_prompt"], target_new=r["locality_ground_truth"]) for r in rows],
    )


def near(case: Case, name: str, actual: torch.Tensor) -> None:
    expected = case.expected[name]
    if expected.numel() == 1:
        limit = case.spec["tolerances"]["scalar_loss_abs"]
    else:
        limit = case.spec["tolerances"]["tensor_max_abs_error_relative_to_max_abs"] * float(expected.abs().max())
    actual = actual.detach().float().reshape(expected.shape)
    assert float((actual - expected).abs().max()) <= limit, (name, float((actual - expected).abs().max()), limit)


def test_similarities(case: Case, editor: SERACEditor) -> None:
    edits, outer, loc = triples(case)
    assert editor.tokenizer is not None
    stored = editor.tokenizer([editor.scope_text(r) for r in edits])
    for name, requests in (("edit_outer", outer), ("loc", loc)):
        scores = editor.scope.log_similarity(editor.tokenizer([r.prompt for r in requests]), stored)
        near(case, f"log_similarity.{name}", scores)
        assert scores.argmax(dim=1).tolist() == case.expected[f"best_index.{name}"].tolist()


@pytest.mark.parametrize("all_negatives", [False, True])
def test_losses_and_gradients(case: Case, all_negatives: bool) -> None:
    editor = recorded_editor(case, all_negatives=all_negatives).train()
    _, tokenizer = case.load()
    suffix = ".all_negatives" if all_negatives else ""
    batches = editor.batches(editor.base, tokenizer, *triples(case))
    labels = case.expected["input.edit_outer.labels"]  # recorded with a blank in front of the label
    batches["rephrase"]["labels"] = labels
    batches["rephrase"]["decoder_input_ids"] = editor.reader.prepare_decoder_input_ids_from_labels(labels)
    output = editor(**batches, groups=torch.arange(4))
    near(case, f"l_cls{suffix}", output.locality_loss)
    near(case, "l_cntr", output.edit_loss)
    near(case, f"l_total{suffix}", output.loss)
    output.loss.backward()
    encoder = editor.scope.encoder
    assert isinstance(encoder, TableEncoder) and encoder.table.grad is not None
    near(case, f"classifier.embedding.grad{suffix}", encoder.table.grad)
    grads = [p.grad.square().sum() for p in editor.reader.parameters() if p.grad is not None]
    near(case, "counterfactual.grad_norm", torch.stack(grads).sum().sqrt())
    assert all(p.grad is None for p in editor.base.parameters())


@pytest.fixture
def edited(case: Case, editor: SERACEditor) -> Iterator[EditableModel]:
    """The base model with the four edits, answered by the recorded networks."""
    base, tokenizer = case.load()
    assert editor.tokenizer is not None
    retrieval.register_retriever(TrainedScope(NAME, editor.scope, editor.tokenizer))
    counterfactuals.register_counterfactual(NAME, editor.reader)
    config = SERACConfig(scope=NAME, counterfactual=NAME, separator="  ")
    model = EditableModel(base, config, tokenizer)
    model.edit(triples(case)[0])
    texts = [editor.scope_text(r) for r in triples(case)[0]]
    book = model.prompts
    vectors = retrieval.find_retriever(NAME).embed(texts)  # stored with their labels, as recorded
    assert vectors is not None
    entries = [copy.copy(e) for e in book.entries]
    for entry, text, vector in zip(entries, texts, vectors, strict=True):
        object.__setattr__(entry, "scope", text)
        object.__setattr__(entry, "embedding", vector)
    book.entries = tuple(entries)
    yield model
    del retrieval._REGISTERED[NAME], counterfactuals._REGISTERED[NAME]


@pytest.mark.parametrize("which", ["edit_outer", "loc"])
def test_mixed_logits(case: Case, edited: EditableModel, which: str) -> None:
    """An encoder-decoder answers rows in scope with the counterfactual model and the others itself."""
    start = f"input.{which}."
    batch = {n.removeprefix(start): v for n, v in case.expected.items() if n.startswith(start)}
    with torch.no_grad():
        logits = edited(**batch).logits
    near(case, f"mixed_logits.{which}", logits)
    if which == "loc":
        with edited.disable_edits(), torch.no_grad():
            plain = edited(**batch).logits
        out = case.expected["log_similarity.loc"].amax(1).exp() < 0.5
        assert torch.equal(logits[out], plain[out])
