"""The report: layouts, means, and the refusal to mix."""

from __future__ import annotations

import io
import json
import math

import pandas
import pytest
from rich.console import Console

from hf_kedit.errors import DataError, EvaluationError
from hf_kedit.evaluation import EvaluationReport, Generation, evaluate_edits


def case(number, protocol="teacher_forced", when="final", **post):
    scorer = "token" if protocol == "teacher_forced" else "contains"
    meta = {
        section.removesuffix("_acc"): {"scorer": scorer, "comparable_group": f"{protocol}/{scorer}"}
        for section in post
    }
    pre = {key: value for key, value in post.items() if key != "locality"}
    return {
        "case_id": number,
        "id": None,
        "requested_rewrite": {"prompt": "p", "subject": None, "target_new": "t"},
        "protocol": protocol,
        "when": when,
        "setting": "single",
        "pre": {**pre, "metric_meta": meta},
        "post": {**post, "metric_meta": meta},
        "skipped": [],
    }


@pytest.fixture
def report(editable, rows, cache):
    return evaluate_edits(editable, rows, protocol=("teacher_forced", Generation(max_new_tokens=6)), cache=cache)


def test_summary_aggregates_probes_axes_cases():
    report = EvaluationReport(
        [
            case(0, rewrite_acc=[1.0], locality={"a_acc": [1.0, 0.0], "b_acc": [1.0]}),
            case(1, rewrite_acc=[0.5], rephrase_acc=[0.25, 0.75], locality={"b_acc": [0.0]}),
            case(2, rewrite_acc=[0.0]),
        ]
    )
    summary = report.summary()
    assert summary["post"] == {
        "rewrite_acc": 0.5,
        "rephrase_acc": 0.5,
        "locality": 0.375,
        "per_axis": {"locality": {"a": 0.5, "b": 0.5}},
    }
    assert "locality" not in summary["pre"]
    assert summary["n"] == 3
    assert summary["n_per_entry"] == {
        "rewrite_acc": 3,
        "rephrase_acc": 1,
        "locality": 2,
        "locality/a": 1,
        "locality/b": 2,
    }


def test_the_score_of_counterfact_needs_all_three_successes():
    successes = {"ES": [1.0], "PS": [0.5, 0.5], "NS": [0.25]}
    both = [case(0, counterfact=successes), case(1, counterfact={"ES": [0.0]})]
    assert EvaluationReport(both).summary()["post"]["counterfact"] == {
        "ES": 0.5, "PS": 0.5, "NS": 0.25, "S": pytest.approx(3 / (2 + 2 + 4)),
    }  # fmt: skip
    for missing in successes:
        some = {name: values for name, values in successes.items() if name != missing}
        found = EvaluationReport([case(0, counterfact=some)]).summary()["post"]["counterfact"]
        assert found.keys() == some.keys()


def test_summaries_refuse_to_mix():
    mixed = case(1, rewrite_acc=[1.0])
    mixed["post"]["metric_meta"]["rewrite"]["comparable_group"] = "teacher_forced/exact"
    with pytest.raises(EvaluationError, match="not comparable"):
        EvaluationReport([case(0, rewrite_acc=[1.0]), mixed]).summary()


def test_protocols_are_kept_apart():
    report = EvaluationReport([case(0, rewrite_acc=[1.0]), case(0, "generation", rewrite_acc=[0.0])])
    assert report.summary()["post"]["rewrite_acc"] == 1.0
    assert report.summary("generation")["post"]["rewrite_acc"] == 0.0
    assert report.protocols == ["teacher_forced", "generation"]
    with pytest.raises(EvaluationError, match="Did you mean 'generation'"):
        report.summary("generate")
    with pytest.raises(EvaluationError, match="no when='immediate'"):
        report.summary(when="immediate")
    with pytest.raises(EvaluationError, match="two times"):
        report.retention()
    with pytest.raises(EvaluationError, match="empty"):
        EvaluationReport([]).summary()


