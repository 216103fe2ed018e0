"""The scenario of models that see: its numbers, computed here once more with nothing but transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, evaluate_edits, load_edit_dataset
from hf_kedit.errors import EvaluationError, RequestError
from hf_kedit.evaluation import load_scenario
from hf_kedit.evaluation.asking.ranked import Ranked, ranked_predictions
from hf_kedit.evaluation.protocols.base import Question
from hf_kedit.evaluation.scenarios.pictures import PICTURES, Pictures, RankedLocality, picture_questions
from hf_kedit.requests import EditRequest, Probe, load_requests

SAMPLES = Path(__file__).parents[2] / "data" / "samples"


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return EditableModel.from_pretrained("kedit/world-pictures", "ft-m")


@pytest.fixture(scope="module")
def requests() -> list[EditRequest]:
    return load_requests(load_edit_dataset("world-pictures", limit=3))


def logits(model: EditableModel, image: Any, prompt: str, answer: str) -> tuple[torch.Tensor, list[int], list[int]]:
    """Logits at all positions, all ids, and those of the answer: transformers and the processor alone."""
    processor = model.processor
    text = f"<image>\n{prompt} {answer}" if image is not None else f"{prompt} {answer}"
    inputs = processor(images=None if image is None else [image.image], text=text, return_tensors="pt")
    with torch.no_grad():
        out = model.base_model(**inputs).logits[0]
    return (
        out,
        inputs["input_ids"][0].tolist(),
        processor.tokenizer(" " + answer, add_special_tokens=False)["input_ids"],
    )


def right_tokens(model: EditableModel, image: Any, prompt: str, answer: str) -> float:
    out, ids, wanted = logits(model, image, prompt, answer)
    assert ids[-len(wanted) :] == wanted
    said = out[-len(wanted) - 1 : -1].argmax(-1).tolist()
    return sum(a == b for a, b in zip(said, wanted, strict=True)) / len(wanted)


def test_the_numbers_before_the_edit_are_those_of_transformers(
    model: EditableModel, requests: list[EditRequest]
) -> None:
    report = evaluate_edits(model, requests, scenario=load_scenario("pictures", generated=False), progress=False)
    for case, request in zip(report.chosen("pictures"), requests, strict=True):
        numbers, scores = case.pre.numbers[PICTURES], case.pre.scores
        answer = request.target_new
        assert scores["rewrite"][None] == [right_tokens(model, request.image, request.prompt, answer)]
        assert numbers["m_generality"] == [right_tokens(model, request.image_rephrase, request.prompt, answer)]
        assert scores["rephrase"][None] == [
            right_tokens(model, request.image, text, answer) for text in request.rephrase_prompts
        ]
        for axis, probes in request.portability.items():
            assert scores["portability"][axis] == [
                right_tokens(model, p.image, p.prompt, p.answers[0]) for p in probes
            ]
        assert "m_locality" not in numbers and set(case.post.numbers[PICTURES]) >= {"m_locality", "t_locality"}


def test_after_the_edits(model: EditableModel, requests: list[EditRequest]) -> None:
    """In sequence, kept: the numbers after it are those of the model as it then is."""
    (unrelated,) = requests[0].locality["multimodal"][:1]
    before = logits(model, unrelated.image, unrelated.prompt, unrelated.answers[0])[0]
    try:
        report = evaluate_edits(model, requests, "sequential", scenario="pictures", progress=False, keep_edits=True)
        case = report.chosen("pictures")[0]
        request = requests[0]
        now = right_tokens(model, request.image, request.prompt, request.target_new)
        assert case.post.scores["rewrite"][None] == [now]
        out, _, wanted = logits(model, unrelated.image, unrelated.prompt, unrelated.answers[0])
        at = slice(-len(wanted) - 1, -1)
        same = (out[at].argmax(-1) == before[at].argmax(-1)).float().mean().item()
        assert case.post.numbers[PICTURES]["m_locality"][0] == pytest.approx(same)
        written = report.chosen("pictures_generated")[0]
        assert set(written.post.numbers[PICTURES]) == {"m_generality", "m_locality", "t_locality"}
        assert all("." not in text["post"] for text in written.texts)  # an answer ends at its full stop
    finally:
        model.rollback("all")


def test_which_probes_count() -> None:
    """Axes of the published names; without them, whether a probe has a picture decides."""
    seen, unseen = Probe("a", ["x"], image="p.png"), Probe("b", ["y"])

    def counted(**locality: list[Probe]) -> dict[str, list[str]]:
        request = EditRequest("q", target_new="z", image="p.png", locality=locality)
        found: dict[str, list[str]] = {}
        for question in picture_questions(request):
            found.setdefault(str(question.axis), []).append(question.prompt)
        return found

    assert counted(Other=[seen, unseen]) == {"t_locality": ["b"], "m_locality": ["a"]}
    named = counted(text=[unseen], multimodal=[seen], Same_Question=[Probe("c", ["x"], image="p.png")])
    assert named == {"t_locality": ["b"], "m_locality": ["a"]}


def test_ranked_ids_are_those_of_transformers(model: EditableModel, requests: list[EditRequest]) -> None:
    request = requests[0].rendered(model.tokenizer, model.processor)
    pairs = [(request.filled_prompt, request.target_new), (request.locality["text"][0].prompt, "red")]
    found = ranked_predictions(model.base_model, model.tokenizer, pairs, 10)
    for ranked, image, prompt in zip(
        found, (requests[0].image, None), (requests[0].prompt, requests[0].locality["text"][0].prompt), strict=True
    ):
        assert isinstance(ranked, Ranked)
        out, _, _ = logits(model, image, prompt, ranked.target)
        assert ranked.ids == tuple(map(tuple, out[:-1].topk(10, -1).indices.tolist()))


def test_the_published_locality_counts_ranks_at_all_positions() -> None:
    protocol = RankedLocality()
    before = Ranked("p", "a", (tuple(range(10)), tuple(range(10))))
    swapped = Ranked("p", "a", (tuple(range(10)), (*range(8), 9, 8)))
    longer = Ranked("p", "a", ((0,) * 10, *before.ids))  # something was put in front
    for axis, other, wanted in (
        ("m_locality", swapped, (1 + 8 / 10) / 2),
        ("t_locality", swapped, 1.0),
        ("m_locality", longer, 1.0),
    ):
        question = Question(PICTURES, axis, 0, "p", (("a",),))
        assert protocol.changes(question, [before], [other]) == {(PICTURES, axis): pytest.approx(wanted)}


def test_ranked_mode(model: EditableModel, requests: list[EditRequest]) -> None:
    scenario = load_scenario("pictures", mode="ranked_topk_all", generated=False)
    report = evaluate_edits(model, requests[:1], scenario=scenario, progress=False)
    (scores,), (ranked,) = report.chosen("pictures"), report.chosen("pictures_ranked")
    assert "m_locality" not in scores.post.numbers[PICTURES]
    assert len(ranked.post.numbers[PICTURES]["m_locality"]) == 2
    assert 0 <= ranked.post.numbers[PICTURES]["m_locality"][0] <= 1


def test_a_request_without_a_picture_is_an_error_before_anything_is_edited(model: EditableModel) -> None:
    with pytest.raises(RequestError, match="no image"):
        evaluate_edits(model, [EditRequest("a", target_new="b")], scenario="pictures", progress=False)
    with pytest.raises(RequestError, match="picture"):
        evaluate_edits(model, [EditRequest("a", target_new="b", image="no.png")], scenario="pictures", progress=False)
    with pytest.raises(EvaluationError, match="mode"):
        load_scenario("pictures", mode="ranked")
    assert not model.edits


def test_layouts_are_told_by_their_keys() -> None:
    for file, name in (
        ("vlkeb/eval_multihop.json", "vlkeb"),
        ("mmedit/vqa/vqa_eval.json", "mmedit/vqa"),
        ("comprehendedit/ComprehendEdit_test.json", "comprehendedit"),
        ("mmke/visual/eval.json", "mmke/entity"),  # one layout
    ):
        assert Pictures().read(path=SAMPLES / file)[0]["dataset"] == name
