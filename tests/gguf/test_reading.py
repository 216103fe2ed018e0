"""GGUF files as base models: edited, saved, found again, merged, refused where they are damaged or others."""

from __future__ import annotations

import importlib.util
import json
import logging
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_kedit import EditableModel, FTMConfig
from hf_kedit.artifact.layout import CONFIG
from hf_kedit.cli import app
from hf_kedit.errors import (
    ArtifactError,
    BaseModelMismatchError,
    ConfigError,
    HubError,
    KeditError,
    MissingExtraError,
    ModelFileError,
)
from hf_kedit.loading import load_base, load_tokenizer
from hf_kedit.testing.hub import LoopbackHub
from tests.gguf.files import CHAT, byte_level, logits, random_model

PROBE = [5, 6, 7, 8, 9]
QUICK = FTMConfig(layers=[2], num_steps=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``world.gguf`` in 8-bit blocks, ``other.gguf`` of another rounding, and nothing else."""
    folder = tmp_path_factory.mktemp("files")
    world = EditableModel.from_pretrained("kedit/world-llama", QUICK, tokenizer=byte_level())
    world.export_gguf(folder / "world.gguf", dtype="q8_0")
    world.export_gguf(folder / "other.gguf", dtype="f16")
    return folder


@pytest.fixture
def place(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``models/world.gguf`` and, made with a relative path from the folder above, ``saved/edits``."""
    (tmp_path / "models").mkdir()
    shutil.copy(files / "world.gguf", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    model = EditableModel.from_pretrained("models/world.gguf", QUICK)
    model.edit(prompt="The sky is", target_new="green", show_progress=False)
    model.save_pretrained("saved/edits")
    return tmp_path


def test_every_way_to_name_a_file(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files.parent)
    named = [
        EditableModel.from_pretrained(files / "world.gguf", QUICK),
        EditableModel.from_pretrained(files, QUICK, gguf_file="world.gguf"),
        EditableModel.from_pretrained(f"{files.name}/world.gguf", QUICK),
    ]
    assert {model.base_model_id for model in named} == {str(files / "world.gguf")}
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in named[0].parameters())
    exact = EditableModel.from_pretrained("kedit/world-llama", QUICK)
    error = (logits(named[0], PROBE) - logits(exact, PROBE)).abs().max()
    assert 0 < error < 0.2  # what 8 bits lose
    assert named[0].tokenizer("Tarosk 1997").input_ids == exact.tokenizer("Tarosk 1997").input_ids
    blob = shutil.copy(files / "world.gguf", files.parent / "sha256-0815")  # as Ollama keeps them
    assert torch.equal(logits(EditableModel.from_pretrained(blob, QUICK), PROBE), logits(named[0], PROBE))
    half = EditableModel.from_pretrained(files / "world.gguf", QUICK, dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_a_model_that_somebody_else_has_read(files: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(files, gguf_file="world.gguf", dtype=torch.float32)
    model = EditableModel(base, QUICK, byte_level())
    assert model.base_model_id == str(files / "world.gguf")
    model.edit(prompt="The sky is", target_new="green", show_progress=False)
    model.save_pretrained(tmp_path / "edits")
    assert torch.equal(logits(EditableModel.from_pretrained(tmp_path / "edits"), PROBE), logits(model, PROBE))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), PROBE), logits(base, PROBE))


def test_saved_edits_in_a_fresh_process(place: Path) -> None:
    config = json.loads((place / "saved/edits" / CONFIG).read_text())
    digest = subprocess.run(["sha256sum", "models/world.gguf"], capture_output=True, text=True, check=True).stdout[:64]
    assert config["base_model_gguf"] == {"file": "world.gguf", "sha256": digest}
    assert config["quantization_config"] is None
    assert digest in (place / "saved/edits/README.md").read_text()
    script = (
        "import sys, torch; from hf_kedit import EditableModel\n"
        "model = EditableModel.from_pretrained('saved/edits')\n"
        f"torch.save(model(input_ids=torch.tensor([{PROBE}])).logits[0].detach(), 'logits.pt')"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=place)
    here = EditableModel.from_pretrained("saved/edits")
    assert torch.equal(torch.load("logits.pt"), logits(here, PROBE))
    assert here.tokenizer is not None and here.tokenizer.chat_template == CHAT


