"""Wrapped, quantised and awkward models, overrides, and what is said when a model cannot be understood."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from hf_kedit.anatomy import check_anatomy, resolve_anatomy
from hf_kedit.errors import AnatomyError, LayerError, UnsupportedModelError
from tests.models import HIDDEN, INNER, VOCAB, StandInConfig, StandInModel, randomised, tiny_config, tiny_model
from tests.models import stand_in as remote_stand_in

# ---------------------------------------------------------------------------- wrappers


def test_peft_paths_name_the_module_that_owns_the_weight() -> None:
    base = tiny_model("llama")
    plain = resolve_anatomy(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["down_proj", "q_proj"], init_lora_weights=False))
    anatomy = check_anatomy(model, resolve_anatomy(model))
    assert anatomy.model_class == "LlamaForCausalLM"
    assert anatomy.layers_path == "base_model.model.model.layers"
    down = anatomy.down(1)
    assert down.path == "base_model.model.model.layers.1.mlp.down_proj.base_layer"
    assert down.name == "down_proj"
    assert model.get_submodule(down.path).weight.shape == (HIDDEN, INNER)
    assert [p.name for p in anatomy.layer(1).ups] == ["gate_proj", "up_proj"]
    assert len(anatomy.layer(1).projections) == len(plain.layer(1).projections)  # no LoRA factor among them
    assert anatomy.additive == (True,) * 3
    assert anatomy.logit_lens


def test_peft_on_conv1d() -> None:
    config = LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True)
    model = get_peft_model(tiny_model("gpt2"), config)
    down = check_anatomy(model, resolve_anatomy(model)).down(0)
    assert (down.layout, down.in_features, down.out_features) == ("in_out", 4 * HIDDEN, HIDDEN)
    assert down.path.endswith("mlp.c_proj.base_layer")


def test_peft_with_virtual_tokens() -> None:
    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert check_anatomy(model, resolve_anatomy(model)).additive == (True,) * 3


def test_compiled_model() -> None:
    model = torch.compile(tiny_model("llama"), backend="eager")
    model(torch.tensor([[5, 6]]))  # hooks added after this are not seen by the compiled code
    anatomy = check_anatomy(model, resolve_anatomy(model))
    assert anatomy.down(0).path == "_orig_mod.model.layers.0.mlp.down_proj"
    assert anatomy.additive == (True,) * 3


def test_model_without_head() -> None:
    model = transformers.LlamaModel(tiny_config("llama")).eval()
    anatomy = check_anatomy(model, resolve_anatomy(model))
    assert (anatomy.head, anatomy.layers_path, anatomy.logit_lens) == (None, "layers", None)
    assert "not checked" not in anatomy.describe()


def test_encoder_decoder_inside_an_image_model() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        text_config=tiny_config("t5").to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14, "hidden_act": "gelu"},
        qformer_config={**vision, "encoder_hidden_size": 16, "vocab_size": VOCAB},
    )
    model = randomised(transformers.Blip2ForConditionalGeneration(config))
    anatomy = check_anatomy(model, resolve_anatomy(model))
    assert anatomy.layers_path == "language_model.decoder.block"
    assert anatomy.is_encoder_decoder and anatomy.additive == (True,) * 3


def test_cross_attention_is_not_the_attention() -> None:
    model = tiny_model("gpt2", add_cross_attention=True)
    anatomy = check_anatomy(model, resolve_anatomy(model))
    assert anatomy.layer(0).attention_out is not None
    assert anatomy.layer(0).attention_out.path == "transformer.h.0.attn.c_proj"


def test_meta_device_is_enough_for_the_structure() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2))
    anatomy = resolve_anatomy(model)
    assert anatomy.down(1).in_features == 11008
    with pytest.raises(AnatomyError, match="no weights"):
        check_anatomy(model, anatomy)


class PackedLinear(nn.Module):
    """A linear layer as quantisers make them: sizes as attributes, the weight packed into bytes."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed.reshape(-1, 1), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.view(self.out_features, -1).to(x) * self.scale, self.bias)


