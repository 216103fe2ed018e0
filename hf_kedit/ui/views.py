"""How things look: what the page shows, as HTML that is made of data and of `tag`s, in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..evaluation import SideEffectReport
from ..evaluation.measures.side_effects import Answered, EffectKind
from ..evaluation.report.html_cases import changed
from ..locate import LensReading, Trace
from ..storage.display import printable
from ..text.sentences import OPENING, opening
from .markup import Markup, pieces, tag
from .probing import BothAnswers, Chance, Inspection
from .visitors import HistoryEntry, Visitor

Mood = Literal["good", "bad", "plain"]
_CARDS: dict[EffectKind, tuple[str, str]] = {
    "fact": ("says it now", "the sentence itself"),
    "paraphrase": ("in other words", "other wordings give the new answer"),
    "chat": ("asked in a chat", "the chat gives the new answer"),
    "neighbour": ("neighbours unchanged", "the same question about others"),
    "same subject": ("other facts kept", "what else it knows of the subject"),
    "general": ("unrelated kept", "prompts that have nothing to do with it"),
    "name": ("name intact", "it can still copy the name"),
}
_GROUPS: dict[str, tuple[EffectKind, ...]] = {
    "The sentence": ("fact",),
    "In other words": ("paraphrase",),
    "In a chat": ("chat",),
    "Others, which should stay": ("neighbour",),
    "Other facts of the subject, which should stay": ("same subject",),
    "Nothing to do with it, and changed": ("general", "name"),
}
_LAYERS = 12
"""Of a deep model, so many layers are shown at first."""
_SHOWN = 4
"""Of answers that did not change and were not to, so many are shown at first."""


# ---------------------------------------------------------------------- short ones


def notice(text: str, mood: Mood = "bad") -> str:
    """One sentence about what has just happened; an empty text is nothing."""
    return tag("p", text, cls=f"k-notice {mood}", role="alert" if mood == "bad" else "status") if text else ""


def working(what: str, done: int, of: int | None, losses: Sequence[float]) -> str:
    """What goes on while an edit is made: in words, as a bar, and the course of the loss so far."""
    share_done = f"width:{100 * done / of:.0f}%" if of else "width:3%"
    steps = f" · step {done} of {of}" if of else ""
    bar = tag("span", tag("i", style=share_done), cls="k-bar now")
    curve = loss_curve(losses) if len(losses) > 1 else None
    return tag("div", tag("p", tag("b", what.capitalize()), steps), bar, curve, cls="k-working", role="status")


def hint(text: str) -> str:
    """What stands where there is nothing yet."""
    return tag("p", text, cls="k-hint")


def label(text: str) -> str:
    """A few words above a group of buttons."""
    return tag("p", text, cls="k-soft")


def header(name: str, about: str, visitor: Visitor | None) -> str:
    """The head of the page: which model, and how many of one's own edits are on."""
    present, on = (len(visitor.present), len(visitor.shared)) if visitor else (0, 0)
    if not present:
        state = "no edits yet"
    elif on == present:
        state = f"{on} edit{'' if on == 1 else 's'} on"
    else:
        state = f"{on} of {present} edits on"
    return tag(
        "header",
        tag("h1", "kedit"),
        tag("p", "Change what a language model knows, see what it did, take it back.", cls="k-claim"),
        tag("p", tag("b", name), f" · {about}", tag("span", state, cls="k-badge"), cls="k-model"),
        cls="k-head",
    )


def says(answer: str) -> str:
    """What the model goes on with now."""
    return tag("p", "The model says now: ", tag("b", answer), cls="k-says") if answer else ""


# ---------------------------------------------------------------------- an edit