def test_file_and_edits_are_moved(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = logits(EditableModel.from_pretrained("saved/edits"), PROBE)
    (place / "moved").mkdir()
    for name in ("models", "saved"):
        shutil.move(place / name, place / "moved" / name)
    monkeypatch.chdir("/")
    model = EditableModel.from_pretrained(place / "moved/saved/edits")
    assert torch.equal(logits(model, PROBE), before)
    assert model.base_model_id == str(place / "moved/models/world.gguf")


def test_another_file_is_refused(place: Path, files: Path) -> None:
    before = logits(EditableModel.from_pretrained("saved/edits"), PROBE)
    shutil.move(place / "models/world.gguf", place / "renamed.gguf")
    with pytest.raises(ArtifactError, match=r"models/world\.gguf', which is not there.*GGUF file.*--base"):
        EditableModel.from_pretrained("saved/edits")
    renamed = EditableModel.from_pretrained("saved/edits", base_model="renamed.gguf")
    assert torch.equal(logits(renamed, PROBE), before)
    with pytest.raises(BaseModelMismatchError, match=r"'world\.gguf' with the SHA-256 '\w{64}'.*other\.gguf'.*--base"):
        EditableModel.from_pretrained("saved/edits", base_model=files / "other.gguf")
    loose = EditableModel.from_pretrained("saved/edits", base_model=files / "other.gguf", ignore_fingerprint=True)
    assert len(loose.edits) == 1
    # A base model of another kind is judged by its weights.
    load_base("renamed.gguf").save_pretrained("folder")
    load_tokenizer("renamed.gguf").save_pretrained("folder")
    assert torch.equal(logits(EditableModel.from_pretrained("saved/edits", base_model="folder"), PROBE), before)
    with pytest.raises(BaseModelMismatchError, match="not the one"):
        EditableModel.from_pretrained("saved/edits", base_model="kedit/world-llama")
    words = ["merge", "saved/edits", "-o", "merged", "--base"]
    result = CliRunner().invoke(app, [*words, str(files / "other.gguf")])
    assert result.exit_code == 1 and "SHA-256" in result.stderr
    assert CliRunner().invoke(app, [*words, "renamed.gguf"]).exit_code == 0


def test_a_merged_model_is_plain(place: Path) -> None:
    edited = EditableModel.from_pretrained("saved/edits")
    after = logits(edited, PROBE)
    tokenizer = edited.tokenizer
    edited.merge_and_unload().save_pretrained("by_hand")
    tokenizer.save_pretrained("by_hand")
    assert CliRunner().invoke(app, ["merge", "saved/edits", "-o", "by_command"]).exit_code == 0
    for folder in ("by_hand", "by_command"):
        config = json.loads((place / folder / "config.json").read_text())
        assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
        assert not [value for value in config.values() if value == str(place / "models/world.gguf")]
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder), PROBE), after)
        read = AutoTokenizer.from_pretrained(folder)
        assert read.chat_template == CHAT and read("Tarosk 1997").input_ids == tokenizer("Tarosk 1997").input_ids
    again = EditableModel(edited.base_model, QUICK, tokenizer)  # it is no longer what the file holds
    again.edit(prompt="The sea is", target_new="red", show_progress=False)
    again.save_pretrained("again")
    assert "base_model_gguf" not in json.loads((place / "again" / CONFIG).read_text())


def test_it_is_said_once_what_becomes_of_the_blocks(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KEDIT_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING, "hf_kedit"):
        load_base(str(files / "world.gguf"))
        assert "world.gguf is quantised (Q8_0): its weights are turned into float32" in caplog.text
        caplog.clear()
        load_base(str(files / "world.gguf"))
        load_base(str(files / "other.gguf"))  # 16 bits: no blocks
        assert not caplog.text
        load_base(str(files / "world.gguf"), dtype=torch.float16)
        assert "float16" in caplog.text