def test_record_layout(report):
    record = report.cases[0]
    assert record["case_id"] == 0 and record["id"] == "norland"
    assert (record["protocol"], record["setting"], record["when"]) == ("teacher_forced", "single", "final")
    for half in (record["pre"], record["post"]):
        assert len(half["rewrite_acc"]) == 1 and len(half["rephrase_acc"]) == 2
        assert len(half["portability"]["alias_acc"]) == 1
        assert set(half["metric_meta"]) == {"rewrite", "rephrase", "locality", "locality_accuracy", "portability"}
    assert set(record["pre"]["locality"]) == {"neighbour_output", "other_output"}
    assert set(record["post"]["locality"]) == {"neighbour_acc", "other_acc"}
    assert record["post"]["metric_meta"]["locality"]["scorer"] == "agreement"
    assert record["n_probes"] == {"rewrite": 1, "rephrase": 2, "locality": 3, "portability": 1}
    assert record["seconds_edit"] > 0 and record["seconds_eval"] > 0
    assert record["edit"]["method"] == "ft-m" and math.isfinite(record["edit"]["diagnostics"]["seconds"])
    bare = report.cases[2]["post"]
    assert set(bare) == {"rewrite_acc", "metric_meta"}
    texts = report.select("generation")[0]["pre"]["locality"]["neighbour_output"]
    assert all(isinstance(text, str) for text in texts)


def test_summary_keys(report):
    summary = report.summary()
    assert set(summary["post"]) == {
        "rewrite_acc",
        "rephrase_acc",
        "locality",
        "locality_accuracy",
        "portability",
        "per_axis",
    }
    assert set(summary["post"]["per_axis"]["portability"]) == {"alias", "reasoning"}
    assert summary["n_per_entry"]["rephrase_acc"] == 1 and summary["n_per_entry"]["portability"] == 2
    assert (summary["n"], summary["protocol"], summary["scorer"]) == (3, "teacher_forced", "token")
    assert (summary["setting"], summary["when"]) == ("single", "final")
    assert report.summary("generation")["scorer"] == "contains"


def test_easyedit_layout(report):
    rows = report.to_easyedit()
    assert [set(row) for row in rows] == [{"case_id", "requested_rewrite", "pre", "post", "time"}] * 3
    request = rows[0]["requested_rewrite"]
    assert request["prompt"] == "The capital of Norland is"
    assert request["locality"]["neighbour"] == {
        "prompt": ["The capital of Sudland is", "The capital of Westland is"],
        "ground_truth": ["Rome", "Lima"],
    }
    seen = []
    for row, record in zip(rows, report.select("teacher_forced"), strict=True):
        for section in ("locality", "portability"):  # its summary scripts average `*_acc` lists: nothing else in there
            assert row["post"][section] == record["post"].get(section, {})
            seen += row["post"][section]
    assert sorted(set(seen)) == ["alias_acc", "neighbour_acc", "other_acc", "reasoning_acc"]


def test_dataset(report):
    table = report.to_dataset()
    assert len(table) == 6
    assert table["protocol"] == ["teacher_forced", "generation"] * 3
    final = report.to_dataset("teacher_forced")
    assert len(final) == 3
    post = report.summary()["post"]
    values = [v for v in final["post_portability"] if v is not None]
    assert sum(values) / len(values) == pytest.approx(post["portability"])
    assert final[2]["post_locality"] is None and final[2]["axes"] == []
    axis = next(a for a in final[0]["axes"] if (a["section"], a["axis"]) == ("locality", "neighbour"))
    assert axis["pre"] == [] and axis["post"] == report.cases[0]["post"]["locality"]["neighbour_acc"]


def test_pandas(report):
    frame = report.to_pandas("generation")
    assert isinstance(frame, pandas.DataFrame) and len(frame) == 3


def test_json_round_trip_and_no_file_unasked(report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = report.to_json()
    str(report), repr(report), report.to_easyedit(), report.rows()
    assert list(tmp_path.iterdir()) == []
    report.to_json("report.json")
    again = EvaluationReport.from_json("report.json")
    assert again == report == EvaluationReport(**{k: v for k, v in json.loads(text).items() if k != "format_version"})
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(DataError, match="not an evaluation report"):
        EvaluationReport.from_json("bad.json")
    (tmp_path / "new.json").write_text('{"format_version": 99}')
    with pytest.raises(DataError, match="newer"):
        EvaluationReport.from_json("new.json")


def test_tables(report):
    text = str(report)
    assert "protocol teacher_forced (token)" in text and "protocol generation (contains)" in text
    assert "locality (agreement)" in text and "  neighbour" in text
    console = Console(width=120, record=True, file=io.StringIO())
    report.print_table(console)
    printed = console.export_text()
    for row in report.table_rows():
        assert all(cell.strip() in printed for cell in row)
