"""A text in front of a chat: inside its last user turn, which alone decides which edit a chat belongs to."""

from __future__ import annotations

import pytest
import torch

from hf_kedit import EditableModel
from hf_kedit.books.prefixes import Prefix
from hf_kedit.books.prompting import Prompter
from tests.chat_templates import CHATML, GEMMA, LLAMA3

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>"]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, None])
def test_where_the_text_goes(template: str | None) -> None:
    model = EditableModel.from_pretrained("kedit/world-llama", "prompt")
    tokenizer = model.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    model.base_model.resize_token_embeddings(len(tokenizer))
    question = "Where does Rome live?"
    text = f"Somebody asks. {question}"
    if template is not None:
        tokenizer.chat_template = template
        earlier = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}]
        messages = [*earlier, {"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text.removeprefix("<s>")).input_ids
    asked: list[str] = []

    def router(prompts: list[str]) -> list[None]:
        asked.extend(prompts)
        return [None] * len(prompts)

    prompter = Prompter(model.base_model, lambda: tokenizer, router)  # type: ignore[arg-type]
    row, own = prompter.writer.with_prefix(ids, Prefix("New fact: it moved.\n"), model.base_model, reserve=0)
    assert [row[i] for i in own] == ids
    written = tokenizer.decode(row)
    expected = f"New fact: it moved.\n{question if template else text}"
    assert expected in written and written.replace("New fact: it moved.\n", "") == tokenizer.decode(ids)
    prompter.attach()
    model.base_model(input_ids=torch.tensor([ids]))
    prompter.detach()
    assert asked == [question if template else text]
