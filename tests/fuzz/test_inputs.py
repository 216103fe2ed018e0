"""Damaged requests, data files, settings, plans and sweeps: refused with a typed error, or read."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_kedit import EditConfig, load_edit_dataset, load_requests
from hf_kedit.compat.easyedit import convert_training
from hf_kedit.config.easyedit import convert_hparams
from hf_kedit.data.easyedit import from_easyedit
from hf_kedit.evaluation import EvaluationReport
from hf_kedit.evaluation.runs.bench import BenchPlan
from hf_kedit.requests import EditRequest
from hf_kedit.training.plan import TrainingPlan
from tests.fuzz.mutations import FIRST, LONG, Tally, attempt, damage_bytes, dumps, mutate
from tests.fuzz.states import beside
from tests.hparams_files import FILES

ROOT = Path(__file__).resolve().parents[2]
REQUEST = {
    "id": "a", "prompt": "{} plays the", "subject": "Otto", "target_new": "flute", "ground_truth": ["horn"],
    "rephrase_prompts": ["The instrument of Otto is the"],
    "locality": {"near": [{"prompt": "Emil plays the", "ground_truth": [["drum", "drums"]]}]},
    "portability": {"far": [{"prompt": "Otto is a", "ground_truth": ["flautist"], "match": "any"}]},
    "metadata": {"source": 1, "list": [1, {"a": None}]},
}  # fmt: skip
EASYEDIT = {
    "prompts": ["Otto plays the", "Ida plays the"], "target_new": ["flute", "drum"], "ground_truth": ["horn", None],
    "rephrase_prompts": ["Otto's instrument:", None], "subject": ["Otto", "Ida"],
    "locality_inputs": {"near": {"prompt": ["Emil plays the", None], "ground_truth": ["drum", None]}},
    "portability_inputs": {"far": {"prompt": [["Otto is a"], None], "ground_truth": [["flautist"], None]}},
}  # fmt: skip
KNOWEDIT = [{
    "subject": "Otto", "prompt": "Otto plays the", "target_new": "flute", "ground_truth": "horn",
    "portability": {"Reasoning": [{"prompt": "Otto is a", "ground_truth": [["flautist"]]}]},
    "locality": {"Relation_Specificity": [{"prompt": "Emil plays the", "ground_truth": [["drum"]]}]},
}]  # fmt: skip
ZSRE = [{
    "subject": "Otto", "src": "What does Otto play?", "pred": "horn", "alt": "flute", "answers": ["horn"],
    "rephrase": "Which instrument is Otto's?", "loc": "nq question: who sings", "loc_ans": "Ida", "cond": "a >> b",
}]  # fmt: skip
COUNTERFACT = [{
    "case_id": 1, "paraphrase_prompts": ["Otto, player of"], "neighborhood_prompts": ["Emil plays the"],
    "attribute_prompts": [], "generation_prompts": ["Otto likes"],
    "requested_rewrite": {
        "prompt": "{} plays the", "subject": "Otto", "relation_id": "P1",
        "target_new": {"str": "flute", "id": "Q1"}, "target_true": {"str": "horn", "id": "Q2"},
    },
}]  # fmt: skip
THEIRS = {
    "alg_name": "ROME", "model_name": "gpt2", "layers": [3], "v_lr": "5e-1", "v_num_grad_steps": 20, "device": 0,
    "fact_token": "subject_last", "clamp_norm_factor": 4, "mom2_adjustment": True, "max_length": 40,
    "context_template_length_params": [[5, 10]], "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj", "batch_size": 1,
}  # fmt: skip
CONFIG = {"edit_type": "memit", "layers": [1, 2], "v_lr": 0.5, "context_templates": [["{}"]]}
MEND = {**THEIRS, "alg": "MEND", "lr": 1e-6, "max_iters": 10}
SWEEP = {
    "models": ["kedit/world-gpt2", {"name": "kedit/world-llama", "dtype": "float32"}],
    "methods": ["rome", {"name": "ft-m", "lr": 1e-3, "label": "tuned"}],
    "datasets": [{"name": "world", "split": "test", "limit": 3}],
    "settings": ["single", {"name": "sequential", "batch_size": 2, "at": [1, 2], "when": ["immediate", "final"]}],
    "protocols": ["teacher_forced"], "output_dir": "out", "on_error": "skip",
    "abilities": [{"task": "sentiment", "limit": 2}],
}  # fmt: skip


@cache
def report() -> dict[str, Any]:
    """A small report as it lies in a file."""
    from hf_kedit import EditableModel, evaluate_edits

    model = EditableModel.from_pretrained("kedit/world-gpt2", "ft-m")
    made = evaluate_edits(model, [{"prompt": "Otto is a", "target_new": "cook"}], "single", None, "teacher_forced")
    content: dict[str, Any] = json.loads(made.to_json())
    return content


def as_file(value: Any, path: Path, rng: random.Random) -> str:
    """Write a value as its file's kind; now and then the bytes are damaged as well."""
    try:
        data = _encoded(value, path)
    except RecursionError:  # nested more deeply than the writers here can write: as deep as a file can be
        data = b"[" * 100_000
    what = ""
    if rng.random() < 0.3:
        data, what = damage_bytes(data, rng)
    path.write_bytes(data)
    return what


