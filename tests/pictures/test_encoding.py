"""Texts with pictures as inputs of models: what the processor makes of them, where subjects are, how rows are batched.

The reference is the stock call: the processor on one text, the model on what it returns.
"""

from __future__ import annotations

import pytest
import torch
from PIL.Image import Image
from transformers import PreTrainedModel

from hf_kedit import EditRequest, Probe
from hf_kedit.engine.forward import decoder_start, generation_inputs, model_inputs
from hf_kedit.errors import RequestError
from hf_kedit.text.pictures import PicturedText
from hf_kedit.tokens import TokenIds, encode_pair, encode_text, pad_rows, prompt_ids, span_tokens
from tests.seeing import FAMILIES, picture, seeing

SIZES = ((40, 40), (56, 30))


def _requests(processor: object) -> list[EditRequest]:
    asked = [
        EditRequest(prompt="What colour is the box?", subject="box", target_new="red", image=picture(0, *SIZES[0])),
        EditRequest(prompt="Is it big?", target_new="no", image=picture(1, *SIZES[1])),
    ]
    return [request.rendered(processor.tokenizer, processor) for request in asked]  # type: ignore[attr-defined]


def _stock(processor: object, text: str, image: Image) -> dict[str, torch.Tensor]:
    """What the processor itself makes of a question; PaliGemma's ends it with the line break that ours ends with."""
    own = text.removesuffix("\n") if type(processor).__name__.startswith("PaliGemma") else text
    inputs = processor(images=[image], text=own, return_tensors="pt")  # type: ignore[operator]
    inputs.pop("labels", None)
    return dict(inputs)


def _lead(model: PreTrainedModel, rows: int = 1) -> dict[str, torch.Tensor]:
    """What a decoder begins with, of a model that has an encoder, too."""
    both = model.config.is_encoder_decoder
    return {"decoder_input_ids": torch.tensor([[decoder_start(model), 40]] * rows)} if both else {}


