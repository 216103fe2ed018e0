"""A search on the embedded models: what it finds, what it leaves untouched, and that it can be killed at any time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import AutoEditConfig, EditableModel, calibrate, load_edit_dataset, load_requests
from hf_kedit.config import ModelProfile
from hf_kedit.config.hparams import find_hparams, user_hparams
from hf_kedit.errors import TuneError
from hf_kedit.evaluation import generate_answers
from hf_kedit.methods import registered_methods
from hf_kedit.methods.grace import GRACEConfig
from hf_kedit.tuning import TuneResult, TuneScore, search_settings
from hf_kedit.tuning.facts import choose_facts
from hf_kedit.tuning.logbook import Logbook
from hf_kedit.tuning.scores import GENERAL
from hf_kedit.tuning.trials import Stopwatch, Trials

SMALL: dict[str, Any] = {
    "candidates": 4,
    "first_facts": 2,
    "search_facts": 4,
    "held_out": 4,
    "facts": load_requests(load_edit_dataset("world", split="validation", limit=16)),
    "packaged": False,
    "show_progress": False,
}


SEARCHED = (
    "adalora alphaedit anyedit calinet core defer dinm dpo eamet emmet ft-l ft-m grace ike kn lora melo memit memit-fe"
    " namet pmet prompt r-rome rome simie sphere t-patcher ultraedit unke wise"
).split()


def bits(model: EditableModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def subjects(facts: Any) -> set[str]:
    return {str(fact.subject) for fact in facts}


def told(found: TuneResult) -> dict[str, Any]:
    """Everything that a search says but how long it took."""
    return {name: value for name, value in found.to_dict().items() if name != "seconds"}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneResult, EditableModel, dict[str, torch.Tensor]]:
    """GRACE, whose edits take no time, on world-gpt2; the model, and its bits before."""
    model = EditableModel.from_pretrained("kedit/world-gpt2", "memit")
    before = bits(model)
    found = search_settings(model, "grace", folder=tmp_path_factory.mktemp("log"), **SMALL)
    return found, model, before


def test_the_model_is_as_it_was(searched: tuple[TuneResult, EditableModel, dict[str, torch.Tensor]]) -> None:
    found, model, before = searched
    assert found.edits >= 16
    assert same_bits(bits(model), before)
    assert model.method_name == "memit" and not model.edits and not model.ledger.accounts


def test_nothing_of_the_search_is_in_the_check(searched: tuple[TuneResult, Any, Any]) -> None:
    facts = searched[0].facts
    assert len(facts.search) == len(facts.held_out) == 4
    assert not subjects(facts.search) & subjects(facts.held_out)
    assert not {f.filled_prompt for f in facts.search} & {f.filled_prompt for f in facts.held_out}
    assert all(fact.locality[GENERAL] for fact in (*facts.search, *facts.held_out))


def test_the_derived_settings_are_the_first_and_never_beaten_by_the_result(
    searched: tuple[TuneResult, EditableModel, Any],
) -> None:
    found, model, _ = searched
    assert not found.tried[0].changes and len(found.tried) == SMALL["candidates"]
    assert found.derived_config == AutoEditConfig.for_method("grace").complete(
        dataclasses.replace(model.profile, name="")
    )
    assert found.best.score.harmonic >= found.derived.score.harmonic
    assert found.best.score.n == found.derived.score.n == len(found.facts.search)


def test_a_file_says_what_a_second_measurement_says(
    searched: tuple[TuneResult, EditableModel, Any], tmp_path: Path
) -> None:
    """The figures in the header are measured again, with nothing of the first measurement at hand."""
    found, model, _ = searched
    text = found.write(tmp_path / "grace.yaml").read_text(encoding="utf-8")
    header = [line.removeprefix("# ").split() for line in text.splitlines() if line.startswith("# ")]
    trials = Trials(model, Logbook(None), Stopwatch(None, lambda: 0.0, False, ""))
    again = TuneScore.of(trials.measure(found.derived_config, found.facts.held_out, share=1.0))
    (harmonic,) = [words[2:] for words in header if words[:2] == ["harmonic", "mean"]]
    assert harmonic[0] == f"{100 * again.harmonic:.1f}"
    for name, value in again.figures.items():
        (numbers,) = [words[2:] for words in header if words[:2] == name.split()]
        assert numbers[0] == f"{100 * value:.1f}", name
    assert again.figures["reliability, likelihood"] > 0 and "Source: kedit tune" in text
    assert model.base_fingerprint() in text
    model.set_method("memit")


def test_a_killed_search_goes_on_to_the_same_result(
    searched: tuple[TuneResult, EditableModel, Any], tmp_path: Path
) -> None:
    """Interrupted in the middle of an edit, its log cut off in the middle of a line; then the same call again."""
    whole, model, before = searched
    log = tmp_path / "logbook.jsonl"

    def interrupting() -> float:
        if log.exists() and log.read_bytes().count(b'"settings"') >= 5:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        search_settings(model, "grace", folder=tmp_path, minutes=1e6, clock=interrupting, **SMALL)
    assert same_bits(bits(model), before) and model.method_name == "memit" and not model.edits
    log.write_bytes(log.read_bytes()[:-20])
    resumed = search_settings(model, "grace", folder=tmp_path, **SMALL)
    assert told(resumed) == told(whole)
    keys = [line.split('"')[3] for line in log.read_text(encoding="utf-8").splitlines()]
    (twice,) = {key for key in keys if keys.count(key) > 1}  # the one whose line was cut off
    assert keys.count(twice) == 2


def test_a_finished_search_is_not_repeated(tmp_path: Path) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    options = SMALL | {"candidates": 2, "search_facts": 2, "held_out": 2}
    first = search_settings(model, "grace", folder=tmp_path, **options)
    size = (tmp_path / "logbook.jsonl").stat().st_size
    again = search_settings(model, "grace", folder=tmp_path, **options)
    assert told(again) == told(first) and (tmp_path / "logbook.jsonl").stat().st_size == size
    search_settings(model, "grace", folder=tmp_path, fresh=True, **options)
    assert (tmp_path / "logbook.jsonl").stat().st_size == size


def test_a_bad_derived_default_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A learning rate with which no edit holds: the search finds one with which they do, and the check confirms it."""
    monkeypatch.setattr(GRACEConfig, "cautious", lambda self, profile: {"lr": 1e-6})
    monkeypatch.setattr(GRACEConfig, "search_space", lambda self, profile, traced: {"lr": [2e-6, 1.0]})
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    found = search_settings(model, "grace", folder=tmp_path, **SMALL)
    assert found.derived.score.figures["reliability, likelihood"] <= 0.25
    assert found.replaced and found.config.lr == 1.0  # type: ignore[attr-defined]
    assert found.check_best is not None and found.check_best.figures["reliability, likelihood"] == 1
    assert found.gain is not None and found.gain.mean > 0 and found.gain.low is not None
    assert f"by {100 * found.gain.mean:.1f} points" in found.verdict