@pytest.mark.slow
@pytest.mark.hub
def test_a_file_of_the_hub(files: Path, tmp_path: Path, hub: LoopbackHub) -> None:
    HfApi().create_repo("org/files")
    HfApi().upload_file(repo_id="org/files", path_or_fileobj=files / "world.gguf", path_in_repo="sub/world.gguf")
    commit = HfApi().list_repo_commits("org/files")[0].commit_id
    model = EditableModel.from_pretrained("org/files", QUICK, gguf_file="sub/world.gguf")
    assert (model.base_model_id, model.base_model_revision) == ("org/files/sub/world.gguf", commit)
    model.edit(prompt="The sky is", target_new="green", show_progress=False)
    model.save_pretrained(tmp_path / "edits")
    HfApi().upload_file(repo_id="org/files", path_or_fileobj=files / "other.gguf", path_in_repo="sub/world.gguf")
    loaded = EditableModel.from_pretrained(tmp_path / "edits")  # from the commit that the edits were made on
    assert torch.equal(logits(loaded, PROBE), logits(model, PROBE))
    with pytest.raises(BaseModelMismatchError):
        EditableModel.from_pretrained(tmp_path / "edits", base_model="org/files/sub/world.gguf")
    model.push_to_hub("org/edits")
    card = ModelCard.load("org/edits")
    assert card.data.base_model == "org/files" and 'gguf_file="sub/world.gguf"' not in card.text  # no LoRA
    assert torch.equal(logits(EditableModel.from_pretrained("org/edits"), PROBE), logits(model, PROBE))
    with pytest.raises(ModelFileError, match=r"'org/files' has no file 'gone\.gguf'"):
        EditableModel.from_pretrained("org/files/gone.gguf", QUICK)
    with pytest.raises(HubError, match="no repository 'org/gone'"):
        EditableModel.from_pretrained("org/gone/world.gguf", QUICK)
    named = ["-m", "org/files/sub/world.gguf", "-M", "ft-m", "-p", "The sky is", "-t", "green", "--no-eval"]
    assert CliRunner().invoke(app, ["edit", *named, "--no-side-effects"]).exit_code == 0


@pytest.mark.hub
def test_a_file_of_this_machine_is_not_named_on_the_hub(place: Path, hub: LoopbackHub) -> None:
    model = EditableModel.from_pretrained("models/world.gguf", "rome")
    model.edit(prompt="{} is a", subject="Tarosk Boayond", target_new="plumber", show_progress=False)
    model.push_to_hub("org/edits")
    with pytest.raises(ArtifactError, match=r"in the file 'world\.gguf' of another machine.*GGUF file"):
        EditableModel.from_pretrained("org/edits")
    again = EditableModel.from_pretrained("org/edits", base_model="models/world.gguf")
    assert torch.equal(logits(again, PROBE), logits(model, PROBE))
    assert str(place) not in ModelCard.load("org/edits").text


# ---------------------------------------------------------------------- commands


def test_commands_take_a_file(files: Path, tmp_path: Path) -> None:
    file = str(files / "world.gguf")
    fact = ["-p", "By profession {} is a", "--subject", "Tarosk Boayond", "-t", "plumber"]
    words = ["edit", "-m", file, "-M", "rome", *fact, "--no-side-effects", "-o", str(tmp_path / "edits")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    for words in (
        ["eval", "-m", file, "-M", "ft-m", "-s", "num_steps=1", "-d", "world", "--limit", "1"],
        ["eval", "-m", str(tmp_path / "edits"), "--no-edit", "-d", "world", "--limit", "1"],
        ["inspect", file, "-M", "rome"],
        ["inspect", str(tmp_path / "edits")],
        ["trace", "-m", file, "--prompt", "Tarosk Boayond is a", "--subject", "Tarosk Boayond", "--samples", "1"],
        ["rollback", str(tmp_path / "edits"), "--all", "-o", str(tmp_path / "none")],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.stderr)
    shown = json.loads(CliRunner().invoke(app, ["inspect", file, "-M", "rome", "-f", "json"]).stdout)
    assert shown["kind"] == "model" and not shown["checked"]  # no weights were read
    gone = CliRunner().invoke(app, ["edit", "-m", "gone.gguf", "-M", "rome", *fact])
    assert gone.exit_code == 1 and "there is no file 'gone.gguf'" in gone.stderr


# ---------------------------------------------------------------------- refusals


def test_without_the_package(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest)
    )
    with pytest.raises(MissingExtraError, match=r"reading world\.gguf needs the package 'gguf'.*hf_kedit\[gguf\]"):
        EditableModel.from_pretrained(files / "world.gguf", QUICK)


