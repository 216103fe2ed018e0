"""Edit packs: named sets of edits on one model, added exactly, switched, compared, and gone without a trace."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest, FTMConfig, load_edit_dataset
from hf_kedit.artifact.packs import OWN
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import BaseModelMismatchError, HubError, PackError
from hf_kedit.testing.hub import LoopbackHub

BASE = "kedit/world-gpt2"
MODULE = "transformer.h.2.mlp.c_proj"


def facts(start: int, count: int) -> list[EditRequest]:
    rows = load_edit_dataset("world", split="test", limit=start + count)
    return [EditRequest.from_dict(rows[i]) for i in range(start, start + count)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``one`` and ``two``: three and two facts; ``other``: another answer to the first fact of ``one``."""
    root = tmp_path_factory.mktemp("packs")
    asked = facts(0, 1)[0]
    wrong = {"prompt": asked.prompt, "subject": asked.subject, "target_new": asked.ground_truth[0]}
    for name, method, requests in (
        ("one", "memit", facts(0, 3)),
        ("two", "rome", facts(3, 2)),
        ("other", "rome", [EditRequest(**wrong)]),
    ):
        model = EditableModel.from_pretrained(BASE, method)
        model.edit(requests)
        model.save_pretrained(root / name)
    return root


def total(model: EditableModel) -> torch.Tensor:
    change = model.ledger.total(MODULE)
    assert change is not None
    return change


def test_packs_add_up_exactly_and_leave_no_trace(saved: Path) -> None:
    model = EditableModel.from_pretrained(BASE, "rome")
    base = model_digest(model.base_model)
    alone = {name: total(EditableModel.from_pretrained(saved / name)) for name in ("one", "two")}
    model.load_edits(saved / "one")
    first = model_digest(model.base_model)
    assert first == model_digest(EditableModel.from_pretrained(saved / "one").base_model)
    model.load_edits(saved / "two")
    assert (
        model.packs.active == ["one", "two"]
        and [e.id.partition("/")[0] for e in model.edits] == ["one"] * 3 + ["two"] * 2
    )
    torch.testing.assert_close(total(model), alone["one"] + alone["two"], atol=1e-6, rtol=0)
    both = model_digest(model.base_model)
    for names, digest in ((["one"], first), ([], base), (["one", "two"], both), ("one", first)):
        model.set_active(names)
        assert model_digest(model.base_model) == digest
    model.unload_edits("one")
    assert model_digest(model.base_model) == base and model.packs.names == ["two"] and not model.edits


def test_order_is_the_order_of_the_sum(saved: Path) -> None:
    model = EditableModel.from_pretrained(BASE, "rome")
    model.load_edits(saved / "one", activate=False)
    model.load_edits(saved / "two", "second", activate=False)
    assert not model.edits and model.packs.names == ["one", "second"]
    model.set_active(["second", "one"])
    pieces = model.ledger.accounts[f"{MODULE}.weight"].pieces
    assert pieces[0].members[0].startswith("second/") and pieces[-1].members[0].startswith("one/")
    assert [e.id.partition("/")[0] for e in model.edits] == ["second"] * 2 + ["one"] * 3


