"""Where the base model of saved edits is: found wherever one stands, moved, replaced, missing, pushed."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_kedit import EditableModel, FTMConfig, embedded
from hf_kedit.artifact.layout import CONFIG
from hf_kedit.cli import app
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import ArtifactError, ConfigError, KeditError, UnsupportedModelError
from hf_kedit.hub import push_folder
from hf_kedit.testing.hub import LoopbackHub

from .test_files_of_0_1_0 import DATA

PROBE = torch.tensor([[5, 6, 7, 8, 9]])
QUICK = FTMConfig(layers=[2], num_steps=1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROBE).logits


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``models/mine`` and, made with a relative path from there, ``saved/edits``."""
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        auto.from_pretrained(embedded.path("world-gpt2")).save_pretrained(tmp_path / "models/mine")
    monkeypatch.chdir(tmp_path)
    model = EditableModel.from_pretrained("./models/mine/", QUICK)
    model.edit(prompt="The sky is", target_new="green", show_progress=False)
    model.save_pretrained("saved/edits")
    return tmp_path


def test_a_base_in_a_folder_is_found_from_everywhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = EditableModel.from_pretrained("saved/edits")
    assert here.base_model_id == str(place / "models/mine")
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert torch.equal(logits(EditableModel.from_pretrained(place / "saved/edits")), logits(here))
    monkeypatch.setenv("HOME", str(place))
    home = EditableModel.from_pretrained("~/models/mine/", QUICK)
    assert home.base_model_id == str(place / "models/mine")
    assert torch.equal(logits(EditableModel.from_pretrained("~/saved/edits")), logits(here))


def test_both_folders_are_moved(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    before = logits(EditableModel.from_pretrained("saved/edits"))
    for name in ("models", "saved"):
        shutil.move(place / name, moved / name)
    monkeypatch.chdir("/")
    model = EditableModel.from_pretrained(moved / "saved/edits")
    assert torch.equal(logits(model), before) and model.base_model_id == str(moved / "models/mine")


def test_a_missing_base_is_named_and_another_one_given(place: Path) -> None:
    before = logits(EditableModel.from_pretrained("saved/edits"))
    shutil.move(place / "models/mine", place / "other")
    with pytest.raises(ArtifactError, match=r"models/mine'.* base_model= .*--base"):
        EditableModel.from_pretrained("saved/edits")
    for base in (place / "other", "other", "kedit/world-gpt2"):
        model = EditableModel.from_pretrained("saved/edits", base_model=base)
        assert torch.equal(logits(model), before) and model.tokenizer is not None
    assert model.base_model_id == "kedit/world-gpt2"
    with pytest.raises(KeditError, match="not the one"):
        EditableModel.from_pretrained("saved/edits", base_model="kedit/world-gpt2", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="saved edits"):
        EditableModel.from_pretrained("kedit/world-gpt2", base_model="kedit/world-gpt2")


@pytest.mark.parametrize(("given", "said"), [("", "empty"), (" ", "empty"), ("./nowhere", "is to be '.*/nowhere'")])
def test_a_base_that_is_given_and_is_none(given: str, said: str, place: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"{said}.*base_model="):
        EditableModel.from_pretrained(place / "saved/edits", base_model=given)


def test_a_base_that_is_no_repository(tmp_path: Path, hub: LoopbackHub) -> None:
    folder = shutil.copytree(DATA / "rome_gpt2", tmp_path / "edits")
    for name in ("org/gone", "not a repository!"):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with pytest.raises(ArtifactError, match=rf"{name}'.*base_model="):
            EditableModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "words",
    [
        ["rollback", "EDITS", "--all", "-o", "out"],
        ["merge", "EDITS", "-o", "out"],
        ["export-lora", "EDITS", "-o", "out", "--rank", "1"],
        ["edit", "-m", "EDITS", "-p", "The sea is", "-t", "red", "--no-eval"],
        ["eval", "-m", "EDITS", "--no-edit", "--limit", "1"],
    ],
    ids=lambda words: words[0],
)
def test_every_command_on_saved_edits_takes_a_base(words: list[str], place: Path) -> None:
    shutil.rmtree(place / "models")
    words = ["saved/edits" if word == "EDITS" else word for word in words]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and "--base" in result.stderr and "models/mine" in result.stderr
    result = CliRunner().invoke(app, [*words, "--base", "kedit/world-gpt2"])
    assert result.exit_code == 0, result.stderr
    result = CliRunner().invoke(app, ["eval", "-m", "kedit/world-gpt2", "--no-edit", "--limit", "1", "--base", "x"])
    assert result.exit_code == 2 and "saved edits" in result.stderr


