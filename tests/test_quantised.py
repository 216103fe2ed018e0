"""Edits of quantised models: they run beside the weights, which nothing touches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_kedit import EditableModel, FTMConfig, QLoRAConfig, ROMEConfig
from hf_kedit.books.beside import Change
from hf_kedit.books.deltas import WeightDelta
from hf_kedit.books.ledger import Ledger
from hf_kedit.config import EditConfig
from hf_kedit.config.easyedit import convert_hparams
from hf_kedit.engine.quantised import scheme
from hf_kedit.engine.weights import get_module, get_weight, model_digest, set_weight
from hf_kedit.errors import BaseModelMismatchError, MergeError, UnsupportedModelError, WeightError
from tests.methods.test_family import facts, neighbours, says
from tests.models import tiny_model

pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")
PROBE = torch.tensor([[5, 6, 7, 8, 9, 10]])
LLAMA, GPT2 = "kedit/world-llama", "kedit/world-gpt2"


def quantisation(kind: str) -> Any:
    """A config of transformers."""
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if kind == "torchao":
        return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=kind == "nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )


def load(name: str, config: EditConfig | str, kind: str) -> EditableModel:
    return EditableModel.from_pretrained(name, config, quantization_config=quantisation(kind))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROBE).logits


QUICK_ROME = ROMEConfig(layers=[2], mom2_adjustment=False, context_templates=["{}"])
CASES: list[Any] = [
    (LLAMA, "nf4", "ft-m"),
    (GPT2, "int8", "ft-m"),
    (LLAMA, "torchao", QUICK_ROME),
    (LLAMA, "nf4", "qlora"),
    *(
        pytest.param(n, k, m, marks=pytest.mark.slow)
        for n in (LLAMA, GPT2)
        for k in ("nf4", "int8")
        for m in ("rome",)
    ),
    *(
        pytest.param(LLAMA, kind, method, marks=pytest.mark.slow)
        for kind in ("nf4", "fp4", "torchao")
        for method in ("r-rome", "memit", "emmet", "alphaedit", "pmet", "lora", "adalora")
    ),
    *(pytest.param(GPT2, "int8", m, marks=pytest.mark.slow) for m in ("memit", "emmet", "alphaedit", "lora")),
]


@pytest.mark.parametrize(("name", "kind", "config"), CASES)
def test_edit_see_save_undo(name: str, kind: str, config: EditConfig | str, tmp_path: Path) -> None:
    """The new fact, the old neighbours, one of two edits taken back, the same from a folder, and all bits back."""
    model = load(name, config, kind)
    first, second = facts(2)
    before, digest, fingerprint = logits(model), model_digest(model.base_model), model.fingerprint()
    near = [(prompt, answer) for prompt, answer in neighbours(first) if says(model, prompt, answer)]
    assert near and not says(model, first.filled_prompt, first.target_new)
    model.edit(first, show_progress=False)
    assert says(model, first.filled_prompt, first.target_new)
    assert sum(says(model, prompt, answer) for prompt, answer in near) >= 0.8 * len(near)
    assert model_digest(model.base_model) == digest, "no weight was written"
    once, named = logits(model), model.fingerprint()
    assert named != fingerprint and not torch.equal(once, before)

    ids = model.edit(second, show_progress=False).ids
    assert says(model, second.filled_prompt, second.target_new)
    both = logits(model)
    with model.disable_edits():
        assert torch.equal(logits(model), before) and model.fingerprint() == fingerprint
    assert torch.equal(logits(model), both)
    model.rollback(ids)
    assert torch.equal(logits(model), once) and model.fingerprint() == named

    model.save_pretrained(tmp_path)
    assert torch.equal(logits(EditableModel.from_pretrained(tmp_path)), once)
    with pytest.raises(MergeError, match="unquantised base"):
        model.merge_and_unload()
    assert torch.equal(logits(model), once) and len(model.edits) == 1
    model.rollback("all")
    assert torch.equal(logits(model), before) and model.fingerprint() == fingerprint
    hooks = [hook for module in model.base_model.modules() for hook in module._forward_hooks.values()]
    assert not any(isinstance(hook, Change) for hook in hooks)


FRESH = """
import sys
import torch
from hf_kedit import EditableModel
model = EditableModel.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]])).logits
print(repr(logits[0, -1].tolist()))
"""


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_logits(tmp_path: Path) -> None:
    model = load(GPT2, FTMConfig(layers=[4], lr=1e-3, num_steps=3), "nf4")
    model.edit(facts(1), show_progress=False)
    model.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == repr(logits(model)[0, -1].tolist())


def test_into_the_unquantised_base(tmp_path: Path) -> None:
    """The way out that the error names, in Python and on the command line; nobody gets there by accident."""
    from typer.testing import CliRunner

    from hf_kedit.cli.app import app

    model = load(LLAMA, QUICK_ROME, "torchao")
    (request,) = facts(1)
    model.edit(request, show_progress=False)
    model.save_pretrained(tmp_path / "edits")
    with pytest.raises(BaseModelMismatchError, match=r"torchao.*here it is not"):
        EditableModel.from_pretrained(tmp_path / "edits", quantization_config=None)
    whole = EditableModel.from_pretrained(tmp_path / "edits", quantization_config=None, ignore_fingerprint=True)
    assert says(whole, request.filled_prompt, request.target_new)
    (path,) = (a.module for a in whole.ledger.accounts.values())
    merged = get_weight(get_module(whole.base_model, path))
    assert whole.merge_and_unload() is whole.base_model

    run = CliRunner().invoke(app, ["merge", str(tmp_path / "edits"), "-o", str(tmp_path / "no")])
    assert run.exit_code != 0 and not (tmp_path / "no").exists()
    run = CliRunner().invoke(app, ["merge", str(tmp_path / "edits"), "--base", LLAMA, "-o", str(tmp_path / "merged")])
    assert run.exit_code == 0, run.output
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(get_weight(get_module(stock, path)), merged)


def test_the_adapter_stands_beside_the_quantised_base_without_this_library(tmp_path: Path) -> None:
    from peft import PeftModel

    model = load(LLAMA, FTMConfig(layers=[4], lr=1e-3, num_steps=3), "nf4")
    before = logits(model)
    model.edit(facts(1), show_progress=False)
    model.export_lora(tmp_path)
    plain = load(LLAMA, "ft-m", "nf4").base_model
    after = logits(PeftModel.from_pretrained(plain, tmp_path))
    assert torch.allclose(after, logits(model), atol=1e-3) and not torch.allclose(after, before, atol=1e-2)


def small(library: str) -> Any:
    """A tiny Llama with one quantised matrix, without transformers knowing it."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    old = model.model.layers[1].mlp.down_proj
    if library == "torchao":
        torchao.quantize_(old, torchao.Int8WeightOnlyConfig())
        return model
    import bitsandbytes

    if library == "int8":
        new = bitsandbytes.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False)
        new.weight = bitsandbytes.nn.Int8Params(old.weight.detach(), requires_grad=False).to("cpu")
    else:
        new = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type=library)
        new.weight = bitsandbytes.nn.Params4bit(old.weight.detach(), requires_grad=False, quant_type=library)
        new = new.to("cpu")
        new.support_avx512bf16_for_cpu = False
    model.model.layers[1].mlp.down_proj = new
    return model


