"""Pictures of reports: what is drawn is what the report says."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from hf_kedit.errors import EvaluationError
from hf_kedit.evaluation import Comparison, EvaluationReport
from hf_kedit.evaluation.measures.intervals import wilson

from .test_page import run

matplotlib = pytest.importorskip("matplotlib")


def sequence(label: str = "rome", values: tuple[float, ...] = (1.0, 0.5, 0.25)) -> EvaluationReport:
    """Edits that are forgotten: after 1, 2 and 4 edits, so much is left."""
    scorer = {"rewrite": {"scorer": "token", "comparable_group": "x"}}
    records = [
        {
            "case_id": i,
            "requested_rewrite": {"prompt": f"fact {i}", "target_new": "Lima"},
            "protocol": "teacher_forced",
            "when": when,
            "pre": {"rewrite_acc": [0.0], "metric_meta": scorer},
            "post": {"rewrite_acc": [value], "metric_meta": scorer},
        }
        for when, n, value in zip(("at 1", "at 2", "final"), (1, 2, 4), values, strict=True)
        for i in range(n)
    ]
    return EvaluationReport(records, {"model": "m", "method": label, "setting": "sequential"})


def words(figure: Any) -> list[str]:
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def test_bars_are_the_means_with_their_intervals_and_n() -> None:
    report = run([1.0, 1.0, 1.0, 0.0], [1.0, 0.0], method="rome")
    figure = report.plot()
    (axes,) = figure.axes
    values = [
        100 * report.summary(protocol)["post"][name]
        for name in ("rewrite_acc", "locality")
        for protocol in ("generation", "teacher_forced")
    ]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(values) == [75, 75, 50, 100]
    rows = ["by generation", "teacher forced"] * 2
    assert [t.get_text() for t in axes.get_yticklabels()] == rows
    assert words(figure).count("n 4") == 4 and words(figure).count("75.0") == 2
    low, high = wilson(0.75, 4)
    ends = [list(map(float, line.get_xdata())) for line in axes.lines]
    assert [100 * low, 100 * high] in [pytest.approx(pair) for pair in ends]
    assert [0.0, 0.0] in ends  # the stroke at what it was before
    assert figure._suptitle.get_text() == "rome on a/model: 4 single edits of facts"  # type: ignore[attr-defined]


def test_one_protocol_on_axes_of_the_user() -> None:
    from matplotlib.figure import Figure

    mine = Figure()
    left, right = mine.subplots(1, 2)
    assert run([1.0, 0.0], [1.0, 0.0]).plot(protocol="generation", ax=left) is mine
    assert [t.get_text() for t in left.get_yticklabels()] == ["reliability", "locality"]
    assert not right.patches and mine._suptitle is None  # type: ignore[attr-defined]
    assert left.get_title(loc="left").endswith(", by generation")


def test_a_comparison_has_a_bar_for_every_run_number_and_protocol() -> None:
    good, bad = run([1.0, 1.0], [1.0, 1.0], method="a"), run([1.0, 0.0], [0.0, 0.0], method="b")
    figure = Comparison({"$a$": good, "b": bad}).plot()
    first, second = figure.axes
    assert [a.get_title(loc="left") for a in figure.axes] == ["reliability\nn 2", "locality\nn 2"]
    assert [bar.get_width() for bar in first.patches] == [100, 100, 50, 50]  # run by run, written first
    assert [bar.get_width() for bar in second.patches] == [100, 100, 0, 100]
    assert [t.get_text() for t in first.get_yticklabels()] == ["$a$", "b"]
    assert "Dark: by generation. Pale: teacher forced." in figure._supxlabel.get_text()  # type: ignore[attr-defined]
    alone = Comparison({"a": good, "b": bad}).plot(protocol="generation")
    assert [bar.get_width() for bar in alone.axes[0].patches] == [100, 50]


def test_long_names_of_numbers_do_not_reach_into_the_next_chart() -> None:
    names = ("old_answer", "paraphrase_old_answer", "target", "preferred")
    one = sequence().records[-1]
    record = {**one, "pre": {}, "post": {"erasure likelihood": {name: [0.5] for name in names}, "metric_meta": {}}}
    reports = {label: EvaluationReport([record], {"model": "m", "method": label}) for label in ("a", "b")}
    figure = Comparison(reports).plot("bars")
    figure.canvas.draw()
    titles = [a._left_title for a in figure.axes]  # type: ignore[attr-defined]
    assert "paraphrase old answer" in titles[1].get_text()
    extents = [title.get_window_extent() for title in titles]
    assert all(a.x1 < b.x0 for a, b in pairwise(extents))
    assert extents[-1].x1 <= figure.bbox.x1


def test_runs_of_a_sweep_stand_in_their_groups() -> None:
    def labelled(method: str, model: str) -> EvaluationReport:
        about = {"model": model, "method": method, "dataset": "d", "setting": "single"}
        return run([1.0], [1.0, 1.0], label=about, method=method)

    reports = {f"{m} {x}": labelled(x, m) for m in ("small", "large") for x in ("rome", "memit")}
    figure = Comparison(reports).plot(protocol="generation")
    assert len(figure.axes) == 4  # two models, two numbers
    assert [a.get_ylabel() for a in figure.axes[::2]] == ["small", "large"]


def test_curves_are_those_of_the_report() -> None:
    report = sequence()
    figure = report.plot()
    (axes,) = figure.axes
    (line,) = axes.lines
    points = list(zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert points == [(n, 100 * value) for n, value in report.curve("rewrite_acc")] == [(1, 100), (2, 50), (4, 25)]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["4", "2", "1"]
    assert axes.get_xlabel() == "edits in the model" and "reliability" in words(figure)
    (band,) = axes.collections  # 95 % of one right answer of one
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(100 * min(wilson(v, n)[0] for v, n in POINTS))


POINTS = ((1.0, 1), (0.5, 2), (0.25, 4))


def test_curves_of_several_runs_and_on_given_axes() -> None:
    from matplotlib.figure import Figure

    both = Comparison({"rome": sequence(), "memit": sequence("memit", (1.0, 1.0, 0.75))})
    (axes,) = both.plot().axes
    assert [line.get_ydata()[-1] for line in axes.lines] == [25, 75]
    assert {"rome", "memit"} <= set(words(axes.get_figure()))
    mine = Figure()
    assert both.plot("curves", ax=mine.subplots()) is mine
    with pytest.raises(EvaluationError, match="ax= takes one"):
        both.plot("bars", ax=mine.axes[0])


def test_general_abilities_have_a_chart_of_their_own() -> None:
    report = sequence()
    report.meta["checkpoints"] = [
        {"n_edits": n, "abilities": {"nli": {"score": s}}, "abilities_before": {"nli": {"score": 0.9}}}
        for n, s in ((2, 0.8), (4, 0.4))
    ]
    figure = report.plot()
    assert [a.get_title(loc="left") for a in figure.axes] == ["Teacher forced", "General abilities"]
    assert list(figure.axes[1].lines[0].get_ydata()) == pytest.approx([90, 80, 40])


def test_what_cannot_be_drawn_says_why() -> None:
    report = run([1.0], [1.0, 1.0])
    with pytest.raises(EvaluationError, match="setting='sequential'"):
        report.plot("curves")
    with pytest.raises(EvaluationError, match="no protocol='generations'"):
        report.plot(protocol="generations")
    with pytest.raises(ValueError, match="bars"):
        report.plot("pie")  # type: ignore[arg-type]
