"""The relatives of ROME and MEMIT against independent implementations, intermediate values included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest
from hf_kedit.methods.alphaedit import AlphaEditConfig
from hf_kedit.methods.core import COREConfig
from hf_kedit.methods.emmet import EMMETConfig
from hf_kedit.methods.memit import MEMITConfig
from hf_kedit.methods.memit_fe import MEMITFEConfig
from hf_kedit.methods.pmet import PMETConfig
from hf_kedit.methods.r_rome import RROMEConfig
from hf_kedit.statistics.collecting import collect_moments
from hf_kedit.statistics.corpora import text_corpus
from hf_kedit.statistics.moments import SecondMoment
from tests.golden_cases import Case, corpus

MODELS = ("gpt2", "llama")
CASES = [
    f"{kind}_{model}"
    for kind in ("r_rome", "p_rome", "emmet_1", "emmet_4", "memit_fe", "core", "pmet", "alphaedit", "rect")
    for model in MODELS
] + ["pmet_both_llama"]
_DROPPED = {
    "v_loss_layer",
    "mom2_adjustment",
    "enable_prompt_keys",
    "enable_random_prefix_keys",
    "k_percent",
    "epsilon",
}


def config_of(case: Case) -> Any:
    """The library's config with the hyperparameters of a case."""
    given: dict[str, Any] = case.spec["hparams"]
    values = {k: v for k, v in given.items() if k not in _DROPPED}
    values["context_templates"] = case.spec["context_templates"]
    values["stats_ridge"] = 0.0  # the moment as it is, as published
    kind = case.spec["algorithm"]
    if kind in ("r_rome", "p_rome"):
        assert given["enable_prompt_keys"] != given["enable_random_prefix_keys"]
        return RROMEConfig(**values, key_mode="prompt" if given["enable_prompt_keys"] else "mean")
    if kind == "rect":
        return MEMITConfig(**values, rect_keep=given["k_percent"] / 100, keep_edited_keys=False)
    if kind in ("pmet", "pmet_both", "memit_fe", "core"):
        values["keep_edited_keys"] = False
    if kind.startswith("pmet"):
        both = isinstance(case.spec["modules"]["rewrite"], list)
        return PMETConfig(**values, rewrite=["attention", "mlp"] if both else ["mlp"])
    return {"emmet": EMMETConfig, "memit_fe": MEMITFEConfig, "core": COREConfig, "alphaedit": AlphaEditConfig}[kind](
        **values
    )


def editable(case: Case, config: Any) -> EditableModel:
    """The case's model with the case's second moments (or, in the small subset, the corpus they come from)."""
    model, tokenizer = case.load()
    made = EditableModel(model, config, tokenizer)
    store, modules = made.statistics, made._method.edited_modules()
    names = [n for n in case.expected if n.startswith("cov.")]
    if not names:
        for module, moment in collect_moments(model, tokenizer, modules, text_corpus(corpus())).items():
            store.put(module, moment)
        return made
    for name in names:
        _, layer, *kind = name.split(".")
        templates = case.spec["modules"]["rewrite"]
        template = templates if isinstance(templates, str) else templates[kind == ["mlp"]]
        count = case.spec["covariance"]["tokens"]
        store.put(template.format(layer), SecondMoment(case.expected[name].double() * count, count, "golden"))
    return made


def parameter_of(case: Case, key: str) -> str:
    """Parameter that a ``delta.<layer>[.<kind>]`` tensor belongs to."""
    _, layer, *kind = key.split(".")
    templates = case.spec["modules"]["rewrite"]
    template = templates if isinstance(templates, str) else templates[kind == ["mlp"]]
    return str(template).format(layer) + ".weight"


def last_logits(model: EditableModel, request: EditRequest) -> torch.Tensor:
    ids = model.tokenizer(request.filled_prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).logits[0, -1]


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_it_matches_the_reference(name: str) -> None:
    case = Case(name)
    config = config_of(case)
    model = editable(case, config)
    base = model.base_model
    for number, step in enumerate(case.spec["steps"]):
        requests = [EditRequest(**{k: r[k] for k in ("prompt", "subject", "target_new")}) for r in step]
        weights = {n: p.detach().clone() for n, p in base.named_parameters()}
        trace = {f"logits_before.{i}": last_logits(model, r) for i, r in enumerate(requests)}
        model.trace = {}
        model.edit(requests)
        trace |= model.trace
        trace |= {f"logits_after.{i}": last_logits(model, r) for i, r in enumerate(requests)}
        wanted = {k.partition(".")[2]: v for k, v in case.expected.items() if k.startswith(f"step{number}.")}
        written = set()
        for key, expected in wanted.items():
            kind = key.partition(".")[0]
            if kind == "delta":
                parameter = parameter_of(case, key)
                written.add(parameter)
                actual = base.get_parameter(parameter).detach() - weights[parameter]
            elif kind == "cache_c":
                keys = model.ledger.keys(parameter_of(case, key).removesuffix(".weight"))
                assert keys is not None
                actual = keys @ keys.T
            else:
                actual = trace[key]
            case.check(kind, expected, actual, f"step{number}.{key}")
        assert len(wanted) >= 10
        changed = {n for n, p in base.named_parameters() if not torch.equal(p, weights[n])}
        assert changed == (written or {f"{m}.weight" for m in model._method.edited_modules()})
    for key in case.expected:
        if key.startswith("P."):
            module = case.spec["modules"]["rewrite"].format(key[2:])
            case.check("P", case.expected[key], model._method.space(module).space.matrix(), key)
