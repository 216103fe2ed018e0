"""What a user may name a file or a folder by, at every door: a typed error, and nothing is written or changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import (
    AutoEditConfig,
    EditableModel,
    Editor,
    IKEConfig,
    ROMEConfig,
    SERACConfig,
    collect_report,
    evaluate_edits,
    load_edit_dataset,
    load_requests,
)
from hf_kedit.artifact.card import base_licence
from hf_kedit.artifact.layout import portable
from hf_kedit.compat.easyedit import ROMEHyperParams
from hf_kedit.config.easyedit import convert_hparams
from hf_kedit.errors import ConfigError, KeditError, NonFiniteError, RollbackError
from hf_kedit.evaluation import load_ability
from hf_kedit.evaluation.hub_metrics import write_space
from hf_kedit.evaluation.measures.judges import CallableJudge
from hf_kedit.evaluation.runs.bench import collect_bench, run_bench
from hf_kedit.evaluation.runs.folder import RunFolder
from hf_kedit.evaluation.runs.sweep import BenchPlan
from hf_kedit.evaluation.scenarios.base import load_scenario
from hf_kedit.hub import push_folder
from hf_kedit.statistics.corpora import resolve_corpus
from hf_kedit.storage.files import named_path, write_folder
from hf_kedit.training.plan import TrainingPlan
from hf_kedit.ui.space import export_space
from tests.fuzz.states import contents, difference, surface

FACT = {"prompt": "By profession {} is a", "subject": "Tarosk Boayond", "target_new": "plumber"}
LONG = "x" * 300
BAD = {"long": LONG, "below": f"{LONG}/y", "nothing": None, "number": 5, "empty": "", "blank": " ", "bytes": b"x"}
BAD |= {"nul": "a\0b", "half a character": "\ud83d"}
SWEEP = BenchPlan.from_dict({"models": ["kedit/world-gpt2"], "methods": ["rome"], "datasets": ["nowhere.json"]})


@pytest.fixture(scope="module")
def model() -> EditableModel:
    made = EditableModel.from_pretrained("kedit/world-gpt2", "prompt")
    made.edit(FACT, show_progress=False)
    return made


@pytest.fixture(scope="module")
def changed() -> EditableModel:
    """A model with a change of low rank, without computing one."""
    made = EditableModel.from_pretrained("kedit/world-gpt2", "ft-m")
    made.edit(FACT, show_progress=False)
    return made


def ending(path: Any, suffix: str) -> Any:
    """A text with an ending that tells what kind of file it is; anything else as it is."""
    return path + suffix if isinstance(path, str) else path


Door = Callable[[EditableModel, EditableModel, Any], Any]
DOORS: dict[str, Door] = {
    "from_pretrained": lambda m, c, p: EditableModel.from_pretrained(p),
    "load_edits": lambda m, c, p: c.load_edits(p, "other"),
    "import_lora": lambda m, c, p: c.import_lora(p),
    "save_pretrained": lambda m, c, p: m.save_pretrained(p),
    "export_lora": lambda m, c, p: c.export_lora(p),
    "export_gguf": lambda m, c, p: c.export_gguf(p),
    "push_folder": lambda m, c, p: push_folder(p, "a/b"),
    "load_requests": lambda m, c, p: load_requests(p),
    "config, read": lambda m, c, p: AutoEditConfig.from_pretrained(p),
    "config, written": lambda m, c, p: m.edit_config.save_pretrained(p),
    "editor": lambda m, c, p: Editor.from_pretrained(p),
    "run, read": lambda m, c, p: collect_report(p),
    "run, written": lambda m, c, p: RunFolder(p, {}, [], (1, 1)),
    "a provider's fine-tuning": lambda m, c, p: m.export_finetune(p),
    "EasyEdit's hyperparameters": lambda m, c, p: convert_hparams(p),
    "Space, folder": lambda m, c, p: export_space(p, "org/model"),
    "metric, folder": lambda m, c, p: write_space("kedit_accuracy", p),
    "EasyEdit's class": lambda m, c, p: ROMEHyperParams.from_hparams(p),
    "plan of a sweep": lambda m, c, p: BenchPlan.from_file(p),
    "plan of a training": lambda m, c, p: TrainingPlan.from_file(p),
}
# Where nothing may be named, too.
OPTIONAL: dict[str, Door] = {
    "data": lambda m, c, p: load_edit_dataset("zsre", path=p),
    "model, ending": lambda m, c, p: EditableModel.from_pretrained(ending(p, ".gguf")),
    "file in a folder": lambda m, c, p: EditableModel.from_pretrained(p, gguf_file="model.gguf"),
    "data, ending": lambda m, c, p: load_edit_dataset(ending(p, ".json")),
    "base": lambda m, c, p: EditableModel.from_pretrained("kedit/world-gpt2", base_model=p),
    "statistics": lambda m, c, p: ROMEConfig(stats_dir=p),
    "corpus": lambda m, c, p: ROMEConfig(stats_dataset=p),
    "scenario": lambda m, c, p: load_scenario("safety").read(p),
    "scenario, path": lambda m, c, p: load_scenario("safety").read(path=p),
    "paragraphs": lambda m, c, p: load_scenario("long_text").read(p),
    "paragraphs, path": lambda m, c, p: load_scenario("long_text").read(path=p),
    "ability": lambda m, c, p: load_ability("sentiment", p),
    "verdicts": lambda m, c, p: CallableJudge(lambda *texts: True, cache_path=p),
    "training": lambda m, c, p: TrainingPlan("kedit/world-gpt2", "mend", {"dataset": p}, {}).train_facts(),
    "SERAC's editor": lambda m, c, p: m.set_method(SERACConfig(editor=p)),
    "demonstrations": lambda m, c, p: m.set_method(IKEConfig(demonstrations=p)).edit(FACT),
}
# A name on the Hub is as good: what is no path is looked up there, or was only meant to be looked up.
NAMES: dict[str, Callable[[Any], Any]] = {
    "texts for statistics": lambda p: resolve_corpus(p),
    "saved settings": lambda p: portable({"stats_dataset": p}),
    "licence of the base": lambda p: base_licence(p, None),
    "Space, model": lambda p: export_space("space", p),
    "sweep, read": lambda p: collect_bench(SWEEP, p),
    "sweep, made": lambda p: run_bench(SWEEP, p),
}


@pytest.mark.parametrize("door", [*DOORS, *OPTIONAL])
def test_no_path_opens_a_door(
    door: str, model: EditableModel, changed: EditableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = [surface(m.base_model) for m in (model, changed)]
    for kind, path in BAD.items():
        if door in OPTIONAL and path is None:  # which it may be
            continue
        if door in ("statistics", "corpus") and isinstance(path, bytes):  # a text, to the field's type
            continue
        with pytest.raises(KeditError) as raised:
            {**DOORS, **OPTIONAL}[door](model, changed, path)
        assert len(str(raised.value)) > 20, kind
    assert not contents(tmp_path)
    for was, now in zip(before, (model, changed), strict=True):
        assert difference(was, surface(now.base_model)) is None


@pytest.mark.parametrize("door", NAMES)
def test_what_is_no_path_may_be_a_name_but_no_other_error(
    door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in BAD.values():
        if isinstance(path, str):
            with contextlib.suppress(KeditError):
                NAMES[door](path)


def test_a_report_cannot_be_written_to_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = evaluate_edits(EditableModel.from_pretrained("kedit/world-gpt2", "prompt"), [FACT], progress=False)
    for value in BAD.values():
        if value is not None:
            with pytest.raises(KeditError):
                report.to_html(value)  # type: ignore[arg-type]
    assert not contents(tmp_path)


def test_without_a_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: EditableModel) -> None:
    """It was removed while the program ran."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(KeditError, match="cannot be a path"):
        model.save_pretrained("edits")
    model.save_pretrained(tmp_path / "edits")
    assert len(EditableModel.from_pretrained(tmp_path / "edits").edits) == 1


