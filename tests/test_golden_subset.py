"""A fresh clone has a golden case of every formula: without one, its tests would skip in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_kedit.registry import CONFIGS

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "rome": ["rome_llama", "p_rome_llama"],
    "r-rome": ["r_rome_llama"],
    "memit": ["memit_1_llama", "rect_llama"],
    "memit-fe": ["memit_fe_llama"],
    "core": ["core_llama"],
    "emmet": ["emmet_1_llama", "emmet_4_llama"],
    "pmet": ["pmet_llama", "pmet_both_llama"],
    "alphaedit": ["alphaedit_llama"],
    "kn": ["kn_gpt2"],
    "ultraedit": ["ultraedit_llama"],
    "simie": ["simie_llama"],
    "ft-l": ["ft_l_llama"],
    "ft-m": ["ft_m_llama"],
    "lora": ["lora_llama"],
    "ike": ["ike_text"],
    "serac": ["serac_routing_gpt2", "serac_training_t5"],
    "mend": ["mend_llama"],
    "malmen": ["malmen_llama"],
    "ke": ["ke_llama"],
    "grace": ["grace_llama"],
    "defer": ["defer_llama"],
    "melo": ["melo_llama"],
    "wise": ["wise_llama", "wise_llama_retrieve"],
    "t-patcher": ["t_patcher_losses"],
}
# Nobody else has published numbers of these, or they are another method with one switch; own tests solve them densely.
WITHOUT = set("adalora anyedit auto calinet dinm dpo eamet instructedit namet prompt qlora rledit sphere unke".split())


def test_every_method_has_a_case_or_is_listed() -> None:
    assert {
        name for name, kind in CONFIGS.all().items() if kind.__module__.startswith("hf_kedit.")
    } == CASES.keys() | WITHOUT


@pytest.mark.parametrize("name", [*(n for names in CASES.values() for n in names), "covariance_llama"])
def test_the_case_is_in_the_repository(name: str) -> None:
    model = str(json.loads((GOLDEN / name / "case.json").read_text(encoding="utf-8"))["model"]).rsplit("/", 1)[-1]
    assert len(load_file(GOLDEN / name / "expected.safetensors")) > 0
    if not model.startswith("none"):
        assert (GOLDEN / "models" / model / "model.safetensors").is_file()
