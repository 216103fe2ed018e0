"""Edits as a set: the result depends on the facts alone; passes, conflicts, failures, saving."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import AutoEditConfig, EditableModel, EditRequest, ROMEConfig
from hf_kedit.editing.edit_set import FactSet
from hf_kedit.engine.capture import Tap
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.sweep import Sweep
from hf_kedit.engine.weights import get_module, get_weight, model_digest
from hf_kedit.errors import ConfigError, EditFailedError, RollbackError
from hf_kedit.methods.joint import JointSolve
from hf_kedit.methods.locate_then_edit import mean_key
from hf_kedit.methods.spread import SpreadMethod
from hf_kedit.values.optimise import optimise_values
from tests.methods.test_family import deltas, facts, says
from tests.statistics.test_workers import run_two

MODEL = "kedit/world-gpt2"
METHODS = ("memit", "memit-fe", "core", "namet", "emmet", "pmet", "alphaedit", "sphere")


def make(method: str = "memit", name: str = MODEL, **values: Any) -> EditableModel:
    settings = {"sequence": "joint", "joint_passes": 3, "joint_caution": 5.0, "joint_until": 0.95} | values
    return EditableModel.from_pretrained(name, AutoEditConfig.for_model(name.partition("/")[2], method, **settings))


def edit(model: EditableModel, *parts: list[EditRequest]) -> str:
    for part in parts:
        model.edit(part, show_progress=False)
    return model_digest(model.base_model)


def named(requests: list[EditRequest]) -> list[EditRequest]:
    return [r.with_id(f"fact-{i}") for i, r in enumerate(requests)]


# ---------------------------------------------------------------------- a function of the set


@pytest.mark.parametrize(
    "method",
    [
        "memit",
        "pmet",
        *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name not in {"memit", "pmet"}),
    ],
)
def test_order_batches_and_what_was_taken_back_leave_no_trace(method: str, tmp_path: Path) -> None:
    rows = named(facts(5))
    kept = [rows[i] for i in (0, 2, 3)]
    expected = edit(make(method), kept)
    longer = make(method)
    assert edit(longer, [rows[4]], [rows[3], rows[1]], [rows[0], rows[2]]) == edit(make(method), rows) != expected
    longer.save_pretrained(tmp_path / "set")
    longer.rollback([rows[1].id, rows[4].id])
    assert model_digest(longer.base_model) == expected
    loaded = EditableModel.from_pretrained(tmp_path / "set")
    loaded.rollback([rows[4].id, rows[1].id])
    assert model_digest(loaded.base_model) == expected
    assert [e.id for e in loaded.edits] == [e.id for e in longer.edits] == [rows[i].id for i in (3, 0, 2)]
    loaded.rollback("all")
    assert model_digest(loaded.base_model) == model_digest(EditableModel.from_pretrained(MODEL).base_model)
    assert not loaded.method_state(), "what belongs to no edit is not kept"


@pytest.mark.slow
def test_a_model_with_bos_and_rms_norm_likewise() -> None:
    rows = named(facts(4))
    one = make(name="kedit/world-llama")
    two = make(name="kedit/world-llama")
    assert edit(one, rows) == edit(two, rows[2:], rows[:2])
    one.rollback(rows[0].id)
    assert model_digest(one.base_model) == edit(make(name="kedit/world-llama"), rows[1:])


def test_values_of_the_first_pass_are_found_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows, found = named(facts(4)), []
    real = JointSolve.find_first_values

    def counting(solve: JointSolve) -> None:
        before = set(solve.method.first_values._known)
        real(solve)
        found.append(len(set(solve.method.first_values._known) - before))

    monkeypatch.setattr(JointSolve, "find_first_values", counting)
    model = make()
    edit(model, rows[:3], rows[3:])
    model.save_pretrained(tmp_path / "set")
    model.rollback(rows[0].id)
    EditableModel.from_pretrained(tmp_path / "set").rollback(rows[1].id)
    assert found == [3, 1, 0, 0]
    model.set_method(replace(model.edit_config, mom2_update_weight=900.0))  # type: ignore[call-arg]
    model.resolve_all(show_progress=False)
    assert found[4:] == [0], "λ is no matter of the values"
    model.set_method(replace(model.edit_config, v_lr=0.4))  # type: ignore[call-arg]
    model.resolve_all(show_progress=False)
    assert found[5:] == [3]


def test_batches_become_a_set() -> None:
    rows = named(facts(4))
    model = make(sequence="batches")
    before = edit(model, rows[:2], rows[2:])
    model.edit(prompt="{} plays the sport of", subject="Nobody Inhere", target_new="chess", id="late")
    model.rollback("late")
    result = model.resolve_all(show_progress=False)
    assert result.ids == [r.id for r in rows]
    assert before != model_digest(model.base_model) == edit(make(), rows)
    assert all(e.joint and e.batch_id.startswith("joint-") for e in model.edits)
    model.rollback(1)
    assert model_digest(model.base_model) == edit(make(), rows[:3])
    late = model.edit(facts(1, start=5), show_progress=False)  # "batches" again: on top of the set
    model.rollback(rows[0].id)
    model.rollback(late.ids)
    assert model_digest(model.base_model) == edit(make(), rows[1:3])


def test_edits_of_other_methods_stay_where_they_are() -> None:
    rows = named(facts(3))
    model = make()
    edit(model, rows[:2])
    alone = deltas(model)
    model.set_method("ft-m")
    model.edit(facts(1, start=4), show_progress=False)
    trained = {k: v - alone.get(k, 0) for k, v in deltas(model).items()}
    model.set_method(make().edit_config)
    edit(model, rows[2:])
    expected = make()
    edit(expected, rows)
    for key, change in deltas(expected).items():
        assert torch.allclose(deltas(model)[key] - trained.get(key, 0), change, atol=1e-6)


SHARED = """
import sys
import torch
from safetensors.torch import save_file
from hf_kedit.statistics.workers import join
from tests.methods.test_joint import deltas, facts, make, named

