"""Metrics: comparing texts, scoring one probe, averaging many."""

from __future__ import annotations

import pytest

from hf_kedit.errors import EvaluationError
from hf_kedit.evaluation.measures import metrics


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "contains"),
    [
        ("The  Eiffel Tower.", "eiffel tower", 1, 1),
        ("It is Rome, in Italy", "rome", 0, 1),
        ("Romeo", "Rome", 0, 0),
        ("the U.S.", "US", 1, 1),
        ("", "Rome", 0, 0),
        ("anything", "The", 0, 0),
        ("the", "The", 1, 1),
        ("a house", ")", 0, 0),
        ("首都是東京。", "東京", 0, 1),
        ("1998", "1998", 1, 1),
        ("in 19980", "1998", 0, 0),
    ],
)
def test_comparing_texts(prediction, answer, exact, contains):
    assert metrics.exact(prediction, answer) == exact
    assert metrics.contains(prediction, answer) == contains


def test_f1():
    assert metrics.f1("the red car", "red car") == 1.0
    assert metrics.f1("red red car", "red bus") == pytest.approx(2 * 1 / (2 + 3))
    assert metrics.f1("", "red") == 0.0


def test_aliases_and_groups():
    groups = [["Oslo", "Kristiania"], ["Norway"]]
    assert metrics.answer_score("Kristiania", groups) == 1.0
    assert metrics.answer_score("Kristiania", groups, match="all") == 0.0
    assert metrics.answer_score("Kristiania in Norway", groups, match="all") == 1.0
    assert metrics.answer_score("x", groups, scorer=lambda p, a: 0.25) == 0.25
    assert metrics.best_alias([0.2, 0.7]) == 0.7
    with pytest.raises(EvaluationError):
        metrics.answer_score("x", [])
    with pytest.raises(EvaluationError, match="'contains'"):
        metrics.answer_score("x", groups, scorer="contain")


def test_agreement_is_per_position():
    assert metrics.agreement([1, 2, 3, 4], [1, 9, 3, 9]) == 0.5
    assert metrics.text_agreement("The Rome.", "rome") == 1.0
    assert metrics.text_agreement("Rome", "Paris") == 0.0
    assert metrics.prefix_agreement([1, 2, 3], [1, 9, 3], 2) == 0.5
    assert metrics.prefix_agreement([1, 2], [1, 2, 3, 4], 3) == pytest.approx(2 / 3)
    assert metrics.prefix_agreement([], [], 3) == 1.0
    with pytest.raises(EvaluationError):
        metrics.agreement([1], [1, 2])


def test_aggregation_means_probes_then_axes_then_cases():
    cases = [
        {"a": [1.0, 0.0, 0.5], "b": [1.0]},  # (0.5 + 1.0) / 2
        {"b": [0.0]},
        {"a": []},  # nothing scored: no such section
        {},
        None,
    ]
    assert metrics.case_mean(cases[0]) == 0.75
    assert metrics.dataset_mean(cases) == (0.375, 2)
    assert metrics.axis_means(cases) == {"a": (0.5, 1), "b": (0.5, 2)}
    assert metrics.dataset_mean([None, {}]) == (None, 0)
    assert metrics.dataset_mean([[1.0, 0.0], None]) == (0.5, 1)
