"""What a person reads on an HTML report: what was compared, how sure it is, what was lost."""

from __future__ import annotations

import io
import re
import unicodedata
from html import unescape

import pytest
from rich.console import Console

from hf_kedit.evaluation import Comparison, EvaluationReport
from hf_kedit.evaluation.measures.intervals import bootstrap, wilson
from hf_kedit.evaluation.report.estimates import destroyed, places
from hf_kedit.evaluation.report.html_cases import changed

NEIGHBOURS = ("Sudland's capital is", "Westland's capital is")


def record(number, protocol, rewrite, kept, accuracy=None):
    """A case with one rewrite, and two neighbours of the axis ``near_by``."""
    scorer = {"scorer": "token" if protocol == "teacher_forced" else "contains", "comparable_group": protocol}
    about = dict.fromkeys(("rewrite", "locality", "locality_accuracy"), scorer)
    right = {} if accuracy is None else {"locality_accuracy": {"near_by_acc": accuracy}}
    before = {} if accuracy is None else {"locality_accuracy": {"near_by_acc": [1.0, 1.0]}}
    texts = []
    if protocol == "generation":
        texts = [{"section": "rewrite", "axis": None, "prompt": "p", "pre": "Oslo. He", "post": "Lima. She"}]
        texts += [
            {"section": "locality", "axis": "near_by", "prompt": prompt, "pre": "Rome. It", "post": post}
            for prompt, post in zip(NEIGHBOURS, ("Rome. She", "Lima. It"), strict=True)
        ]
    return {
        "case_id": number,
        "requested_rewrite": {"prompt": f"fact {number}", "target_new": "Lima"},
        "protocol": protocol,
        "when": "final",
        "pre": {"rewrite_acc": [0.0], **before, "metric_meta": about},
        "post": {"rewrite_acc": [rewrite], "locality": {"near_by_acc": kept}, **right, "metric_meta": about},
        "texts": texts,
    }


def run(rewrites, kept, protocols=("teacher_forced", "generation"), accuracy=None, **meta):
    records = [
        # Scored token by token, everything is kept.
        record(i, protocol, rewrite, kept if protocol == "generation" else [1.0, 1.0], accuracy)
        for protocol in protocols
        for i, rewrite in enumerate(rewrites)
    ]
    return EvaluationReport(records, {"model": "a/model", "setting": "single", "dataset": "facts", **meta})


def title(page):
    return unescape(re.search("<h1>(.*?)</h1>", page)[1])


def test_the_title_says_what_was_compared():
    one, two = run([1.0, 0.0], [1.0, 1.0], method="rome"), run([1.0, 0.0], [1.0, 1.0], method="memit")
    assert title(one.to_html()) == "rome on a/model: 2 single edits of facts"
    both = Comparison({"ROME": one, "<MEMIT>": two})
    assert title(both.to_html()) == "ROME and <MEMIT> on a/model: 2 single edits of facts"
    assert "<title>ROME and &lt;MEMIT&gt; on a/model" in both.to_html()
    many = Comparison({f"m{i}": one for i in range(7)})
    assert title(many.to_html()) == "7 methods on a/model: 2 single edits of facts"
    assert title(both.to_html(title="Mine")) == "Mine"
    other = run([1.0], [1.0, 1.0], model=None, setting="batch", dataset=None)
    assert title(other.to_html()) == "edits on a model in memory: 1 batch edit"
    mixed = Comparison({"a": one, "b": other})
    assert title(mixed.to_html()) == "a and b on a/model and a model in memory: single and batch edits of facts"


def test_what_the_model_writes_comes_first_and_teacher_forced_stays_behind():
    page = run([1.0], [1.0, 1.0]).to_html()
    behind = page.index('<details class="behind">')
    assert page.index("<h2>By generation") < behind < page.index("<h2>Teacher forced") < page.index("<h2>Runs")
    alone = run([1.0], [1.0, 1.0], ["teacher_forced"]).to_html()  # nothing to stand behind
    assert 'class="behind"' not in alone and "<h2>Teacher forced" in alone
    both = Comparison({"a": run([1.0], [1.0, 1.0]), "b": run([0.0], [1.0, 1.0])}).to_html()
    assert re.search("Edit by edit <span class='soft'>([a-z_]*)", both)[1] == "generation"


def test_every_bar_has_n_and_an_interval():
    page = run([1.0, 1.0, 1.0, 0.0], [1.0, 1.0]).to_html(max_cases=0)
    bars = re.findall('class="range">(.*?)</span>', page)
    assert len(bars) == 2 * 2  # reliability and locality, by generation and teacher forced
    # Wilson (1927) by hand for 3 of 4: centre (0.75 + 1.9208/4) / 1.9604, half 1.96/1.9604 · √(0.1875/4 + 0.96/16).
    assert bars == ["30.1 to 95.4, n 4", "51.0 to 100.0, n 4"] * 2
    assert "Wilson" in page
    assert page.count('class="sure"') == 4