@pytest.mark.parametrize("family", FAMILIES)
def test_encoding_is_the_processors(family: str) -> None:
    model, processor = seeing(family)
    tokenizer = processor.tokenizer
    both = model.config.is_encoder_decoder
    for request, size in zip(_requests(processor), SIZES, strict=True):
        stock = _stock(processor, str(request.filled_prompt), picture(SIZES.index(size), *size))
        if both:
            ids = prompt_ids(tokenizer, request.filled_prompt, encoder_decoder=True)
        else:
            pair = encode_pair(tokenizer, request.filled_prompt, request.target_new)
            ids = pair.prompt_ids
            assert tokenizer.decode(list(pair.target_ids)).strip() == request.target_new
        assert list(ids) == stock["input_ids"][0].tolist()
        inputs = model_inputs(model, pad_rows([ids]))
        assert set(stock) <= set(inputs)
        with torch.no_grad():
            ours, theirs = model(**inputs, **_lead(model)).logits, model(**stock, **_lead(model)).logits
            blind = model(**model_inputs(model, pad_rows([list(ids)])), **_lead(model)).logits
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert (ours - blind)[0, -1].abs().max() > 1e-2  # the picture matters
    first = _requests(processor)[0]
    pair = encode_pair(tokenizer, first.filled_prompt, first.target_new)
    begin, end = span_tokens(tokenizer, pair, first.subject_span())
    assert tokenizer.decode(list(pair.ids[begin:end])).strip() == "box"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_different_shapes_are_batched_as_if_alone(family: str, side: str) -> None:
    model, processor = seeing(family)
    both, tokenizer = model.config.is_encoder_decoder, processor.tokenizer
    if both and side == "left":
        pytest.skip("encoders are padded on the right")
    if both:
        rows = [prompt_ids(tokenizer, r.filled_prompt, encoder_decoder=True) for r in _requests(processor)]
    else:
        rows = [encode_pair(tokenizer, r.filled_prompt, r.target_new).ids for r in _requests(processor)]
    rows = [rows[0], encode_text(tokenizer, "only text").ids, rows[1][:-1]]
    batch = pad_rows(rows, side=side)  # type: ignore[arg-type]
    if family == "mllama":
        with pytest.raises(RequestError, match="one batch"):
            model_inputs(model, batch)
        rows[1] = rows[0][:-2]
        batch = pad_rows(rows, side=side)  # type: ignore[arg-type]
    with torch.no_grad():
        together = model(**model_inputs(model, batch), **_lead(model, 3)).logits
        for i, row in enumerate(rows):
            alone = model(**model_inputs(model, pad_rows([row])), **_lead(model)).logits[0]
            start = 0 if both else int(batch.starts[i])
            torch.testing.assert_close(together[i, start : start + len(alone)], alone, atol=2e-5, rtol=1e-4)
        picked = batch.select(torch.tensor([2, 1]))
        again = model(**model_inputs(model, picked), **_lead(model, 2)).logits
        torch.testing.assert_close(again, together[[2, 1]], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_that_of_the_stock_model(family: str) -> None:
    model, processor = seeing(family)
    request = _requests(processor)[1]
    both = model.config.is_encoder_decoder
    ids = prompt_ids(processor.tokenizer, request.filled_prompt, encoder_decoder=both)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    stock = _stock(processor, str(request.filled_prompt), picture(1, *SIZES[1]))
    ours = model.generate(**generation_inputs(model, pad_rows([ids])), **settings)
    assert ours.tolist() == model.generate(**stock, **settings).tolist()


def test_probes_stand_behind_their_own_pictures_or_none() -> None:
    _, processor = seeing("llava")
    request = EditRequest(
        prompt="What is it?",
        target_new="a cat",
        image=picture(0),
        image_rephrase=[picture(4), picture(5)],
        rephrase_prompts=["What do you see?"],
        locality={"image": [Probe("Who is it?", image=picture(3))], "text": [Probe("Who wrote it?")]},
    ).rendered(processor.tokenizer, processor)
    shown = [request.filled_prompt, *request.rephrase_prompts, request.posed("Why?")]
    assert all(isinstance(text, PicturedText) and text.pictures == shown[0].pictures for text in shown)
    assert str(shown[1]) == "<image>\nWhat do you see?"
    (image,), (text,) = request.locality["image"], request.locality["text"]
    assert isinstance(image.prompt, PicturedText) and image.prompt.pictures != shown[0].pictures
    assert text.prompt == "Who wrote it?"
    again = request.repictured_prompts
    assert [str(t) for t in again] == [str(shown[0])] * 2 and len({*again, shown[0]}) == 3


def test_chats_show_their_pictures_where_the_template_puts_them() -> None:
    _, processor = seeing("llava")
    template = (
        "{% for m in messages %}{{ m.role }}:{% for c in m.content %}{% if c.type == 'image' %}<image>"
        "{% else %} {{ c.text }}{% endif %}{% endfor %};{% endfor %}assistant:"
    )
    request = EditRequest(
        prompt="Is the box red?",
        subject="box",
        target_new="no",
        image=picture(0),
        prompt_format="chat",
        locality={"text": [Probe("Who?")]},
    )
    before, processor.chat_template = processor.chat_template, template
    try:
        rendered = request.rendered(processor.tokenizer, processor)
    finally:
        processor.chat_template = before
    assert str(rendered.filled_prompt) == "user:<image> Is the box red?;assistant:"
    assert rendered.locality["text"][0].prompt == "user: Who?;assistant:"
    begin, end = rendered.subject_span()
    assert rendered.filled_prompt[begin:end] == "box"


def test_a_model_of_text_refuses_pictures() -> None:
    _, processor = seeing("llava")
    request = EditRequest(prompt="What is it?", target_new="a cat", image=picture(0), id="x")
    with pytest.raises(RequestError, match="reads no pictures"):
        request.rendered(processor.tokenizer)


def test_more_placeholders_than_pictures_are_an_error_of_the_request() -> None:
    _, processor = seeing("llava")
    request = EditRequest(prompt="<image> and this?", target_new="a cat", image=picture(0))
    with pytest.raises(RequestError, match="LlavaProcessor"):
        encode_text(processor.tokenizer, request.rendered(processor.tokenizer, processor).filled_prompt)


def test_ids_keep_their_pictures_from_the_start_on() -> None:
    ids = TokenIds([5, 6, 7], {"mm_token_type_ids": torch.tensor([[0, 1, 0]]), "pixels": torch.ones(1, 2)}, "key")
    begun = ids[:2]
    assert begun.beside["mm_token_type_ids"].tolist() == [[0, 1]] and begun.beside["pixels"].shape == (1, 2)
    assert type(ids[1:]) is tuple and ids != (5, 6, 7) and ids == TokenIds([5, 6, 7], {}, "key")