def test_names_that_contradict_each_other(files: Path, place: Path) -> None:
    with pytest.raises(ConfigError, match="leave it out"):
        EditableModel.from_pretrained(files / "world.gguf", QUICK, gguf_file="world.gguf")
    with pytest.raises(ModelFileError, match="there is no file"):
        EditableModel.from_pretrained(files, QUICK, gguf_file="gone.gguf")
    with pytest.raises(ConfigError, match="cannot be quantised on the way"):
        EditableModel.from_pretrained(files / "world.gguf", QUICK, quantization_config={"load_in_8bit": True})


def _header(arch: str, **fields: Any) -> Any:
    writer = gguf.GGUFWriter(None, arch)
    for name, value in fields.items():
        {int: writer.add_uint16, str: writer.add_string}[type(value)](name.replace("__", "."), value)
    return writer


def test_files_that_hold_no_model_that_is_read(files: Path, tmp_path: Path) -> None:
    def refused(writer: Any, message: str) -> None:
        path = tmp_path / "file.gguf"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ModelFileError, match=message):
            load_base(str(path))

    refused(_header("rwkv7"), "'?rwkv7'? is not supported")
    refused(_header("llama", split__count=3), "one of 3 parts; join them")
    refused(_header("llama", general__type="adapter"), "holds no model, but this: 'adapter'")
    refused(_header("llama"), "describes 32 layers and holds 0")
    model = random_model("llama", attention_bias=False, mlp_bias=False)
    path = model.export_gguf(tmp_path / "whole.gguf").path
    data = path.read_bytes()
    lacking = data.replace(b"blk.1.ffn_down.weight", b"blk.1.ffn_dawn.weight")
    (tmp_path / "lacking.gguf").write_bytes(lacking)
    with pytest.raises(ModelFileError, match=r"lacks weights .*model\.layers\.1\.mlp\.down_proj\.weight"):
        load_base(str(tmp_path / "lacking.gguf"))
    smaller = data.replace(b"blk.2.ffn_norm.weight", b"blq.2.ffn_norm.weight")
    wide = data.index(b"llama.feed_forward_length") + len(b"llama.feed_forward_length") + 4
    for changed, message in (
        (smaller, "lacks weights"),
        (
            data[:wide] + (1 << 24).to_bytes(4, "little") + data[wide + 4 :],
            r"describes a model of .* numbers and holds",
        ),
        (data[:-2000], "cannot be read"),
    ):
        (tmp_path / "changed.gguf").write_bytes(changed)
        with pytest.raises(ModelFileError, match=message):
            load_base(str(tmp_path / "changed.gguf"))
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "text.gguf").write_text("hello")
    for name in ("empty.gguf", "text.gguf"):
        with pytest.raises(ModelFileError, match="cannot be read as a GGUF model"):
            load_base(str(tmp_path / name))


def test_damaged_files_are_refused_or_read(files: Path, tmp_path: Path) -> None:
    """Truncated anywhere, or with a byte changed in the head: a typed error, or a model; nothing else, and no hang."""
    data = random_model("llama", attention_bias=False, mlp_bias=False, num_hidden_layers=1).export_gguf(
        tmp_path / "whole.gguf"
    ).path.read_bytes()  # fmt: skip
    drawn = random.Random(0)
    path = tmp_path / "damaged.gguf"
    refused = 0
    head = data.index(b"tokenizer.ggml.tokens")
    tail = data.index(b"tokenizer.ggml.bos_token_id")
    for number in range(24):
        if number < 8:
            damaged = data[: drawn.randrange(len(data))]
        else:
            place = drawn.choice([drawn.randrange(head), drawn.randrange(tail, tail + 1500)])
            damaged = data[:place] + bytes([drawn.choice([0, 127, 255, data[place] ^ 1])]) + data[place + 1 :]
        path.write_bytes(damaged)
        try:
            load_base(str(path))
            load_tokenizer(str(path))
        except KeditError as error:
            assert isinstance(error, ModelFileError), error
            refused += 1
    assert refused > 10
