"""Personality: ES, DD, accuracy, TPEI and PAE by hand, and the scenario from a file to a report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest, evaluate_edits
from hf_kedit.data.opinions import conditioned, opinions_of
from hf_kedit.errors import EvaluationError, RequestError
from hf_kedit.evaluation import load_scenario
from hf_kedit.evaluation.asking.generation import Continuation
from hf_kedit.evaluation.scenarios.personality import TraitReplies, marks_of, trait_words

SAMPLE = Path(__file__).parents[3] / "docs" / "scenarios" / "data" / "personality.json"
VARIED = "We meet our old friends there and they tell us many new stories about the long road home."
ROWS = [
    {"ent": topic, "extraversion": [f"I love {topic}!"], "agreeableness": [f"I share {topic}."],
     "neuroticism": [f"I fear {topic}.", f"{topic} is bad."], "target_per": trait}
    for topic, trait in (("tea", "neuroticism"), ("rain", "agreeableness"))
]  # fmt: skip


def said(text: str) -> list[Continuation]:
    return [Continuation("", text, (), True)]


def fixed(*rows: tuple[float, float, float]) -> Any:
    """A classifier that gives these probabilities, one row after the other for each new text."""
    known: dict[str, dict[str, float]] = {}
    left = iter(rows)

    def classify(texts: Any) -> list[dict[str, float]]:
        for text in texts:
            if text not in known:
                known[text] = dict(zip(("extraversion", "agreeableness", "neuroticism"), next(left), strict=True))
        return [known[text] for text in texts]

    return classify


def test_numbers_of_what_is_written_by_hand() -> None:
    classify = fixed((0.2, 0.3, 0.5), (0.1, 0.8, 0.1))
    protocol = TraitReplies(classifier=classify, judge=marks_of(classify))
    texts = {name: value for name, value in ROWS[0].items() if isinstance(value, list)}
    request = EditRequest.from_dict(
        {"prompt": "What do you think of tea?", "subject": "tea", "target_new": "x",
         "metadata": {"extra": {"target_trait": "agreeableness", "texts": texts}}}
    )  # fmt: skip
    (question,) = protocol.questions(request)
    before, after = said(VARIED), said(VARIED + " Then we sing.")
    assert protocol.details(question, before, None) == {("personality", "trait"): 0.0}
    assert protocol.details(question, after, None) == {("personality", "trait"): 1.0}
    changes = protocol.changes(question, before, after)
    assert changes["personality", "tpei"] == pytest.approx(-math.log(0.3) + math.log(0.8))
    assert changes["personality", "pae"] == pytest.approx((1 + 4 * 0.8) - (1 + 4 * 0.3))
    assert changes["personality", "left_out"] == 0.0
    # A text that repeats itself counts for nothing but the share of such cases.
    assert protocol.details(question, said("tea tea tea tea"), None) == {}
    assert protocol.changes(question, before, said("tea tea tea tea")) == {("personality", "left_out"): 1.0}


def test_words_stand_in_for_a_classifier() -> None:
    calm, nervous = trait_words(["The table is made of wood.", "I worry, and I am afraid."])
    assert set(calm.values()) == {1 / 3} and nervous["neuroticism"] == pytest.approx(3 / 5)
    assert sum(nervous.values()) == pytest.approx(1.0)


def test_es_and_dd_against_a_loop(world_gpt2: EditableModel, tmp_path: Path) -> None:
    file = tmp_path / "test.json"
    file.write_text(json.dumps(ROWS))
    tokenizer: Any = world_gpt2.tokenizer

    @torch.no_grad()
    def log_probs(prompt: str, text: str) -> tuple[torch.Tensor, list[int]]:
        """Distributions that predict the tokens of a text, and the tokens."""
        ids = tokenizer(f"{prompt} {text}")["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        return world_gpt2(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1), ids[start:]

    def mean_of(prompt: str, texts: list[str]) -> float:
        values = [rows[range(len(ids)), ids] for rows, ids in (log_probs(prompt, text) for text in texts)]
        return float(torch.cat(values).mean())

    ask = "What do you think of {}?".format
    tea, rain = ROWS
    wanted = tea["neuroticism"]
    others = [*tea["extraversion"], *tea["agreeableness"]]
    elsewhere = [*rain["agreeableness"], *rain["extraversion"], *rain["neuroticism"]]
    c = mean_of(ask("tea"), wanted)
    plain = [log_probs(ask("rain"), text)[0] for text in elsewhere]
    found: list[tuple[float, float]] = []

    def measure(step: Any) -> None:
        if not found:  # the first case is about tea
            a, b = mean_of(ask("tea"), wanted), mean_of(ask("tea"), others)
            moved = [log_probs(ask("rain"), text)[0] for text in elsewhere]
            kls = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(plain, moved, strict=True)]
            found.append((min(1.0, math.exp(a - c)) / (1 + math.exp(b - a)), sum(kls) / len(kls)))

    report = evaluate_edits(world_gpt2, file, scenario="personality", progress=False, after_step=measure)
    first = next(case for case in report.chosen("opinions") if case.number == 0)
    assert first.post.numbers["personality"]["ES"] == [pytest.approx(found[0][0], rel=1e-3)]
    moved = next(case for case in report.chosen("drawdown") if case.number == 0).post.numbers["personality"]["DD"]
    assert sum(moved) / len(moved) == pytest.approx(found[0][1], rel=0.02) and len(moved) == len(elsewhere)
    assert len(world_gpt2.edits) == 0


def test_a_model_that_is_not_edited_has_moved_nothing(world_gpt2: EditableModel, tmp_path: Path) -> None:
    file = tmp_path / "test.json"
    file.write_text(json.dumps(ROWS))
    scenario = load_scenario("personality")
    rows = scenario.read(file).remove_columns("id")
    request, _ = scenario.requests([EditRequest.from_dict(dict(row)) for row in rows])
    opinions, drawdown, _ = scenario.protocols()
    base, tokenizer = world_gpt2.base_model, world_gpt2.tokenizer
    (question,) = opinions.questions(request)
    outputs = opinions.run(base, tokenizer, opinions.queries(question), None, 1000)  # type: ignore[arg-type]
    (value,) = opinions.changes(question, outputs, outputs).values()
    # Nothing was lost, so that the second factor of ES is 1.
    assert value == opinions.details(question, outputs, None)["personality", "preference"]
    question = drawdown.questions(request)[0]
    outputs = drawdown.run(base, tokenizer, drawdown.queries(question), None, 1000)  # type: ignore[arg-type]
    assert drawdown.changes(question, outputs, outputs) == {("personality", "DD"): 0.0}


def test_the_condition_stands_in_front_of_the_edit_only(world_gpt2: EditableModel) -> None:
    scenario = load_scenario("personality", condition=True)
    rows = scenario.read(SAMPLE)
    requests = scenario.requests([EditRequest.from_dict(dict(row)) for row in rows.remove_columns("id")])
    trait, wanted, others = opinions_of(requests[0])
    assert trait == "neuroticism" and len(wanted) == 3 and len(others) == 6 and len(requests) == 6
    assert requests[0].prompt.startswith("Target personality: neuroticism\nTopic: chess clubs\nQuestion: ")
    assert requests[0].rephrase_prompts[0] == "What do you think of chess clubs?"
    for protocol in scenario.protocols():
        for question in protocol.questions(requests[0]):
            assert "Target" not in question.prompt
    with pytest.raises(RequestError, match="target_trait"):
        conditioned(EditRequest(prompt="a", target_new="b"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"judge": 3}, "must be a function"),
        ({"classifier": 3}, "classifier cannot be made of 3"),
        ({"classifier": "nowhere/at-all/x"}, "cannot be loaded"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: str, world_gpt2: EditableModel) -> None:
    with pytest.raises(EvaluationError, match=error):
        evaluate_edits(world_gpt2, SAMPLE, scenario=load_scenario("personality", **options))
    assert len(world_gpt2.edits) == 0
