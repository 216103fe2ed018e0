"""What an edit did, as one picture: the answers before and after, the way there, and what else changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .marks import Line, beside, draw_bar, draw_lines, draw_shift, heading, percent_axis, ticks_at
from .style import COLOURS, HURT, INK, PALE, SOFT, WIDTH, as_label, house_style, name_figure, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = ("answers", "loss", "side effects")
"""The charts of an edit."""
_MOST_EDITS, _MOST_NAMED = 8, 4
_WANTED, _OLD = COLOURS[0], COLOURS[7]


@dataclass(frozen=True)
class AnswerShift:
    """How likely an answer was before an edit, and is after it.

    Args:
        prompt: what it answers.
        answer: the text.
        wanted: whether the edit asked for it; else it is what the model said before.
        before: probability, geometric mean over its tokens; ``None``: not known.
        after: the same after the edit.
    """

    prompt: str
    answer: str
    wanted: bool
    before: float | None
    after: float | None


@dataclass(frozen=True)
class KeptCount:
    """How many answers of a kind are as they should be.

    Args:
        name: of the kind, for people.
        good: these.
        asked: all.
        hurt: whether too many are not.
    """

    name: str
    good: int
    asked: int
    hurt: bool


def draw_edits(
    title: str,
    shifts: Sequence[AnswerShift],
    losses: Sequence[Sequence[float]],
    counts: Sequence[KeptCount],
    harm: Sequence[str],
    axes: Axes | None = None,
) -> Figure:
    """The charts for which there is anything, below one another and side by side.

    Args:
        title: of the picture.
        shifts: of the answers, edit by edit.
        losses: of every edit, step by step.
        counts: of the other answers.
        harm: sentences.
        axes: for a single chart.
    """
    prompts = list(dict.fromkeys(s.prompt for s in shifts))
    shifts = [s for s in shifts if s.prompt in prompts[:_MOST_EDITS]]
    with house_style("an edit"):
        if axes is not None:
            figure: Any = axes.get_figure()
            top, left, right = (axes if part else None for part in (shifts, losses, counts))
        else:
            rows = (0.25 * len(shifts) + 0.3 * min(len(prompts), _MOST_EDITS) + 0.35) if shifts else 0.0
            below = 0.45 + max(1.7 if losses else 0, 0.26 * len(counts)) if losses or counts else 0.0
            figure = new_figure(WIDTH, 0.75 + rows + below)
            top, left, right = _places(figure, rows, below, bool(losses), bool(counts))
        if top is not None:
            _answers(top, shifts)
        if left is not None:
            _losses(left, losses)
        if right is not None:
            _counts(right, counts)
        more = f"Answers of {_MOST_EDITS} of the edits. " if len(prompts) > _MOST_EDITS else ""
        if shifts:
            more += "Ring: before. Dot: after. Probabilities per token of the answer. "
        name_figure(figure, title, more + (f"Harm: {'; '.join(harm)}." if harm else ""), axes)
    return figure


def _places(figure: Any, rows: float, below: float, losses: bool, counts: bool) -> tuple[Any, Any, Any]:
    """Axes of the answers, across the whole picture, and below them of the loss and of the other answers."""
    grid = figure.add_gridspec(2 if rows and below else 1, 2, height_ratios=[h for h in (rows, below) if h])
    top = figure.add_subplot(grid[0, :]) if rows else None
    last = 1 if rows and below else 0
    left = figure.add_subplot(grid[last, 0] if counts else grid[last, :]) if losses else None
    right = figure.add_subplot(grid[last, 1] if losses else grid[last, :]) if counts else None
    return top, left, right


def _answers(axes: Axes, shifts: Sequence[AnswerShift]) -> None:
    y, ticks, last = 0.0, {}, None
    for shift in shifts:
        if shift.prompt != last:
            y += 0.25 if last is not None else 0
            heading(axes, y, as_label(shift.prompt, 64))
            y, last = y + 1, shift.prompt
        before, after = (None if value is None else 100 * value for value in (shift.before, shift.after))
        draw_shift(axes, y, before, after, _WANTED if shift.wanted else _OLD)
        said = " → ".join("?" if v is None else f"{v:.1f}" for v in (before, after))
        beside(axes, y, said, soft=not shift.wanted)
        ticks[y] = f"{as_label(shift.answer, 24)} {'(new)' if shift.wanted else '(old)'}"
        y += 1
    axes.set_yticks(list(ticks), list(ticks.values()))
    for text, shift in zip(axes.get_yticklabels(), shifts, strict=True):
        text.set_color(_WANTED if shift.wanted else SOFT)
    axes.set_ylim(y - 0.4, -0.6)
    percent_axis(axes)


def _losses(axes: Axes, losses: Sequence[Sequence[float]]) -> None:
    highest = max(0.0, *(max(points) for points in losses))
    lowest = min(0.0, *(min(points) for points in losses))  # that of an answer to forget has no bound
    top = highest + (0.05 * (highest - lowest) or 1.0)
    named = len(losses) <= _MOST_NAMED
    lines = []
    for points in losses:
        name = f"{points[-1]:.2g}" if named else ""
        lines.append(Line(name, list(enumerate(points, start=1)), COLOURS[0] if named else PALE))
    draw_lines(axes, lines, lowest, top)
    ticks = [lowest, highest]
    axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.tick_params(length=0, axis="both")
    longest = max(map(len, losses))
    ticks_at(axes, [1, *range(5 * (1 + longest // 40), longest + 1, 5 * (1 + longest // 40))])
    axes.set_xlabel("step")
    axes.set_title("Loss" if len(losses) == 1 else f"Loss of {len(losses)} edits")


def _counts(axes: Axes, counts: Sequence[KeptCount]) -> None:
    for y, count in enumerate(counts):
        draw_bar(axes, y, 100 * count.good / count.asked, HURT if count.hurt else COLOURS[0])
        beside(axes, y, f"{count.good} of {count.asked}")
    axes.set_yticks(range(len(counts)), [count.name for count in counts])
    for text, count in zip(axes.get_yticklabels(), counts, strict=True):
        text.set_color(HURT if count.hurt else INK)
    axes.set_ylim(len(counts) - 0.4, -0.6)
    percent_axis(axes, few=True)
    axes.set_title("Answers as they should be")
