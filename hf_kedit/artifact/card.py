"""The model card (README.md) of a saved edit, with its evaluation where there is one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

from .. import embedded
from ..errors import HubError
from ..gguf.reading import inside_repository
from ..journal import Edit
from ..loading import is_local
from ..logging import get_logger
from ..remote.model import RemoteModel
from ..storage.display import markdown_code, markdown_text, python_text
from ..storage.files import read_file
from .layout import ADAPTER_CONFIG, CARD, EVAL_RESULTS

PLACEHOLDER, IN_MEMORY = "path/or/id of this folder", "a model that was in memory"
logger = get_logger(__name__)
_SHOWN = 50
_TASK_ID = "knowledge-editing"


class HasModelIndex(Protocol):
    """An evaluation, as the card needs it: an `EvaluationReport`."""

    def to_model_index(self, model_name: str | None = None) -> list[dict[str, Any]]:
        """Its means in the form of a card's ``model-index``."""


def card_files(
    config: dict[str, Any], edits: Sequence[Edit], *, repo_id: str | None = None, report: HasModelIndex | None = None
) -> dict[str, bytes]:
    """The card, and the numbers in the form that the Hub's leaderboards read: file name → content.

    Args:
        config: content of ``edit_config.json``.
        edits: the journal.
        repo_id: where the edits will be.
        report: an evaluation of them.
    """
    import yaml

    name: str | None = None
    results: list[EvalResult] = []
    if report is not None:
        name, results = model_index_to_eval_results(report.to_model_index(repo_id or "edited model"))
    files = {CARD: model_card(config, edits, repo_id=repo_id, model_name=name, results=results).encode("utf-8")}
    if results:
        entries = [
            EvalResultEntry(
                dataset_id=result.dataset_type,
                task_id=_TASK_ID,
                value=result.metric_value,
                notes=f"{result.metric_name}; {result.dataset_config}",
            )
            for result in results
        ]
        files[EVAL_RESULTS] = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False).encode("utf-8")
    return files


def model_card(
    config: dict[str, Any],
    edits: Sequence[Edit],
    *,
    repo_id: str | None = None,
    model_name: str | None = None,
    results: Sequence[EvalResult] = (),
) -> str:
    """Return the card as Markdown with a YAML head.

    Args:
        config: content of ``edit_config.json``.
        edits: the journal.
        repo_id: where the edits will be.
        model_name: for the numbers.
        results: the numbers.
    """
    base = config["base_model_name_or_path"]
    remote = config["base_model_class"] == RemoteModel.__name__
    at_sites = bool(config.get("tensors_in_adapter"))
    is_adapter = ADAPTER_CONFIG in config["files"] and not at_sites
    data = ModelCardData(
        library_name="hf_kedit",
        **_origin("" if remote else base, config["base_model_revision"], "adapter"),
        datasets=_datasets(results),
        metrics=sorted({r.metric_type for r in results}) or None,
        pipeline_tag=_pipeline_tag(config),
        tags=["knowledge-editing", config["method"], *(("peft", "lora") if is_adapter else ())] + ["peft"] * at_sites,
        model_name=model_name,
        eval_results=list(results) or None,
    )
    touched = "\n".join(
        f"- {markdown_code(key)} {tuple(m['shape'])}, {'rank ' + str(m['rank']) if m['rank'] else 'dense'}"
        for key, m in config["modules"].items()
    ) or "\n".join(f"- none; edits act at run time at {markdown_code(path)}" for path in _sites(config))
    undo_first = f"model.rollback({python_text(edits[0].id if edits else 'edit-id')})"
    here = repo_id or PLACEHOLDER
    load_base = ", base_model=backend" if remote else ", base_model=model" if not base or is_local(base) else ""
    if at_sites:
        elsewhere = _with_peft(here)
    elif is_adapter:
        elsewhere = _without_library(base, here, config.get("edit_folders", {}))
    else:
        elsewhere = _only_with_library(config, here)
    return f"""---
{data.to_yaml()}
---

# {len(edits)} knowledge edit{"" if len(edits) == 1 else "s"} of {markdown_text(_shown(base))}

This folder holds changes to single facts, not a whole model. They are laid on the base model when it is loaded,
and every one of them can be taken back.

{_edit_table(edits)}

## Use

```python
from hf_kedit import EditableModel{", OpenAICompatibleBackend" if remote else ""}
{_backend_line(base) if remote else ""}
model = EditableModel.from_pretrained({python_text(here)}{load_base})
model.edits                      # what was changed
with model.disable_edits():      # the original model, for comparison
    ...
```

{elsewhere}
## Undo

`model.rollback("all")` restores the bits of the base model, {markdown_code(undo_first)} takes one edit back.
An earlier version of a repository is loaded with `from_pretrained(…, revision="its tag or commit")`.

## What it was made on

- base model: {markdown_code(_shown(base))}, {_revision(config["base_model_revision"])}, {_numbers_of(config)}
- method: {markdown_text(config["method"])} (hyperparameters in `edit_config.json`)
- changed weights (checked by their SHA-256 when the edits are loaded):
{touched}

{_numbers(results)}"""