def edit_result(entry: HistoryEntry) -> str:
    """Everything about one edit: verdict, cards, both texts side by side, probabilities, the course of the loss."""
    edit, effects = entry.edit, entry.effects
    if effects is None:
        return hint("The model came with this edit. “Probe” shows what it does.")
    parts = [
        _verdict(entry, effects),
        _cards(effects),
        _harm(effects),
        _side_by_side(effects),
        tag("h3", "How probable the answers are"),
        chance_bars(entry.chances, "before", "after"),
    ]
    loss = edit.diagnostics.get("loss")
    if isinstance(loss, list) and len(loss) > 1:
        about = f"{len(loss)} steps, {float(edit.diagnostics.get('seconds') or 0):.1f} s with {edit.method}"
        parts += [tag("h3", "How it learned ", tag("span", about, cls="k-soft")), loss_curve(loss)]
    return tag("div", *parts, cls="k-result")


def _verdict(entry: HistoryEntry, effects: SideEffectReport) -> Markup:
    request = entry.edit.request
    fact = next(iter(effects.of("fact")), None)
    good = fact is not None and fact.good
    verdict = ("Done, but look below. " if effects.harm else "Done. ") if good else "It did not take. "
    words: list[str] = [tag("b", verdict)]
    words += [f"{request.plain_prompt} ", tag("mark", _shown(fact.after if fact else request.target_new))]
    if fact is not None:
        words.append(tag("span", f" was: {_shown(fact.before)}", cls="k-soft"))
    if not good:
        words.append(tag("span", " Another method, or other settings, may do it.", cls="k-soft"))
    return tag("p", *words, cls=f"k-verdict {'good' if good and not effects.harm else 'bad' if not good else 'plain'}")


def _shown(answer: str) -> str:
    return opening(answer, OPENING) or "(nothing)"


def _cards(effects: SideEffectReport) -> Markup:
    cards = []
    for kind, (label, meaning) in _CARDS.items():
        answers = effects.of(kind)
        if not answers:
            continue
        good = sum(answer.good for answer in answers)
        mood = "good" if good == len(answers) else "bad" if good < len(answers) / 2 else "plain"
        number = tag("b", f"{good} of {len(answers)}")
        cards.append(tag("div", number, tag("span", label), cls=f"k-card {mood}", title=meaning))
    return tag("div", *cards, cls="k-cards")


def _harm(effects: SideEffectReport) -> Markup | None:
    if not effects.harm:
        return None
    return tag("ul", *(tag("li", sentence) for sentence in effects.harm), cls="k-harm")


def _side_by_side(effects: SideEffectReport) -> Markup:
    parts = []
    for title, kinds in _GROUPS.items():
        answers = [answer for kind in kinds for answer in effects.of(kind)]
        if kinds[0] == "general":
            answers = [answer for answer in answers if not answer.good]
        if not answers:
            continue
        answers = sorted(answers, key=lambda answer: answer.good)  # what went wrong is never behind a line to open
        cut = max(_SHOWN, sum(not answer.good for answer in answers))
        rows = [_row(answer) for answer in answers]
        more = rows[cut:]
        rest = tag("details", tag("summary", f"{len(more)} more"), *more) if more else None
        parts.append(tag("section", tag("h3", title), *rows[:cut], rest))
    return tag("div", *parts, cls="k-compare")


def _row(answer: Answered) -> Markup:
    return _pair(answer.question.prompt, answer.before, answer.after, "good" if answer.good else "bad")


def _pair(prompt: str, before: str, after: str, mood: Mood, titles: tuple[str, str] = ("before", "after")) -> Markup:
    """A prompt with two answers beside each other; words that differ are marked."""
    # Answers end where their tokens do: whether there was room for the full stop behind the last word tells nothing.
    old, new = (printable(text).rstrip(" .,") for text in (before, after))
    sides = (Markup(changed(new, old, "gone")), Markup(changed(old, new, "new")))
    boxes = [
        tag("div", tag("span", title, cls="k-when"), tag("span", side or "(nothing)", cls="k-text"), cls="k-side")
        for title, side in zip(titles, sides, strict=True)
    ]
    return tag("div", tag("p", prompt, cls="k-prompt"), *boxes, cls=f"k-pair {mood}")


