"""auto: edits alone on the untouched model, switched on where a prompt asks for them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from hf_kedit import AutoMethodConfig, EditableModel, EditRequest, PromptConfig
from hf_kedit.books.router import EditRouter, encoder_of_words
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import ArtifactError, ConfigError, EditFailedError, ExportError, MergeError, RequestError
from hf_kedit.methods import auto_memory, locate_then_edit
from hf_kedit.methods.rome import ROME
from hf_kedit.text.relations import COMMON_RELATIONS
from hf_kedit.tokens import pad_rows
from tests.methods.at_sites import facts, learnt, neighbours, prompt_logits, says, without_trace

UNRELATED = ["The weather today is", "Once upon a time", "Q: what is two plus two? A:"]


def config(**values: Any) -> AutoMethodConfig:
    settings = {"v_num_grad_steps": 12, "context_templates": ["{}"]}
    return AutoMethodConfig(
        encoder="words",
        base={"edit_type": "rome", **settings, **values.pop("base", {})},
        **{"states": None, "slack": None, **values},
    )


@pytest.fixture(scope="module")
def wanted() -> list[EditRequest]:
    return facts(5)


@pytest.fixture(scope="module")
def edited(wanted: list[EditRequest]) -> EditableModel:
    model = EditableModel.from_pretrained("kedit/world-llama", config())
    model.edit(wanted, batch_size=1)
    return model


def alone(request: EditRequest) -> EditableModel:
    model = EditableModel.from_pretrained("kedit/world-llama", config())
    model.edit(request)
    return model


def test_the_facts_hold_and_everything_else_is_the_base_bit_for_bit(
    edited: EditableModel, wanted: list[EditRequest]
) -> None:
    assert all(learnt(edited, wanted))
    base = EditableModel.from_pretrained("kedit/world-llama", config())
    assert model_digest(edited.base_model) == model_digest(base.base_model)
    for prompt in [*UNRELATED, *neighbours(wanted)]:
        assert torch.equal(prompt_logits(edited, prompt), prompt_logits(base, prompt)), prompt


def test_an_edit_among_others_is_what_it_is_alone(edited: EditableModel, wanted: list[EditRequest]) -> None:
    for request in wanted[:2]:
        assert torch.equal(
            prompt_logits(edited, request.filled_prompt), prompt_logits(alone(request), request.filled_prompt)
        )


def test_it_is_what_its_base_method_alone_would_have_written(wanted: list[EditRequest]) -> None:
    prompt = wanted[0].filled_prompt
    plain = EditableModel.from_pretrained("kedit/world-llama", config().base_config)
    plain.edit(wanted[0])
    torch.testing.assert_close(
        prompt_logits(alone(wanted[0]), prompt), prompt_logits(plain, prompt), rtol=1e-4, atol=1e-4
    )


def test_rows_of_a_batch_are_decided_one_by_one(edited: EditableModel, wanted: list[EditRequest]) -> None:
    prompts = [UNRELATED[0], wanted[1].filled_prompt, UNRELATED[1], wanted[3].filled_prompt]
    expected = [says(edited, [prompt])[0] for prompt in prompts]
    for options in ({}, {"num_beams": 2}, {"use_cache": False}, {"do_sample": False, "num_return_sequences": 1}):
        said = says(edited, prompts, **options)
        assert said[1].startswith(wanted[1].target_new) and said[3].startswith(wanted[3].target_new), options
    assert says(edited, prompts) == expected

    rows = [edited.tokenizer(p)["input_ids"] for p in prompts]  # type: ignore[misc]
    batch = pad_rows(rows, 0, "left")
    with torch.no_grad():
        together = edited(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        with edited.disable_edits():
            before = edited(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.equal(together[[0, 2]], before[[0, 2]])
    assert not torch.equal(together[1], before[1]) and not torch.equal(together[3], before[3])


@pytest.mark.parametrize("base", ["rome", "memit", "alphaedit"])
def test_edits_of_one_call_share_forwards_and_nothing_else(
    base: str, wanted: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is what it is alone, up to the rounding of batched products."""
    optimised: list[int] = []

    def counting(model: Any, anatomy: Any, rows: Any, *args: Any, **options: Any) -> Any:
        optimised.append(len(rows))
        return optimise_values(model, anatomy, rows, *args, **options)

    optimise_values = locate_then_edit.optimise_values
    monkeypatch.setattr(locate_then_edit, "optimise_values", counting)
    together = EditableModel.from_pretrained("kedit/world-llama", config(base={"edit_type": base}))
    one_by_one = EditableModel.from_pretrained("kedit/world-llama", config(base={"edit_type": base}))
    result = together.edit(wanted[:3])
    assert optimised == [3] and [edit.request.subject for edit in result.edits] == [r.subject for r in wanted[:3]]
    one_by_one.edit(wanted[:3], batch_size=1)
    assert optimised == [3, 1, 1, 1] and all(learnt(together, wanted[:3]))
    for request in wanted[:3]:
        found, expected = (prompt_logits(m, request.filled_prompt) for m in (together, one_by_one))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    together.rollback(result.edits[1].id)
    assert learnt(together, wanted[:3]) == [True, False, True]