@pytest.mark.parametrize("library", ["int8", "nf4", "fp4", "torchao"])
def test_the_door_to_a_quantised_weight(library: str) -> None:
    """Reading gives what the matrix does, before and after a forward; writing is refused; deltas run beside it."""
    model = small(library)
    module, path = model.model.layers[1].mlp.down_proj, "model.layers.1.mlp.down_proj"
    exact = get_weight(tiny_model("llama", hidden_size=64, intermediate_size=128).model.layers[1].mlp.down_proj)
    weight = get_weight(module)
    tolerance = 0.02 if library in ("int8", "torchao") else 0.2
    assert (weight - exact).norm() < tolerance * exact.norm()
    before = logits(model)
    assert torch.equal(get_weight(module), weight) and torch.equal(logits(model), before)
    with pytest.raises(WeightError, match="quantised"):
        set_weight(module, weight + 1)
    assert torch.equal(get_weight(module), weight) and torch.equal(logits(model), before)

    ledger = Ledger(model)
    generator = torch.Generator().manual_seed(0)
    low = WeightDelta(
        path, left=torch.randn(64, 2, generator=generator), right=torch.randn(128, 2, generator=generator)
    )
    full = WeightDelta(path, dense=torch.randn(64, 128, generator=generator))
    x = torch.randn(3, 7, 128, generator=generator)
    plain = module(x)
    ledger.apply("a", [low], ["a"])
    assert torch.allclose(module(x), plain + x @ low.matrix().T, atol=1e-3)
    ledger.apply("b", [full], ["b"])
    assert torch.allclose(module(x), plain + x @ (low.matrix() + full.matrix()).T, atol=1e-3)
    after = logits(model)
    with ledger.provisional() as scope:
        scope.add(low)
        assert torch.allclose(module(x), plain + x @ (2 * low.matrix() + full.matrix()).T, atol=1e-3)
    assert torch.equal(logits(model), after)
    ledger.remove(["a"])
    assert torch.allclose(module(x), plain + x @ full.matrix().T, atol=1e-3)
    ledger.remove(["b"])
    assert torch.equal(module(x), plain) and torch.equal(logits(model), before) and not ledger.runs_beside


