"""Where files come from: folders, the Hub's cache, streams; and what is said when they are missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import IterableDataset, IterableDatasetDict
from huggingface_hub.errors import RemoteEntryNotFoundError

from hf_kedit.data import dataset_entry, dataset_names, load_edit_dataset, load_report
from hf_kedit.data.sources import Source
from hf_kedit.errors import DataError

SAMPLES = Path(__file__).parent / "samples"
COMMIT = "6d218881e60c7c8be836bd2befd598eb3b318be4"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, without network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def cached(cache: Path, repo: str, commit: str, sample: Path, refs: tuple[str, ...] = ()) -> None:
    """Put a folder into the cache as if it had been downloaded."""
    folder = cache / f"datasets--{repo.replace('/', '--')}"
    shutil.copytree(sample, folder / "snapshots" / commit)
    for ref in refs:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)


# ---------------------------------------------------------------------- the Hub


def test_from_the_cache_at_the_built_in_revision(hub_cache: Path) -> None:
    cached(hub_cache, "zjunlp/KnowEdit", COMMIT, SAMPLES / "knowedit")
    table = load_edit_dataset("knowedit/zsre")
    assert table.to_list() == load_edit_dataset("knowedit/zsre", path=SAMPLES / "knowedit").to_list()
    report = load_report(table)
    assert report.revision == COMMIT and report.files[0].endswith("benchmark/ZsRE/ZsRE-test-all.json")
    stream = load_edit_dataset("knowedit/zsre", streaming=True)
    assert list(stream) == table.to_list() and load_report(stream).revision == COMMIT
    both = load_edit_dataset("knowedit/wiki_recent", split="all", streaming=True)
    assert isinstance(both, IterableDatasetDict) and set(both) == {"train", "test"}


def test_another_revision(hub_cache: Path) -> None:
    cached(hub_cache, "zjunlp/KnowEdit", "a" * 40, SAMPLES / "knowedit", refs=("old",))
    assert load_report(load_edit_dataset("knowedit/zsre", revision="old")).revision == "a" * 40
    with pytest.raises(DataError, match=f"revision {COMMIT}.*not in the local cache"):
        load_edit_dataset("knowedit/zsre")


def test_file_names_that_are_patterns(hub_cache: Path, tmp_path: Path) -> None:
    """CounterFact's files carry hashes in their names; HalluEditBench has many files."""
    sample = tmp_path / "counterfact"
    (sample / "data").mkdir(parents=True)
    rows = json.loads((SAMPLES / "counterfact" / "counterfact.json").read_text(encoding="utf-8"))
    pq.write_table(pa.Table.from_pylist(rows), sample / "data" / "test-00000-of-00001-0123.parquet")
    source = dataset_entry("counterfact").source
    assert source is not None and source.repo is not None and source.revision is not None
    cached(hub_cache, source.repo, source.revision, sample)
    local = load_edit_dataset("counterfact", path=SAMPLES / "counterfact", split="test")
    assert load_edit_dataset("counterfact").to_list() == local.to_list()
    source = dataset_entry("halluedit/llama2").source
    assert source is not None and source.repo is not None and source.revision is not None
    cached(hub_cache, source.repo, source.revision, SAMPLES / "halluedit")
    table = load_edit_dataset("halluedit/llama2")
    assert len(table) == 4 and [Path(f).name for f in load_report(table).files] == [
        "places_landmark.csv", "technology_software.csv"
    ]  # fmt: skip


