"""A script written for EasyEdit's `MultimodalEditor` runs with another import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, load_edit_dataset
from hf_kedit.compat.easyedit import MultimodalEditor
from hf_kedit.compat.easyedit.models.ft import FTHyperParams
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import RequestError
from hf_kedit.requests import EditRequest, load_requests

FT = {"alg_name": "FT", "objective_optimization": "target_new", "model_name": "kedit/world-pictures"}
FT |= {"layers": [3], "num_steps": 25, "lr": "5e-3"}


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return EditableModel.from_pretrained("kedit/world-pictures")


@pytest.fixture(scope="module")
def requests() -> list[EditRequest]:
    return load_requests(load_edit_dataset("world-pictures", limit=2))


def arguments(requests: list[EditRequest], folder: Path) -> dict[str, Any]:
    """What a script passes: paths of files, and one probe of each kind per edit."""

    def saved(picture: Any, name: str) -> str:
        picture.image.save(folder / name)
        return name

    text, seen = ([r.locality[axis][0] for r in requests] for axis in ("text", "multimodal"))
    return {
        "prompts": [r.prompt for r in requests],
        "targets": [r.target_new for r in requests],
        "image": [saved(r.image, f"{i}.png") for i, r in enumerate(requests)],
        "rephrase_prompts": [r.rephrase_prompts[0] for r in requests],
        "rephrase_image": [saved(r.image_rephrase, f"r{i}.png") for i, r in enumerate(requests)],
        "locality_inputs": {
            "text": {"prompt": [p.prompt for p in text], "ground_truth": [p.answers[0] for p in text]},
            "vision": {
                "prompt": [p.prompt for p in seen],
                "ground_truth": [p.answers[0] for p in seen],
                "image": [saved(p.image, f"m{i}.png") for i, p in enumerate(seen)],
            },
        },
    }


def test_a_script(model: EditableModel, requests: list[EditRequest], tmp_path: Path) -> None:
    folder = str(tmp_path)
    hparams = FTHyperParams(**FT, coco_image=folder, rephrase_image=folder)
    digest = model_digest(model.base_model)
    editor = MultimodalEditor(hparams, model)
    metrics, edited, originals = editor.edit(
        **arguments(requests, tmp_path), file_type="image", keep_original_weight=True, verbose=False
    )
    assert [row["case_id"] for row in metrics] == [0, 1] and edited is model and len(model.edits) == 1
    for row in metrics:
        assert row["post"]["rewrite_acc"].item() == 1.0 > row["pre"]["rewrite_acc"].item()
        assert set(row["post"]) == {
            "rewrite_acc", "rephrase_acc", "image_rephrase_acc", "rephrase_image_acc", "locality_acc",
            "multimodal_locality_acc",
        }  # fmt: skip
        assert all(value.dim() == 0 for value in row["post"].values())
    ((name, original),) = originals.items()
    assert name.startswith("model.language_model.layers.3.") and not torch.equal(model.get_parameter(name), original)
    model.rollback("all")
    assert model_digest(model.base_model) == digest
    given = arguments(requests, tmp_path)
    given["target_new"] = given.pop("targets")  # as in the README
    metrics, _, _ = editor.edit(**given, sequential_edit=True, verbose=False)
    assert [e.request.target_new for e in model.edits] == [r.target_new for r in requests] and len(metrics) == 2
    model.rollback("all")


def test_one_edit_with_a_picture_in_memory(model: EditableModel, requests: list[EditRequest]) -> None:
    request = requests[0]
    metrics, _, _ = MultimodalEditor(FTHyperParams(**FT), model).edit(
        prompts=request.prompt,
        targets=request.target_new,
        image=request.image.image,
        verbose=False,  # type: ignore[union-attr]
    )
    assert set(metrics[0]["post"]) == {"rewrite_acc"} and metrics[0]["post"]["rewrite_acc"].item() == 1.0
    model.rollback("all")


def test_what_does_not_fit(model: EditableModel, requests: list[EditRequest]) -> None:
    editor = MultimodalEditor(FTHyperParams(**FT), model)
    texts = {"prompts": ["a", "b"], "targets": ["c", "d"]}
    for bad, message in (
        ({"image": ["1.png"]}, "1 values for 2 edits"),
        ({"image": "1.png"}, "one value for 2 edits"),
        ({"image": ["1.png"] * 2, "file_type": ["image", "video"]}, "frames"),
        ({"image": ["nowhere.png"] * 2}, "picture"),
        ({"image": None}, "'image': is missing"),
        ({"targets": None, "image": ["1.png"] * 2}, "'targets': is missing"),
    ):
        with pytest.raises(RequestError, match=message):
            editor.edit(**{**texts, **bad}, verbose=False)
    assert not model.edits
