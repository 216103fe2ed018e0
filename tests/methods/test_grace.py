"""GRACE: edits that live in a codebook, on the fact world; the codebook's bookkeeping on its own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_kedit import EditableModel, EditRequest, FTMConfig
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import (
    ArtifactError,
    BaseModelMismatchError,
    ConfigError,
    EditFailedError,
    LayerError,
    MergeError,
    UnsupportedModelError,
)
from hf_kedit.evaluation.asking.scoring import score_pairs
from hf_kedit.methods.grace import GRACE, GRACEConfig
from hf_kedit.methods.grace_codebook import Codebook, CodeChange
from tests.methods.at_sites import facts, learnt, neighbours, prompt_logits, says, without_trace
from tests.models import tiny_model

WORLD = ["kedit/world-gpt2", "kedit/world-llama"]


@pytest.fixture
def model() -> EditableModel:
    return EditableModel.from_pretrained(WORLD[0], GRACEConfig(num_steps=12))


def book_of(model: EditableModel) -> Codebook:
    (book,) = model.sites.memories.values()
    assert isinstance(book, Codebook)
    return book


# ---------------------------------------------------------------------- on the fact world


def test_facts_of_one_call_stop_when_each_of_them_holds() -> None:
    """What the model knows already needs no step, what it does not needs several."""
    (known, other) = facts(2)
    known = EditRequest(prompt=known.filled_prompt, target_new=known.ground_truth[0])
    model = EditableModel.from_pretrained(WORLD[0], GRACEConfig(num_steps=40, stop_probability=0.6))
    model.trace = {}
    result = model.edit([known, other])
    steps = [int(row.isfinite().sum()) for row in model.trace["losses"]]
    assert steps[0] == 0 < steps[1] < 40
    assert all(edit.diagnostics["target_probability_after"] >= 0.6 for edit in result.edits)


@pytest.mark.parametrize("name", WORLD)
def test_edit_see_undo(name: str) -> None:
    model = EditableModel.from_pretrained(name, "grace")
    wanted, digest = facts(3), model_digest(model.base_model)
    prompts = [f.filled_prompt for f in wanted]
    plain = [prompt_logits(model, p) for p in prompts]
    near = [prompt_logits(model, p) for p in neighbours(wanted)]
    ids = model.edit(wanted).ids
    assert all(learnt(model, wanted)) and model_digest(model.base_model) == digest
    assert all(torch.equal(prompt_logits(model, p), x) for p, x in zip(neighbours(wanted), near, strict=True))
    with model.disable_edits():
        assert all(torch.equal(prompt_logits(model, p), x) for p, x in zip(prompts, plain, strict=True))
    scores = score_pairs(model, model.tokenizer, [(f.filled_prompt, f.target_new) for f in wanted])
    assert all(s.exact for s in scores)
    assert all(e.diagnostics["target_probability_after"] > 0.9 for e in model.edits)

    model.rollback(ids[1])  # one of three: the others go on working, bit for bit
    assert learnt(model, wanted) == [True, False, True]
    assert torch.equal(prompt_logits(model, prompts[1]), plain[1])
    model.rollback(ids[0])
    model.rollback(1)
    assert all(torch.equal(prompt_logits(model, p), x) for p, x in zip(prompts, plain, strict=True))
    assert without_trace(model) and not model.sites.memories


@pytest.mark.parametrize("replacement", ["replace_last", "replace_all", "replace_prompt"])
def test_every_way_of_generating_is_one(replacement: Any) -> None:
    model = EditableModel.from_pretrained(
        WORLD[0], GRACEConfig(layers=[3], eps=3.0, num_steps=12, replacement=replacement)
    )
    (fact,) = facts(1)
    model.edit(fact)
    prompts = [fact.filled_prompt, neighbours([fact])[0]]
    together = says(model, prompts)
    with model.disable_edits():
        assert says(model, prompts)[0] != together[0] and says(model, prompts)[1] == together[1]
    assert [says(model, [p])[0] for p in prompts] == together
    assert says(model, prompts, use_cache=False) == together
    assert says(model, prompts, num_beams=3, num_return_sequences=1)[0].startswith(fact.target_new)
    assert says(model, prompts, do_sample=True, top_k=1, num_return_sequences=2) == [t for t in together for _ in "ab"]
    both = score_pairs(model, model.tokenizer, [(p, fact.target_new) for p in prompts])
    alone = [score_pairs(model, model.tokenizer, [(p, fact.target_new)])[0] for p in prompts]
    assert [s.pred_ids for s in both] == [s.pred_ids for s in alone] and both[0].exact and not both[1].exact


def test_a_wide_radius_does_not_catch_generated_tokens() -> None:
    """The look-up is made once per prompt: new tokens near a key do not get its value."""
    model = EditableModel.from_pretrained(WORLD[0], GRACEConfig(num_steps=12, eps=100.0))
    (fact,) = facts(1)
    model.edit(fact)
    assert says(model, [fact.filled_prompt])[0] == says(model, [fact.filled_prompt], use_cache=False)[0]
    assert learnt(model, [fact]) == [True]


def test_a_forward_changes_nothing(model: EditableModel) -> None:
    wanted = facts(2)
    model.edit(wanted)
    book, state = book_of(model), {k: v.clone() for k, v in model.base_model.state_dict().items()}
    entries, tensors = list(book.entries), {k: v.clone() for k, v in book.tensors().items()}
    model.base_model.train()
    says(model, neighbours(wanted))
    prompt_logits(model, wanted[0].filled_prompt + " and more")
    model.base_model.eval()
    assert book.entries == entries and all(torch.equal(v, tensors[k]) for k, v in book.tensors().items())
    assert all(torch.equal(v, state[k]) for k, v in model.base_model.state_dict().items())


def test_the_same_prompt_again(model: EditableModel) -> None:
    (fact,) = facts(1)
    other = next(f for f in facts(12) if f.target_new != fact.target_new)
    again = EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=other.target_new)
    model.edit(fact)
    plain = prompt_logits(model, fact.filled_prompt)
    second = model.edit(again)
    assert second.edits[0].diagnostics["action"] == "overwrite" and len(book_of(model).entries) == 1
    assert learnt(model, [again]) == [True]
    model.rollback(second.ids)
    assert torch.equal(prompt_logits(model, fact.filled_prompt), plain)
    third = model.edit(EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new))
    assert third.edits[0].diagnostics["action"] == "expand" and learnt(model, [fact]) == [True]
    model.rollback(third.ids)
    assert torch.equal(prompt_logits(model, fact.filled_prompt), plain)


def test_a_call_is_all_or_nothing(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *rest = facts(3)
    model.edit(first)
    before = book_of(model).entries, prompt_logits(model, rest[0].filled_prompt)
    train, calls = GRACE._train, []

    def interrupted(self: GRACE, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(self, *args)

    monkeypatch.setattr(GRACE, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.edit(rest, batch_size=1)
    assert book_of(model).entries == before[0] and len(model.edits) == 1 and len(calls) == 2
    assert torch.equal(prompt_logits(model, rest[0].filled_prompt), before[1])
    monkeypatch.undo()
    model.set_method(GRACEConfig(num_steps=3, lr=1e30))
    with pytest.raises(EditFailedError):
        model.edit(rest[0])
    assert book_of(model).entries == before[0] and learnt(model, [first]) == [True]


def test_what_the_model_knows_needs_no_entry() -> None:
    model = EditableModel.from_pretrained(WORLD[0], GRACEConfig(num_steps=12, skip_if_correct=True))
    (fact,) = facts(1)
    known = EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.ground_truth[0])
    plain = prompt_logits(model, fact.filled_prompt)
    idle = model.edit(known)
    assert idle.edits[0].diagnostics["action"] == "none" and torch.equal(
        prompt_logits(model, known.filled_prompt), plain
    )
    model.edit(fact)
    model.rollback(idle.ids)
    assert learnt(model, [fact]) == [True]
    model.rollback("all")
    assert without_trace(model)


# ---------------------------------------------------------------------- several at once


def varied() -> list[EditRequest]:
    """New facts, the same prompt with the same and with another target, and a close prompt."""
    first, second, *_ = facts(2)
    other = next(f for f in facts(12) if f.target_new not in (first.target_new, second.target_new))

    def again(like: EditRequest, target: str) -> EditRequest:
        return EditRequest(prompt=like.prompt, subject=like.subject, target_new=target)

    return [first, second, again(first, first.target_new), again(second, other.target_new), again(first, "x y"), other]


@pytest.mark.parametrize("settings", [{}, {"eps": 30.0}, {"replacement": "replace_all", "num_steps": 4}])
def test_several_at_once_are_one_after_another(settings: dict[str, Any]) -> None:
    books, values, radii = [], [], []
    for size in (1, None):
        config = GRACEConfig(**{"num_steps": 10, "layers": [3], **settings})
        model = EditableModel.from_pretrained(WORLD[0], config)
        wanted = [r.with_id(f"edit-{i}") for i, r in enumerate(varied())]
        made = model.edit(wanted, batch_size=size)
        book = book_of(model)
        books.append(
            [
                [e.diagnostics["action"] for e in made.edits],
                [(e.target, e.members, [(v.kind, v.value_before) for v in e.events]) for e in book.entries],
                [e.diagnostics.get("uncovers") for e in made.edits],
            ]
        )
        values.append(book.values.tensor)
        radii.append(torch.tensor([e.radius for e in book.entries]))
        assert all(len(e.diagnostics["loss"]) == config.num_steps for e in made.edits)
    assert books[0] == books[1] and "expand" in books[0][0]
    assert torch.allclose(*radii, atol=1e-3)
    assert torch.allclose(*values, atol=0.05) and values[0].abs().max() > 1


def test_several_at_once_come_off_one_by_one() -> None:
    model = EditableModel.from_pretrained(WORLD[0], "grace")
    wanted = facts(3)
    plain = [prompt_logits(model, f.filled_prompt) for f in wanted]
    ids = model.edit(wanted).ids
    assert len({e.batch_id for e in model.edits}) == 1 and learnt(model, wanted) == [True] * 3
    with_all = [prompt_logits(model, f.filled_prompt) for f in wanted]
    model.rollback(ids[1])
    assert torch.equal(prompt_logits(model, wanted[1].filled_prompt), plain[1])
    for i in (0, 2):
        assert torch.equal(prompt_logits(model, wanted[i].filled_prompt), with_all[i])


def test_what_an_earlier_one_of_the_batch_taught_needs_no_entry() -> None:
    model = EditableModel.from_pretrained(WORLD[0], GRACEConfig(num_steps=12, skip_if_correct=True))
    (fact,) = facts(1)
    made = model.edit([fact, EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=fact.target_new)])
    assert [e.diagnostics["action"] for e in made.edits] == ["add", "none"]


# ---------------------------------------------------------------------- saving


def test_a_fresh_process_takes_the_same_routes(model: EditableModel, tmp_path: Path) -> None:
    wanted = facts(3)
    ids = model.edit(wanted).ids
    again = EditRequest(prompt=wanted[0].prompt, subject=wanted[0].subject, target_new=wanted[1].target_new)
    ids += model.edit(again).ids  # a value from before must be saved too
    model.save_pretrained(tmp_path / "edits")
    prompts = [wanted[0].filled_prompt, wanted[1].filled_prompt, neighbours(wanted)[0]]
    encoded = [model.tokenizer(p)["input_ids"] for p in prompts]  # type: ignore[misc]
    expected = {str(i): prompt_logits(model, p) for i, p in enumerate(prompts)}
    model.rollback(ids[-1])
    expected["undone"] = prompt_logits(model, prompts[0])
    save_file(expected, tmp_path / "expected.safetensors")
    script = f"""