def test_intervals():
    # R: binom::binom.confint(8, 10, methods = "wilson")
    assert wilson(0.8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0.0, 5)[0] == 0.0 and wilson(1.0, 5)[1] == 1.0
    values = [[float(i % 7), float(i % 3)] for i in range(400)]
    mean = sum(v for v, _ in values) / 400
    error = (sum((v - mean) ** 2 for v, _ in values) / 400 / 400) ** 0.5
    low, high = bootstrap(values, lambda means: means[:, 0])
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.3 * error)
    assert (low, high) == bootstrap(values, lambda means: means[:, 0])  # the same page on every call
    second = bootstrap(values, lambda means: means[:, 1])
    assert second[0] < sum(v for _, v in values) / 400 < second[1] < low
    assert bootstrap([[1.0]], lambda means: means[:, 0]) is None


def test_best_and_worst_are_marked():
    assert places({"a": 0.5, "b": 1.0, "c": 0.25, "d": None, "e": 1.0}) == {"b": "best", "e": "best", "c": "worst"}
    assert places({"a": 0.5, "b": 0.5}) == {} and places({"a": 0.5}) == {} and places({}) == {}
    assert places({"a": 0.50001, "b": 0.5}) == {}  # equal as they are shown
    assert places({"a": float("nan"), "b": 0.1, "c": 0.2}) == {"b": "worst", "c": "best"}
    page = Comparison({"a": run([1.0, 1.0], [1.0, 1.0]), "b": run([1.0, 0.0], [1.0, 1.0])}).to_html(max_cases=0)
    first = page[page.index("<h2>By generation") : page.index("<h2>Runs")]
    assert '<span class="value"><span class="best up">100.0</span>' in first
    assert '<span class="value"><span class="worst">50.0</span>' in first
    assert '<td class="n"><span class="best up">100.0</span>' in first


def test_nothing_is_green_beside_a_destroyed_locality():
    whole, broken = run([1.0, 1.0], [1.0, 1.0]), run([1.0, 1.0], [0.0, 0.0])
    worse = run([0.0, 0.0], [1.0, 0.0])
    page = Comparison({"whole": whole, "broken": broken, "worse": worse}).to_html()
    rows = dict(re.findall(r"<tr><td>(whole|broken|worse)</td>(.*?)</tr>", page[: page.index("<h2>Runs")]))
    assert "best up" in rows["whole"] and "near by" not in rows["whole"]
    # Teacher forced, nothing was destroyed; what the model writes decides, there too.
    assert 'class="best"' in rows["broken"] and "up" not in rows["broken"]
    assert '<td class="down">near by</td>' in rows["broken"]
    assert "near by" not in rows["worse"]  # half of it is left
    for report, green in ((whole, True), (broken, False)):
        summary = re.search(r"<summary>fact 0.*?</summary>", report.to_html())[0]
        assert summary.count('class="up">0.0 → 100.0') == 2 * green
        assert ("destroyed: near by" in summary) is not green
    table = page[page.index("Edit by edit") :]
    cells = dict(re.findall(r'<tr><td>(whole|broken|worse)</td><td class="n ([a-z]*)">', table))
    assert cells == {"whole": "up", "broken": "", "worse": "down"}


def test_destroyed_axes():
    before = {"locality_accuracy": {"a": 0.4, "b": 1.0, "d": 0.0}}
    after = {"locality": {"a": 0.5, "c": 0.49}, "locality_accuracy": {"a": 0.2, "b": 0.4, "d": 0.0}, "portability": {}}
    assert destroyed(before, after) == ["c", "b"]


def test_changed_words_are_marked_and_lost_neighbours_are_red():
    assert changed("Oslo. He", "Lima. He") == "<mark>Lima</mark>. He"
    assert changed("a <b>", "a <i> c") == "a &lt;<mark>i</mark>&gt;<mark> c</mark>"
    assert changed("same", "same") == "same" and changed("", "") == ""
    page = run([1.0], [0.0, 0.0], accuracy=[1.0, 0.0]).to_html()
    lost = re.findall(r'<tr class="lost">(.*?)</tr>', page)
    assert len(lost) == 1 and "locality · near by: lost" in lost[0]  # of the other, the answer stayed
    assert NEIGHBOURS[1] in unescape(lost[0]) and '<mark class="lost">Lima</mark>. It' in lost[0]
    assert "Rome. <mark>She</mark>" in page and "<mark>Lima</mark>. <mark>She</mark>" in page
    # Without known answers, another text is a lost neighbour.
    unknown = run([1.0], [0.0, 1.0]).to_html()
    lost = re.findall(r'<tr class="lost">(.*?)</tr>', unknown)
    assert len(lost) == 1 and NEIGHBOURS[0] in unescape(lost[0])


