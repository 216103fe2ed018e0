"""Edits in prompts are found by their pictures, too, and demonstrations bring pictures of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest, IKEConfig, PromptConfig
from hf_kedit.books.call_rows import CallRows
from hf_kedit.engine.forward import generation_inputs, image_ids
from hf_kedit.errors import ArtifactError, UnsupportedModelError
from hf_kedit.evaluation.asking.generation import generate_answers
from hf_kedit.evaluation.asking.scoring import score_pairs
from hf_kedit.methods.ike import COPY, RETAIN, UPDATE, demonstrations_of
from hf_kedit.text.pictures import Picture, PicturedText
from hf_kedit.text.processors import picture_frame, takes_several
from hf_kedit.tokens import encode_text, joined_ids, pad_rows
from tests.seeing import picture, seeing

FAMILIES = (
    "llava llava_onevision qwen2_vl qwen2_5_vl qwen3_vl blip2 instructblip llava_next gemma3 idefics3 internvl mllama"
)
QUESTION = "What is in this box?"
SIZES = ((40, 40), (56, 30), (90, 28))


def asked(processor: Any, image: Any, text: str = QUESTION) -> PicturedText:
    prompt = EditRequest(prompt=text, target_new="x", image=image).rendered(processor.tokenizer, processor)
    assert isinstance(prompt.filled_prompt, PicturedText)
    return prompt.filled_prompt


def losses(model: EditableModel, prompts: list[str], targets: list[str]) -> list[float]:
    pairs = list(zip(prompts, targets, strict=True))
    return [s.nll for s in score_pairs(model, model.tokenizer, pairs, separator="")]


@pytest.mark.parametrize("family", FAMILIES.split())
def test_the_same_words_about_another_picture_are_another_question(family: str) -> None:
    model, processor = seeing(family)
    edited = EditableModel(model, PromptConfig(image_threshold=0.999), processor)
    first, second = picture(0), picture(7, 56, 30)
    prompts = [asked(processor, first), asked(processor, second)]
    before = [losses(edited, [p], ["r"])[0] for p in prompts]
    texts = generate_answers(edited, edited.tokenizer, [prompts[1]], 4)
    edited.edit(prompt=QUESTION, target_new="r", image=first, show_progress=False)
    assert [c is not None for c in edited.prompts.choose([*prompts, QUESTION])] == [True, False, False]
    together = losses(edited, prompts, ["r", "r"])  # one batch
    assert together[0] != pytest.approx(before[0], abs=1e-3) and together[1] == pytest.approx(before[1], abs=1e-4)
    assert losses(edited, prompts[1:], ["r"])[0] == pytest.approx(before[1], abs=1e-5)
    assert [t.ids for t in generate_answers(edited, edited.tokenizer, [prompts[1]], 4)] == [t.ids for t in texts]


def test_the_nearest_picture_answers_and_looks_are_saved(tmp_path: Path) -> None:
    model, processor = seeing("llava")
    edited = EditableModel(model, PromptConfig(image_threshold=-1.0), processor)
    for seed, target in ((0, "a"), (1, "b"), (2, "c")):
        edited.edit(prompt=QUESTION, target_new=target, image=picture(seed), show_progress=False)
    edited.edit(prompt=QUESTION, target_new="d", show_progress=False)  # of text: its words alone count
    noise = Picture.of(picture(1)).image.resize((38, 38))

    def chosen(of: EditableModel) -> list[str]:
        found = of.prompts.choose([asked(processor, noise), asked(processor, picture(2)), QUESTION])
        return [entry.fact.split("\n")[0][-1] for entry, _ in filter(None, found)]

    assert chosen(edited) == ["b", "c", "d"]
    edited.save_pretrained(tmp_path)
    again = EditableModel.from_pretrained(tmp_path, base_model=seeing("llava")[0], processor=processor)
    assert chosen(again) == ["b", "c", "d"]
    assert all(
        (a.look is None and b.look is None) or torch.equal(a.look, b.look)  # type: ignore[arg-type]
        for a, b in zip(edited.prompts.entries, again.prompts.entries, strict=True)
    )
    always = EditableModel(seeing("llava")[0], PromptConfig(scope="always"), processor)
    always.edit(prompt=QUESTION, target_new="a", image=picture(0), show_progress=False)
    assert always.prompts.choose([asked(processor, picture(5))]) != [None]


def record(seed: int, answer: str) -> dict[str, Any]:
    width, height = SIZES[seed % len(SIZES)]
    return {
        "prompt": f"What is on page {seed}?",
        "target_new": answer,
        "image": Picture.of(picture(seed, width, height)).uri,
        "rephrase_prompts": [f"And page {seed}?"],
        "locality": {
            "a": [{"prompt": "Is it?", "ground_truth": "no", "image": Picture.of(picture(50)).uri}],
            "b": [{"prompt": "Who is it?", "ground_truth": "he"}],
        },
    }


def test_demonstrations_stand_behind_their_pictures() -> None:
    _, processor = seeing("llava")
    request = EditRequest(**record(3, "z"))
    shown = EditRequest(**record(3, "z"), frame=picture_frame(processor, [Picture.of(picture(3))]))
    plain, pictured = demonstrations_of(request), demonstrations_of(shown)
    assert set(plain) == set(pictured) == {COPY, UPDATE, RETAIN} and "Who is it? he" in plain[RETAIN]
    for kind, text in pictured.items():  # what is asked about another picture is no demonstration
        assert isinstance(text, PicturedText) and str(text) == "<image>\n" + plain[kind]
        assert text.pictures == (Picture.of(picture(3)),)


@pytest.mark.parametrize("family", [f for f in FAMILIES.split() if f not in ("blip2", "instructblip", "mllama")])
def test_pictures_of_demonstrations_go_into_the_prompt(family: str) -> None:
    """The reference is the stock model, given the processor's own reading of all pictures and texts in their order."""
    model, processor = seeing(family)
    assert takes_several(processor)
    config = IKEConfig(demonstrations=[record(1, "y"), record(2, "z")], k=2, image_threshold=0.999)
    edited = EditableModel(model, config, processor)
    edited.edit(prompt=QUESTION, target_new="r", image=picture(0), show_progress=False)
    (entry,) = edited.prompts.entries
    assert len(entry.demonstrations) == 3 and all(isinstance(d, PicturedText) for d in entry.demonstrations)
    prompts = [asked(processor, picture(0)), asked(processor, picture(7, 56, 30)), QUESTION]
    mine = asked(processor, picture(0), entry.fact + QUESTION)
    parts = [encode_text(processor.tokenizer, d).ids for d in (*entry.demonstrations, mine)]
    start = int(parts[0][0] == processor.tokenizer.bos_token_id)
    whole = joined_ids([parts[0], *(p.behind(start) for p in parts[1:])])  # type: ignore[attr-defined]
    with edited.disable_edits(), torch.no_grad():
        given = generation_inputs(model, pad_rows([whole]))
        nll = -model(**given).logits[0, -1].log_softmax(-1)
        others = losses(edited, prompts[1:], ["r", "r"])
    (letter,) = processor.tokenizer("r", add_special_tokens=False)["input_ids"]
    assert losses(edited, prompts[:1], ["r"])[0] == pytest.approx(float(nll[letter]), abs=1e-3)
    both = losses(edited, prompts, ["r"] * 3)  # in one batch, each row with its own
    assert both == pytest.approx([float(nll[letter]), *others], abs=1e-3)
    said = generate_answers(edited, edited.tokenizer, prompts, 3)
    alone = [generate_answers(edited, edited.tokenizer, [p], 3)[0] for p in prompts]
    assert [t.ids for t in said] == [t.ids for t in alone]
    assert said[0].ids[0] == int(nll.argmin())


