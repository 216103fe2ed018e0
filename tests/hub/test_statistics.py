"""Second moments through the Hub: collected once, used by everybody with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi

from hf_kedit import EditableModel, ROMEConfig
from hf_kedit.errors import ArtifactError, DataError, HubError, StatisticsError
from hf_kedit.statistics.corpora import hub_corpus
from hf_kedit.statistics.moments import find_shared
from hf_kedit.testing.hub import LoopbackHub

from .test_folders import kedit
from .test_push import facts

pytestmark = pytest.mark.hub
REPO = "org/world-stats"


def rome(folder: Path, source: str | None = None, **kwargs: Any) -> EditableModel:
    config = ROMEConfig(layers=[2], stats_tokens=8000, stats_dir=str(folder), stats_dataset=source)
    return EditableModel.from_pretrained("kedit/world-gpt2", config, **kwargs)


def down(model: EditableModel, layer: int = 2) -> str:
    return model.anatomy.down(layer).path


@pytest.fixture
def shared(hub: LoopbackHub, tmp_path: Path) -> EditableModel:
    model = rome(tmp_path / "mine")
    model.edit(facts(1))
    model.statistics.push_to_hub(REPO)
    return model


def test_shared_statistics_give_the_same_edit(shared: EditableModel, tmp_path: Path) -> None:
    other = rome(tmp_path / "other", REPO)
    other.edit(facts(1))
    name = down(shared)
    mine, theirs = (m.statistics.moments([name])[name] for m in (shared, other))
    assert torch.equal(mine.total, theirs.total) and (mine.count, mine.source) == (theirs.count, theirs.source)
    for ours, same in zip(shared.base_model.parameters(), other.base_model.parameters(), strict=True):
        assert torch.equal(ours, same)
    assert not (tmp_path / "other").exists()  # nothing was collected
    assert HfApi().dataset_info(REPO).card_data["library_name"] == "hf_kedit"


def test_pushing_again_adds_modules_or_does_nothing(shared: EditableModel, tmp_path: Path) -> None:
    first = HfApi().dataset_info(REPO).sha
    assert shared.statistics.push_to_hub(REPO).oid == first
    fresh = rome(tmp_path / "mine")
    fresh.statistics.push_to_hub(REPO, [down(fresh, 1)], tag="two")
    found = find_shared(REPO)
    assert found is not None and set(found.modules) == {down(fresh, 1), down(fresh, 2)}
    assert torch.equal(found.read(down(fresh, 2)).total, shared.statistics.moments([down(shared)])[down(shared)].total)
    index = json.loads(Path(HfApi().hf_hub_download(REPO, "stats.json", repo_type="dataset")).read_text())
    assert index["model"] == "kedit/world-gpt2" and index["fingerprint"] == shared.base_fingerprint()


def test_statistics_of_other_weights_are_refused(shared: EditableModel, tmp_path: Path) -> None:
    other = rome(tmp_path / "other", REPO, dtype=torch.bfloat16)
    with pytest.raises(StatisticsError, match="other weights"):
        other.edit(facts(1))
    assert not other.edits
    other = rome(tmp_path / "other", None, dtype=torch.bfloat16)
    with pytest.raises(StatisticsError, match="other weights"):
        other.statistics.push_to_hub(REPO, [down(other)])
    with pytest.raises(StatisticsError, match=r"no statistics of .*h\.0.*it has: .*h\.2"):
        rome(tmp_path / "other", REPO).statistics.moments([down(shared, 0)])
    with pytest.raises(StatisticsError, match="collect them"):
        rome(tmp_path / "other").statistics.push_to_hub("org/nothing")
    assert not HfApi().repo_exists("org/nothing", repo_type="dataset")


def test_a_folder_and_damage(shared: EditableModel, tmp_path: Path) -> None:
    folder = Path(HfApi().snapshot_download(REPO, repo_type="dataset", local_dir=tmp_path / "down"))
    name = down(shared)
    assert rome(tmp_path / "other", str(folder)).statistics.moments([name])[name].count >= 8000
    next(folder.glob("*.safetensors")).write_bytes(b"x")
    with pytest.raises(ArtifactError, match="not the file"):
        rome(tmp_path / "other", str(folder)).statistics.moments([name])
    (folder / "stats.json").write_text("[]")
    with pytest.raises(ArtifactError, match="damaged"):
        rome(tmp_path / "other", str(folder)).statistics.moments([name])
    (folder / "stats.json").unlink()
    with pytest.raises(StatisticsError, match="not text"):
        rome(tmp_path / "other", str(folder)).statistics.moments([name])


def test_a_repository_of_text_is_still_a_corpus(hub: LoopbackHub, tmp_path: Path) -> None:
    HfApi().create_repo("org/text", repo_type="dataset")
    rows = "".join(json.dumps({"text": f"A sentence about {i} and its sister {i + 1}."}) + "\n" for i in range(900))
    HfApi().upload_file(path_or_fileobj=rows.encode(), path_in_repo="a.jsonl", repo_id="org/text", repo_type="dataset")
    model = rome(tmp_path / "text", "org/text")
    moment = model.statistics.moments([down(model)])[down(model)]
    assert moment.source == "hub-org--text" and moment.count >= 8000
    with pytest.raises(HubError, match="no repository"):
        rome(tmp_path / "text", "org/nowhere").statistics.moments([down(model)])


def test_a_text_that_cannot_be_read_is_a_typed_error_before_anything_is_changed(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    api = HfApi()
    for name, content in {
        "broken": b'{"text": "a"}\n{"text": ',
        "untitled": b'{"sentence": "a"}\n',
        "nothing": b"no data",
        "text": b'{"text": "a"}\n',
    }.items():
        api.create_repo(f"org/{name}", repo_type="dataset")
        file = "README.md" if name == "nothing" else "data.jsonl"
        api.upload_file(path_or_fileobj=content, path_in_repo=file, repo_id=f"org/{name}", repo_type="dataset")
    sources = ["org/missing", "org/broken", "org/nothing", "org/text:other:train", "org/text::other", "a/b/c"]
    for source in [*sources, "org/untitled"]:
        with pytest.raises(DataError, match="none is called 'text'" if source == "org/untitled" else source):
            list(hub_corpus(source).texts())
    model = rome(tmp_path / "cache", "org/untitled")
    before = model.fingerprint()
    with pytest.raises(DataError, match="columns are sentence"):
        model.edit(facts(1), show_progress=False)
    assert model.fingerprint() == before and not model.edits


def test_the_command(hub: LoopbackHub, tmp_path: Path) -> None:
    words = ("--model", "kedit/world-gpt2", "--method", "rome", "--layers", "2", "--tokens", "8000")
    result = kedit("stats", *words, "--stats-dir", tmp_path / "s", "--push", REPO, "--private", "-f", "json")
    data = json.loads(result.stdout)
    assert data["repository"] == REPO and data["commit"] == HfApi().dataset_info(REPO).sha
    assert HfApi().dataset_info(REPO).private


def test_the_card_shows_texts_as_texts() -> None:
    """Those of others who have pushed to the same repository too."""
    from markdown_it import MarkdownIt

    from hf_kedit.statistics.moments import _card

    nasty = "<script>x</script>`|\r# Heading\n![i](http://x/y.png) \x1b[31m"
    entries = {nasty: {"width": nasty, "tokens": [1, nasty], "corpus": nasty}, "b": "no entry", "c": {}}
    text = _card("org/x", {"model": nasty, "fingerprint": "f", "modules": entries})
    page = MarkdownIt("commonmark").enable("table").parse(text.partition("---\n\n")[2])
    assert sum(token.type == "heading_open" for token in page) == 1
    parts = [part for token in page for part in [token, *(token.children or ())]]
    assert not [p for p in parts if p.type in ("html_inline", "html_block", "image", "link_open")]
    assert sum(token.type == "tr_open" for token in page) == 3 and "\x1b" not in text
    assert sum(token.type == "fence" for token in page) == 1
