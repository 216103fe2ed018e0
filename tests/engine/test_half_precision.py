"""A model in bfloat16 runs in it; what is optimised stays float32 and ends up where float32 does."""

from __future__ import annotations

import torch

from hf_kedit import EditRequest
from hf_kedit.anatomy import check_anatomy, resolve_anatomy
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.rows import drift_row, rewrite_row
from hf_kedit.values.optimise import Values, optimise_values
from hf_kedit.values.settings import ValueSettings
from tests.golden_cases import load_model

TEMPLATES = ["{}", "The city is old. {}"]


def optimise(dtype: torch.dtype) -> Values:
    model, tokenizer = load_model("llama")
    model = model.to(dtype)
    anatomy = check_anatomy(model, resolve_anatomy(model))
    request = EditRequest(prompt="{} plays the sport of", subject="Mira Halvorsen", target_new="tennis")
    rows = [rewrite_row(tokenizer, request, t, template_index=i) for i, t in enumerate(TEMPLATES)]
    settings = ValueSettings(15, 0.5, 1e-3, 4.0, 0.0625, stop_loss=0.0)
    with frozen_eval(model):
        return optimise_values(
            model, anatomy, [[*rows, drift_row(tokenizer, request)]], 2, ("block",), settings, show_progress=False
        )


def test_values_of_a_half_precision_model_are_those_of_the_full_one() -> None:
    full, half = optimise(torch.float32), optimise(torch.bfloat16)
    assert half.offset.dtype == half.initial.dtype == torch.float32
    assert half.route != "full", "restarted like the other"
    assert half.loss[0][-1][0] < half.loss[0][0][0] - 0.2, "it has learned something"
    cosine = torch.nn.functional.cosine_similarity(full.offset, half.offset).item()
    assert cosine > 0.98, cosine
    assert abs(full.loss[0][-1][1] - half.loss[0][-1][1]) < 0.05
    # a vector that had been kept in bfloat16 would survive the round trip
    assert not torch.equal(half.offset, half.offset.bfloat16().float())
