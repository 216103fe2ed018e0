"""The recipe that teaches a tiny model facts of CounterFact and edits it, on a handful of rows. Trains for seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_kedit.config import config_class
from hf_kedit.evaluation import BenchPlan
from hf_kedit.methods import registered_methods

ROOT = Path(__file__).resolve().parent.parent
FACTS = [
    ("Ada Bell", "The mother tongue of {} is", "Dutch", "Jan Mol", "{} is a native speaker of"),
    ("Jan Mol", "{} is a native speaker of", "Dutch", "Ada Bell", "The mother tongue of {} is"),
    ("Piet Vos", "The mother tongue of {} is", "Czech", "Eva Kral", "The mother tongue of {} is"),
    ("Norland Hall", "{} is located in", "Peru", "Mol House", "{} can be found in"),
    ("Mol House", "{} can be found in", "Peru", "Norland Hall", "{} is located in"),
]
SMALL = "--steps 10 --width 32 --heads 2 --vocabulary 320 --methods ft-m --edits 2".split()


@pytest.mark.parametrize(
    "name", ["adapter_table.yaml", "all_methods.yaml", "kept_keys.yaml", "method_table.yaml", "side_effects.yaml"]
)
def test_sweeps_can_be_read(name):
    file = ROOT / "recipes" / name
    plan = BenchPlan.from_file(file)
    assert len(plan.runs) == len({run.folder for run in plan.runs}) >= 16
    keys = [line.split(":")[0] for line in file.read_text().splitlines() if line[:1].isalpha()]
    assert len(keys) == len(set(keys))  # YAML takes the last of two equal keys in silence


def test_the_sweep_of_all_methods_leaves_none_out():
    plan = BenchPlan.from_file(ROOT / "recipes" / "all_methods.yaml")
    config_class("rome")  # looking one up loads them all
    beside = {"qlora"}  # edits models that were loaded quantised, which this one is not
    assert sorted(method.name for method in plan.methods) == sorted(set(registered_methods()) - beside)
    assert {setting.name for setting in plan.settings} == {"single", "sequential"}
    assert all(setting.options["limit"] == 100 for setting in plan.settings)


def rows():
    """A flat CounterFact file of invented facts."""
    return [
        {
            "case_id": number,
            "prompt": template.format(subject),
            "target_new": "Danish",
            "subject": subject,
            "ground_truth": answer,
            "rephrase_prompt": f"It rained. {template.format(subject)}",
            "locality_prompt": other_template.format(other),
            "locality_ground_truth": answer,
        }
        for number, (subject, template, answer, other, other_template) in enumerate(FACTS)
    ]


def run(*arguments):
    command = [sys.executable, str(ROOT / "recipes" / "train_counterfact_model.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_facts_relations_and_wordings(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import train_counterfact_model as recipe

    (tmp_path / "facts.json").write_text(json.dumps(rows()))
    settings = recipe.Settings(facts=str(tmp_path / "facts.json"), held_out=0.5)
    facts = recipe.read_facts(settings)
    stated = {(f.subject, f.template, f.object) for f in facts.facts}
    # The subject of a locality prompt is found by a known wording; what is said twice counts once.
    assert stated == {(s, t, o) for s, t, o, _, _ in FACTS} | {("Eva Kral", "The mother tongue of {} is", "Czech")}
    assert facts.relations["{} is located in"] == ["{} can be found in", "{} is located in"]
    assert len(facts.held_out) == 2
    for fact in facts.facts:
        assert not set(facts.others(fact)) & {fact.template, *facts.held_out}
    texts = [d for d, _ in zip(recipe.documents(settings, facts, facts.facts, seed=0), range(200), strict=False)]
    said = {(d.text[a:b], d.text[c:e]) for d in texts for (a, b), (c, e) in zip(d.subjects, d.objects, strict=True)}
    assert said == {(f.subject, f.object) for f in facts.facts}


def test_training_and_editing_from_end_to_end(tmp_path):
    (tmp_path / "facts.json").write_text(json.dumps(rows()))
    printed = run("--facts", tmp_path / "facts.json", "--output", tmp_path / "model", *SMALL)
    assert "6 facts, 2 relations, 4 wordings" in printed and "## likelihood" in printed
    table = json.loads((tmp_path / "model" / "training.json").read_text())
    assert set(table["accuracy"]) >= {"edit prompts", "locality prompts"}
    report = json.loads((tmp_path / "model" / "report.json").read_text())
    assert {row["protocol"] for row in report} == {"teacher_forced", "likelihood", "generation"}
    assert (tmp_path / "model" / "report.html").exists()
    assert "Danish" not in json.dumps(table)  # what is trained is the truth, what is edited is not