def _encoded(value: Any, path: Path) -> bytes:
    if path.suffix == ".yaml":
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    if path.suffix == ".jsonl":
        return b"\n".join(dumps(row) for row in (value if isinstance(value, list) else [value]))
    if path.suffix == ".csv":
        table = io.StringIO()
        rows = [row for row in (value if isinstance(value, list) else [value]) if isinstance(row, dict)] or [{"a": 1}]
        writer = csv.writer(table)
        writer.writerow([str(key) for key in rows[0]])
        for row in rows:
            writer.writerow(
                [cell if isinstance(cell, str) else json.dumps(cell, default=str) for cell in row.values()]
            )
        return table.getvalue().encode("utf-8", "surrogatepass")
    return dumps(value)


def use(requests: list[EditRequest]) -> None:
    """What becomes of requests that were taken: they are found in the prompt, saved, and read again."""
    for request in requests:
        if request.subject is not None and request.subject in request.filled_prompt:
            request.subject_span()
    text = json.dumps([r.to_dict() for r in requests], ensure_ascii=False)
    again = [r.to_dict() for r in load_requests(json.loads(text.encode("utf-8")))]
    assert json.dumps(again, ensure_ascii=False) == text, "saved and read as something else"


def kinds(rng: random.Random, folder: Path) -> tuple[str, Any, Callable[[Any], Any]]:
    """One kind of input: its name, a sound value, and who reads a damaged one."""
    hparams = rng.choice(FILES)
    plan = rng.choice(sorted((ROOT / "hparams" / "TRAINING").glob("*.yaml")))
    name = folder / "value"

    def read(value: Any, suffix: str, reader: Callable[[Path], Any]) -> Any:
        path = name.with_suffix(suffix)
        as_file(value, path, rng)
        return reader(path)

    suffix = rng.choice((".json", ".jsonl", ".csv"))
    method = hparams.parent.name
    settings = {"edit_type": method, **{k: v for k, v in _yaml(hparams).items() if k != "match"}}
    return rng.choice(
        [
            ("request", REQUEST, lambda v: use(load_requests([v]))),
            ("request file", [REQUEST], lambda v: read(v, suffix, lambda p: use(load_requests(p)))),
            ("easyedit", EASYEDIT, lambda v: use(from_easyedit(**called(v)))),
            ("knowedit", KNOWEDIT, lambda v: read(v, ".json", lambda p: table("knowedit/zsre", p))),
            ("zsre", ZSRE, lambda v: read(v, ".json", lambda p: table("zsre", p))),
            ("counterfact", COUNTERFACT, lambda v: read(v, ".json", lambda p: table("counterfact", p))),
            ("own data", [REQUEST], lambda v: read(v, suffix, lambda p: table(str(p), None))),
            (f"hparams {method}", settings, lambda v: read(v, ".yaml", EditConfig.from_hparams)),
            ("config", CONFIG, EditConfig.from_dict),
            ("their hparams", THEIRS, lambda v: read(v, ".yaml", convert_hparams)),
            ("their training", MEND, lambda v: read(v, ".yaml", convert_training)),
            (f"plan {plan.name}", _yaml(plan), lambda v: read(v, ".yaml", planned)),
            ("sweep", SWEEP, lambda v: read(v, ".yaml", lambda p: BenchPlan.from_file(p).runs)),
            ("report", report(), lambda v: read(v, ".json", lambda p: EvaluationReport.from_json(p).to_markdown())),
        ]
    )  # fmt: skip


def called(value: Any) -> dict[str, Any]:
    """Arguments that a call can have: those that exist, and the two that must be there."""
    given = {k: v for k, v in value.items() if k in EASYEDIT} if isinstance(value, dict) else {}
    return {"prompts": [], "target_new": [], **given}


def planned(path: Path) -> Any:
    """A training plan and its arguments."""
    return TrainingPlan.from_file(path).arguments()


def table(name: str, path: Path | None) -> None:
    """Load a data file as its data set, and what it holds as requests."""
    rows = load_edit_dataset(name) if path is None else load_edit_dataset(name, path=path)
    use(load_requests(rows.remove_columns("id")))


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def run(seeds: range, folder: Path) -> Tally:
    tally = Tally()
    for seed in seeds:
        rng = random.Random(seed)
        kind, sound, reader = kinds(rng, folder)
        value, what = mutate(sound, rng)
        case = f"seed {seed}, {kind}, {what}"
        refused = tally.refused
        attempt(tally, case, lambda r=reader, v=value: r(v))
        if tally.refused == refused and not (tally.wrong and tally.wrong[-1].startswith(case)):
            tally.worked += 1
        if written := beside(folder, "value"):
            tally.fail(case, f"wrote beside its files: {written}")
    return tally


def test_damaged_inputs(tmp_path: Path) -> None:
    run(range(150), tmp_path).check(100)


@pytest.mark.slow
def test_many_damaged_inputs(tmp_path: Path) -> None:
    run(range(FIRST, FIRST + 5 * LONG), tmp_path).check(LONG)


def test_sound_inputs_are_read(tmp_path: Path) -> None:
    """The values that are damaged above are taken as they are: a fuzzer that is refused everything finds nothing."""
    for seed in range(60):
        rng = random.Random(seed)
        kind, sound, reader = kinds(rng, tmp_path)
        rng.random = lambda: 1.0  # type: ignore[method-assign]  # no damaged bytes
        reader(sound)
        assert kind