import torch
from safetensors.torch import load_file
from hf_kedit import EditableModel
model = EditableModel.from_pretrained({str(tmp_path / "edits")!r})
expected = load_file({str(tmp_path / "expected.safetensors")!r})
def logits(ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits
for i, ids in enumerate({encoded!r}):
    assert torch.equal(logits(ids), expected[str(i)]), i
assert [e.id for e in model.edits] == {ids!r}
model.rollback({ids[-1]!r})
assert torch.equal(logits({encoded[0]!r}), expected["undone"])
model.rollback("all")
assert not model.sites.memories
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_folders_that_do_not_fit(model: EditableModel, tmp_path: Path) -> None:
    model.edit(facts(1))
    model.save_pretrained(tmp_path)
    with pytest.raises(BaseModelMismatchError, match="no module"):
        EditableModel.from_pretrained(
            tmp_path, base_model=tiny_model("llama", num_hidden_layers=6), tokenizer=model.tokenizer
        )
    other = EditableModel.from_pretrained(WORLD[0], "ft-m")
    other.edit(facts(1))
    with pytest.raises(BaseModelMismatchError, match="already edited"):
        EditableModel.from_pretrained(tmp_path, base_model=other.merge_and_unload(), tokenizer=model.tokenizer)
    config = json.loads((tmp_path / "edit_config.json").read_text())
    (memory,) = config["books"]["adapter"]["memories"]
    memory["state"]["entries"][0]["start_radius"] = 99.0
    (tmp_path / "edit_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="radii"):
        EditableModel.from_pretrained(tmp_path)


def test_what_cannot_be_done(model: EditableModel) -> None:
    with pytest.raises(ConfigError, match="one layer"):
        GRACEConfig(layers=[1, 2])
    with pytest.raises(ConfigError, match="eps"):
        GRACEConfig(eps=0.0)
    (fact,) = facts(1)
    for module, error in [
        ("transformer.h.{}.mlp.nothing", LayerError),
        ("transformer.h.{}.ln_1", UnsupportedModelError),
    ]:
        model.set_method(GRACEConfig(layers=[2], module=module, num_steps=2))
        with pytest.raises(error):
            model.edit(fact)
    model.set_method(GRACEConfig(layers=[2], module="transformer.h[2].mlp.c_fc", num_steps=2))
    model.edit(fact)
    assert list(model.sites.sites.paths) == ["transformer.h.2.mlp.c_fc"]
    with pytest.raises(MergeError, match="at run time"):
        model.merge_and_unload()
    model.set_method(GRACEConfig(layers=[2], module="transformer.h.2.mlp.c_fc", num_steps=2, eps=7.0))
    with pytest.raises(ConfigError, match="eps=4"):
        model.edit(facts(1, start=1))
    assert len(model.edits) == 1
    assert model.unload() is model.base_model and without_trace(model)


# ---------------------------------------------------------------------- the codebook alone

EDIT = st.tuples(st.floats(0.0, 4.0), st.sampled_from([(1,), (2,)]))


def codebook() -> Codebook:
    return Codebook("layer", (2, 3), 1.0, "replace_last")


def put(book: Codebook, edit_id: str, place: float, target: tuple[int, ...]) -> str:
    query = torch.tensor([10.0 + place, 0.0])
    change = CodeChange(book.place(query, target), query, torch.randn(3), target)
    book.apply("batch", [change], [edit_id])
    return change.placement.action


def state(book: Codebook) -> list[Any]:
    keys = book.keys.tensor.tolist()
    values = [book.value_of(k).tolist() for k in range(len(book.entries))]
    return [(k, v, e.target, e.radius, e.members) for k, v, e in zip(keys, values, book.entries, strict=True)]


def test_actions_and_radii() -> None:
    book = codebook()
    steps = [
        ("a", 0.0, (1,)),
        ("b", 1.5, (1,)),
        ("c", 2.4, (2,)),
        ("d", 0.0, (2,)),
        ("e", 3.6, (2,)),
        ("f", 9.0, (1,)),
    ]
    assert [put(book, *s) for s in steps] == ["add", "expand", "split", "overwrite", "expand", "add"]
    assert [round(e.radius, 4) for e in book.entries] == [1.2, 1.2, 1.0]
    assert book.entries[0].uncovered == ["b"] and book.entries[1].members == ["c", "e"]
    book.remove(["c"])  # the split goes with it: the radius that "b" had asked for is back, the entry stays for "e"
    assert [round(e.radius, 4) for e in book.entries] == [1.5, 1.2, 1.0] and not book.entries[0].uncovered
    book.remove(["e"])
    assert [e.members for e in book.entries] == [["a", "b", "d"], ["f"]]
    assert book.entries[0].target == (2,)
    book.remove(["d"])
    assert book.entries[0].target == (1,)


@settings(max_examples=60, deadline=None)
@given(st.lists(EDIT, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_any_edits_undone_in_any_order(edits: list[Any], random: Any) -> None:
    book, states = codebook(), []
    for number, (place, target) in enumerate(edits):
        states.append((state(book), book.snapshot()))
        put(book, str(number), place, target)
    final = state(book)
    for before, snapshot in states:
        book.restore(snapshot)
        assert state(book) == before
    for number, (place, target) in list(enumerate(edits))[len(edits) - 1 :]:
        put(book, str(number), place, target)
    if len(edits) > 1:
        book.remove([str(len(edits) - 1)])  # the newest first is exact
        assert state(book) == states[-1][0] and len(final) >= len(states[-1][0])
        left = [str(n) for n in range(len(edits) - 1)]
        random.shuffle(left)
        for edit_id in left[:-1]:
            book.remove([edit_id])
            assert edit_id not in book.edit_ids and all(e.members for e in book.entries)
            used = {e.value for e in book.entries} | {v.value_before for e in book.entries for v in e.events} - {None}
            assert used == set(range(len(book.values)))
        assert book.edit_ids == left[-1:] and book.entries[0].radius > 0


def test_weight_edits_beside_a_codebook(model: EditableModel) -> None:
    """Above a codebook they are welcome; below it they would move its keys."""
    wanted = facts(2)
    model.edit(wanted[0])
    plain = prompt_logits(model, wanted[0].filled_prompt)
    model.set_method("rome")  # layer 2 of this model, the codebook is at 4
    with pytest.raises(ConfigError, match="lies below"):
        model.edit(wanted[1])
    model.set_method(FTMConfig(layers=[5], lr=1e-3, num_steps=3))
    higher = model.edit(wanted[1]).ids
    model.rollback(higher)
    assert torch.equal(prompt_logits(model, wanted[0].filled_prompt), plain) and len(model.edits) == 1


def test_weight_edits_beneath_a_codebook_that_are_taken_back(model: EditableModel, caplog: Any) -> None:
    wanted = facts(2)
    below = model.set_method(FTMConfig(layers=[1], lr=1e-3, num_steps=2)).edit(wanted[1]).ids
    model.set_method(GRACEConfig(num_steps=12)).edit(wanted[0])
    assert learnt(model, [wanted[0]]) == [True]
    with caplog.at_level("WARNING", logger="hf_kedit"):
        model.rollback(below)
    assert "may miss" in caplog.text and "transformer.h.1.mlp.c_proj" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="hf_kedit"):
        model.rollback("all")
    assert not caplog.records


def test_radii_are_those_of_the_state_that_is_returned_to() -> None:
    book = codebook()
    put(book, "a", 0.0, (1,))
    between = torch.tensor([[11.2, 0.0]])
    small = book.snapshot()
    assert book.look_up(between)[0].tolist() == [False]
    assert put(book, "b", 1.5, (1,)) == "expand"
    large = book.snapshot()
    assert book.look_up(between)[0].tolist() == [True]
    book.restore(small)
    assert book.look_up(between)[0].tolist() == [False]
    book.restore(large)
    assert book.look_up(between)[0].tolist() == [True]
    assert book.draft().look_up(between)[0].tolist() == [True]


def after_the_prompt() -> tuple[EditableModel, Any, torch.Tensor, Any]:
    """A model with two edits, what it says to the first prompt, the next token, and a copy of the cache."""
    model = EditableModel.from_pretrained(WORLD[0], GRACEConfig(num_steps=12, replacement="replace_all"))
    wanted = facts(2)
    model.edit(wanted)
    ids = model.tokenizer(wanted[0].filled_prompt, return_tensors="pt")["input_ids"]  # type: ignore[misc]
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True)
    token = first.logits[:, -1:].argmax(-1)
    return model, first, token, copy.deepcopy(first.past_key_values)


def test_a_running_sequence_forgets_the_decisions_of_edits_that_are_undone() -> None:
    """Prefill with a cache, roll back, decode one token: what the unedited model says on this cache."""
    model, first, token, cache = after_the_prompt()
    with torch.no_grad():
        with model.disable_edits():
            unedited = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        model.rollback(model.edits[0].id)
        after = model(input_ids=token, past_key_values=first.past_key_values, use_cache=True).logits
    assert torch.equal(after, unedited)


def test_a_running_sequence_goes_on_with_its_decision() -> None:
    """What the test above would not see: the decision of the prompt is applied at every decoded token."""
    model, first, token, cache = after_the_prompt()
    with torch.no_grad():
        edited = model(input_ids=token, past_key_values=first.past_key_values, use_cache=True).logits
        with model.disable_edits():
            unedited = model(input_ids=token, past_key_values=cache, use_cache=True).logits
    assert (edited - unedited).abs().max() > 1e-3
