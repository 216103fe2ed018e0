"""Reading records piece by piece, with errors that say where the file is damaged."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kedit.errors import DataError
from hf_kedit.storage import records
from hf_kedit.storage.records import read_object, read_records

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return str(path)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(JSON, max_size=6), chunk=st.integers(1, 7), indent=st.none() | st.just(2), ascii_only=st.booleans()
)
def test_any_list_is_read_back_in_pieces_of_any_size(
    rows: list[Any], chunk: int, indent: int | None, ascii_only: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    lines = "".join(json.dumps(r, ensure_ascii=ascii_only) + "\n" for r in rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_CHUNK", chunk)
        assert list(read_records(write(folder / "a.json", text))) == rows
        assert list(read_records(write(folder / "a.jsonl", lines))) == rows


@pytest.mark.parametrize("chunk", range(1, 12))
def test_a_number_goes_on_in_the_next_piece(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_CHUNK", chunk)
    rows = [1.5, 20, 3e300, -0.25, 12.75, 1e-7]
    assert list(read_records(write(tmp_path / "a.json", json.dumps(rows)))) == rows


def test_no_more_is_read_than_the_next_record_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may be larger than the memory: what follows a record is read when it is asked for."""
    monkeypatch.setattr(records, "_CHUNK", 64)
    text = io.StringIO("[" + ", ".join(f'{{"number": {i}}}' for i in range(1000)) + "]")
    found = records._array(text.read(64), text, "x")
    assert [next(found)["number"] for _ in range(10)] == list(range(10)) and text.tell() < 500


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet='[]{},:"1a \n-\\', max_size=12) | st.binary(max_size=12))
def test_any_text_is_read_as_json_reads_it_or_a_typed_error(
    text: str | bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = write(tmp_path_factory.mktemp("files") / "a.json", text)
    try:
        found = list(read_records(file))
    except DataError:
        with pytest.raises(ValueError):
            json.loads(Path(file).read_text(encoding="utf-8-sig"))
        return
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except ValueError:  # JSON Lines under the name of JSON
        value = [json.loads(line) for line in Path(file).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    assert found == (value if isinstance(value, list) else [value])


def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    """The end of the file is broken, and nobody notices who does not read that far."""
    body = ",".join(json.dumps({"n": i, "text": "x" * 1000}) for i in range(300))
    rows = read_records(write(tmp_path / "a.json", f"[{body}, oops]"))
    assert [next(rows)["n"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="record 300"):
        list(rows)


def test_long_objects_and_byte_order_marks(tmp_path: Path) -> None:
    rows = [{"text": "ä" * 400_000}, {"text": "b"}]
    assert list(read_records(write(tmp_path / "a.json", b"\xef\xbb\xbf" + json.dumps(rows).encode()))) == rows
    lines = '{"a": "\u2028"}\r\n\r\n{"a": 2}'
    assert list(read_records(write(tmp_path / "b.jsonl", lines))) == [{"a": "\u2028"}, {"a": 2}]
    assert list(read_records(write(tmp_path / "b.json", lines))) == [{"a": "\u2028"}, {"a": 2}]
    assert read_object(write(tmp_path / "c.json", '{"K_F": []}')) == {"K_F": []}


def test_tables(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 'a,b\n1998,"two\nlines"\ntrue,\n')
    assert list(read_records(file)) == [{"a": "1998", "b": "two\nlines"}, {"a": "true", "b": ""}]
    rows = [{"a": ["1998"], "b": {"c": i}} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(read_records(str(tmp_path / "a.parquet"))) == rows


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "", "empty"),
        ("a.json", '[{"a": 1}', "does not end"),
        ("a.json", '[{"a": 1} {"a": 2}]', "record 1.*comma"),
        ("a.json", '[{"a": 1},]', "record 1"),
        ("a.json", '[{"a": 1}] x', "closing bracket"),
        ("a.json", '{"a": 1', "line 1"),
        ("a.json", '{"a": 1}\nx', "line 2"),
        ("a.json", "[" * 5000, "nested|not JSON"),
        ("a.jsonl", '{"a": 1}\n{', "line 2"),
        ("a.json", b'["\xff"]', "UTF-8"),
        ("a.csv", "a,b\n1,2,3\n", "more cells"),
        ("a.parquet", b"PAR1 not really", "a.parquet"),
        ("a.txt", "x", "use .json"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        list(read_records(write(tmp_path / name, content)))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        list(read_records(str(tmp_path / "nowhere.json")))
