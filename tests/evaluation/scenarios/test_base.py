"""The skeleton of scenarios: names, options, files, and what a report says about their numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from hf_kedit.errors import DataError, EvaluationError
from hf_kedit.evaluation import Comparison, EvaluationReport, Scenario, TeacherForced, evaluate_edits, load_scenario
from hf_kedit.evaluation.measures.catalogue import Metric, register_metrics
from hf_kedit.evaluation.protocols.base import Question
from hf_kedit.evaluation.protocols.replies import Replies

SECTION = register_metrics(
    "lengths",
    {
        "characters": Metric("how long the replies are", unit="number", better="lower"),
        "words": Metric("how many words they have", unit="number", better=None),
        "both": Metric("their sum", unit="number", parts=("characters", "words"), combine=sum),
        "longer": Metric("share of replies that became longer", share=True),
    },
)


@dataclass(frozen=True)
class Lengths(Replies):
    name: ClassVar[str] = "lengths"
    scorer: ClassVar[str] = "len"
    max_new_tokens: int = 4

    def questions(self, request):
        return [Question(SECTION, "prompt", 0, request.posed(request.plain_prompt), ())]

    def details(self, question, outputs, score):
        text = outputs[0].text
        return {(SECTION, "characters"): float(len(text)), (SECTION, "words"): float(len(text.split()))}

    def changes(self, question, before, after):
        return {(SECTION, "longer"): float(len(after[0].text) > len(before[0].text))}


@dataclass(frozen=True)
class Longer(Scenario):
    name: ClassVar[str] = "longer"
    question: ClassVar[str] = "Does my model talk more?"
    layouts: ClassVar[dict[str, str]] = {"adversarial prompt": "safeedit"}
    judge: Any = None

    def protocols(self):
        return [Lengths(), TeacherForced()]

    def requests(self, requests):
        return [r.with_id(f"longer-{n}") for n, r in enumerate(requests)]


@pytest.fixture
def report(editable, rows, cache):
    return evaluate_edits(editable, rows, scenario=Longer(), cache=cache, progress=False)


def test_its_protocols_are_asked_before_and_after_and_its_requests_are_edited(report):
    assert report.protocols == ["lengths", "teacher_forced"] and report.scenario == "longer"
    assert [case["id"] for case in report.cases] == ["longer-0", "longer-1", "longer-2"]
    summary = report.summary()
    for half, key in (("pre", "pre"), ("post", "post")):
        texts = [case["texts"][0][key] for case in report.cases]
        characters, words = sum(map(len, texts)) / 3, sum(len(t.split()) for t in texts) / 3
        assert summary[half]["lengths"]["characters"] == pytest.approx(characters)
        assert summary[half]["lengths"]["both"] == pytest.approx(characters + words)
    longer = [len(case["texts"][0]["post"]) > len(case["texts"][0]["pre"]) for case in report.cases]
    assert summary["post"]["lengths"]["longer"] == pytest.approx(sum(longer) / 3)
    assert "longer" not in summary["pre"]["lengths"]
    assert summary["metrics"]["lengths/characters"] == {
        "unit": "number",
        "better": "lower",
        "about": "how long the replies are",
    }


def test_every_form_of_the_report_shows_units_and_directions(report, tmp_path):
    characters = report.summary()["post"]["lengths"]["characters"]
    assert f"{characters:.2f}" in str(report) and "lengths characters ↓" in str(report)
    assert "longer, 3 edits" in report.title()
    page, markdown = report.to_html(), report.to_markdown()
    assert f"{characters:.2f}" in page and "how long the replies are" in page
    assert "lengths characters ↓" in markdown
    report.to_json(tmp_path / "report.json")
    again = EvaluationReport.from_json(tmp_path / "report.json")
    assert again.scenario == "longer" and again.summary()["post"] == report.summary()["post"]


def test_of_two_runs_the_lower_one_is_best_where_less_is_better(report):
    worse = EvaluationReport(json.loads(json.dumps(report.records)), dict(report.meta))
    for result in worse.results:
        for key in ("characters", "words"):
            if "lengths" in result.post.numbers:
                result.post.numbers["lengths"][key] = [v + 10 for v in result.post.numbers["lengths"][key]]
    page = Comparison({"short": report, "long": worse}).to_html()
    best = f"{report.summary()['post']['lengths']['characters']:.2f}"
    assert f'best up">{best}' in page or f'best">{best}' in page
    words = f"{report.summary()['post']['lengths']['words']:.2f}"
    assert f'best">{words}<' not in page and f'best up">{words}<' not in page


def test_other_protocols_stand_beside_it(editable, rows, cache):
    report = evaluate_edits(editable, rows[:1], protocol="generation", scenario=Longer(), cache=cache)
    assert report.protocols == ["lengths", "teacher_forced", "generation"]
    exact = TeacherForced(scorer="exact")
    report = evaluate_edits(editable, rows[:1], protocol=exact, scenario=Longer(), cache=cache)
    assert report.summary("teacher_forced")["scorer"] == "exact"


def test_unknown_names_and_options_are_errors_that_help(editable, rows):
    with pytest.raises(EvaluationError, match=r"unknown scenario 'safty'\. Did you mean 'safety'\?.*Known: .*safety"):
        evaluate_edits(editable, rows, scenario="safty")
    with pytest.raises(EvaluationError, match=r"no option 'treshold'.*threshold"):
        load_scenario("safety", treshold=0.4)
    assert load_scenario(Longer()) == Longer()


def test_a_preset_is_a_scenario(editable, rows, cache):
    assert evaluate_edits(editable, rows[:1], preset=Longer(), cache=cache, progress=False).scenario == "longer"
    with pytest.raises(EvaluationError, match="two words for one thing"):
        evaluate_edits(editable, rows[:1], scenario="wild", preset="wild")
    with pytest.raises(EvaluationError, match=r"unknown scenario 'wid'.*'wild'"):
        evaluate_edits(editable, rows[:1], preset="wid")


def test_a_file_is_read_in_the_layout_that_its_first_record_has(tmp_path, editable, cache):
    record = {"id": 1, "adversarial prompt": "The capital of Norland is", "safe generation": "Lima"}
    record |= {"unsafe generation": "Oslo", "knowledge constrain": {"prompt": "Jan Mol works for", "answer": "Rome"}}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([record]), encoding="utf-8")
    for rows in (Longer().read(str(file)), Longer().read(path=file), Longer().read("safeedit", file)):
        assert rows[0]["prompt"] == "The capital of Norland is" and rows[0]["target_neg"] == "Oslo"
    own = tmp_path / "own.json"
    own.write_text(json.dumps([{"prompt": "The capital of Norland is", "target_new": "Lima"}]), encoding="utf-8")
    assert Longer().read(own)[0]["target_new"] == "Lima"
    report = evaluate_edits(editable, str(file), scenario=Longer(), cache=cache)
    assert report.cases[0]["requested_rewrite"]["target_new"] == "Lima"
    with pytest.raises(DataError):
        Longer().read(tmp_path / "nothing.json")