# ---------------------------------------------------------------------- charts


def chance_bars(chances: Sequence[Chance], before: str, after: str) -> Markup:
    """Two bars for each answer; a bar's width is its probability."""
    rows = []
    for chance in chances:
        if not chance.is_target and share(chance.before) == share(chance.after) == share(0):
            continue
        bars = [
            tag(
                "span",
                tag("span", when, cls="k-when"),
                tag("span", tag("i", style=f"width:{100 * value:.1f}%"), cls=f"k-bar {css}"),
                tag("span", share(value), cls="k-number"),
                cls="k-line",
            )
            for when, value, css in ((before, chance.before, "old"), (after, chance.after, "now"))
        ]
        name = tag("span", chance.answer, cls=f"k-answer{' target' if chance.is_target else ''}")
        rows.append(tag("div", name, tag("span", *bars), cls="k-chance"))
    return tag("div", *rows, cls="k-chances")


def share(value: float) -> str:
    """A probability for people."""
    return "0 %" if value < 0.0005 else "< 1 %" if value < 0.01 else f"{100 * value:.0f} %"


def loss_curve(losses: Sequence[float]) -> Markup:
    """The loss along the steps, as a line that fills the width."""
    width, height, low, high = 600, 90, min(losses), max(losses)
    span = (high - low) or 1.0
    step = width / (len(losses) - 1)
    points = " ".join(f"{i * step:.1f},{4 + (high - loss) / span * (height - 8):.1f}" for i, loss in enumerate(losses))
    line = tag("polyline", points=points, fill="none", vector_effect="non-scaling-stroke")
    drawing = tag(
        "svg", line, viewBox=f"0 0 {width} {height}", preserveAspectRatio="none", role="img", aria_label="loss"
    )
    ends = tag("p", tag("span", f"loss {losses[0]:.2f}"), tag("span", f"{losses[-1]:.2f}"), cls="k-ends")
    return tag("div", drawing, ends, cls="k-loss")


def lens_strip(before: LensReading, after: LensReading | None, words: Sequence[str]) -> Markup:
    """What every layer would answer: a row for each layer, the last one on top.

    Args:
        before: the model itself.
        after: with edits.
        words: whole answers, which are shown in the place of tokens that are their beginnings.
    """
    heads = ["layer", "the model itself", *(["with your edits"] if after else [])]
    rows = []
    for number in reversed(range(len(before.layers))):
        readings = [before.layers[number], *([after.layers[number]] if after else [])]
        differs = after is not None and readings[0][0][0] != readings[1][0][0]
        cells = [_heat(_whole(text, words), chance, share(chance)) for (text, chance), *_ in readings]
        rows.append(tag("tr", tag("th", str(number + 1)), *cells, cls="differs" if differs else None))
    head = tag("tr", *(tag("th", title) for title in heads))
    shown = tag("table", head, *rows[:_LAYERS], cls="k-heat lens")
    if len(rows) <= _LAYERS:
        return shown
    below = tag("table", *rows[_LAYERS:], cls="k-heat lens")
    return pieces(shown, tag("details", tag("summary", f"{len(rows) - _LAYERS} layers below"), below))


def _whole(token: str, words: Sequence[str]) -> str:
    begun = token.strip()
    return next((word for word in words if begun and word.startswith(begun)), begun or "␣")


