"""``kedit doctor``: what is there is counted, and what is wrong has its command."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from hf_kedit.cli import doctor
from hf_kedit.config.hparams import user_hparams

from .conftest import Run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for everything, with nothing in it."""
    monkeypatch.setenv("KEDIT_HOME", str(tmp_path / "kedit"))
    monkeypatch.delenv("HF_KEDIT_CACHE", raising=False)
    monkeypatch.setattr(doctor, "LITTLE_ROOM", 0)
    (tmp_path / "kedit").mkdir()
    return tmp_path / "kedit"


def look(kedit: Run) -> tuple[int, Any]:
    result = kedit("doctor", "--format", "json")
    assert not result.stderr
    return result.exit_code, json.loads(result.stdout)


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Let distributions have other versions than they have."""
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions[name] if name in versions else known(name))


def test_what_there_is(home: Path, kedit: Run) -> None:
    (home / "stats/model").mkdir(parents=True)
    (home / "stats/model/a").write_bytes(b"x" * 1000)
    (home / "b").write_bytes(b"x" * 234)
    (home / "link").symlink_to(home / "b")
    code, found = look(kedit)
    assert code == 0 and found["problems"] == []
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    caches = found["caches"]
    assert caches["second moments"]["bytes"] == 1000 and caches["second moments"]["path"] == str(home / "stats")
    assert caches["models and notes"]["bytes"] == 1234 + (home / "link").lstat().st_size
    assert all(place["writable"] for place in caches.values())
    assert set(found["extras"]["quant"]) == {"bitsandbytes", "torchao"} and "dev" not in found["extras"]
    shown = kedit("doctor").stdout
    assert "nothing is wrong" in shown and "hf_kedit" in shown


@pytest.mark.parametrize(
    ("versions", "problem", "command"),
    [
        ({"peft": "0.1"}, "peft 0.1 is not", "pip install 'peft"),
        ({"safetensors": None}, "safetensors, which is not installed", "pip install 'safetensors"),
        ({"nltk": None, "pandas": "2.0", "scikit-learn": "1.5"}, "'eval' is there in part: nltk", "hf_kedit[eval]"),
    ],
)
def test_wrong_versions(
    versions: dict[str, str | None],
    problem: str,
    command: str,
    home: Path,
    kedit: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, **versions)
    code, found = look(kedit)
    (one,) = found["problems"]
    assert code == 1 and problem in one["problem"] and command in one["command"]
    quiet = kedit("doctor", "-f", "quiet")
    assert quiet.stdout == one["command"] + "\n" and quiet.exit_code == 1 and not quiet.stderr
    assert problem in " ".join(kedit("doctor").stdout.split())


def test_an_extra_that_is_not_there_at_all_is_no_fault(
    home: Path, kedit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, bitsandbytes=None, torchao=None)
    code, found = look(kedit)
    assert code == 0 and found["extras"]["quant"] == {"bitsandbytes": None, "torchao": None}
    assert "pip install 'hf_kedit[quant]'" in kedit("doctor").stdout


def test_places_that_are_none(tmp_path: Path, kedit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_KEDIT_CACHE", str(tmp_path / "file/below"))
    code, found = look(kedit)
    assert code == 1 and "export HF_KEDIT_CACHE=" in found["problems"][0]["command"]
    monkeypatch.delenv("HF_KEDIT_CACHE")
    monkeypatch.setattr(doctor, "LITTLE_ROOM", 2**60)
    assert all("are free" in p["problem"] for p in look(kedit)[1]["problems"])


@pytest.mark.parametrize("text", ["[", "- a", "a: !!python/object:os.system {}", "\ud83d"])
def test_own_files_that_cannot_be_read(text: str, home: Path, kedit: Run) -> None:
    path = user_hparams() / "ROME/mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    (path.parent / "good.yaml").write_text("layers: [1]\n", encoding="utf-8")
    code, found = look(kedit)
    (one,) = found["problems"]
    assert code == 1 and str(path) in one["problem"] and one["command"] == f"rm '{path}'"
