"""Records and means: how the records of a report are averaged, flattened, and shown. Plain functions on plain data."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import EvaluationError, require_extra
from ...requests import EditRequest, Probe
from ..measures import metrics
from ..measures.likelihoods import harmonic_score

LISTS = {"rewrite_acc": "rewrite_acc", "rephrase_acc": "rephrase_acc"}
"""Summary key → key of a plain list of scores in a record."""
AXES = {"locality": "locality", "locality_accuracy": "locality_accuracy", "portability": "portability"}
"""Summary key → key of a dict of axis → scores in a record."""
LABELS: dict[str, str] = {
    "rewrite_acc": "reliability (rewrite)",
    "rephrase_acc": "generalization (rephrase)",
    "locality": "locality (agreement)",
    "locality_accuracy": "locality (accuracy)",
    "portability": "portability",
}
SHORT = {
    "rewrite_acc": "reliability",
    "rephrase_acc": "generalization",
    "locality": "locality",
    "locality_accuracy": "locality accuracy",
    "portability": "portability",
}
"""Short names of the means for charts and wide tables."""


def easyedit_request(request: EditRequest) -> dict[str, Any]:
    """A request in the dictionary layout of EasyEdit; what is missing is ``None`` or ``{}``."""

    def section(axes: Mapping[str, Sequence[Probe]]) -> dict[str, Any]:
        return {
            axis: {
                "prompt": [probe.prompt for probe in probes],
                "ground_truth": [next(iter(probe.answers), None) for probe in probes],
            }
            for axis, probes in axes.items()
        }

    return {
        "prompt": request.filled_prompt,
        "target_new": request.target_new,
        "ground_truth": next(iter(request.ground_truth), None),
        "subject": request.subject,
        "rephrase_prompt": next(iter(request.rephrase_prompts), None),
        "locality": section(request.locality),
        "portability": section(request.portability),
    }


def exists(moment: str, name: str) -> bool:
    """Whether a mean exists before the edit: agreement with oneself does not."""
    return not (moment == "pre" and name == "locality")


def axis_scores(scores: Mapping[str, Sequence[float]] | None) -> dict[str, Sequence[float]] | None:
    """Axis → scores of a record's section, without the suffix of the keys; outputs are left out."""
    if scores is None:
        return None
    return {k.removesuffix("_acc"): v for k, v in scores.items() if k.endswith("_acc")}


def means_of(halves: Sequence[Mapping[str, Any]], *, pre: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """Means over the cases of one half ("pre" or "post") of the records, and the number of cases behind each."""
    means: dict[str, Any] = {}
    counts: dict[str, int] = {}
    per_axis: dict[str, dict[str, float]] = {}
    for name, key in LISTS.items():
        value, n = metrics.dataset_mean(half.get(key) for half in halves)
        if value is not None:
            means[name], counts[name] = value, n
    for name, key in AXES.items():
        if pre and not exists("pre", name):
            continue
        cases = [axis_scores(half.get(key)) for half in halves]
        value, n = metrics.dataset_mean(cases)
        if value is None:
            continue
        means[name], counts[name] = value, n
        axes = metrics.axis_means(cases)
        per_axis[name] = {axis: mean for axis, (mean, _) in axes.items()}
        counts |= {f"{name}/{axis}": n for axis, (_, n) in axes.items()}
    extra, extra_counts = _extra_means(halves)
    return {**means, **extra, "per_axis": per_axis}, counts | extra_counts


def extra_sections(half: Mapping[str, Any]) -> list[str]:
    """Names of the sections in a record's or summary's half that only some protocols have."""
    fixed = {*AXES, "per_axis", "metric_meta"}
    return [name for name, value in half.items() if isinstance(value, Mapping) and name not in fixed]


def shown(section: str, value: float | None) -> str:
    """A number of a section for people: a percentage, except for entropies."""
    return f"{value:.2f} bits" if section == "fluency" and value is not None else percent(value)


def _extra_means(halves: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Means of the sections that only some protocols have: section → key → mean, and the cases behind each."""
    means: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for section in dict.fromkeys(name for half in halves for name in extra_sections(half)):
        for key in dict.fromkeys(k for half in halves for k in half.get(section, ())):
            value, n = metrics.dataset_mean(half.get(section, {}).get(key) for half in halves)
            if value is not None:
                means.setdefault(section, {})[key] = value
                counts[f"{section}/{key}"] = n
    successes = [means.get("counterfact", {}).get(name) for name in ("ES", "PS", "NS")]
    known = [value for value in successes if value is not None]
    if len(known) == 3:  # the harmonic mean of the means, not a mean over cases
        means["counterfact"]["S"] = harmonic_score(known)
    return means, counts


def is_extra(column: str) -> bool:
    return column.startswith(("pre_", "post_")) and column.split("_", 1)[1] not in LABELS


def look_up(post: Mapping[str, Any], name: str) -> float | None:
    """A mean of a summary by its name, or by ``section/key``."""
    section, slash, key = name.partition("/")
    if not slash:
        value = post.get(name)
    else:
        value = (post.get(section) if section not in AXES else post["per_axis"].get(section)) or {}
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, float) else None


def refuse_mixture(records: Sequence[Mapping[str, Any]]) -> None:
    if not records:
        raise EvaluationError("there are no records to summarise")
    groups: dict[str, set[str]] = {}
    for record in records:
        for section, meta in record["post"].get("metric_meta", {}).items():
            groups.setdefault(section, set()).add(meta["comparable_group"])
    for section, found in groups.items():
        if len(found) > 1:
            raise EvaluationError(f"'{section}' mixes numbers that are not comparable: {', '.join(sorted(found))}")


def scorer_of(record: Mapping[str, Any]) -> str | None:
    meta = record["post"].get("metric_meta", {})
    return next((m["scorer"] for section, m in meta.items() if section != "locality"), None)


def flat_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """One record as a row without nesting (but for the axes)."""
    request = record["requested_rewrite"]
    row: dict[str, Any] = {
        "case_id": record["case_id"],
        "id": record.get("id"),
        "protocol": record["protocol"],
        "scorer": scorer_of(record),
        "setting": record.get("setting"),
        "when": record["when"],
        "prompt": request["prompt"],
        "subject": request["subject"],
        "target_new": request["target_new"],
    }
    for moment in ("pre", "post"):
        half = record[moment]
        for name in LABELS:
            if exists(moment, name):
                scores = half.get(LISTS[name]) if name in LISTS else axis_scores(half.get(AXES[name]))
                row[f"{moment}_{name}"] = metrics.case_mean(scores)
        for section in extra_sections(half):
            for key, scores in half[section].items():
                row[f"{moment}_{section}_{key}"] = metrics.case_mean(scores)
    costs = ("seconds_edit", "seconds_eval", "peak_memory_bytes", "extra_memory_bytes")
    row |= {name: record.get(name) for name in costs}
    row["n_skipped_probes"] = len(record.get("skipped") or ())
    row["axes"] = []
    for name in AXES:
        before = axis_scores(record["pre"].get(name)) or {}
        for axis, scores in (axis_scores(record["post"].get(name)) or {}).items():
            pre = list(before.get(axis, ()))
            row["axes"].append({"section": name, "axis": axis, "pre": pre, "post": list(scores)})
    return row


def data_frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows as a ``pandas.DataFrame``.

    Raises:
        MissingExtraError: if pandas is not installed.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise require_extra("pandas", "eval", "to_pandas()") from error
    return pandas.DataFrame(list(rows))


def percent(value: float | None) -> str:
    """A fraction of 1 as a percentage without sign; a dash for what does not exist."""
    return "–" if value is None else f"{100 * value:.1f}"