def _backend_line(name: str) -> str:
    """How a model behind an API is asked; only whoever loads the edits knows where it is."""
    return f"\nbackend = OpenAICompatibleBackend('https://host/v1', {python_text(name)}, api_key_env='OPENAI_API_KEY')"


def _with_peft(here: str) -> str:
    """How edits at sites are used through PEFT."""
    return f"""With `hf_kedit` imported, the folder is also an adapter for PEFT and transformers; outputs are the same:

```python
import hf_kedit
from peft import PeftModel

model = PeftModel.from_pretrained(base, {python_text(here)})      # or base.load_adapter({python_text(here)})
```

Without `import hf_kedit` PEFT does not know the type of this adapter.

"""


def _sites(config: Mapping[str, Any]) -> list[str]:
    """Names of the modules at which edits act at run time."""
    memories = config.get("books", {}).get("adapter", {}).get("memories", [])
    return [path for memory in memories for path in memory["modules"]]


def merged_card(config: dict[str, Any], edits: Sequence[Edit]) -> str:
    """Return the card of a whole model that edits were merged into.

    Args:
        config: content of ``edit_config.json``.
        edits: the journal.
    """
    base = config["base_model_name_or_path"]
    data = ModelCardData(
        library_name="transformers",
        **_origin(base, config["base_model_revision"], "finetune"),
        pipeline_tag=_pipeline_tag(config),
        tags=["knowledge-editing", "hf_kedit", config["method"]],
    )
    return f"""---
{data.to_yaml()}
---

# {markdown_text(_shown(base) if base else "A model")} with {len(edits)} knowledge edit{"" if len(edits) == 1 else "s"}

A whole model: it loads with transformers alone, and the edits are part of its weights.

{_edit_table(edits)}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{PLACEHOLDER}")
tokenizer = AutoTokenizer.from_pretrained("{PLACEHOLDER}")
```

## Undo

These edits cannot be taken back: use the base model {markdown_code(_shown(base)) if base else "of before"},
{_revision(config["base_model_revision"])}, or the saved edits that this model was merged from.
Editing a fact can change others. Measure it on your own questions before you rely on it.
"""


def _is_hub_id(base: str) -> bool:
    return bool(base) and not is_local(base) and not base.startswith(embedded.PREFIX)


def _shown(base: str) -> str:
    """The base model's name; of a folder the last part, because the way to it is nobody else's business."""
    return re.split(r"[\\/]", base.rstrip("/\\"))[-1] if is_local(base) else base or IN_MEMORY


def _origin(base: str, revision: str | None, relation: str) -> dict[str, Any]:
    """What the head of a card says of the base model; its licence is the licence of what was made from it."""
    named = {"base_model": inside_repository(base)[0], "base_model_relation": relation} if _is_hub_id(base) else {}
    return named | base_licence(base, revision)


def base_licence(base: str, revision: str | None) -> dict[str, str]:
    """``license``, ``license_name`` and ``license_link`` of a model's card; those that it gives.

    Args:
        base: folder or Hub id, or a file there.
        revision: of the repository.
    """
    base = inside_repository(base)[0]
    if not _is_hub_id(base) and not os.path.isdir(base or "/nowhere"):
        return {}
    try:
        card = read_file(base, CARD, revision=revision)
        said = ModelCard(card.decode("utf-8"), ignore_metadata_errors=True).data.to_dict() if card else {}
    except (HubError, ValueError) as error:  # offline, or a card that cannot be read: it is no reason not to save
        logger.info("the licence of %s is not known (%s); complete the model card", base, error)
        return {}
    return {
        name: said[name] for name in ("license", "license_name", "license_link") if isinstance(said.get(name), str)
    }


def _datasets(results: Sequence[EvalResult]) -> list[str] | None:
    """The data sets of the numbers, as far as they are repositories of the Hub."""
    return sorted({r.dataset_type for r in results if "/" in r.dataset_type}) or None


def _pipeline_tag(config: dict[str, Any]) -> str | None:
    return "text-generation" if config["base_model_class"].endswith(("CausalLM", "LMHeadModel")) else None


