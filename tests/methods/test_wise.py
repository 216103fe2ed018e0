"""WISE on a model that knows facts: edits, routing, batches, generation, undoing, files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_kedit import EditableModel, EditRequest
from hf_kedit.data import load_edit_dataset
from hf_kedit.engine.weights import get_module, get_weight
from hf_kedit.errors import ConfigError, NonFiniteError, RequestError, RollbackError
from hf_kedit.methods.wise import WISEConfig
from hf_kedit.methods.wise_site import TrainedEdit, WiseSite
from hf_kedit.requests import load_requests
from hf_kedit.tokens import encode_pair

REQUESTS = load_requests(load_edit_dataset("world", split="test").select(range(3)))
TEXTS = [f"The favourite sport of {name} is chess." for name in ("Anna", "Peter", "Maria", "Otto")]


def config(**values: object) -> WISEConfig:
    """Small margins and few steps; two edits per shard, so that three leave a full and an open one."""
    small = {"layers": [4], "n_iter": 12, "act_margin": [2.0, 10.0, 5.0], "save_freq": 2, "merge_freq": 4}
    few = {"context_lengths": [(5, 2)], "irrelevant_texts": TEXTS, "irrelevant_per_edit": 4, "act_ratio": 0.7}
    return WISEConfig(**{**small, **few, **values})  # type: ignore[arg-type]


def fresh(**values: object) -> EditableModel:
    return EditableModel.from_pretrained("kedit/world-gpt2", config(**values))


@pytest.fixture(scope="module")
def edited() -> EditableModel:
    """Three edits; tests must not change it."""
    model = fresh()
    model.edit(REQUESTS, show_progress=False)
    return model


def site(model: EditableModel) -> WiseSite:
    (found,) = model.sites.memories.values()
    assert isinstance(found, WiseSite)
    return found


def logits(model: EditableModel, texts: list[str]) -> torch.Tensor:
    """Logits at the last token of left-padded texts."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    rows = [tokenizer(t)["input_ids"] for t in texts]
    width = max(len(r) for r in rows)
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]


def says(model: EditableModel, prompt: str, cache: bool = True, tokens: int = 6) -> str:
    assert model.tokenizer is not None
    batch = model.tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=tokens, do_sample=False, use_cache=cache)
    return str(model.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :])).strip()


def test_it_says_the_last_edits(edited: EditableModel) -> None:
    before = [says(fresh(), r.filled_prompt) for r in REQUESTS]
    after = [says(edited, r.filled_prompt) for r in REQUESTS]
    assert not any(b.startswith(r.target_new) for b, r in zip(before, REQUESTS, strict=True))
    assert after[2].startswith(REQUESTS[2].target_new), "alone in its shard"
    assert sum(a.startswith(r.target_new) for a, r in zip(after, REQUESTS, strict=True)) >= 2
    for edit in edited.edits:
        assert edit.diagnostics["target_probability_after"] > 0.5 > edit.diagnostics["target_probability_before"]


def test_how_probable_the_first_target_was(edited: EditableModel) -> None:
    """The geometric mean over its tokens, by a forward of the unedited model."""
    request = REQUESTS[0]
    pair = encode_pair(edited.tokenizer, request.filled_prompt, request.target_new)  # type: ignore[arg-type]
    ids = torch.tensor([[*pair.prompt_ids, *pair.target_ids]])
    with edited.disable_edits(), torch.no_grad():
        said = edited.base_model(input_ids=ids).logits[0].log_softmax(-1)
    start = len(pair.prompt_ids)
    each = [said[start - 1 + i, token] for i, token in enumerate(pair.target_ids)]
    before = float(torch.stack(each).mean().exp())
    assert edited.edits[0].diagnostics["target_probability_before"] == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_side_memory_that_is_not_finite_is_refused(edited: EditableModel, value: float) -> None:
    memory = site(edited)
    before, shape = memory.snapshot(), memory.state.candidates[0].delta.shape
    good, bad = torch.zeros(shape), torch.full(shape, value)
    mask = torch.ones(shape, dtype=torch.bool)
    changes = [TrainedEdit("a", "b", None, 1.0, delta, mask, 4) for delta in (good, bad)]
    try:
        with pytest.raises(NonFiniteError, match="WISE"):
            memory.apply("batch", changes, ["x", "y"])
        assert memory.snapshot() is before, "nothing of the batch is taken over"
    finally:
        memory.restore(before)


def test_texts_out_of_scope_are_bit_identical(edited: EditableModel) -> None:
    """A batch that no memory answers goes through the layer untouched."""
    found = logits(edited, TEXTS)
    with edited.disable_edits():
        assert torch.equal(found, logits(edited, TEXTS))


