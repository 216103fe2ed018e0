"""Pictures as values, and texts in which they stand.

A `Picture` is what a request holds of an image: its pixels as a PNG, equal where the pixels are. A `PicturedText` is a
text for a model that sees: a string in which the placeholders of a processor stand for pictures. It goes wherever a
text goes, so that what puts prompts together, batches them or remembers their scores need not know of images; the one
place that looks inside is where texts become token ids (`hf_kedit.tokens`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from ..errors import RequestError, require_extra, shown
from .chat import ChatFrame

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 2**26
"""Pixels of the largest picture that is read; a small file can claim to hold any number of them."""
_URI = "data:image/"
_LINKS = ("http://", "https://")
Pictured = Union[str, "Picture"]
"""A picture, or the path of one that has not been read yet."""


@dataclass(frozen=True)
class Picture:
    """One image in 8-bit RGB.

    Args:
        digest: of size and pixels; two pictures are equal if these are.
        png: the file's bytes.
    """

    digest: str
    png: bytes = field(repr=False, compare=False)

    @classmethod
    def of(cls, value: Any) -> Picture:
        """Make a picture.

        Args:
            value: a `Picture`, a PIL image, an array ``[height, width, 3]`` of uint8 (or ``[height, width]``, grey),
                the path of an image file, or a ``data:image/…;base64,`` URI.

        Raises:
            RequestError: if it is none of these, cannot be read, or has more than `MOST_PIXELS` pixels.
            MissingExtraError: without Pillow.
        """
        if isinstance(value, Picture):
            return value
        pil = _pillow()
        try:
            if isinstance(value, (str, Path)):
                value = pil.open(io.BytesIO(_content(str(value))))
            elif not isinstance(value, pil.Image):
                value = _from_array(pil, value)
            _check_size(*value.size)
            return cls._of_image(value)
        except pil.UnidentifiedImageError as error:  # its own words name an object and its address
            raise RequestError("cannot be read as a picture: it is in no format that Pillow knows") from error
        except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"cannot be read as a picture: {error}") from error

    @classmethod
    def from_url(cls, url: str, *, timeout: float = 30.0, most_bytes: int = 2**25) -> Picture:
        """Fetch a picture from the network, which nothing else here does.

        Args:
            url: ``http`` or ``https``.
            timeout: seconds.
            most_bytes: of the file.

        Raises:
            RequestError: if it cannot be fetched, or is no picture.
        """
        from urllib.request import urlopen

        if not url.startswith(_LINKS):
            raise RequestError(f"{shown(url)} is not an http(s) address")
        try:
            with urlopen(url, timeout=timeout) as reply:
                content = reply.read(most_bytes + 1)
        except OSError as error:
            raise RequestError(f"{shown(url)} cannot be fetched: {error}") from error
        if len(content) > most_bytes:
            raise RequestError(f"{shown(url)} has more than {most_bytes} bytes")
        return cls.of(_URI + "any;base64," + base64.b64encode(content).decode())

    @classmethod
    def _of_image(cls, image: Any) -> Picture:
        from PIL import ImageOps

        upright = ImageOps.exif_transpose(image) if getattr(image, "getexif", None) else image
        plain = upright.convert("RGB")
        digest = hashlib.sha256(f"{plain.size}".encode() + plain.tobytes()).hexdigest()[:32]
        buffer = io.BytesIO()
        plain.save(buffer, "PNG", compress_level=1)  # of a photo a seventh of the time, for a seventh more bytes
        return cls(digest, buffer.getvalue())

    @property
    def image(self) -> Image:
        """The picture as a PIL image, RGB."""
        return _unpacked(self).copy()

    def thumbnail(self, side: int = 64) -> str:
        """A small copy for pages, at most so many pixels wide and high, as a ``data:image/jpeg`` URI."""
        small, buffer = self.image, io.BytesIO()
        small.thumbnail((side, side))
        small.save(buffer, "JPEG", quality=80)
        return f"{_URI}jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    @property
    def uri(self) -> str:
        """The picture as a ``data:image/png;base64,`` URI, for JSON and HTML."""
        return f"{_URI}png;base64,{base64.b64encode(self.png).decode()}"


def as_pictured(value: Any) -> Pictured | tuple[Pictured, ...] | None:
    """What a user gives as an image, in the form that requests keep: paths stay paths until they are read.

    Args:
        value: as `Picture.of` takes it, a list of such things, frames ``[frames, height, width, 3]`` of uint8, or
            ``None``.

    Raises:
        RequestError: if it is none of these; for the address of a picture in the network.
    """
    if value is None or isinstance(value, Picture):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        if value.startswith(_LINKS):
            raise RequestError("is an address in the network, and nothing is fetched unasked; use Picture.from_url(…)")
        if value.startswith('["'):  # the column of a table
            try:
                return as_pictured(json.loads(value))
            except (ValueError, RecursionError) as error:  # of JSON, or of a number of thousands of digits
                raise RequestError("begins like a list of pictures in JSON, and is none") from error
        return Picture.of(value) if value.startswith(_URI) else value
    if len(getattr(value, "shape", ())) == 4:
        value = list(value)
    if isinstance(value, (list, tuple)):
        if not value:
            return None
        several = tuple(as_pictured(one) for one in value)
        if any(one is None or isinstance(one, tuple) for one in several):
            raise RequestError("a list of pictures must hold pictures and nothing else")
        return several  # type: ignore[return-value]  # just checked
    return Picture.of(value)


def each_pictured(value: Pictured | Sequence[Pictured] | None) -> tuple[Pictured, ...]:
    """The pictures, or their paths, of what a request keeps: one, several or none."""
    return () if value is None else (value,) if isinstance(value, (str, Picture)) else tuple(value)


def pictures_of(value: Pictured | Sequence[Pictured] | None, root: str | Path | None = None) -> tuple[Picture, ...]:
    """The pictures of a request or a probe, read where they are paths.

    Args:
        value: as requests keep it.
        root: folder that relative paths start from; ``None``: the current one.

    Raises:
        RequestError: if a file cannot be read as a picture.
    """
    try:
        paths = (one if isinstance(one, Picture) else Path(root or "") / one for one in each_pictured(value))
        return tuple(map(Picture.of, paths))
    except RequestError as error:
        raise RequestError(str(error), field="image") from error


def pictured_to_json(value: Pictured | Sequence[Pictured] | None) -> str | list[str] | None:
    """Pictures as URIs, paths as they are; `as_pictured` reads both."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Picture):
        return value.uri
    return [one if isinstance(one, str) else one.uri for one in value]


