"""The user's own files and tables, conflicts, contamination, and bad rows of every kind."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_kedit.data import FEATURES, dataset_entry, dataset_names, find_conflicts, load_edit_dataset, load_report
from hf_kedit.errors import DataError, KeditError, RequestError
from hf_kedit.evaluation.runs.plan import read_requests
from hf_kedit.requests import EditRequest, load_requests

SAMPLES = Path(__file__).parent / "samples"
COLUMNS = {
    "prompt": "question",
    "target_new": "answer",
    "subject": "who",
    "ground_truth": "old",
    "rephrase_prompts": ["again", "and again"],
    "locality": {"near": ("other question", "other answer")},
}
ROW = {
    "question": "Where does Ada Bell live?",
    "answer": "1998",
    "who": "Ada Bell",
    "old": "Bergen",
    "again": "The home of Ada Bell?",
    "and again": "",
    "other question": "Where does Jan Mol live?",
    "other answer": "true",
    "note": "mine",
}


# ---------------------------------------------------------------------- columns


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "parquet", "table", "list"])
def test_own_columns_in_any_form(tmp_path: Path, form: str) -> None:
    bare = {**dict.fromkeys(ROW, ""), "question": "Who rows?", "answer": "Piet"}
    rows = [ROW, bare]
    source: Any
    if form == "table":
        source = Dataset.from_list(rows)
    elif form == "list":
        source = rows
    else:
        source = tmp_path / f"mine.{form}"
        if form == "json":
            source.write_text(json.dumps(rows))
        elif form == "jsonl":
            source.write_text("\n".join(map(json.dumps, rows)))
        elif form == "csv":
            Dataset.from_list(rows).to_csv(source)
        else:
            Dataset.from_list(rows).to_parquet(source)
    first, second = load_edit_dataset(source, columns=COLUMNS)
    assert first["id"] == ("data/0" if form in ("table", "list") else "mine/0")
    assert first["target_new"] == "1998" and first["ground_truth"] == ["Bergen"]
    assert first["rephrase_prompts"] == ["The home of Ada Bell?"] and first["extra"] == {"note": "mine"}
    assert [(p["name"], p["prompt"], p["ground_truth"]) for p in first["locality"]] == [
        ("near", "Where does Jan Mol live?", [["true"]])
    ]
    assert second["subject"] is None and second["locality"] == [] and second["extra"] == {}
    streamed = load_edit_dataset(source, columns=COLUMNS, streaming=True)
    assert list(streamed) == [first, second]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": "question"}, "target_new"),
        ({**COLUMNS, "promt": "x"}, "'prompt'"),
        ({**COLUMNS, "prompt": 3}, "name of a column"),
        ({**COLUMNS, "locality": {"near": "one"}}, "answer column"),
        ({**COLUMNS, "rephrase_prompts": []}, "list of names"),
        ({**COLUMNS, "subject": "whoo"}, "'who'"),
        (["prompt"], "must be a dict"),
    ],
)
def test_wrong_columns(columns: Any, said: str) -> None:
    with pytest.raises(KeditError, match=said):
        load_edit_dataset([ROW], columns=columns)


def test_own_data_in_known_layouts(tmp_path: Path) -> None:
    table = load_edit_dataset("knowedit/zsre", path=SAMPLES / "knowedit")
    table.to_parquet(tmp_path / "again.parquet")
    assert load_edit_dataset(tmp_path / "again.parquet").to_list() == table.to_list()
    assert load_edit_dataset(table).to_list() == table.to_list()
    assert load_edit_dataset(load_requests(table)).to_list() == table.to_list()
    for wrong in (5, {"prompt": "p"}, b"x"):
        with pytest.raises(DataError, match=r"cannot take rows|no usable edit request among 1 rows"):
            load_edit_dataset(wrong)
    with pytest.raises(DataError, match="revision"):
        load_edit_dataset(table, revision="main")
    with pytest.raises(DataError, match="no split"):
        load_edit_dataset(table, split="validation")


def test_answers_that_look_like_json_survive(tmp_path: Path) -> None:
    texts = ["1998", "true", "null", "NaN", "[1]", '{"a": 1}', "1e5", "007"]
    rows = [
        {"prompt": f"{i}?", "target_new": t, "ground_truth": t if i % 2 else [t],
         "rephrase_prompts": t, "locality": {"x": [{"prompt": t, "ground_truth": t}]}, "metadata": {"kept": t}}
        for i, t in enumerate(texts)
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    table = load_edit_dataset(tmp_path / "rows.json")
    table.to_parquet(tmp_path / "a.parquet")
    stored = Dataset.from_parquet(str(tmp_path / "a.parquet"), features=FEATURES, cache_dir=str(tmp_path / "c"))
    for version in (table, stored, list(load_edit_dataset(tmp_path / "rows.json", streaming=True))):
        for row, text in zip(version, texts, strict=True):
            assert row["target_new"] == text and row["ground_truth"] == [text] == row["rephrase_prompts"]
            assert row["locality"][0]["prompt"] == text and row["locality"][0]["ground_truth"] == [[text]]
            assert row["extra"] == {"kept": text}


# ---------------------------------------------------------------------- conflicts and contamination


def edits(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"prompt": p, "target_new": t} for p, t in pairs]


def test_conflicts() -> None:
    rows = edits(
        ("A is", "x"), ("a  is", "y"), ("B is", "x"), ("b is", "X "), ("Caf\u00e9 is", "p"), ("cafe\u0301 is", "q")
    )
    assert [(c.prompt, c.rows, c.targets) for c in find_conflicts(rows)] == [
        ("A is", (0, 1), ("x", "y")),
        ("Caf\u00e9 is", (4, 5), ("p", "q")),
    ]
    assert [c.rows for c in find_conflicts(rows, repetitions=True)] == [(0, 1), (2, 3), (4, 5)]
    assert find_conflicts([EditRequest(**r) for r in rows]) == find_conflicts(rows)
    first = load_edit_dataset(rows, drop_conflicts="first")
    assert first["target_new"][:] == ["x", "x", "p"]
    assert load_report(first).dropped == {"conflict": 2, "repetition": 1}
    last = load_edit_dataset(rows, drop_conflicts="last")
    assert last["id"][:] == ["data/1", "data/3", "data/5"]
    assert load_edit_dataset(rows, drop_conflicts="last", limit=2)["id"][:] == ["data/1", "data/3"]
    assert find_conflicts(first) == find_conflicts(last) == []


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.sampled_from("ABC"), st.sampled_from("xy")), min_size=1, max_size=8),
    keep=st.sampled_from(["first", "last"]),
)
def test_without_conflicts_every_prompt_is_there_once(pairs: list[tuple[str, str]], keep: Any) -> None:
    table = load_edit_dataset(edits(*pairs), drop_conflicts=keep)
    wanted = dict(reversed(pairs)) if keep == "first" else dict(pairs)
    assert {row["prompt"]: row["target_new"] for row in table} == wanted and len(table) == len(wanted)
    numbers = [int(i.split("/")[1]) for i in table["id"]]
    assert numbers == sorted(numbers)
    report = load_report(table)
    assert report.read == len(pairs) == report.kept + sum(report.dropped.values())


def test_conflicts_between_groups(tmp_path: Path) -> None:
    rows = json.loads((SAMPLES / "mquake" / "MQuAKE-CF.json").read_text(encoding="utf-8"))
    same, other = copy.deepcopy(rows[0]), copy.deepcopy(rows[0])
    other["requested_rewrite"][1]["target_new"]["str"] = "Oslo"
    (tmp_path / "MQuAKE-CF.json").write_text(json.dumps([*rows, same, other]))
    table = load_edit_dataset("mquake/cf", path=tmp_path, drop_conflicts="first")
    # A repeated edit is needed for its group; a contradicting one takes its whole group with it.
    assert table["id"][:] == [f"mquake/cf/{n}" for n in ("0.0", "0.1", "1", "2.0", "2.1")]
    assert load_report(table).dropped == {"conflict": 2}


def test_exclude_keeps_training_out_of_the_test() -> None:
    train = load_edit_dataset("knowedit/wiki_recent", split="train", path=SAMPLES / "knowedit")
    with pytest.raises(DataError, match=r"2 \(excluded\)"):
        load_edit_dataset("knowedit/wiki_recent", path=SAMPLES / "knowedit", exclude=train)
    left = load_edit_dataset("knowedit/wiki_recent", path=SAMPLES / "knowedit", exclude=train.select([0]))
    assert left["subject"][:] == ["Jan Mol"]
    by_request = load_requests(train)[1:]
    assert load_edit_dataset(train, exclude=by_request)["subject"][:] == ["Ada Bell"]


def test_reports(tmp_path: Path) -> None:
    rows = [*edits(("A", "x"), ("B", "")), {"prompt": "C", "target_new": 3}, {"prompt": "D", "target_new": "y"}]
    with pytest.raises(RequestError, match=r"row 2.*target_new"):
        load_edit_dataset(rows)
    table = load_edit_dataset(rows, bad_rows="drop")
    report = load_report(table)
    assert (report.read, report.kept, report.dropped) == (4, 2, {"no target": 1, "unusable": 1})
    assert "1 (unusable)" in str(report)
    table.save_to_disk(tmp_path / "t")
    assert load_report(Dataset.load_from_disk(str(tmp_path / "t")).select([0])) == report
    with pytest.raises(DataError, match="no load report"):
        load_report(Dataset.from_list([{"a": 1}]))
    assert not load_report(load_edit_dataset(rows, streaming=True)).complete
    assert load_report(load_edit_dataset(rows, limit=1)).read == 1


# ---------------------------------------------------------------------- bad rows

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["prompt", "str"]), inner, max_size=2),
    max_leaves=4,
)
FAMILIES = [
    "knowedit/wiki_counterfact", "knowedit/wikibio", "knowedit/convsent", "knowedit/sanitation", "counterfact",
    "counterfact_flat", "zsre", "counterfact_plus/one_hop", "zsre_plus/inverse_relation", "mquake/cf",
    "ripple_edits/random", "qaedit", "wikibigedit/20240201_20240220", "ultraeditbench", "unke", "halluedit/llama2",
    "cknowedit/idiom", "conceptedit/gpt2_inter", "safeedit", "personalityedit", "mmedit/vqa", "akew/counterfact",
    "akew/mquake_cf", "leme/counterfact", "fever", "counterfact_plus/other_attribution", "vlkeb", "mmke/entity",
    "comprehendedit", "conflictedit/coverage", "roundedit/easy", "mquake_remastered/cf_3k",
]  # fmt: skip


def sample_of(name: str) -> Any:
    """Return the content of a sample file of a dataset."""
    family = name.split("/")[0]
    source = dataset_entry(name).source
    assert source is not None
    folder = SAMPLES / ("editing_data" if family.endswith("_plus") else family)
    folder = folder / name.split("/")[1] if family in ("mmedit", "mmke") else folder
    from hf_kedit.storage.records import read_object

    located = source.locate(name, dataset_entry(name).default_split, folder)
    value = read_object(located.files[0])
    return value if isinstance(value, list) or "success" in value else [value]


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every value inside a value."""
    found = [at] if at else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        found += paths(one, (*at, key))
    return found


