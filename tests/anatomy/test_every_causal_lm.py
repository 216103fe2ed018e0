"""Every causal language model type of the installed transformers that can be built from a shrunk configuration.

Slow, and the only test that looks at families nobody has listed. A type that cannot be built here (missing
packages, incomplete default configurations) is skipped; one that cannot be shrunk is read on the meta device.
"""

from __future__ import annotations

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_kedit.anatomy import check_anatomy, resolve_anatomy
from hf_kedit.errors import AnatomyError, UnsupportedModelError
from tests.anatomy.shrink import default_causal_lm, small_causal_lm

# No MLP beside a state-space or recurrent mixer (zamba2: in the first layers, which are all that is left of it).
NO_MLP = {"mamba", "mamba2", "falcon_mamba", "rwkv", "zamba2"}
# Separate lists of attentions and MLPs.
NO_BLOCKS = {"xlm"}
# Some layers have an MLP, others have not.
HYBRID = {"nemotron_h", "zamba"}
# Blocks that work on something else than [batch, tokens, width] of the input.
OTHER_SHAPES = {"cpmant", "prophetnet", "xlnet"}
# The shrunk configuration is not consistent, or more than token ids is needed.
NOT_RUN = {"blt", "granitemoehybrid", "longcat_flash", "xlstm", "xmod"}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_causal_lm(model_type: str) -> None:
    shrunk = True
    try:
        model = small_causal_lm(model_type)
    except Exception:
        shrunk = False
        try:
            model = default_causal_lm(model_type)
        except Exception as error:
            pytest.skip(f"cannot be built: {type(error).__name__}: {error}")
    if model_type in NO_MLP | NO_BLOCKS:
        with pytest.raises(UnsupportedModelError if model_type in NO_MLP else AnatomyError):
            resolve_anatomy(model)
        return
    anatomy = resolve_anatomy(model)
    found = [bool(layer.down or layer.experts) for layer in anatomy.layers]
    assert any(found) if model_type in HYBRID else all(found)
    assert len({layer.path for layer in anatomy.layers}) == anatomy.num_layers
    if not shrunk:
        return
    if model_type in OTHER_SHAPES:
        with pytest.raises(UnsupportedModelError, match="needs blocks that work on"):
            check_anatomy(model, anatomy)
        return
    if model_type in NOT_RUN:
        with pytest.raises(AnatomyError, match="could not be run"):
            check_anatomy(model, anatomy)
        return
    checked = check_anatomy(model, anatomy)
    assert checked.additive is not None and len(checked.additive) == anatomy.num_layers
    for before, after in zip(anatomy.layers, checked.layers, strict=True):
        assert before.down == after.down and before.ups == after.ups
        assert after.gated == (after.fused or len(after.ups) > 1)
