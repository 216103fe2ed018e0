"""A chat model reads one fact in two formats: edits of either, and of both."""

from __future__ import annotations

import pytest

from hf_kedit import AutoEditConfig, EditableModel, EditRequest
from hf_kedit.evaluation import generate_answers

pytestmark = pytest.mark.real
SYSTEM = {"role": "system", "content": "Answer with one word."}
QUESTION = {"role": "user", "content": "What is the capital of {}?"}


def test_a_chat_is_edited_under_its_system_prompt(smollm: EditableModel) -> None:
    request = EditRequest(messages=[SYSTEM, QUESTION], subject="France", target_new="Berlin")
    asked = request.rendered(smollm.tokenizer).filled_prompt
    assert asked.startswith("<|im_start|>system\nAnswer with one word.<|im_end|>\n<|im_start|>user\nWhat is")

    def says(prompt: str) -> str:
        return generate_answers(smollm.base_model, smollm.tokenizer, [prompt], 8)[0].text

    before = says(asked)
    assert "Paris" in before
    smollm.set_method(AutoEditConfig.for_method("ft-m"))
    smollm.edit(request, show_progress=False)
    assert says(asked).startswith("Berlin")
    smollm.rollback()
    assert says(asked) == before


def test_one_edit_for_both_formats(smollm: EditableModel) -> None:
    smollm.set_method(AutoEditConfig.for_method("grace", prompt_format="both"))
    request = EditRequest("The capital of {} is", "France", "Berlin")
    smollm.edit(request, show_progress=False)
    chat = request.asked("chat").rendered(smollm.tokenizer)
    answers = generate_answers(smollm.base_model, smollm.tokenizer, [request.filled_prompt, chat.filled_prompt], 4)
    assert all(answer.text.startswith("Berlin") for answer in answers)
