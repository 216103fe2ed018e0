"""Datasets as Parquet on the Hub: what plain `load_dataset` then reads, and what may not be passed on."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard

from hf_kedit.data import FEATURES, as_hub_parquet, dataset_entry, dataset_names, load_edit_dataset
from hf_kedit.data.publishing import hub_licence
from hf_kedit.errors import DataError, HubError
from hf_kedit.testing.hub import LoopbackHub

SAMPLES = Path(__file__).parent / "samples"


@pytest.mark.hub
def test_a_registered_dataset_survives_the_hub(hub: LoopbackHub) -> None:
    options = {"path": SAMPLES / "halluedit", "split": "test"}
    address = as_hub_parquet("halluedit/llama2", "org/hallu", **options)
    assert address == f"{hub.endpoint}/datasets/org/hallu"
    wanted = load_edit_dataset("halluedit/llama2", **options)
    again = load_dataset("org/hallu", split="test")
    assert again.features == FEATURES and again.to_list() == wanted.to_list()
    card = DatasetCard.load("org/hallu")
    assert card.data.license == "mit" and "knowledge-editing" in card.data.tags
    assert dataset_entry("halluedit/llama2").source.published in card.text and "4 rows in `test`" in card.text
    as_hub_parquet("halluedit/llama2", "org/hallu", **options)  # again: the card stays readable, the rows the same
    assert load_dataset("org/hallu", split="test", download_mode="force_redownload").to_list() == wanted.to_list()


@pytest.mark.hub
def test_own_tables(hub: LoopbackHub) -> None:
    table = load_edit_dataset([{"prompt": "{} is", "subject": "Ada", "target_new": "1998"}])
    with pytest.raises(DataError, match="under which licence"):
        as_hub_parquet(table, "org/mine")
    assert hub.repos == {}
    as_hub_parquet(table, "org/mine", licence="cc0-1.0", origin="made up")
    assert load_dataset("org/mine", split="test")[0]["target_new"] == "1998"  # a text stays a text
    with pytest.raises(DataError, match="does not have the columns"):
        as_hub_parquet(Dataset.from_dict({"a": [1]}), "org/other", licence="mit", origin="made up")
    with pytest.raises(HubError):
        as_hub_parquet(table, "strangers/mine", licence="mit", origin="made up")


def test_what_may_be_passed_on() -> None:
    allowed = set()
    for name in dataset_names():
        source = dataset_entry(name).source
        if source is None:
            continue
        try:
            allowed.add((source.licence, hub_licence(source.licence, name)))
        except DataError:
            assert not source.licence.startswith(("MIT;", "Apache")) and source.licence != "MIT"
    assert {licence for _, licence in allowed} == {"mit", "apache-2.0", "cc-by-sa-3.0"}
    for stated in ("CC BY-NC-SA 4.0", "not stated", "MIT at first, later not stated: ask before passing it on", ""):
        with pytest.raises(DataError, match="does not clearly allow"):
            hub_licence(stated, "x")