def test_a_path_may_be_what_nobody_would_name_it(tmp_path: Path) -> None:
    for name in (
        "😀 ünïcode",
        "\u202eabc",
        "e\u0301",
        "x...",
        "CON",
        "C:\\x\\y",
        " lead",
        "a\nb",
        "-rf",
        "%s{}",
        "x" * 255,
    ):
        folder = named_path(str(tmp_path / name), "the folder")
        write_folder(folder, {"one": b"1"}, last="one")
        assert contents(folder).keys() == {"one"}


@pytest.mark.parametrize("which", [[["a"]], [None], [{}], (5,)])
def test_no_id_takes_an_edit_back(which: Any, model: EditableModel) -> None:
    with pytest.raises(RollbackError, match="ids of edits"):
        model.rollback(which)
    assert len(model.edits) == 1


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 2**70])
def test_a_seed_that_no_generator_takes(seed: int) -> None:
    with pytest.raises(ConfigError, match="64 bits"):
        ROMEConfig(seed=seed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["rome", "memit"])
def test_a_model_that_writes_no_numbers(method: str, bad: float) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", method)
    with torch.no_grad():
        model.base_model.transformer.ln_f.weight[7] = bad
    before = surface(model.base_model)
    with pytest.raises(NonFiniteError, match="reload"):
        model.edit(FACT, show_progress=False)
    assert difference(before, surface(model.base_model)) is None