def test_packs_beside_own_edits(saved: Path, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(BASE, "rome")
    model.edit(facts(6, 1))
    own = model_digest(model.base_model)
    model.load_edits(saved / "one")
    model.edit(facts(7, 1))  # on top of the pack
    edited = model_digest(model.base_model)
    model.load_edits(saved / "two")
    model.unload_edits("two")
    assert model_digest(model.base_model) == edited
    model.save_pretrained(tmp_path / "all")
    again = EditableModel.from_pretrained(tmp_path / "all")
    assert model_digest(again.base_model) == edited and again.edits == model.edits
    model.rollback(model.edits[-1].id)
    model.unload_edits("one")
    assert model_digest(model.base_model) == own and len(model.edits) == 1


def test_what_was_rolled_back_stays_out(saved: Path) -> None:
    model = EditableModel.from_pretrained(BASE, "rome")
    model.load_edits(saved / "one")
    model.rollback(model.edits[1].id)
    left, digest = [e.id for e in model.edits], model_digest(model.base_model)
    model.set_active([])
    assert [e.id for e in model.packs.edits("one")] == left
    model.set_active(["one"])
    assert model_digest(model.base_model) == digest and [e.id for e in model.edits] == left
    model.merge_and_unload()
    assert not model.packs.names


def test_conflicts_are_reported(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = EditableModel.from_pretrained(BASE, "rome")
    model.load_edits(saved / "one")
    before = model_digest(model.base_model)
    with pytest.raises(PackError, match="one and other both edit"):
        model.load_edits(saved / "other", on_conflict="raise")
    assert model_digest(model.base_model) == before and model.packs.names == ["one"]
    with caplog.at_level(logging.WARNING, "hf_kedit"):
        model.load_edits(saved / "two")
        assert "both edit" not in caplog.text
        model.load_edits(saved / "other")
        assert "one and other both edit" in caplog.text
        caplog.clear()
        model.set_active(["one", "other"])
        assert "both edit" not in caplog.text  # said once
    (conflict,) = model.packs.conflicts()
    fact = facts(0, 1)[0]
    assert conflict.packs == ("one", "other") and conflict.contradictory
    assert conflict.prompt == fact.filled_prompt and conflict.targets == (fact.target_new, fact.ground_truth[0])
    assert not model.packs.conflicts(["one", "two"])
    model.load_edits(saved / "one", "again", activate=False)
    assert [c.contradictory for c in model.packs.conflicts(["one", "again"])] == [False] * 3


def test_conflicts_with_own_edits_and_by_relation(saved: Path) -> None:
    model = EditableModel.from_pretrained(BASE, FTMConfig(layers=[1], lr=1e-3, num_steps=1))
    asked = facts(0, 1)[0]
    about = {"subject": asked.subject, "metadata": {"relation": "profession"}}
    model.edit([{"prompt": "Nobody ever said this of {}:", "target_new": "x", **about}])
    model.load_edits(saved / "one")
    assert not model.packs.conflicts()
    for edit in model.edits[1:]:
        edit.request.metadata["relation"] = "Profession"
    (conflict,) = model.packs.conflicts()
    assert conflict.packs == (OWN, "one") and "own edits" in str(conflict)


def test_what_is_no_pack(saved: Path, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(BASE, "rome")
    model.load_edits(saved / "one")
    digest = model_digest(model.base_model)

    def refused(error: type[Exception], message: str, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(error, match=message):
            model.load_edits(*args, **kwargs)
        assert model_digest(model.base_model) == digest and model.packs.names == ["one"]

    refused(PackError, "already", saved / "one")
    refused(PackError, "without '/'", saved / "two", "a/b")
    refused(BaseModelMismatchError, "no such parameter", _llama_edits(tmp_path))
    EditableModel.from_pretrained(BASE).base_model.save_pretrained(tmp_path / "model")
    refused(PackError, "is a model", tmp_path / "model")
    for names, message in ((["on"], "Did you mean 'one'"), (["one", "one"], "twice")):
        with pytest.raises(PackError, match=message):
            model.set_active(names)
    with pytest.raises(PackError, match="no pack"):
        model.unload_edits("two")
    assert model.packs.active == ["one"]


def _llama_edits(folder: Path) -> Path:
    model = EditableModel.from_pretrained("kedit/world-llama", FTMConfig(layers=[1], lr=1e-3, num_steps=1))
    model.edit(facts(0, 1))
    model.save_pretrained(folder / "llama")
    return folder / "llama"


@pytest.mark.hub
def test_packs_come_from_the_hub(saved: Path, hub: LoopbackHub) -> None:
    from hf_kedit.hub import push_folder

    push_folder(saved / "one", "org/facts", tag="v1")
    push_folder(saved / "two", "org/facts")
    model = EditableModel.from_pretrained(BASE, "rome")
    model.load_edits("org/facts", "old", revision="v1")
    model.load_edits("org/facts")
    assert model.packs.active == ["old", "facts"] and [len(model.packs.edits(n)) for n in model.packs.active] == [3, 2]
    with pytest.raises(HubError, match="no repository"):
        model.load_edits("org/nothing")
