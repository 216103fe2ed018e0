"""KN: its compat mode against an independent implementation, and what the paper's mode promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest
from hf_kedit.engine.capture import Tap
from hf_kedit.errors import ConfigError, EditFailedError, RequestError, UnsupportedModelError
from hf_kedit.locate.attribution import attribute_neurons
from hf_kedit.methods.kn import KNConfig
from tests.golden_cases import Case

CASES = ["kn_gpt2", "kn_multitoken_gpt2"]


def request_of(case: Case) -> EditRequest:
    return EditRequest(
        prompt=case.spec["prompt"], target_new=case.spec["target_new"], ground_truth=[case.spec["ground_truth"]]
    )


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_compat_matches_the_reference(name: str) -> None:
    case = Case(name)
    model, tokenizer = case.load()
    config = KNConfig(mode="compat", **case.spec["hparams"])
    editable = EditableModel(model, config, tokenizer)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.tensor([case.spec["prompt_ids"]])
    found = {"logits_before": model(input_ids=ids).logits[0, -1].detach()}
    editable.trace = {}
    editable.edit(request_of(case))
    found |= editable.trace
    found["logits_after"] = model(input_ids=ids).logits[0, -1].detach()
    for layer in range(6):
        parameter = case.spec["modules"]["value"].format(layer) + ".weight"
        found[f"delta.{layer}"] = model.get_parameter(parameter).detach() - weights[parameter]
    taps = editable._method.taps()  # type: ignore[attr-defined]
    rough = attribute_neurons(
        model, taps, case.spec["prompt_ids"], case.spec["ground_truth_ids"], steps=1, rule="endpoints"
    )
    editable.rollback()
    exact = attribute_neurons(
        model, taps, case.spec["prompt_ids"], case.spec["ground_truth_ids"], steps=1, rule="endpoints"
    )
    found["scores_steps1"] = torch.stack(exact.scores)
    assert not torch.equal(found["scores_steps1"], torch.stack(rough.scores)), "the edit must show in attributions"
    assert torch.equal(found["neuron_mask"], case.expected["neuron_mask"])
    assert torch.nonzero(found["neuron_mask"]).tolist() == case.spec["neurons"]
    for key, expected in case.expected.items():
        if not bool(expected.any()):  # a layer without a chosen neuron
            assert torch.equal(found[key], expected), key
        elif key != "neuron_mask":
            case.check(key.split(".")[0], expected, found[key], key)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


# ---------------------------------------------------------------------- the paper's mode


def world_request(**changes: Any) -> EditRequest:
    from hf_kedit.data import load_edit_dataset
    from hf_kedit.requests import load_requests

    row = load_requests(load_edit_dataset("world", split="test", limit=1))[0]
    values = {"prompt": row.prompt, "target_new": row.target_new, "ground_truth": row.ground_truth}
    return EditRequest(**{**values, "rephrase_prompts": row.rephrase_prompts, **changes})


@pytest.mark.parametrize("name", ["kedit/world-gpt2", "kedit/world-llama"])
def test_values_of_few_neurons_move_by_the_papers_rule(name: str) -> None:
    editable = EditableModel.from_pretrained(name, KNConfig(layers=list(range(6))))
    editable.trace = {}
    model, method = editable.base_model, editable._method
    before = {p: w.detach().clone() for p, w in model.named_parameters()}
    result = editable.edit(world_request())
    mask = editable.trace["neuron_mask"].bool()
    assert 1 <= int(mask.sum()) < 0.05 * mask.numel()
    scores = editable.trace["scores"]
    assert torch.equal(mask, scores > 0.2 * scores.max())
    head = model.get_output_embeddings().weight.detach()
    new = editable.tokenizer(" " + world_request().target_new, add_special_tokens=False)["input_ids"]
    old = editable.tokenizer(" " + world_request().ground_truth[0], add_special_tokens=False)["input_ids"]
    unit = lambda ids: torch.nn.functional.normalize(head[ids].sum(0), dim=0)  # noqa: E731
    direction = 8 * unit(new) - unit(old)
    for layer, module in zip(method.searched_layers(), method.edited_modules(), strict=True):  # type: ignore[attr-defined]
        parameter = f"{module}.weight"
        w, moved = before[parameter], model.get_parameter(parameter).detach() - before[parameter]
        if "c_proj" in module:
            w, moved = w.t(), moved.t()
        signs = editable.trace["activations"][layer].sign()
        expected = direction[:, None] * (w.norm(dim=0) * mask[layer] * signs)[None]
        assert torch.allclose(moved, expected, atol=1e-5)
        assert torch.equal((moved != 0).any(dim=0), mask[layer])
    assert result.edits[0].diagnostics["neurons"] == int(mask.sum())
    editable.rollback()
    assert all(torch.equal(w, before[p]) for p, w in model.named_parameters())


@pytest.mark.parametrize("name", ["kedit/world-gpt2", "kedit/world-llama"])
def test_the_new_answer_becomes_likelier(name: str) -> None:
    """On the tiny models; KN is one of the weaker methods, and half of its edits are a success for it."""
    from hf_kedit.data import load_edit_dataset

    editable = EditableModel.from_pretrained(name, KNConfig(layers=[3, 4, 5]))
    numbers = []
    for row in load_edit_dataset("world", split="test", limit=4):
        numbers.append(editable.edit(row).edits[0].diagnostics)
        editable.rollback()
    assert all(n["target_probability_after"] > n["target_probability_before"] for n in numbers)
    assert sum(n["target_probability_after"] > 0.5 for n in numbers) >= 2


def test_changes_do_not_grow_from_edit_to_edit(world_gpt2: EditableModel) -> None:
    world_gpt2.set_method(KNConfig(steps=2, integration="trapezoid"))
    sizes = []
    for number in range(3):
        world_gpt2.edit(world_request().with_id(f"again {number}"))
        sizes.append(
            max(float(a.pieces[-1].delta.matrix().norm(dim=0).max()) for a in world_gpt2.ledger.accounts.values())
        )
    assert max(sizes) < 2 * sizes[0]


def test_refining_keeps_neurons_that_wordings_share(world_gpt2: EditableModel) -> None:
    def neurons(**values: Any) -> torch.Tensor:
        world_gpt2.set_method(KNConfig(**values))
        world_gpt2.trace = {}
        world_gpt2.edit(world_request())
        world_gpt2.rollback()
        return world_gpt2.trace["neuron_mask"].bool()

    alone = neurons()
    most, any_of = neurons(refine=True, p=0.7), neurons(refine=True, p=0.0)
    assert bool((most <= any_of).all()) and bool((alone <= any_of).all())
    assert int(most.sum()) < int(any_of.sum())


def test_layers_limit_the_search(world_gpt2: EditableModel) -> None:
    world_gpt2.set_method(KNConfig(layers=[1, -1]))
    world_gpt2.edit(world_request())
    assert {k.split(".")[2] for k in world_gpt2.ledger.accounts} <= {"1", "5"}


def test_without_a_ground_truth_the_models_own_answer_is_replaced(world_gpt2: EditableModel) -> None:
    world_gpt2.set_method("kn")
    given = world_gpt2.edit(world_request()).edits[0].diagnostics
    world_gpt2.rollback()
    own = world_gpt2.edit(world_request(ground_truth=[])).edits[0].diagnostics
    assert world_request().ground_truth[0].startswith(own["attributed_answer"].split()[0])
    assert own["target_probability_before"] == given["target_probability_before"]


def test_bad_input_is_refused(world_gpt2: EditableModel) -> None:
    for values in ({"adaptive_threshold": 1.0}, {"steps": 0}, {"p": 1.0}, {"integration": "trapezoid", "steps": 1}):
        with pytest.raises(ConfigError):
            KNConfig(**values)  # type: ignore[arg-type]
    world_gpt2.set_method(KNConfig(refine=True))
    with pytest.raises(RequestError, match="paraphrases"):
        world_gpt2.edit(world_request(rephrase_prompts=[]))
    world_gpt2.set_method(KNConfig(refine=True, p=0.9, adaptive_threshold=0.99))
    unrelated = ["The weather is", "Two and two make", "One day the"]
    with pytest.raises(EditFailedError):
        world_gpt2.edit(world_request(rephrase_prompts=unrelated))
    assert not world_gpt2.edits


def test_models_without_what_it_needs_are_refused() -> None:
    from tests.golden_cases import load_model
    from tests.models import tiny_model

    _, tokenizer = load_model("llama")
    with pytest.raises(UnsupportedModelError, match="no separate matrix"):
        EditableModel(tiny_model("phi3"), KNConfig(mode="compat"), tokenizer).edit(
            prompt="The mother tongue of Mira is", target_new="Polish", ground_truth="Hindi"
        )
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        EditableModel(tiny_model("mixtral"), KNConfig(), tokenizer).edit(
            prompt="The mother tongue of Mira is", target_new="Polish", ground_truth="Hindi"
        )


@pytest.mark.parametrize("kind", ["input", "output"])
def test_attributions_add_up(kind: Any) -> None:
    """Completeness: the scores of a layer sum to P(a) − P(a := 0)."""
    from tests.models import tiny_model

    for family in ("gpt2", "opt", "llama", "bloom"):
        model = tiny_model(family).requires_grad_(False)
        from hf_kedit.anatomy import check_anatomy, resolve_anatomy

        anatomy = check_anatomy(model, resolve_anatomy(model))
        layer = anatomy.layers[1]
        tap = Tap(anatomy.down(1).path, kind)
        assert layer.down is not None
        ids, answer = [5, 9, 33, 71], [14]
        score = attribute_neurons(model, [tap], ids, answer, steps=200).scores[0]
        full = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[14]
        from hf_kedit.locate.attribution import replaced_at

        zeros = torch.zeros(1, score.shape[0])
        with torch.no_grad(), replaced_at(model, tap, torch.tensor([3]), zeros):
            none = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[14]
        assert abs(float(full - none)) > 1e-7
        assert float(score.sum()) == pytest.approx(float(full - none), rel=1e-2), family
