"""Published excerpts, where they are at hand: counts that an independent count gave."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from hf_kedit.data import find_conflicts, load_edit_dataset, load_report
from hf_kedit.requests import load_requests

CHECKOUT = Path(__file__).resolve().parents[2]
SHARED = (
    Path(
        os.environ.get("KEDIT_SHARED")
        or next((p for p in (CHECKOUT / "shared",) if p.exists()), CHECKOUT.parent / "shared")
    )
    / "data"
)
FILES = {
    "knowedit/zsre": ("knowedit_zsre_test_400.json", 400, 800, 400),
    "knowedit/wiki_counterfact": ("knowedit_wiki_counterfact_test_400.json", 400, 2926, 2445),
    "knowedit/wikibio": ("knowedit_wikibio_test_100.json", 100, 200, 0),
    "counterfact_flat": ("counterfact_edit_2000.json", 2000, 2000, 0),
    "qaedit": ("qaedit_200.json", 200, 1000, 0),
    "halluedit/llama2": ("halluedit_llama2_100.json", 100, 100, 500),
}
pytestmark = pytest.mark.shared


def excerpt(name: str) -> Path:
    file = SHARED / FILES[name][0]
    if not file.exists():
        pytest.skip(f"{file.name} is not here")
    return file


@pytest.mark.parametrize("name", list(FILES))
def test_counts(name: str) -> None:
    _, rows, locality, portability = FILES[name]
    table = load_edit_dataset(name, path=excerpt(name))
    report = load_report(table)
    assert (report.read, report.kept, report.dropped, report.dropped_probes) == (rows, rows, {}, {})
    assert sum(map(len, table["locality"])) == locality and sum(map(len, table["portability"])) == portability
    assert len(load_requests(table)) == rows
    assert list(load_edit_dataset(name, path=excerpt(name), streaming=True, limit=20)) == table.to_list()[:20]


def test_axes() -> None:
    zsre = load_edit_dataset("knowedit/zsre", path=excerpt("knowedit/zsre"))
    axes = Counter(p["name"] for row in zsre for p in row["portability"])
    assert axes == {"Reasoning": 229, "Subject_Aliasing": 86, "Logical_Generalization": 85}
    assert all(row["prompt"].endswith("?") for row in zsre)
    fact = load_edit_dataset("knowedit/wiki_counterfact", path=excerpt("knowedit/wiki_counterfact"))
    have = Counter(name for row in fact for name in {p["name"] for p in row["portability"] + row["locality"]})
    assert have == {
        "Subject_Aliasing": 322, "Reasoning": 163, "Logical_Generalization": 97,
        "Relation_Specificity": 396, "Forgetfulness": 227,
    }  # fmt: skip
    assert sum(not row["portability"] for row in fact) == 34
    assert sum(bool(row["ground_truth"]) for row in fact) == 227


@pytest.mark.parametrize(
    ("name", "count"), [("counterfact_flat", 2), ("knowedit/zsre", 1), ("knowedit/wiki_counterfact", 5)]
)
def test_conflicts(name: str, count: int) -> None:
    path = excerpt(name)
    table = load_edit_dataset(name, path=path)
    found = find_conflicts(table)
    assert len(found) == count and find_conflicts(table, repetitions=True) == found
    too_many = sum(len(c.rows) - 1 for c in found)  # a prompt of WikiData counterfact occurs three times
    for keep in ("first", "last"):
        left = load_edit_dataset(name, path=path, drop_conflicts=keep)
        assert find_conflicts(left, repetitions=True) == [] and len(left) == len(table) - too_many


def test_subjects_are_where_the_description_says() -> None:
    table = load_edit_dataset("counterfact_flat", path=excerpt("counterfact_flat"))
    assert all(row["subject"] in row["prompt"] for row in table)
    assert all(row["locality"][0]["ground_truth"] == [row["ground_truth"]] for row in table)
