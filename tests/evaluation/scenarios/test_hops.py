"""Multi-hop questions and ripple effects: sets of questions and their published aggregation, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_kedit import EditableModel, EditRequest
from hf_kedit.evaluation import evaluate_edits, load_scenario

SAMPLES = Path(__file__).parents[2] / "data" / "samples"


class Scripted:
    """Answers from a table: before an edit from its first column, behind a new fact from its second."""

    name = "scripted"

    def __init__(self, table: dict[str, tuple[str, str]]):
        self.table = table

    def generate(self, prompt: Any, max_new_tokens: int, stop: Any, temperature: float) -> str:
        edited = prompt.startswith("New Fact: ")
        asked = prompt.rpartition("Prompt: ")[2] if edited else prompt
        question = asked.strip().removesuffix("\nA:").rpartition("Q: ")[2]
        return self.table.get(question, ("?", "?"))[edited]


Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def measure() -> Measure:
    def run(rows: Any, scenario: str, table: dict[str, tuple[str, str]], **options: Any) -> dict[str, Any]:
        from hf_kedit import PromptConfig

        model = EditableModel.from_backend(Scripted(table), PromptConfig(scope="always"))
        return evaluate_edits(model, rows, scenario=load_scenario(scenario, **options), progress=False).summary()

    return run


def multi(name: str, targets: list[str], answers: dict[str, str], hops: dict[str, str]) -> list[EditRequest]:
    """A case of MQuAKE: edits of one subject each, with questions and single hops on the last one."""
    probes = {
        "Multi_Hop": [{"prompt": q, "ground_truth": [[a, f"the {a}"]]} for q, a in answers.items()],
        "Single_Hop": [{"prompt": q, "ground_truth": [[a]]} for q, a in hops.items()],
    }
    rows = []
    for i, target in enumerate(targets):
        last = i == len(targets) - 1
        rows.append(
            EditRequest.from_dict(
                {
                    "prompt": f"{name} {i} is",
                    "target_new": target,
                    "portability": probes if last else {},
                    "group_id": name if len(targets) > 1 else None,
                }
            )
        )
    return rows


def test_a_case_counts_if_one_of_its_questions_is_right(measure: Measure) -> None:
    rows = [
        *multi("a", ["x", "y"], {"a1?": "Rome", "a2?": "Rome", "a3?": "Rome"}, {"h1?": "x", "h2?": "y"}),
        *multi("b", ["z"], {"b1?": "Oslo", "b2?": "Oslo", "b3?": "Oslo"}, {"h3?": "z"}),
        *multi("c", ["u", "v"], {"c1?": "Bern"}, {"h4?": "u", "h5?": "w"}),
    ]
    table = {
        **{"a 0 is": ("q", "x"), "a 1 is": ("q", "y indeed"), "b 0 is": ("z", "z"), "c 0 is": ("q", "u")},
        **{"c 1 is": ("q", "q"), "a2?": ("Paris", "the Rome"), "b1?": ("Oslo", "Oslo or so"), "c1?": ("Bern", "Bern")},
        **{"h1?": ("x", "x"), "h2?": ("q", "y"), "h3?": ("z", "q"), "h4?": ("u", "u"), "h5?": ("w", "q")},
    }
    found = measure(rows, "mquake", table)
    # Right after the edits: of a the second question (an alias), of b none (exact: "Oslo or so"), of c the only one.
    assert found["post"]["mquake"] == {
        "multi_hop": pytest.approx(2 / 3),
        "edit_wise": pytest.approx(4 / 5),  # all but the second one of c
        "instance_wise": pytest.approx(2 / 3),
        "hop_wise": pytest.approx(1 / 3),  # a alone: b lacks its only hop, c one of two
    }
    # Before: b and c by chance; of the edits b's alone; hops: of a one of two, b's, both of c.
    assert found["pre"]["mquake"] == {
        "multi_hop": pytest.approx(2 / 3),
        "edit_wise": pytest.approx(1 / 5),
        "instance_wise": pytest.approx(1 / 3),
        "hop_wise": pytest.approx(2 / 3),
    }
    assert measure(rows, "mquake", table, scorer="contains")["post"]["mquake"]["multi_hop"] == 1.0


def ripple(number: int, tests: list[dict[str, Any]], **axes: list[tuple[str, list[list[str]]]]) -> EditRequest:
    def probes(names: tuple[str, ...]) -> dict[str, Any]:
        return {
            axis: [{"prompt": p, "ground_truth": g, "match": "all"} for p, g in own]
            for axis, own in axes.items()
            if axis in names
        }

    local = ("Relation_Specificity", "Forgetfulness")
    return EditRequest.from_dict(
        {
            "prompt": f"e{number} is",
            "target_new": "new",
            "locality": probes(local),
            "portability": probes(tuple(axis for axis in axes if axis not in local)),
            "extra": {"tests": tests},
        }
    )


def about(name: str, places: list[int], condition: str = "OR", known: dict[str, str] | None = None) -> dict[str, Any]:
    queries = [{"prompt": prompt, "ground_truth": [[answer]]} for prompt, answer in (known or {}).items()]
    return {"name": name, "probes": places, "condition": condition, "condition_queries": queries}


def test_a_test_counts_if_the_unedited_model_knows_what_it_takes_for_granted(measure: Measure) -> None:
    rows = [
        ripple(
            0,
            [
                about("Relation_Specificity", [0]),
                about("Logical_Generalization", [0, 1], "OR", {"k1": "yes"}),
                about("Logical_Generalization", [2, 3], "AND", {"k1": "yes"}),
                about("Logical_Generalization", [4], "OR", {"k1": "yes", "k2": "yes"}),
            ],
            Relation_Specificity=[("s", [["aa"]])],
            Logical_Generalization=[
                ("l0", [["aa"]]),
                ("l1", [["aa", "alias"], ["b"]]),
                *[("l2", [["aa"]]), ("l3", [["aa"]]), ("l4", [["aa"]])],
            ],
        ),
        ripple(1, [about("Logical_Generalization", [0])], Logical_Generalization=[("m", [["aa"]])]),
    ]
    table = {
        **{"e0 is": ("old", "new"), "e1 is": ("old", "old"), "k1": ("yes", "no"), "k2": ("no", "yes")},
        **{"s": ("aa", "aa"), "l0": ("q", "q"), "l1": ("b", "alias and b"), "l2": ("aa", "aa"), "l3": ("aa", "q")},
        **{"l4": ("aa", "aa"), "m": ("aa", "aa")},
    }
    measured = measure(rows, "ripple", table)
    before, found = measured["pre"]["ripple"], measured["post"]["ripple"]
    assert found["edit"] == 0.5
    # First edit: the OR test passes by its second query (both values), the AND test fails, the third is not counted,
    # because the unedited model does not know k2. Second edit: passed. So (1/2 + 1) / 2.
    assert found["Logical_Generalization"] == pytest.approx(0.75)
    assert found["Relation_Specificity"] == 1.0
    assert found["mean"] == pytest.approx((0.75 + 1.0) / 2)
    assert "Forgetfulness" not in found
    # Of the same tests the unedited model passes the other one of the first edit.
    assert before == {
        "edit": 0.0,
        "Logical_Generalization": pytest.approx(0.75),
        "Relation_Specificity": 1.0,
        "mean": pytest.approx((0.75 + 1.0) / 2),
    }


@pytest.mark.parametrize(("name", "file"), [("mquake", "MQuAKE-CF.json"), ("ripple", "random.json")])
def test_the_scenario_runs_from_a_published_file(world_gpt2: EditableModel, name: str, file: str) -> None:
    world_gpt2.set_method("ft-m")
    scenario = load_scenario(name, max_new_tokens=12)
    rows = scenario.read(SAMPLES / {"mquake": "mquake", "ripple": "ripple_edits"}[name] / file)
    report = evaluate_edits(world_gpt2, rows, scenario=scenario, progress=False)
    before, numbers = (report.summary()[half][name] for half in ("pre", "post"))
    key = "edit_wise" if name == "mquake" else "edit"
    assert before[key] <= numbers[key]
    assert set(numbers) >= ({"multi_hop", "instance_wise"} if name == "mquake" else {"mean"})
    assert name in report.to_html()