def test_a_renamed_file_is_sought_by_name(hub_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mirror writes the folders into the file name; the answers of the Hub are played by its client."""
    file = tmp_path / "benchmark_ZsRE_ZsRE-test-all.json"
    shutil.copy(SAMPLES / "knowedit" / "benchmark" / "ZsRE" / "ZsRE-test-all.json", file)

    def download(repo: str, name: str, **_: Any) -> str:
        if name != file.name:
            import httpx2  # the client that huggingface_hub uses

            raise RemoteEntryNotFoundError(
                "404", response=httpx2.Response(404, request=httpx2.Request("GET", "http://x"))
            )
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: ["README.md", file.name])
    assert len(load_edit_dataset("knowedit/zsre")) == 2
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: ["README.md", "other.json"])
    with pytest.raises(DataError, match=r"it has other\.json"):
        load_edit_dataset("knowedit/zsre")


@pytest.mark.parametrize("name", [n for n in dataset_names() if dataset_entry(n).source is not None])
@pytest.mark.parametrize("streaming", [False, True])
def test_without_path_and_network(hub_cache: Path, name: str, streaming: bool) -> None:
    source = dataset_entry(name).source
    assert source is not None
    with pytest.raises(DataError) as error:
        load_edit_dataset(name, streaming=streaming)
    text = str(error.value)
    assert name in text and "path=" in text and source.published in text
    assert any(pattern in text for pattern in source.files[dataset_entry(name).default_split])
    if source.repo is None:
        assert source.licence in text and "not on the Hub" in text


def test_every_source_says_where_it_is() -> None:
    for name in dataset_names():
        source = dataset_entry(name).source
        if source is not None:
            assert source.published and source.licence and source.files
            assert source.revision is None or (source.repo and len(source.revision) == 40)


# ---------------------------------------------------------------------- folders and files


def test_folders_are_searched_by_name(tmp_path: Path) -> None:
    original = SAMPLES / "knowedit" / "benchmark" / "ZsRE" / "ZsRE-test-all.json"
    shutil.copy(original, tmp_path / "benchmark_ZsRE_ZsRE-test-all.json")
    assert len(load_edit_dataset("knowedit/zsre", path=tmp_path)) == 2
    (tmp_path / "deep" / "er").mkdir(parents=True)
    shutil.copy(original, tmp_path / "deep" / "er" / "zsre-TEST-all.json")
    assert "deep" in load_report(load_edit_dataset("knowedit/zsre", path=tmp_path)).files[0]
    shutil.copy(original, tmp_path / "ZsRE-test-all.json")
    with pytest.raises(DataError, match="several files"):
        load_edit_dataset("knowedit/zsre", path=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "knowedit/zsre", "path": SAMPLES / "zsre"}, r"ZsRE-test-all\.json.*zsre_mend_eval\.json"),
        ({"name": "knowedit/zsre", "path": SAMPLES / "nowhere"}, "no file or folder"),
        ({"name": "knowedit/zsre", "path": SAMPLES / "knowedit", "revision": "main"}, "leave it out"),
        ({"name": "zsre", "revision": "main"}, "does not come from the Hub"),
        ({"name": "knowedit/zsre", "path": SAMPLES / "knowedit", "split": "train"}, "no split 'train'"),
        ({"name": "zsre", "path": SAMPLES / "zsre" / "zsre_mend_eval.json", "split": "all"}, "one file"),
        ({"name": "zsre", "path": SAMPLES / "zsre", "columns": {"prompt": "src"}}, "layout of 'zsre' is known"),
        ({"name": "zsre", "path": SAMPLES / "zsre", "targt": "alt"}, "'target'"),
        ({"name": "knowedit/zsr"}, "'knowedit/zsre'"),
        ({"name": None, "path": SAMPLES}, "folder"),
        ({"name": "zsre", "path": SAMPLES / "zsre", "streaming": True, "drop_conflicts": "last"}, "streaming"),
        ({"name": "zsre", "path": SAMPLES / "zsre", "bad_rows": "skip"}, "bad_rows"),
        ({"name": "zsre", "path": SAMPLES / "zsre", "exclude": "a prompt"}, "list of prompts"),
        ({"name": "zsre", "path": SAMPLES / "zsre", "exclude": [3]}, "prompts, or rows"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_edit_dataset(**arguments)


def test_all_splits_of_a_folder() -> None:
    tables = load_edit_dataset("safeedit", split="all", path=SAMPLES / "safeedit")
    assert list(tables) == ["train", "validation", "test"] and all(len(t) == 1 for t in tables.values())
    assert load_report(tables["test"]).split == "test"
    with pytest.raises(DataError, match="'train'"):
        load_report(tables)


def test_a_stream_reads_no_more_than_it_needs(tmp_path: Path) -> None:
    body = ",".join(json.dumps({"prompt": f"{i}?", "ans": "x" * 500, "subject": "s"}) for i in range(1000))
    (tmp_path / "UltraEditBench_2M.json").write_text(f"[{body}, broken")
    stream = load_edit_dataset("ultraeditbench", path=tmp_path, streaming=True)
    assert isinstance(stream, IterableDataset)
    assert [row["prompt"] for row in stream.take(3)] == ["0?", "1?", "2?"]
    assert len(load_edit_dataset("ultraeditbench", path=tmp_path, limit=5)) == 5
    with pytest.raises(DataError, match="record 1000"):
        load_edit_dataset("ultraeditbench", path=tmp_path)


def test_many_rows_become_one_table(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "ans": str(i), "subject": "s"} for i in range(12_003)]
    (tmp_path / "UltraEditBench_2M.json").write_text(json.dumps(rows))
    table = load_edit_dataset("ultraeditbench", path=tmp_path)
    assert table["target_new"][:] == [str(i) for i in range(12_003)] and load_report(table).kept == 12_003


def test_a_source_prefers_exact_names() -> None:
    source = Source({"test": ("b.json", "*.json")}, "there", "MIT")
    assert source._matching(["x_b.json", "a.json", "q/b.json"], source.files["test"]) == ["q/b.json"]
    assert source._matching(["c.json", "a.json"], source.files["test"]) == ["a.json", "c.json"]
    assert source._matching(["c.txt"], source.files["test"]) == []
