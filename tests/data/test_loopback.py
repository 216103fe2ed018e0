"""Downloading and streaming datasets through the real client, from the Hub on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hf_kedit.data import load_edit_dataset, load_report
from hf_kedit.errors import DataError
from hf_kedit.testing.hub import LoopbackHub

SAMPLE = Path(__file__).parent / "samples" / "ultraeditbench"
REPO = "XiaojieGu/UltraEditBench"


@pytest.mark.hub
def test_download_and_stream(hub: LoopbackHub) -> None:
    api = HfApi()
    api.create_repo(REPO, repo_type="dataset")
    commit = api.upload_folder(repo_id=REPO, repo_type="dataset", folder_path=SAMPLE).oid
    rows = json.loads((SAMPLE / "UltraEditBench_2M.json").read_text(encoding="utf-8"))
    stream = load_edit_dataset("ultraeditbench", streaming=True)
    streamed = [row["prompt"] for row in stream]
    table = load_edit_dataset("ultraeditbench")
    assert streamed == table["prompt"][:] == [row["prompt"] for row in rows]
    assert load_report(stream).files == [f"hf://datasets/{REPO}@{commit}/UltraEditBench_2M.json"]
    assert [load_report(stream).revision, load_report(table).revision] == [commit, commit]
    with pytest.raises(DataError, match=r"no such repository.*path="):
        load_edit_dataset("qaedit")