def test_a_mixed_batch_gives_what_its_rows_give_alone(edited: EditableModel) -> None:
    texts = [REQUESTS[2].filled_prompt, TEXTS[0], "Once", REQUESTS[0].filled_prompt]
    together = logits(edited, texts)
    for i, text in enumerate(texts):
        assert torch.allclose(together[i], logits(edited, [text])[0], atol=2e-4), text
    with edited.disable_edits():
        base = logits(edited, texts)
    changed = [not torch.allclose(a, b, atol=1e-3) for a, b in zip(together, base, strict=True)]
    assert changed == [True, False, False, True]


def test_generation_with_and_without_cache_agrees(edited: EditableModel) -> None:
    for text in (REQUESTS[2].filled_prompt, TEXTS[0]):
        assert says(edited, text, cache=True, tokens=10) == says(edited, text, cache=False, tokens=10)


def test_reading_changes_nothing(edited: EditableModel) -> None:
    state, parts = site(edited).state, site(edited).state.parts
    logits(edited, [r.filled_prompt for r in REQUESTS])
    assert site(edited).state is state and state.parts == parts
    assert [len(p.members) for p in parts] == [2, 1]


def test_rolling_back() -> None:
    model = fresh()
    start = logits(model, [r.filled_prompt for r in REQUESTS])
    model.edit(REQUESTS[:2], show_progress=False)
    two = logits(model, [r.filled_prompt for r in REQUESTS])
    ids = [e.id for e in model.edits]
    last = model.edit(REQUESTS[2], show_progress=False).ids[0]
    with pytest.raises(RollbackError, match="rebuild_without"):
        model.rollback(ids[0])
    assert len(model.edits) == 3
    model.rollback(last)
    assert torch.equal(logits(model, [r.filled_prompt for r in REQUESTS]), two)
    model.rollback("all")
    assert torch.equal(logits(model, [r.filled_prompt for r in REQUESTS]), start)
    assert not model.sites.memories


def test_rebuilding_without_an_edit() -> None:
    """The same as if it had never been made."""
    model, never = fresh(), fresh()
    ids = model.edit(REQUESTS, show_progress=False).ids
    never.edit([REQUESTS[0], REQUESTS[2]], show_progress=False)
    again = model.rebuild_without(ids[1], show_progress=False)
    assert [e.id for e in again] == [ids[0], ids[2]] == [e.id for e in model.edits]
    texts = [r.filled_prompt for r in REQUESTS]
    assert torch.equal(logits(model, texts), logits(never, texts))
    model.set_method("ft-m")
    with pytest.raises(RollbackError, match="set_method"):
        model.rebuild_without(ids[0])


def test_saved_edits_load_in_another_process(edited: EditableModel, tmp_path: Path) -> None:
    edited.save_pretrained(tmp_path / "edits")
    texts = [*[r.filled_prompt for r in REQUESTS], TEXTS[0]]
    script = (
        "import sys, torch; from safetensors.torch import save_file; from hf_kedit import EditableModel;"
        "from tests.methods.test_wise import logits, site;"
        "m = EditableModel.from_pretrained(sys.argv[1]); assert len(site(m).state.parts) == 2;"
        "save_file({'logits': logits(m, sys.argv[3:]).contiguous()}, sys.argv[2])"
    )
    out = tmp_path / "logits.safetensors"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "edits"), str(out), *texts], check=True)
    assert torch.equal(load_file(out)["logits"], logits(edited, texts))
    saved = load_file(tmp_path / "edits" / "adapter_model.safetensors")
    path = f"base_model.model.{site(edited).path}"
    assert saved[f"{path}.kedit_wise_side_bits"].dtype == torch.uint8
    assert saved[f"{path}.kedit_wise_mask"].dtype == torch.bool


def test_an_open_shard_goes_on_after_loading(tmp_path: Path) -> None:
    whole, broken = fresh(), fresh()
    whole.edit(REQUESTS[:2], show_progress=False)
    broken.edit(REQUESTS[0], show_progress=False)
    broken.save_pretrained(tmp_path / "edits")
    loaded = EditableModel.from_pretrained(tmp_path / "edits")
    loaded.edit(REQUESTS[1], show_progress=False)
    texts = [r.filled_prompt for r in REQUESTS]
    assert torch.equal(logits(whole, texts), logits(loaded, texts))


def test_replay_keeps_earlier_edits_quiet() -> None:
    calm, loud = (fresh(save_freq=1, merge_freq=1, replay=replay, n_iter=8) for replay in (True, False))
    for model in (calm, loud):
        model.edit(REQUESTS[:2], show_progress=False)
    seen = []
    for model in (calm, loud):
        found = site(model)
        distances: list[torch.Tensor] = []
        route = found.route
        found.route = lambda call, f=found, r=route, d=distances: d.extend(f.distances(call)) or r(call)  # type: ignore[method-assign]
        logits(model, [REQUESTS[0].filled_prompt])
        seen.append(float(distances[1]))
    assert seen[0] < seen[1], "the first edit activates the second memory less"


