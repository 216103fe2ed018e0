"""What ``kedit demo`` looks like. Knows texts and numbers, no model; silent without a console."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..drawing.blocks import in_blocks
from ..storage.display import millions, percent
from ..text.pictures import pictures_of
from ..text.sentences import opening
from .output import error_console
from .side_effects import show_side_effects

if TYPE_CHECKING:
    from ..evaluation import SideEffectReport
    from ..requests import EditRequest

OLD, NEW = "yellow", "green"
_KINDS = {
    "Neighborhood": "same answer",
    "Other_Subjects": "other subject",
    "Shared_Name": "shared name",
    "Same_Subject": "same subject",
    "Entities": "other facts",
    "text": "without picture",
    "multimodal": "other picture",
    "Same_Question": "same question",
    "Same_Picture": "same picture",
}
"""Locality axis → label for people."""
_PER_KIND = 2
_WIDEST, _INDENT = 110, 3


@dataclass
class Answers:
    """What the model says at one time.

    Args:
        texts: prompt → greedy continuation.
        old: probability of the old object after the prompt (of all its tokens together); ``None`` if unknown.
        new: probability of the new object.
    """

    texts: dict[str, str]
    old: float | None
    new: float


class DemoView:
    """Prints the steps as they happen.

    Args:
        console: where to; ``None``: nowhere.
    """

    def __init__(self, console: Console | None):
        self.console = console
        encoding = (console.encoding if console else "utf-8").lower().replace("-", "")
        # A terminal that cannot show these would raise an error.
        fancy = encoding.startswith("utf")
        self.full, self.yes, self.no = ("█", "✓", "✗") if fancy else ("#", "yes", "NO")
        self.arrow, self.more, self.dot = ("→", "…", "·") if fancy else ("->", "...", "-")
        self.colour = fancy and console is not None and not console.no_color and console.color_system is not None
        self.width = min(console.width, _WIDEST) if console else _WIDEST
        self.step = 0

    # ------------------------------------------------------------------ pieces

    def _print(self, *what: Any, **how: Any) -> None:
        if self.console is not None:
            self.console.print(*what, **how)

    def _head(self, text: str, remark: str = "") -> None:
        self.step += 1
        line = Text()
        line.append(f"{self.step}  ", "bold cyan").append(text, "bold").append(f"  {remark}" if remark else "", "dim")
        self._print()
        self._print(line)

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """A spinner on standard error while something takes its time."""
        errors = error_console()
        if self.console is None or not errors.is_terminal:
            yield
            return
        with errors.status(what):
            yield

    def _answer(self, text: str, request: EditRequest) -> Text:
        """A continuation with the old and the new object coloured."""
        line = Text(_whole_sentences(text) or "(nothing)")
        for objects, style in ((request.ground_truth[:1], OLD), ([request.target_new], NEW)):
            line.highlight_words(objects, style=f"bold {style}")
        return line

    def _mark(self, good: bool) -> Text:
        return Text(self.yes, "green") if good else Text(self.no, "bold red")

    # ------------------------------------------------------------------ steps

    def title(self, model: str, size: int, depth: int, method: str, layers: Sequence[int]) -> None:
        """Which model, which method."""
        where = "layer " + str(layers[0]) if len(layers) == 1 else "layers " + ", ".join(map(str, layers))
        text = Text.assemble(
            (model, "bold"),
            f"  {millions(size)} parameters, {depth} layers\n",
            (method, "bold"),
            f"  edits {where} (counted from 0)" if layers else "",
        )
        if self.console is not None:
            self._print(Panel(text, title="kedit demo", title_align="left", border_style="cyan", expand=False))

    def fact(self, request: EditRequest) -> None:
        """What is to change."""
        self._head("A fact, and what it is to become")
        old = request.ground_truth[0] if request.ground_truth else "?"
        for picture in pictures_of(request.image):
            self._print(_indented(in_blocks(picture, colour=self.colour)))
        line = Text.assemble(f"{request.plain_prompt} ", (old, f"bold {OLD}"), f"  {self.arrow}  ")
        self._print(_indented(line.append(request.target_new, f"bold {NEW}")))

    def generations(
        self,
        prompts: Sequence[str],
        before: Mapping[str, str],
        after: Mapping[str, str],
        request: EditRequest,
        seconds: float,
    ) -> None:
        """Continuations before and after, side by side."""
        remark = "; it was never shown the paraphrases" if len(prompts) > 1 else ""
        self._head("What the model says", f"edited in {seconds:.2f} s{remark}")
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", width=self.width - _INDENT)
        for name in ("", "before", "after"):
            table.add_column(name, ratio=1, overflow="fold")
        for number, prompt in enumerate(prompts):
            label = Text(f"{prompt} {self.more}", "bold" if not number else "")
            table.add_row(label, self._answer(before[prompt], request), self._answer(after[prompt], request))
        self._print(_indented(table))

    def probabilities(self, request: EditRequest, before: Answers, after: Answers) -> None:
        """Bars for the old and the new object."""
        if self.console is None:
            return
        self._head("How sure it is", "probability of the whole answer after the prompt")
        rows = [(request.target_new, NEW, before.new, after.new)]
        if before.old is not None and after.old is not None:
            rows.insert(0, (request.ground_truth[0], OLD, before.old, after.old))
        names = max(len(row[0]) for row in rows)
        room = max(min(self.width - names - 25, 60), 8)
        for name, style, *values in rows:
            for number, (when, value) in enumerate(zip(("before", "after"), values, strict=True)):
                label = f"   {'' if number else name:<{names}}  "
                bar = self.full * round(room * value)
                parts: list[str | tuple[str, str]] = [(label, f"bold {style}"), (f"{when:<8}", "dim"), (bar, style)]
                self._print(Text.assemble(*parts, " " if bar else "", percent(value, " %")))

    def neighbours(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """What should not have changed."""
        if not rows:
            return
        same = sum(row["unchanged"] for row in rows)
        self._head("What should stay", f"{same} of {len(rows)} answers are unchanged")
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", width=self.width - _INDENT)
        table.add_column("", no_wrap=True)
        table.add_column("", ratio=3, overflow="fold")
        table.add_column("before", ratio=2, overflow="fold")
        table.add_column("after", ratio=2, overflow="fold")
        table.add_column("")
        for row in self._selection(rows):
            # Where the beginnings are alike, the whole texts say what changed.
            before, after = (_short(row[when]) if row["unchanged"] else row[when] for when in ("before", "after"))
            kind = _KINDS.get(row["kind"], row["kind"])
            changed = "" if row["unchanged"] else "red"
            table.add_row(Text(kind, "dim"), row["prompt"], before, Text(after, changed), self._mark(row["unchanged"]))
        self._print(_indented(table))

    @staticmethod
    def _selection(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """A few of each kind, and whatever changed: nothing that went wrong is left out."""
        chosen: list[Mapping[str, Any]] = []
        seen: dict[str, int] = {}
        for row in rows:
            seen[row["kind"]] = seen.get(row["kind"], 0) + 1
            if seen[row["kind"]] <= _PER_KIND or not row["unchanged"]:
                chosen.append(row)
        return chosen

    def consequences(self, rows: Sequence[Mapping[str, Any]], request: EditRequest) -> None:
        """What follows from the fact."""
        if not rows:
            return
        self._head("What follows", f"{sum(row['follows'] for row in rows)} of {len(rows)} answers follow from it")
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", width=self.width - _INDENT)
        for name, ratio in (("", 3), ("before", 2), ("after", 2)):
            table.add_column(name, ratio=ratio, overflow="fold")
        table.add_column("")
        for row in rows:
            before, after = (self._answer(_short(row[when]), request) for when in ("before", "after"))
            table.add_row(row["prompt"], before, after, self._mark(row["follows"]))
        self._print(_indented(table))

    def side_effects(self, report: SideEffectReport) -> None:
        """What else changed, in one table."""
        self._head("What else it changed")
        if self.console is not None:
            show_side_effects(self.console, report)

    def scores(self, scores: Mapping[str, float | None], protocol: str) -> None:
        """The four numbers."""
        self._head("In numbers", f"one edit, protocol {protocol}; a dash means not asked")
        labels = {
            "rewrite_success": "reliability     it says the new object",
            "rephrase_success": "generalization  also after the paraphrases",
            "locality": "locality        the answers above that should stay",
            "portability": "portability     what follows from the fact follows",
        }
        for key, label in labels.items():
            self._print(Text.assemble(f"   {label:<52}", (f"{percent(scores[key], ' %'):>8}", "bold")))
        if (scores["rewrite_success"] or 0.0) < 1.0:
            hint = "The edit did not take. Other hyperparameters (--set KEY=VALUE) or another method may help."
            self._print(_indented(Text(hint, "red")))

    def saved(self, folder: Path, reload_exact: bool | None) -> None:
        """Where it went, and whether it came back."""
        self._head("Saved, and loaded in a fresh process" if reload_exact is not None else "Saved")
        self._print(f"   {folder}", soft_wrap=True)
        if reload_exact is not None:
            told = "same weights, same words" if reload_exact else "the reloaded model differs"
            self._print(Text.assemble("   ", self._mark(reload_exact), f" {told}"))

    def undone(self, request: EditRequest, back: Answers, before: Answers, exact: bool, size: int) -> None:
        """The way back."""
        self._head("Undone")
        prompt = request.filled_prompt
        self._print(_indented(Text.assemble(f"{request.plain_prompt} ", self._answer(back.texts[prompt], request))))
        told = f"all {size:,} weights are what they were, bit for bit" if exact else "the weights are NOT the original"
        self._print(Text.assemble("   ", self._mark(exact and back.texts[prompt] == before.texts[prompt]), f" {told}"))

    def end(self, seconds: float) -> None:
        """How long it took."""
        self._print()
        self._print(Text(f"{seconds:.1f} s. Next: kedit edit --help, kedit eval --help, docs/quickstart.md", "dim"))


def _indented(what: RenderableType) -> Padding:
    return Padding(what, (0, 0, 0, _INDENT))


def _whole_sentences(text: str) -> str:
    """The text without a sentence at its end that the token limit has cut, if another one precedes it."""
    end = max(text.rfind(mark) for mark in ".?!")
    return text[: end + 1] if end > 0 else text


def _short(text: str) -> str:
    return opening(text) or text or "(nothing)"
