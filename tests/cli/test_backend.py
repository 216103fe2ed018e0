"""Commands on a model behind an API, which is a server of this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.remote.servers import Reply, Server, chat, serving

from .conftest import FACT, Run, data

KEY = "sk-very-secret-0123"


def believer(path: str, body: dict[str, Any], number: int) -> Reply:
    """Says the last word of the new fact that it reads, else that it does not know."""
    text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    facts = [line for line in text.splitlines() if line.startswith("New Fact: ")]
    answer = facts[-1].split()[-1] if facts else "unknown"
    return Reply({"choices": [{"text": answer}]}) if "prompt" in body else chat(answer)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(believer) as server:
        yield server


def test_edits_are_made_saved_measured_and_undone(
    kedit: Run, server: Server, requests_file: Path, tmp_path: Path
) -> None:
    there = ("--backend", server.url, "--api-model", "m", "--api-key-env", "MY_KEY")
    folder = tmp_path / "edits"
    words = ("edit", *there, "--requests", requests_file, "--output", folder, "--system", "Be brief.")
    made = data(kedit(*words, "--format", "json"))
    assert (made["method"], made["model"], made["n"]) == ("prompt", "m", 2)
    assert made["metrics"]["edit_success"] == made["metrics"]["locality"] == 1.0
    assert made["side_effects"] is None
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.asked)
    assert server.asked[0][2]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert not [f for f in folder.rglob("*") if KEY.encode() in f.read_bytes()]
    report = data(kedit("eval", *there, "--model", folder, "--no-edit", "--format", "json"))
    assert (
        report["setting"] == "saved" and report["pre"]["rewrite_acc"] == 0.0 and report["post"]["rewrite_acc"] == 1.0
    )
    assert data(kedit("inspect", folder, "--format", "json"))["base_model"] == "m"
    gone = data(kedit("rollback", folder, "--last", 1, "--format", "json"))
    assert gone["rolled_back"] == ["second"] and gone["remaining"] == ["first"]


def test_texts_are_completed(kedit: Run, server: Server, requests_file: Path) -> None:
    there = ("--backend", server.url, "--api-model", "m", "--api", "completions")
    words = ("eval", *there, "--method", "ike", "--set", "k=2", "--dataset", requests_file, "--format", "json")
    assert data(kedit(*words))["post"]["rewrite_acc"] == 1.0
    assert {path for path, _, _ in server.asked} == {"/v1/completions"}
    assert not any("Authorization" in headers for _, headers, _ in server.asked)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--api-model", "m"), "--backend"),
        (("--backend", "http://127.0.0.1:9/v1"), "--api-model"),
        (("--backend", "http://127.0.0.1:9/v1", "--api-model", "m", "--model", "kedit/world-gpt2"), "--model"),
    ],
)
def test_options_that_do_not_go_together(kedit: Run, words: tuple[str, ...], complaint: str) -> None:
    result = kedit("edit", "--prompt", "a", "--target", "b", "--model", "kedit/world-gpt2", *words)
    assert result.exit_code == 2 and complaint in result.stderr


def test_a_server_that_is_not_there_is_one_line(kedit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_kedit.remote.endpoint.time.sleep", lambda seconds: None)
    there = ("--backend", "http://127.0.0.1:9/v1", "--api-model", "m")
    result = kedit("edit", *there, "--prompt", "a", "--target", "b")
    assert result.exit_code == 1 and "the model at http://127.0.0.1:9/v1" in result.stderr


def test_edits_are_written_for_a_provider(kedit: Run, saved: Path, requests_file: Path, tmp_path: Path) -> None:
    for source in (saved, requests_file):
        words = ("export-finetune", source, "--output", tmp_path / "train.jsonl", "--system", "S", "--format", "json")
        assert data(kedit(*words)) == {"output": str(tmp_path / "train.jsonl"), "edits": 2, "lines": 10}
        first = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["messages"]
        assert [turn["role"] for turn in first] == ["system", "user", "assistant"]
        assert first[1]["content"] == "By profession Tarosk Boayond is a" and first[2]["content"] == FACT["target_new"]
    assert kedit("export-finetune", tmp_path, "--output", tmp_path / "x.jsonl").exit_code == 1