def test_derived_settings_that_nothing_beats_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(GRACEConfig, "search_space", lambda self, profile, traced: {"lr": [1e-6]})
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    found = search_settings(model, "grace", folder=tmp_path, **SMALL | {"candidates": 2})
    assert not found.replaced and found.config == found.derived_config
    assert found.verdict.startswith("The derived settings are kept: no other settings were better")
    assert "derived" in found.to_yaml() and found.check_derived is not None and found.check_best is None


def test_the_budget_ends_the_search_and_the_check(tmp_path: Path) -> None:
    """A clock that goes on by a minute with every look: the search stops in time, and says what it could not do."""
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    seconds = iter(range(0, 10**6, 60))
    found = search_settings(model, "grace", folder=tmp_path, minutes=20, clock=lambda: float(next(seconds)), **SMALL)
    assert found.edits < 20 and found.seconds <= 60 * 40
    assert found.check_derived is None or found.check_derived.n <= 4
    with pytest.raises(TuneError, match="not even time"):
        search_settings(model, "melo", folder=tmp_path, minutes=1, clock=lambda: float(next(seconds)), **SMALL)


def test_settings_are_found_by_name_afterwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEDIT_HOME", str(tmp_path / "home"))
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    config = calibrate(model, "grace", **SMALL | {"candidates": 2, "search_facts": 2, "held_out": 2})
    found = find_hparams("grace", "kedit/world-gpt2")
    assert found is not None and found[0] == user_hparams() / "GRACE" / "world-gpt2.yaml"
    assert EditableModel.from_pretrained("kedit/world-gpt2", "grace").edit_config == config
    assert (tmp_path / "home" / "tune").is_dir()