def _edit_table(edits: Sequence[Edit]) -> str:
    rows = "\n".join(
        f"| {markdown_code(e.id, cell=True)} | {markdown_text(e.request.filled_prompt)}"
        f" | {markdown_text(', '.join(e.request.ground_truth)) or '?'} | {markdown_text(e.request.target_new)}"
        f" | {markdown_text(e.method)} |"
        for e in edits[:_SHOWN]
    )
    more = f"\n\n… and {len(edits) - _SHOWN} more" if len(edits) > _SHOWN else "\n\nThey are"
    table = f"| edit | prompt | before | now | method |\n| --- | --- | --- | --- | --- |\n{rows}"
    return f"{table}{more} in [`edits.jsonl`](edits.jsonl), with the texts that they were asked with."


def _without_library(base: str, here: str, singles: Mapping[str, str] = MappingProxyType({})) -> str:
    example = next(iter(singles.values()), "")
    load = f'PeftModel.from_pretrained(base, {python_text(here)}, subfolder="{example}")'
    repo, file = inside_repository(_shown(base) if base else "the base model")
    if not file and repo.lower().endswith(".gguf"):  # a file of some machine, of which the name is all that is told
        repo, file = "the folder that it is in", repo
    place = f"{python_text(repo)}, gguf_file={python_text(file)}" if file else python_text(repo)
    alone = f"Each edit alone is an adapter too: {markdown_code(load)}.\n"
    return f"""Without `hf_kedit`, the same edits are a LoRA adapter of scaling 1:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({place})
model = PeftModel.from_pretrained(base, {python_text(here)})
```
{alone if singles else ""}"""


def _only_with_library(config: Mapping[str, Any], here: str) -> str:
    """What can be done without the library with edits that are no LoRA adapter."""
    if config.get("books"):  # codebooks and prompts: computed while the model runs
        return (
            "Without `hf_kedit` this folder cannot be loaded: part of these edits is computed while the model runs.\n"
        )
    command = markdown_code(f"kedit merge {python_text(here)} --output DIR")
    return f"""Without `hf_kedit` this folder cannot be loaded. {command} writes
the base model with the edits as a plain transformers model.
"""


def _numbers(results: Sequence[EvalResult]) -> str:
    if not results:
        return "Editing a fact can change others. Measure it on your own questions before you rely on it.\n"
    rows = "\n".join(
        f"| {markdown_text(str(r.metric_name))} | {r.metric_value:.3f} | {markdown_text(str(r.dataset_config))} |"
        for r in results
    )
    return f"""## What it does to the model

| measured | value | how |
| --- | --- | --- |
{rows}

Fractions of 1, on {markdown_code(results[0].dataset_name)}. Locality is what stays as it was: editing a fact can
change others.
"""


def adapter_card(base: str, revision: str | None, edits: Sequence[Edit], losses: Mapping[str, float]) -> str:
    """Return the card of an exported LoRA adapter.

    Args:
        base: id of the base model; empty for one that was in memory.
        revision: its commit, if known.
        edits: the journal.
        losses: part of the change that a cut to a smaller rank left out, per weight.
    """
    data = ModelCardData(
        library_name="peft",
        **_origin(base, revision, "adapter"),
        tags=["knowledge-editing", "lora"],
    )
    lost = "".join(
        f"\n- {markdown_code(key)}: {100 * loss:.1f} % of the change is left out" for key, loss in losses.items()
    )
    note = f"\nThe rank was cut, so that the adapter is close to the edits, not equal:{lost}\n" if lost else ""
    return f"""---
{data.to_yaml()}
---

# {len(edits)} knowledge edit{"" if len(edits) == 1 else "s"} of {markdown_text(_shown(base))}, as a LoRA adapter

{_edit_table(edits)}
{note}
## Use

{_without_library(base, PLACEHOLDER)}
Valid on the unedited base model only, {_revision(revision)}. Merging
gives the edited weights. Two such adapters are added with
`add_weighted_adapter(…, combination_type="cat")`; the other combinations mix the factors of different edits.

Editing a fact can change others. Measure it on your own questions before you rely on it.
"""


def _numbers_of(config: Mapping[str, Any]) -> str:
    """The number format of the base model, and the GGUF file that its numbers were read from, if there is one."""
    gguf, dtype = config.get("base_model_gguf"), str(config["base_dtype"])
    return f"{dtype} out of the GGUF file with the SHA-256 {markdown_code(str(gguf.get('sha256')))}" if gguf else dtype


def _revision(commit: str | None) -> str:
    """The base model's commit, in a sentence."""
    return f"revision {markdown_code(commit) if commit else 'not recorded'}"