torch.set_num_threads(1)
model = make(sequence="batches")
model.statistics.workers = workers = join()
model.edit(named(facts(1)), show_progress=False)
model.set_method(make().edit_config)
optimised = []
real = model._method.optimise
model._method.optimise = lambda rows, *rest, **named: optimised.append(len(rows)) or real(rows, *rest, **named)
model.edit(named(facts(5))[1:], show_progress=False)
save_file({**deltas(model), "optimised": torch.tensor(optimised)}, sys.argv[1])
workers.wait()
"""


@pytest.mark.slow
def test_two_processes_share_the_values_and_get_what_one_gets(tmp_path: Path) -> None:
    found = run_two(SHARED, tmp_path)
    alone = make()
    edit(alone, named(facts(5)))
    counts = [part.pop("optimised").tolist() for part in found]
    assert counts[0][:3] == [1, 1, 1] and set(counts[0][3:]) == {3}, "first values one by one, then the whole share"
    assert counts[1][:2] == [1, 1] and set(counts[1][2:]) == {2}
    for key, change in deltas(alone).items():
        assert torch.equal(found[0][key], found[1][key])
        assert (found[0][key] - change).norm() <= 1e-6 * change.norm()


# ---------------------------------------------------------------------- what is solved


def test_one_pass_with_the_usual_weight_is_a_batch() -> None:
    rows = facts(4)
    one, batch = make(joint_passes=1, joint_caution=1.0), make(sequence="batches")
    edit(one, rows)
    edit(batch, rows)
    for key, change in deltas(batch).items():
        assert (deltas(one)[key] - change).norm() <= 1e-4 * change.norm()


def test_two_passes_by_hand() -> None:
    """One layer, so that its keys stay: W = W₀ + (R₁ + Z₂ − H₂) Aᵀ, with Z₂ optimised on the model with R₁ Aᵀ."""
    rows, weight = facts(3), 200.0
    model = make(layers=[2], joint_passes=2, joint_caution=1.0, mom2_update_weight=weight, joint_until=0.999)
    method: Any = model._method
    base, module = model.base_model, model.anatomy.down(2).path
    groups = method.templates()
    runs = method.rows(rows, groups)
    flat = [row for group in runs for row in group if not row.is_drift]
    tap, block = Tap(module, "input"), model.anatomy.layers[2].path

    def look() -> torch.Tensor:
        with frozen_eval(base):
            values = optimise_values(
                base, model.anatomy, runs, 2, "block", replace(method.value_settings(), holds_from=0.999)
            )
        return values.offset

    with frozen_eval(base):
        keys = Sweep(base, model.anatomy, flat).read([tap], 0)[tap].view(3, -1, model.anatomy.down(2).in_features)
    k = mean_key(keys, groups).T.double()
    moment = model.statistics.moments([module])[module].mean()
    a = torch.linalg.solve(weight * moment + k @ k.T, k).float()
    original = get_weight(get_module(base, module)).clone()
    r = look().T.clone()
    layer: Any = get_module(base, module)
    with torch.no_grad():
        layer.weight.copy_((original + r @ a.T).T)  # GPT-2 stores its projections transposed
    r += look().T
    with torch.no_grad():
        layer.weight.copy_(original.T)
    edit(model, rows)
    change = get_weight(get_module(base, module)) - original
    assert block and (change - r @ a.T).norm() <= 1e-3 * change.norm()


def test_a_fact_that_holds_is_not_written_again() -> None:
    rows = facts(4)
    model = make(joint_passes=6, joint_caution=1.0)
    result = model.edit(rows, show_progress=False)
    how = [e.joint for e in result.edits]
    assert all(h is not None and h["holds"] and 1 <= h["passes"] < 6 for h in how), how
    assert all(says(model, r.filled_prompt, r.target_new) for r in rows)
    few = make(joint_passes=1, joint_caution=1000.0)
    weak = [e.joint for e in few.edit(rows, show_progress=False).edits]
    assert not any(h is None or h["holds"] for h in weak) and max(h["probability"] for h in weak if h) < 0.9
    known = EditRequest(prompt=rows[0].prompt, subject=rows[0].subject, target_new=rows[0].ground_truth[0])
    edits = make(joint_passes=2).edit([known, rows[1]], show_progress=False).edits
    assert edits[0].joint is not None and edits[0].joint["passes"] <= edits[1].joint["passes"]  # type: ignore[index]


def test_passes_and_the_bound_may_be_given_and_are_remembered() -> None:
    rows = named(facts(3))
    model = make(joint_caution=20.0)
    edit(model, rows)
    seen: list[int] = []
    model.resolve_all(2, 0.6, after_pass=seen.append, show_progress=False)
    assert seen == [1, 2]
    model.rollback(rows[0].id)
    other = make(joint_caution=20.0, joint_passes=2, joint_until=0.6)
    assert model_digest(model.base_model) == edit(other, rows[1:])


# ---------------------------------------------------------------------- conflicts


def test_the_later_of_two_edits_of_one_fact_counts_until_it_is_taken_back(tmp_path: Path) -> None:
    rows = named(facts(3))
    again = replace(rows[0], id="again", target_new="Brindle")
    model = make()
    first = edit(model, rows)
    result = model.edit(again, show_progress=False)
    assert result.ids == ["again"] and [c.kind for c in result.conflicts] == ["contradiction"]
    assert result.conflicts[0].edit_ids == ("again", rows[0].id)
    assert result.conflicts[0].targets == ("Brindle", rows[0].target_new)
    silent = model.journal.get(str(rows[0].id)).joint
    assert silent is not None and silent["silent"]
    assert model_digest(model.base_model) == edit(make(), [again, rows[1], rows[2]])
    model.save_pretrained(tmp_path / "set")
    loaded = EditableModel.from_pretrained(tmp_path / "set")
    for each in (model, loaded):
        each.rollback("again")
        assert model_digest(each.base_model) == first


def test_what_goes_together_and_what_does_not() -> None:
    def fact(name: str, prompt: str, target: str, *rephrased: str, **probes: Any) -> EditRequest:
        return EditRequest(
            prompt=prompt,
            subject="Ada",
            target_new=target,
            rephrase_prompts=list(rephrased),
            id=name,
            portability=probes,
        )

    probe = {"prompt": "The native town of Ada is", "ground_truth": ["Rome"]}
    chosen = FactSet.of(
        [
            fact("a", "Ada was born in", "Oslo"),
            fact("b", "Ada  was born in", "oslo"),  # again, spelt otherwise
            fact("c", "The birthplace of Ada is", "Rome", "Ada was born in", Subject_Aliasing=[probe]),
            fact("d", "The native town of Ada is", "Bonn"),
            fact("e", "Ada plays", "chess"),
            fact("f", "Ada plays", "Chess"),
        ]
    )
    assert [r.id for r in chosen.facts] == ["f", "d", "c"] and [r.id for r in chosen.silent] == ["e", "b", "a"]
    kinds = [(c.kind, c.edit_ids, c.targets) for c in chosen.conflicts]
    assert kinds == [
        ("repetition", ("f", "e"), ("Chess", "chess")),
        ("contradiction", ("c", "b"), ("Rome", "oslo")),
        ("contradiction", ("c", "a"), ("Rome", "Oslo")),
        ("Subject_Aliasing", ("c", "d"), ("Rome", "Bonn")),
    ]


# ---------------------------------------------------------------------- all or nothing


@pytest.mark.parametrize("error", [EditFailedError, KeyboardInterrupt])
@pytest.mark.parametrize("verb", ["edit", "resolve_all", "rollback"])
def test_what_fails_half_way_changes_nothing(
    error: type[BaseException], verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = named(facts(3))
    model = make()
    before = edit(model, rows[:2])
    journal, state = model.edits, model.method_state()
    real, calls = SpreadMethod.share, []

    def failing(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:  # in the middle of the second pass
            raise error("no")
        return real(*args)

    monkeypatch.setattr(SpreadMethod, "share", failing)
    verbs: dict[str, Any] = {
        "edit": lambda: model.edit(rows[2:], show_progress=False),
        "resolve_all": lambda: model.resolve_all(show_progress=False),
        "rollback": lambda: model.rollback(rows[0].id),
    }
    with pytest.raises(error):
        verbs[verb]()
    monkeypatch.undo()
    assert model_digest(model.base_model) == before and model.edits == journal
    assert all(torch.equal(value, model.method_state()[name]) for name, value in state.items())
    assert edit(model, rows[2:]) == edit(make(), rows)


def test_a_fact_without_a_value_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = named(facts(3))
    real = JointSolve.find_first_values

    def failing(solve: JointSolve) -> None:
        if any(r.id == rows[1].id for r in solve.requests):
            raise EditFailedError("no value")
        real(solve)

    monkeypatch.setattr(JointSolve, "find_first_values", failing)
    model = make()
    with pytest.raises(EditFailedError):
        model.edit(rows, show_progress=False)
    result = model.edit(rows, on_error="skip", show_progress=False)
    assert result.ids == [rows[0].id, rows[2].id] and [r.id for r, _ in result.failed] == [rows[1].id]
    monkeypatch.undo()
    assert model_digest(model.base_model) == edit(make(), [rows[0], rows[2]])


def test_what_cannot_be_a_set_says_so() -> None:
    for method in ("rome", "r-rome", "eamet"):
        with pytest.raises(ConfigError, match="sequence"):
            AutoEditConfig.for_method(method, sequence="joint")
    model = EditableModel.from_pretrained(MODEL, ROMEConfig())
    with pytest.raises(ConfigError, match=r"set_method"):
        model.resolve_all()
    model = make()
    edit(model, named(facts(2)))
    for bad in ((0, None), (None, 0.0), (None, 1.5), (True, None)):
        with pytest.raises(ConfigError, match="iterations"):
            model.resolve_all(*bad)
    assert model.resolve_all(1, show_progress=False).ids == ["fact-0", "fact-1"]
    model.set_method("alphaedit")
    before = model_digest(model.base_model)
    with pytest.raises(RollbackError, match="'memit'"):
        model.rollback("fact-0")
    assert model_digest(model.base_model) == before
    model.rollback("all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.resolve_all().edits == []


def test_full_rank_changes_are_a_set_too() -> None:
    """RECT makes one dense change of all facts, of which none can be taken out; a set is solved for again."""
    rows = named(facts(3))
    model = make(rect_keep=0.3, joint_passes=1)
    edit(model, rows)
    model.rollback(rows[1].id)
    assert model_digest(model.base_model) == edit(make(rect_keep=0.3, joint_passes=1), [rows[2], rows[0]])
