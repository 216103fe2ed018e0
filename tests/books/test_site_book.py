"""The book of wrapped modules: all or nothing, undoing, files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

import pytest
import torch
from torch import nn

from hf_kedit.books.book import Saved, remove_from
from hf_kedit.books.ledger import Ledger, WeightDelta
from hf_kedit.books.site_book import SiteBook, SiteEntry, SiteMemory, check_finite, register_memory
from hf_kedit.books.sites import SiteCall, SiteFunction
from hf_kedit.errors import (
    ArtifactError,
    BaseModelMismatchError,
    ConfigError,
    KeditError,
    MergeError,
    NonFiniteError,
    RollbackError,
    UnknownEditError,
    WeightError,
)
from tests.models import tiny_model

PATH, HIGHER = "transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"
IDS = torch.tensor([[5, 6, 7]])


@register_memory
class Offsets(SiteMemory):
    """Adds the sum of its edits' vectors everywhere; the edit ``stuck`` cannot be undone alone."""

    kind = "test_offsets"

    def __init__(self, paths: Sequence[str], vectors: dict[str, torch.Tensor] | None = None):
        super().__init__(paths)
        self.vectors = vectors or {}

    @property
    def edit_ids(self) -> list[str]:
        return list(self.vectors)

    def functions(self) -> dict[str, SiteFunction]:
        return dict.fromkeys(self.paths, self._add)

    def _add(self, call: SiteCall) -> torch.Tensor:
        return call.output + torch.stack(list(self.vectors.values())).sum(dim=0)

    def apply(self, batch_id: str, changes: Sequence[Any], edit_ids: Sequence[str]) -> None:
        check_finite("offset", *changes)
        self.vectors = {**self.vectors, **dict(zip(edit_ids, changes, strict=True))}

    def remove(self, edit_ids: Sequence[str]) -> None:
        if "stuck" in edit_ids:
            raise RollbackError("roll back everything instead")
        self.vectors = {k: v for k, v in self.vectors.items() if k not in edit_ids}

    def snapshot(self) -> Any:
        return self.vectors

    def restore(self, snapshot: Any) -> None:
        self.vectors = snapshot

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{self.paths[0]}.kedit_test_vectors": torch.stack(list(self.vectors.values()))}

    def describe(self) -> dict[str, Any]:
        return {"edits": self.edit_ids}

    @classmethod
    def read(cls, model: nn.Module, paths: Sequence[str], part: Mapping[str, Any], saved: Saved) -> Self:
        ids = list(part["edits"])
        vectors = saved.tensor(f"{paths[0]}.kedit_test_vectors", (len(ids), 32))
        return cls(paths, dict(zip(ids, vectors, strict=True)))


def vector(seed: int) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def book() -> SiteBook:
    return SiteBook(tiny_model("gpt2"))


def add(book: SiteBook, edit_id: str, value: torch.Tensor, path: str = PATH) -> None:
    memory = book.find(f"test_offsets@{path}") or Offsets([path])
    book.apply("batch", [SiteEntry(memory, value)], [edit_id])


def test_applying_and_removing(book: SiteBook) -> None:
    plain = logits(book.model)
    add(book, "a", vector(0))
    one = logits(book.model)
    add(book, "b", vector(1))
    add(book, "c", vector(2), HIGHER)
    assert book.edit_ids == ["a", "b", "c"] and not torch.equal(logits(book.model), one)
    with book.disabled():
        assert torch.equal(logits(book.model), plain)
        with pytest.raises(WeightError, match="switched off"):
            add(book, "d", vector(3))
        with pytest.raises(WeightError, match="switched off"):
            book.remove(["a"])
    book.remove(["c", "b"])
    assert torch.equal(logits(book.model), one) and list(book.memories) == [f"test_offsets@{PATH}"]
    with pytest.raises(UnknownEditError, match="c"):
        book.remove(["a", "c"])
    book.remove(["a"])
    assert torch.equal(logits(book.model), plain) and not book.memories
    assert not any(m._forward_hooks for m in book.model.modules()) and "generate" not in book.model.__dict__


