"""What files with results hold: the types of their fields, which are checked before any field is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from ...errors import DataError, shown
from ...storage.parsing import as_mapping, parse_json, read_text

Number = float | int | None


class TextLayout(TypedDict):
    """What the model wrote behind one prompt."""

    section: str
    axis: NotRequired[str | None]
    prompt: str
    pre: str
    post: str


class SkippedLayout(TypedDict):
    """A probe that was not scored."""

    prompt: str
    reason: str


class RequestLayout(TypedDict):
    """The texts of an edit that pages show."""

    prompt: str
    target_new: str
    subject: NotRequired[str | None]
    ground_truth: NotRequired[str | None]


class RecordLayout(TypedDict):
    """One case under one protocol, at one time; see `CaseResult.to_dict`."""

    case_id: int
    id: NotRequired[str | None]
    requested_rewrite: RequestLayout
    protocol: str
    setting: NotRequired[str | None]
    when: str
    pre: dict[str, Any]
    post: dict[str, Any]
    n_probes: NotRequired[dict[str, int] | None]
    skipped: NotRequired[list[SkippedLayout] | None]
    texts: NotRequired[list[TextLayout] | None]
    time: NotRequired[Number]
    seconds_edit: NotRequired[Number]
    seconds_eval: NotRequired[Number]
    peak_memory_bytes: NotRequired[int | None]
    extra_memory_bytes: NotRequired[int | None]
    edit: NotRequired[dict[str, Any] | None]


class AboutLayout(TypedDict):
    """How the numbers of a section came about."""

    scorer: str
    comparable_group: str


class FailedLayout(TypedDict):
    """An edit that could not be made."""

    case_id: int
    reason: str


class ScoreLayout(TypedDict):
    """The score of a general ability."""

    score: Number


class CheckpointLayout(TypedDict):
    """State of the model as a whole; see `WearMeter.checkpoint`."""

    n_edits: int
    drift: NotRequired[dict[str, Number] | None]
    perplexity: NotRequired[Number]
    perplexity_before: NotRequired[Number]
    activation_norm_ratio: NotRequired[Number]
    state: NotRequired[str]
    abilities: NotRequired[dict[str, ScoreLayout]]
    abilities_before: NotRequired[dict[str, ScoreLayout]]


class LabelLayout(TypedDict):
    """The parts of a run of a sweep, by name."""

    model: str
    method: str
    dataset: str
    setting: str


class ScenarioLayout(TypedDict):
    """The scenario of a run, with its options."""

    name: str


class MetaLayout(TypedDict):
    """What was run."""

    protocols: NotRequired[dict[str, Any] | list[str]]
    when: NotRequired[list[str]]
    failed: NotRequired[list[FailedLayout] | None]
    checkpoints: NotRequired[list[CheckpointLayout] | None]
    label: NotRequired[LabelLayout]
    n: NotRequired[int]
    batch_size: NotRequired[int | None]
    seconds: NotRequired[Number]
    seconds_pre: NotRequired[Number]
    seconds_setup: NotRequired[Number]
    scenario: NotRequired[ScenarioLayout]


def read_json(path: Path, what: str, version: int) -> dict[str, Any]:
    """The mapping that a JSON file of this library holds.

    Args:
        path: of the file.
        what: it should hold, for messages.
        version: of the format that is known; files of a newer one are refused.

    Raises:
        DataError: if it holds anything else.
    """
    try:
        content = as_mapping(parse_json(read_text(path, DataError), "it", DataError), "it", DataError)
    except DataError as error:
        raise DataError(f"{str(path)!r} is not {what}: {error}") from error
    given = content.get("format_version", version)
    if isinstance(given, bool) or not isinstance(given, int):
        raise DataError(f"{str(path)!r} is not {what}: its format_version is {shown(given)}")
    if given > version:
        raise DataError(f"{str(path)!r} was written by a newer version of the library; upgrade to read it")
    return content