@pytest.mark.parametrize("values", [{"retrieve": False, "merge_freq": 2, "save_freq": 1}, {"act_on_output": False}])
def test_other_forms_edit_too(values: dict[str, object]) -> None:
    model = fresh(**values)
    model.edit(REQUESTS[:2], show_progress=False)
    assert any(says(model, r.filled_prompt).startswith(r.target_new) for r in REQUESTS[:2])


def test_irrelevant_texts() -> None:
    model = fresh(irrelevant_texts=None, irrelevant_per_edit=3)
    method, request = model._method, REQUESTS[0]
    chosen = method.irrelevant(request, 0)  # type: ignore[attr-defined]
    assert len(chosen) == 3 and not any(str(request.subject) in t for t in chosen)
    assert chosen == method.irrelevant(request, 0) != method.irrelevant(request, 1)  # type: ignore[attr-defined]
    own = EditRequest.from_dict({"prompt": "A is", "target_new": "b", "loc_prompt": "The sky is blue"})
    assert method.irrelevant(own, 0) == ["The sky is blue"]  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match="loc_prompt"):
        model.edit(EditRequest(prompt="A is", target_new="b", metadata={"loc_prompt": " "}))


def test_bad_settings_are_refused() -> None:
    for values in (
        {"save_freq": 3, "merge_freq": 4},
        {"layers": [1, 2]},
        {"mask_ratio": 0},
        {"density": 1.2},
        {"replay": True, "retrieve": False},
        {"irrelevant_texts": []},
        {"merge_alg": "average"},
        {"lr": 0},
        {"act_margin": [1.0, 2.0]},
    ):
        with pytest.raises(ConfigError):
            config(**values)


def test_other_settings_than_the_memories_are_refused(edited: EditableModel) -> None:
    edited.set_method(config(retrieve=False))
    with pytest.raises(ConfigError, match="retrieve"):
        edited.edit(REQUESTS[0].with_id("another"))
    edited.set_method(config())


def test_irrelevant_texts_do_not_name_the_subject() -> None:
    request = REQUESTS[0]
    about = [f"{request.subject} is a person.", f"Nobody knows where {request.subject} lives."]
    model = fresh(irrelevant_texts=[*about, *TEXTS[:2]], irrelevant_per_edit=3)
    drawn = {text for n in range(8) for text in model._method.irrelevant(request, n)}  # type: ignore[attr-defined]
    assert drawn == set(TEXTS[:2])
    other = {text for n in range(8) for text in model._method.irrelevant(REQUESTS[1], n)}  # type: ignore[attr-defined]
    assert set(about) & other, "for another subject they are as good as any"
    nothing_else = fresh(irrelevant_texts=about, irrelevant_per_edit=2)
    assert set(nothing_else._method.irrelevant(request, 0)) == set(about)  # type: ignore[attr-defined]


def test_the_rehearsal_of_earlier_edits() -> None:
    """``[d − α]₊`` for an edit of a finished memory, ``[β − d]₊`` for one of the memory that is written."""
    model = fresh(replay=True, act_ratio=0.5, n_iter=4, merge_freq=2)
    model.edit(REQUESTS, show_progress=False)
    found, method = site(model), model._method
    (past,), (current,) = found.state.memories, [m for part in found.state.unmerged for m in part.members]
    alpha, beta, _ = model.edit_config.act_margin  # type: ignore[attr-defined]
    weight = get_weight(get_module(model.base_model, found.path))
    nothing = torch.zeros(weight.shape)
    extra = method._replay(found, 3)  # type: ignore[attr-defined]
    assert float(extra(0, nothing)) == pytest.approx(beta), "at no distance the open memory is not heard at all"

    large = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 3

    def distance(member: Any) -> torch.Tensor:
        """Mean over the tokens of how far ``Δ`` moves the layer's output under its activation."""
        ids = torch.tensor([encode_pair(model.tokenizer, member.prompt, member.target).ids])
        seen: dict[str, torch.Tensor] = {}
        layer = get_module(model.base_model, found.path)
        handle = layer.register_forward_hook(lambda m, a, o: seen.update(k=a[0][0], v=o[0]), prepend=True)
        with model.disable_edits(), torch.no_grad():
            model(input_ids=ids)
        handle.remove()
        sigma = torch.nn.functional.gelu
        moved = sigma(seen["v"] + seen["k"] @ large.T, approximate="tanh") - sigma(seen["v"], approximate="tanh")
        return moved.norm(dim=-1).mean()

    heard = distance(current)
    assert heard > beta and distance(past.members[0]) > alpha
    expected = [float(distance(member) - alpha) for member in past.members]
    steps = [float(extra(step, large)) for step in range(2)]
    assert sorted(steps) == pytest.approx(sorted(expected), rel=1e-3), "and nothing for the open one, which is heard"