def test_quantised_linear() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = PackedLinear(layer.mlp.down_proj)
        layer.mlp.up_proj = PackedLinear(layer.mlp.up_proj)
    anatomy = check_anatomy(model, resolve_anatomy(model))
    assert (anatomy.down(2).in_features, anatomy.down(2).out_features) == (INNER, HIDDEN)
    assert anatomy.additive == (True,) * 3


def test_offloaded_weights_are_read_from_the_map() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny_model("gpt2"), execution_device="cpu")
    assert next(model.transformer.h.parameters()).device.type == "meta"
    anatomy = check_anatomy(model, resolve_anatomy(model))
    assert anatomy.additive == (True,) * 3


# ---------------------------------------------------------------------------- awkward shapes


@pytest.mark.parametrize("family", ["llama", "t5_v1_1", "gpt_neo", "phi3", "opt"])
@pytest.mark.parametrize("inner", [HIDDEN, HIDDEN // 2, 2 * HIDDEN])
def test_inner_size_that_looks_like_the_hidden_size(family: str, inner: int) -> None:
    name = {"t5_v1_1": "d_ff", "opt": "ffn_dim"}.get(family, "intermediate_size")
    anatomy = resolve_anatomy(tiny_model(family))
    model = tiny_model(family, **{name: inner})
    odd = check_anatomy(model, resolve_anatomy(model))
    for i in range(3):
        assert odd.down(i).path == anatomy.down(i).path
        assert [p.path for p in odd.layer(i).ups] == [p.path for p in anatomy.layer(i).ups]
        assert odd.down(i).in_features == inner
        assert odd.layer(i).attention_out == anatomy.layer(i).attention_out
    assert odd.additive == (True,) * 3


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("inner", [HIDDEN, HIDDEN // 2])
def test_experts_with_square_matrices(family: str, inner: int) -> None:
    bank = resolve_anatomy(tiny_model(family, intermediate_size=inner)).layer(0).experts
    assert bank is not None
    assert (bank.down_param, bank.in_features, bank.transposed) == ("down_proj", inner, family == "gpt_oss")


def test_experts_without_declared_layout() -> None:
    """Old code does not say how it stores its experts: the axis that equals H does."""
    model = tiny_model("gpt_oss")
    for layer in model.model.layers:
        for flag in ("is_transposed", "has_gate", "is_concatenated"):
            delattr(layer.mlp.experts, flag)
    bank = resolve_anatomy(model).layer(0).experts
    assert bank is not None and bank.transposed and bank.gated and bank.down_param == "down_proj"


def test_vision_tower_of_the_same_depth_is_not_taken() -> None:
    model = tiny_model("llava")
    assert len(model.model.vision_tower.encoder.layers) == 3
    assert resolve_anatomy(model).layers_path == "model.language_model.layers"


def test_list_of_cross_attention_blocks_is_not_taken() -> None:
    config = transformers.IdeficsConfig(num_hidden_layers=2, cross_layer_interval=1)
    with torch.device("meta"):
        model = transformers.IdeficsForVisionText2Text(config)
    assert len(model.model.gated_cross_attn_layers) == 2
    # Whichever is registered first.
    model.model._modules["layers"] = model.model._modules.pop("layers")
    assert resolve_anatomy(model).layers_path == "model.layers"


def test_encoder_stack() -> None:
    model = tiny_model("t5")
    anatomy = check_anatomy(model, resolve_anatomy(model, stack="encoder"))
    assert (anatomy.layers_path, anatomy.num_layers) == ("encoder.block", 2)
    assert anatomy.down(1).path == "encoder.block.1.layer.1.DenseReluDense.wo"
    assert anatomy.final_norm == "encoder.final_layer_norm"
    assert anatomy.additive == (True, True)
    with pytest.raises(AnatomyError, match="one stack only"):
        resolve_anatomy(tiny_model("gpt2"), stack="encoder")


# ---------------------------------------------------------------------------- messages


def test_layer_out_of_range() -> None:
    anatomy = resolve_anatomy(tiny_model("gpt2"))
    for index in (3, -1, "1", True):
        with pytest.raises(LayerError, match="valid are 0 to 2"):
            anatomy.layer(index)  # type: ignore[arg-type]
    with pytest.raises(LayerError, match="valid are 0 to 2"):
        anatomy.down(7)


def test_no_down_projection_in_a_mixture_of_experts() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        resolve_anatomy(tiny_model("mixtral")).down(1)
    assert "layer 1" in str(error.value) and "mixture of experts" in str(error.value)
    assert "model.layers.1.mlp.experts.down_proj (4 experts, 24 -> 32" in str(error.value)
    assert "model.layers.1.self_attn.o_proj (32 -> 32" in str(error.value)


def test_hybrid_model_has_layers_without_mlp() -> None:
    config = transformers.NemotronHConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layers_block_type=["mamba", "mlp", "attention", "mlp"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
    )
    model = randomised(transformers.NemotronHForCausalLM(config))
    anatomy = check_anatomy(model, resolve_anatomy(model))
    assert [layer.down is not None for layer in anatomy.layers] == [False, True, False, True]
    assert anatomy.additive == (False, True, False, True)
    assert anatomy.layer(2).attention_out is not None and anatomy.layer(0).attention_out is None
    with pytest.raises(UnsupportedModelError, match=r"layer 0 .* has no MLP\. Layers with one: 1, 3\."):
        anatomy.down(0)


def test_state_space_model_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=4)
    with pytest.raises(UnsupportedModelError, match="no layer of MambaForCausalLM") as error:
        resolve_anatomy(transformers.MambaForCausalLM(config))
    assert "backbone.layers.0.mixer.in_proj" in str(error.value)


def test_rwkv_is_refused() -> None:
    config = transformers.RwkvConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, attention_hidden_size=HIDDEN, num_hidden_layers=2
    )
    with pytest.raises(UnsupportedModelError, match="RwkvForCausalLM"):
        resolve_anatomy(transformers.RwkvForCausalLM(config))


def test_separate_lists_of_attentions_and_mlps_are_refused() -> None:
    config = transformers.XLMConfig(vocab_size=VOCAB, emb_dim=HIDDEN, n_layers=3, n_heads=4)
    with pytest.raises(AnatomyError, match=r"transformer\.attentions, transformer\.ffns"):
        resolve_anatomy(transformers.XLMWithLMHeadModel(config))


def test_names_that_only_contain_the_letters_of_a_mixer() -> None:
    """SeedOssMLP, lower-cased, contains 'ssm'; RecurrentGemmaMlp is a plain MLP."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    seed = resolve_anatomy(transformers.SeedOssForCausalLM(transformers.SeedOssConfig(**sizes, head_dim=8)))
    assert seed.down(0).path == "model.layers.0.mlp.down_proj"
    with torch.device("meta"):
        recurrent = transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(num_hidden_layers=3))
    assert [resolve_anatomy(recurrent).down(i).name for i in range(3)] == ["down_proj"] * 3


def test_a_model_without_blocks() -> None:
    class Bag(StandInModel):
        layout = LAYOUT

    model = Bag(StandInConfig())
    model.blocks = nn.ModuleList()
    with pytest.raises(AnatomyError, match=r"no list of 3 blocks found in Bag.*override 'layers'"):
        resolve_anatomy(model)


# ---------------------------------------------------------------------------- overrides


def test_overrides_take_precedence_and_the_rest_is_filled_in() -> None:
    model = remote_stand_in("qwen1")
    overrides = {
        "layers": "transformer.h",
        "down": "transformer.h.{}.mlp.c_proj",
        "up": "transformer.h.{}.mlp.w2, transformer.h.{}.mlp.w1",
        "gate": "transformer.h.{}.mlp.w2",
        "attn_out": "transformer.h.{}.attn.c_proj",
        "final_norm": "transformer.ln_f",
        "embed": "transformer.wte",
        "head": "lm_head",
        "layout": "out_in",
    }
    anatomy = check_anatomy(model, resolve_anatomy(model, overrides))
    layer = anatomy.layer(2)
    assert [p.path for p in layer.ups] == ["transformer.h.2.mlp.w2", "transformer.h.2.mlp.w1"]
    assert layer.gate is not None and layer.gate.path == "transformer.h.2.mlp.w2"
    assert layer.gated and not layer.fused and layer.mlp == "transformer.h.2.mlp"
    only = resolve_anatomy(model, {"gate": "transformer.h.{}.mlp.w2"})
    assert only.down(0) == anatomy.down(0) and only.head == "lm_head"


def test_override_another_down_projection() -> None:
    model = tiny_model("qwen2_moe")
    anatomy = resolve_anatomy(model, {"down": "model.layers.{}.self_attn.o_proj"})
    assert anatomy.down(1).path == "model.layers.1.self_attn.o_proj"
    assert anatomy.layer(1).ups == ()
    # What attention adds is read by the MLP of the same block, so the block moves by more than that.
    assert check_anatomy(model, anatomy).additive == (False,) * 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"donw": "x"}, "unknown override 'donw'.*Did you mean 'down'"),
        ({"down": "model.layers.0.mlp.down_proj"}, "needs {}"),
        ({"down": "model.layers.{}.mlp.down_porj"}, "Did you mean 'model.layers.0.mlp.down_proj'"),
        ({"down": "model.layers.{}.mlp"}, "not one matrix. Matrices inside it: model.layers.0.mlp.gate_proj"),
        ({"layers": "model.layer"}, "no module 'model.layer'. Did you mean 'model.layers'"),
        ({"layers": "model.norm"}, "not a list of blocks"),
        ({"head": "lm_haed"}, "Did you mean 'lm_head'"),
        ({"final_norm": "model.nrom"}, "Did you mean 'model.norm'"),
        ({"embed": "model.embed"}, "Did you mean 'model.embed_tokens'"),
        ({"layout": "transposed"}, "must be 'out_in'"),
        ({"head": ""}, "must be a module name"),
    ],
)
def test_wrong_overrides(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(AnatomyError, match=message):
        resolve_anatomy(tiny_model("llama"), overrides)


# ---------------------------------------------------------------------------- for people and files


def test_describe_and_to_dict() -> None:
    model = tiny_model("deepseek_v3")
    anatomy = resolve_anatomy(model)
    text = anatomy.describe()
    assert "DeepseekV3ForCausalLM (deepseek_v3): 3 layers of width 32 in model.layers" in text
    assert "mlp.down_proj [80->32]" in text and "1-2" in text and "not checked" in text
    assert "additive" in check_anatomy(model, anatomy).describe()
    data = json.loads(json.dumps(anatomy.to_dict()))
    assert data["layers"][0]["down"]["path"] == "model.layers.0.mlp.down_proj"
    assert data["additive"] is None


def test_granite_is_described_as_scaled() -> None:
    model = tiny_model("granite")
    assert "scaled by 0.22" in check_anatomy(model, resolve_anatomy(model)).describe()


LAYOUT = {
    "embed": "embed",
    "layers": "blocks",
    "norm": "norm",
    "head": "head",
    "attention": ("attn", "qkv", "proj"),
    "mlp": (["up", "gate"], "down"),
}


def test_one_block_used_as_several_layers_is_refused() -> None:
    class OneBlock(StandInModel):
        layout = LAYOUT

    model = OneBlock(StandInConfig())
    model.blocks = nn.ModuleList([model.blocks[0]] * 3)
    with pytest.raises(UnsupportedModelError, match="same block several times"):
        resolve_anatomy(model)


def test_blocks_that_run_several_times_are_not_called_additive(caplog: pytest.LogCaptureFixture) -> None:
    class Twice(StandInModel):
        layout = LAYOUT

        def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:
            for block in self.blocks:  # a first round of thinking, thrown away
                block(self.embed(input_ids))
            return super().forward(input_ids)

    model = randomised(Twice(StandInConfig()))
    with caplog.at_level("WARNING", logger="hf_kedit"):
        anatomy = check_anatomy(model, resolve_anatomy(model))
    assert anatomy.additive == (False,) * 3 and anatomy.residual_scale == (None,) * 3
    assert "2 times in one forward pass" in caplog.text