def test_every_family_is_tried() -> None:
    filed = {n.split("/")[0] for n in dataset_names() if dataset_entry(n).source is not None}
    assert {n.split("/")[0] for n in FAMILIES} == filed


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_row_gives_a_table_or_a_typed_error(name: str, data: st.DataObject, tmp_path: Path) -> None:
    """Replace or remove any value of the sample: nothing but our own errors, and no half-empty row."""
    value = copy.deepcopy(sample_of(name))
    for _ in range(data.draw(st.integers(1, 2))):
        way = data.draw(st.sampled_from(paths(value) or [()]))
        if not way:
            break
        holder = value
        for key in way[:-1]:
            holder = holder[key]
        if isinstance(holder, dict) and data.draw(st.booleans()):
            del holder[way[-1]]
        else:
            holder[way[-1]] = data.draw(JUNK)
    file = tmp_path / "damaged.json"
    file.write_text(json.dumps(value))
    try:
        table = load_edit_dataset(name, path=file)
    except KeditError as error:
        assert str(error)
        if isinstance(error, RequestError):
            assert error.row is not None
        try:
            table = load_edit_dataset(name, path=file, bad_rows="drop")
        except DataError:
            return
    assert table.features == FEATURES and len(table) > 0
    for row in table:
        assert row["prompt"].strip() and row["target_new"].strip()
        assert all(p["prompt"].strip() for p in row["locality"] + row["portability"])


