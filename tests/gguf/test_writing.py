"""Models and edits written as GGUF, read back with the reader of the package ``gguf`` and with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_kedit import EditableModel
from hf_kedit.cli import app
from hf_kedit.engine.weights import get_module, get_weight, model_digest, set_weight
from hf_kedit.errors import ArtifactError, ExportError, MergeError, MissingExtraError, UnsupportedModelError
from hf_kedit.loading import load_base
from tests.gguf.files import (
    CHAT,
    FAMILIES,
    byte_level,
    edited_places,
    logits,
    put,
    random_model,
    sentencepiece,
)

PROBE = [5, 6, 700, 8, 1999, 10, 42]
FACT = {"prompt": "By profession {} is a", "subject": "Tarosk Boayond", "target_new": "plumber"}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Name → values of a file, as numbers."""
    read = gguf.GGUFReader(path).tensors
    return {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in read}


def field(path: Path, name: str) -> Any:
    found = gguf.GGUFReader(path).get_field(name)
    return None if found is None else found.contents()


def with_transformers(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


# ---------------------------------------------------------------------- whole models


# transformers reads no file of the first Gemma. Where it leaves a shape at its default, this library completes it.
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma"])
def test_transformers_reads_the_same_model(family: str, tmp_path: Path) -> None:
    values = {"attention_bias": False, "mlp_bias": False} if family == "llama" else {}  # which transformers leaves out
    model = random_model(family, **values)
    before = logits(model, PROBE)
    put(model, *edited_places(family))
    digest = model_digest(model.base_model)
    done = model.export_gguf(tmp_path / "model.gguf", dtype="f32")
    assert model_digest(model.base_model) == digest and done.size == (tmp_path / "model.gguf").stat().st_size
    after = logits(model, PROBE)
    assert (before - after).abs().max() > 1e-2
    read = load_base(str(done.path)) if family in ("gpt2", "gemma2", "gemma3_text") else with_transformers(done.path)
    assert torch.allclose(logits(read, PROBE), after, atol=1e-6)


@pytest.mark.parametrize("name", ["kedit/world-gpt2", "kedit/world-llama"])
def test_a_world_model_comes_back_with_its_edit(name: str, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(name, "rome")
    model.tokenizer.chat_template = CHAT
    model.edit(**FACT, show_progress=False)
    model.export_gguf(tmp_path / "model.gguf", dtype="f32")
    read = EditableModel.from_pretrained(tmp_path / "model.gguf", "rome")
    assert torch.allclose(logits(read, PROBE), logits(model, PROBE), atol=1e-6)
    assert read.base_model.config.max_position_embeddings == 128
    text = "In 1998 Tarosk Boayond isn't a plumber,\n\n  naïve – 東京!  "
    assert read.tokenizer(text).input_ids == model.tokenizer(text).input_ids
    assert read.tokenizer.chat_template == CHAT
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(read.tokenizer, n) for n in special] == [getattr(model.tokenizer, n) for n in special]


def test_number_formats(tmp_path: Path) -> None:
    model = random_model("qwen2", hidden_size=64, intermediate_size=40)  # no block of 32 fits into rows of 40
    sizes = {}
    exact = {}
    for dtype in ("f32", "f16", "bf16", "q8_0"):
        path = tmp_path / f"{dtype}.gguf"
        sizes[dtype] = model.export_gguf(path, dtype=dtype).size
        found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
        assert {found[n] for n in found if "norm" in n or n.endswith("bias")} == {"F32"}
        assert found["blk.0.ffn_up.weight"] == dtype.upper()
        assert found["blk.0.ffn_down.weight"] == ("F16" if dtype == "q8_0" else dtype.upper())
        values = tensors(path)
        exact = exact or values
        for key in ("blk.0.ffn_up.weight", "token_embd.weight"):
            if dtype == "q8_0":  # blocks of 32 numbers, the largest of which is 127 steps
                blocks = exact[key].reshape(-1, 32)
                step = blocks.abs().amax(1, keepdim=True) / 127
                error = (values[key].reshape(-1, 32) - blocks).abs()
                assert (error <= 0.502 * step + 1e-3 * blocks.abs()).all()
            else:
                kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
                assert torch.equal(values[key], exact[key].to(kind).float())
    assert sizes["f32"] > sizes["f16"] == sizes["bf16"] > sizes["q8_0"]


def test_an_edited_weight_is_rounded_once(tmp_path: Path) -> None:
    """A file in f32 has the exact sum, although the model itself holds bf16."""
    model = random_model("llama")
    model.base_model.to(torch.bfloat16)
    model = EditableModel(model.base_model, model.edit_config, byte_level())
    path = "model.layers.0.mlp.down_proj"
    original = get_weight(get_module(model.base_model, path)).float()
    put(model, path)
    model.export_gguf(tmp_path / "model.gguf", dtype="f32")
    total = model.ledger.accounts[f"{path}.weight"].total
    assert total is not None
    written = tensors(tmp_path / "model.gguf")["blk.0.ffn_down.weight"]
    assert torch.equal(written, original + total)
    assert not torch.equal(written, get_weight(get_module(model.base_model, path)).float())


def test_an_untied_head_is_written(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM as Auto

    from hf_kedit import FTMConfig, embedded

    base = Auto.from_pretrained(embedded.path("world-llama"))
    model = EditableModel(base, FTMConfig(layers=[0]), byte_level(), untie=True)
    put(model, "lm_head")
    model.export_gguf(tmp_path / "model.gguf", dtype="f32")
    assert torch.allclose(logits(with_transformers(tmp_path / "model.gguf"), PROBE), logits(model, PROBE), atol=1e-6)
    with pytest.raises(ExportError, match="untied"):
        model.export_gguf_adapter(tmp_path / "edit.gguf")


def test_positions_of_llama_3(tmp_path: Path) -> None:
    """Wavelengths above 8192 / 1 are stretched eightfold, those below 8192 / 4 not at all, those between by a mean."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = random_model("llama", attention_bias=False, mlp_bias=False, head_dim=64, rope_parameters=rope)
    model.export_gguf(tmp_path / "model.gguf", dtype="f16")
    divided = []
    for pair in range(32):
        wavelength = 2 * np.pi * 500000.0 ** (2 * pair / 64)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        stretched = 8.0 if smooth < 0 else 1.0 if smooth > 1 else 1 / ((1 - smooth) / 8 + smooth)
        divided.append(stretched)
    assert len({*divided}) > 3
    assert torch.allclose(tensors(tmp_path / "model.gguf")["rope_freqs.weight"], torch.tensor(divided), rtol=1e-5)
    assert load_base(str(tmp_path / "model.gguf")).config.rope_parameters == rope
    stretched = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    linear = random_model("llama", attention_bias=False, mlp_bias=False, rope_parameters=stretched)
    linear.export_gguf(tmp_path / "linear.gguf")
    assert field(tmp_path / "linear.gguf", "llama.rope.scaling.factor") == 4.0
    read = load_base(str(tmp_path / "linear.gguf")).config.rope_parameters
    assert read == stretched
    window = random_model("mistral", sliding_window=16)
    window.export_gguf(tmp_path / "window.gguf")
    assert field(tmp_path / "window.gguf", "llama.context_length") == 16


# ---------------------------------------------------------------------- tokenizers


def test_what_a_file_says_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    model = random_model("qwen2")
    model.base_model.generation_config.eos_token_id = [1, 7]
    path = model.export_gguf(tmp_path / "model.gguf").path
    assert field(path, "tokenizer.ggml.model") == "gpt2" and field(path, "tokenizer.ggml.pre") == "gpt-2"
    assert field(path, "tokenizer.chat_template") == CHAT
    tokens = field(path, "tokenizer.ggml.tokens")
    assert tokens == byte_level().convert_ids_to_tokens(range(2000))
    assert field(path, "tokenizer.ggml.token_type")[:4] == [3, 3, 3, 1]
    ids = [field(path, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding", "eot")]
    assert ids == [0, 1, 2, 7]
    assert field(path, "tokenizer.ggml.add_bos_token") and not field(path, "tokenizer.ggml.add_eos_token")


def test_a_sentencepiece_tokenizer_comes_back(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    model = random_model("llama", tokenizer, attention_bias=False, mlp_bias=False)
    path = model.export_gguf(tmp_path / "model.gguf").path
    assert field(path, "tokenizer.ggml.model") == "llama" and field(path, "tokenizer.ggml.add_space_prefix")
    assert field(path, "tokenizer.ggml.token_type")[:5] == [2, 3, 3, 6, 6]
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("Tarosk Boayond is a plumber", "naïve – 東京 1998"):
        assert read(text).input_ids == tokenizer(text).input_ids
        assert tokenizer.decode(read(text).input_ids, skip_special_tokens=True) == text


def _changed(tokenizer: Any, **parts: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with other parts of its JSON; ``model`` only in the fields that are given."""
    from tokenizers import Tokenizer

    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole["model"] |= parts.pop("model", {})
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole | parts)))