def test_derived_settings_do_not_take_the_place_of_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file's settings are tried, too; where neither they nor others are better, the file stays what is found."""
    monkeypatch.setenv("KEDIT_HOME", str(tmp_path))
    packaged = AutoEditConfig.for_model("world-gpt2", "grace")
    monkeypatch.setattr(GRACEConfig, "search_space", lambda self, profile, traced: {"lr": [1e-6]})
    monkeypatch.setattr("hf_kedit.tuning.scores.TuneScore.harmonic", 0.5)
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    options = SMALL | {"candidates": 3, "first_facts": 1, "search_facts": 1, "held_out": 1, "packaged": True}
    config = calibrate(model, "grace", **options)
    assert config == GRACEConfig().complete(model.profile, files=False) != packaged.complete(model.profile)
    assert "no other settings were better" in caplog.text and not user_hparams().exists()
    log = next((tmp_path / "tune").glob("*/logbook.jsonl")).read_text(encoding="utf-8")
    assert f'"eps": {packaged.eps}' in log  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("method", SEARCHED)
def test_every_method_can_be_tuned(method: str, tmp_path: Path) -> None:
    """Second moments, tracing, sites, prompts: whatever a method needs, its candidates edit and are undone."""
    model = EditableModel.from_pretrained("kedit/world-llama", "prompt")
    before = bits(model)
    options = SMALL | {"candidates": 3, "first_facts": 1, "search_facts": 1, "held_out": 1}
    found = search_settings(model, method, folder=tmp_path, **options)
    assert len(found.tried) == 3 and found.check_derived is not None
    assert same_bits(bits(model), before) and not model.edits


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("mend", {}, "kedit train"),
        ("rome", {"facts": [{"prompt": "{} is", "subject": "A", "target_new": "b"}]}, "ground_truth"),
        ("rome", {"minutes": 0.0}, "minutes"),
    ],
)
def test_what_cannot_be_tuned(
    method: str, options: dict[str, Any], reason: str, world_gpt2: EditableModel, tmp_path: Path
) -> None:
    with pytest.raises(TuneError, match=reason):
        search_settings(world_gpt2, method, folder=tmp_path, **SMALL | options)


def test_a_model_that_knows_too_little_or_carries_edits(world_gpt2: EditableModel, tmp_path: Path) -> None:
    strange = [
        {"prompt": "{} lies in", "subject": f"City {i}", "target_new": "Rome", "ground_truth": "Spain"}
        for i in range(9)
    ]
    with pytest.raises(TuneError, match=r"knows too few facts .*\(0 of 9 given facts\)"):
        search_settings(world_gpt2, "rome", folder=tmp_path, **SMALL | {"facts": strange})
    world_gpt2.edit(prompt="By profession {} is a", subject="Tarosk Boayond", target_new="plumber")
    with pytest.raises(TuneError, match="without edits"):
        search_settings(world_gpt2, "rome", folder=tmp_path, **SMALL)


def test_every_space_holds_values_that_its_method_takes() -> None:
    """Of all methods that can be tuned, and of no other; also on a model whose last layers have no MLP."""
    profile = ModelProfile("", 8, 64, "rms", "llama", mlp_layers=(0, 1, 2, 3, 5))
    tunable = set()
    for name, method in registered_methods().items():
        config = method.config_class().complete(profile, files=False)
        space = config.search_space(profile, [2])
        for field, values in space.items():
            for value in values:
                changed = config.changed({field: value}).complete(profile, files=False)
                assert field in ("base", "base_unnamed") or getattr(changed, field) == value
                assert set(changed.layers or ()) <= set(profile.mlp_layers), (name, field)
        if any(space.values()) and not method.capabilities.needs_training:
            tunable.add(name)
    assert tunable >= set(SEARCHED) and tunable - set(SEARCHED) <= {"auto", "qlora", "serac"}


def test_facts_that_the_model_knows_are_chosen_by_themselves(world_llama: EditableModel) -> None:
    """Without a word about facts, the world is taken: of the real facts an embedded model knows none."""
    asked = []
    facts = choose_facts(world_llama, None, 4, 4, seed=0, logbook=Logbook(None), asked=asked.append)
    assert facts.source == "packaged world" and len(facts.search) == len(facts.held_out) == 4
    assert 8 <= facts.known <= facts.asked < 40 and sum(asked) > 470
    answers = generate_answers(
        world_llama.base_model, world_llama.tokenizer, [f.filled_prompt for f in facts.held_out], 10
    )
    for fact, answer in zip(facts.held_out, answers, strict=True):
        assert fact.ground_truth[0] in answer.text and fact.target_new not in fact.ground_truth
    again = choose_facts(world_llama, "world", 4, 4, seed=0, logbook=Logbook(None))
    other = choose_facts(world_llama, "world", 4, 4, seed=1, logbook=Logbook(None))
    assert again.search == facts.search and other.search != facts.search
