"""Metrics for `evaluate`: `load_metric` makes one, `write_space` writes the folder of one that can be published.

Such a folder is what ``evaluate.load(path)`` reads, and what a Space of the Hub holds. It needs the installed library,
where the code is. Without `evaluate`, which is an optional package, the names can still be listed.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..errors import DataError, check_choice, require_extra
from ..storage.files import named_path

_CLASSES = {
    "kedit": "Kedit",
    "kedit_accuracy": "KeditAccuracy",
    "kedit_consistency": "KeditConsistency",
    "kedit_counterfact": "KeditCounterfact",
    "kedit_fluency": "KeditFluency",
    "kedit_locality": "KeditLocality",
    "kedit_perplexity": "KeditPerplexity",
    "kedit_sentiment": "KeditSentiment",
    "kedit_text_overlap": "KeditTextOverlap",
}


def list_metrics() -> list[str]:
    """Names that `load_metric` knows."""
    return list(_CLASSES)


def load_metric(name: str, config_name: str | None = None, prefix: str | None = None, **kwargs: Any) -> Any:
    """Make an ``evaluate.Metric``, with ``compute``, ``add``, ``add_batch``, and usable in ``evaluate.combine``.

    Args:
        name: see `list_metrics`; the prefix ``kedit_`` may be left out.
        config_name: variant of the metric; default: its first.
        prefix: put before the names of its numbers (with an underscore).
        kwargs: for ``evaluate.Metric``, such as ``cache_dir`` or ``keep_in_memory``.

    Raises:
        EvaluationError: for an unknown name or variant; the nearest known one is given.
        MissingExtraError: if `evaluate` is not installed.
    """
    return _metric_class(_full_name(name))(config_name=config_name, prefix=prefix, **kwargs)


def write_space(name: str, folder: str | Path) -> Path:
    """Write a metric as a folder that ``evaluate.load`` reads and that can be pushed to the Hub as a Space.

    Args:
        name: see `list_metrics`; the prefix ``kedit_`` may be left out.
        folder: the metric gets a folder of its name in it.

    Returns:
        The metric's folder, with ``<name>.py``, ``README.md``, ``app.py`` and ``requirements.txt``; files of these
        names are overwritten.

    Raises:
        EvaluationError: for an unknown name.
        MissingExtraError: if `evaluate` is not installed.
        DataError: if the folder cannot be written.
    """
    full = _full_name(name)
    metric = _metric_class(full)
    files = {
        f"{full}.py": _SCRIPT.format(name=full, metric=metric.__name__),
        "README.md": _readme(full, metric),
        "app.py": _APP.format(name=full),
        "requirements.txt": "hf_kedit[eval]\n",
    }
    target = named_path(folder, "the folder", DataError) / full
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (target / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write the metric to {str(target)!r}: {error}") from error
    return target


def _full_name(name: str) -> str:
    full = name if name in _CLASSES else f"kedit_{name}"
    check_choice("metric", full, _CLASSES)
    return full


def _metric_class(full: str) -> Any:
    try:
        importlib.import_module("evaluate")
    except ImportError as error:
        raise require_extra("evaluate", "eval", "a metric for evaluate") from error
    from . import evaluate_modules

    return getattr(evaluate_modules, _CLASSES[full])


# ---------------------------------------------------------------------- the files of a Space

# `evaluate` takes the first metric class that it finds in the script: nothing else may be imported into it.
_SCRIPT = '''"""The metric {name} of hf_kedit, for evaluate.load."""

from hf_kedit.evaluation.evaluate_modules import {metric}  # noqa: F401
'''

_APP = """import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("{name}.py"))
"""

_README = """---
title: {name}
sdk: gradio
app_file: app.py
pinned: false
license: apache-2.0
tags:
- evaluate
- metric
- knowledge-editing
description: >-
  {summary}
---

# {name}

{description}

```python
import evaluate

metric = evaluate.load("{name}"{config})  # or the path of this folder
{call}
```

| variant (`config_name`) | columns |
| --- | --- |
{variants}

The code is part of hf_kedit (`pip install "hf_kedit[eval]"`); its documentation says how the numbers are defined.
"""


def _readme(name: str, metric: Any) -> str:
    lines = [line.strip() for line in (metric.__doc__ or "").splitlines()]
    first = next(iter(metric.variants))
    columns = ", ".join(f"{column}={value!r}" for column, value in metric.example.items()) or "…"
    return _README.format(
        name=name,
        summary=lines[0],
        description="\n".join(lines).strip(),
        config="" if first == "default" else f', "{first}"',
        call=f"metric.compute({columns})",
        variants="\n".join(
            f"| `{variant}` | {', '.join(f'`{c}`' for c in columns)} |" for variant, columns in metric.variants.items()
        ),
    )