def trace_map(trace: Trace, kind: str) -> Markup:
    """The table of a causal trace: a row for each token, a column for each layer, darker where more comes back."""
    table = trace.scores[kind].tolist()
    low, high = trace.low, max(trace.high, trace.low + 1e-9)
    start, end = trace.subject_range
    rows = []
    for number, (token, values) in enumerate(zip(trace.tokens, table, strict=True)):
        name = tag("th", token.strip() or "␣", cls="subject" if start <= number < end else None)
        cells = [_heat("", max(0.0, min(1.0, (v - low) / (high - low))), f"p = {v:.2f}") for v in values]
        rows.append(tag("tr", name, *cells))
    layers = len(table[0])
    every = max(1, -(-layers // 10))
    foot = tag("tr", tag("th", "layer"), *(tag("td", str(i + 1) if i % every == 0 else "") for i in range(layers)))
    return tag("table", *rows, foot, cls="k-heat trace" + (" deep" if layers > _LAYERS else ""))


def _heat(text: str, value: float, title: str) -> Markup:
    return tag("td", text, tag("small", title) if text else None, style=f"--heat:{value:.3f}", title=title)


# ---------------------------------------------------------------------- asking, looking, history, sharing


def comparisons(found: Sequence[BothAnswers], visitor: Visitor) -> str:
    """Both answers to every prompt, and the probabilities where one was asked."""
    parts = []
    subjects = {entry.edit.id: entry.edit.request.subject or "" for entry in visitor.entries}
    for each in found:
        same = each.before == each.after
        parts.append(_pair(each.prompt, each.before, each.after, "plain", ("the model itself", "with your edits")))
        if each.claimed_by:
            names = ", ".join(dict.fromkeys(subjects.get(i, i) for i in each.claimed_by))
            parts.append(tag("p", f"Your edit about {names} answers here.", cls="k-soft"))
        elif same and visitor.present:
            parts.append(tag("p", "The same answer, word by word.", cls="k-soft"))
        if each.chances:
            parts += [tag("h3", "How probable the answers are"), chance_bars(each.chances, "itself", "edited")]
    return tag("div", *parts, cls="k-result k-compare")


def inspection(seen: Inspection) -> str:
    """Where a fact sits: the layers in which the answer appears, and the states that carry it."""
    parts: list[str | None] = [
        tag("h3", "Layer by layer"),
        tag(
            "p",
            "What the model would answer if it stopped behind a layer; the last one is its answer.",
            cls="k-soft",
        ),
        tag("div", lens_strip(seen.before, seen.after, seen.words), cls="k-scroll"),
        hint(seen.no_lens) if seen.no_lens else None,
        tag("h3", "Which words carry the fact"),
    ]
    if seen.trace is None:
        parts.append(hint(seen.why_not))
    else:
        high, low = share(seen.trace.high), share(seen.trace.low)
        lost = f"With the name blurred, “{seen.trace.answer.strip()}” falls from {high} to {low}."
        parts += [
            tag("p", lost, " Dark: putting this one state back brings the answer back.", cls="k-soft"),
            tag("div", trace_map(seen.trace, "hidden"), cls="k-scroll"),
        ]
    return tag("div", *parts, cls="k-result")


def history_card(entry: HistoryEntry) -> str:
    """One edit of the history."""
    edit = entry.edit
    state = "undone" if entry.is_undone else "on" if entry.is_on else "off"
    asked = entry.effects.of("fact") if entry.effects else []
    before = next((_shown(answer.before) for answer in asked), ", ".join(edit.request.ground_truth) or "?")
    about = tag("span", state, cls=f"k-badge {state}")
    return tag(
        "div",
        tag("p", f"{edit.request.plain_prompt} ", tag("s", before), " → ", tag("mark", edit.request.target_new)),
        tag("p", f"{edit.method} · {edit.created[11:16]} UTC", about, cls="k-soft"),
        tag("details", tag("summary", "What it did"), Markup(edit_result(entry))),
        cls=f"k-entry {state}",
    )


def share_summary(visitor: Visitor) -> str:
    """What would be shared now."""
    shared = visitor.shared
    if not shared:
        return hint("Nothing to share yet. Change a fact in the first tab; it can be downloaded and pushed from here.")
    facts = [
        tag("li", f"{entry.edit.request.plain_prompt} ", tag("mark", entry.edit.request.target_new))
        for entry in shared
    ]
    left = len(visitor.present) - len(shared)
    off = tag("p", f"{left} switched off, and not shared.", cls="k-soft") if left else None
    return pieces(tag("ul", *facts, cls="k-facts"), off)
