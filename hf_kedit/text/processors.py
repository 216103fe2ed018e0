"""What a processor of an image-text model does with a text: where its pictures stand, and what becomes of both.

Processors differ in the placeholder that a picture has in a text, in whether they want one at all, in how many tokens
it becomes, and in what they hand to the model beside the token ids. All of that is theirs; here they are only called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from .chat import ChatFrame, chat_frame
from .pictures import Picture, PicturedText, PictureFrame

_WRAPPED = {  # what stands between two tokens
    "Qwen": ("<|vision_start|>", "<|vision_end|>"),
    "Glm4": ("<|begin_of_image|>", "<|end_of_image|>"),
}
_PLACES_ITSELF = ("Blip2", "InstructBlip", "Florence2")
_APART = "PaliGemmaProcessor"


def sees(processor: Any) -> bool:
    """Whether this is a processor of pictures and text."""
    return hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")


def without_videos(kind: type[Any]) -> type[Any]:
    """A class of processors without the part that reads videos, which takes torchvision to make."""

    def get_attributes(cls: Any) -> list[str]:
        return ["image_processor", "tokenizer"]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **{"video_processor": None, **kwargs})

    parts = {"get_attributes": classmethod(get_attributes), "__init__": __init__, "video_processor": _NoVideos()}
    # the same name, because it is saved with the processor and found again by it
    return type(kind.__name__, (kind,), parts)


class _NoVideos:
    """What SmolVLM's chats ask of the part that reads videos, even where they show none."""

    num_frames = fps = None


def picture_frame(
    processor: Any, pictures: Sequence[Picture], messages: Sequence[Mapping[str, str]] | None = None
) -> PictureFrame:
    """What stands around a prompt that is asked of pictures.

    Args:
        processor: of the model.
        pictures: in their order.
        messages: the conversation that the prompt is the last turn of, which the processor's (or the tokenizer's)
            chat template writes; ``None``: the placeholders, and the prompt.

    Raises:
        ChatTemplateError: if the template cannot write the conversation.
    """
    if messages is None:
        after = "\n" if answers_apart(processor) else ""
        return PictureFrame(placeholder(processor) * len(pictures), after, None, tuple(pictures), processor)
    frame: ChatFrame = chat_frame(_Writer(processor, len(pictures)), messages)  # type: ignore[arg-type]
    return PictureFrame(frame.before, frame.after, frame.varied, tuple(pictures), processor)


def placeholder(processor: Any) -> str:
    """The text that stands for one picture; empty where the processor puts it there itself (BLIP-2, Florence-2)."""
    token, kind = getattr(processor, "image_token", None), type(processor).__name__
    if token is None or kind.startswith(_PLACES_ITSELF):
        return ""
    token = str(getattr(token, "content", token))
    before, behind = next((marks for name, marks in _WRAPPED.items() if kind.startswith(name)), ("", ""))
    return before + token + (behind or ("" if answers_apart(processor) else "\n"))


def answers_apart(processor: Any) -> bool:
    """Whether a prompt and its answer are two texts: PaliGemma reads a prompt in both directions, its answer in one.

    The processor ends such a prompt with a line break, and `processed` leaves that to it. Tokens of an answer have
    1 as `token_type_ids`, those of a prompt 0.
    """
    return type(processor).__name__ == _APART


def takes_several(processor: Any) -> bool:
    """Whether pictures of other texts can stand in front of a text with its own, each at its placeholder.

    BLIP-2's processors write none, and Mllama's tell every token which of a text's pictures it may see.
    """
    return bool(placeholder(processor)) and type(processor).__name__ != "MllamaProcessor"


def shown_text(text: str) -> str:
    """What people read of a text: without what stands for its pictures."""
    if not isinstance(text, PicturedText):
        return text
    return str(text).replace(placeholder(text.processor) * len(text.pictures), "", 1)


class _Writer:
    """Writes chats as a tokenizer does; the user's last turn begins with pictures.

    The processor's template takes what is said in parts, of which some are images; a tokenizer's takes text.
    """

    def __init__(self, processor: Any, pictures: int):
        self.processor, self.pictures = processor, pictures
        self.parts = bool(getattr(processor, "chat_template", None))
        self.chat_template = processor.chat_template if self.parts else processor.tokenizer.chat_template

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **settings: Any) -> Any:
        """What the template writes."""
        *earlier, turn = messages
        if not self.parts:
            said = placeholder(self.processor) * self.pictures + turn["content"]
            return self.processor.tokenizer.apply_chat_template([*earlier, {**turn, "content": said}], **settings)
        images = [{"type": "image"}] * self.pictures
        written = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        written[-1]["content"] = [*images, {"type": "text", "text": turn["content"]}]
        return self.processor.apply_chat_template(written, **settings)


def processed(text: PicturedText) -> tuple[list[int], dict[str, Any]]:
    """Token ids of a text with its pictures, placeholders expanded, and the model's other inputs.

    Returns:
        The ids, and name → tensor of everything that the processor returns beside ids and mask. The first axis of a
        tensor counts rows (one), images or patches.

    Raises:
        RequestError: if the processor does not take text and pictures together.
    """
    images = [picture.image for picture in text.pictures]
    written = str(text).removesuffix("\n") if answers_apart(text.processor) else str(text)
    try:
        inputs = dict(text.processor(images=images, text=written, return_tensors="pt"))
    except Exception as error:  # processors are programs of others, and raise what they like
        raise RequestError(
            f"the processor ({type(text.processor).__name__}) cannot read {len(images)} picture(s) with the text"
            f" {str(text)[:80]!r}: {type(error).__name__}: {error}",
            field="image",
        ) from error
    ids = [int(i) for i in inputs.pop("input_ids")[0]]
    for name in ("attention_mask", "labels"):  # PaliGemma's are those of no answer
        inputs.pop(name, None)
    return ids, inputs
