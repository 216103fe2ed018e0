"""`EditResult.plot`: what is drawn is what was measured."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest, SideEffects, load_edit_dataset, load_requests
from hf_kedit.errors import RequestError
from hf_kedit.journal import Edit, EditResult

matplotlib = pytest.importorskip("matplotlib")
PROMPT = "By profession Tarosk Boayond is a"
FACT = EditRequest("By profession {} is a", "Tarosk Boayond", "plumber", ground_truth=["sculptor"])


@pytest.fixture(scope="module")
def made() -> tuple[EditableModel, EditResult]:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    result = model.edit(FACT, show_progress=False, watch=SideEffects(general=["It is", "She was born in"]))
    return model, result


def chart(figure: Any, title: str) -> Any:
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


def probability(model: EditableModel, answer: str) -> float:
    """Of an answer, geometric mean over its tokens, by hand."""
    assert model.tokenizer is not None
    prompt, whole = (model.tokenizer(text).input_ids for text in (PROMPT, f"{PROMPT} {answer}"))
    with torch.no_grad():
        likely = model.base_model(torch.tensor([whole])).logits[0].softmax(-1)
    tokens = [float(likely[i - 1, whole[i]]) for i in range(len(prompt), len(whole))]
    return math.prod(tokens) ** (1 / len(tokens))


def test_the_answers_before_and_after(made: tuple[EditableModel, EditResult]) -> None:
    model, result = made
    figure = result.plot()
    axes = figure.axes[0]
    drawn = [100 * probability(model, answer) for answer in ("plumber", "sculptor")]
    with model.disable_edits():
        before = [100 * probability(model, answer) for answer in ("plumber", "sculptor")]
    dots = [float(line.get_xdata()[0]) for line in axes.lines]
    assert dots == pytest.approx([before[0], drawn[0], before[1], drawn[1]], abs=1e-3)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["plumber (new)", "sculptor (old)"]
    words = [t.get_text() for t in axes.texts]
    assert PROMPT in words
    assert f"{before[1]:.1f} → {drawn[1]:.1f}" in words


def test_the_loss_and_what_else_changed(made: tuple[EditableModel, EditResult]) -> None:
    _, result = made
    figure = result.plot()
    (line,) = chart(figure, "Loss").lines
    assert list(line.get_ydata()) == result.edits[0].diagnostics["loss"]
    kept = chart(figure, "Answers as they should be")
    names = [t.get_text() for t in kept.get_yticklabels()]
    shares = {name: bar.get_width() / 100 for name, bar in zip(names, kept.patches, strict=True)}
    effects = result.side_effects
    assert shares["says the new target"] == effects.share("fact") == 1
    assert shares["nothing to do with it"] == effects.share("general")
    assert f"{sum(a.good for a in effects.of('general'))} of 2" in [t.get_text() for t in kept.texts]


def test_one_part_on_axes_of_the_user(made: tuple[EditableModel, EditResult]) -> None:
    from matplotlib.figure import Figure

    _, result = made
    mine = Figure()
    left, right = mine.subplots(1, 2)
    assert result.plot("loss", ax=left) is mine
    assert len(left.lines) == 1 and not right.lines and mine._suptitle is None  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match="ax= takes one chart"):
        result.plot(ax=right)
    with pytest.raises(ValueError, match="part"):
        result.plot("lost")


def test_without_a_watcher_there_is_what_the_method_measured() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "ft-m")
    result = model.edit(FACT, show_progress=False)
    axes = result.plot().axes
    measured = result.edits[0].diagnostics
    dots = [float(line.get_xdata()[0]) / 100 for line in axes[0].lines]
    assert dots == [measured["target_probability_before"], measured["target_probability_after"]]
    with pytest.raises(RequestError, match=r"watch=SideEffects\(\)"):
        result.plot("side effects")
    with pytest.raises(RequestError, match="nothing is known of these edits"):
        EditResult([]).plot()


def test_an_old_answer_that_nobody_named_is_what_the_model_said() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "ft-m")
    fact = EditRequest("By profession {} is a", "Tarosk Boayond", "plumber")
    (new, old) = model.edit(fact, show_progress=False, watch=SideEffects(general=[])).side_effects.shifts
    assert (new.answer, new.wanted, old.answer, old.wanted) == ("plumber", True, "sculptor", False)


def test_many_edits_are_a_bundle_of_losses() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", "ft-m")
    facts = load_requests(load_edit_dataset("world", split="test", limit=10))
    result = model.edit(facts, batch_size=1, show_progress=False)
    # What holds before the first step has no curve.
    trained = [e.diagnostics["loss"] for e in result.edits if len(e.diagnostics["loss"]) > 1]
    figure = result.plot()
    assert len(trained) > 4
    lines = chart(figure, f"Loss of {len(trained)} edits").lines
    assert [list(line.get_ydata()) for line in lines] == trained
    prompts = {fact.filled_prompt for fact in facts}
    assert len(prompts & {t.get_text() for t in figure.axes[0].texts}) == 8
    assert "8 of the edits" in figure._supxlabel.get_text()  # type: ignore[attr-defined]


def result_of(prompt: str, target: str, loss: list[float]) -> EditResult:
    measured = {"loss": loss, "target_probability_before": 0.1, "target_probability_after": 0.9}
    return EditResult([Edit("one", EditRequest(prompt, target_new=target), "ft-m", "batch", "2026", measured)])


@pytest.mark.parametrize("text", ["x" * 2000, "word " * 400, "W" * 2000, "\u4e2d" * 2000])
def test_long_texts_leave_the_chart_its_width(text: str) -> None:
    figure: Any = result_of(text, text, [2.0, 1.0]).plot()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that does not fit
        figure.savefig(io.BytesIO(), format="png")
    assert figure.axes[0].get_position().width > 0.4


@pytest.mark.parametrize(("loss", "low"), [([1.0, -2.0], -2), ([-1.0, -2.0], -2), ([2.0, 1.0], 0), ([0.0, 0.0], 0)])
def test_a_loss_below_zero_is_in_the_chart(loss: list[float], low: float) -> None:
    figure = result_of("a", "b", loss).plot("loss")
    assert figure.axes[0].get_ylim()[0] == low and figure.axes[0].get_ylim()[1] > max(loss)


@pytest.mark.parametrize("loss", [[math.nan, math.nan], [math.inf, 1.0], [1.0, math.nan]])
def test_a_loss_that_is_no_number_has_no_chart(loss: list[float]) -> None:
    assert len(result_of("a", "b", loss).plot().axes) == 1
    with pytest.raises(RequestError, match="nothing is known of the loss"):
        result_of("a", "b", loss).plot("loss")
