"""The page: what stands where, and what each button calls. The one file that knows Gradio.

Every call that needs the model is in one queue (`_MODEL`), so that one edit is made at a time and visitors see that
they wait; the model's own lock would keep them apart too, but says nothing meanwhile.

No text of a visitor or a model is put where Gradio takes HTML or Markdown. Results are made of `tag`s, and errors
stand in notices of the page, not in Gradio's toasts, which render what they are given.
"""

from __future__ import annotations

import functools
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from .. import embedded
from ..errors import KeditError
from ..logging import get_logger
from ..methods import registered_methods
from ..model import EditableModel
from ..storage.display import millions
from . import changing, sharing, views
from .examples import Examples, examples_for, subject_for
from .probing import compare, inspect_prompt
from .settings import FormSetting, method_choices, settings_of
from .visitors import HistoryEntry, Visitor, Visitors

logger = get_logger(__name__)
HOST = "127.0.0.1"
Shown = dict[Any, Any]
"""Component → what it shows from now on."""
_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
_LIGHT: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
_NOTHING = """1. Pick a fact, or write the beginning of a sentence.
2. Say how it is to go on from now on.
3. Press “Change the fact”. What the model said before and what it says then appear here, side by side: the sentence, \
other ways to say it, and everything that should stay as it was."""
_ITSELF, _EDITED = "the model itself", "with your edits"
# On a narrow screen the result is below the form.
_SHOW_RESULT = """() => {
  const result = document.querySelector("#k-right");
  if (result.getBoundingClientRect().top > window.innerHeight / 2) result.scrollIntoView({behavior: "smooth"});
}"""
# The link to the file is there a moment after the answer.
_DOWNLOAD = """() => {
  let tries = 0;
  const take = () => {
    const link = document.querySelector("#k-file a[download]");
    if (document.querySelector("#k-share-note .bad") || tries++ > 50) return;
    if (link) link.click(); else setTimeout(take, 100);
  };
  setTimeout(take, 100);
}"""
_REDRAWN = 0.15
"""Seconds between two pictures of an edit that is being made."""
_FAILED = "Something went wrong inside the program, and nothing was changed. Its log says what."


