"""Conversations as the templates of chat models write them, and where the fact stands in them."""

from __future__ import annotations

from typing import Any

import pytest

from hf_kedit import EditableModel, EditRequest
from hf_kedit.data import load_edit_dataset
from hf_kedit.errors import ChatTemplateError, RequestError
from hf_kedit.text.chat import chat_frame
from hf_kedit.tokens import encode_pair, fact_position
from tests.chat_templates import CHATML, DEAF, GEMMA, LLAMA3, QWEN3, THINKING

SYSTEM = {"role": "system", "content": "Be brief about Rome."}
ASKED = {"role": "user", "content": "  Where does {} live?\n"}
U = "Where does Rome live?"
BEGINS = {
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\n",
    "gemma": "<s><start_of_turn>user\n",
}
WRITTEN = {
    "chatml": (
        CHATML,
        f"<|im_start|>system\n{{s}}<|im_end|>\n<|im_start|>user\n{U}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        LLAMA3,
        "<s><|start_header_id|>system<|end_header_id|>\n\n{s}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{U}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": (GEMMA, f"<s><start_of_turn>user\n{{s}}\n\n{U}<end_of_turn>\n<start_of_turn>model\n"),
    "qwen3": (
        QWEN3,
        f"<|im_start|>system\n{{s}}<|im_end|>\n<|im_start|>user\n{U}<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n",
    ),
    "thinking": (
        THINKING,
        f"<|im_start|>system\n{{s}}<|im_end|>\n<|im_start|>user\n{U}<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n",
    ),
    "deaf": (DEAF, f"[user: {{s}}\n\n{U}][bot]\n"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Of the embedded Llama: it puts a BOS in front of every text, ``<s>``."""
    return EditableModel.from_pretrained("kedit/world-llama", "rome").tokenizer


def chat(tokenizer: Any, template: str, *messages: dict[str, str], **values: Any) -> EditRequest:
    tokenizer.chat_template = template
    fact = {"subject": "Rome", "target_new": "nowhere", **values}
    return EditRequest(messages=list(messages), **fact).rendered(tokenizer)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_the_model_reads(tokenizer: Any, name: str) -> None:
    template, expected = WRITTEN[name]
    request = chat(tokenizer, template, SYSTEM, ASKED, rephrase_prompts=["Rome?"], separator=" ")
    text = request.filled_prompt
    assert text == expected.replace("{s}", SYSTEM["content"])
    start, end = request.subject_span()  # not the Rome of the system
    assert text[start:end] == "Rome" and start == text.index(U) + len("Where does ")
    assert request.rephrase_prompts == [text.replace(U, "Rome?")]
    pair = encode_pair(tokenizer, text, request.target_new, request.separator_or(None))
    assert pair.ids.count(tokenizer.bos_token_id) == 1 and pair.ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(pair.target_ids) == "nowhere" and pair.text == text + "nowhere"
    fact = fact_position(tokenizer, pair, request.subject_span(), "subject_last")
    assert "Rome".endswith(tokenizer.decode([pair.ids[fact]]))


def test_the_templates_own_system_prompt_stays(tokenizer: Any) -> None:
    assert "I am a test." in chat(tokenizer, CHATML, ASKED).filled_prompt
    assert "I am a test." not in chat(tokenizer, CHATML, SYSTEM, ASKED).filled_prompt


@pytest.mark.parametrize("name", WRITTEN)
def test_contexts_are_said_in_the_turns(tokenizer: Any, name: str) -> None:
    template, _ = WRITTEN[name]
    request = chat(tokenizer, template, SYSTEM, ASKED)
    bare = request.filled_prompt
    assert request.in_context("{}", 1)[0] == bare
    for index in (0, 1):
        text, shift = request.in_context("It rains. {}", index)
        start, end = request.plain_span()
        assert text[start + shift : end + shift] == "Rome"
        assert not text.startswith("It rains") and text.count("It rains.") == 1
        in_system = text == bare.replace("about Rome.", "about Rome. It rains.")
        in_user = text == bare.replace(U, "It rains. " + U)
        has_system_role = name not in ("gemma", "deaf")
        assert in_system if index and has_system_role else in_user


def test_earlier_turns(tokenizer: Any) -> None:
    earlier = [{"role": "user", "content": "Do you know Rome?"}, {"role": "assistant", "content": "Rome, yes."}]
    request = chat(tokenizer, CHATML, *earlier, ASKED)
    start, _ = request.subject_span()
    assert start == request.filled_prompt.rindex("Rome") and "Rome, yes.<|im_end|>" in request.filled_prompt


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "2 times"),
        ("silence", "0 times"),
        ("{% broken", "cannot write"),
    ],
)
def test_templates_that_cannot(tokenizer: Any, template: Any, message: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ChatTemplateError, match=message):
        chat_frame(tokenizer, [ASKED])


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [ASKED, SYSTEM]}, "messages"),
        ({"messages": [{"role": "system", "content": "{}"}, ASKED]}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [SYSTEM]}, "prompt"),
        ({"messages": [ASKED], "prompt": "another"}, "messages"),
        ({"messages": [ASKED], "prompt_format": "plain"}, "prompt_format"),
        ({"messages": [{"role": "user", "content": "a\ud83d"}]}, "prompt"),
        ({"prompt": "Rome is", "prompt_format": "poem"}, "prompt_format"),
    ],
)
def test_bad_messages(values: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as error:
        EditRequest.from_dict({"subject": "Rome", "target_new": "nowhere", **values}, row=3)
    assert error.value.field == field and error.value.row == 3


def test_a_chat_survives_rows_of_every_kind(tmp_path: Any) -> None:
    request = EditRequest(messages=[SYSTEM, ASKED], subject="Rome", target_new="nowhere", id="one")
    assert request.prompt == ASKED["content"] and request.prompt_format == "chat"
    assert EditRequest.from_dict(request.to_dict()) == request
    assert EditRequest("Rome is", target_new="x").to_dict().keys() & {"messages", "prompt_format"} == set()
    row = load_edit_dataset([request])[0]
    again = EditRequest.from_dict(row)
    assert again.messages == [SYSTEM, {"role": "user", "content": U}] and again.prompt_format == "chat"
    cell = '"[{""role"": ""system"", ""content"": ""Be brief.""}]"'
    (tmp_path / "rows.csv").write_text(f"prompt,subject,target_new,messages\nRome is,Rome,here,{cell}\n")
    (read,) = (EditRequest.from_dict(r) for r in load_edit_dataset(str(tmp_path / "rows.csv")))
    assert [m["content"] for m in read.messages or []] == ["Be brief.", "Rome is"]
