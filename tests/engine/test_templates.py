"""Context templates: seeded, made by the model, harmless in front of a prompt."""

from __future__ import annotations

from hf_kedit import EditableModel
from hf_kedit.engine.templates import cleaned, context_templates


def test_templates_are_reproducible_and_well_formed(world_gpt2: EditableModel) -> None:
    model, tokenizer = world_gpt2.base_model, world_gpt2.tokenizer
    groups = context_templates(model, tokenizer, [(5, 10), (10, 10)], seed=3)
    assert groups[0] == ["{}"] and [len(g) for g in groups] == [1, 10, 10]
    assert all(t.count("{}") == 1 and t.endswith(". {}") and "\n" not in t for g in groups[1:] for t in g)
    assert groups == context_templates(model, tokenizer, [(5, 10), (10, 10)], seed=3)
    assert groups != context_templates(model, tokenizer, [(5, 10), (10, 10)], seed=4)
    assert len(set(groups[2])) > 5


def test_a_length_counts_the_starter(world_llama: EditableModel) -> None:
    tokenizer = world_llama.tokenizer
    (_, group) = context_templates(world_llama.base_model, tokenizer, [(8, 5)])
    for template in group:
        count = len(tokenizer(template.removesuffix(". {}")).input_ids)
        assert abs(count - 8) <= 2, template


def test_generated_braces_and_breaks_are_removed() -> None:
    assert cleaned("a {x}\n\nb\nc ") == "a  x  b c"
