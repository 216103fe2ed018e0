"""Pictures as values of requests: what is taken, how it is saved, what is refused."""

from __future__ import annotations

import io
import json
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_kedit import EditRequest, Picture, Probe
from hf_kedit.data.features import row_from_request
from hf_kedit.errors import RequestError
from hf_kedit.text import pictures
from hf_kedit.text.pictures import PicturedText, pictures_of
from tests.seeing import picture

FACT = {"prompt": "What is this?", "target_new": "a cat"}


def test_an_image_is_the_same_picture_however_it_is_given(tmp_path: Path) -> None:
    image = picture(0)
    path = tmp_path / "a.png"
    image.save(path)
    same = [image, np.asarray(image), image.convert("RGBA"), Picture.of(image), Picture.of(image).uri]
    requests = [EditRequest(**FACT, image=value) for value in same]
    assert all(request == requests[0] for request in requests)
    assert EditRequest(**FACT, image=path).with_pictures() == requests[0]
    assert requests[0] != EditRequest(**FACT, image=picture(1))
    (kept,) = pictures_of(requests[0].image)
    assert np.array_equal(np.asarray(kept.image), np.asarray(image))


def test_frames_are_pictures_one_behind_the_other() -> None:
    frames = [picture(i) for i in range(3)]
    video = np.stack([np.asarray(frame) for frame in frames])
    assert EditRequest(**FACT, image=video) == EditRequest(**FACT, image=frames)
    with pytest.raises(RequestError, match="uint8"):
        EditRequest(**FACT, image=video.astype(np.float32))


def test_an_address_is_fetched_where_that_is_asked_for(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("no picture")
    with served(tmp_path) as address:
        assert Picture.from_url(f"{address}/a.png") == Picture.of(picture(0))
        for name, said in (("b.png", "cannot be fetched"), ("a.txt", "cannot be read")):
            with pytest.raises(RequestError, match=said):
                Picture.from_url(f"{address}/{name}")
        with pytest.raises(RequestError, match="more than 100 bytes"):
            Picture.from_url(f"{address}/a.png", most_bytes=100)
    with pytest.raises(RequestError, match="not an http"):
        Picture.from_url((tmp_path / "a.png").as_uri())


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A folder on this machine's own address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_request_with_pictures_goes_through_json() -> None:
    request = EditRequest(
        **FACT,
        image=[picture(0), picture(1)],
        image_rephrase=picture(2),
        locality={"image": [Probe("What?", image=picture(3))], "text": [Probe("Who?")]},
    )
    again = EditRequest.from_dict(json.loads(json.dumps(request.to_dict())))
    assert again == request
    assert again.locality["text"][0].image is None
    row = row_from_request(request, dataset="d", number=0)
    assert EditRequest.from_dict(row).image == request.image and EditRequest.from_dict(row).image_rephrase


def test_paths_stay_paths_until_they_are_read(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    request = EditRequest(**FACT, image="a.png", locality={"i": [Probe("?", image="a.png")]})
    assert request.to_dict()["image"] == "a.png"
    read = request.with_pictures(tmp_path)
    assert read.image == Picture.of(picture(0)) == read.locality["i"][0].image
    with pytest.raises(RequestError, match="cannot be read"):
        request.with_pictures(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("https://example.org/a.png", "from_url"),
        ("data:image/png;base64,!!", "damaged"),
        ("data:image/png;base64,AAAA", "cannot be read"),
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.zeros((4, 4, 2), np.uint8), "uint8"),
        (object(), "PIL image"),
        ([picture(0), None], "list"),
    ],
)
def test_what_is_no_picture_is_refused(value: object, said: str) -> None:
    with pytest.raises(RequestError, match=said) as error:
        EditRequest(**FACT, image=value, id="x")
    assert error.value.field == "image" and error.value.request_id == "x"


def test_a_small_file_that_claims_many_pixels_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_PIXELS", 1599)
    with pytest.raises(RequestError, match="40 x 40"):
        EditRequest(**FACT, image=picture(0))
    buffer = io.BytesIO()
    Image.new("1", (40, 40)).save(buffer, "PNG")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("was unpacked"))
    with pytest.raises(RequestError, match="40 x 40"):
        Picture.of(Image.open(buffer))


def test_a_text_with_pictures_is_equal_to_itself_alone() -> None:
    one, two = (PicturedText("a", [Picture.of(picture(i))], None) for i in (0, 1))
    assert one != two and one != "a" and one == PicturedText("a", one.pictures, None)
    assert len({one, two, "a", PicturedText("a", one.pictures, None)}) == 3
    joined = "x" + one + "y"
    assert isinstance(joined, PicturedText) and joined == PicturedText("xay", one.pictures, None)
    assert type(str(joined)) is str and pickle.loads(pickle.dumps(joined)) == joined


def test_a_photo_stands_as_its_camera_was_held_whatever_lies_in_its_rows() -> None:
    """Orientation 6 of EXIF: the rows of the file are the columns of the picture, from the right."""
    lying = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    lying.save(buffer, "PNG", exif=exif)
    found = Picture.of(Image.open(io.BytesIO(buffer.getvalue())))
    assert np.array_equal(np.asarray(found.image), np.rot90(np.asarray(lying), -1))


def test_pictures_of_the_same_bytes_in_another_shape_are_others() -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8)
    assert Picture.of(pixels.reshape(2, 3, 3)).digest != Picture.of(pixels.reshape(3, 2, 3)).digest


def test_who_draws_on_a_picture_draws_on_a_copy() -> None:
    black = Picture.of(np.zeros((2, 2, 3), dtype=np.uint8))
    black.image.putpixel((0, 0), (255, 0, 0))
    assert black.image.getpixel((0, 0)) == (0, 0, 0)
