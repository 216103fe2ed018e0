"""How results of cases are averaged, flattened and named. Plain functions on plain data."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import EvaluationError, require_extra
from ..measures import metrics
from ..measures.catalogue import combined_of, metric_of, metrics_of
from .case_result import AXES, CaseResult, Half

NAMES = {
    "rewrite": "rewrite_acc",
    "rephrase": "rephrase_acc",
    "locality": "locality",
    "locality_accuracy": "locality_accuracy",
    "portability": "portability",
}
"""Section → name of its mean in a summary."""
LABELS: dict[str, str] = {
    "rewrite_acc": "reliability (rewrite)",
    "rephrase_acc": "generalization (rephrase)",
    "locality": "locality (agreement)",
    "locality_accuracy": "locality (accuracy)",
    "portability": "portability",
}
"""Name of a mean → what it is, for people."""
SHORT = {
    "rewrite_acc": "reliability",
    "rephrase_acc": "generalization",
    "locality": "locality",
    "locality_accuracy": "locality accuracy",
    "portability": "portability",
}
"""Short names of the means for charts and wide tables."""
AxisKey = tuple[str, str]
"""Section of a number that only some protocols have (else empty), and its name."""


def exists(half: str, section: str) -> bool:
    """Whether a section exists in a half: agreement with oneself, before the edit, does not."""
    return not (half == "pre" and section == "locality")


# ---------------------------------------------------------------------- means


def means_of(halves: Sequence[Half], *, pre: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """Means over the cases of one half of their results, and the number of cases behind each."""
    means: dict[str, Any] = {}
    counts: dict[str, int] = {}
    per_axis: dict[str, dict[str, float]] = {}
    for section, name in NAMES.items():
        if not exists("pre" if pre else "post", section):
            continue
        cases = [half.scores.get(section) for half in halves]
        value, n = metrics.dataset_mean(cases)
        if value is None:
            continue
        means[name], counts[name] = value, n
        if section in AXES:
            axes = metrics.axis_means(cases)
            per_axis[name] = {str(axis): mean for axis, (mean, _) in axes.items()}
            counts |= {f"{name}/{axis}": n for axis, (_, n) in axes.items()}
    numbers, number_counts = _means_of_numbers(halves)
    return {**means, **numbers, "per_axis": per_axis}, counts | number_counts


def _means_of_numbers(halves: Sequence[Half]) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Means of the sections that only some protocols have: section → key → mean, and the cases behind each."""
    means: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for section in dict.fromkeys(name for half in halves for name in half.numbers):
        for key in dict.fromkeys(k for half in halves for k in half.numbers.get(section, ())):
            value, n = metrics.dataset_mean(half.numbers.get(section, {}).get(key) for half in halves)
            if value is not None:
                means.setdefault(section, {})[key] = value
                counts[f"{section}/{key}"] = n
    for section, of_section in means.items():
        of_section |= combined_of(section, of_section)
        order = list(dict.fromkeys([*metrics_of(section), *of_section]))
        means[section] = {key: of_section[key] for key in order if key in of_section}
    return means, counts


def refuse_mixture(results: Sequence[CaseResult]) -> None:
    """Raise an `EvaluationError` if there is nothing to average, or something that must not be."""
    if not results:
        raise EvaluationError("there are no records to summarise")
    groups: dict[str, set[str]] = {}
    for result in results:
        for section, about in result.post.about.items():
            groups.setdefault(section, set()).add(about["comparable_group"])
    for section, names in groups.items():
        if len(names) > 1:
            raise EvaluationError(f"'{section}' mixes numbers that are not comparable: {', '.join(sorted(names))}")


# ---------------------------------------------------------------------- what a summary holds


def extra_sections(post: Mapping[str, Any]) -> list[str]:
    """Names of the sections of a summary's half that only some protocols have."""
    return [name for name, value in post.items() if isinstance(value, Mapping) and name != "per_axis"]


def look_up(post: Mapping[str, Any], name: str) -> float | None:
    """A mean of a summary by its name, or by ``section/key``."""
    section, slash, key = name.partition("/")
    if not slash:
        value = post.get(name)
    else:
        value = (post.get(section) if section not in AXES else post["per_axis"].get(section)) or {}
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, float) else None


def means_by_name(summary: Mapping[str, Any]) -> dict[AxisKey, tuple[float | None, float]]:
    """All means of a summary, in order: (section, name) → before and after."""
    pre, post = summary["pre"], summary["post"]
    # Under the likelihood protocol ES, PS and NS are these same numbers under the names that papers use.
    again = ("rewrite_acc", "rephrase_acc", "locality_accuracy") if "counterfact" in post else ()
    means: dict[AxisKey, tuple[float | None, float]] = {
        ("", name): (pre.get(name), post[name]) for name in LABELS if name in post and name not in again
    }
    for section in extra_sections(post):
        means |= {(section, key): (pre.get(section, {}).get(key), value) for key, value in post[section].items()}
    return means


def means_by_axis(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[AxisKey, float]]:
    """Name of a run → (section, axis) → mean after the edits, of sections that have several axes in some run."""
    by_run = {name: summary["post"].get("per_axis", {}) for name, summary in summaries.items()}
    several = {section for axes in by_run.values() for section, means in axes.items() if len(means) > 1}
    several.discard("locality_accuracy")
    return {
        name: {(s, axis): mean for s, means in axes.items() if s in several for axis, mean in means.items()}
        for name, axes in by_run.items()
    }


def label_of(section: str, name: str) -> str:
    """Name of a mean for people; an arrow where less is better."""
    if not section:
        return SHORT[name]
    metric = metric_of(section, name)
    label = f"{section} {name}" if metric.label is None else metric.label
    return f"{label} ↓" if metric.better == "lower" else label


def in_charts(section: str, name: str) -> bool:
    """Whether a mean gets a chart of its own, or stands in the table only."""
    return metric_of(section, name).chart


def formatted(section: str, name: str, value: float | None) -> str:
    """A number for people, in its unit."""
    return metric_of(section, name).text(value)


# ---------------------------------------------------------------------- rows


def flat_row(result: CaseResult) -> dict[str, Any]:
    """One result as a row without nesting (but for the axes)."""
    row: dict[str, Any] = {
        "case_id": result.number,
        "id": result.id,
        "protocol": result.protocol,
        "scorer": result.scorer,
        "setting": result.setting,
        "when": result.when,
        **{name: result.request.get(name) for name in ("prompt", "subject", "target_new")},
    }
    for half_name, half in result.halves.items():
        for section, name in NAMES.items():
            if exists(half_name, section):
                row[f"{half_name}_{name}"] = metrics.case_mean(half.scores.get(section))
        for section, numbers in half.numbers.items():
            for key, values in numbers.items():
                row[f"{half_name}_{section}_{key}"] = metrics.case_mean(values)
    row |= result.costs()
    row.pop("time")
    row["n_skipped_probes"] = len(result.skipped)
    row["axes"] = []
    for section in AXES:
        before = result.pre.scores.get(section, {})
        for axis, scores in result.post.scores.get(section, {}).items():
            row["axes"].append({"section": section, "axis": axis, "pre": before.get(axis, []), "post": scores})
    return row


def is_extra(column: str) -> bool:
    """Whether a column of `flat_row` holds a number that only some protocols have."""
    return column.startswith(("pre_", "post_")) and column.split("_", 1)[1] not in LABELS


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
