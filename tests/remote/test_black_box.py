"""Edits of a model of which nothing is known but its answers: what it reads, and what becomes of the edits."""

from __future__ import annotations

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
