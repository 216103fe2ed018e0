"""DoLa and DeCo against an explicit loop without cache, written beside the papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_kedit.anatomy import resolve_anatomy
from hf_kedit.decoding import DeCoConfig, DoLaConfig, decode_with, decoding_of
from hf_kedit.engine.forward import frozen_eval, generating
from hf_kedit.errors import ConfigError, LayerError, UnsupportedModelError
from tests.models import FAMILIES, tiny_model

DECODERS = [name for name in FAMILIES if name not in ("t5", "t5_v1_1", "bart", "blip2")]
SETTINGS = [
    DoLaConfig(),
    DoLaConfig("low", alpha=0.3),
    DoLaConfig([1], early_norm=True),
    DoLaConfig([0, 1, 2], early_norm=True, divergence="released"),
    DeCoConfig(),
    DeCoConfig([0, 1, 2], weight=2.0, top_p=0.5, top_k=5),
]


def after_head(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """What the three kinds of models do to their logits, by name of the model."""
    kind, config = model.config.model_type, model.config.get_text_config(decoder=True)
    if kind == "granite":
        return logits / config.logits_scaling
    if kind == "cohere":
        return logits * config.logit_scale
    if kind == "gemma2":
        return config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
    return logits


def next_scores(model: Any, norm: Any, ids: torch.Tensor, mask: torch.Tensor, settings: Any, layers: list[int]) -> Any:
    """Scores of the next token of every row, from all hidden states; ``[rows, vocab]``."""
    with torch.no_grad():
        out = model(
            ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), output_hidden_states=True
        )
    final = out.logits[:, -1].double()
    early = []
    for layer in layers:
        state = out.hidden_states[layer][:, -1]
        with torch.no_grad():
            state = norm(state) if isinstance(settings, DeCoConfig) or settings.early_norm else state
            early.append(after_head(model, model.get_output_embeddings()(state)).double())
    rows = []
    if isinstance(settings, DeCoConfig):
        for row, z in enumerate(final):
            kept, total = [], 0.0
            for p, token in sorted(zip(z.softmax(-1).tolist(), range(len(z)), strict=True), reverse=True):
                if total >= settings.top_p or len(kept) == settings.top_k:
                    break
                kept.append(token)
                total += p
            sure = {(i, x): early[i][row].softmax(-1)[x].item() for i in range(len(layers)) for x in kept}
            (best, _), weight = max(sure.items(), key=lambda item: item[1])
            score = torch.full_like(z, -math.inf)
            score[kept] = (z + settings.weight * weight * early[best][row])[kept]
            rows.append(score)
        return torch.stack(rows)
    distances = []
    for z in early:
        p, q = final.softmax(-1), z.softmax(-1)
        m = (p + q) / 2
        if settings.divergence == "released":
            kl = (m * (m / p).log()).mean(-1) + (m * (m / q).log()).mean(-1)
        else:
            kl = (p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)
        distances.append(kl / 2)
    apart = torch.stack(distances)
    for row, z in enumerate(final):
        best = int((apart.mean(1) if settings.divergence == "released" else apart[:, row]).argmax())
        score = z.log_softmax(-1) - early[best][row].log_softmax(-1)
        score[z.softmax(-1) < settings.alpha * z.softmax(-1).max()] = -math.inf
        rows.append(score)
    return torch.stack(rows)


def by_hand(model: Any, ids: torch.Tensor, mask: torch.Tensor, settings: Any, steps: int, penalty: float = 1.0) -> Any:
    """Greedy decoding, the whole text anew for every token."""
    where = resolve_anatomy(model)
    norm = model.get_submodule(where.final_norm)
    layers = settings.premature_layers(where.num_layers, where.head_tied)
    for _ in range(steps):
        scores = next_scores(model, norm, ids, mask, settings, layers)
        if penalty != 1:
            seen = scores.gather(1, ids)
            scores = scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


def batch(rows: int = 3, width: int = 7, padded: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 400, (rows, width), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            ids[row, :row], mask[row, :row] = 0, 0
    return ids, mask


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> torch.Tensor:
    found = model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, **more)
    assert isinstance(found, torch.Tensor)
    return found


def no_end(model: Any) -> Any:
    model.generation_config.eos_token_id = None  # so that every row writes to the end
    return model


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_family_writes_what_the_explicit_loop_writes(family: str) -> None:
    model = no_end(tiny_model(family))
    ids, mask = batch()
    for settings in (DoLaConfig([0, 2]), DeCoConfig([1, 2], weight=3.0)):
        with decode_with(model, settings):
            found = generate(model, ids, mask)
        assert found.tolist() == by_hand(model, ids, mask, settings, 5).tolist()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_settings_and_cache(settings: Any, use_cache: bool) -> None:
    model = no_end(tiny_model("llama"))
    ids, mask = batch()
    with decode_with(model, settings):
        found = generate(model, ids, mask, use_cache=use_cache)
    assert found.tolist() == by_hand(model, ids, mask, settings, 5).tolist()


@pytest.mark.parametrize("settings", [DoLaConfig([1, 2]), DeCoConfig([1, 2], weight=2.0)], ids=str)
def test_left_padding_and_a_penalty_on_repetition(settings: Any) -> None:
    model = no_end(tiny_model("qwen3"))
    ids, mask = batch(padded=True)
    with decode_with(model, settings):
        plain = generate(model, ids, mask)
        penalised = generate(model, ids, mask, repetition_penalty=1.7)
    assert plain.tolist() == by_hand(model, ids, mask, settings, 5).tolist()
    assert penalised.tolist() == by_hand(model, ids, mask, settings, 5, penalty=1.7).tolist()


def test_beams_take_the_most_probable_pair_of_tokens() -> None:
    model = no_end(tiny_model("llama"))
    settings = DeCoConfig([1, 2], top_k=4, top_p=1.0)
    ids, mask = batch(rows=1)
    with decode_with(model, settings):
        found = model.generate(ids, attention_mask=mask, max_new_tokens=2, num_beams=4, do_sample=False)
    norm = model.get_submodule(resolve_anatomy(model).final_norm)
    first = next_scores(model, norm, ids, mask, settings, [1, 2])[0].log_softmax(-1)
    pairs = {}
    for a in first.topk(4).indices.tolist():
        longer = torch.cat([ids, torch.tensor([[a]])], 1)
        second = next_scores(model, norm, longer, torch.ones_like(longer), settings, [1, 2])[0].log_softmax(-1)
        for b in second.topk(4).indices.tolist():
            pairs[a, b] = (first[a] + second[b]).item()
    assert tuple(found[0, -2:].tolist()) == max(pairs, key=pairs.__getitem__)


def test_sampling_never_leaves_the_candidates() -> None:
    model = no_end(tiny_model("llama"))
    ids, mask = batch(rows=1)
    with decode_with(model, "deco", top_k=1):
        torch.manual_seed(0)
        drawn = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=True, temperature=50.0)
    assert drawn.tolist() == generate(model, ids, mask).tolist()  # one candidate is the greedy answer


def test_scores_of_chosen_positions_are_those_of_all_positions() -> None:
    model = tiny_model("llama")
    ids, mask = batch()
    with torch.no_grad(), decode_with(model, "dola"):
        everywhere = model(ids, attention_mask=mask).logits
        last = model(ids, attention_mask=mask, logits_to_keep=2).logits
        some = model(ids, attention_mask=mask, logits_to_keep=torch.tensor([1, 4])).logits
        as_tuple = model(ids, attention_mask=mask, return_dict=False)[0]
    assert everywhere.isinf().any() and torch.equal(everywhere, as_tuple)
    torch.testing.assert_close(last, everywhere[:, -2:])
    torch.testing.assert_close(some, everywhere[:, [1, 4]])


def test_behind_the_block_the_model_is_as_before_whatever_happened() -> None:
    model = tiny_model("gpt2")
    ids, _ = batch()
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    before = model(ids).logits
    with pytest.raises(ZeroDivisionError), decode_with(model, "dola"):
        assert not torch.equal(model(ids).logits, before)
        with frozen_eval(model):  # where models are measured, their own logits are
            assert torch.equal(model(ids).logits, before)
            with generating():
                assert not torch.equal(model(ids).logits, before)
            assert torch.equal(model(ids).logits, before)
        raise ZeroDivisionError
    assert torch.equal(model(ids).logits, before)
    assert hooks == {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}


def test_what_cannot_be_combined_is_refused() -> None:
    model = no_end(tiny_model("llama"))
    ids, mask = batch(rows=1)
    with decode_with(model, "dola"):
        with pytest.raises(ConfigError, match="loss"):
            model(ids, labels=ids)
        with pytest.raises(ConfigError, match="compiled"):
            generate(model, ids, mask, cache_implementation="static")
        with pytest.raises(ConfigError, match="assisted"):
            model.generate(torch.cat([ids, ids], 1), max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
        with pytest.raises(ConfigError, match="assisted"):
            model.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=no_end(tiny_model("llama", seed=3)))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        decode_with(tiny_model("t5"), "dola")


def test_a_model_that_does_something_unknown_to_its_logits_is_refused() -> None:
    model = tiny_model("llama")
    plain = type(model).forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.__class__ = type("Doubled", (type(model),), {"forward": doubled})
    with decode_with(model, "dola"), pytest.raises(UnsupportedModelError, match="not known"):
        model(torch.tensor([[5, 6, 7]]))


@pytest.mark.parametrize(
    "depth, tied, layers, expected",
    [
        (32, False, "high", list(range(16, 32, 2))),  # the paper's buckets for LLaMA-7B, 13B, 30B
        (32, False, "low", list(range(0, 16, 2))),
        (40, False, "high", list(range(20, 40, 2))),
        (60, False, "high", list(range(40, 60, 2))),
        (60, False, "low", list(range(0, 20, 2))),
        (30, True, "low", [2, 4, 6, 8, 10, 12, 14]),
        (4, True, "low", [2]),
        (2, True, "low", [1]),
        (1, True, "low", [0]),
    ],
)
def test_buckets_of_layers(depth: int, tied: bool, layers: Any, expected: list[int]) -> None:
    assert DoLaConfig(layers).premature_layers(depth, tied) == expected


def test_deco_looks_at_the_layers_of_the_paper() -> None:
    assert DeCoConfig().premature_layers(32, False) == list(range(20, 29))
    assert DeCoConfig().premature_layers(2, False) == [1]
    assert DeCoConfig().premature_layers(1, False) == [0]


@pytest.mark.parametrize(
    "name, settings",
    [
        ("dolla", {}),
        ("dola", {"layer": "high"}),
        ("dola", {"layers": "middle"}),
        ("dola", {"layers": []}),
        ("dola", {"layers": [True]}),
        ("dola", {"alpha": 0}),
        ("dola", {"alpha": math.nan}),
        ("dola", {"divergence": "kl"}),
        ("dola", {"early_norm": "yes"}),
        ("deco", {"weight": -1.0}),
        ("deco", {"weight": math.inf}),
        ("deco", {"top_p": 1.5}),
        ("deco", {"top_k": 0}),
        ("deco", {"layers": "high"}),
    ],
)
def test_bad_settings_are_config_errors(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        decoding_of(name, **settings)


def test_a_layer_that_does_not_exist() -> None:
    with pytest.raises(LayerError, match=r"0 .* to 2"):
        decode_with(tiny_model("llama"), "dola", layers=[3])
