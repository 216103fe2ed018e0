"""A script written for EasyEdit runs with another import: arguments, layout, and what is returned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hf_kedit import EditableModel, EditRequest, load_edit_dataset
from hf_kedit.compat.easyedit import BaseEditor, FTHyperParams, MEMITHyperParams, ROMEHyperParams
from hf_kedit.data.easyedit import to_easyedit_arguments
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import ConfigError

FT = {"alg_name": "FT", "objective_optimization": "target_new", "layers": [4], "num_steps": 10, "lr": "5e-3"}
ROME = {"alg_name": "ROME", "layers": [2], "v_num_grad_steps": 20, "v_lr": "5e-1", "v_weight_decay": "1e-3"}
ROME |= {"clamp_norm_factor": 4, "mom2_adjustment": False, "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj"}


def arguments(count: int) -> dict[str, Any]:
    rows = load_edit_dataset("world", split="test", limit=count)
    return to_easyedit_arguments([EditRequest.from_dict(row) for row in rows])


def write(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "world.yaml").write_text(yaml.safe_dump({"model_name": "kedit/world-gpt2", **values}))
    return folder / "world"


def test_one_edit_from_a_file(tmp_path: Path) -> None:
    editor = BaseEditor.from_hparams(ROMEHyperParams.from_hparams(write(tmp_path, ROME)))
    digest = model_digest(editor.model.base_model)
    metrics, edited, weights_copy = editor.edit(**arguments(1), verbose=False)
    assert len(metrics) == 1 and set(metrics[0]) >= {"case_id", "requested_rewrite", "time", "pre", "post"}
    assert metrics[0]["post"]["rewrite_acc"] == [1.0] and metrics[0]["pre"]["rewrite_acc"] != [1.0]
    assert all(name.endswith("_acc") for name in metrics[0]["post"]["locality"])
    assert model_digest(edited.base_model) != digest, "the returned model is the edited one"
    ((name, original),) = weights_copy.items()
    assert not torch.equal(edited.get_parameter(name), original)
    edited.rollback("all")
    assert torch.equal(edited.get_parameter(name), original)
    assert model_digest(edited.base_model) == digest


def test_several_edits_apart_and_in_sequence(tmp_path: Path) -> None:
    hparams = FTHyperParams.from_hparams(write(tmp_path, FT))
    hparams.num_steps = 25  # scripts change them
    apart = BaseEditor.from_hparams(hparams)
    metrics, edited, _ = apart.edit(**arguments(3), sequential_edit=False, verbose=False)
    assert [m["case_id"] for m in metrics] == [0, 1, 2] and all(m["post"]["rewrite_acc"] == [1.0] for m in metrics)
    assert len(edited.edits) == 1 and edited.edits[0].request.target_new == arguments(3)["target_new"][-1]
    edited.rollback("all")
    together = BaseEditor(hparams, model=edited)
    metrics, edited, _ = together.edit(**arguments(3), sequential_edit=True, verbose=False)
    assert len(metrics) == len(edited.edits) == 3


def test_batches_and_fluency(tmp_path: Path) -> None:
    values = {"alg_name": "MEMIT", "batch_size": 2, "stats_dir": "./data/stats"}
    editor = BaseEditor.from_hparams(MEMITHyperParams.from_hparams(write(tmp_path, values)))
    metrics, edited, _ = editor.batch_edit(**arguments(3), verbose=False, test_generation=True)
    assert len(metrics) == 3 and len(edited.edits) == 1
    assert all(m["post"]["fluency"]["ngram_entropy"] > 0 for m in metrics)


SIZES = [("batch_edit", sequential, *sizes) for sequential in (False, True) for sizes in ((2, None), (3, 2), (3, 5))]


@pytest.mark.parametrize(
    ("call", "sequential", "count", "size"),
    [
        *SIZES,
        ("batch_edit", False, 4, "2"),
        ("edit", False, 1, 3),
        ("edit", False, 2, 2),
        ("edit_requests", False, 2, None),
        ("edit_requests", True, 2, None),
        ("generate_edit", False, 1, None),
        ("generate_edit", False, 2, None),
        ("generate_edit", True, 2, None),
    ],
)
def test_either_all_edits_stay_or_it_is_said_how_many_do(
    call: str,
    sequential: bool,
    count: int,
    size: Any,
    world_gpt2: EditableModel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Right numbers are counted here: what one call makes together, and what of that is left."""
    editor = BaseEditor({**FT, "num_steps": 1, "batch_size": size, "layers": [5]}, model=world_gpt2)
    given: dict[str, Any] = {
        key: value for key, value in arguments(count).items() if key in ("prompts", "target_new", "subject")
    }
    if call == "edit_requests":
        keys = ("prompts", "target_new", "subject")
        rows = [dict(zip(("prompt", *keys[1:]), row, strict=True)) for row in zip(*map(given.get, keys), strict=True)]
        given = {"requests": rows}
    options = {"max_new_tokens": 2} if call == "generate_edit" else {}
    rows, edited, _ = getattr(editor, call)(**given, **options, sequential_edit=sequential, verbose=False)
    assert len(rows) == count
    together = (int(size or 0) or count) if call == "batch_edit" else 1
    stay = count if sequential or together >= count else count % together or together
    assert len(edited.edits) == stay
    assert (f"{stay} of the {count} edits" in caplog.text) is (stay < count)


@pytest.mark.parametrize("size", [-1, 2.5, True, "many", [2]])
@pytest.mark.parametrize("method", [FT, ROME])
def test_a_batch_size_that_is_none(size: Any, method: dict[str, Any], world_gpt2: EditableModel) -> None:
    with pytest.raises(ConfigError, match=r"batch_size|rows_per_step"):
        BaseEditor({**method, "batch_size": size}, model=world_gpt2).batch_edit(**arguments(2), verbose=False)
    assert not world_gpt2.edits


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="name no model"):
        BaseEditor.from_hparams(ROMEHyperParams(alg_name="ROME"))
    with pytest.raises(ConfigError, match="cannot read"):
        ROMEHyperParams.from_hparams("/nowhere/hparams/ROME/gpt2-xl")
