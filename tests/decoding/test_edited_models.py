"""Decoding of edited models: what it leaves alone, and what is saved of it."""

from __future__ import annotations

import json
import logging
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline
from typer.testing import CliRunner

from hf_kedit import EditableModel, evaluate_edits
from hf_kedit.cli import app
from hf_kedit.config.easyedit import convert_hparams
from hf_kedit.decoding import DeCoConfig
from hf_kedit.errors import ArtifactError, ConfigError, LayerError, UnknownMethodError

FACT: dict[str, Any] = {"prompt": "By profession {} is a", "subject": "Tarosk Boayond", "target_new": "plumber"}
FAR: dict[str, Any] = {"layers": [1], "weight": 40.0, "top_p": 1.0}
"""So far from the model's own answers that a test sees the difference."""

TEXT = "The capital of Quigraistan is Flicihoport. The city of Wohoport lies in Doloia."


def world(method: str = "rome") -> EditableModel:
    return EditableModel.from_pretrained("kedit/world-gpt2", method)


def answer(model: Any, text: str = "By profession Tarosk Boayond is a") -> list[int]:
    tokenizer = getattr(model, "tokenizer", None) or world().tokenizer
    found = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=6, do_sample=False)
    return list(found[0].tolist())


def test_an_edit_made_inside_the_block_is_the_edit_made_outside() -> None:
    outside, inside = world(), world()
    outside.edit(**FACT)
    with inside.decoding("deco", **FAR):
        inside.edit(**FACT)
    a, b = outside.base_model.state_dict(), inside.base_model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_decoding_is_saved_with_edits_and_is_generates_alone(tmp_path: Path) -> None:
    model = world()
    model.edit(**FACT)
    plain = answer(model)
    model.set_decoding("deco", **FAR)
    decoded = answer(model)
    assert decoded != plain == answer(model.base_model)
    model.save_pretrained(tmp_path)
    again = EditableModel.from_pretrained(tmp_path)
    assert again.decoding_config == DeCoConfig(**FAR)
    assert answer(again) == decoded and answer(again.base_model) == plain
    again.set_decoding(None)
    assert answer(again) == plain
    again.save_pretrained(tmp_path)
    assert "decoding" not in json.loads((tmp_path / "edit_config.json").read_text())


@pytest.mark.parametrize("damage", [{"name": "dola", "layers": [99]}, {"name": "x"}, {"name": "dola", "alpha": "a"}])
def test_a_damaged_setting_is_an_artifact_error(tmp_path: Path, damage: Any) -> None:
    model = world().set_decoding("dola")
    model.edit(**FACT)
    model.save_pretrained(tmp_path)
    file = tmp_path / "edit_config.json"
    config = json.loads(file.read_text()) | {"decoding": damage}
    del config["config_sha256"]
    file.write_text(json.dumps(config))
    base = world().base_model
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(ArtifactError, match="decoding"):
        EditableModel.from_pretrained(tmp_path, base_model=base)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_what_does_not_exist_is_refused_before_anything_is_set() -> None:
    model = world()
    with pytest.raises(LayerError):
        model.set_decoding("dola", layers=[99])
    with pytest.raises(ConfigError, match="Did you mean 'alpha'"):
        model.decoding("dola", alhpa=0.2)
    assert model.decoding_config is None


def test_generations_of_an_evaluation_are_decoded_and_scores_are_not() -> None:
    plain, decoded = world(), world().set_decoding("deco", **FAR)
    texts, scores, settings = [], [], []
    for model in (plain, decoded):
        report = evaluate_edits(model, [FACT], protocol=["generation", "teacher_forced"], progress=False)
        (written,) = report.select("generation")
        (scored,) = report.select("teacher_forced")
        texts.append([(text["pre"], text["post"]) for text in written["texts"]])
        scores.append((scored["pre"], scored["post"]))
        settings.append(report.meta.get("decoding"))
    assert texts[0][0][0] != texts[1][0][0]  # before the edit too: nothing of the other model is taken from the cache
    assert scores[0] == scores[1]
    assert settings == [None, DeCoConfig(**FAR).to_dict()]
    with plain.decoding("deco", **FAR):
        report = evaluate_edits(plain, [FACT], protocol="generation", progress=False)
    assert [(text["pre"], text["post"]) for text in report.cases[0]["texts"]] == texts[1]