@pytest.mark.parametrize("family", ["blip2", "mllama"])
def test_where_one_picture_is_the_most_demonstrations_are_text(family: str) -> None:
    model, processor = seeing(family)
    edited = EditableModel(model, IKEConfig(demonstrations=[record(1, "y"), record(2, "z")], k=2), processor)
    edited.edit(prompt=QUESTION, target_new="r", image=picture(0), show_progress=False)
    (entry,) = edited.prompts.entries
    assert len(entry.demonstrations) == 3 and not any(isinstance(d, PicturedText) for d in entry.demonstrations)


def test_a_fact_of_text_has_demonstrations_of_text_and_pictures_are_saved(tmp_path: Path) -> None:
    model, processor = seeing("qwen2_vl")
    edited = EditableModel(model, IKEConfig(demonstrations=[record(1, "y"), record(2, "z")], k=1), processor)
    edited.edit(prompt="Who is it?", target_new="r", show_progress=False)
    edited.edit(prompt=QUESTION, target_new="r", image=picture(0), show_progress=False)
    kinds = [[isinstance(d, PicturedText) for d in e.demonstrations] for e in edited.prompts.entries]
    assert kinds == [[False, False], [True, True]]
    edited.save_pretrained(tmp_path)
    loaded = EditableModel.from_pretrained(tmp_path, base_model=seeing("qwen2_vl")[0], processor=processor)
    assert [e.demonstrations for e in loaded.prompts.entries] == [e.demonstrations for e in edited.prompts.entries]
    prompt = [asked(processor, picture(0))]
    assert losses(loaded, prompt, ["r"]) == losses(edited, prompt, ["r"])
    with pytest.raises(ArtifactError, match="prompt"):
        EditableModel.from_pretrained(tmp_path, base_model=seeing("qwen2_vl")[0], tokenizer=processor.tokenizer)


@pytest.mark.parametrize("family", FAMILIES.split())
def test_the_pictures_of_a_call_are_shared_out_among_its_rows(family: str) -> None:
    model, processor = seeing(family)
    tokenizer = processor.tokenizer
    sizes = SIZES if family != "mllama" else SIZES[:1] * 3
    rows = [encode_text(tokenizer, asked(processor, picture(i, *size))).ids for i, size in enumerate(sizes)]
    if family not in ("mllama", "idefics3"):  # whose batches have pictures in every row
        rows.insert(1, encode_text(tokenizer, "a text").ids)
    found = CallRows.read(generation_inputs(model, pad_rows(rows)))
    assert found is not None
    for own, row in zip(found.apart(image_ids(model)), rows, strict=True):
        expected = getattr(row, "beside", {})
        for name, tensor in expected.items():
            mine = own.beside[name][tuple(map(slice, tensor.shape))]
            assert torch.allclose(mine.float(), tensor.float()), name
        assert tuple(own) == tuple(row)
        assert {n for n in own.beside if "pixel" in n} == {n for n in expected if "pixel" in n}
    found.pictures["pixel_values"] = torch.cat([found.pictures["pixel_values"]] * 7)[:-1]
    with pytest.raises(UnsupportedModelError, match="one by one"):
        found.apart(image_ids(model))
