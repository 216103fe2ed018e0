"""General abilities before and after edits: prompts and scores by hand, runs on tiny models, the harness."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from hf_kedit.errors import DataError, EvaluationError
from hf_kedit.evaluation import (
    ABILITIES,
    BenchPlan,
    HarnessTask,
    collect_report,
    evaluate_edits,
    generate_answers,
    load_ability,
    run_bench,
)

ROWS = {
    "reasoning": {"question": "Two and two?", "answer": "Two and two make four.\n#### 1,004"},
    "nli": {"sentence1": "It rains.", "sentence2": "It is wet", "label": 0},
    "open_qa": {"question": "who built the pier", "passage": "Mol built it.", "answer": ["Mol", "Mol & Sons"]},
    "closed_qa": {"question": "is it old", "passage": "The pier is old.", "answer": True},
    "dialogue": {"article": "A: Hello.", "options": ["Hi", "No", "Rain", "Five"], "answers": "C"},
    "summarization": {"dialogue": "Ann: tea?\nBob: yes", "summary": "Ann offers tea."},
    "ner": {"text": "Ada Bell met Jan in Oslo", "entities": {"PER": ["Ada Bell", "Jan"], "LOC": ["Oslo"], "ORG": []}},
    "sentiment": {"sentence": "a lovely film", "label": 1},
}
REPLIES = {  # reply → score of the (first) example
    "reasoning": {"1,004.": 1.0, "about 1004 cows": 1.0, "10042": 0.0, "four": None},
    "nli": {"True.": 1.0, "Tru": 1.0, "false, true": 0.0, "maybe": None},
    "open_qa": {"It was Mol & Sons": 1.0, "the mole": 0.0},
    "closed_qa": {"Yes, it is": 1.0, "no": 0.0, "It is": None},
    "dialogue": {"C.": 1.0, "(a)": 0.0, "Dawn": None},
    "summarization": {"Ann offers tea": 1.0, "": 0.0, "Ann drinks tea": (2 / 3 + 0 + 2 / 3) / 3},
    "ner": {"Jan, Ada Bell": 1.0, "Ada": 0.0, "Jan": 0.5},
    "sentiment": {"posit": 1.0, "negative": 0.0, "so": None},
}


def test_there_are_rows_for_all_eight():
    assert set(ROWS) == set(REPLIES) == set(ABILITIES) and len(ABILITIES) == 8


@pytest.mark.parametrize("task", sorted(ROWS))
def test_prompts_and_scores(task):
    ability = load_ability(task, [ROWS[task]])
    example = ability.examples[0]
    for text in ROWS[task].values():
        if isinstance(text, str) and text not in example.answers and task != "dialogue":
            assert text.split("####")[0].strip() in example.prompt
    for reply, score in REPLIES[task].items():
        found = ABILITIES[task].score(reply, example.answers)
        assert found == (None if score is None else pytest.approx(score)), reply


def test_prompts_of_the_publication():
    assert load_ability("nli", [ROWS["nli"]]).examples[0].prompt == (
        "It rains. entails the It is wet. True or False? answer:"
    )
    assert load_ability("reasoning", [ROWS["reasoning"]]).examples[0].prompt == (
        "Q: Two and two? A:Let's think step by step. Two and two make four."
        " Therefore, the answer (arabic numerals) is:"
    )
    assert "Among A through D, the answer is" in load_ability("dialogue", [ROWS["dialogue"]]).examples[0].prompt
    asked = load_ability("open_qa", [{"question": "who", "answer": "me"}]).examples[0].prompt
    assert asked == "Answer the following question. Question: who Answer:"


def test_entities_from_tags():
    row = {"tokens": "Ada Bell met Jan in Oslo".split(), "ner_tags": [1, 2, 0, 1, 0, 5]}
    kinds = {e.prompt.split()[2]: e.answers for e in load_ability("ner", [row]).examples}
    assert kinds == {"Person": ("Ada Bell", "Jan"), "Location": ("Oslo",)}
    assert len(load_ability("ner", [ROWS["ner"]]).examples) == 2  # no question about a type that does not occur


def test_local_files_and_mistakes(tmp_path):
    file = tmp_path / "nli.jsonl"
    file.write_text("".join(json.dumps({**ROWS["nli"], "label": i % 2}) + "\n" for i in range(5)))
    ability = load_ability("nli", file, limit=3, name="rte")
    assert [e.answers for e in ability.examples] == [("True",), ("False",), ("True",)] and ability.name == "rte"
    assert ability.settings() != load_ability("nli", file, limit=2).settings()
    with pytest.raises(EvaluationError, match="Did you mean 'sentiment'"):
        load_ability("sentimnt", [])
    with pytest.raises(DataError, match="row 0: needs 'sentence' and 'label'"):
        load_ability("sentiment", [{"text": "x"}])
    with pytest.raises(DataError, match="no usable row"):
        load_ability("sentiment", [])
    with pytest.raises(DataError, match="no public data set"):
        load_ability("dialogue")
    with pytest.raises(DataError, match="cannot load"):  # the Hub is out of reach
        load_ability("sentiment")


def test_measuring_is_generating_and_scoring(gpt2, tokenizer):
    rows = [ROWS["summarization"], {"dialogue": "Jan: Rome?", "summary": "Jan asks about Rome."}]
    ability = load_ability("summarization", rows, max_new_tokens=8)
    found = ability.measure(gpt2, tokenizer)
    texts = generate_answers(gpt2, tokenizer, [e.prompt for e in ability.examples], 8, cut_at_newline=False)
    scores = [
        ABILITIES["summarization"].score(t.text, e.answers) for t, e in zip(texts, ability.examples, strict=True)
    ]
    assert found == {
        "score": pytest.approx(sum(scores) / 2),
        "metric": "mean of ROUGE-1, -2, -L",
        "n": 2,
        "n_unparsable": 0,
    }


# ---------------------------------------------------------------------- along edits


@pytest.fixture
def abilities():
    """What the tiny model happens to say is the answer of one task; the other one it never gets right."""
    rows = [{"question": "What is the capital of Norland?", "answer": "Lima"}]
    return [
        load_ability("open_qa", rows, name="norland", max_new_tokens=8),
        load_ability("sentiment", [ROWS["sentiment"]]),
    ]


def test_abilities_along_a_sequence(editable, rows, cache, abilities, tmp_path):
    asked = {"protocol": "teacher_forced", "cache": cache, "abilities": abilities, "collapse_text": "Oslo is"}
    report = evaluate_edits(editable, rows, "sequential", at=[1], output_dir=tmp_path / "run", **asked)
    first, last = report.meta["checkpoints"]
    assert (first["n_edits"], last["n_edits"]) == (1, 3)
    for point in (first, last):
        assert set(point["abilities"]) == set(point["abilities_before"]) == {"norland", "sentiment"}
        assert point["abilities"]["norland"]["metric"] == "answer contained"
    # The numbers are those of the model at that moment.
    assert last["abilities_before"]["norland"] == abilities[0].measure(editable.base_model, editable.tokenizer)
    editable.edit(rows, batch_size=1)
    assert last["abilities"]["norland"] == abilities[0].measure(editable.base_model, editable.tokenizer)
    editable.rollback("all")
    before, after = last["abilities_before"]["norland"]["score"], last["abilities"]["norland"]["score"]
    assert report.curve("abilities/norland") == [(0, before), (1, first["abilities"]["norland"]["score"]), (3, after)]
    assert report.meta["abilities"]["norland"]["task"] == "open_qa"
    page = report.to_html()
    assert "norland" in page and "General abilities" in page and "norland" in report.to_markdown()
    assert collect_report(tmp_path / "run").meta["checkpoints"] == report.meta["checkpoints"]
    with pytest.raises(EvaluationError, match="differs in abilities"):
        changed = {**asked, "abilities": abilities[:1]}
        evaluate_edits(editable, rows, "sequential", at=[1], output_dir=tmp_path / "run", **changed)


def test_abilities_after_batches(editable, rows, cache, abilities):
    report = evaluate_edits(editable, rows, "batch", 2, cache=cache, abilities=abilities)
    assert [point["n_edits"] for point in report.meta["checkpoints"]] == [2, 1]
    assert all(math.isfinite(point["drift"]["relative"]) for point in report.meta["checkpoints"])
    single = evaluate_edits(editable, rows, "batch", 1, cache=cache, abilities=abilities)
    scores = [point["abilities"]["norland"]["score"] for point in single.meta["checkpoints"]]
    before = single.meta["checkpoints"][0]["abilities_before"]["norland"]["score"]
    assert len(scores) == 3
    assert single.curve("abilities/norland") == [(0, before), (1, pytest.approx(sum(scores) / 3))]
    assert evaluate_edits(editable, rows, "batch", cache=cache).meta["checkpoints"] == []
    with pytest.raises(EvaluationError, match="every single edit"):
        evaluate_edits(editable, rows, cache=cache, abilities=abilities)
    with pytest.raises(EvaluationError, match="two abilities"):
        evaluate_edits(editable, rows, "batch", cache=cache, abilities=[abilities[0]] * 2)


def test_a_sweep_with_and_without_rect(tmp_path, rows, gpt2, tokenizer):
    gpt2.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "edits.json").write_text(json.dumps(rows))
    (tmp_path / "nli.json").write_text(json.dumps([ROWS["nli"]]))
    plan = BenchPlan.from_dict(
        {
            "models": [str(tmp_path / "model")],
            "methods": [
                {"name": "ft-m", "label": "FT-M", "layers": [-1], "num_steps": 4},
                {"name": "ft-m", "label": "FT-M with RECT", "layers": [-1], "num_steps": 4, "rect_keep": 0.4},
            ],
            "datasets": [str(tmp_path / "edits.json")],
            "settings": ["single", {"setting": "sequential", "at": [1, 2]}],
            "protocols": ["teacher_forced"],
            "abilities": [{"task": "nli", "source": str(tmp_path / "nli.json")}],
            "output_dir": str(tmp_path / "out"),
        }
    )
    result = run_bench(plan, progress=False)
    assert len(result.reports) == 4 and not result.failed
    points = {a["method"]: r.curve("abilities/nli") for a, r in result.reports if a["setting"] == "sequential"}
    assert [[n for n, _ in curve] for curve in points.values()] == [[0, 1, 2, 3]] * 2
    drifts = {
        a["method"]: r.meta["checkpoints"][-1]["drift"]["changed"] for a, r in result.reports if len(r.moments) > 1
    }
    assert drifts["FT-M with RECT"] < drifts["FT-M"]
    assert "sequential: general abilities" in result.comparison().to_html()
    with pytest.raises(EvaluationError, match="unknown key in an ability 'taks'"):
        BenchPlan.from_dict({**_dict_of(plan), "abilities": [{"taks": "nli"}]})
    with pytest.raises(EvaluationError, match="unknown ability 'nil'"):
        BenchPlan.from_dict({**_dict_of(plan), "abilities": ["nil"]})


def _dict_of(plan):
    return {"models": ["m"], "methods": ["ft-m"], "datasets": ["world"], "output_dir": str(plan.output_dir)}


# ---------------------------------------------------------------------- the harness


@pytest.mark.slow
def test_a_task_of_the_harness_sees_the_edit(editable, tmp_path, cache):
    rows = [{"prompt": "The capital of Norland is", "options": ["Lima", "Oslo"], "label": 0}]
    (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    task = {
        "task": "capitals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "capitals.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "capitals.yaml").write_text(yaml.safe_dump(task))
    ability = HarnessTask("capitals", include_path=tmp_path / "tasks")
    old = {"prompt": "The capital of Norland is", "target_new": "Oslo"}
    editable.edit({**old, "id": "old"})
    edit = {"prompt": "The capital of Norland is", "target_new": "Lima", "id": "new"}
    report = evaluate_edits(editable, [edit], "sequential", cache=cache, abilities=[ability])
    point = report.meta["checkpoints"][0]
    assert point["abilities_before"]["capitals"] == {"score": 0.0, "metric": "acc,none", "n": 2}
    assert point["abilities"]["capitals"] == {"score": 1.0, "metric": "acc,none", "n": 2}
    with pytest.raises(EvaluationError, match="no metric 'f1'"):
        HarnessTask("capitals", "f1", include_path=tmp_path / "tasks").measure(editable, editable.tokenizer)
    with pytest.raises(EvaluationError, match="no-such-task"):
        HarnessTask("no-such-task").measure(editable, editable.tokenizer)
