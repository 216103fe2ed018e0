"""DEFER and MELO on the fact world: they say the new, everything else stays bit for bit, undoing, files, bad input."""

from __future__ import annotations

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

from hf_kedit import DEFERConfig, EditableModel, EditConfig, EditRequest, MELOConfig
from hf_kedit.errors import ArtifactError, ConfigError, EditFailedError, LayerError, MergeError, RollbackError
from hf_kedit.evaluation.asking.scoring import score_pairs
from hf_kedit.methods.melo import Block, BlockDatabase, MELOChange
from tests.methods.at_sites import facts, learnt, neighbours, prompt_logits, says, without_trace

WORLD = "kedit/world-gpt2"
CONFIGS: dict[str, EditConfig] = {
    "defer": DEFERConfig(layers=[3], lr=1e-2, num_steps=25),
    "melo": MELOConfig(layers=[2], radius=1.0, num_blocks=100, num_steps=25),
}


@pytest.fixture(params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> EditableModel:
    return EditableModel.from_pretrained(WORLD, CONFIGS[request.param])


def test_every_way_of_generating_is_one(model: EditableModel) -> None:
    (fact,) = facts(1)
    plain = prompt_logits(model, fact.filled_prompt)
    model.edit(fact)
    assert learnt(model, [fact]) == [True]
    prompts = [fact.filled_prompt, neighbours([fact])[0]]
    together = says(model, prompts)
    assert [says(model, [p])[0] for p in prompts] == together
    assert says(model, prompts, use_cache=False) == together
    assert says(model, prompts, num_beams=2)[0].startswith(fact.target_new)
    assert says(model, prompts, do_sample=True, top_k=1, num_return_sequences=2) == [t for t in together for _ in "ab"]
    assert score_pairs(model, model.tokenizer, [(fact.filled_prompt, fact.target_new)])[0].exact
    with model.disable_edits():
        assert torch.equal(prompt_logits(model, fact.filled_prompt), plain)
    with pytest.raises(MergeError, match="at run time"):
        model.merge_and_unload()
    model.rollback("all")
    assert torch.equal(prompt_logits(model, fact.filled_prompt), plain) and without_trace(model)


def test_a_forward_changes_nothing(model: EditableModel) -> None:
    wanted = facts(1)
    model.edit(wanted)
    before = {k: v.clone() for k, v in {**model.base_model.state_dict(), **model.sites.tensors()}.items()}
    said = json.dumps(model.sites.describe())
    model.base_model.train()
    says(model, [wanted[0].filled_prompt, *neighbours(wanted)])
    model.base_model.eval()
    after = {**model.base_model.state_dict(), **model.sites.tensors()}
    assert all(torch.equal(after[k], v) for k, v in before.items()) and json.dumps(model.sites.describe()) == said


def test_a_fresh_process_takes_the_same_routes(model: EditableModel, tmp_path: Path) -> None:
    wanted = facts(2)
    ids = model.edit(wanted, batch_size=1).ids
    model.save_pretrained(tmp_path / "edits")
    prompts = [wanted[0].filled_prompt, wanted[1].filled_prompt, *neighbours(wanted)]
    encoded = [model.tokenizer(p)["input_ids"] for p in prompts]  # type: ignore[misc]
    save_file({str(i): prompt_logits(model, p) for i, p in enumerate(prompts)}, tmp_path / "expected.safetensors")
    script = f"""
import torch
from safetensors.torch import load_file
from hf_kedit import EditableModel
model = EditableModel.from_pretrained({str(tmp_path / "edits")!r})
expected = load_file({str(tmp_path / "expected.safetensors")!r})
for i, ids in enumerate({encoded!r}):
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.tensor([ids])).logits, expected[str(i)]), i
assert [e.id for e in model.edits] == {ids!r}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_failed_call_changes_nothing(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *rest = facts(3)
    model.edit(first)
    before, said = prompt_logits(model, first.filled_prompt), json.dumps(model.sites.describe())
    kind = type(model._method)
    train, calls = kind._train, []  # type: ignore[attr-defined]

    def interrupted(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(self, *args)

    monkeypatch.setattr(kind, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.edit(rest, batch_size=1)
    assert len(calls) == 2 and json.dumps(model.sites.describe()) == said
    assert torch.equal(prompt_logits(model, first.filled_prompt), before)


def test_defers_edits_go_together() -> None:
    model = EditableModel.from_pretrained(WORLD, CONFIGS["defer"])
    wanted = facts(2)
    ids = model.edit(wanted).ids
    before = prompt_logits(model, wanted[1].filled_prompt)
    with pytest.raises(RollbackError, match=r"all of them back.*rebuild_without"):
        model.rollback(ids[0])
    assert torch.equal(prompt_logits(model, wanted[1].filled_prompt), before) and len(model.edits) == 2
    ids = [edit.id for edit in model.rebuild_without(ids[0])]
    assert len(model.edits) == 1 and learnt(model, wanted[1:]) == [True]
    model.edit(wanted[0])
    ids = [edit.id for edit in model.edits]
    model.set_method(DEFERConfig(layers=[3], threshold=0.7))
    with pytest.raises(ConfigError, match=r"threshold=0\.5"):
        model.edit(facts(1, start=2))
    model.rollback(ids)
    assert without_trace(model)
    with pytest.raises(ConfigError, match="less than 1"):
        DEFERConfig(threshold=1.5)


# ---------------------------------------------------------------------- MELO


def database_of(model: EditableModel) -> BlockDatabase:
    (database,) = model.sites.memories.values()
    assert isinstance(database, BlockDatabase)
    return database


def test_one_melo_edit_of_several_is_taken_back() -> None:
    model = EditableModel.from_pretrained(WORLD, CONFIGS["melo"])
    wanted = facts(3)
    plain = [prompt_logits(model, f.filled_prompt) for f in wanted]
    near = [prompt_logits(model, p) for p in neighbours(wanted)]
    ids = model.edit(wanted, batch_size=1).ids
    assert all(learnt(model, wanted)) and list(database_of(model).blocks) == [0, 1, 2]
    assert all(torch.equal(prompt_logits(model, p), x) for p, x in zip(neighbours(wanted), near, strict=True))
    edited = [prompt_logits(model, f.filled_prompt) for f in wanted]
    model.rollback(ids[1])
    assert torch.equal(prompt_logits(model, wanted[1].filled_prompt), plain[1])
    for i in (0, 2):
        assert torch.equal(prompt_logits(model, wanted[i].filled_prompt), edited[i])
    again = model.edit(wanted[1]).edits[0]
    assert again.diagnostics["block"] == 1 and all(learnt(model, wanted))
    model.rollback("all")
    assert all(torch.equal(prompt_logits(model, f.filled_prompt), x) for f, x in zip(wanted, plain, strict=True))
    assert without_trace(model)


def test_the_same_prompt_again() -> None:
    model = EditableModel.from_pretrained(WORLD, CONFIGS["melo"])
    (fact,) = facts(1)
    other = next(f for f in facts(12) if f.target_new != fact.target_new)
    first = model.edit(fact)
    plain = prompt_logits(model, fact.filled_prompt)
    again = EditRequest(prompt=fact.prompt, subject=fact.subject, target_new=other.target_new)
    second = model.edit(again)
    assert second.edits[0].diagnostics["action"] == "overwrite"
    assert second.edits[0].diagnostics["forgets"] == first.ids and learnt(model, [again]) == [True]
    model.rollback(second.ids)
    assert torch.equal(prompt_logits(model, fact.filled_prompt), plain)


def test_requests_of_a_call_share_a_block() -> None:
    model = EditableModel.from_pretrained(WORLD, MELOConfig(layers=[2], radius=3.0, num_blocks=2, num_steps=3))
    result = model.edit(facts(2))
    assert {e.diagnostics["block"] for e in result.edits} == {0}
    model.rollback(result.ids[0])
    assert list(database_of(model).blocks) == [0]
    model.edit(facts(1, start=2))
    before = json.dumps(model.sites.describe())
    with pytest.raises(EditFailedError, match="all 2 blocks"):
        model.edit(facts(1, start=3))
    assert json.dumps(model.sites.describe()) == before
    model.set_method(MELOConfig(layers=[2], radius=9.0, num_blocks=2))
    with pytest.raises(ConfigError, match=r"radius=3\.0"):
        model.edit(facts(1, start=3))


def test_layers_that_cannot_be() -> None:
    model = EditableModel.from_pretrained(WORLD, "ft-m")
    for config, error, message in [
        (MELOConfig(layers=[5]), ConfigError, "must come after"),
        (MELOConfig(layers=[3], target_modules=["transformer.h.2.mlp.c_proj"]), ConfigError, "must come after"),
        (MELOConfig(layers=[3], target_modules=["transformer.h.9.mlp.c_proj"]), LayerError, "no module"),
        (MELOConfig(layers=[3], module="transformer.h.{}.mlp.c_prod"), LayerError, "no module"),
    ]:
        with pytest.raises(error, match=message):
            model.set_method(config).edit(facts(1))
    assert without_trace(model) and not model.edits


def test_damaged_melo_folders(tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(WORLD, MELOConfig(layers=[2], radius=3.0, num_steps=1))
    model.edit(facts(2), batch_size=1)
    model.save_pretrained(tmp_path)
    good = (tmp_path / "edit_config.json").read_text()
    for change, message in [
        (lambda s: s.update(paths=s["paths"][:1]), "layers"),
        (lambda s: s.update(blocks=[0, 1, 2]), "divide"),
        (lambda s: s["edits"][0].update(block=7), "belong together"),
        (lambda s: s["edits"].pop(), "belong together"),
        (lambda s: s.pop("radius"), "damaged"),
    ]:
        config = json.loads(good)
        change(config["books"]["adapter"]["memories"][0]["state"])
        (tmp_path / "edit_config.json").write_text(json.dumps(config))
        with pytest.raises(ArtifactError, match=message):
            EditableModel.from_pretrained(tmp_path)


ROW = st.tuples(st.floats(0.0, 6.0), st.sampled_from([(1,), (2,)]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(ROW, min_size=1, max_size=2), min_size=2, max_size=6), st.data())
def test_clusters_follow_from_what_is_left(calls: list[Any], data: Any) -> None:
    def fill(skip: set[str]) -> BlockDatabase:
        made = BlockDatabase(["query", "target"], 1.0, 50)
        for number, rows in enumerate(calls):
            left = [(f"{number}.{i}", place, target) for i, (place, target) in enumerate(rows)]
            left = [row for row in left if row[0] not in skip]
            if not left:
                continue
            queries = torch.tensor([[10 + place, 0.0] for _, place, _ in left])
            block = Block(torch.full((2, 1), float(number)), torch.zeros(1, 2))
            change = MELOChange(number, {"target": block}, queries, tuple(t for _, _, t in left))
            made.apply(f"call {number}", [change], [row[0] for row in left])
        return made

    whole = fill(set())
    before = whole.snapshot()
    ids = whole.edit_ids
    gone = data.draw(st.sets(st.sampled_from(ids), min_size=1, max_size=len(ids) - 1))
    whole.remove(sorted(gone))
    fresh = fill(gone)
    assert whole.edit_ids == fresh.edit_ids and list(whole.blocks) == list(fresh.blocks)
    probes = torch.tensor([[10 + p / 4, 0.0] for p in range(28)])
    assert torch.equal(whole.route(probes), fresh.route(probes))
    whole.restore(before)
    assert whole.edit_ids == ids and torch.equal(whole.route(probes), fill(set()).route(probes))
