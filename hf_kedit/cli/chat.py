"""``kedit chat``: talk to a model in the terminal, change what it knows, and compare with what it said before."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import KeditError, RequestError, nearest
from ..storage.display import printable, printable_json
from .models import LoadOptions, MethodOptions, PromptFormatOption, SystemOption, UntieOption, open_model
from .output import DebugOption, Format, FormatOption, command, console, counted, error_console

if TYPE_CHECKING:
    from ..model import EditableModel

CHAT_TOKENS, COMPLETION_TOKENS = 256, 40
"""Tokens of an answer at most: of a chat model, and of one that completes texts."""
HELP = """\
/edit PROMPT => ANSWER   change a fact; braces mark what it is about:
                         /edit The capital of {France} is => Lyon
/undo [ID]               take the last edit back, or the one with this id
/before                  what the unedited model answers to the last question
/explain                 which edits the last question has to do with
/edits                   the edits that the model carries
/save FOLDER             save them
/new                     begin a new conversation
/help                    this
/quit                    end (or Ctrl-D); Ctrl-C ends an answer"""
_GLANCE_SECONDS = 0.05


@command
def chat(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL_OR_EDITS]", help="Hub id or folder of a model, or saved edits.")
    ] = "kedit/world-llama",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest answer.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", min=0.0, max=2.0, help="0: the likeliest answer; default: the model's own."),
    ] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="Complete texts, also where the model has a chat template.")
    ] = False,
    system: SystemOption = None,
    how: MethodOptions = MethodOptions(),
    prompt_format: PromptFormatOption = None,
    load: LoadOptions = LoadOptions(),
    untie: UntieOption = False,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Talk to a model, edit it in between, and see what it said before.

    Reads standard input line by line, which may be a pipe. A model without a chat template completes what you write.
    --method is for the edits that you make (default: that of the saved edits, else auto).
    """
    editable = open_model(model, load, how, flags={"prompt_format": prompt_format, "system": system}, untie=untie)
    from ..tokens import needed_tokenizer

    tokenizer = needed_tokenizer(editable.tokenizer, "a chat")
    chats = bool(getattr(tokenizer, "chat_template", None)) and not complete
    if chats and prompt_format is None:  # facts are asked for in turns, so they are edited in turns
        editable.set_method(editable.edit_config.changed({"prompt_format": "chat"}))
    talk = Talk(editable, chats, system, max_tokens, temperature, format)
    talk.greet(model)
    talk.run()