_DIGITS_OF_3 = {"type": "Digits", "individual_digits": False}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre_tokenizer": _DIGITS_OF_3}, "no name in llama.cpp"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no name in llama.cpp"),
        ({"model": {"ignore_merges": True}}, "no name in llama.cpp"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "marks parts of words"),
    ],
    ids=lambda value: "",
)
def test_tokenizers_that_llama_cpp_would_read_differently(parts: Any, message: str, tmp_path: Path) -> None:
    model = random_model("llama", _changed(byte_level(), **parts))
    with pytest.raises(ExportError, match=message):
        model.export_gguf(tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_other_kinds_of_tokenizers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    model = random_model("llama", PreTrainedTokenizerFast(tokenizer_object=words))
    with pytest.raises(ExportError, match="WordLevel"):
        model.export_gguf(tmp_path / "model.gguf")
    model.tokenizer = None
    with pytest.raises(ExportError, match="tokenizer"):
        model.export_gguf(tmp_path / "model.gguf")
    small = random_model("llama")
    small.base_model.resize_token_embeddings(1990)
    with pytest.raises(ExportError, match="2000 tokens and the model 1990"):
        small.export_gguf(tmp_path / "model.gguf")
    wide = random_model("llama")
    wide.base_model.resize_token_embeddings(2003)
    path = wide.export_gguf(tmp_path / "model.gguf").path
    assert field(path, "tokenizer.ggml.tokens")[-3:] == ["[PAD2000]", "[PAD2001]", "[PAD2002]"]
    assert field(path, "tokenizer.ggml.token_type")[-4:] == [1, 5, 5, 5]


# ---------------------------------------------------------------------- adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_what_the_edit_changes_in_the_file(family: str, tmp_path: Path) -> None:
    """Of every weight ``B A``, read from the adapter, is the difference of the two whole files."""
    model = random_model(family)
    model.export_gguf(tmp_path / "base.gguf", dtype="f32")
    put(model, *edited_places(family), rank=3)
    model.export_gguf(tmp_path / "edited.gguf", dtype="f32")
    done = model.export_gguf_adapter(tmp_path / "edit.gguf")
    assert done.rank == 3 and done.tensors == len(edited_places(family)) and not done.losses
    assert done.modelfile == "FROM ./base.gguf\nADAPTER ./edit.gguf"
    names = ("general.type", "adapter.type", "adapter.lora.alpha", "general.architecture")
    kind, lora, alpha, arch = (field(done.path, name) for name in names)
    assert (kind, lora, alpha, arch) == ("adapter", "lora", 3.0, field(tmp_path / "base.gguf", "general.architecture"))
    base, edited, factors = (tensors(tmp_path / f"{name}.gguf") for name in ("base", "edited", "edit"))
    changed = {name for name in base if not torch.equal(base[name], edited[name])}
    assert {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in factors} == changed
    for name in changed:
        product = factors[f"{name}.lora_b"] @ factors[f"{name}.lora_a"]
        assert torch.allclose(product, edited[name] - base[name], atol=1e-6)


def test_an_adapter_of_a_smaller_rank(tmp_path: Path) -> None:
    model = random_model("llama")
    model.set_method("ft-m")
    model.edit(prompt="The sky is", target_new="green", show_progress=False)
    with pytest.raises(ExportError, match=r"llama\.cpp does not load adapters with full-rank changes"):
        model.export_gguf_adapter(tmp_path / "edit.gguf")
    done = model.export_gguf_adapter(tmp_path / "edit.gguf", rank=4)
    assert done.rank == 4 and max(done.losses.values()) > 0.01
    (key,) = done.losses
    total = model.ledger.accounts[key].total
    assert total is not None
    _, sigma, _ = torch.linalg.svd(total.double())
    expected = float((sigma[4:].square().sum() / sigma.square().sum()).sqrt())
    assert done.losses[key] == pytest.approx(expected, rel=1e-4)


def test_what_no_adapter_can_hold(tmp_path: Path) -> None:
    from hf_kedit.books.ledger import WeightDelta

    model = random_model("gpt2")
    with pytest.raises(ExportError, match="no edits"):
        model.export_gguf_adapter(tmp_path / "edit.gguf")
    model.ledger.apply("batch", [WeightDelta("transformer.h.0.mlp.c_proj", "bias", dense=torch.ones(32))], ["edit"])
    with pytest.raises(ExportError, match=r"llama\.cpp does not load adapters with changes of biases"):
        model.export_gguf_adapter(tmp_path / "edit.gguf")
    with pytest.raises(ExportError, match="rank must be"):
        model.export_gguf_adapter(tmp_path / "edit.gguf", rank=0)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("family", "values", "error", "message"),
    [
        ("olmo", {}, UnsupportedModelError, "gemma, gemma2, gemma3_text, gpt2, llama, mistral, qwen2, qwen3"),
        ("llama", {"hidden_act": "gelu"}, ExportError, "no activation 'gelu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            ExportError,
            "dynamic",
        ),
        ("qwen2", {"head_dim": 16}, ExportError, "wider or narrower"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ExportError, "scaled by layers"),
        ("gemma2", {"query_pre_attn_scalar": 5}, ExportError, "width of a head"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7}, ExportError, "another order"),
        ("qwen3", {"attention_bias": True, "head_dim": 8}, ExportError, "no place for"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_models_that_llama_cpp_would_compute_differently(
    family: str, values: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = random_model(family, **values)
    with pytest.raises(error, match=message):
        model.export_gguf(tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_edits_that_are_no_part_of_the_weights(tmp_path: Path) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "grace")
    model.edit(**FACT, show_progress=False)
    with pytest.raises(MergeError):
        model.export_gguf(tmp_path / "model.gguf")
    with pytest.raises(ExportError, match="no changes of weights"):
        model.export_gguf_adapter(tmp_path / "edit.gguf")


def test_a_file_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")
    path = tmp_path / "sub" / "model.gguf"
    model.export_gguf(path)
    old = path.read_bytes()
    with pytest.raises(ExportError, match="dtype must be one of f32, f16, bf16, q8_0"):
        model.export_gguf(path, dtype="q4_0")  # type: ignore[arg-type]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", stop)
        with pytest.raises(KeyboardInterrupt):
            model.export_gguf(path, dtype="f32")
    assert path.read_bytes() == old and [p.name for p in path.parent.iterdir()] == ["model.gguf"]
    module = get_module(model.base_model, "model.layers.0.mlp.down_proj")
    set_weight(module, get_weight(module) + 1)
    model.export_gguf(path)
    assert path.read_bytes() != old
    with pytest.raises(ArtifactError, match="is a folder"):
        model.export_gguf(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        model.export_gguf(tmp_path / "file" / "model.gguf")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest)
    )
    model = random_model("llama")
    for write in (model.export_gguf, model.export_gguf_adapter):
        with pytest.raises(MissingExtraError, match=r"hf_kedit\[gguf\]"):
            write(tmp_path / "model.gguf")
    result = CliRunner().invoke(app, ["export-gguf", "kedit/world-gpt2", "-o", str(tmp_path / "model.gguf")])
    assert result.exit_code == 1 and "hf_kedit[gguf]" in result.stderr


# ---------------------------------------------------------------------- the command


def test_the_command(tmp_path: Path) -> None:
    model = EditableModel.from_pretrained("kedit/world-llama", "rome")
    model.edit(**FACT, show_progress=False)
    model.save_pretrained(tmp_path / "edits")

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["export-gguf", *words])

    whole = run(str(tmp_path / "edits"), "-o", str(tmp_path / "whole.gguf"), "--dtype", "f32")
    assert whole.exit_code == 0 and "FROM ./whole.gguf" in whole.stdout and "1 edit written" in whole.stdout
    read = EditableModel.from_pretrained(tmp_path / "whole.gguf", "rome")
    assert torch.allclose(logits(read, PROBE), logits(model, PROBE), atol=1e-6)
    adapter = run(str(tmp_path / "edits"), "-o", str(tmp_path / "edit.gguf"), "--adapter")
    assert adapter.exit_code == 0 and "FROM ./base.gguf\nADAPTER ./edit.gguf" in adapter.stdout
    report = json.loads(run("kedit/world-llama", "-o", str(tmp_path / "base.gguf"), "-f", "json").stdout)
    assert report["edits"] == 0 and report["dtype"] == "f16" and report["architecture"] == "llama"
    assert report["bytes"] == (tmp_path / "base.gguf").stat().st_size
    wrong = run("kedit/world-llama", "-o", str(tmp_path / "x.gguf"), "--rank", "2")
    assert wrong.exit_code == 2 and "--adapter" in wrong.stderr
    wrong = run("kedit/world-llama", "-o", str(tmp_path / "x.gguf"), "--adapter")
    assert wrong.exit_code == 1 and "no edits" in wrong.stderr
