"""The one door for JSON, YAML and CSV: values are plain, and whatever is wrong with a text is the caller's error."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_kedit
from hf_kedit import AutoEditConfig, EditConfig, load_edit_dataset, load_requests
from hf_kedit.config.easyedit import convert_hparams
from hf_kedit.editors.editor import Editor
from hf_kedit.errors import ConfigError, DataError, KeditError, RequestError
from hf_kedit.evaluation.measures.texts import read_vectorizer
from hf_kedit.evaluation.runs.bench import BenchPlan
from hf_kedit.statistics.moments import find_shared
from hf_kedit.storage.parsing import LEVELS, as_mapping, parse_csv, parse_json, parse_json_lines, parse_yaml
from hf_kedit.training.plan import TrainingPlan

DEEP, LONG = "[" * 100_000, "9" * 5_000
ALIASES = "a: &a [x]\n" + "".join(
    f"{chr(b)}: &{chr(b)} [{', '.join(['*' + chr(b - 1)] * 10)}]\n" for b in range(98, 109)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(JSON)
def test_what_is_plain_comes_in_as_it_was_written(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text, "x", DataError) == parse_json(text.encode(), "x", DataError) == value
    assert list(parse_json_lines(f"{text}\n\n{text}", "x", DataError)) == [value, value]


@given(st.recursive(st.none() | st.booleans() | st.integers(-99, 99) | st.text("ab- :", max_size=4), st.lists))
def test_yaml_too(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump(value), "x", DataError) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEEP, "nested"),
        ("[" * (LEVELS + 1) + "]" * (LEVELS + 1), f"nested more than {LEVELS}"),
        ('{"a":' * (LEVELS + 1) + "1" + "}" * (LEVELS + 1), f"nested more than {LEVELS}"),
        (LONG, "300 digits"),
        ("-" + "9" * 400, "300 digits"),
        ("{", "line 1"),
        ("[1,\n2", "line 2"),
        ("", "line 1"),
        (b"\xff", "UTF-8"),
        ("\ud83d{", "line 1"),
    ],
)
def test_json_that_is_none(text: str | bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=f"x.*{said}"):
        parse_json(text, "x", ConfigError)
    if isinstance(text, bytes) or ("\n" not in text and text):
        with pytest.raises(RequestError, match="x"):
            list(parse_json_lines(text, "x", RequestError))


def test_levels_that_are_just_allowed() -> None:
    text = "[" * LEVELS + "]" * LEVELS
    json.dumps(parse_json(text, "x", DataError))
    parse_yaml(text, "x", DataError)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEEP, "nested"),
        ("a: " + LONG, "x"),
        ("&a [*a]", "nested"),
        ("&a {b: *a}", "nested"),
        (ALIASES, "more than 1,000,000 values"),
        ("a: [", "YAML"),
        ("a: !!int b", "value"),
        ("a: !!float b", "value"),
        ("a: !!bool maybe", "value"),
        ("a: !!timestamp b", "value"),
        ("a: !!binary '?'", "x"),
        ("a: !!python/object:os.system {}", "YAML"),
        ("a: 2024-01-01", "write it in quotes"),
        ("2024-01-01: a", "write it in quotes"),
        ("a: !!binary eA==", "write it in quotes"),
        ("a: !!set {b}", "write it in quotes"),
        ("? [a]\n: b", "YAML"),
        ("a: 2024-13-45", "value"),
        ("a\x00b", "YAML"),
        ("a: *b", "YAML"),
        (b"\xff", "UTF-8"),
    ],
)
def test_yaml_that_is_none(text: str | bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)x.*{said}"):
        parse_yaml(text, "x", ConfigError)


def test_aliases_of_reasonable_size_are_fine() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: [*a, *a]", "x", DataError)["c"] == [{"x": 1}, {"x": 1}]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='[]{},:"1a \n-&*!|>?%\\', max_size=16) | st.binary(max_size=12))
def test_any_text_is_a_plain_value_or_the_callers_error(text: str | bytes) -> None:
    for parse in (parse_json, parse_yaml):
        try:
            value = parse(text, "x", DataError)
        except DataError:
            continue
        json.dumps(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\n" + "x" * 200_000, "line 2.*field"),
        ("a,a\n1,2", "two columns are called 'a'"),
        ("a,b\n1,2\n1,2,3\n", "line 3.*more cells"),
    ],
)
def test_csv_that_is_none(text: str, said: str) -> None:
    with pytest.raises(DataError, match=f"x.*{said}"):
        list(parse_csv(text.splitlines(keepends=True), "x", DataError))


def test_csv() -> None:
    assert list(parse_csv(["a,b\n", "1\n", '"x\n', 'y",2\n'], "x", DataError)) == [
        {"a": "1", "b": ""},
        {"a": "x\ny", "b": "2"},
    ]
    assert list(parse_csv([], "x", DataError)) == []


@pytest.mark.parametrize("value", [None, [], "a", 1, {1: "a"}, {None: 1}])
def test_a_mapping_has_text_as_names(value: Any) -> None:
    with pytest.raises(ConfigError, match="x"):
        as_mapping(value, "x", ConfigError)


# ---------------------------------------------------------------------- everything that reads files


def _vectorizer(file: Path) -> Any:
    file.rename(file.with_name("tfidf_vocab.json"))
    return read_vectorizer(file.parent)


def _inside(name: str, call: Callable[[str], Any]) -> Callable[[Path], Any]:
    """A reader of a folder in which the file has a fixed name."""
    return lambda file: call(str(file.rename(file.with_name(name)).parent))


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "requests in JSON": ("json", load_requests),
    "requests in JSON Lines": ("jsonl", load_requests),
    "requests in CSV": ("csv", load_requests),
    "data in JSON": ("json", load_edit_dataset),
    "data in JSON Lines": ("jsonl", load_edit_dataset),
    "data in CSV": ("csv", load_edit_dataset),
    "hparams in YAML": ("yaml", EditConfig.from_hparams),
    "hparams in JSON": ("json", EditConfig.from_hparams),
    "a saved config": ("json", _inside("edit_config.json", AutoEditConfig.from_pretrained)),
    "EasyEdit's hparams": ("yaml", convert_hparams),
    "a training plan": ("yaml", TrainingPlan.from_file),
    "a sweep": ("yaml", BenchPlan.from_file),
    "a vocabulary": ("json", _vectorizer),
    "an editor": ("json", _inside("edit_config.json", Editor.from_pretrained)),
    "second moments": ("json", _inside("stats.json", find_shared)),
}
BAD: dict[str, str | bytes] = {
    "deep": '{"a":' * 100_000,
    "deep lists": DEEP,
    "long number": '{"a": ' + LONG + "}",
    "long cell": "prompt,target_new\n" + "x" * 200_000 + ",y\n",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "half a character": '{"prompt": "\\ud83d is", "target_new": "x", "edit_type": "rome", "separator": "\\ud83d"}',
    "cut off": '{"a": [1, ',
    "a scalar": "1",
    "a list": "[[1]]",
    "other names": '{"a": 1, "b": null}',
    "null": "null",
    "empty": "",
    "NUL": '{"a": "\x00"}',
}


@pytest.mark.parametrize("content", BAD)
@pytest.mark.parametrize("reader", READERS)
def test_a_bad_file_is_a_typed_error_wherever_it_is_read(reader: str, content: str, tmp_path: Path) -> None:
    suffix, read = READERS[reader]
    text = BAD[content]
    file = tmp_path / f"x.{suffix}"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    with pytest.raises(KeditError) as caught:
        read(file)
    assert 0 < len(str(caught.value)) < 1000


def test_nobody_parses_by_himself() -> None:
    """Elsewhere, ``json.loads`` only makes a plain copy of what ``json.dumps`` has just written."""
    package = Path(hf_kedit.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package).as_posix()
        if place == "storage/parsing.py" or place.startswith("testing/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                copies = node.args and ast.unparse(node.args[0]).startswith("json.dumps(")
                if name in ("json.loads", "json.load", "yaml.safe_load", "yaml.load", "csv.reader", "csv.DictReader"):
                    found += [] if copies else [place]
    assert set(found) <= STILL, found


STILL = {
    "artifact/folders.py",
    "artifact/layout.py",
    "artifact/lora_import.py",
    "artifact/reading.py",
    "evaluation/measures/judges.py",
    "evaluation/report/report.py",
    "evaluation/runs/folder.py",
    "journal.py",
    "storage/files.py",
    "text/pictures.py",  # stands below storage/; a list of texts, of which any other value is refused
}
