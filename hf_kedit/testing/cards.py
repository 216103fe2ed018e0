"""The YAML head of a model or dataset card: reading it, and what the Hub objects to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


def front_matter(text: str) -> dict[str, Any]:
    """The YAML head of a Markdown file; empty without one.

    Raises:
        ValueError: if it is not closed or holds no mapping.
        yaml.YAMLError: if it is not YAML.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    if lines[0] != "---":
        return {}
    if "---" not in lines[1:]:
        raise ValueError("the metadata block is not closed by a line ---")
    value = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("the metadata block must hold a mapping")
    return value


def card_errors(card: Mapping[str, Any]) -> list[str]:
    """What is wrong with the metadata of a card, in the fields that have a form of their own."""
    errors = [
        f'"{name}" must be a string'
        for name in ("library_name", "pipeline_tag", "base_model_relation")
        if not isinstance(card.get(name, ""), str)
    ]
    for name in ("tags", "base_model", "datasets", "license", "language", "metrics"):
        value = card.get(name, [])
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) and item for item in items):
            errors.append(f'"{name}" must be a string or an array of strings')
    for model in card.get("model-index", ()):
        results = model.get("results") if isinstance(model, dict) and model.get("name") else None
        if not isinstance(results, list):
            errors.append('"model-index" needs a name and results')
            continue
        for result in results:
            sound = result.get("task", {}).get("type") and result.get("metrics")
            sound = sound and {"type", "name"} <= result.get("dataset", {}).keys()
            if not sound or not all({"type", "value"} <= metric.keys() for metric in result["metrics"]):
                errors.append('"model-index": a result needs task.type, dataset.type, dataset.name and metrics')
    return errors