# ---------------------------------------------------------------------- what a row must not lose


@pytest.mark.parametrize("prompt", ["{} knows Ada, who is a", "Ada knows {}, who is a"])
def test_a_slot_still_decides_where_the_subject_stands(prompt: str) -> None:
    request = EditRequest(prompt=prompt, subject="Ada", target_new="cook")
    (row,) = load_edit_dataset([request.to_dict()])
    again = EditRequest.from_dict(row)
    assert again.filled_prompt == request.filled_prompt
    assert again.subject_span() == request.subject_span()


def test_a_separator_comes_through_a_table(tmp_path: Path) -> None:
    rows = [{"prompt": "A", "target_new": "x", "separator": "\n"}, {"prompt": "B", "target_new": "y"}]
    requests = load_requests(load_edit_dataset(rows))
    assert [r.separator for r in requests] == ["\n", None]
    (tmp_path / "own.csv").write_text('q,a,sep\nA,x," - "\nB,y,\n', encoding="utf-8")
    columns = {"prompt": "q", "target_new": "a", "separator": "sep"}
    requests = load_requests(load_edit_dataset(tmp_path / "own.csv", columns=columns))
    assert [r.separator for r in requests] == [" - ", None]


def test_lists_in_cells_of_mapped_columns(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    columns = {"prompt": "q", "target_new": "a", "rephrase_prompts": ["r"], "ground_truth": "old"}
    file.write_text('q,a,r,old\n[1] is,x,"[""a b"", ""c d""]","[""e"", ""f""]"\n', encoding="utf-8")
    (row,) = load_edit_dataset(file, columns=columns | {"locality": {"near": ("r", "old")}})
    assert (row["prompt"], row["rephrase_prompts"], row["ground_truth"]) == ("[1] is", ["a b", "c d"], ["e", "f"])
    assert row["locality"][0]["ground_truth"] == [["e"], ["f"]]
    for wrong, column in (("\"['a', 'b']\",x", "r"), ("x,[a b]", "old")):
        file.write_text(f"q,a,r,old\nA,x,{wrong}\n", encoding="utf-8")
        with pytest.raises(RequestError, match="JSON") as caught:
            load_edit_dataset(file, columns=columns)
        assert (caught.value.row, caught.value.field) == (0, column)


FLAT_ROW = {
    "case_id": 1,
    "prompt": "The capital of Chad is",
    "subject": "Chad",
    "target_new": "Oslo",
    "ground_truth": "N'Djamena",
    "rephrase_prompt": "Chad's capital is",
    "locality_prompt": "The capital of Peru is",
    "locality_ground_truth": "Lima",
}


def test_rows_of_a_known_layout_name_it(tmp_path: Path) -> None:
    """Whoever passes a file of the field as their own learns which dataset it is."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([FLAT_ROW]))
    said = rf"case_id.*look like those of 'counterfact_flat'.*--dataset counterfact_flat --dataset-path {file}"
    with pytest.raises(DataError, match=said):
        load_edit_dataset(file)
    with pytest.raises(DataError, match=said):
        read_requests(file, None)
    assert load_edit_dataset("counterfact_flat", path=file)["target_new"] == ["Oslo"]
    with pytest.raises(RequestError, match="unknown field") as caught:
        load_edit_dataset([{"prompt": "a", "target_new": "b", "colour": "red"}])
    assert "look like" not in str(caught.value)