def test_probes_that_were_not_scored_are_named():
    record_of_one = record(0, "generation", 1.0, [1.0, 1.0])
    assert "Not scored" not in EvaluationReport([record_of_one]).to_html()
    skipped = [{"prompt": "<who>", "reason": "no answer"}]
    assert "<li>&lt;who&gt;: no answer</li>" in EvaluationReport([{**record_of_one, "skipped": skipped}]).to_html()


def test_every_table_scrolls():
    page = Comparison({"a": run([1.0], [1.0, 1.0]), "b": run([0.0], [0.0, 1.0])}).to_html()
    assert page.count("<table>") == page.count('<div class="scroll" role="region"') > 5
    assert page.count('tabindex="0"><table>') == page.count("<table>")


NASTY = "[bold red]x[/bold red] :smile: \x1b[31m\x9b\u202e\x07 [/nothing]"


def test_texts_of_others_are_texts_in_a_terminal():
    """Whatever console prints them: no markup is read, nothing moves the cursor."""
    report = run([1.0], [1.0, 1.0], label=NASTY)
    report.meta["model"] = NASTY
    for half in ("pre", "post"):
        for case in report.records:
            case[half]["locality"] = {f"{NASTY}_acc": [1.0, 1.0]}
    report = EvaluationReport(report.records, {**report.meta, "label": NASTY, "model": NASTY})
    console = Console(width=300, file=io.StringIO(), force_terminal=False)
    report.print_table(console)
    shown = "[bold red]x[/bold red] :smile: \\x1b[31m\\x9b\\u202e\\x07 [/nothing]"
    for text in (console.file.getvalue(), str(report), repr(report)):
        assert shown in " ".join(text.replace("│", "").split())
        assert not {c for c in text if unicodedata.category(c) in ("Cc", "Cf")} - {"\n"}


def test_texts_of_others_move_nothing_on_the_page():
    nasty = "\x1b[31m \u202eevil\u2066 \x9b \u2028"
    found = run([1.0], [1.0, 1.0], method=nasty)
    found.records[0]["requested_rewrite"]["prompt"] = nasty
    for page in (found.to_html(), Comparison({nasty: found, "other": found}).to_html()):
        assert "\\x1b[31m \\u202eevil" in page
        assert not [c for c in page if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c != "\n"]


def test_the_page_begins_with_what_was_asked_what_changed_and_where_it_hurts():
    kept, lost = run([1.0, 0.0], [1.0, 1.0]), run([1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0])
    page = lost.to_html()
    lead = page[page.index('<div class="panels lead">') : page.index("How to read this page")]
    text = unescape(re.sub("<[^>]+>", "", lead))
    assert "fact 2 Lima" in text and "fact 3" not in text and "and 2 more edits" in text
    assert "the edited prompts give the new answer: 0.0 % → 100.0 %" in text
    assert "near by: 33.3 % left" in text  # by generation; teacher forced, all of it
    assert "Westland's capital is Rome → Lima" in text  # the neighbour that was lost, and its first sentence alone
    assert "Sudland" not in text and "She" not in text
    both = Comparison({"<a>": kept, "b": lost}).to_html()
    assert both.index('<div class="panels lead">') < both.index("<h2>By generation")
    stayed = "At least half of each kind of other answers stayed."
    assert "<b>&lt;a&gt;</b>" in both and stayed in both
    three = Comparison({"<a>": kept, "b": lost, "c": kept}).to_html()
    assert three.count(stayed) == 1 and f"<p><b>&lt;a&gt;, c</b></p><p>{stayed}</p>" in three  # said once for both
    assert "What else changed was not measured." in run([1.0], [], ["generation"]).to_html()


def test_pictures_stand_in_the_page_and_nothing_is_fetched():
    """Of edits and of questions; an address in a report file is left out, and quotes cannot break out."""
    small = "data:image/jpeg;base64,AAAA"
    entry = record(0, "generation", 1.0, [1.0, 1.0])
    entry["requested_rewrite"]["image"] = [small, "https://example.org/x.png", 'data:image/png;base64,"onerror=']
    entry["texts"][0]["image"] = [small]
    page = EvaluationReport([entry], {"model": "a/model", "setting": "single", "dataset": "facts"}).to_html()
    assert page.count(f'<img class="thumb" alt="" src="{small}">') == 3  # what was asked, edit, text
    assert "example.org" not in page and "&quot;onerror=" in page and '"onerror=' not in page
