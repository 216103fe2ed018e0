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

_WRAPPED = {"<|image_pad|>": "<|vision_start|><|image_pad|><|vision_end|>"}  # Qwen's stands between two tokens


def sees(processor: Any) -> bool:
    """Whether this is a processor of pictures and text."""
    return hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")


def without_videos(kind: type[Any]) -> type[Any]:
    """A class of processors without the part that reads videos, which takes torchvision to make."""

    def get_attributes(cls: Any) -> list[str]:
        return ["image_processor", "tokenizer"]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **{"video_processor": None, **kwargs})

    # the same name, because it is saved with the processor and found again by it
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(get_attributes), "__init__": __init__})


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
        RequestError: for PaliGemma, whose prompt is read in both directions, and its answer behind a mask of its own.
    """
    if type(processor).__name__ == "PaliGemmaProcessor":
        raise RequestError(
            "PaliGemma reads a prompt and its answer by different masks, which edits of pictures do not know; use"
            " another family (docs/families.md)",
            field="image",
        )
    if messages is None:
        return PictureFrame(placeholder(processor) * len(pictures), "", None, tuple(pictures), processor)
    frame: ChatFrame = chat_frame(_Writer(processor, len(pictures)), messages)  # type: ignore[arg-type]
    return PictureFrame(frame.before, frame.after, frame.varied, tuple(pictures), processor)


def placeholder(processor: Any) -> str:
    """The text that stands for one picture; empty where the processor puts it there itself (BLIP-2)."""
    token = getattr(processor, "image_token", None)
    if token is None or hasattr(processor, "num_query_tokens"):
        return ""
    token = str(getattr(token, "content", token))
    return _WRAPPED.get(token, token + "\n")


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
    try:
        inputs = dict(text.processor(images=images, text=str(text), return_tensors="pt"))
    except Exception as error:  # processors are programs of others, and raise what they like
        raise RequestError(
            f"the processor ({type(text.processor).__name__}) cannot read {len(images)} picture(s) with the text"
            f" {str(text)[:80]!r}: {type(error).__name__}: {error}",
            field="image",
        ) from error
    ids = [int(i) for i in inputs.pop("input_ids")[0]]
    inputs.pop("attention_mask", None)
    return ids, inputs
