"""Each command on an embedded model: what it does, in every format."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kedit import EditableModel, embedded, evaluate_edits, load_edit_dataset
from hf_kedit.engine.weights import model_digest
from hf_kedit.methods import registered_methods
from hf_kedit.training.plan import TrainingPlan
from tests.artifact.test_files_of_0_1_0 import DATA

from .conftest import FACT, Run, data

MODEL = ("--model", "kedit/world-gpt2")
ONE = ("--prompt", FACT["prompt"], "--subject", FACT["subject"], "--target", FACT["target_new"])


# ---------------------------------------------------------------------- list-methods


def test_list_methods(kedit: Run) -> None:
    rows = data(kedit("list-methods", "--format", "json"))
    assert [row["edit_type"] for row in rows] == list(registered_methods())
    kinds = {"name": str, "kind": str, "batch": bool, "sequential": bool, "needs_subject": bool}
    kinds |= {"needs_training": bool, "paper": str, "summary": str, "low_rank": bool, "encoder_decoder": bool}
    for row in rows:
        for name, kind in kinds.items():
            assert type(row[name]) is kind, (row["edit_type"], name)
    by_name = {row["edit_type"]: row for row in rows}
    assert by_name["rome"]["batch"] is False
    assert by_name["memit"]["batch"] is True
    assert by_name["ft-m"]["needs_subject"] is False
    everything = [row["edit_type"] for row in data(kedit("list-methods", "--family", "llama", "-f", "json"))]
    assert everything == list(by_name)
    on_t5 = {row["edit_type"] for row in data(kedit("list-methods", "--family", "t5", "-f", "json"))}
    assert on_t5 == {name for name, row in by_name.items() if row["encoder_decoder"]} and "rome" not in on_t5
    wrong = kedit("list-methods", "--family", "lama")
    assert wrong.exit_code == 2 and "llama" in wrong.stderr


def test_list_methods_for_people_and_scripts(kedit: Run) -> None:
    shown = kedit("list-methods").stdout
    for name, method in registered_methods().items():
        assert name in shown
        assert method.capabilities.paper.split(",")[0] in " ".join(shown.split())
    assert kedit("list-methods", "--format", "quiet").stdout.split() == list(registered_methods())
    assert data(kedit("list-methods", "--kind", "prompt", "--format", "json")) == [
        row for row in data(kedit("list-methods", "--format", "json")) if row["kind"] == "prompt"
    ]


# ---------------------------------------------------------------------- edit


def test_edit_one(kedit: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    words = [*ONE, "--rephrase", "For many years Tarosk Boayond has been a", "--output", folder, "-f", "json"]
    result = data(kedit("edit", *MODEL, "--method", "rome", *words))
    assert {"edit_id", "method", "model", "metrics", "pre", "seconds", "peak_memory", "artifact"} <= set(result)
    assert result["model"] == "kedit/world-gpt2"
    assert result["method"] == "rome"
    assert result["pre"] == {"edit_success": 0.0, "rephrase": 0.0, "locality": None, "portability": None}
    assert result["metrics"] == {"edit_success": 1.0, "rephrase": 1.0, "locality": None, "portability": None}
    assert result["seconds"] > 0
    assert result["artifact"] == str(folder)
    model = EditableModel.from_pretrained(folder)
    assert [e.id for e in model.edits] == [result["edit_id"]]
    assert model.edits[0].request.rephrase_prompts == ["For many years Tarosk Boayond has been a"]


def test_edit_says_what_else_changed(kedit: Run) -> None:
    neighbour = ["--neighbour", "By profession Fulex Tudias is a", "--no-eval"]
    result = data(kedit("edit", *MODEL, "--method", "rome", *ONE, *neighbour, "-f", "json"))
    effects = result["side_effects"]
    assert effects["asked"] == {"fact": 1, "neighbour": 1, "general": 40, "name": 1}
    assert effects["shares"]["fact"] == effects["shares"]["neighbour"] == 1.0
    assert effects["harm"] == []


def test_edit_that_breaks_the_model(kedit: Run, tmp_path: Path) -> None:
    """Every target is reached, and the command says in red that the model is broken; --strict makes it a failure."""
    words = ["edit", *MODEL, "-M", "ft-m", "--set", "lr=0.5", *ONE]
    shown = kedit(*words)
    assert shown.exit_code == 0
    assert "harm: " in shown.stdout
    assert "answers to general prompts changed" in shown.stdout
    strict = kedit(*words, "--strict", "--output", tmp_path / "out")
    assert strict.exit_code == 4
    assert "answers to general" in strict.stderr
    assert len(EditableModel.from_pretrained(tmp_path / "out").edits) == 1
    assert kedit(*words, "--strict", "--no-side-effects").exit_code == 2


def test_edit_rows_of_a_dataset(kedit: Run) -> None:
    quick = ["--no-eval", "--no-side-effects", "-f", "json"]
    result = data(kedit("edit", *MODEL, "-M", "ft-m", "--dataset", "world", "--split", "test", "--limit", "2", *quick))
    assert result["n"] == 2
    assert result["side_effects"] is None
    assert kedit("edit", *MODEL, "-M", "ft-m", *ONE, "--limit", "2").exit_code == 2


def test_edit_many_together(kedit: Run, requests_file: Path) -> None:
    result = data(kedit("edit", *MODEL, "-M", "ft-m", "--requests", requests_file, "-f", "json"))
    assert result["edit_id"] is None
    assert result["edit_ids"] == ["first", "second"]
    assert result["artifact"] is None
    assert result["metrics"]["edit_success"] == 1.0
    model = EditableModel.from_pretrained("kedit/world-gpt2", "ft-m")
    again = evaluate_edits(model, requests_file, "batch", 2).summary()["post"]
    assert result["metrics"]["locality"] == pytest.approx(again["locality"], abs=1e-6)


def test_edit_for_people_and_scripts(kedit: Run, requests_file: Path, tmp_path: Path) -> None:
    words = ["edit", *MODEL, "-M", "ft-m", "-r", requests_file]
    shown = kedit(*words, "-o", tmp_path / "out")
    assert shown.exit_code == 0, shown.stderr
    for text in ("first", "plumber", "reliability", "generalization", str(tmp_path / "out")):
        assert text in shown.stdout
    assert kedit(*words, "--format", "quiet").stdout.split() == ["first", "second"]


def test_edit_without_measuring(kedit: Run) -> None:
    result = data(kedit("edit", *MODEL, "-M", "ft-m", *ONE, "--no-eval", "-f", "json"))
    assert result["metrics"] is None
    assert len(result["edit_ids"]) == 1


def test_edit_of_a_tied_head(kedit: Run, tmp_path: Path) -> None:
    """Refused without --untie, which the error names; with it, the saved edits remember."""
    words = ("edit", *MODEL, "-M", "ft-m", *ONE, "--no-eval", "--set", "modules=[lm_head]", "--set", "num_steps=2")
    refused = kedit(*words)
    assert refused.exit_code == 1 and "--untie" in refused.stderr
    done = kedit(*words, "--untie", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert json.loads((tmp_path / "out" / "edit_config.json").read_text(encoding="utf-8"))["head_tied"] is False


@pytest.mark.parametrize(("bound", "code"), [("1.0", 3), ("0.0", 0)])
def test_min_success(kedit: Run, tmp_path: Path, bound: str, code: int) -> None:
    """One step of fine-tuning changes nothing that one could see."""
    words = ["-M", "ft-m", *ONE, "--set", "num_steps=1", "--set", "lr=1e-9", "-o", tmp_path / "out", "-f", "json"]
    result = kedit("edit", *MODEL, *words, "--min-success", bound)
    assert result.exit_code == code, result.stderr
    assert json.loads(result.stdout)["metrics"]["edit_success"] == 0.0
    assert ("min-success" in result.stderr) == (code == 3)
    assert (tmp_path / "out" / "edit_config.json").is_file()


@pytest.mark.parametrize(("bound", "code"), [("0.8", 3), ("0.5", 0)])
def test_min_success_is_a_share_of_the_facts(kedit: Run, tmp_path: Path, bound: str, code: int) -> None:
    """Of two facts one is what the model says anyway."""
    rows = [FACT | {"id": "known", "target_new": "sculptor"}, FACT | {"id": "new"}]
    file = tmp_path / "facts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["-M", "ft-m", "-r", file, "--set", "num_steps=1", "--set", "lr=1e-9", "-f", "json"]
    result = kedit("edit", *MODEL, *words, "--min-success", bound)
    assert json.loads(result.stdout)["metrics"]["edit_success"] == 0.5
    assert result.exit_code == code, result.stderr


def test_facts_of_a_file_are_solved_together(kedit: Run, requests_file: Path, tmp_path: Path) -> None:
    done = kedit("edit", *MODEL, "-M", "memit", "-r", requests_file, "--no-eval", "-o", tmp_path / "out", "-f", "json")
    assert done.exit_code == 0, done.stderr
    lines = (tmp_path / "out" / "edits.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and len({json.loads(line)["batch_id"] for line in lines}) == 1


def test_flags_win_over_set_over_file(kedit: Run, tmp_path: Path) -> None:
    file = tmp_path / "hparams.yaml"
    file.write_text(
        "edit_type: rome\nlayers: [1]\nv_lr: 5e-1\nv_num_grad_steps: 3\nseed: 1\nmom2_adjustment: no\n",
        encoding="utf-8",
    )
    folder = tmp_path / "out"
    words = ["-c", file, *ONE, "-s", "layers=[2]", "-s", "v_num_grad_steps=4", "--layers", "3", "-o", folder]
    result = kedit("edit", *MODEL, *words)
    assert result.exit_code == 0, result.stderr
    saved = json.loads((folder / "edit_config.json").read_text(encoding="utf-8"))["hparams"]
    assert saved["layers"] == [3]
    assert saved["v_num_grad_steps"] == 4
    assert saved["v_lr"] == 0.5
    assert saved["seed"] == 1


def test_edit_says_which_method_it_chose(kedit: Run) -> None:
    words = "edit -m kedit/world-gpt2 --subject X --no-eval --no-side-effects".split()
    done = kedit(*words, "-p", "{} works as a", "-t", "plumber")
    assert done.exit_code == 0 and "1 edit with auto (rome at layer 2)" in done.output


def test_a_file_of_another_method(kedit: Run, tmp_path: Path) -> None:
    file = tmp_path / "hparams.yaml"
    file.write_text("edit_type: rome\n", encoding="utf-8")
    result = kedit("edit", *MODEL, "-c", file, "-M", "memit", *ONE)
    assert result.exit_code == 1
    assert "memit" in result.stderr


def test_saved_edits_go_on(kedit: Run, saved: Path, tmp_path: Path) -> None:
    """Without --method, with the saved one; the journal grows, and --set changes single values."""
    words = [
        "-p",
        "By profession {} is a",
        "--subject",
        "Fekeilm Thaipon",
        "-t",
        "judge",
        "--set",
        "v_num_grad_steps=7",
    ]
    result = data(kedit("edit", "-m", saved, *words, "-o", tmp_path / "more", "-f", "json"))
    assert result["method"] == "rome"
    model = EditableModel.from_pretrained(tmp_path / "more")
    assert [e.id for e in model.edits] == ["first", "second", result["edit_id"]]
    assert model.edit_config.v_num_grad_steps == 7  # type: ignore[attr-defined]


def test_nothing_is_written_beside_a_model(kedit: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    result = kedit("edit", *MODEL, "-M", "rome", *ONE, "-o", tmp_path)
    assert result.exit_code == 1
    assert "complete model" in result.stderr


# ---------------------------------------------------------------------- eval


def test_eval(kedit: Run, tmp_path: Path) -> None:
    file = tmp_path / "sub" / "report.json"
    words = ["--dataset", "world", "--split", "test", "--limit", "2", "--output", file, "-f", "json"]
    result = data(
        kedit("eval", *MODEL, "-M", "ft-m", *words, "--protocol", "teacher_forced", "--protocol", "generation")
    )
    assert result["n"] == 2
    assert result["setting"] == "single"
    assert [r["protocol"] for r in result["results"]] == ["teacher_forced", "generation"]
    assert result["pre"]["rewrite_acc"] < result["post"]["rewrite_acc"]
    model = EditableModel.from_pretrained("kedit/world-gpt2", "ft-m")
    again = evaluate_edits(model, load_edit_dataset("world", split="test", limit=2)).summary()["post"]
    for name in ("rewrite_acc", "rephrase_acc", "locality", "portability"):
        assert result["post"][name] == pytest.approx(again[name], abs=1e-6)
    report = json.loads(file.read_text(encoding="utf-8"))
    assert len(report["records"]) == 4
    assert result["report"] == str(file)


def test_eval_of_a_dataset_that_was_downloaded(kedit: Run, tmp_path: Path) -> None:
    row = {"subject": "Ada", "src": "Where did Ada die?", "pred": "Rome", "alt": "Oslo", "answers": ["Bergen"]}
    (tmp_path / "zsre.json").write_text(json.dumps([row, {**row, "alt": "Lima"}]), encoding="utf-8")
    where = ("--dataset", "zsre", "--dataset-path", tmp_path / "zsre.json")
    command = ("eval", *MODEL, "-M", "ft-m", "--set", "num_steps=1", *where)
    options = ("--dataset-option", "target=answers", "--dataset-option", "drop_conflicts=first")
    result = data(kedit(*command, *options, "--output", tmp_path / "report.json", "-f", "json"))
    assert result["n"] == 1  # the second asks the same
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["records"][0]["requested_rewrite"]["target_new"] == "Bergen"
    wrong = kedit(*command, "--dataset-option", "targt=answers")
    assert wrong.exit_code == 1 and "'target'" in wrong.stderr
    assert kedit(*command, "--dataset-option", "target").exit_code == 2
    assert kedit("eval", *MODEL, "--no-edit", "--dataset-path", "x.json").exit_code == 2


def test_eval_in_a_sequence(kedit: Run, requests_file: Path) -> None:
    words = ["-d", requests_file, "--setting", "sequential", "--when", "immediate", "--when", "final", "-f", "json"]
    result = data(kedit("eval", *MODEL, "-M", "rome", *words))
    assert [(r["when"], r["setting"]) for r in result["results"]] == [
        ("immediate", "sequential"),
        ("final", "sequential"),
    ]


def test_eval_for_people_and_scripts(kedit: Run, requests_file: Path) -> None:
    words = ["eval", *MODEL, "-M", "ft-m", "-d", requests_file, "--setting", "batch"]
    shown = kedit(*words).stdout
    assert "reliability" in shown
    assert "100.0" in shown
    assert "rewrite_acc=1.0" in kedit(*words, "--format", "quiet").stdout.split()


def test_eval_of_saved_edits(kedit: Run, saved: Path) -> None:
    """The numbers are those of the saved edits; nothing is edited, and the folder stays as it is."""
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    result = data(kedit("eval", "-m", saved, "--no-edit", "-f", "json"))
    assert result["n"] == 2
    assert result["method"] == "rome"
    assert result["setting"] == "saved"
    assert result["pre"]["rewrite_acc"] == 0.0
    assert result["post"]["rewrite_acc"] == 1.0
    assert result["results"][0]["seconds_edit"] is None
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


def test_eval_of_saved_edits_on_other_requests(kedit: Run, saved: Path) -> None:
    result = data(kedit("eval", "-m", saved, "--no-edit", "-d", "world", "-n", "1", "-f", "json"))
    assert result["post"]["rewrite_acc"] == 1.0  # the first row of the world is the first saved edit
    assert "portability" in result["post"]


def test_eval_in_parts_and_put_together(kedit: Run, requests_file: Path, tmp_path: Path) -> None:
    folder, page, whole = tmp_path / "run", tmp_path / "pages" / "report.html", tmp_path / "report.json"
    words = ["eval", *MODEL, "-M", "ft-m", "-d", requests_file, "--output-dir", folder]
    assert data(kedit(*words, "--shard", "1/2", "-f", "json"))["n"] == 1
    assert kedit("eval", "--collect", "--output-dir", folder).exit_code == 1  # a part is missing
    assert data(kedit(*words, "--shard", "2/2", "-f", "json"))["n"] == 1
    both = ["eval", "--collect", "--output-dir", folder, "--html", page, "--output", whole, "-f", "json"]
    result = data(kedit(*both))
    assert result["n"] == 2 and result["model"] == "kedit/world-gpt2" and result["method"] == "ft-m"
    assert page.read_text(encoding="utf-8").count('<details class="case">') == 2
    assert len(json.loads(whole.read_text())["records"]) == 2
    for name, start in {"whole.HTML": "<!doctype html>", "whole.md": "# ", "whole": "{"}.items():
        assert kedit("eval", "--collect", "--output-dir", folder, "-o", tmp_path / name).exit_code == 0
        assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)


def test_eval_along_a_sequence_and_past_failures(kedit: Run, requests_file: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in requests_file.read_text(encoding="utf-8").splitlines()]
    bad = tmp_path / "bad.jsonl"
    no_subject = {"prompt": "He was born in", "subject": "Nobody", "target_new": rows[0]["target_new"]}
    bad.write_text("".join(json.dumps(row) + "\n" for row in [*rows, no_subject]), encoding="utf-8")
    words = ["eval", *MODEL, "-M", "rome", "-d", bad, "--setting", "sequential", "--at", "1"]
    assert kedit(*words).exit_code == 1
    assert kedit(*words, "--plot", tmp_path / "curve.txt").exit_code == 2  # no picture
    result = kedit(*words, "--on-error", "skip", "--plot", tmp_path / "curve.svg", "-f", "json")
    assert "edits in the model" in (tmp_path / "curve.svg").read_text(encoding="utf-8")
    assert [entry["when"] for entry in data(result)["results"]] == ["at 1", "final"]
    assert [entry["n"] for entry in data(result)["results"]] == [1, 2]
    assert data(result)["results"][-1]["n_failed"] == 1


def test_eval_of_no_edits_needs_a_dataset(kedit: Run) -> None:
    result = kedit("eval", *MODEL, "--no-edit")
    assert result.exit_code == 1
    assert "--dataset" in result.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-d", "wold"], "Did you mean 'world'?"),
        (["-d", "world", "--split", "tset"], "test"),
        (["-d", "x.csv"], "x.csv"),
    ],
)
def test_eval_with_a_bad_dataset(kedit: Run, words: list[str], told: str) -> None:
    result = kedit("eval", *MODEL, "-M", "rome", *words)
    assert result.exit_code == 1
    assert told in result.stderr


# ---------------------------------------------------------------------- inspect


def test_inspect_edits(kedit: Run, saved: Path) -> None:
    result = data(kedit("inspect", saved, "-f", "json"))
    assert result["kind"] == "edits"
    assert result["base_model"] == "kedit/world-gpt2"
    assert result["method"] == "rome"
    assert [e["edit_id"] for e in result["edits"]] == ["first", "second"]
    (module,) = result["modules"]
    assert module["weight"] == "transformer.h.2.mlp.c_proj.weight"
    assert module["rank"] == 2
    assert module["bytes"] == 2 * (128 + 512) * 4
    assert result["files"]["edit_model.safetensors"] == (saved / "edit_model.safetensors").stat().st_size
    shown = kedit("inspect", saved).stdout
    for text in ("2 edits", "first", "second", "rank 2", "plumber"):
        assert text in shown
    assert kedit("inspect", saved, "-f", "quiet").stdout.split() == ["first", "second"]


def test_inspect_a_damaged_edit(kedit: Run, saved: Path) -> None:
    (saved / "edits.jsonl").write_text("{}\n", encoding="utf-8")
    result = kedit("inspect", saved)
    assert result.exit_code == 1
    assert "edits.jsonl" in result.stderr


@pytest.mark.parametrize("load", [False, True])
def test_inspect_a_model(kedit: Run, load: bool) -> None:
    """From the config alone, or with weights: the same structure."""
    words = ["inspect", "kedit/world-llama", "--method", "memit", "-f", "json", *(["--load"] if load else [])]
    result = data(kedit(*words))
    assert result["kind"] == "model"
    assert result["checked"] is load
    assert result["parameters"] == sum(
        p.numel() for p in EditableModel.from_pretrained("kedit/world-llama").base_model.parameters()
    )
    assert result["anatomy"]["num_layers"] == 6
    assert result["method"] == "MEMIT"
    expected = EditableModel.from_pretrained("kedit/world-llama", "memit").edit_config
    assert result["config"] == json.loads(json.dumps(expected.to_dict()))
    assert result["edited_modules"] == [f"model.layers.{i}.mlp.down_proj" for i in expected.layers or []]


def test_inspect_a_model_for_people(kedit: Run) -> None:
    shown = kedit("inspect", "kedit/world-gpt2").stdout
    assert "GPT2LMHeadModel" in shown
    assert "mlp.c_proj" in shown and "transformer.ln_f" not in shown
    for method in ("rome", "memit", "ft-m", "grace", "prompt", "mend"):
        words = ("inspect", "kedit/world-gpt2", "--method", method)
        short, full = kedit(*words).stdout, kedit(*words, "--all").stdout
        assert not re.search(r"None|\?|not checked", short), short
        assert len(short.splitlines()) < 16 < len(full.splitlines()) and "--set NAME=VALUE" in short
        config = data(kedit(*words, "-f", "json"))["config"]
        assert all(f"  {key}: " in full for key in config)
    shown = kedit("inspect", "kedit/world-gpt2", "--method", "rome").stdout
    assert "at        transformer.h.2.mlp.c_proj" in shown and "the subject of every fact" in shown
    assert "hparams/ROME/world-gpt2.yaml" in shown and "second moments" in shown


# ---------------------------------------------------------------------- rollback


def test_rollback_one_in_place(kedit: Run, saved: Path) -> None:
    result = data(kedit("rollback", saved, "first", "-f", "json"))
    assert result == {"rolled_back": ["first"], "remaining": ["second"], "artifact": str(saved)}
    left = EditableModel.from_pretrained(saved)
    assert [e.id for e in left.edits] == ["second"]


def test_rollback_the_last_into_another_folder(kedit: Run, saved: Path, tmp_path: Path) -> None:
    result = kedit("rollback", saved, "--last", "1", "--output", tmp_path / "less", "-f", "quiet")
    assert result.stdout.split() == ["second"]
    assert [e.id for e in EditableModel.from_pretrained(saved).edits] == ["first", "second"]
    assert [e.id for e in EditableModel.from_pretrained(tmp_path / "less").edits] == ["first"]


def test_rollback_all_gives_the_base_model(kedit: Run, saved: Path) -> None:
    result = kedit("rollback", saved, "--all")
    assert result.exit_code == 0, result.stderr
    assert "0 edits left" in result.stdout
    left, base = EditableModel.from_pretrained(saved), EditableModel.from_pretrained("kedit/world-gpt2")
    assert model_digest(left.base_model) == model_digest(base.base_model)
    assert "0 edits" in kedit("inspect", saved).stdout


@pytest.mark.parametrize(("words", "told"), [(["frst"], "Did you mean 'first'?"), (["--last", "3"], "carries 2")])
def test_rollback_of_what_is_not_there(kedit: Run, saved: Path, words: list[str], told: str) -> None:
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    result = kedit("rollback", saved, *words)
    assert result.exit_code == 1
    assert told in result.stderr
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


def test_rollback_of_a_model(kedit: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    result = kedit("rollback", tmp_path, "--all")
    assert result.exit_code == 1
    assert "no saved edits" in result.stderr


# ---------------------------------------------------------------------- merge


def test_merge(kedit: Run, saved: Path, tmp_path: Path) -> None:
    """The merged folder is a plain transformers model with the edited weights, bit for bit."""
    folder = tmp_path / "merged"
    result = data(kedit("merge", saved, "--output", folder, "-f", "json"))
    assert result["edits"] == 2
    assert result["dtype"] == "float32"
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert model_digest(merged) == model_digest(EditableModel.from_pretrained(saved).base_model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(FACT["prompt"].replace("{}", FACT["subject"]), return_tensors="pt")
    new = merged.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "plumber" in tokenizer.decode(new)


def test_merge_in_bfloat16_tells_what_is_lost(kedit: Run, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    result = data(kedit("merge", saved, "-o", folder, "--dtype", "bfloat16", "-f", "json"))
    assert result["dtype"] == "bfloat16"
    (loss,) = result["rounding_loss"].values()
    assert 0 < loss < 0.05
    edited = EditableModel.from_pretrained(saved).base_model.get_submodule("transformer.h.2.mlp.c_proj").weight
    merged = AutoModelForCausalLM.from_pretrained(folder).get_submodule("transformer.h.2.mlp.c_proj").weight
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, edited.to(torch.bfloat16))
    assert "lost by rounding" in kedit("merge", saved, "-o", tmp_path / "again", "--dtype", "bfloat16").stdout


def test_merge_of_half_precision_keeps_the_exact_sum(kedit: Run, tmp_path: Path) -> None:
    folder = DATA / "lora_gpt2_bf16"
    result = kedit("merge", folder, "-o", tmp_path / "out", "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(embedded.path("world-gpt2"), dtype=torch.bfloat16)
    tensors = load_file(folder / "edit_model.safetensors")
    (name,) = {key.rpartition(".delta_")[0] for key in tensors}
    change = tensors[f"{name}.delta_U"].double() @ tensors[f"{name}.delta_V"].double().T  # of W, a Conv1D holds Wᵀ
    for key, value in base.named_parameters():
        right = value.double() + (change.T if key == name else 0)
        torch.testing.assert_close(merged.get_parameter(key).double(), right, atol=1e-7, rtol=1e-7)
    assert float(change.abs().max()) > 1e-3 and merged.dtype == torch.float32


def test_merge_never_beside_edits(kedit: Run, saved: Path) -> None:
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    result = kedit("merge", saved, "--output", saved)
    assert result.exit_code == 1
    assert "twice" in result.stderr
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


def test_merge_of_a_model(kedit: Run, tmp_path: Path) -> None:
    result = kedit("merge", "kedit/world-gpt2", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "no saved edits" in result.stderr


# ---------------------------------------------------------------------- export-lora


def test_export_lora(kedit: Run, tmp_path: Path) -> None:
    edits, lora = tmp_path / "edits", tmp_path / "lora"
    kedit("edit", *MODEL, "--method", "rome", *ONE, "--output", edits)
    result = data(kedit("export-lora", edits, "--output", lora, "--target", "vllm", "-f", "json"))
    assert result["rank"] == 1 and result["edits"] == 1 and result["losses"] == {} and result["whole"] == []
    assert set(result["needed"].values()) == {1}
    assert json.loads((lora / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "rank 1" in kedit("export-lora", edits, "--output", lora).stdout
    assert kedit("export-lora", edits, "--output", lora, "-f", "quiet").stdout.strip() == str(lora)
    more = "transformer.h.0.mlp.c_proj"
    assert kedit("export-lora", edits, "--output", lora, "--module", more).exit_code == 0
    targets = json.loads((lora / "adapter_config.json").read_text())["target_modules"]
    assert more in targets and len(targets) == 2


# ---------------------------------------------------------------------- convert-hparams


def test_convert_hparams(kedit: Run, tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("alg_name: FT\nlayers: [3]\nlr: 5e-4\ndevice: 0\nmodel_name: gpt2\n")
    mine = tmp_path / "mine.yaml"
    result = data(kedit("convert-hparams", tmp_path / "theirs.yaml", "--output", mine, "-f", "json"))
    assert result["edit_type"] == "ft-l" and result["model_name"] == "gpt2" and set(result["ignored"]) == {"device"}
    assert result["hparams"] == {"layers": [3], "lr": 5e-4}
    assert data(kedit("edit", *MODEL, "--config", mine, *ONE, "-f", "json"))["method"] == "ft-l"
    shown = kedit("convert-hparams", tmp_path / "theirs.yaml")
    assert "edit_type: ft-l" in shown.stdout and "not carried over: device" in shown.stderr


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5_000, "a: [", "!!bool maybe", "2024-01-01"])
def test_a_value_that_cannot_be_read(kedit: Run, value: str) -> None:
    result = kedit("edit", *MODEL, "--method", "ft-m", *ONE, "--set", f"lr={value}")
    assert result.exit_code == 2 and "the value of 'lr'" in " ".join(result.stderr.split())


def test_set_takes_the_old_name_of_a_field(kedit: Run, tmp_path: Path) -> None:
    """For a fresh config, and on top of the one that saved edits bring."""
    first, second = tmp_path / "first", tmp_path / "second"
    kedit("edit", *MODEL, "--method", "ft-m", *ONE, "--set", "num_steps=2", "--set", "batch_size=2", "-o", first)
    kedit("edit", "--model", first, *ONE, "--set", "batch_size=3", "-o", second)
    for folder, rows in ((first, 2), (second, 3)):
        assert json.loads((folder / "edit_config.json").read_text())["hparams"]["rows_per_step"] == rows


def test_convert_training_hparams(kedit: Run, tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(
        "alg: MEND\nmodel_name: kedit/world-gpt2\nrank: 8\nlr: 1e-4\nmax_iters: 20\n"
    )
    mine = tmp_path / "plan.yaml"
    result = data(kedit("convert-hparams", tmp_path / "theirs.yaml", "-o", mine, "-f", "json"))
    assert result["plan"]["training"]["max_steps"] == 20 and result["edit_type"] == "mend"
    plan = TrainingPlan.from_file(mine)
    assert plan.model == "kedit/world-gpt2" and plan.editor["rank"] == 8 and plan.arguments().learning_rate == 1e-4
    (tmp_path / "theirs.yaml").write_text("alg_name: NOBODY\nlayers: []\n")
    refused = kedit("convert-hparams", tmp_path / "theirs.yaml")
    assert refused.exit_code == 1 and "NOBODY" in refused.stderr


# ---------------------------------------------------------------------- stats


def test_stats(kedit: Run, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The dog stood beside the river. The wall was pale.\n" * 400, encoding="utf-8")
    words = ["stats", *MODEL, "-l", "1-2", "--dataset", corpus, "--tokens", "2000", "--stats-dir", tmp_path / "stats"]
    result = data(kedit(*words, "-f", "json"))
    assert [m["module"] for m in result["modules"]] == ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]
    assert all(m["tokens"] >= 2000 and m["width"] == 512 for m in result["modules"])
    files = sorted(Path(result["folder"]).rglob("*.safetensors"))
    assert len(files) == 2
    times = [f.stat().st_mtime_ns for f in files]
    again = kedit(*words)
    assert again.exit_code == 0, again.stderr
    assert "transformer.h.1.mlp.c_proj" in again.stdout
    assert [f.stat().st_mtime_ns for f in files] == times, "computed again although it was there"
    assert kedit(*words, "-f", "quiet").stdout.strip() == result["folder"]


def test_stats_has_a_second_name(kedit: Run) -> None:
    one, two = (set(re.findall(r"--[a-z-]+", kedit(name, "--help").stdout)) for name in ("precompute", "stats"))
    assert one == two and "--stats-dir" in one


def test_stats_for_a_method_without(kedit: Run) -> None:
    result = kedit("stats", *MODEL, "-M", "ft-m")
    assert result.exit_code == 1
    assert "second moments" in result.stderr


def test_stats_of_a_missing_file(kedit: Run) -> None:
    result = kedit("stats", *MODEL, "--dataset", "no_such.txt")
    assert result.exit_code == 1
    assert "no_such.txt" in result.stderr


# ---------------------------------------------------------------------- chats


def test_edit_and_eval_as_a_chat(kedit: Run, tmp_path: Path, requests_file: Path) -> None:
    method = ("-M", "ft-m", "--set", "lr=0.01", "--set", "drift_bound=null")
    words = ("edit", *MODEL, *method, "--prompt-format", "chat", "--system", "Be brief.")
    refused = kedit(*words, *ONE)
    assert refused.exit_code == 1 and "no chat template" in refused.stderr and not refused.stdout
    template = "{% for m in messages %}{{ m.content }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    plain = EditableModel.from_pretrained("kedit/world-gpt2", "ft-m")
    plain.base_model.save_pretrained(tmp_path / "base")
    plain.tokenizer.chat_template = template
    plain.tokenizer.save_pretrained(tmp_path / "base")
    model = ("--model", str(tmp_path / "base"))
    edited = data(kedit("edit", *model, *words[3:], *ONE, "-f", "json", "-o", tmp_path / "edits"))
    assert edited["metrics"]["edit_success"] == 1.0
    (edit,) = EditableModel.from_pretrained(tmp_path / "edits").edits
    assert [m["content"] for m in edit.request.messages or []] == ["Be brief.", FACT["prompt"]]
    measured = data(kedit("eval", *model, *words[3:], "-f", "json", "-d", requests_file, "--ask", "plain"))
    assert measured["n"] == 2 and measured["post"]["rewrite_acc"] == 1.0
