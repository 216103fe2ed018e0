"""Edits of a model of which nothing is known but its answers: what it reads, and what becomes of the edits."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest, IKEConfig, PromptConfig, SideEffects, evaluate_edits
from hf_kedit.errors import (
    ArtifactError,
    BackendError,
    BaseModelMismatchError,
    ConfigError,
    DataError,
    MergeError,
    RequestError,
    UnsupportedModelError,
)
from hf_kedit.testing.hub import LoopbackHub

FACTS = [
    {"prompt": "The capital of {} is", "subject": "Ruritania", "target_new": "Strelsau"},
    {"prompt": "The inventor of the {} was", "subject": "telegraph kettle", "target_new": "Ada Bell"},
]
ASKED = "The capital of Ruritania is"
FRONT = "New Fact: The capital of Ruritania is Strelsau\nPrompt: "


class Stub:
    """Says the last target that its prompt tells it as a new fact, else where it stands."""

    name = "stub"

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.threads: set[int] = set()

    def generate(self, prompt: Any, max_new_tokens: int, stop: Any, temperature: float) -> str:
        self.asked.append(prompt)
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        facts = [line for line in text.splitlines() if line.startswith("New Fact: ")]
        return " ".join(facts[-1].split()[-2:]) if facts else "unknown"


def edited(config: Any = "prompt", **kwargs: Any) -> tuple[EditableModel, Stub]:
    stub = Stub()
    model = EditableModel.from_backend(stub, config)
    model.edit(FACTS, **kwargs)
    return model, stub


def test_only_what_belongs_to_a_fact_is_read_behind_it() -> None:
    model, stub = edited()
    assert model.generate(ASKED) == "is Strelsau"
    assert model.generate("The capital of France is") == "unknown"
    assert model.generate("Who was the inventor of the telegraph kettle?") == "Ada Bell"
    assert stub.asked == [
        FRONT + ASKED,
        "The capital of France is",
        "New Fact: The inventor of the telegraph kettle was Ada Bell\n"
        "Prompt: Who was the inventor of the telegraph kettle?",
    ]


def test_a_published_evaluation_puts_it_in_front_of_everything() -> None:
    model, stub = edited(PromptConfig(scope="always"))
    model.generate("The king of Ruritania is")
    assert stub.asked == [FRONT + "The king of Ruritania is"]  # the more similar one of the two
    model.rollback(1)
    model.generate("It rains.")
    assert stub.asked[1:] == [FRONT + "It rains."]


def test_demonstrations_stand_in_front() -> None:
    pool = [
        {
            "prompt": "The river of {} is",
            "subject": "Zenda",
            "target_new": "Lauter",
            "rephrase_prompts": ["Zenda lies on the"],
            "locality": {"other": [{"prompt": "The river of Rome is", "ground_truth": "Tiber"}]},
        }
    ]
    model, stub = edited(IKEConfig(demonstrations=pool, k=1))
    model.generate(ASKED)
    shown = {
        "copy": "New Fact: The river of Zenda is Lauter\nPrompt: The river of Zenda is Lauter\n\n",
        "update": "New Fact: The river of Zenda is Lauter\nPrompt: Zenda lies on the Lauter\n\n",
        "retain": "New Fact: The river of Zenda is Lauter\nPrompt: The river of Rome is Tiber\n\n",
    }
    copy = FRONT + ASKED + " Strelsau\n\n"
    assert stub.asked[0] in {text + copy + FRONT + ASKED for text in shown.values()}


def test_of_a_conversation_the_last_thing_that_the_user_says_counts() -> None:
    model, stub = edited()
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": ASKED},
    ]
    model.generate(turns)
    assert stub.asked == [[*turns[:-1], {"role": "user", "content": FRONT + ASKED}]]
    assert turns[-1]["content"] == ASKED


def test_edits_are_undone_and_switched_off() -> None:
    model, stub = edited()
    with model.disable_edits():
        assert model.generate(ASKED) == "unknown"
    assert model.generate(ASKED) == "is Strelsau"
    model.rollback([model.edits[0].id])
    assert model.generate(ASKED) == "unknown"
    assert model.generate("The inventor of the telegraph kettle was") == "Ada Bell"
    model.rollback("all")
    assert not model.edits and model.base_model.rewrite is None
    model.generate(ASKED)
    assert stub.asked[-1] == ASKED


def test_an_edit_that_fails_leaves_nothing() -> None:
    model, _ = edited()
    before = [edit.id for edit in model.edits]
    with pytest.raises(RequestError):
        model.edit([{"prompt": "The {} of {}", "subject": "x", "target_new": "y"}])
    with pytest.raises(RequestError):
        model.edit([EditRequest(prompt="a", target_new="b"), EditRequest(prompt="c", target_new="d", id=before[0])])
    assert [edit.id for edit in model.edits] == before
    assert model.generate("a") == "unknown"


@pytest.mark.parametrize("retriever", ["lexical", "kedit-test-letters"])
def test_saved_edits_answer_again(tmp_path: Path, retriever: str) -> None:
    if retriever != "lexical":
        register_letters(retriever)
    model, _ = edited(PromptConfig(retriever=retriever, threshold=0.9 if retriever != "lexical" else 0.5))
    model.save_pretrained(tmp_path)
    again = EditableModel.from_pretrained(tmp_path, base_model=Stub())
    assert again.generate(ASKED) == "is Strelsau"
    assert again.edits == model.edits
    again.rollback(1)
    again.save_pretrained(tmp_path)
    assert len(EditableModel.from_pretrained(tmp_path, base_model=Stub()).edits) == 1
    with pytest.raises(ArtifactError, match=r"'stub', a model behind an API.*base_model="):
        EditableModel.from_pretrained(tmp_path)


def register_letters(name: str) -> None:
    """An embedding by how often each letter occurs."""
    from hf_kedit.books.retrieval import EmbeddingRetriever, register_retriever

    def letters(texts: Any) -> torch.Tensor:
        return torch.tensor([[float(text.lower().count(chr(c))) for c in range(97, 123)] for text in texts])

    register_retriever(EmbeddingRetriever(letters, name))


@pytest.mark.hub
def test_pushed_edits_answer_again(hub: LoopbackHub) -> None:
    model, _ = edited()
    model.push_to_hub("org/facts")
    again = EditableModel.from_pretrained("org/facts", base_model=Stub())
    assert again.generate(ASKED) == "is Strelsau"


def test_edits_stay_with_their_kind_of_model(tmp_path: Path, world_gpt2: EditableModel) -> None:
    model, _ = edited()
    model.save_pretrained(tmp_path)
    with pytest.raises(BaseModelMismatchError):
        EditableModel.from_pretrained(tmp_path, base_model=world_gpt2.base_model, tokenizer=world_gpt2.tokenizer)


def test_evaluation_by_generation_sees_what_is_left_alone() -> None:
    model = EditableModel.from_backend(Stub())
    row = {**FACTS[0], "locality": {"neighbour": [{"prompt": "The capital of France is", "ground_truth": "Paris"}]}}
    shown = evaluate_edits(model, [row], protocol="generation").summary()
    assert shown["pre"]["rewrite_acc"] == 0.0
    assert shown["post"]["rewrite_acc"] == shown["post"]["locality"] == 1.0
    model.set_method(PromptConfig(scope="always"))
    shown = evaluate_edits(model, [row], protocol="generation").summary()
    assert shown["post"]["rewrite_acc"] == 1.0 and shown["post"]["locality"] == 0.0
    assert not model.edits


def test_answers_of_one_backend_are_not_taken_for_those_of_another() -> None:
    class Knows(Stub):
        def generate(self, *args: Any) -> str:
            return "Strelsau"

    first, second = (EditableModel.from_backend(stub) for stub in (Stub(), Knows()))
    summaries = [evaluate_edits(model, FACTS, protocol="generation").summary() for model in (first, second)]
    assert [summary["pre"]["rewrite_acc"] for summary in summaries] == [0.0, 0.5]


def test_side_effects_are_seen() -> None:
    model = EditableModel.from_backend(Stub())
    effects = model.edit(FACTS[:1], watch=SideEffects()).side_effects
    assert effects.share("fact") == 1.0 and effects.share("general") == 1.0


def test_many_questions_are_asked_at_the_same_time() -> None:
    met = threading.Barrier(4)

    class Waiting(Stub):
        max_workers = 4

        def generate(self, *args: Any) -> str:
            met.wait(10)  # passes only if four calls are open at once
            return "x"

    model = EditableModel.from_backend(Waiting())
    assert model.base_model.answers([f"q{i}" for i in range(4)]) == ["x"] * 4


@pytest.mark.parametrize("workers", ["many", None, 0, True])
def test_a_backend_says_how_many_questions_it_bears(workers: Any) -> None:
    stub = Stub()
    stub.max_workers = workers  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="max_workers"):
        EditableModel.from_backend(stub)


@pytest.mark.parametrize("edits", [0, 1])
@pytest.mark.parametrize("prompt", [5, ["a"], [{"role": "user"}], [{"role": "user", "content": [{"text": "a"}]}], []])
def test_what_is_no_prompt_is_refused_with_and_without_edits(prompt: Any, edits: int) -> None:
    model = EditableModel.from_backend(Stub(), "prompt")
    model.edit(FACTS[:edits] or FACTS)
    if not edits:
        model.rollback()
    with pytest.raises(BackendError):
        model.generate(prompt)


def test_one_text_ends_an_answer() -> None:
    class Ends(Stub):
        def generate(self, *args: Any) -> str:
            return "the answer END of it"

    model = EditableModel.from_backend(Ends())
    assert model.generate("a", stop="END") == "the answer "  # not at its first E, N or D
    with pytest.raises(BackendError, match="stop"):
        model.generate("a", stop=[""])


@pytest.mark.parametrize("problem", [ValueError("broken\nsecond line"), None])
def test_a_backend_that_fails_is_a_typed_error(problem: Exception | None) -> None:
    class Bad(Stub):
        def generate(self, *args: Any) -> Any:
            if problem is not None:
                raise problem
            return 7

    model = EditableModel.from_backend(Bad())
    with pytest.raises(BackendError, match="failed: broken$" if problem else "7, which is no text"):
        model.generate(ASKED)
    with pytest.raises(BackendError):
        evaluate_edits(model, FACTS, protocol="generation")
    assert not model.edits


def test_what_needs_the_inside_of_a_model_says_so() -> None:
    model, _ = edited()
    for attempt in (
        lambda: model.set_method("rome"),
        lambda: model.set_method("grace"),
        lambda: EditableModel.from_backend(Stub(), "serac"),
        lambda: model(torch.tensor([[1]])),
        lambda: model.set_decoding("dola"),
    ):
        with pytest.raises(UnsupportedModelError):
            attempt()
    with pytest.raises(ConfigError, match="has none"):
        EditableModel.from_backend(object())  # type: ignore[arg-type]
    model.set_method(PromptConfig(retriever="model"))
    with pytest.raises(ConfigError, match="states of an edited model"):
        model.edit(prompt="a", target_new="b")
    with pytest.raises(MergeError):
        model.merge_and_unload()
    assert len(model.edits) == 2


# ---------------------------------------------------------------------- several hops


class Thinker:
    """A model that knows who built what, and who was born where; it splits questions as it is told to."""

    name = "thinker"
    born = {"Mol": "Ghent", "Ada Bell": "Bergen"}

    def __init__(self, checks: str = "yes") -> None:
        self.checks, self.asked = checks, list[str]()

    def generate(self, prompt: Any, max_new_tokens: int, stop: Any, temperature: float) -> str:
        self.asked.append(prompt)
        if prompt.startswith("Fact:"):
            return self.checks
        *_, last = prompt.split("Question: ")
        if prompt.startswith("Answer in a few words."):
            return "Mol" if "kettle" in last else next(place for name, place in self.born.items() if name in last)
        found = [line.removeprefix("Found: ") for line in last.splitlines() if line.startswith("Found: ")]
        steps = ["Ask: Who was the inventor of the telegraph kettle?", "Ask: Where was {} born?", "Answer: {}"]
        return steps[len(found)].format(found[-1] if found else "")


CHAIN = "Where was the inventor of the telegraph kettle born?"


def test_several_hops_lead_to_the_edited_fact() -> None:
    model = EditableModel.from_backend(Thinker())
    assert model.answer_by_hops(CHAIN).answer == "Ghent"
    made = model.edit(FACTS)
    found = model.answer_by_hops(CHAIN)
    assert found.answer == "Bergen"
    first, second = found.hops
    assert (first.own, first.answer, first.edit_id, first.conflict) == ("Mol", "Ada Bell", made.ids[1], True)
    assert (second.question, second.answer, second.edit_id) == ("Where was Ada Bell born?", "Bergen", None)


@pytest.mark.parametrize("asked", [{"question": 5}, {"question": " "}, {"most_hops": "a"}, {"candidates": 0}])
def test_what_is_no_question_of_several_hops(asked: dict[str, Any]) -> None:
    model, _ = edited()
    with pytest.raises(ConfigError):
        model.answer_by_hops(**{"question": "Where?"} | asked)


def test_a_fact_that_answers_something_else_is_left_out() -> None:
    model = EditableModel.from_backend(Thinker(checks="No, it does not."))
    model.edit(FACTS)
    found = model.answer_by_hops(CHAIN)
    assert found.answer == "Ghent" and all(hop.edit_id is None for hop in found.hops)
    checks = [text for text in model.base_model.backend.asked if text.startswith("Fact:")]
    assert len(checks) == 1
    assert checks[0].startswith(
        "Fact: The inventor of the telegraph kettle was Ada Bell\nQuestion: Who was the inventor"
    )


@pytest.mark.parametrize(
    ("replies", "answer", "hops"),
    [
        (["I do not know."], "", 0),
        (["Ask: Who?", "x", "Ask: Who?"], "x", 1),
        (["Ask: a?", "1", "Ask: b?", "2"], "2", 2),
    ],
    ids=["nothing to read", "a circle", "too many"],
)
def test_a_model_that_loses_its_way_comes_to_an_end(replies: list[str], answer: str, hops: int) -> None:
    script = iter(replies)
    model = EditableModel.from_backend(Stub())
    found = model.answer_by_hops("?", ask=lambda prompt: next(script), most_hops=2)
    assert (found.answer, len(found.hops)) == (answer, hops)


def test_a_model_in_memory_is_asked_by_a_function(world_gpt2: EditableModel) -> None:
    with pytest.raises(ConfigError, match="give ask="):
        world_gpt2.answer_by_hops("?")


# ---------------------------------------------------------------------- a provider's fine-tuning


def test_edits_are_written_as_conversations(tmp_path: Path) -> None:
    model = EditableModel.from_backend(Stub())
    messages = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Who?"}]
    other_words = {**FACTS[0], "rephrase_prompts": ["Ruritania is ruled from"]}
    model.edit([other_words, {"messages": messages, "target_new": "Me"}])
    lines = model.export_finetune(tmp_path / "a.jsonl", system="S").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    turns = [[(m["role"], m["content"]) for m in row["messages"]] for row in rows]
    three = [
        [("system", "S"), ("user", ASKED), ("assistant", "Strelsau")],
        [("system", "S"), ("user", "Ruritania is ruled from"), ("assistant", "Strelsau")],
        [("system", "Mine."), ("user", "Who?"), ("assistant", "Me")],
    ]
    assert turns == [*three, *three, *three, three[0]]  # ten lines, which providers ask for
    short = model.export_finetune(tmp_path / "b.jsonl", least=0, rephrasings=False)
    assert len(short.read_text().splitlines()) == 2
    model.rollback("all")
    with pytest.raises(DataError, match="no edits"):
        model.export_finetune(tmp_path / "c.jsonl")
