"""`EditableModel` on the embedded models: edit, see it, undo it, all or nothing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from hf_kedit import (
    EditableModel,
    EditRequest,
    FTLConfig,
    FTMConfig,
    MEMITConfig,
    ROMEConfig,
    embedded,
    load_edit_dataset,
)
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import (
    ConfigError,
    EditFailedError,
    KeditError,
    LayerError,
    NonFiniteError,
    RequestError,
    RollbackError,
    SubjectNotFoundError,
    TargetTooLongError,
    UnknownEditError,
    UnknownMethodError,
    UnsupportedModelError,
)
from tests.golden_cases import load_model
from tests.models import tiny_model

METHODS = ["rome", "memit", "ft-m"]


def facts(count: int, start: int = 0) -> list[EditRequest]:
    rows = load_edit_dataset("world", split="test", limit=start + count)
    return [EditRequest.from_dict(rows[i]) for i in range(start, start + count)]


def says(model: Any, prompt: str, words: int = 6) -> str:
    tokens = model.tokenizer(prompt, return_tensors="pt")
    out = model.generate(**tokens, max_new_tokens=words, do_sample=False)
    return str(model.tokenizer.decode(out[0, tokens.input_ids.shape[1] :])).strip()


@pytest.mark.parametrize("name", ["kedit/world-gpt2", "kedit/world-llama"])
@pytest.mark.parametrize("method", METHODS)
def test_edit_see_undo(name: str, method: str) -> None:
    model = EditableModel.from_pretrained(name, method)
    digest = model_digest(model.base_model)
    (fact,) = facts(1)
    neighbour = fact.locality["Neighborhood"][0]
    old, near = says(model, fact.filled_prompt), says(model, neighbour.prompt)
    assert old.startswith(fact.ground_truth[0]) and near.startswith(neighbour.answers[0])

    result = model.edit(fact)
    assert says(model, fact.filled_prompt).startswith(fact.target_new)
    assert says(model, neighbour.prompt).startswith(neighbour.answers[0])
    with model.disable_edits():
        assert says(model, fact.filled_prompt) == old
        assert model_digest(model.base_model) == digest
    assert says(model, fact.filled_prompt).startswith(fact.target_new)
    assert [e.id for e in model.edits] == result.ids
    assert result.edits[0].diagnostics["seconds"] > 0 and result.edits[0].diagnostics["loss"]

    assert model.rollback(result.ids[0])[0].id == result.ids[0]
    assert model_digest(model.base_model) == digest
    assert says(model, fact.filled_prompt) == old and not model.edits


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_one_edit_of_several_can_be_taken_back(method: str) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", method)
    digest = model_digest(model.base_model)
    wanted = facts(4)
    ids = model.edit(wanted).ids
    assert all(says(model, f.filled_prompt).startswith(f.target_new) for f in wanted)
    model.rollback(ids[1])
    assert says(model, wanted[1].filled_prompt).startswith(wanted[1].ground_truth[0])
    for i in (0, 2, 3):
        assert says(model, wanted[i].filled_prompt).startswith(wanted[i].target_new)
    model.rollback(2)
    assert [e.id for e in model.edits] == ids[:1]
    model.rollback("all")
    assert model_digest(model.base_model) == digest


@pytest.mark.parametrize(
    ("method", "dtype"),
    # fp16 is slow on CPUs: the cheapest method stands for the others, the ledger is the same
    [("rome", torch.bfloat16), ("memit", torch.bfloat16), ("ft-m", torch.bfloat16), ("ft-m", torch.float16)],
)
def test_rollback_is_exact_in_half_precision(method: str, dtype: torch.dtype) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", method, dtype=dtype)
    digest = model_digest(model.base_model)
    ids = model.edit(facts(2), batch_size=1).ids
    after = model_digest(model.base_model)
    assert after != digest
    with model.disable_edits():
        assert model_digest(model.base_model) == digest
    assert model_digest(model.base_model) == after
    model.rollback(ids[0])
    model.rollback(ids[1])
    assert model_digest(model.base_model) == digest


def test_an_ft_batch_is_one_change() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", FTMConfig(layers=[2], lr=1e-3, num_steps=3))
    digest = model_digest(model.base_model)
    ids = model.edit(facts(2)).ids
    state = model_digest(model.base_model)
    with pytest.raises(RollbackError, match="together"):
        model.rollback(ids[0])
    assert model_digest(model.base_model) == state and len(model.edits) == 2
    model.rollback(ids)
    assert model_digest(model.base_model) == digest


# ---------------------------------------------------------------------- all or nothing


BAD: list[tuple[Any, type[KeditError]]] = [
    ({"prompt": "{} plays", "subject": "A", "target_new": ""}, RequestError),
    ({"prompt": "Nobody plays", "subject": "Somebody", "target_new": "x"}, SubjectNotFoundError),
    ({"prompt": "Somebody plays", "target_new": "x"}, RequestError),
    ({"prompt": "{} plays", "subject": "A", "target_new": "word " * 400}, TargetTooLongError),
    ([], KeditError),
    ("missing.json", KeditError),
    (3, RequestError),
    ([{"prompt": "{} a", "subject": "B", "target_new": "c", "id": "x"}] * 2, RequestError),
]


@pytest.mark.parametrize(("bad", "error"), BAD)
def test_bad_input_changes_nothing(bad: Any, error: type[KeditError], world_gpt2: EditableModel) -> None:
    digest = model_digest(world_gpt2.base_model)
    good = facts(2)
    source = [*good, bad] if isinstance(bad, dict) else bad
    with pytest.raises(error) as caught:
        world_gpt2.edit(source)
    if isinstance(bad, dict) and isinstance(caught.value, RequestError):
        assert caught.value.row == 2 and caught.value.field
    assert model_digest(world_gpt2.base_model) == digest and not world_gpt2.edits


def test_bad_models_methods_and_layers() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(embedded.path("world-gpt2")), None
    with pytest.raises(UnknownMethodError, match="rome"):
        EditableModel(model, "romee", tokenizer)
    with pytest.raises(LayerError, match="0 … 5"):
        EditableModel(model, ROMEConfig(layers=[6]), tokenizer)
    with pytest.raises(ConfigError, match="from_pretrained"):
        EditableModel("gpt2", "rome")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tokenizer"):
        EditableModel(model, "rome").edit(facts(1))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        EditableModel(tiny_model("t5"), "rome")
    with pytest.raises(KeditError, match="world-gpt2"):
        EditableModel.from_pretrained("kedit/world-gtp2")


def test_damaged_weights_are_refused_before_anything_happens(world_gpt2: EditableModel) -> None:
    weight = world_gpt2.base_model.transformer.h[2].mlp.c_proj.weight
    weight.data[0, 0] = float("nan")
    world_gpt2.set_method(ROMEConfig(layers=[2]))
    with pytest.raises(NonFiniteError, match=r"h\.2\.mlp\.c_proj"):
        world_gpt2.edit(facts(1))


def test_an_edit_where_gradients_are_switched_off(world_gpt2: EditableModel) -> None:
    (fact,) = facts(1)
    with torch.no_grad():
        world_gpt2.set_method("ft-m").edit(fact)
        assert not torch.is_grad_enabled()
    with torch.inference_mode(), pytest.raises(EditFailedError, match="outside the block"):
        world_gpt2.edit(fact)
    assert len(world_gpt2.rollback("all")) == 1


@pytest.mark.parametrize("method", ["t-patcher", "calinet", "wise"])
def test_gradients_after_an_answer_in_inference_mode(method: str) -> None:
    """What a first forward loads and keeps is no tensor of inference mode, through which nothing could be trained."""
    model = EditableModel.from_pretrained("kedit/world-gpt2", method)
    first, second = facts(2)
    model.edit(first)
    assert model.tokenizer is not None
    ids = model.tokenizer(first.filled_prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        model(input_ids=ids)
    states = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=states).logits.sum().backward()
    assert states.grad is not None and bool(states.grad.abs().sum() > 0)
    model.edit(second)


def test_ids_are_unique_in_a_model(world_gpt2: EditableModel) -> None:
    (fact,) = facts(1)
    world_gpt2.edit(fact.with_id("mine"))
    with pytest.raises(RequestError, match="already carries"):
        world_gpt2.edit(fact.with_id("mine"))
    with pytest.raises(UnknownEditError, match="Did you mean 'mine'"):
        world_gpt2.rollback("mien")
    for wrong in (0, 2, True, None):
        with pytest.raises(RollbackError):
            world_gpt2.rollback(wrong)  # type: ignore[arg-type]
    world_gpt2.rollback("mine")


def test_a_failure_in_the_middle_of_a_list_undoes_the_whole_call(
    world_gpt2: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = world_gpt2.edit(facts(1)).ids
    digest, calls = model_digest(world_gpt2.base_model), []
    real = type(world_gpt2._method).compute

    def failing(self: Any, requests: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise EditFailedError("no luck")
        return real(self, requests)

    monkeypatch.setattr(type(world_gpt2._method), "compute", failing)
    with pytest.raises(EditFailedError):
        world_gpt2.edit(facts(4, start=1))
    assert model_digest(world_gpt2.base_model) == digest
    assert [e.id for e in world_gpt2.edits] == kept
    calls.clear()
    result = world_gpt2.edit(facts(4, start=1), on_error="skip")
    assert len(result.edits) == 3 and len(result.failed) == 1
    assert result.failed[0][0].filled_prompt == facts(4, start=1)[2].filled_prompt


def test_editing_leaves_no_trace_beside_the_weights(world_llama: EditableModel) -> None:
    base, tokenizer = world_llama.base_model, world_llama.tokenizer
    base.train()
    torch.manual_seed(5)
    rng = torch.get_rng_state()
    before = (
        tokenizer.padding_side,
        base.config.to_dict(),
        base.generation_config.to_dict(),
        [p.requires_grad for p in base.parameters()],
        {n: m.__dict__.get("forward") for n, m in base.named_modules()},
    )
    world_llama.edit(facts(1))
    after = (
        tokenizer.padding_side,
        base.config.to_dict(),
        base.generation_config.to_dict(),
        [p.requires_grad for p in base.parameters()],
        {n: m.__dict__.get("forward") for n, m in base.named_modules()},
    )
    assert before == after
    assert base.training and all(m.training for m in base.modules())
    assert torch.equal(torch.get_rng_state(), rng)


# ---------------------------------------------------------------------- being a model


def test_pipeline_takes_it_without_a_warning(
    world_gpt2: EditableModel, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    (fact,) = facts(1)
    world_gpt2.edit(fact)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate = pipeline("text-generation", model=world_gpt2, tokenizer=world_gpt2.tokenizer)
        text = generate(fact.filled_prompt, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert fact.target_new in text
    out, err = capfd.readouterr()
    assert "not supported" not in err + out and not [r for r in caplog.records if r.levelname == "ERROR"]


def test_it_looks_like_its_base_model(world_gpt2: EditableModel) -> None:
    assert isinstance(world_gpt2, EditableModel)
    assert type(world_gpt2).__name__ == "GPT2LMHeadModel"
    assert world_gpt2.config.model_type == "gpt2" and world_gpt2.device.type == "cpu"
    assert world_gpt2.get_base_model() is world_gpt2.base_model
    assert "EditableModel" in repr(world_gpt2)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(world_gpt2(ids).logits, world_gpt2.base_model(ids).logits)
    with pytest.raises(AttributeError):
        world_gpt2.no_such_thing  # noqa: B018


def test_merging_makes_edits_permanent(world_gpt2: EditableModel, tmp_path: Any) -> None:
    (fact,) = facts(1)
    world_gpt2.edit(fact)
    edited = model_digest(world_gpt2.base_model)
    plain = world_gpt2.merge_and_unload()
    assert type(plain).__mro__[1].__name__ != "EditableModel" and model_digest(plain) == edited
    assert not world_gpt2.edits
    plain.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model_digest(again) == edited


def test_a_merged_model_is_edited_as_a_new_one(world_gpt2: EditableModel) -> None:
    world_gpt2.edit(facts(1)[0])
    old = world_gpt2.statistics
    assert old.fingerprint != world_gpt2.fingerprint()
    world_gpt2.merge_and_unload()
    assert world_gpt2.statistics is not old
    assert world_gpt2.statistics.fingerprint == world_gpt2.fingerprint()


def test_static_caches_do_not_outlive_an_edit(world_llama: EditableModel) -> None:
    (fact,) = facts(1)
    tokens = world_llama.tokenizer(fact.filled_prompt, return_tensors="pt")

    def run() -> str:
        out = world_llama.generate(**tokens, max_new_tokens=4, do_sample=False, cache_implementation="static")
        return str(world_llama.tokenizer.decode(out[0]))

    before = run()
    ids = world_llama.edit(fact).ids
    assert fact.target_new in run()
    world_llama.rollback(ids)
    assert run() == before


def test_methods_can_be_mixed_on_one_model(world_gpt2: EditableModel) -> None:
    digest = model_digest(world_gpt2.base_model)
    first, second = facts(2)
    world_gpt2.edit(first)
    world_gpt2.set_method("memit").edit(second)
    assert [e.method for e in world_gpt2.edits] == ["rome", "memit"]
    for fact in (first, second):
        assert says(world_gpt2, fact.filled_prompt).startswith(fact.target_new)
    world_gpt2.rollback(world_gpt2.edits[0].id)
    assert says(world_gpt2, second.filled_prompt).startswith(second.target_new)
    world_gpt2.rollback("all")
    assert model_digest(world_gpt2.base_model) == digest


def test_results_do_not_depend_on_the_company_of_a_request() -> None:
    config = MEMITConfig(context_templates=[["{}"], ["The. {}", "And so. {}"]])
    wanted = facts(3)
    alone = EditableModel.from_pretrained("kedit/world-llama", config)
    alone.trace = {}
    alone.edit(wanted[1])
    together = EditableModel.from_pretrained("kedit/world-llama", config)
    together.trace = {}
    together.edit(wanted)
    assert torch.allclose(alone.trace["v_star.0"], together.trace["v_star.1"], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "auto"), ("gpt_neox", "auto"), ("mixtral", "ft-m"), ("t5", "ft-m")]
)
def test_where_no_method_is_named_an_unknown_model_is_edited_and_undone(family: str, method: str) -> None:
    _, tokenizer = load_model("t5" if family == "t5" else "llama")
    base = tiny_model(family, vocab_size=max(len(tokenizer), 420))
    model = EditableModel(base, tokenizer=tokenizer)
    digest = model_digest(base)
    assert model.method_name == method and method in model.edit_config.in_words
    model.edit(prompt="{} plays the sport of", subject="Mira Halvorsen", target_new="tennis")
    assert len(model.edits) == 1 and (model_digest(base) == digest) is (method == "auto")
    model.rollback("all")
    assert model_digest(base) == digest


@pytest.mark.parametrize("kind", [FTLConfig, FTMConfig])
@pytest.mark.parametrize("family", ["t5", "t5_v1_1"])
def test_fine_tuning_works_on_encoder_decoders(kind: Any, family: str) -> None:
    _, tokenizer = load_model("t5")
    base = tiny_model(family, vocab_size=len(tokenizer))
    model = EditableModel(base, kind(layers=[1], lr=5e-2, num_steps=40), tokenizer)
    digest = model_digest(base)
    request = EditRequest(prompt="The mother tongue of Mira is", target_new="Polish")
    result = model.edit(request)
    losses = result.edits[0].diagnostics["loss"]
    assert losses[-1] < losses[0]
    model.rollback("all")
    assert model_digest(base) == digest
