"""EasyEdit's DeepEdit: a model behind an API is asked questions of several hops about edited cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_kedit.compat.easyedit import BaseEditor, DeepEditApiHyperParams, MQuAKEDataset
from hf_kedit.compat.easyedit.models.deepedit_api import apply_deepedit_api_to_model
from hf_kedit.errors import ConfigError, RequestError, UnknownMethodError
from tests.remote.servers import Reply, chat, serving

BORN = {"Ada Bell": "Bergen", "Mol": "Ghent", "Eva Holm": "Turku"}


def case(number: int, subject: str, inventor: str, answer: str, aliases: list[str]) -> dict[str, Any]:
    rewrite = {"prompt": "The inventor of the {} was", "relation_id": "P61", "subject": subject}
    rewrite |= {"target_new": {"str": inventor, "id": "Q1"}, "target_true": {"str": "Mol", "id": "Q2"}}  # type: ignore[dict-item]
    return {
        "case_id": number,
        "requested_rewrite": [{**rewrite, "question": f"Who was the inventor of the {subject}?"}],
        "questions": [f"Where was the inventor of the {subject} born?", "?", "?"],
        "answer": "Ghent",
        "answer_alias": [],
        "new_answer": answer,
        "new_answer_alias": aliases,
    }


CASES = [
    case(0, "telegraph kettle", "Ada Bell", "Bjorgvin", ["bergen"]),
    case(1, "spoon lamp", "Eva Holm", "Oslo", []),
]


def answer(path: str, body: dict[str, Any], number: int) -> Reply:
    """Splits questions as it is told to, and knows who was born where; every fact that it is shown fits."""
    text = body["messages"][-1]["content"]
    if text.startswith("Fact:"):
        return chat("yes")
    *_, last = text.split("Question: ")
    if text.startswith("Answer in a few words."):
        return chat(next((place for name, place in BORN.items() if name in last), "Mol"))
    found = [line.removeprefix("Found: ") for line in last.splitlines() if line.startswith("Found: ")]
    thing = last.partition("inventor of the ")[2].partition(" born")[0]
    steps = [f"Ask: Who was the inventor of the {thing}?", "Ask: Where was {} born?", "Answer: {}"]
    return chat(steps[len(found)].format(found[-1] if found else ""))


def test_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "sk-1")
    (tmp_path / "cases.json").write_text(json.dumps(CASES), encoding="utf-8")
    with serving(answer) as server:
        file = {"alg_name": "DeepEdit-Api", "model_name": "some", "api_key": "A_KEY", "api_base": server.url}
        file |= {"prompts_dir": "./prompts", "contriver_dir": "facebook/contriever", "device": 0}
        (tmp_path / "some.json").write_text(json.dumps(file), encoding="utf-8")
        hparams = DeepEditApiHyperParams.from_hparams(str(tmp_path / "some.json"))
        editor = BaseEditor.from_hparams(hparams)
        said = editor.deep_edit(CASES)
        assert said == editor.deep_edit(datasets=MQuAKEDataset(str(tmp_path / "cases.json")))
        assert said == apply_deepedit_api_to_model(CASES, hparams) and editor.alg_name == "DeepEdit-Api"
        with pytest.raises(RequestError, match="question"):
            editor.deep_edit([{**CASES[0], "questions": []}])
        assert not editor.model.edits
        with pytest.raises(UnknownMethodError, match="from_backend"):
            editor.edit(prompts="a", target_new="b", verbose=False)
    assert {headers["Authorization"] for _, headers, _ in server.asked} == {"Bearer sk-1"}
    # The first case by an alias, in other letters; of the second Turku, which the edit leads to, is no answer.
    assert said == ["Multi-hop acc = 1.0 (1 / 1)", "Multi-hop acc = 0.5 (1 / 2)", "Multi-hop acc = 0.5 (1 / 2)"]


@pytest.mark.parametrize("wrong", [{"model_name": None}, {"api_key": "sk-not.a.name"}])
def test_what_no_model_can_be_made_of(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        BaseEditor({"alg_name": "DeepEdit-Api", "model_name": "some", **wrong})
