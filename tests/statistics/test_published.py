"""Second moments that other codes have collected: read as they are, refused where they cannot be this model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_kedit import EditableModel, EditRequest, MEMITConfig, load_edit_dataset
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import ArtifactError, StatisticsError
from hf_kedit.statistics.moments import SecondMoment


def write(path: Path, moment: SecondMoment, **more: Any) -> None:
    """A file as the published collectors write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "mom2.constructor": np.array("util.runningstats.SecondMoment()"),
        "mom2.count": np.array(moment.count),
        "mom2.mom2": moment.total.float().numpy(),
        "sample_size": np.array(100),
        **more,
    }
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def moments() -> dict[str, SecondMoment]:
    model = EditableModel.from_pretrained("kedit/world-gpt2", MEMITConfig(stats_tokens=20_000))
    return model.statistics.moments(model._method.edited_modules())


@pytest.fixture
def theirs(tmp_path: Path, moments: dict[str, SecondMoment]) -> Path:
    for module, moment in moments.items():
        write(tmp_path / "world-gpt2" / "wikipedia_stats" / f"{module}_float32_mom2_100000.npz", moment)
        few = SecondMoment(torch.eye(moment.total.shape[0]), 600)
        write(tmp_path / "world-gpt2" / "wikitext_stats" / f"{module}_float32_mom2_t512_100.npz", few)
    (tmp_path / "world-gpt2" / "wikipedia_stats" / "notes.npz").write_bytes(b"")
    return tmp_path


def load(folder: Path) -> EditableModel:
    return EditableModel.from_pretrained("kedit/world-gpt2", MEMITConfig(stats_dataset=str(folder)))


def test_edits_with_their_moments_are_those_with_ours(
    theirs: Path, moments: dict[str, SecondMoment], caplog: pytest.LogCaptureFixture
) -> None:
    fact = EditRequest.from_dict(load_edit_dataset("world", split="test", limit=1)[0])
    model = load(theirs)
    with caplog.at_level("WARNING", logger="hf_kedit"):
        model.edit(fact)
    assert "do not say which weights" in caplog.text
    ours = EditableModel.from_pretrained("kedit/world-gpt2", "memit")
    for module, moment in moments.items():
        ours.statistics.put(module, moment)
    ours.edit(fact)
    for module in moments:
        assert model.statistics.moments([module])[module].count == moments[module].count, "the larger sample"
        a, b = model.ledger.total(module), ours.ledger.total(module)
        assert (a - b).norm() <= 1e-3 * b.norm()  # type: ignore[operator,union-attr]


def test_files_that_cannot_be_used(theirs: Path, moments: dict[str, SecondMoment], tmp_path: Path) -> None:
    fact = load_edit_dataset("world", split="test", limit=1)[0]
    module, moment = next(iter(moments.items()))
    name = f"{module}_float32_mom2_100000.npz"

    def refused(error: type[Exception], match: str) -> None:
        model = load(tmp_path)
        digest = model_digest(model.base_model)
        with pytest.raises(error, match=match):
            model.edit(fact)
        assert model_digest(model.base_model) == digest

    write(tmp_path / "other" / "wikipedia_stats" / name, moment)
    refused(StatisticsError, "name the folder of one model")
    for file in (tmp_path / "other" / "wikipedia_stats").iterdir():
        file.unlink()
    good = tmp_path / "world-gpt2" / "wikipedia_stats" / name
    write(good, SecondMoment(torch.eye(7), 1000))
    (tmp_path / "world-gpt2" / "wikitext_stats" / f"{module}_float32_mom2_t512_100.npz").unlink()
    refused(StatisticsError, "7 dimensions .* another model's")
    write(good, moment, **{"mom2.mom2": np.array([{"a": 1}], dtype=object)})
    refused(ArtifactError, "damaged")
    good.write_bytes(b"PK")
    refused(ArtifactError, "damaged")
    write(good, SecondMoment(torch.full((512, 512), float("nan")), 1000))
    refused(ArtifactError, "no second moment")
    good.unlink()
    refused(StatisticsError, f"holds no statistics of {module}")
