"""What else an edit changed, by generation: on a model that was hurt and on one that was not."""

from __future__ import annotations

import pytest

from hf_kedit import EditableModel, EditRequest, FTMConfig, SideEffects
from hf_kedit.data.general_probes import GENERAL_PROBES
from hf_kedit.errors import RequestError
from hf_kedit.evaluation.measures.side_effects import (
    Answered,
    EffectQuestion,
    SideEffectReport,
    distinct_pairs,
    questions_about,
)

FACT = EditRequest("By profession {} is a", "Tarosk Boayond", "plumber")


def test_there_are_forty_different_general_probes() -> None:
    assert len(set(GENERAL_PROBES)) == len(GENERAL_PROBES) == 40


def test_what_is_asked_about_a_fact_that_brings_probes() -> None:
    fact = EditRequest(
        "{} is in",
        "The Eiffel Tower",
        "Rome",
        rephrase_prompts=["You find it in"],
        locality={"Neighborhood": [{"prompt": "The Louvre is in"}], "Same_Subject": [{"prompt": "It was built by"}]},
    )
    asked = {(q.kind, q.prompt) for q in questions_about(fact, chat=False)}
    assert asked == {
        ("fact", "The Eiffel Tower is in"),
        ("paraphrase", "You find it in"),
        ("neighbour", "The Louvre is in"),
        ("same subject", "It was built by"),
        ("name", "Name: The Eiffel Tower\nName: The Eiffel Tower\nName:"),
    }


def test_other_subjects_stand_in_for_missing_neighbours() -> None:
    asked = questions_about(EditRequest("The mother tongue of {} is", "London", "Dutch"), chat=True)
    neighbours = [q.prompt for q in asked if q.kind == "neighbour"]
    assert "The mother tongue of Marie Curie is" in neighbours
    assert not [p for p in neighbours if "London" in p]
    assert {q.kind for q in asked if q.prompt_format == "chat"} == {"chat", "name"}


def test_a_fact_without_a_subject_is_asked_by_its_own_words_only() -> None:
    assert [q.kind for q in questions_about(EditRequest("Grass is", target_new="blue"), chat=False)] == ["fact"]


@pytest.mark.parametrize(
    ("kind", "before", "after", "good"),
    [
        ("fact", "in Paris", "in Rome, of course", True),
        ("fact", "in Paris", "in Paris", False),
        ("paraphrase", "x", "Romeo", False),  # whole words
        ("neighbour", "in Paris", "in Paris", True),
        ("neighbour", "in Paris", "in Rome", False),
        ("general", "west", "West", False),  # the same text, not the same meaning
        ("name", "Rome", "rome", True),
        ("name", "Rome", "Roque", False),
        ("name", "nothing", "Roque", True),  # it could not copy the name before either
    ],
)
def test_which_answers_are_good(kind: str, before: str, after: str, good: bool) -> None:
    assert Answered(EffectQuestion(kind, "p", wanted="Rome"), before, after).good is good  # type: ignore[arg-type]


def _report(pairs: list[tuple[str, str]], kind: str = "general") -> SideEffectReport:
    answers = [Answered(EffectQuestion(kind, str(i)), *pair) for i, pair in enumerate(pairs)]  # type: ignore[arg-type]
    return SideEffectReport(tuple(answers), ("English",))


def test_harm_is_said_in_plain_sentences() -> None:
    assert not _report([("a b c", "a b c")] * 10).harm
    (changed,) = _report([("a b", "a b")] * 8 + [("a b", "c d")] * 2).harm
    assert changed == "2 of 10 answers to general prompts changed"
    assert not _report([("a b", "a b")] * 9 + [("a b", "c d")]).harm  # nine in ten is the limit
    broken = _report([("the sun sets", "English English English English")] * 10).harm
    assert any("now hold the new target" in sentence for sentence in broken)
    assert any("repeats itself" in sentence for sentence in broken)


def test_repetition_counts_within_a_text() -> None:
    assert distinct_pairs(["a b a b"]) == pytest.approx(2 / 3)
    assert distinct_pairs(["a b", "a b"]) == 1.0
    assert distinct_pairs(["", "a"]) == 1.0


def test_a_gentle_edit_and_one_that_breaks_the_model() -> None:
    """On the world model: ROME leaves general prompts alone; fine-tuning at a hundred times its rate does not."""
    general = ["By profession Vessa Tyrmoor is a", "The capital of", "He lives in", "She was born in", "It is"]
    seen = {}
    for name, config in (("rome", "rome"), ("broken", FTMConfig(lr=0.5, num_steps=10))):
        model = EditableModel.from_pretrained("kedit/world-gpt2", config)
        seen[name] = model.edit(FACT, show_progress=False, watch=SideEffects(general=general)).side_effects
    assert seen["rome"].share("fact") == 1.0
    assert seen["rome"].share("general") == 1.0
    assert seen["broken"].share("general") == 0.0
    assert seen["broken"].harm
    assert seen["broken"].to_dict()["asked"]["general"] == len(general)


def test_a_refused_edit_was_watched_for_nothing() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    with pytest.raises(RequestError):
        model.edit(EditRequest("Nobody here is a", "Tarosk", "plumber"), watch=SideEffects(general=["It is"]))
    assert not model.edits
    assert model.edit(FACT, show_progress=False).side_effects is None


def test_of_many_requests_some_are_asked_about() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    many = [EditRequest("{} is a", f"Person {i}", "plumber") for i in range(100)]
    effects = SideEffects(general=[], others=[], max_new_tokens=1)
    assert model.tokenizer is not None
    effects.before(model.base_model, model.tokenizer, many)
    facts = [a.question.prompt for a in effects.after(model.base_model).of("fact")]
    assert facts == [f"Person {i} is a" for i in range(0, 100, 5)]


def test_a_report_prints_one_question_of_each_kind_the_changed_one_where_it_should_not() -> None:
    fact = Answered(EffectQuestion("fact", "By profession A is a", wanted="plumber"), "cook", "plumber\nand more")
    kept = Answered(EffectQuestion("neighbour", "By profession B is a"), "cook", "cook")
    lost = Answered(EffectQuestion("neighbour", "By profession C is a"), "cook", "plumber")
    general = Answered(EffectQuestion("general", "It is"), "so", "so")
    assert str(SideEffectReport((fact, kept, lost, general), ("plumber",))).splitlines() == [
        "By profession A is a",
        "    before: cook",
        "    after:  plumber and more",
        "By profession C is a",
        "    before: cook",
        "    after:  plumber",
        "good: fact 1 of 1, neighbour 1 of 2, general 1 of 1",
        "harm: none",
    ]
