"""Means as entries for the ``model-index`` of a model card on the Hub."""

from __future__ import annotations

from typing import Any

from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

from .results import Results
from .summaries import label_of, means_by_name


def model_index(report: Results, model_name: str, dataset_name: str, dataset_type: str | None) -> list[dict[str, Any]]:
    """The means of a report as the content of ``model-index``, fractions of 1.

    Every protocol and time is an entry of its own, so that numbers that are not comparable never share one.

    Args:
        report: what was measured.
        model_name: the edited model's.
        dataset_name: for people.
        dataset_type: id of the data set on the Hub; ``None``: derived from the name.
    """
    results = []
    for protocol in report.protocols:
        for when in report.times:
            summary = report.summary(protocol, when)
            about = {"protocol": protocol, "scorer": summary["scorer"], "setting": summary["setting"], "when": when}
            for (section, name), (_, value) in means_by_name(summary).items():
                results.append(
                    EvalResult(
                        task_type="text-generation",
                        task_name="Knowledge editing",
                        dataset_type=dataset_type or dataset_name.lower().replace(" ", "-"),
                        dataset_name=dataset_name,
                        dataset_config=f"{summary['setting']}, {when}, {protocol}",
                        dataset_args={k: v for k, v in about.items() if v is not None} | {"edits": summary["n"]},
                        metric_type=f"{section}_{name}" if section else name,
                        metric_name=f"{label_of(section, name)} after editing ({protocol})",
                        metric_value=round(value, 6),
                    )
                )
    return eval_results_to_model_index(model_name, results)
