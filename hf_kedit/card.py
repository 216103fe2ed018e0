"""The model card (README.md) of a saved edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData

from .journal import Edit

_SHOWN = 50


def model_card(config: dict[str, Any], edits: Sequence[Edit]) -> str:
    """Return the card as Markdown with a YAML head.

    Args:
        config: content of ``edit_config.json``.
        edits: the journal.
    """
    base = config["base_model_name_or_path"]
    is_hub = bool(base) and not base.startswith(("/", ".", "kedit/"))
    data = ModelCardData(
        library_name="hf_kedit",
        base_model=base if is_hub else None,
        base_model_relation="adapter" if is_hub else None,
        tags=["knowledge-editing", config["method"]],
    )
    rows = "\n".join(
        f"| `{e.id}` | {_cell(e.request.filled_prompt)} | {_cell(', '.join(e.request.ground_truth)) or '?'}"
        f" | {_cell(e.request.target_new)} | {e.method} |"
        for e in edits[:_SHOWN]
    )
    more = f"\n\n… and {len(edits) - _SHOWN} more in `edits.jsonl`." if len(edits) > _SHOWN else ""
    touched = "\n".join(
        f"- `{key}` {tuple(m['shape'])}, {'rank ' + str(m['rank']) if m['rank'] else 'dense'}"
        for key, m in config["modules"].items()
    )
    shown_base = base or "a model that was in memory"
    load_base = "" if base else ", base_model=model"
    return f"""---
{data.to_yaml()}
---

# {len(edits)} knowledge edit{"" if len(edits) == 1 else "s"} of {shown_base}

This folder holds changes to single facts, not a whole model. They are laid on the base model when it is loaded,
and every one of them can be taken back.

| edit | prompt | before | now | method |
| --- | --- | --- | --- | --- |
{rows}{more}

## Use

```python
from hf_kedit import EditableModel

model = EditableModel.from_pretrained("path/or/id of this folder"{load_base})
model.edits                      # what was changed
with model.disable_edits():      # the original model, for comparison
    ...
model.rollback("all")            # or one edit: model.rollback("{edits[0].id if edits else "edit-id"}")
```

## What it was made on

- base model: `{shown_base}`, revision `{config["base_model_revision"] or "not recorded"}`, {config["base_dtype"]}
- method: {config["method"]} (hyperparameters in `edit_config.json`)
- changed weights (checked by their SHA-256 when the edits are loaded):
{touched}

Editing a fact can change others. Measure it on your own questions before you rely on it.
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
