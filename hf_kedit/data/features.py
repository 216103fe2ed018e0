"""The one table layout of edit requests: ``FEATURES``, and helpers that make and convert its rows.

A row is a plain dict. ``blank(**values)`` makes one with all columns, because ``Dataset.from_list`` accepts
neither missing nor extra ones. Probes are a flat list with an axis name each, since an Arrow struct has a fixed
set of keys and the axes differ from dataset to dataset.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Features, Json, Value

from ..errors import DataError, nearest
from ..requests import SLOT, EditRequest, Probe
from ..text.pictures import pictured_to_json
from ..text.subjects import find_subject

_TEXT = Value("string")
_PROBE = {"name": _TEXT, "prompt": _TEXT, "ground_truth": [[_TEXT]], "match": _TEXT, "image": _TEXT}

FEATURES = Features(
    {
        "id": _TEXT,  # "<dataset>/<row number in the source>"
        "dataset": _TEXT,
        "task": _TEXT,  # one of TASKS
        "group_id": _TEXT,  # edits that belong together share it; probes of the group sit on its last row
        "group_index": Value("int32"),
        "group_size": Value("int32"),
        "prompt": _TEXT,  # filled, stripped; with its slot "{}" where the subject would be sought in another place
        "subject": _TEXT,
        "target_new": _TEXT,
        "ground_truth": [_TEXT],  # old or true answers, may be empty
        "target_neg": _TEXT,  # an answer to unlearn
        "rephrase_prompts": [_TEXT],
        "locality": [_PROBE],
        "portability": [_PROBE],
        "image": _TEXT,  # relative to an image root
        "image_rephrase": _TEXT,
        "extra": Json(),  # always an object
    }
)
"""Columns of every dataset that :func:`hf_kedit.data.load_edit_dataset` returns."""

TASKS = (
    "fact",
    "sentiment",
    "sanitize",
    "concept",
    "safety",
    "personality",
    "multimodal",
    "multihop",
    "unstructured",
    "longform",
    "hallucination",
)

_DEFAULTS: dict[str, Any] = {
    "task": "fact",
    "group_index": 0,
    "group_size": 1,
    "ground_truth": (),
    "rephrase_prompts": (),
    "locality": (),
    "portability": (),
}


def blank(**values: Any) -> dict[str, Any]:
    """Return a row with all columns of :data:`FEATURES`, the given ones set.

    Raises:
        DataError: a column does not exist, ``task`` is unknown or ``extra`` is not a dict.
    """
    for name in values:
        if name not in FEATURES:
            raise DataError(f"There is no column {name!r}.{nearest(name, FEATURES)}")
    row: dict[str, Any] = {}
    for name in FEATURES:
        value = values.get(name, _DEFAULTS.get(name))
        row[name] = list(value) if isinstance(value, tuple) else value
    row["extra"] = {} if row["extra"] is None else row["extra"]
    if not isinstance(row["extra"], dict):
        raise DataError(f"'extra' must be a dict, not {type(row['extra']).__name__}.")
    if row["task"] not in TASKS:
        raise DataError(f"Unknown task {row['task']!r}.{nearest(str(row['task']), TASKS)}")
    return row


def probe(
    name: str,
    prompt: str,
    ground_truth: str | Iterable[str | Iterable[str]],
    *,
    match: str = "any",
    image: str | None = None,
) -> dict[str, Any]:
    """Return one probe of a row.

    Args:
        name: the axis, e.g. ``"Neighborhood"``.
        prompt: text before the answer.
        ground_truth: ``"a"`` → ``[["a"]]``, ``["a", "b"]`` → ``[["a"], ["b"]]``, nested lists unchanged (groups of
            aliases); empty answers are dropped.
        match: ``"any"`` or ``"all"``, see :class:`hf_kedit.requests.Probe`.
        image: path relative to an image root.

    Raises:
        DataError: ``match`` is unknown.
    """
    if match not in ("any", "all"):
        raise DataError(f"'match' must be 'any' or 'all', not {match!r}.")
    values = [ground_truth] if isinstance(ground_truth, str) else list(ground_truth)
    groups = [[value] if isinstance(value, str) else list(value) for value in values]
    kept = [[a for a in group if a and a.strip()] for group in groups]
    return {"name": name, "prompt": prompt, "ground_truth": [g for g in kept if g], "match": match, "image": image}


def _column(image: Any) -> str | None:
    """An image as the text of a column: a path, a ``data:`` URI, or the JSON of a list of these."""
    value = pictured_to_json(image)
    return json.dumps(value) if isinstance(value, list) else value


def row_from_request(request: EditRequest, *, dataset: str, number: int) -> dict[str, Any]:
    """Return the row of an edit request.

    Descriptive columns are taken from the request's metadata; metadata of other names go to ``extra``.

    Args:
        request: a validated request.
        dataset: name of the dataset.
        number: row number, used for the id of a request without one.
    """
    extra = dict(request.metadata)
    descriptive = {
        name: extra.pop(name)
        for name in ("dataset", "task", "group_id", "group_index", "group_size", "target_neg")
        if name in extra
    }
    nested = extra.pop("extra", None)
    if isinstance(nested, Mapping):
        extra = {**nested, **extra}
    elif nested is not None:
        extra["extra"] = nested
    earlier = (request.messages or [])[:-1]  # the last one is the prompt
    given = {"separator": request.separator, "messages": earlier or None, "prompt_format": request.prompt_format}
    extra |= {name: value for name, value in given.items() if value is not None}
    filled = request.filled_prompt
    unambiguous = SLOT not in request.prompt or find_subject(filled, str(request.subject)) == request.subject_span()
    return blank(
        **{"dataset": dataset, **descriptive},
        id=request.id or f"{dataset}/{number}",
        prompt=filled.strip() if unambiguous else request.prompt.strip(),
        subject=request.subject,
        target_new=request.target_new,
        ground_truth=list(request.ground_truth),
        rephrase_prompts=list(request.rephrase_prompts),
        locality=_flat(request.locality),
        portability=_flat(request.portability),
        image=_column(request.image),
        image_rephrase=_column(request.image_rephrase),
        extra=extra,
    )


def _flat(axes: Mapping[str, Iterable[Probe]]) -> list[dict[str, Any]]:
    return [
        probe(name, p.prompt, p.ground_truth, match=p.match, image=_column(p.image))
        for name, ps in axes.items()
        for p in ps
    ]