def test_a_request_that_fails_costs_the_others_nothing(
    wanted: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    insertion = ROME._insertion

    def fails_for_one(self: ROME, layer: int, values: Any, anatomy: Any) -> Any:
        if values.probability[0][0] == pytest.approx(first, rel=1e-3):
            raise EditFailedError("no")
        return insertion(self, layer, values, anatomy)

    first = alone(wanted[1]).edits[0].diagnostics["target_probability_before"]
    monkeypatch.setattr(ROME, "_insertion", fails_for_one)
    model = EditableModel.from_pretrained("kedit/world-llama", config())
    result = model.edit(wanted[:3], on_error="skip")
    failed = [request.subject for request, _ in result.failed]
    assert failed == [wanted[1].subject] and learnt(model, wanted[:3]) == [True, False, True]


def test_order_and_company_leave_no_trace(edited: EditableModel, wanted: list[EditRequest]) -> None:
    other = EditableModel.from_pretrained("kedit/world-llama", config())
    for request in reversed(wanted[:3]):
        other.edit(request)
    for request in wanted[:3]:
        assert torch.equal(prompt_logits(other, request.filled_prompt), prompt_logits(edited, request.filled_prompt))


def test_rolled_back_is_never_made(wanted: list[EditRequest]) -> None:
    model = EditableModel.from_pretrained("kedit/world-llama", config())
    model.edit(wanted[:3])
    before = prompt_logits(model, wanted[2].filled_prompt)
    model.rollback(model.edits[1].id)
    base = EditableModel.from_pretrained("kedit/world-llama", config())
    assert torch.equal(prompt_logits(model, wanted[1].filled_prompt), prompt_logits(base, wanted[1].filled_prompt))
    assert torch.equal(prompt_logits(model, wanted[2].filled_prompt), before)
    assert learnt(model, wanted[:3]) == [True, False, True]
    model.edit(wanted[1])
    assert all(learnt(model, wanted[:3]))
    model.rollback(3)
    assert without_trace(model)


def test_saved_and_loaded_in_a_fresh_process(
    edited: EditableModel, in_context: EditableModel, wanted: list[EditRequest], tmp_path: Path
) -> None:
    prompts = [wanted[0].filled_prompt, wanted[1].filled_prompt, *UNRELATED]
    for name, model in {"changes": edited, "texts": in_context}.items():
        model.save_pretrained(tmp_path / name)
        torch.save([prompt_logits(model, p) for p in prompts], tmp_path / f"{name}.pt")
    script = (
        "import sys, torch; from hf_kedit import EditableModel\n"
        "folder, prompts = sys.argv[1], sys.argv[2:]\n"
        "def logits(model):\n"
        "    ids = [model.tokenizer(p, return_tensors='pt')['input_ids'] for p in prompts]\n"
        "    with torch.no_grad():\n"
        "        return [model(input_ids=i).logits for i in ids]\n"
        "for name in ('changes', 'texts'):\n"
        "    model = EditableModel.from_pretrained(f'{folder}/{name}')\n"
        "    saved = torch.load(f'{folder}/{name}.pt')\n"
        "    assert all(torch.equal(l, s) for l, s in zip(logits(model), saved)), name\n"
        "    model.rollback(model.edits[0].id)\n"
        "    assert model.explain(prompts[0]) == []\n"
        "    first, second, *others = logits(model)\n"
        "    with model.disable_edits():\n"
        "        assert torch.equal(first, logits(model)[0]) and not torch.equal(first, saved[0])\n"
        "    assert all(torch.equal(l, s) for l, s in zip([second, *others], saved[1:]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path), *prompts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_explain(edited: EditableModel, wanted: list[EditRequest]) -> None:
    (found,) = edited.explain(wanted[0].filled_prompt)
    assert found.claimed and found.edit_id == edited.edits[0].id and found.similarity == pytest.approx(1.0, abs=1e-5)
    assert found.asked.split().count("it") == 1
    assert edited.explain(UNRELATED[0]) == []


def test_a_prompt_without_ids_gets_the_base_and_a_word(
    wanted: list[EditRequest], caplog: pytest.LogCaptureFixture
) -> None:
    model = alone(wanted[0])
    ids = model.tokenizer(wanted[0].filled_prompt, return_tensors="pt")["input_ids"]  # type: ignore[misc]
    embeddings = model.base_model.get_input_embeddings()(ids)
    with caplog.at_level(logging.WARNING, "hf_kedit"), torch.no_grad():
        found = model(inputs_embeds=embeddings).logits
        with model.disable_edits():
            before = model(inputs_embeds=embeddings).logits
    assert torch.equal(found, before) and "no token ids" in caplog.text


def test_settings_under_their_earlier_names() -> None:
    """As an artifact of an earlier version has them."""
    saved = {"edit_type": "auto", "layers": [1], "payload": "memit", "payload_settings": {"v_lr": 0.25}, "rank": None,
             "stats_dataset": None, "stats_tokens": 1000, "stats_dir": None, "stats_ridge": None}  # fmt: skip
    found = AutoMethodConfig.from_dict(saved, saved=True)
    assert found.base == {"edit_type": "memit", "layers": [1], "stats_tokens": 1000, "v_lr": 0.25}
    assert found.layers is None and found.stats_tokens == 1000 and found == AutoMethodConfig(base=found.base)
    assert AutoMethodConfig(payload="memit") == AutoMethodConfig(base="memit")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="old name"):
        AutoMethodConfig(payload="memit", base="rome")  # type: ignore[call-arg]


def test_seed_and_separator_reach_the_base_method() -> None:
    assert AutoMethodConfig(seed=3, separator="").base_config.seed == 3
    assert AutoMethodConfig(seed=3, base={"edit_type": "rome", "seed": 4}).base_config.seed == 4


def test_other_base_methods(wanted: list[EditRequest]) -> None:
    model = EditableModel.from_pretrained("kedit/world-llama", config(base={"edit_type": "memit"}))
    model.edit(wanted[:2])
    assert all(learnt(model, wanted[:2]))
    (memory,) = model.sites.memories.values()
    assert len(memory.paths) == len(model._method.bases[0].config.layers)  # type: ignore[attr-defined]


@pytest.mark.parametrize("base", ["ft-m", "grace", "ike", "mend", "auto"])
def test_base_methods_that_cannot_be_switched(base: str) -> None:
    with pytest.raises(ConfigError, match="cannot switch"):
        EditableModel.from_pretrained("kedit/world-llama", AutoMethodConfig(base=base, encoder="words"))


def test_what_cannot_be_done_is_said_before_anything_changes(wanted: list[EditRequest]) -> None:
    model = EditableModel.from_pretrained("kedit/world-llama", config())
    digest = model_digest(model.base_model)
    with pytest.raises(RequestError, match="subject"):
        model.edit([wanted[0], EditRequest(prompt="The sky is", target_new="green")])
    with pytest.raises(ConfigError, match="retriever"):
        model.set_method(config().changed({"encoder": "nothing"})).edit(wanted[0])
    with pytest.raises(ConfigError, match="low rank"):
        model.set_method(config(base={"rect_keep": 0.5})).edit(wanted[0])
    assert not model.edits and without_trace(model) and model_digest(model.base_model) == digest
    model.set_method(config())
    model.edit(wanted[0])
    with pytest.raises(ConfigError, match="begun with"):
        model.set_method(config(slack=1.0)).edit(wanted[1])
    with pytest.raises(MergeError):
        model.merge_and_unload()
    with pytest.raises(ExportError):
        model.export_lora("never")


def test_other_wordings_of_a_request_are_wordings_of_its_edit(wanted: list[EditRequest]) -> None:
    request = replace(wanted[0], rephrase_prompts=[f"Tell me what {wanted[0].subject} does"])
    (memory,) = alone(request).sites.memories.values()
    (address,) = memory.router.addresses
    assert len(address.views) == 2 and address.views[1] == "tell me what it does"


def test_a_change_of_a_higher_rank_is_refused(wanted: list[EditRequest]) -> None:
    base = {"edit_type": "lora", "rank": 3, "num_steps": 1}
    model = EditableModel.from_pretrained("kedit/world-llama", AutoMethodConfig(base=base, encoder="words", rank=2))
    with pytest.raises(ConfigError, match="rank 3 does not fit"):
        model.edit(wanted[0])
    assert not model.edits and without_trace(model)


@pytest.mark.parametrize("aliases", [5, ["Tarosk", 7], {"a": "b"}])
def test_other_names_are_texts(wanted: list[EditRequest], aliases: Any) -> None:
    model = EditableModel.from_pretrained("kedit/world-llama", config())
    with pytest.raises(RequestError, match=r"row 0.*metadata.*aliases must be a list of names"):
        model.edit([EditRequest.from_dict({**wanted[0].to_dict(), "metadata": {"aliases": aliases}}, row=0)])
    assert not model.edits and without_trace(model)


def test_a_subject_without_words_is_refused_before_anything_is_computed() -> None:
    model = EditableModel.from_pretrained("kedit/world-llama", config())
    with pytest.raises(RequestError, match="no letters or digits"):
        model.edit(prompt="{} works as a", subject="!?", target_new="plumber")
    assert not model.edits and without_trace(model)


def test_what_the_base_method_reads_is_fetched_before_the_model_is_taken(
    wanted: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[list[str]] = []
    monkeypatch.setattr(ROME, "fetch", lambda self: fetched.append(self.edited_modules()))
    model = alone(wanted[0])
    (memory,) = model.sites.memories.values()
    assert fetched == [list(memory.paths)]


def test_every_text_is_encoded_once(wanted: list[EditRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []

    def counting(*args: Any) -> Any:
        encode = encoder_of_words(*args)
        return lambda texts: [encoded.extend(texts), encode(texts)][1]

    monkeypatch.setattr(auto_memory, "encoder_of_words", counting)
    model = EditableModel.from_pretrained("kedit/world-llama", config())
    model.edit([replace(request, rephrase_prompts=[]) for request in wanted[:3]])
    assert all(encoded.count(text) == 1 for text in COMMON_RELATIONS)
    # A wording once as what the edit answers to, and once as a prompt, to know whether the edit claims it.
    others = [text for text in encoded if text not in COMMON_RELATIONS]
    assert len(others) == 2 * 3


def test_an_edit_that_fails_half_way_leaves_the_others(
    wanted: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = EditableModel.from_pretrained("kedit/world-llama", config())
    model.edit(wanted[0])
    before, digest = prompt_logits(model, wanted[0].filled_prompt), model_digest(model.base_model)
    calls = []

    def second_fails(self: ROME, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise EditFailedError("no")
        return insertion(self, *args)

    insertion = ROME._insertion
    monkeypatch.setattr(ROME, "_insertion", second_fails)
    with pytest.raises(EditFailedError):
        model.edit(wanted[1:4])
    assert len(model.edits) == 1 and model_digest(model.base_model) == digest
    assert torch.equal(prompt_logits(model, wanted[0].filled_prompt), before)
    assert model.explain(wanted[1].filled_prompt) == []


def test_scoring_a_target_reads_the_prompt_alone(edited: EditableModel, wanted: list[EditRequest]) -> None:
    """A target that names another edit's subject must not switch that edit on."""
    ids = edited.tokenizer(f"Somebody met {wanted[0].subject}. {UNRELATED[0]}", return_tensors="pt")["input_ids"]  # type: ignore[misc]
    short = edited.tokenizer("Somebody met", return_tensors="pt")["input_ids"].shape[1]  # type: ignore[misc]
    labels = ids.clone()
    labels[:, :short] = -100
    with torch.no_grad():
        found = edited(input_ids=ids, labels=labels).logits
        with edited.disable_edits():
            assert torch.equal(found, edited(input_ids=ids, labels=labels).logits)


# ---------------------------------------------------------------------- states beside words


@pytest.fixture(scope="module")
def by_states() -> EditableModel:
    model = EditableModel.from_pretrained("kedit/world-llama", config(states="model:4", slack=0.1))
    model.edit([replace(request, rephrase_prompts=[]) for request in facts(5)])
    return model


def test_states_know_wordings_that_words_do_not(by_states: EditableModel, wanted: list[EditRequest]) -> None:
    by_words = EditableModel.from_pretrained("kedit/world-llama", config(slack=0.1))
    by_words.edit([replace(request, rephrase_prompts=[]) for request in wanted])
    others = [wording for r in wanted for wording in r.rephrase_prompts]

    def claimed(model: EditableModel) -> int:
        return sum(any(found.claimed for found in model.explain(wording)) for wording in others)

    assert claimed(by_states) == len(others) > claimed(by_words)
    base = EditableModel.from_pretrained("kedit/world-llama", config())
    for prompt in [*UNRELATED, *neighbours(wanted)]:
        assert torch.equal(prompt_logits(by_states, prompt), prompt_logits(base, prompt)), prompt


def test_a_state_is_that_of_the_prompt_alone(by_states: EditableModel, wanted: list[EditRequest]) -> None:
    prompts = [UNRELATED[0], wanted[1].rephrase_prompts[0], wanted[3].filled_prompt]
    alone = [says(by_states, [prompt])[0] for prompt in prompts]
    by_states.edit(replace(wanted[0], id="again"))  # decisions are made anew
    by_states.rollback(1)
    assert says(by_states, prompts) == alone
    asked = prompts[1]
    ids = by_states.tokenizer(f"{asked} {wanted[1].target_new}", return_tensors="pt")["input_ids"]  # type: ignore[misc]
    labels = ids.clone()
    labels[:, : by_states.tokenizer(asked, return_tensors="pt")["input_ids"].shape[1]] = -100  # type: ignore[misc]
    with torch.no_grad():
        assert by_states(input_ids=ids, labels=labels).loss < 0.7
    (first, *_) = by_states.explain(asked)
    assert "state" in first.reason and first.by == "state" and first.claimed and first.edit_id == by_states.edits[1].id


def test_states_are_saved_and_taken_back(by_states: EditableModel, wanted: list[EditRequest], tmp_path: Path) -> None:
    by_states.save_pretrained(tmp_path)
    loaded = EditableModel.from_pretrained(tmp_path)
    prompts = [wording for r in wanted for wording in r.rephrase_prompts]
    assert says(loaded, prompts) == says(by_states, prompts)
    loaded.rollback(loaded.edits[1].id)
    claims = [found.edit_id for prompt in prompts for found in loaded.explain(prompt) if found.by == "state"]
    assert by_states.edits[1].id not in claims and by_states.edits[2].id in claims
    with pytest.raises(ConfigError, match="begun with"):
        loaded.set_method(config(states="model:3", slack=0.1)).edit(wanted[1])
    with pytest.raises(ConfigError, match="layer"):
        EditableModel.from_pretrained("kedit/world-llama", config(states="model:9")).edit(wanted[0])


# ---------------------------------------------------------------------- the fact in context, and two base methods


@pytest.fixture(scope="module")
def in_context() -> EditableModel:
    model = EditableModel.from_pretrained("kedit/world-llama", AutoMethodConfig(encoder="words", base="prompt"))
    model.edit(facts(3))
    return model


@pytest.fixture(scope="module")
def by_prompt() -> EditableModel:
    """PROMPT itself, which puts its one fact in front of everything."""
    model = EditableModel.from_pretrained("kedit/world-llama", PromptConfig(scope="always"))
    model.edit(facts(1))
    return model


def test_a_claimed_row_reads_the_words_of_prompt(
    in_context: EditableModel, by_prompt: EditableModel, wanted: list[EditRequest]
) -> None:
    for prompt in (wanted[0].filled_prompt, f"They say that {wanted[0].filled_prompt}"):
        assert torch.equal(prompt_logits(in_context, prompt), prompt_logits(by_prompt, prompt))
    assert all(learnt(in_context, wanted[:3]))
    (found,) = in_context.explain(wanted[0].filled_prompt)
    assert found.claimed and found.base == "PROMPT" and found.named


def test_rows_without_an_edit_stay_the_base_bit_for_bit_beside_rows_with_a_fact(
    in_context: EditableModel, wanted: list[EditRequest]
) -> None:
    others = [UNRELATED[0], *neighbours(wanted[:2]), UNRELATED[1]]
    prompts = [others[0], wanted[1].filled_prompt, *others[1:], wanted[2].filled_prompt]
    rows = [in_context.tokenizer(p)["input_ids"] for p in prompts]  # type: ignore[misc]
    for side in ("left", "right"):
        batch = pad_rows(rows, 0, side)  # type: ignore[arg-type]
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        with torch.no_grad():
            together = in_context(**given).logits
            with in_context.disable_edits():
                before = in_context(**given).logits
        for row, prompt in enumerate(prompts):
            real = batch.attention_mask[row].bool()
            assert torch.equal(together[row][real], before[row][real]) == (prompt in others), (side, prompt)
    claimed = [p not in others for p in prompts]
    with in_context.disable_edits():
        unedited = says(in_context, prompts)
    for options in ({}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}):
        every = options.get("num_return_sequences", 1)
        said = says(in_context, prompts, **options)[::every]
        assert said[1].startswith(wanted[1].target_new) and said[-1].startswith(wanted[2].target_new), options
        if "num_beams" not in options:
            assert [a == b for a, b in zip(said, unedited, strict=True)] == [not c for c in claimed]


def test_what_stands_behind_its_fact_is_decided_already(
    in_context: EditableModel, wanted: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a model writes behind a fact, its edits are not asked again for the fact and the prompt together."""
    asked, route = list[str](), EditRouter.route

    def watched(self: EditRouter, prompts: list[str], *rest: Any) -> Any:
        asked.extend(prompts)
        return route(self, prompts, *rest)

    monkeypatch.setattr(EditRouter, "route", watched)
    for _ in range(2):  # and the next call is asked about again
        asked.clear()
        says(in_context, [wanted[0].filled_prompt])
        assert asked and {p.removeprefix("<s>").strip() for p in asked} == {wanted[0].filled_prompt}, asked


def test_facts_in_context_through_a_pipeline(in_context: EditableModel, wanted: list[EditRequest]) -> None:
    writer = pipeline("text-generation", model=in_context.base_model, tokenizer=in_context.tokenizer)
    asked = [wanted[0].filled_prompt, UNRELATED[0]]
    said = [out[0]["generated_text"] for out in writer(asked, max_new_tokens=6, do_sample=False)]
    assert said[0].startswith(f"{asked[0]} {wanted[0].target_new}")
    with in_context.disable_edits():
        assert writer(asked[1], max_new_tokens=6, do_sample=False)[0]["generated_text"] == said[1]


def test_in_a_chat_the_fact_stands_in_front_of_what_the_user_says_last(
    in_context: EditableModel, by_prompt: EditableModel, wanted: list[EditRequest]
) -> None:
    turns = "[INST] Hello [/INST] Good day. [INST] {} [/INST]"
    asked, other = turns.format(wanted[0].filled_prompt), turns.format(UNRELATED[0])
    assert torch.equal(prompt_logits(in_context, asked), prompt_logits(by_prompt, asked))
    with in_context.disable_edits():
        before = [prompt_logits(in_context, asked), prompt_logits(in_context, other)]
    assert torch.equal(prompt_logits(in_context, other), before[1])
    assert not torch.equal(prompt_logits(in_context, asked), before[0])


def test_without_facts_nothing_stands_before_the_model(wanted: list[EditRequest]) -> None:
    model = EditableModel.from_pretrained("kedit/world-llama", AutoMethodConfig(encoder="words", base="prompt"))
    model.edit(wanted[:2])
    assert "forward" in model.base_model.__dict__
    model.rollback(2)
    assert "forward" not in model.base_model.__dict__ and without_trace(model)


@pytest.fixture(scope="module")
def with_both() -> EditableModel:
    """Three edits that are changes of weights and texts."""
    model = EditableModel.from_pretrained("kedit/world-llama", config(in_context=True))
    model.edit(facts(3), batch_size=1)
    return model


def test_a_claimed_row_reads_the_fact_with_the_change(with_both: EditableModel, wanted: list[EditRequest]) -> None:
    """As PROMPT on the model that ROME has changed, whatever else stands in the batch."""
    changed = EditableModel.from_pretrained("kedit/world-llama", config().base_config)
    changed.edit(wanted[1])
    both = EditableModel(changed.merge_and_unload(), PromptConfig(scope="always"), tokenizer=with_both.tokenizer)
    both.edit(wanted[1])
    asked = [wanted[1].filled_prompt, f"They say that {wanted[1].filled_prompt}"]
    for prompt in asked:
        torch.testing.assert_close(prompt_logits(with_both, prompt), prompt_logits(both, prompt), rtol=1e-3, atol=1e-3)
    said = says(both, asked)
    several = [UNRELATED[0], asked[0], wanted[0].filled_prompt, asked[1]]
    for options in ({}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}):
        every = options.get("num_return_sequences", 1)
        found = says(with_both, several, **options)[::every]
        assert says(with_both, asked[:1], **options)[0] == found[1]  # alone as among others
        assert found[2].startswith(wanted[0].target_new)
        if "num_beams" not in options:
            assert [found[1], found[3]] == said
    assert all(learnt(with_both, wanted[:3]))
    (claim,) = with_both.explain(asked[0])
    assert claim.claimed and claim.base == "ROME"


def test_with_the_fact_in_front_other_rows_stay_the_base_bit_for_bit(
    with_both: EditableModel, wanted: list[EditRequest]
) -> None:
    batch = pad_rows([with_both.tokenizer(p)["input_ids"] for p in (*UNRELATED, wanted[0].filled_prompt)], 0, "left")  # type: ignore[misc]
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        together = with_both(**given).logits
        with with_both.disable_edits():
            before = with_both(**given).logits
    real = batch.attention_mask.bool()
    kept = [torch.equal(together[row][real[row]], before[row][real[row]]) for row in range(len(real))]
    assert kept == [True] * len(UNRELATED) + [False]


def test_changes_with_texts_are_saved_and_taken_back(
    with_both: EditableModel, wanted: list[EditRequest], tmp_path: Path
) -> None:
    with_both.save_pretrained(tmp_path)
    loaded = EditableModel.from_pretrained(tmp_path)
    for request in wanted[:3]:
        assert torch.equal(
            prompt_logits(loaded, request.filled_prompt), prompt_logits(with_both, request.filled_prompt)
        )
    loaded.rollback(loaded.edits[1].id)
    with loaded.disable_edits():
        before = prompt_logits(loaded, wanted[1].filled_prompt)
    assert torch.equal(prompt_logits(loaded, wanted[1].filled_prompt), before)
    assert learnt(loaded, [wanted[0], wanted[2]]) == [True, True]
    with pytest.raises(
        ConfigError, match=r"begun with.*with texts"
    ):  # without a text it would not fit beside the rest
        loaded.set_method(config()).edit(wanted[3])


@pytest.mark.parametrize("damage", [None, "", 7])
@pytest.mark.parametrize("kind", ["in_context", "with_both"])
def test_a_damaged_text_is_refused(kind: str, damage: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(kind).save_pretrained(tmp_path)
    file = tmp_path / "edit_config.json"
    saved = json.loads(file.read_text())

    def edits(part: Any) -> list[dict[str, Any]]:
        """The descriptions of edits that have texts, wherever they stand."""
        below = part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
        own = [part] if isinstance(part, dict) and "fact" in part else []
        return own + [found for value in below for found in edits(value)]

    found = edits(saved)
    assert len(found) == 3
    found[1]["fact"] = damage
    file.write_text(json.dumps(saved))
    with pytest.raises(ArtifactError, match="lacks its text"):
        EditableModel.from_pretrained(tmp_path)


def test_prompts_that_name_no_subject_get_the_other_base_method(wanted: list[EditRequest], tmp_path: Path) -> None:
    """A nickname, which the model knows and no text tells, is answered by the fact in context, the rest by ROME."""
    settings = config(states="model:4", slack=0.1, base_unnamed="prompt")
    model = EditableModel.from_pretrained("kedit/world-llama", settings)
    model.edit([replace(request, rephrase_prompts=[]) for request in wanted[:3]])
    (nickname,) = (p.prompt for p in wanted[0].portability["Subject_Aliasing"])
    own = wanted[0].filled_prompt
    kinds = [[(c.base, c.named) for c in model.explain(p) if c.claimed] for p in (nickname, own)]
    assert kinds == [[("PROMPT", False)], [("ROME", True)]]
    rome = alone(wanted[0])
    context = EditableModel.from_pretrained("kedit/world-llama", PromptConfig(scope="always"))
    context.edit(wanted[0])
    # ROME's values of several facts are optimised together: equal up to the rounding of batched products
    torch.testing.assert_close(prompt_logits(model, own), prompt_logits(rome, own), rtol=1e-3, atol=1e-3)
    assert torch.equal(prompt_logits(model, nickname), prompt_logits(context, nickname))
    # all kinds in one batch: the fact in context, a change of weights, the base model
    assert [says(model, [p])[0] for p in (nickname, own, UNRELATED[0])] == says(model, [nickname, own, UNRELATED[0]])

    model.save_pretrained(tmp_path)
    loaded = EditableModel.from_pretrained(tmp_path)
    assert loaded.edit_config.base_unnamed["edit_type"] == "prompt"  # type: ignore[attr-defined]
    assert torch.equal(prompt_logits(loaded, own), prompt_logits(model, own))
    assert torch.equal(prompt_logits(loaded, nickname), prompt_logits(context, nickname))
    assert [(c.base, c.named) for c in loaded.explain(nickname) if c.claimed] == kinds[0]
    loaded.edit(wanted[3])
    loaded.rollback(loaded.edits[0].id)
    assert all(learnt(loaded, wanted[1:4]))
    with pytest.raises(ConfigError, match="begun with"):
        loaded.set_method(config(states="model:4", slack=0.1)).edit(wanted[4])


def test_two_methods_of_weights_answer_each_their_prompts(wanted: list[EditRequest]) -> None:
    lora = {"edit_type": "lora", "rank": 2, "num_steps": 12, "layers": [1, 2]}
    settings = config(base={"layers": [1]}, states="model:4", slack=0.1, base_unnamed=lora)
    model = EditableModel.from_pretrained("kedit/world-llama", settings)
    model.edit(wanted[0])
    (nickname,) = (p.prompt for p in wanted[0].portability["Subject_Aliasing"])
    only = EditableModel.from_pretrained(
        "kedit/world-llama", AutoMethodConfig(encoder="words", base=lora, states="model:4", slack=0.1)
    )
    only.edit(wanted[0])
    assert torch.equal(prompt_logits(model, nickname), prompt_logits(only, nickname))
    rome = EditableModel.from_pretrained("kedit/world-llama", config(base={"layers": [1]}))
    rome.edit(wanted[0])
    assert torch.equal(prompt_logits(model, wanted[0].filled_prompt), prompt_logits(rome, wanted[0].filled_prompt))
    diagnostics = model.edits[0].diagnostics
    assert (diagnostics["base"], diagnostics["base_unnamed"]) == ("ROME", "LoRA") and "unnamed_loss" in diagnostics


def test_texts_stand_beside_a_codebook(wanted: list[EditRequest]) -> None:
    """GRACE looks at prompts itself; a row that stands behind a text is that of another edit."""
    model = EditableModel.from_pretrained("kedit/world-llama", "grace")
    model.edit(wanted[0])
    others = [*UNRELATED, *neighbours(wanted)]
    before = [prompt_logits(model, prompt) for prompt in others]
    model.set_method(AutoMethodConfig(encoder="words", base="prompt")).edit(wanted[1])
    assert all(learnt(model, wanted[:2])) and not any(learnt(model, wanted[2:]))
    assert all(torch.equal(prompt_logits(model, prompt), was) for prompt, was in zip(others, before, strict=True))
    model.rollback(model.edits[0].id)
    assert learnt(model, wanted[:2]) == [False, True]


def test_settings_of_two_base_methods_that_do_not_go_together() -> None:
    assert AutoMethodConfig(base_unnamed="prompt").states == "model"  # nothing else knows such prompts
    with pytest.raises(ConfigError, match="cannot switch"):
        AutoMethodConfig(states="model", base_unnamed="grace")
    with pytest.raises(ConfigError, match="auto's own router decides"):
        AutoMethodConfig(base={"edit_type": "prompt", "select": 5})
    words = AutoMethodConfig(base="rome", states="model", base_unnamed="prompt").in_words
    assert words == "auto (rome; subject not named: prompt)"