@dataclass
class Talk:
    """A conversation in the terminal.

    Args:
        model: that is talked to.
        chats: whether it answers in turns; else it completes texts.
        system: what the system says first.
        max_tokens: of an answer; ``None``: as many as are usual.
        temperature: as `AnswerSettings.temperature`; ``None``: the model's own.
        format: of what is printed.
    """

    model: EditableModel
    chats: bool
    system: str | None
    max_tokens: int | None
    temperature: float | None
    format: Format
    messages: list[dict[str, str]] = field(default_factory=list)
    last: str | None = None
    """The last question."""
    unsaved: bool = False

    def greet(self, name: str) -> None:
        """Say what this is, where somebody sits in front of it."""
        if self.format is not Format.human or not sys.stdin.isatty():
            return
        how = "It answers what you ask." if self.chats else "It has no chat template: it completes what you write."
        carried = f", {counted(len(self.model.edits), 'edit')}" if self.model.edits else ""
        console().print(f"{name}{carried}. {how} /help shows what else there is.", style="bold", soft_wrap=True)

    def run(self) -> None:
        """Read lines until there are no more."""
        sees = sys.stdin.isatty()
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        if sees and os.name != "nt":  # Windows edits lines by itself
            import readline  # noqa: F401  # lines can be edited and are remembered
        while True:
            try:
                line = input("> " if sees and self.format is Format.human else "")
            except EOFError:
                break
            except KeyboardInterrupt:  # of a line that was begun, or of nothing
                console().print("\n(Ctrl-D or /quit ends it)" if sees else "")
                continue
            try:
                if not self.take(line.strip()):
                    break
            except BrokenPipeError:  # nobody reads any more
                raise
            except (KeditError, OSError) as error:  # a full disk must not cost the edits that it could not take
                error_console().print(f"kedit: {' '.join(str(error).split())}", style="red", soft_wrap=True)
            except KeyboardInterrupt:
                error_console().print("kedit: interrupted; the edits are as they were", style="yellow")
        if self.unsaved and sees:
            console().print("the edits were not saved", style="yellow")

    def take(self, line: str) -> bool:
        """Do what a line says; whether to go on."""
        if not line:
            return True
        if not line.startswith("/") or line.startswith("//"):
            self._ask(line[1:] if line.startswith("//") else line)
            return True
        name, rest = (line[1:].split(maxsplit=1) + ["", ""])[:2]
        if name in ("quit", "exit"):
            return False
        verbs: dict[str, Callable[[str], None]] = {
            "edit": self._edit,
            "undo": self._undo,
            "before": self._before,
            "explain": self._explain,
            "edits": self._edits,
            "save": self._save,
            "new": self._new,
            "help": lambda _: self._say(HELP),
        }
        if name not in verbs:
            raise RequestError(
                f"there is no /{name}.{nearest(name, verbs)} /help shows all; // begins a text with a /"
            )
        verbs[name](rest.strip())
        return True

    # ------------------------------------------------------------------ asking

    def _ask(self, question: str) -> None:
        answer = self._answer(question)
        self.last = question
        if self.chats:
            self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def _before(self, _: str) -> None:
        if self.last is None:
            raise RequestError("nothing was asked yet")
        earlier, self.messages = self.messages, self.messages[:-2]
        try:
            with self.model.disable_edits():
                self._answer(self.last)
        finally:
            self.messages = earlier

    def _answer(self, question: str) -> str:
        """Let the model answer, in a thread, so that Ctrl-C comes here and not into the model."""
        from ..serving.answering import answer_prompt, default_sampling

        ids, most = self._ids(question)
        gone, done, shown = threading.Event(), threading.Event(), self.format is Format.human
        found: list[Any] = []
        settings = default_sampling(self.model, most, temperature=self.temperature)

        def told(text: str, _: object) -> None:
            if shown:
                sys.stdout.write(printable(text))
                sys.stdout.flush()

        def work() -> None:
            try:
                found.append(answer_prompt(self.model, ids, settings, told=told, gone=gone.is_set))
            except BaseException as error:  # is raised again below
                found.append(error)
            finally:
                done.set()

        threading.Thread(target=work, name="kedit-chat", daemon=True).start()
        try:
            while not done.is_set():
                try:
                    done.wait(_GLANCE_SECONDS)
                except KeyboardInterrupt:
                    gone.set()
        finally:
            gone.set()
        (result,) = found
        if isinstance(result, BaseException):
            raise result
        if shown:
            sys.stdout.write(" …\n" if result.finish != "stop" else "\n")
        elif self.format is Format.json:
            line = {"question": question, "answer": result.text, "finish": result.finish}
            sys.stdout.write(printable_json(json.dumps(line, ensure_ascii=False)) + "\n")
        else:
            sys.stdout.write(printable(result.text, keep="") + "\n")
        sys.stdout.flush()
        return str(result.text)

    def _ids(self, question: str) -> tuple[Sequence[int], int]:
        """Token ids of a question, behind as much of what was said before as fits, and how long the answer may be."""
        from ..serving.answering import asked_ids, context_of
        from ..text.chat import chat_frame, with_system

        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        context, earlier = context_of(self.model), self.messages
        most = self.max_tokens or min(CHAT_TOKENS if self.chats else COMPLETION_TOKENS, context // 2)
        while True:
            text = question
            if self.chats:
                turns = with_system([*earlier, {"role": "user", "content": question}], self.system, question)
                text = chat_frame(tokenizer, turns).text(question)
            ids = asked_ids(self.model, text)
            if len(ids) + most <= context:
                self.messages = earlier
                return ids, most
            if not earlier:
                raise RequestError(
                    f"it has {len(ids)} tokens; with an answer of {most} the model's context, {context}, is too small"
                )
            earlier = earlier[2:]

    # ------------------------------------------------------------------ editing

    def _edit(self, text: str) -> None:
        prompt, arrow, target = text.rpartition("=>")
        if not arrow or not prompt.strip() or not target.strip():
            raise RequestError("write /edit PROMPT => ANSWER, such as: /edit The capital of {France} is => Lyon")
        marked = re.findall(r"\{([^{}]+)\}", prompt)
        if len(marked) > 1:
            raise RequestError("braces mark one subject; this prompt has several")
        request: dict[str, Any] = {"prompt": prompt.strip(), "target_new": target.strip()}
        if marked:
            request = {**request, "prompt": prompt.strip().replace("{" + marked[0] + "}", "{}"), "subject": marked[0]}
        try:
            (made,) = self.model.edit(**request, show_progress=False).edits
        except RequestError as error:
            if error.field == "subject" and not marked:
                raise RequestError(
                    f"{self.model.method_name} has to know what the fact is about: put it in braces, as in {{France}}"
                ) from error
            raise
        self.unsaved = True
        self._say(f"edited ({made.method}, {made.diagnostics.get('seconds', 0.0):.1f} s): {made.id}")

    def _undo(self, which: str) -> None:
        if not self.model.edits:
            raise RequestError("there is nothing to undo")
        for gone in self.model.rollback(which or 1):
            self._say(f"undone: {gone.id}   {gone.request.filled_prompt} → {gone.request.target_new}")
        self.unsaved = True

    def _edits(self, _: str) -> None:
        for edit in self.model.edits:
            self._say(f"{edit.id}   {edit.request.filled_prompt} → {edit.request.target_new}   ({edit.method})")
        if not self.model.edits:
            self._say("none")

    def _explain(self, _: str) -> None:
        if self.last is None:
            raise RequestError("nothing was asked yet")
        model = self.model
        candidates = model.explain(self.last)
        for found in candidates:
            verdict = "answers it" if found.claimed else "does not answer it"
            self._say(f"{found.edit_id} {verdict}: {found.reason}")
        chosen = model.prompts.choose([self.last])[0] if model.prompts.entries else None
        if chosen is not None:
            entry, similarity = chosen
            self._say(
                f"{entry.edit_id} (similarity {similarity:.2f}) is put in front of it: {' '.join(entry.fact.split())}"
            )
        if model.ledger.edit_ids:
            self._say(f"{counted(len(model.ledger.edit_ids), 'edit')} in the weights, which act on every question")
        if not model.edits:
            self._say("the model carries no edits")
        elif not (candidates or chosen or model.ledger.edit_ids):
            self._say("none that tells by the text of a question; /before shows whether the edits make a difference")

    def _save(self, folder: str) -> None:
        if not folder:
            raise RequestError("write /save FOLDER")
        self.model.save_pretrained(Path(os.path.expanduser(folder)))
        self.unsaved = False
        self._say(f"saved to {folder}   (kedit chat {shlex.quote(folder)})")

    def _new(self, _: str) -> None:
        self.messages, self.last = [], None

    def _say(self, text: str) -> None:
        """Something that is no answer: for people on standard output, otherwise on standard error."""
        where = console() if self.format is Format.human else error_console()
        where.print(text, style="dim" if sys.stdout.isatty() else None, soft_wrap=True)