def test_nothing_of_this_machine_is_pushed(place: Path, hub: LoopbackHub, caplog: pytest.LogCaptureFixture) -> None:
    model = EditableModel.from_pretrained("./models/mine", "rome")
    model.edit(prompt="{} is a", subject="Tarosk Boayond", target_new="plumber", show_progress=False)
    with caplog.at_level(logging.WARNING, "hf_kedit"):
        model.push_to_hub("org/direct", per_edit=True)
        assert "base_model=" in caplog.text and "has changed" not in caplog.text
        caplog.clear()
        model.push_to_hub("org/direct", per_edit=True)
        assert "nothing has changed: org/direct" in caplog.text
    model.save_pretrained("saved/rome", per_edit=True)
    model.export_lora("saved/lora")
    push_folder("saved/rome", "org/folder")
    for repo in ("org/direct", "org/folder"):
        pulled = Path(HfApi().snapshot_download(repo))
        texts = {p.name: p.read_bytes() for p in pulled.rglob("*") if p.is_file()}
        assert len(texts) > 5 and not [name for name, text in texts.items() if str(place).encode() in text]
        assert "mine" in ModelCard.load(repo).text and "base_model=model" in ModelCard.load(repo).text
        with pytest.raises(ArtifactError, match="'mine' of another machine"):
            EditableModel.from_pretrained(repo)
        assert "1 edit of mine (a folder of the machine" in CliRunner().invoke(app, ["inspect", repo]).stdout
        again = EditableModel.from_pretrained(repo, base_model=place / "models/mine")
        assert torch.equal(logits(again), logits(model))
    for folder in ("saved/rome", "saved/lora"):
        assert str(place) not in (place / folder / "README.md").read_text()


def test_settings_of_a_machine_are_neither_saved_nor_obeyed(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    (place / "corpus.txt").write_text("Tarosk Boayond is a plumber.\n" * 200)
    settings = {"stats_dir": str(place / "stats"), "stats_dataset": "corpus.txt", "stats_tokens": 600}
    model = EditableModel.from_pretrained("kedit/world-gpt2", "memit").set_method(_memit(**settings))
    model.edit(prompt="{} is a", subject="Tarosk Boayond", target_new="plumber", show_progress=False)
    model.save_pretrained("saved/memit")
    assert "corpus.txt" not in (place / "saved/memit" / CONFIG).read_text()
    with caplog.at_level(logging.WARNING, "hf_kedit"):
        loaded = EditableModel.from_pretrained("saved/memit")
    assert "stats_dataset=" in caplog.text
    assert loaded.edit_config == _memit(stats_tokens=600).complete(loaded.profile)
    folder = shutil.copytree(DATA / "memit_llama_per_edit", place / "harm")
    config = json.loads((folder / CONFIG).read_text())
    config["hparams"] |= {"stats_dir": str(place / "written"), "stats_dataset": str(place / "corpus.txt")}
    (folder / CONFIG).write_text(json.dumps(config))
    settings = EditableModel.from_pretrained(folder).edit_config.to_dict()
    assert settings["stats_dir"] is None and settings["stats_dataset"] is None
    config["hparams"] |= {"stats_dataset": "corpus"}
    (place / "corpus").mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    assert EditableModel.from_pretrained(folder).edit_config.to_dict()["stats_dataset"] is None


def _memit(**settings: Any) -> Any:
    from hf_kedit import MEMITConfig

    return MEMITConfig(layers=[2], v_num_grad_steps=1, **settings)


def test_a_refused_load_leaves_the_callers_model_as_it_was(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(embedded.path("world-gpt2"))
    tokenizer = AutoTokenizer.from_pretrained(embedded.path("world-gpt2"))
    with torch.no_grad():
        base.transformer.h[0].mlp.c_fc.weight.mul_(1.01)  # not the model that the edits were made on
    digest, names = model_digest(base), dict(base.named_parameters(remove_duplicate=False))
    tied, attributes = dict(base.all_tied_weights_keys), {*vars(base)}
    for error, options in ((KeditError, {}), (KeditError, {"config": FTMConfig(layers=[99])})):
        with pytest.raises(error):
            EditableModel.from_pretrained(DATA / "grace_gpt2_untied", base_model=base, tokenizer=tokenizer, **options)
        assert base.lm_head.weight is base.transformer.wte.weight and base.config.tie_word_embeddings
        assert model_digest(base) == digest and base.all_tied_weights_keys == tied and {*vars(base)} == attributes
        now = dict(base.named_parameters(remove_duplicate=False))
        assert names.keys() == now.keys() and all(now[name] is value for name, value in names.items())
    with pytest.raises(KeditError):
        EditableModel(base, FTMConfig(layers=[99]), tokenizer, untie=True)
    assert base.lm_head.weight is base.transformer.wte.weight


def test_a_base_model_without_a_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its edits are loaded; why nothing more can be edited is said."""
    folder = embedded.path("world-gpt2")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match="tokenizer="):
        EditableModel.from_pretrained(tmp_path / "base", QUICK)
    model = EditableModel.from_pretrained(tmp_path / "base", QUICK, tokenizer=tokenizer)
    model.edit(prompt="Otto is a", target_new="cook", show_progress=False)
    model.save_pretrained(tmp_path / "edits")
    caplog.clear()
    loaded = EditableModel.from_pretrained(tmp_path / "edits")
    assert loaded.tokenizer is None and torch.equal(logits(loaded), logits(model))
    (said,) = [r.getMessage() for r in caplog.records if "tokenizer" in r.getMessage()]
    assert said.startswith("no tokenizer could be loaded from ") and repr(str(tmp_path / "base")) in said
