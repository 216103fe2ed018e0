"""Several reports side by side: Markdown, HTML, model-index entries."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from huggingface_hub import ModelCardData

from hf_kedit.errors import DataError, EvaluationError
from hf_kedit.evaluation import Comparison, EvaluationReport, Fluency, Generation, evaluate_edits
from hf_kedit.evaluation.report.charts import COLOURS, Bar, bars, curves
from hf_kedit.storage.display import printable

from ..helpers import make_editable, tiny_gpt2

PROTOCOLS = ("teacher_forced", Generation(max_new_tokens=6), "likelihood", Fluency("words", 30))


@pytest.fixture
def comparison(tokenizer, rows, cache):
    rows[0]["subject"], rows[0]["prompt"] = "<b>Nor|land</b>", "The capital of <b>Nor|land</b> is"
    reports = {}
    for label, lr in (("strong & fast", 0.05), ("weak", 1e-4)):
        editable = make_editable(tiny_gpt2(tokenizer), tokenizer, lr=lr)
        reports[label] = evaluate_edits(
            editable,
            rows,
            "sequential",
            protocol=PROTOCOLS,
            when=("immediate", "final"),
            at=[1, 2],
            collapse_text="Oslo is a",
            cache=cache,
        )
    return Comparison(reports)


class Page(HTMLParser):
    """Checks that tags are closed in order, and gathers what a test wants to know."""

    VOID = {"meta", "input", "line", "polyline", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_stands_by_itself(comparison, tmp_path):
    text = comparison.to_html(tmp_path / "report.html", title="A <title>")
    assert (tmp_path / "report.html").read_text() == text
    page = Page(text)
    assert page.links == [] and "http" not in re.sub(r"www\.w3\.org", "", text)
    assert "<b>Nor" not in text and "&lt;b&gt;Nor|land&lt;/b&gt;" in text
    shown = " ".join(Page(re.sub("</?mark[^>]*>", "", text)).words)
    for word in (
        "A <title>",
        "strong & fast",
        "weak",
        "Teacher forced",
        "By likelihood",
        "ES",
        "Along the number of edits",
    ):
        assert word in shown
    assert page.tags.count("polyline") >= 8
    record = comparison.reports["weak"].select("generation")[0]
    wrote = [printable(text["post"]) for text in record["texts"] if text["post"].strip()]
    assert wrote and all(" ".join(text.split()) in " ".join(shown.split()) for text in wrote)

    def cases(limit):
        Page(text := comparison.to_html(max_cases=limit))
        return text.count('<details class="case">')

    assert cases(200) == 3 + 6 and cases(1) == 3 + 2 and cases(0) == 0  # each edit side by side, and in both runs


def test_the_numbers_of_the_page_are_those_of_the_summary(comparison):
    text = comparison.to_html(max_cases=0)
    rows = re.findall(r"<tr><td>(.*?)</tr>", text[text.index("<h2>Teacher forced") :])
    for label, report in comparison.reports.items():
        row = next(r for r in rows if r.startswith(label.replace("&", "&amp;")))  # the first table: immediate
        post = report.summary("teacher_forced", "immediate")["post"]
        numbers = re.findall(r'<td class="n">(?:<span class="[^"]*">)?([\d.]+)', row)
        assert numbers[0] == "3"
        names = ("rewrite_acc", "rephrase_acc", "locality", "locality_accuracy", "portability")
        assert numbers[1:6] == [f"{100 * post[name]:.1f}" for name in names]


def test_one_report_has_the_same_forms(comparison, tmp_path):
    report = comparison.reports["weak"]
    assert "ft-m" in report.to_html(tmp_path / "one.html")
    again = EvaluationReport.from_json(_json(report, tmp_path))
    assert again.to_html() == report.to_html() and again.to_markdown() == report.to_markdown()
    with pytest.raises(DataError, match="cannot write"):
        report.to_html(tmp_path)


def _json(report, folder):
    report.to_json(folder / "report.json")
    return folder / "report.json"


def test_markdown(comparison):
    text = comparison.to_markdown(max_cases=2)
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("|") and not lines[i - 1].startswith("|"):  # every row has the cells of the head
            count = len(re.findall(r"(?<!\\)\|", line))
            while i < len(lines) and lines[i].startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", lines[i])) == count
                i += 1
    assert "Nor\\|land" in text and "<b>" not in text
    value = comparison.reports["weak"].summary("teacher_forced")["post"]["rewrite_acc"]
    assert f"| {100 * value:.1f} (" in text
    assert "bits" in text and "first 2 of 3" in text
    assert "along the number of edits" in text


def test_rows_and_tables(comparison, tmp_path):
    rows = comparison.rows()
    assert {(r["label"], r["protocol"], r["when"]) for r in rows} >= {("weak", "likelihood", "at 2")}
    row = next(r for r in rows if (r["label"], r["protocol"], r["when"]) == ("weak", "likelihood", "final"))
    assert row["post_counterfact_ES"] == comparison.reports["weak"].summary("likelihood")["post"]["counterfact"]["ES"]
    assert json.loads(comparison.to_json(tmp_path / "c.json")) == rows
    assert len(comparison.to_pandas()) == len(rows)


def test_model_index(comparison):
    report = comparison.reports["weak"]
    index = report.to_model_index("me/edited", "World facts")
    assert index[0]["name"] == "me/edited"
    entries = index[0]["results"]
    found = {(e["dataset"]["config"], m["type"]): m["value"] for e in entries for m in e["metrics"]}
    value = report.summary("generation")["post"]["rewrite_acc"]
    assert found["sequential, final, generation", "rewrite_acc"] == pytest.approx(value, abs=1e-6)
    teacher = report.summary("teacher_forced")["post"]["locality"]
    assert found["sequential, final, teacher_forced", "locality"] == pytest.approx(teacher, abs=1e-6)
    card = ModelCardData(**{"model-index": index, "model_name": "me/edited"})  # what the Hub's tools read
    assert len(card.eval_results) == sum(len(e["metrics"]) for e in entries)


def test_dataset_has_columns_for_everything(comparison):
    table = comparison.reports["weak"].to_dataset()
    assert {"post_counterfact_ES", "post_fluency_ngram_entropy"} <= set(table.column_names)
    records = comparison.reports["weak"].records
    assert len(table) == len(records)
    place = next(i for i, r in enumerate(records) if r["protocol"] == "fluency")
    assert table[place]["post_fluency_ngram_entropy"] > 0 and table[place]["post_rewrite_acc"] is None


def test_what_cannot_be_compared(comparison):
    reports = list(comparison.reports.values())
    with pytest.raises(EvaluationError, match="two reports are of 'ft-m'"):
        Comparison(reports)
    assert list(Comparison(reports[:1]).reports) == ["ft-m"]
    with pytest.raises(EvaluationError, match="nothing to compare"):
        Comparison({})
    with pytest.raises(EvaluationError, match="nothing to compare"):
        Comparison([EvaluationReport([], {})])


def test_a_run_in_which_every_edit_failed_is_named(comparison):
    failed = {"failed": [{"case_id": 0, "id": None, "reason": "EditFailedError: one <fact> at a time"}]}
    both = Comparison({**comparison.reports, "broken": EvaluationReport([], failed)})
    assert list(both.empty) == ["broken"] and "broken" not in both.reports
    page = both.to_html(max_cases=0)
    Page(page)
    assert "broken: no edit could be made (EditFailedError: one &lt;fact&gt; at a time)" in page


def swept(report, method, setting):
    """The report as a run of a sweep."""
    about = {"model": "m", "method": method, "dataset": "d", "setting": setting}
    return EvaluationReport(report.records, {**report.meta, "label": about})


def test_a_sweep_is_grouped_by_what_is_not_the_method(comparison):
    strong, weak = comparison.reports.values()
    runs = {
        "A · one": swept(strong, "A", "one"),
        "B · one": swept(weak, "B", "one"),
        "A · two": swept(strong, "A", "two"),
    }
    both = Comparison(runs, {"B · two": "ConfigError: no <editor>"})
    assert [(g.title, list(g.reports)) for g in both.groups] == [("one", ["A", "B"]), ("two", ["A"])]
    page = both.to_html()
    Page(page)
    assert "B · two: failed (ConfigError: no &lt;editor&gt;)" in page
    assert "one: Teacher forced" in page and "two: By generation" in page
    assert "one: edit by edit" in page and "two: edit by edit" not in page  # one run has nothing beside it
    text = both.to_markdown(max_cases=0)
    assert "**B · two** failed: ConfigError: no &lt;editor&gt;" in text and "## two: teacher_forced" in text
    # What differs in nothing but the method, or in the model alone, is one group.
    assert [g.title for g in Comparison({k: runs[k] for k in ("A · one", "B · one")}).groups] == [""]
    assert [g.title for g in Comparison({k: runs[k] for k in ("A · one", "A · two")}).groups] == [""]


def test_an_edit_under_every_method(comparison):
    page = comparison.to_html(max_cases=1)
    entry = re.search(r'id="edits-0"><details class="case">(.*?)</details>', page, re.S).group(1)
    rows = dict(re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", entry, re.S))
    assert list(rows) == ["strong &amp; fast", "weak"]
    right = 0
    for label, report in comparison.reports.items():
        record = report.select("generation")[0]
        numbers = re.findall(r'<td class="n [a-z]*">([\d.]+)', rows[label.replace("&", "&amp;")])
        after = record["post"]["rewrite_acc"][0]
        right += after == 1
        assert numbers[0] == f"{100 * after:.1f}"
        wrote = next(t["post"] for t in report.select("generation")[0]["texts"] if t["section"] == "rewrite")
        cell = re.search(r'<td class="text">(.*?)</td>', rows[label.replace("&", "&amp;")], re.S)[1]
        assert printable(wrote) == unescape(re.sub("</?mark>", "", cell))
    assert f"right with</span> {right} of 2" in entry


def test_axes_stand_one_by_one(comparison):
    report = comparison.reports["weak"]
    axes = report.summary("teacher_forced")["post"]["per_axis"]["locality"]
    assert len(axes) > 1
    page, text = comparison.to_html(max_cases=0), comparison.to_markdown(max_cases=0)
    for axis, mean in axes.items():
        assert f"locality: {axis.replace('_', ' ')}" in page and f"locality: {axis}" in text
        assert f"{100 * mean:.1f}" in page


def test_curves_of_many_runs_have_a_chart_each(comparison):
    strong = next(iter(comparison.reports.values()))
    few = Comparison({f"run {i}": strong for i in range(len(COLOURS))}).to_html(max_cases=0)
    many = Comparison({f"run {i}": strong for i in range(len(COLOURS) + 1)}).to_html(max_cases=0)
    assert "panels small" not in few.split("</style>")[1]
    assert "<strong>run 8</strong><svg" in many and "<strong>run 8</strong><svg" not in few


def test_many_runs_have_one_colour(comparison):
    many = bars([Bar(str(i), None, 0.5) for i in range(len(COLOURS) + 1)])
    assert COLOURS[0] in many and COLOURS[1] not in many


def test_charts_bear_what_is_missing_or_out_of_range():
    Page(bars([Bar("a", None, None), Bar("b" * 50, -0.5, 1.5), Bar("<c>", 0.1, 0.2)]))
    assert "width:50.0%" in bars([Bar("a", None, 0.5)])
    # A run keeps its colour in all charts.
    assert COLOURS[2] in bars([Bar("a", None, 0.5)], colours={"b": 0, "a": 2})
    Page(curves({"x": [(1, 0.0), (100, 2.0)], "y": [(1, 1.0), (2, 0.5)]}))
