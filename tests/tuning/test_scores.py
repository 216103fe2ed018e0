"""Figures, their harmonic mean and the interval of a gain; computed here in other ways."""

from __future__ import annotations

from statistics import harmonic_mean

import pytest

from hf_kedit import EditRequest, Probe
from hf_kedit.evaluation.report.case_result import CaseResult, Half
from hf_kedit.tuning import PairedGain, TuneScore
from hf_kedit.tuning.candidates import Inventor, rungs
from hf_kedit.tuning.scores import GENERAL, figures_of, figures_of_failure


def result(protocol: str, scores: dict) -> CaseResult:  # type: ignore[type-arg]
    return CaseResult(0, "x", {}, protocol, Half(), Half(scores=scores), "final")


def test_figures_of_a_fact() -> None:
    generation = {
        "rewrite": {None: [1.0]},
        "rephrase": {None: [1.0, 0.0]},
        "locality": {"Neighborhood": [1.0, 1.0], "Same": [0.0], GENERAL: [1.0, 1.0, 0.0, 1.0]},
        "portability": {"Reasoning": [0.0]},
    }
    likelihood = {"rewrite": {None: [1.0]}, "locality": {"Neighborhood": [0.5]}}
    assert figures_of([result("generation", generation), result("likelihood", likelihood)]) == {
        "reliability, generation": 1.0,
        "paraphrases, generation": 0.5,
        "locality, generation": 0.5,
        "portability, generation": 0.0,
        "reliability, likelihood": 1.0,
        "locality, likelihood": 0.5,
        GENERAL: 0.75,
    }


def test_a_failed_edit_has_the_figures_of_one_that_does_nothing() -> None:
    request = EditRequest(
        "{} is",
        "A",
        "b",
        ["c"],
        ["A, is"],
        {"N": [Probe("D is", [["e"]])], GENERAL: [Probe("The")]},
        {"R": [Probe("A is in", [["f"]])]},
    )
    figures = figures_of_failure(request)
    assert {name for name, value in figures.items() if value} == {
        "locality, generation",
        "locality, likelihood",
        GENERAL,
    }
    assert len(figures) == 8


def test_the_harmonic_mean_leaves_general_answers_out_and_has_a_floor() -> None:
    score = TuneScore.of([{"a": 1.0, "b": 0.0, GENERAL: 0.5}, {"a": 0.5, GENERAL: 1.0}])
    assert score.figures == {"a": 0.75, "b": 0.0} and score.general == 0.75 and score.n == 2
    assert score.harmonic == pytest.approx(harmonic_mean([0.75, 0.1]))


@pytest.mark.parametrize(
    ("general", "derived", "harms"),
    [(0.95, 1.0, False), (0.85, 1.0, True), (0.85, 0.92, True), (0.77, 0.8, False), (0.7, 0.8, True)],
)
def test_an_edit_that_breaks_general_text_harms(general: float, derived: float, harms: bool) -> None:
    assert TuneScore({"a": 1.0}, general, 4).harms(TuneScore({"a": 0.1}, derived, 4)) is harms


def test_a_gain_on_every_fact_is_sure_and_one_by_chance_is_not() -> None:
    derived = [{"a": 0.5, "b": 0.5} | ({"c": 0.5} if i % 2 else {}) for i in range(12)]
    better = [{name: value + 0.25 for name, value in fact.items()} for fact in derived]
    gain = PairedGain.of(better, derived)
    assert gain.mean == pytest.approx(0.25) and gain.low == pytest.approx(0.25)
    mixed = [{name: float(i % 2) for name in fact} for i, fact in enumerate(derived)]
    chance = PairedGain.of(mixed, derived)
    assert chance.low is not None and chance.high is not None and chance.low < 0 < chance.high
    assert PairedGain.of(better[:1], derived[:1]).low is None


def test_rungs_halve_candidates_and_double_facts() -> None:
    assert list(rungs(18, 4, 16)) == [(4, 6), (8, 2), (16, 1)]
    assert list(rungs(3, 4, 4)) == [(4, 1)] and list(rungs(9, 8, 4)) == [(4, 1)]


def test_candidates_are_new_and_the_same_for_the_same_seed() -> None:
    from hf_kedit import AutoEditConfig
    from hf_kedit.config import ModelProfile

    profile = ModelProfile("", 8, 64, "rms", "llama", mlp_layers=tuple(range(8)))
    derived = AutoEditConfig.for_method("rome").complete(profile, files=False)
    space = derived.search_space(profile, [4])

    def invented(seed: int) -> list[dict]:  # type: ignore[type-arg]
        inventor = Inventor(derived, space, profile, seed)
        pool = inventor.start() + inventor.first(9)
        pool += inventor.crossed(pool[1:4], 4)
        assert [c.number for c in pool] == list(range(14)) and len({c.key for c in pool}) == 14
        assert all(getattr(c.config, name) == value for c in pool for name, value in c.changes.items())
        return [dict(c.changes) for c in pool]

    assert invented(0)[0] == {} and invented(0)[1] == {"layers": [4]}
    assert invented(0) == invented(0) != invented(1)
    few = Inventor(derived, {"v_lr": [0.1, 0.2]}, profile, 0)
    assert len(few.start() + few.first(20)) == 3
