"""ROME and MEMIT against independent implementations, intermediate values included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest
from hf_kedit.methods.memit import MEMITConfig
from hf_kedit.methods.rome import ROMEConfig
from hf_kedit.statistics.collecting import collect_moments
from hf_kedit.statistics.corpora import text_corpus
from hf_kedit.statistics.moments import SecondMoment
from tests.golden_cases import Case, corpus

ROME_CASES = ["rome_gpt2", "rome_llama", "rome_identity_gpt2", "rome_identity_llama"]
MEMIT_CASES = [f"{kind}_{m}" for kind in ("memit_1", "memit_4", "memit_lastlayer") for m in ("gpt2", "llama")]
_IGNORED = ("v_loss_layer", "mom2_adjustment")


def editable(case: Case, config: Any) -> EditableModel:
    model, tokenizer = case.load()
    editable = EditableModel(model, config, tokenizer)
    store = editable._method.bench.statistics
    needed = editable._method.edited_modules() if case.spec["hparams"].get("mom2_adjustment", True) else []
    if needed and f"cov.{config.layers[0]}" not in case.expected:  # the small subset leaves the matrices out
        for module, moment in collect_moments(model, tokenizer, needed, text_corpus(corpus())).items():
            store.put(module, moment)
    else:
        for module, layer in zip(needed, config.layers, strict=False):
            cov = case.expected[f"cov.{layer}"].double()
            store.put(module, SecondMoment(cov * 25_000, 25_000, "golden"))
    return editable


def run_case(case: Case, config: Any) -> None:
    model = editable(case, config)
    base = model.base_model
    for number, step in enumerate(case.spec["steps"]):
        requests = [EditRequest(**{k: r[k] for k in ("prompt", "subject", "target_new")}) for r in step]
        weights = {n: p.detach().clone() for n, p in base.named_parameters()}
        before = [last_logits(model, r) for r in requests]
        model.trace = {}
        model.edit(requests)
        trace = dict(model.trace)
        for i, request in enumerate(requests):
            trace[f"logits_before.{i}"] = before[i]
            trace[f"logits_after.{i}"] = last_logits(model, request)
        for layer in config.layers:
            name = case.spec["modules"]["rewrite"].format(layer) + ".weight"
            trace[f"delta.{layer}"] = base.get_parameter(name).detach() - weights[name]
        compared = 0
        for key, expected in case.expected.items():
            prefix, _, rest = key.partition(".")
            if prefix != f"step{number}":
                continue
            case.check(rest.split(".")[0], expected, trace[rest], key)
            compared += 1
        assert compared >= 10
        changed = {n for n, p in base.named_parameters() if not torch.equal(p, weights[n])}
        assert changed == {case.spec["modules"]["rewrite"].format(layer) + ".weight" for layer in config.layers}


def last_logits(model: EditableModel, request: EditRequest) -> torch.Tensor:
    ids = model.tokenizer(request.filled_prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).logits[0, -1]


def hparams(case: Case) -> dict[str, Any]:
    return {k: v for k, v in case.spec["hparams"].items() if k not in _IGNORED} | {
        "context_templates": case.spec["context_templates"],
        "stats_ridge": 0.0,  # the moment as it is, as published
    }


@pytest.mark.golden
@pytest.mark.parametrize("name", ROME_CASES)
def test_rome_matches_the_reference(name: str) -> None:
    case = Case(name)
    run_case(case, ROMEConfig(**hparams(case), mom2_adjustment=case.spec["hparams"]["mom2_adjustment"]))


@pytest.mark.golden
@pytest.mark.parametrize("name", MEMIT_CASES)
def test_memit_matches_the_reference(name: str) -> None:
    case = Case(name)
    run_case(case, MEMITConfig(**hparams(case), keep_edited_keys=False))


@pytest.mark.golden
@pytest.mark.parametrize("name", ["rome_gpt2", "rome_llama", "memit_4_gpt2", "memit_4_llama"])
def test_rows_are_tokenised_as_the_reference_did(name: str) -> None:
    from hf_kedit.engine.rows import rewrite_row

    case = Case(name)
    _, tokenizer = case.load()
    templates = case.spec["context_templates"]
    flat = templates if isinstance(templates[0], str) else [t for group in templates for t in group]
    for step, tokens in zip(case.spec["steps"], case.spec["tokens"], strict=True):
        for request, expected in zip(step, tokens, strict=True):
            made = EditRequest(**{k: request[k] for k in ("prompt", "subject", "target_new")})
            for i, template in enumerate(flat):
                row = rewrite_row(tokenizer, made, template)
                assert list(row.ids) == expected["input_ids"][i]
                assert row.fact == expected["lookup_index"][i]
                assert list(row.targets) == expected["target_ids"]
                assert list(row.positions) == expected["target_positions"][i]


@pytest.mark.golden
@pytest.mark.parametrize("name", ["covariance_gpt2", "covariance_llama"])
def test_second_moments_of_all_layers_match(name: str) -> None:
    case = Case(name)
    model, tokenizer = case.load()
    modules: dict[str, str] = {}
    for key in case.expected:
        kind = next((k for k in ("mlp", "attn") if k in key), None)
        if kind is None or case.expected[key].dim() != 2:
            continue
        layer = int(next(p for p in key.split(".") if p.isdigit()))
        template = {
            ("gpt2", "mlp"): "transformer.h.{}.mlp.c_proj",
            ("gpt2", "attn"): "transformer.h.{}.attn.c_proj",
            ("llama", "mlp"): "model.layers.{}.mlp.down_proj",
            ("llama", "attn"): "model.layers.{}.self_attn.o_proj",
        }[case.model_name, kind]
        modules[key] = template.format(layer)
    assert len(modules) >= 6
    found = collect_moments(model, tokenizer, list(modules.values()), text_corpus(corpus()))
    for key, module in modules.items():
        expected = case.expected[key].double()
        assert float((found[module].mean() - expected).norm() / expected.norm()) < 2e-5, key
