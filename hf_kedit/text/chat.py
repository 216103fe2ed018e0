"""Prompts as chat models read them: a conversation that the tokenizer's template writes out.

A template is rendered once per conversation, with a mark in the place of what the user says last. What comes out is a
`ChatFrame`: the text before and behind that turn. From then on a chat is two strings around a prompt, and everything
that works with characters (where the subject stands, which context comes before it) works in it, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import ChatTemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TextFormat = Literal["plain", "chat", "both"]
TEXT_FORMATS: tuple[TextFormat, ...] = get_args(TextFormat)
Messages = list[dict[str, str]]
_ROLES = ("system", "user", "assistant")

# Characters of the private use area, which no text of a user or a template holds.
_TURN, _SYSTEM = "\ue0d0", "\ue0d1"
_THINK, _THOUGHT = "<think>", "</think>"
# Templates know one or the other; each ignores what it does not know.
_NO_THINKING: dict[str, Any] = {"enable_thinking": False, "thinking": False}


@dataclass(frozen=True)
class ChatFrame:
    """A conversation around what the user says last.

    Args:
        before: everything in front of the last user turn: BOS, the system prompt, earlier turns, markers.
        after: everything behind it up to where the answer begins.
        varied: the same with another system prompt: the text before the addition to the system prompt, between it and
            the user's turn, and behind that; ``None`` if the template has no place of its own for a system prompt.
    """

    before: str
    after: str
    varied: tuple[str, str, str] | None = None

    def text(self, turn: str) -> str:
        """The conversation with a last user turn."""
        return self.before + turn.strip() + self.after

    def shift(self, turn: str) -> int:
        """How far the characters of the turn move."""
        return len(self.before) - (len(turn) - len(turn.lstrip()))

    def in_context(self, lead: str, tail: str, index: int, turn: str) -> tuple[str, int]:
        """The conversation with a context: every other one is said by the system, the rest by the user.

        A text in front of the whole conversation is something that a chat model never sees, so that a key that is
        averaged over such texts is none of a chat.

        Args:
            lead: what stands before the prompt.
            tail: what stands behind it.
            index: number of the context.
            turn: the prompt.

        Returns:
            The text, and how far the characters of the turn moved.
        """
        own = turn.strip()
        if lead.strip() and self.varied is not None and index % 2:
            system, between, after = self.varied
            before = system + lead.strip() + between
        else:
            before, after = self.before + lead, self.after
        return before + own + tail + after, len(before) - (len(turn) - len(turn.lstrip()))


def read_messages(messages: Any, prompt: str) -> Messages:
    """Check the messages of a request; the last one returned is what the user says last.

    Args:
        messages: dicts with ``role`` and ``content``. If the last is not the user's, ``prompt`` is.
        prompt: of the request; may be empty if the messages end with the user's.

    Raises:
        ValueError: saying what is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError('must be a list such as [{"role": "user", "content": "…"}]')
    read: Messages = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ValueError(f"message {i} must be a dict with 'role' and 'content', and nothing else")
        role, content = message["role"], message["content"]
        if role not in _ROLES or (role == "system" and i > 0):
            raise ValueError(f"message {i}: the role must be one of {', '.join(_ROLES)}, the system's only first")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {i} needs a 'content' that is a text and not empty")
        read.append({"role": str(role), "content": content})
    if read[-1]["role"] != "user":
        read.append({"role": "user", "content": prompt})
    elif prompt.strip() and read[-1]["content"].strip() != prompt.strip():
        raise ValueError("the last message is the user's and differs from the prompt; leave one of them out")
    if any("{}" in message["content"] for message in read[:-1]):
        raise ValueError("only the last user message can have a slot '{}' for the subject; write the others out")
    return read


def with_system(messages: Messages | None, system: str | None, prompt: str) -> Messages:
    """A conversation that begins with a system prompt, unless it has one or none is named."""
    found = list(messages or [{"role": "user", "content": prompt}])
    if system is not None and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": system})
    return found


def chat_frame(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> ChatFrame:
    """What a tokenizer's template writes around the last turn of a conversation.

    Args:
        tokenizer: of the model.
        messages: the last one is the user's; its content does not matter.

    Raises:
        ChatTemplateError: if the tokenizer has no template, or it cannot write such a conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ChatTemplateError(
            "the tokenizer has no chat template, so that a prompt cannot be put as a chat; use prompt_format='plain',"
            " or set tokenizer.chat_template"
        )
    earlier = [dict(message) for message in messages[:-1]]
    turn = {"role": "user", "content": _TURN}
    before, after = _cut(_written(tokenizer, [*earlier, turn]), _TURN)
    return ChatFrame(before, after, _varied(tokenizer, earlier, turn))


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """One question of a user as a tokenizer's template writes it, up to where the answer begins.

    Raises:
        ChatTemplateError: as `chat_frame`.
    """
    return chat_frame(tokenizer, [{"role": "user", "content": prompt}]).text(prompt)


def _varied(
    tokenizer: PreTrainedTokenizerBase, earlier: Messages, turn: dict[str, str]
) -> tuple[str, str, str] | None:
    """The frame with something added to the system prompt, or with one, where the template takes it as such."""
    named = earlier[0]["content"] + " " if earlier and earlier[0]["role"] == "system" else ""
    rest = earlier[1:] if named else earlier
    try:
        text = _rendered(tokenizer, [{"role": "system", "content": named + _SYSTEM}, *rest, turn])
        before, behind = _cut(text, _SYSTEM)
        between, after = _cut(behind, _TURN)
    except ChatTemplateError:
        return None
    return before, between, after


def _written(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """Render a conversation; where a template has no place for a system prompt, the first user turn begins with it."""
    if messages[0]["role"] != "system":
        return _rendered(tokenizer, messages)
    try:
        text = _rendered(tokenizer, messages)
        if messages[0]["content"].strip() in text:
            return text
    except ChatTemplateError:
        pass  # Gemma's template refuses the role
    system, first, *rest = messages
    if first["role"] != "user":
        raise ChatTemplateError("the chat template has no system role, and the user does not speak first")
    return _rendered(tokenizer, [{**first, "content": system["content"] + "\n\n" + first["content"]}, *rest])


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """What the template writes, up to where an answer begins that is not a thought."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **_NO_THINKING)
    except Exception as error:  # templates are programs of others, and raise what they like
        raise ChatTemplateError(f"the chat template cannot write this conversation: {error}") from error
    text = str(text)
    if text.rfind(_THINK) > max(text.rfind(_THOUGHT), text.rfind(_TURN)):
        text = text.rstrip("\n") + f"\n\n{_THOUGHT}\n\n"  # opened by a template that cannot be told not to think
    return text


def _cut(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ChatTemplateError(f"the chat template writes a message {text.count(mark)} times instead of once")
    before, after = text.split(mark)
    return before, after