def test_all_or_nothing(book: SiteBook) -> None:
    add(book, "stuck", vector(0))
    add(book, "b", vector(1))
    add(book, "c", vector(2), HIGHER)
    ledger = Ledger(book.model)
    ledger.apply("w", [WeightDelta(PATH, dense=torch.ones(32, 128))], ["weights"])
    edited, before = logits(book.model), book.snapshot()
    with pytest.raises(NonFiniteError):
        add(book, "d", torch.full((32,), torch.nan), "transformer.h.0.mlp.c_proj")
    two = [SiteEntry(Offsets(["lm_head"]), torch.ones(1)), SiteEntry(Other([PATH]), vector(3))]
    with pytest.raises(ConfigError, match="wrapped already"):
        book.apply("x", two, ["e"])
    with pytest.raises(RollbackError, match="everything instead"):
        remove_from([ledger, book], ["weights", "c", "stuck"])
    assert torch.equal(logits(book.model), edited) and book.edit_ids == ["stuck", "b", "c"]
    assert ledger.edit_ids == ["weights"]
    book.remove(["b", "c"])
    book.restore(before)
    assert torch.equal(logits(book.model), edited)
    remove_from([ledger, book], ["weights", "stuck", "b", "c"])
    assert not book.memories and not ledger.accounts


class Other(Offsets):
    kind = "test_other"


def test_merging_is_refused(book: SiteBook) -> None:
    book.check_mergeable()
    add(book, "a", vector(0))
    with pytest.raises(MergeError, match=PATH):
        book.check_mergeable()


def saved(book: SiteBook, **changes: Any) -> Saved:
    description = json.loads(json.dumps(book.describe()))
    return Saved("folder", {**description, **changes}, book.tensors(), frozenset(book.edit_ids))


def test_reading_what_was_written(book: SiteBook) -> None:
    add(book, "a", vector(0))
    add(book, "b", vector(1))
    add(book, "c", vector(2), HIGHER)
    other = SiteBook(tiny_model("gpt2"))
    state, ids = other.read(saved(book))
    assert ids == {"a", "b", "c"} and not other.memories
    other.restore(state)
    assert torch.equal(logits(other.model), logits(book.model))
    other.remove(["b"])
    book.remove(["b"])
    assert torch.equal(logits(other.model), logits(book.model))
    with pytest.raises(BaseModelMismatchError, match="not those"):
        SiteBook(tiny_model("gpt2", seed=1)).read(saved(book))
    with pytest.raises(BaseModelMismatchError, match="no module"):
        SiteBook(tiny_model("llama")).read(saved(book))


def _damaged(book: SiteBook, change: Any) -> Saved:
    good = saved(book)
    part = json.loads(json.dumps(good.description))
    change(part["memories"][0])
    return Saved("folder", part, good.tensors, good.edit_ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(kind="pickle"), "knows no"),
        (lambda m: m.update(kind=3), "no valid"),
        (lambda m: m.update(modules={}), "no valid"),
        (lambda m: m.pop("state"), "no valid"),
        (lambda m: m.update(state={}), "damaged"),
        (lambda m: m.update(modules={"../../etc": "0"}), "no module"),
        (lambda m: m["state"].update(edits=["a", "b"]), "shape"),
        (lambda m: m["state"].update(edits=["stranger"]), "not in edits.jsonl"),
    ],
)
def test_damaged_descriptions(change: Any, message: str, book: SiteBook) -> None:
    add(book, "a", vector(0))
    with pytest.raises(KeditError, match=message):
        SiteBook(tiny_model("gpt2")).read(_damaged(book, change))


def test_damaged_tensors(book: SiteBook) -> None:
    add(book, "a", vector(0))
    good = saved(book)
    name = f"{PATH}.kedit_test_vectors"
    for tensors, message in [({}, "missing"), ({name: torch.full((1, 32), torch.inf)}, "NaN")]:
        with pytest.raises(ArtifactError, match=message):
            book.read(Saved("folder", good.description, tensors, good.edit_ids))