class Page:
    """The page of one model.

    Args:
        model: that visitors edit.
        output: folder that "Save" writes to; ``None``: visitors can download and push only.
        examples: facts that the model knows; ``None``: they are looked for.
    """

    def __init__(self, model: EditableModel, output: Path | None = None, examples: Examples | None = None):
        self.model, self.output = model, output
        self.examples = examples_for(model) if examples is None else examples
        self.visitors = Visitors(model)
        self.name, self.has_chat = model.base_model_id, bool(getattr(model.tokenizer, "chat_template", None))
        self.home = tempfile.TemporaryDirectory(prefix="kedit-ui-")  # of the archives, as long as the page is there
        keep = (3600, 6 * 3600)  # seconds: Gradio looks for copies of files that are old, and how old that is
        title = f"kedit · {self.name}"
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=keep) as self.blocks:
            self.word = gr.BrowserState("", storage_key="kedit-visit")
            self.version = gr.State(0)
            self.last = gr.State("")
            self.changed = gr.State({})
            self.head = gr.HTML(views.header(self.name, self._about(), None))
            with gr.Tabs(overflow_behavior="wrap"):
                with gr.Tab("Edit"):
                    self._edit_tab()
                with gr.Tab("Probe"):
                    self._probe_tab()
                with gr.Tab("Inspect"):
                    self._inspect_tab()
                with gr.Tab("History"):
                    self._history_tab()
                with gr.Tab("Share"):
                    self._share_tab()
            self._connect()

    def _about(self) -> str:
        size = sum(p.numel() for p in self.model.base_model.parameters())
        about = f"{millions(size)} parameters, {self.model.anatomy.num_layers} layers"
        if embedded.is_embedded(self.name):
            about += ", trained on an invented world of 400 people"
        return about

    # ------------------------------------------------------------------ the tabs

    def _edit_tab(self) -> None:
        sentence, subject, answer = self._first_fact()
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                with gr.Column(elem_classes="k-examples", visible=bool(self.examples.requests)):
                    gr.HTML(views.label("Facts that it knows, and what they could become"))
                    self.chips = [
                        gr.Button(f"{r.filled_prompt} {r.ground_truth[0]} → {r.target_new}", size="sm")
                        for r in self.examples.requests
                    ]
                self.prompt = gr.Textbox(
                    sentence, label="Sentence", info="the model goes on from here", lines=2, elem_id="k-prompt"
                )
                self.says = _note()
                with gr.Row():
                    self.target = gr.Textbox(
                        answer, label="New answer", info="what it is to say", min_width=150, elem_id="k-target"
                    )
                    self.subject = gr.Textbox(
                        subject, label="About", info="the name in it", min_width=150, elem_id="k-subject"
                    )
                self.method = gr.Dropdown(method_choices(), value="auto", label="Method", info=_summary("auto"))
                self.go = gr.Button("Change the fact", variant="primary", elem_id="k-go")
                with gr.Accordion("Settings of the method", open=False):
                    self._settings()
                with gr.Accordion("What else to ask before and after", open=False):
                    how: dict[str, Any] = {"info": "one a line", "lines": 2}
                    self.wordings = gr.Textbox(label="The sentence in other words", elem_id="k-wordings", **how)
                    self.neighbours = gr.Textbox(label="Sentences that should stay", **how)
            with gr.Column(scale=7, min_width=320, elem_id="k-right"):
                self.note = _note()
                self.undo_last = gr.Button("Undo this edit", visible=False, size="sm", elem_id="k-undo")
                self.result = gr.HTML(views.hint(_NOTHING), elem_id="k-edit-result")

    def _settings(self) -> None:
        """Controls made of the config of the chosen method; what somebody changes goes to ``changed``."""

        @gr.render(inputs=[self.method], triggers=[self.method.change, self.blocks.load])
        def controls(method: str) -> None:
            try:
                found = settings_of(method, self.model.profile)
            except KeditError as error:
                gr.HTML(views.notice(str(error)))
                return
            for setting in found:
                control = _control(setting)
                control.change(
                    lambda value, changed, name=setting.name: {**changed, name: value},
                    [control, self.changed],
                    [self.changed],
                    **_LIGHT,
                )

    def _probe_tab(self) -> None:
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                self.asked = gr.Textbox(
                    self._first_fact()[0],
                    label="Ask anything",
                    info="sentences to go on with, one a line",
                    lines=3,
                    elem_id="k-asked",
                )
                self.chat = gr.Checkbox(False, label="as a question in a chat", visible=self.has_chat)
                self.tokens = gr.Slider(4, 80, 20, step=4, label="Length of the answer", info="in tokens")
                self.ask = gr.Button("Ask", variant="primary", elem_id="k-ask")
            with gr.Column(scale=7, min_width=320):
                self.ask_note = _note()
                self.answers = gr.HTML(
                    views.hint("Press “Ask”: both answers, of the model itself and with your edits, appear here."),
                    elem_id="k-answers",
                )

    def _inspect_tab(self) -> None:
        sentence, subject, _ = self._first_fact()
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                self.looked = gr.Textbox(sentence, label="Sentence", info="whose next word is looked at", lines=2)
                self.looked_subject = gr.Textbox(subject, label="About", info="the name that is blurred")
                self.which = gr.Radio([_ITSELF, _EDITED], value=_ITSELF, label="Look for the fact in")
                self.look = gr.Button("Look inside", variant="primary", elem_id="k-look")
            with gr.Column(scale=7, min_width=320):
                self.look_note = _note()
                self.insides = gr.HTML(
                    views.hint("Press “Look inside”: which layers and which words carry the fact."),
                    elem_id="k-insides",
                )

    def _history_tab(self) -> None:
        self.history_note = _note()

        @gr.render(inputs=[self.word, self.version], triggers=[self.version.change])
        def rows(word: str, version: int) -> None:
            try:
                entries = self.visitors.at(word).entries
            except KeditError as error:
                gr.HTML(views.notice(str(error)))
                return
            if not entries:
                gr.HTML(views.hint("No edits yet. Each one that you make is listed here, and can be taken back."))
            for entry in reversed(entries):
                self._history_row(entry)

    def _history_row(self, entry: HistoryEntry) -> None:
        edit_id = entry.edit.id
        with gr.Row(elem_classes="k-row"):
            with gr.Column(scale=6, min_width=260):
                gr.HTML(views.history_card(entry))
            if entry.is_undone:
                return
            with gr.Column(scale=3, min_width=220), gr.Row():
                turn = gr.Button("Switch off" if entry.is_on else "Switch on", size="sm", min_width=90)
                back = gr.Button("Undo", size="sm", min_width=90)
        self._on(
            turn.click,
            lambda visitor: self._switch(visitor, edit_id, not entry.is_on),
            [],
            self.history_note,
        )
        self._on(back.click, lambda visitor: self._undo(visitor, edit_id, self.history_note), [], self.history_note)

    def _share_tab(self) -> None:
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                self.shared = gr.HTML(views.hint("Nothing to share yet: change a fact in the first tab."))
                self.share_note = _note("k-share-note")
                with gr.Row():
                    self.pack = gr.Button("Download as ZIP", variant="primary", elem_id="k-pack")
                    self.save = gr.Button("Save in the folder", visible=self.output is not None)
                self.file = gr.File(label="Your edits", visible=False, interactive=False, elem_id="k-file")
                with gr.Accordion("Push to the Hugging Face Hub", open=False):
                    self.repo = gr.Textbox(label="Repository", placeholder="your-name/my-edits")
                    self.token = gr.Textbox(
                        label="Token", type="password", info="used for this push only, and kept nowhere"
                    )
                    self.private = gr.Checkbox(True, label="private")
                    self.push = gr.Button("Push")
            with gr.Column(scale=7, min_width=320):
                how: dict[str, Any] = {"interactive": False, "wrap_lines": True, "elem_classes": "k-plain"}
                self.python = gr.Code("", language="python", label="The same in Python", lines=1, **how)
                self.shell = gr.Code("", language="shell", label="The same as commands", lines=1, **how)

    def _first_fact(self) -> tuple[str, str, str]:
        """Sentence, subject and new answer of the first example; empty texts if there is none."""
        if not self.examples.requests:
            return "", "", ""
        first = self.examples.requests[0]
        return first.filled_prompt, first.subject or "", first.target_new

    # ------------------------------------------------------------------ what calls what

    @property
    def _common(self) -> list[Any]:
        """What every change of the edits touches."""
        return [self.head, self.version, self.shared, self.python, self.shell, self.last, self.undo_last, self.result]

    def _connect(self) -> None:
        form = [self.prompt, self.subject, self.target, self.method, self.wordings, self.neighbours, self.changed]
        opened = [self.word, *self._common, *self._others]
        says: dict[str, Any] = {"fn": self._says, "inputs": [self.word, self.prompt], "outputs": [self.says]}
        says |= {**_MODEL, "show_progress": "hidden"}
        self.blocks.load(self._enter, [self.word], opened, **_MODEL, show_progress="hidden").then(**says)
        for chip, request in zip(self.chips, self.examples.requests, strict=True):
            texts = (request.filled_prompt, request.subject or "", request.target_new)
            fill = functools.partial(lambda texts: texts, texts)
            chip.click(fill, None, [self.prompt, self.subject, self.target], **_LIGHT).then(**says)
        self.prompt.blur(subject_for, [self.prompt, self.subject], [self.subject], **_LIGHT).then(**says)
        self.method.change(self._chosen, [self.method], [self.method, self.changed], **_LIGHT)

        touched = [self.note, self.subject, self.says, *self._common, *self._others]
        self.go.click(None, js=_SHOW_RESULT)
        self.go.click(self._edit, [self.word, *form], touched, show_progress="hidden", **_MODEL)
        self._on(self.undo_last.click, self._undo, [self.last], self.note)
        asked = [self.asked, self.chat, self.tokens]
        self._on(self.ask.click, self._ask, asked, self.ask_note, [self.answers])
        self._on(
            self.look.click,
            self._look,
            [self.looked, self.looked_subject, self.which],
            self.look_note,
            [self.insides, self.looked_subject],
        )
        self._on(self.pack.click, self._pack, [], self.share_note, [self.file]).then(None, js=_DOWNLOAD)
        self._on(self.save.click, self._save, [], self.share_note)
        self._on(self.push.click, self._push, [self.repo, self.token, self.private], self.share_note, [self.token])
        self.repo.change(self._codes, [self.word, self.repo], [self.python, self.shell], **_LIGHT)

    @property
    def _others(self) -> list[Any]:
        """Fields of other tabs that follow what was edited."""
        return [self.asked, self.looked, self.looked_subject]

    def _on(
        self,
        event: Callable[..., Any],
        act: Callable[..., Shown],
        inputs: Sequence[Any],
        note: Any,
        outputs: Sequence[Any] = (),
    ) -> Any:
        """Let an event call a function of the visitor and of some fields; what goes wrong stands in a notice."""

        def call(word: str, *values: Any) -> Shown:
            return self._guarded(word, note, lambda visitor: act(visitor, *values))

        return event(call, [self.word, *inputs], [note, *self._common, *outputs], **_MODEL)

    def _guarded(self, word: str, note: Any, act: Callable[[Visitor], Shown]) -> Shown:
        """Call something for a visitor. If it fails, a notice says why, and nothing else on the page changes."""
        try:
            visitor = self.visitors.at(word)
            shown = act(visitor)
            return {note: "", **self._state(visitor), **shown}
        except KeditError as error:
            return {note: views.notice(str(error))}
        except Exception:
            logger.exception("a call of the page failed")
            return {note: views.notice(_FAILED)}

    def _state(self, visitor: Visitor) -> Shown:
        """What is always shown of a visitor's edits."""
        python, shell = self._code_of(visitor, "")
        return {
            self.head: views.header(self.name, self._about(), visitor),
            self.version: visitor.version,
            self.shared: views.share_summary(visitor),
            self.python: python,
            self.shell: shell,
        }

    def _result_of(self, entry: HistoryEntry | None) -> Shown:
        """An edit with all that was seen of it; ``None``: there is none."""
        if entry is None:
            return {self.result: views.hint(_NOTHING), self.last: "", self.undo_last: gr.update(visible=False)}
        return {
            self.result: views.edit_result(entry),
            self.last: entry.edit.id,
            self.undo_last: gr.update(visible=True),
        }

    # ------------------------------------------------------------------ what the buttons do

    def _chosen(self, method: str) -> tuple[Any, dict[str, Any]]:
        """Another method: its summary, and none of the settings that were changed for the one before."""
        return gr.update(info=_summary(method)), {}

    def _enter(self, word: str) -> Shown:
        """The page is opened, or loaded again: what the visitor had is there."""
        word, visitor = self.visitors.enter(word)
        last = visitor.present[-1] if visitor.present else None
        return {self.word: word, **self._state(visitor), **self._result_of(last), **self._follow(last)}

    def _edit(self, word: str, prompt: str, subject: str, *more: Any) -> Iterator[Shown]:
        """Make the edit that the form describes, in a thread beside this one, which shows how it gets on."""
        subject = subject_for(prompt, subject)
        steps: list[tuple[str, int, int | None]] = []
        losses: list[float] = []
        shown: Shown = {self.note: views.notice(_FAILED)}
        done = threading.Event()

        def act(visitor: Visitor) -> Shown:
            form = changing.EditForm(prompt, subject, *more)
            entry = changing.change(visitor, form, self.examples, lambda *step: steps.append(step), losses)
            return {self.says: "", **self._result_of(entry), **self._follow(entry)}

        def work() -> None:
            try:
                shown.update(self._guarded(word, self.note, act))
            finally:
                done.set()

        threading.Thread(target=work, name="kedit ui edit", daemon=True).start()
        drawn = 0
        while not done.wait(_REDRAWN):
            if len(steps) > drawn:
                drawn = len(steps)
                yield {self.subject: subject, self.note: views.working(*steps[drawn - 1], losses)}
        yield {self.subject: subject, **shown}

    def _follow(self, entry: HistoryEntry | None) -> Shown:
        """The other tabs begin with the sentence that was edited last."""
        if entry is None:
            return {}
        prompt, subject = entry.edit.request.plain_prompt, entry.edit.request.subject or ""
        return {self.asked: prompt, self.looked: prompt, self.looked_subject: subject}

    def _says(self, word: str, prompt: str) -> str:
        try:
            return views.says(changing.says_now(self.visitors.at(word), prompt))
        except KeditError:
            return ""  # it is a hint; what is wrong is said when the button is pressed

    def _undo(self, visitor: Visitor, edit_id: str, note: Any = None) -> Shown:
        entry = changing.undo(visitor, edit_id)
        word = entry.edit.request.plain_prompt
        done = views.notice(f"Undone: “{word}” has its old answer back, bit for bit.", "good")
        return {note or self.note: done, **self._result_of(visitor.present[-1] if visitor.present else None)}

    def _switch(self, visitor: Visitor, edit_id: str, on: bool) -> Shown:
        changing.switch(visitor, edit_id, on)
        return {}

    def _ask(self, visitor: Visitor, text: str, chat: bool, tokens: float) -> Shown:
        found = compare(visitor.session, visitor.off, text, chat=chat, tokens=int(tokens))
        return {self.answers: views.comparisons(found, visitor)}

    def _look(self, visitor: Visitor, prompt: str, subject: str, which: str) -> Shown:
        seen = inspect_prompt(
            visitor.session, visitor.off, prompt, subject_for(prompt, subject), edited=which == _EDITED
        )
        return {self.insides: views.inspection(seen), self.looked_subject: seen.subject}

    def _pack(self, visitor: Visitor) -> Shown:
        archive = sharing.save_archive(visitor, Path(self.home.name) / str(id(visitor)))
        return {self.file: gr.update(value=str(archive), visible=True)}

    def _save(self, visitor: Visitor) -> Shown:
        assert self.output is not None
        folder = sharing.save_folder(visitor, self.output)
        return {self.share_note: views.notice(f"Saved in {folder}.", "good")}

    def _push(self, visitor: Visitor, repo: str, token: str, private: bool) -> Shown:
        """The field of the token is emptied whatever happens."""
        try:
            note = views.notice(f"Pushed to {sharing.push(visitor, repo, token, private=private)}.", "good")
        except KeditError as error:
            note = views.notice(str(error))
        return {self.token: "", self.share_note: note}

    def _codes(self, word: str, repo: str) -> tuple[str, str]:
        try:
            return self._code_of(self.visitors.at(word), repo)
        except KeditError:
            return "", ""

    def _code_of(self, visitor: Visitor, repo: str) -> tuple[str, str]:
        entries = visitor.shared
        if not entries:
            return "# change a fact first\n", "# change a fact first\n"
        return sharing.as_python(self.name, entries, repo), sharing.as_command(self.name, entries, repo)


