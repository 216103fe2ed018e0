"""What EAMET and SPHERE add to MEMIT and AlphaEdit: formulas against plain arithmetic, and their effect on edits."""

from __future__ import annotations

import pytest
import torch

from hf_kedit import AutoEditConfig, EAMETConfig, EditableModel, SPHEREConfig
from hf_kedit.engine.weights import get_module, get_weight, model_digest
from hf_kedit.errors import ConfigError
from hf_kedit.methods.eamet import Alignment
from hf_kedit.methods.sphere import principal_directions
from tests.methods.test_family import facts

GPT2 = "kedit/world-gpt2"


def test_the_terms_of_eamet_are_those_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(60, 9, generator=generator), torch.randn(60, 5, generator=generator)
    key, value = torch.randn(9, generator=generator), torch.randn(5, generator=generator)
    config = EAMETConfig(layers=[0], cs_factor=1.5, mse_factor=4.0, temperature=0.3)
    similarity = [float(k @ key / (k.norm() * key.norm())) for k in keys]
    cosine = [float(v @ value / (v.norm() * value.norm())) for v in values]
    p = (torch.tensor(similarity) / 0.3).exp() / (torch.tensor(similarity) / 0.3).exp().sum()
    q = (torch.tensor(cosine) / 0.3).exp() / (torch.tensor(cosine) / 0.3).exp().sum()
    nearest = sorted(range(60), key=lambda i: -similarity[i])[:50]
    squares = sum(float(p[i]) * (similarity[i] - cosine[i]) ** 2 for i in nearest)
    expected = 1.5 * float((p * (p / q).log()).sum()) + 4.0 * squares
    assert float(Alignment(keys, key, values, config)(value)) == pytest.approx(expected, rel=1e-4)
    assert float(Alignment(keys[:0], key, values[:0], config)(value)) == 0.0

    zero = torch.zeros(5, requires_grad=True)
    (gradient,) = torch.autograd.grad(Alignment(keys, key, values, config)(zero), zero)
    assert bool(torch.isfinite(gradient).all()) and float(gradient.norm()) > 0


def test_values_of_eamet_resemble_each_other_as_their_keys_do() -> None:
    """The mean difference of cosines gets smaller when the terms are switched on."""
    requests, apart = facts(4), {}
    for weight in (0.0, 1.0):
        model = EditableModel.from_pretrained(
            GPT2, AutoEditConfig.for_model("world-gpt2", "eamet", cs_factor=weight, mse_factor=4 * weight)
        )
        model.trace = {}
        model.edit(requests)
        layers = model.edit_config.layers
        assert layers is not None
        keys = model._method._before(model._method.rows(requests, model._method.templates()), layers[-1])[0]
        values = torch.stack([model.trace[f"v_delta.{j}"] for j in range(len(requests))])
        cosines = [torch.nn.functional.normalize(x, dim=-1) for x in (keys, values)]
        apart[weight] = float((cosines[0] @ cosines[0].T - cosines[1] @ cosines[1].T).abs().mean())
    assert apart[1.0] < 0.8 * apart[0.0]


@pytest.mark.parametrize("rule", ["fix_ks", "norm"])
def test_lengths_of_eamet_follow_their_rule(rule: str) -> None:
    requests = facts(1)
    options = {"length_rule": rule, "clamp_ks_factor": 2.0, "clamp_norm_factor": 0.2, "v_lr": 0.5, "norm_factor": 0.0}
    model = EditableModel.from_pretrained(GPT2, AutoEditConfig.for_model("world-gpt2", "eamet", **options))
    model.trace = {}
    model.edit(requests)
    layers = model.edit_config.layers
    assert layers is not None
    rows = model._method.rows(requests, model._method.templates())
    with model.disable_edits():
        key = model._method._before(rows, layers[-1])[0][0]
    start = model.trace["delta_path.0"][0]
    assert torch.allclose(start.norm(), key.norm(), rtol=1e-3), "it begins as long as the key"
    limit = 2.0 * key.norm() if rule == "fix_ks" else 0.2 * model.trace["v_init.0"].norm()
    found = model.trace["v_delta.0"].norm()
    assert found <= limit * 1.001 and found >= limit * 0.9, "without a penalty it goes to its limit"


def test_a_lambda_for_every_layer_of_eamet() -> None:
    with pytest.raises(ConfigError, match="one per layer"):
        EAMETConfig(layers=[1, 2], layer_weights=[1.0])
    with pytest.raises(ConfigError, match="shared"):
        EAMETConfig(expert_policy="top1")
    requests, sizes = facts(2), []
    for weights in ([100.0, 1e6], [1e6, 100.0]):
        model = EditableModel.from_pretrained(
            GPT2, AutoEditConfig.for_model("world-gpt2", "eamet", layers=[1, 2], layer_weights=weights)
        )
        model.edit(requests)
        sizes.append([float(model.ledger.total(m).norm()) for m in model._method.edited_modules()])  # type: ignore[union-attr]
    assert sizes[0][1] < 0.1 * sizes[0][0] and sizes[1][0] < 0.1 * sizes[1][1]


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (8, 8)])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 1.0])
def test_principal_directions_are_those_of_the_gram_matrix(shape: tuple[int, int], fraction: float) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))
    found = principal_directions(weight, fraction)
    rows = weight.double() / weight.double().norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    count = next(r for r in range(1, shape[1] + 1) if values[-r:].sum() >= fraction * (1 - 1e-9) * values.sum())
    expected = vectors[:, -count:]
    assert found.shape == (shape[1], count)
    assert torch.allclose(found @ found.T, expected @ expected.T, atol=1e-8)


def test_sphere_takes_its_part_out_of_the_update_and_no_more() -> None:
    requests, changes = facts(3), {}
    for strength in (0.0, 0.5, 1.0):
        model = EditableModel.from_pretrained(
            GPT2, AutoEditConfig.for_model("world-gpt2", "sphere", layers=[2], sphere_strength=strength)
        )
        (module,) = model._method.edited_modules()
        directions = principal_directions(get_weight(get_module(model.base_model, module)), 0.5)
        digest = model_digest(model.base_model)
        model.edit(requests)
        changes[strength] = model.ledger.total(module).double()  # type: ignore[union-attr]
        model.rollback("all")
        assert model_digest(model.base_model) == digest
    plain = EditableModel.from_pretrained(GPT2, AutoEditConfig.for_model("world-gpt2", "alphaedit", layers=[2]))
    plain.edit(requests)
    assert torch.equal(plain.ledger.total(module).double(), changes[0.0])  # type: ignore[union-attr]
    size = float(changes[0.0].norm())
    for strength in (0.5, 1.0):
        expected = changes[0.0] - strength * (changes[0.0] @ directions) @ directions.T
        assert float((changes[strength] - expected).norm()) <= 1e-4 * size
    assert float((changes[0.0] - changes[1.0]).norm()) > 1e-2 * size, "there was something to take out"


def test_sphere_refuses_impossible_parts() -> None:
    for field, value in (("sphere_fraction", 0.0), ("sphere_fraction", 1.5), ("sphere_strength", -0.1)):
        with pytest.raises(ConfigError, match=field):
            SPHEREConfig(**{field: value})
