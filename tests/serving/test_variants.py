"""One model that is shown with one set of edits or another: to the bit, in turns, whatever their kind."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel
from hf_kedit.embedded import resolve
from hf_kedit.errors import PackError, ServeError
from hf_kedit.serving.app import Service
from hf_kedit.serving.variants import NoLongerWantedError, Variants
from tests.fuzz.states import difference, surface
from tests.serving.conftest import MODEL, PROMPT, until

PATIENCE = 60


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**model.tokenizer(PROMPT, return_tensors="pt")).logits


def test_a_pack_of_any_kind_is_what_it_is_alone(service: Service, packs: dict[str, Path]) -> None:
    """Forwards, then backwards: what was shown before leaves no trace."""
    variants = service.variants
    alone = {name: logits(EditableModel.from_pretrained(folder)) for name, folder in packs.items()}
    for name in [*packs, *reversed(packs)]:
        with variants.showing(variants.find(f"base+{name}")):
            assert torch.equal(logits(variants.model), alone[name]), name


def test_base_is_the_unedited_model_to_the_bit(service: Service, packs: dict[str, Path]) -> None:
    variants = service.variants
    fresh = EditableModel.from_pretrained(MODEL)
    before = surface(fresh.base_model)
    for name in ["mine", *(f"base+{pack}" for pack in packs)]:
        with variants.showing(variants.find(name)):
            assert variants.model.edits
        with variants.showing("base"):
            assert difference(before, surface(variants.model.base_model)) is None, name
            assert torch.equal(logits(variants.model), logits(fresh)) and not variants.model.edits


def test_a_model_with_edits_of_any_kind_has_its_base(packs: dict[str, Path]) -> None:
    fresh = EditableModel.from_pretrained(MODEL)
    before, plain = surface(fresh.base_model), logits(fresh)
    for name, folder in packs.items():
        model = EditableModel.from_pretrained(folder)
        edited, variants = logits(model), Variants(model, "mine")
        assert torch.equal(logits(model), edited), name  # it is shown as it came
        with variants.showing("base"):
            assert difference(before, surface(model.base_model)) is None, name
            assert torch.equal(logits(model), plain) and not any(book.edit_ids for book in model.books.values())
        with variants.showing("mine"):
            assert torch.equal(logits(model), edited), name


def test_packs_of_weights_add_up(service: Service, packs: dict[str, Path]) -> None:
    expected = EditableModel.from_pretrained(MODEL)
    for name in ("other", "memit"):
        expected.load_edits(packs[name], name)
    variants = service.variants
    wanted = variants.find("base+other+memit")
    assert [edit.id.split("/")[0] for edit in variants.edits(wanted)] == ["other", "memit"]
    with variants.showing(wanted):
        assert torch.equal(logits(variants.model), logits(expected))
    assert variants.model.packs.active == []


def test_combinations_do_not_pile_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_kedit.serving.variants.MOST_COMBINATIONS", 2)
    variants, said = service.variants, {}  # type: ignore[var-annotated]
    variants._combinations.clear()
    for _ in range(2):
        for name in ("base+rome", "base+memit", "base+other+rome"):
            with variants.showing(variants.find(name)):
                found = logits(variants.model)
            assert torch.equal(found, said.setdefault(name, found)) and len(variants._combinations) <= 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bas", "Did you mean 'base'"),
        ("base+romme", "does not exist"),
        ("mine+rome", "does not exist"),
        ("base+", "does not exist"),
        ("base+rome+grace", "'grace' holds edits that are no change of weights"),
        ("base+rome+rome", "named twice"),
    ],
)
def test_what_cannot_be_shown(service: Service, name: str, says: str) -> None:
    with pytest.raises(ServeError, match=says) as raised:
        service.variants.find(name)
    assert raised.value.param == "model"


def test_what_cannot_be_a_pack(service: Service, packs: dict[str, Path]) -> None:
    variants = service.variants
    for name in ("rome", "a+b", "a/b", " "):
        with pytest.raises(ServeError, match="a name of its own"):
            variants.add_pack(name, packs["rome"])
    with pytest.raises(PackError, match="is a model"):
        variants.add_pack("model", str(resolve(MODEL)))
    assert "base+model" not in variants.names


def test_a_change_is_kept_and_meets_nobody(packs: dict[str, Path]) -> None:
    variants = Variants(EditableModel.from_pretrained(packs["rome"]), "mine")
    before = logits(variants.model)
    with variants.showing("base"):
        pass
    with variants.changing() as model:
        model.edit(prompt="{} is employed by", subject="Gukir Tudias", target_new="Heidork", show_progress=False)
        after = logits(model)
    with variants.showing("base"):
        assert not variants.model.edits
    with variants.showing("mine"):
        assert torch.equal(logits(variants.model), after) and len(variants.edits("mine")) == 2
    with variants.changing() as model:
        model.rollback(1)
    with variants.showing("mine"):
        assert torch.equal(logits(variants.model), before)


class Guest:
    """A thread that is shown a variant until it is let go."""

    def __init__(self, variants: Variants, name: str, order: list[str]):
        self.inside, self._go = threading.Event(), threading.Event()

        def stay() -> None:
            with variants.showing(name):
                order.append(name)
                self.inside.set()
                self._go.wait(PATIENCE)

        self._thread = threading.Thread(target=stay, daemon=True)
        self._thread.start()

    def leave(self) -> None:
        self._go.set()
        self._thread.join(PATIENCE)


def test_turns_are_taken_in_order(packs: dict[str, Path]) -> None:
    """Two of one kind are inside together; a third one of it waits behind one of another kind."""
    variants, order = Variants(EditableModel.from_pretrained(packs["rome"]), "mine"), []
    first, second = Guest(variants, "base", order), Guest(variants, "base", order)
    assert first.inside.wait(PATIENCE) and second.inside.wait(PATIENCE)
    other = Guest(variants, "mine", order)
    until(lambda: len(variants._queue) == 1)
    late = Guest(variants, "base", order)
    until(lambda: len(variants._queue) == 2)
    first.leave()
    assert not other.inside.is_set() and not late.inside.is_set()
    second.leave()
    assert other.inside.wait(PATIENCE) and not late.inside.is_set()
    other.leave()
    assert late.inside.wait(PATIENCE)
    late.leave()
    assert order == ["base", "base", "mine", "base"]


def test_who_has_gone_waits_no_longer(packs: dict[str, Path]) -> None:
    variants = Variants(EditableModel.from_pretrained(packs["rome"]), "mine")
    guest = Guest(variants, "base", [])
    assert guest.inside.wait(PATIENCE)
    with pytest.raises(NoLongerWantedError), variants.showing("mine", gone=lambda: True):
        raise AssertionError("it was let in")
    assert not variants._queue
    guest.leave()