def _note(name: str | None = None) -> Any:
    """A place for one sentence, which takes no room while it is empty."""
    return gr.HTML("", elem_classes="k-note", elem_id=name)


def _summary(method: str) -> str:
    known = registered_methods()
    return known[method].capabilities.summary if method in known else ""


def _control(setting: FormSetting) -> Any:
    """The control of one setting, with its explanation."""
    given: dict[str, Any] = {"label": setting.name, "info": setting.about, "interactive": True}
    if setting.kind == "switch":
        return gr.Checkbox(bool(setting.value), **given)
    if setting.kind == "choice":
        return gr.Dropdown(list(setting.choices), value=setting.value, **given)  # None: as the method has it
    if setting.kind in ("whole", "number"):
        return gr.Number(setting.value, precision=0 if setting.kind == "whole" else None, **given)
    return gr.Textbox("" if setting.value is None else json.dumps(setting.value), placeholder="as it is", **given)


def serve(
    model: EditableModel,
    *,
    host: str = HOST,
    port: int | None = None,
    output: Path | None = None,
    browser: bool = False,
    wait: bool = True,
) -> Any:
    """Show the page.

    Args:
        model: that visitors edit.
        host: address to listen at; the default is reached from this machine only.
        port: ``None``: the first free one from 7860 on.
        output: see `Page`.
        browser: open it.
        wait: until the program is ended; otherwise return at once.

    Returns:
        Gradio's application, with ``local_url`` and ``close()``.
    """
    blocks = Page(model, output).blocks
    blocks.queue(max_size=64)
    blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=browser,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Default(
            primary_hue="blue",
            neutral_hue="slate",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        css=files(__package__).joinpath("style.css").read_text(encoding="utf-8"),
    )
    if wait:
        blocks.block_thread()
    return blocks