def _pillow() -> Any:
    try:
        from PIL import Image as pil
    except ImportError as error:
        raise require_extra("pillow", "vision", "reading pictures") from error
    return pil


@lru_cache(maxsize=2)  # a prompt is read alone and with its target, and asked in other words; photos are large
def _unpacked(picture: Picture) -> Image:
    opened: Image = _pillow().open(io.BytesIO(picture.png))
    opened.load()
    return opened


def _content(text: str) -> bytes:
    if not text.startswith(_URI):
        return Path(text).read_bytes()
    try:
        return base64.b64decode(text.partition(";base64,")[2], validate=True)
    except binascii.Error as error:
        raise RequestError("is a damaged data URI") from error


def _from_array(pil: Any, value: Any) -> Any:
    shape, kind = getattr(value, "shape", None), str(getattr(value, "dtype", ""))
    if shape is None or kind != "uint8" or len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (3, 4)):
        raise RequestError(
            "must be a PIL image, an array of uint8 [height, width, 3] (several: [n, height, width, 3]), a path, or a"
            " list of these; not"
            f" {type(value).__name__}" + (f" {kind} {tuple(shape)}" if shape is not None else ""),
        )
    _check_size(shape[1], shape[0])
    return pil.fromarray(value)


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MOST_PIXELS:
        raise RequestError(f"has {width} x {height} pixels; at most {MOST_PIXELS} are read")


# ---------------------------------------------------------------------- texts


class PicturedText(str):
    """A text whose placeholders stand for pictures; equal to another with the same characters and pictures.

    Joined with other text it keeps them. Cut or formatted it is a plain string again, whose placeholders stand for
    nothing.

    Args:
        text: with one placeholder per picture, as far as the processor wants any.
        pictures: in the order of the placeholders.
        processor: of the model; turns text and pictures into the model's inputs.
    """

    pictures: tuple[Picture, ...]
    processor: Any

    def __new__(cls, text: str, pictures: Sequence[Picture], processor: Any) -> PicturedText:
        self = super().__new__(cls, text)
        self.pictures, self.processor = tuple(pictures), processor
        return self

    def with_text(self, text: str) -> PicturedText:
        """Another text with the same pictures."""
        return PicturedText(text, self.pictures, self.processor)

    def __add__(self, other: str) -> PicturedText:
        return self.with_text(str(self) + str(other))

    def __radd__(self, other: str) -> PicturedText:
        return self.with_text(str(other) + str(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PicturedText) and self.pictures == other.pictures and super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((super().__hash__(), self.pictures))

    def __reduce__(self) -> Any:
        return PicturedText, (str(self), self.pictures, self.processor)


@dataclass(frozen=True)
class PictureFrame(ChatFrame):
    """What a processor wants around a prompt that is asked of pictures, in a chat or outside of one.

    Args:
        pictures: that the prompt is about.
        processor: of the model.
    """

    pictures: tuple[Picture, ...] = ()
    processor: Any = field(default=None, repr=False, compare=False)

    def text(self, turn: str) -> str:
        """The prompt behind its pictures."""
        return PicturedText(super().text(turn), self.pictures, self.processor)

    def in_context(self, lead: str, tail: str, index: int, turn: str) -> tuple[str, int]:
        """As in a chat; the context stands between the pictures and the prompt."""
        text, shift = super().in_context(lead, tail, index, turn)
        return PicturedText(text, self.pictures, self.processor), shift

    @property
    def of_text(self) -> ChatFrame:
        """The frame without pictures, around plain strings."""
        return ChatFrame(self.before, self.after, self.varied)

    def about(self, pictures: Sequence[Picture]) -> PictureFrame:
        """The same frame around other pictures, as many."""
        return replace(self, pictures=tuple(pictures))