@pytest.mark.slow
def test_a_graph_that_was_compiled_before_sees_edits() -> None:
    model = load(GPT2, FTMConfig(layers=[4], lr=1e-3, num_steps=3), "torchao")
    compiled: Any = torch.compile(model.base_model, backend="eager")
    before = logits(compiled)
    model.edit(facts(1), show_progress=False)
    assert torch.equal(logits(compiled), logits(model)) and not torch.allclose(logits(compiled), before, atol=1e-2)
    with model.disable_edits():
        assert torch.equal(logits(compiled), before)
    model.rollback("all")
    assert torch.equal(logits(compiled), before)


def test_repacked_four_bit_weights_are_refused() -> None:
    """On some CPUs bitsandbytes rounds the scales at the first forward; a model that ran before cannot be wrapped."""
    model = small("nf4")
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.quant_state.packing_format_for_cpu = True  # what the forward leaves behind where the CPU has the kernels
    with pytest.raises(WeightError, match="before it runs"):
        EditableModel(model, "ft-m")


def test_qlora_wants_a_quantised_base_and_reads_hparams_of_easyedit() -> None:
    model = EditableModel.from_pretrained(LLAMA, QLoRAConfig(num_steps=1))
    digest = model_digest(model.base_model)
    with pytest.raises(UnsupportedModelError, match="load_in_4bit=True"):
        model.edit(facts(1))
    assert model_digest(model.base_model) == digest
    theirs = {"alg_name": "QLoRA", "lora_r": 4, "lora_alpha": 16, "quant_type": "nf4", "num_steps": 1, "lr": "5e-3"}
    converted = convert_hparams(theirs)
    assert isinstance(converted.config, QLoRAConfig)
    assert (converted.config.rank, converted.config.lora_alpha, converted.config.lr) == (4, 16, 5e-3)
    assert converted.config.num_steps == QLoRAConfig().num_steps and set(converted.ignored) == {
        "quant_type",
        "num_steps",
    }


def test_the_editor_of_easyedit_loads_a_quantised_base_for_qlora() -> None:
    from hf_kedit.compat.easyedit import BaseEditor

    theirs = {"alg_name": "QLoRA", "model_name": LLAMA, "target_modules": ["down_proj"], "quant_type": "fp4"}
    editor = BaseEditor.from_hparams(theirs)
    down = get_module(editor.model.base_model, editor.model.anatomy.down(1).path)
    assert editor.model.method_name == "qlora" and scheme(down) == "bitsandbytes fp4"
    whole = BaseEditor.from_hparams({**theirs, "quantization_bit": 8})
    assert scheme(get_module(whole.model.base_model, whole.model.anatomy.down(1).path)) == "bitsandbytes int8"


def test_packs_on_a_quantised_base(tmp_path: Path) -> None:
    """Two saved sets beside one base: each alone gives its own logits, together their sum, without them the base's."""
    alone = {}
    for name, fact in zip(("one", "two"), facts(2), strict=True):
        model = load(LLAMA, QUICK_ROME, "nf4")
        bare = logits(model)
        model.edit(fact)
        alone[name] = logits(model)
        model.save_pretrained(tmp_path / name)
    model = load(LLAMA, QUICK_ROME, "nf4")
    for name in alone:
        model.load_edits(tmp_path / name)
    both = logits(model)
    assert not any(torch.equal(both, other) for other in (bare, *alone.values()))
    for names, expected in ((["one"], alone["one"]), (["two"], alone["two"]), ([], bare), (["one", "two"], both)):
        model.set_active(names)
        assert torch.equal(logits(model), expected), names
    model.unload_edits("one")
    model.unload_edits("two")
    assert torch.equal(logits(model), bare) and not model.ledger.runs_beside