def test_perplexity_and_the_state_of_a_worn_model_are_of_its_own_logits() -> None:
    worn = []
    for model in (world(), world().set_decoding("deco", **FAR)):
        report = evaluate_edits(
            model, [FACT], "sequential", at=[1], collapse_text=TEXT, protocol="generation", progress=False
        )
        worn.append([(c["perplexity_before"], c["perplexity"], c["state"]) for c in report.checkpoints])
    assert worn[0] and worn[0] == worn[1] and all(math.isfinite(before) for before, *_ in worn[0])


def test_another_thread_that_asks_the_stock_model_is_left_alone() -> None:
    model = world().set_decoding("deco", **FAR)
    plain, seen = answer(model.base_model), []
    own = model.base_model.forward
    started, finished = threading.Event(), threading.Event()
    main = threading.get_ident()

    def slow(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == main and not started.is_set():
            started.set()
            finished.wait(20)
        return own(*args, **kwargs)

    def ask() -> None:
        started.wait(20)
        seen.append(answer(model.base_model))
        finished.set()

    model.base_model.forward = slow  # type: ignore[method-assign]
    other = threading.Thread(target=ask)
    other.start()
    decoded = answer(model)
    other.join()
    del model.base_model.forward
    assert seen == [plain] and decoded != plain


@pytest.mark.parametrize("method", ["grace", "prompt"])
def test_edits_beside_the_weights_are_decoded_too(method: str) -> None:
    model = world(method)
    model.edit(**FACT)
    plain = answer(model)
    with model.decoding("deco", **FAR):
        assert answer(model) != plain
    with model.decoding("deco", top_k=1):  # one candidate: the model's own greedy answer
        assert answer(model) == plain
    assert answer(model) == plain


def test_a_pipeline_decodes() -> None:
    model = world()
    writer = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    plain = writer("By profession Tarosk Boayond is a", **settings)
    model.set_decoding("deco", **FAR)
    assert writer("By profession Tarosk Boayond is a", **settings) != plain


def test_a_merged_model_says_that_the_decoding_stays_behind(caplog: pytest.LogCaptureFixture) -> None:
    model = world().set_decoding("dola")
    model.edit(**FACT)
    with caplog.at_level(logging.WARNING, "hf_kedit"):
        model.merge_and_unload()
    assert "without dola" in caplog.text


@pytest.mark.parametrize("name", ["DoLa", "DeCo"])
def test_files_of_easyedit_are_told_our_way(name: str) -> None:
    with pytest.raises(UnknownMethodError, match=r"model\.decoding"):
        convert_hparams({"alg_name": name, "model_name": "x"})


def test_a_block_counts_more_than_what_was_set_and_blocks_are_not_nested() -> None:
    model = world()
    plain = answer(model)
    model.set_decoding("deco", **FAR)
    with model.decoding("deco", top_k=1):
        assert answer(model) == plain
        with pytest.raises(ConfigError, match="already"), model.decoding("dola"):
            pass
        assert answer(model) == plain
    assert answer(model) != plain


def test_the_command_line_decodes(tmp_path: Path) -> None:
    command = "eval --model kedit/world-gpt2 --method ft-m --dataset world --limit 1 --protocol generation"
    written = []
    for more in ([], ["--decoding", "deco:1,2"]):
        file = tmp_path / f"{len(written)}.json"
        result = CliRunner().invoke(app, [*command.split(), *more, "--output", str(file)])
        assert result.exit_code == 0, result.output
        written.append(json.loads(file.read_text())["meta"].get("decoding"))
    assert written == [None, {**DeCoConfig([1, 2]).to_dict(), "layers": [1, 2]}]
    result = CliRunner().invoke(app, [*command.split(), "--decoding", "dola:middle"])
    assert result.exit_code != 0 and "high" in result.output
