"""EasyEdit's functions for texts instead of facts: its ``apply_…_to_model`` of UnKE, AnyEdit, FT and LoRA.

They take a model of transformers, rows of `AKEWUnifiedDataset`, and give back what each of them gives there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ...config.easyedit import convert_hparams
from ...errors import EvaluationError, KeditError, RequestError
from ...evaluation.measures.texts import bleu, rouge
from ...evaluation.protocols.replies import similarity
from ...model import EditableModel
from ...storage.parsing import parse_json
from .editor import apply_to_model
from .facts import without_end
from .hparams import HyperParams, values_of
from .originals import Originals

ASKED = {"Original": "original_prediction", "Paraphrase": "para_prediction"}
"""Where a row has what the model wrote when it was asked, and asked in other words."""
_KEYS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def _apply(
    model: Any,
    tok: Any,
    hparams: HyperParams | Mapping[str, Any],
    batch_data: Sequence[Mapping[str, Any]],
    ex_data: Sequence[str | Mapping[str, str]] | None = None,
) -> tuple[EditableModel, Originals]:
    """Edit a model in place so that it answers each row's ``question`` with its ``answer``.

    Args:
        model: of transformers, or an `EditableModel`.
        tok: its tokenizer.
        hparams: of the method.
        batch_data: rows of `AKEWUnifiedDataset`; all are made in one batch.
        ex_data: general texts whose outputs UnKE and AnyEdit hold; of a dict, its values one after the other.

    Raises:
        RequestError: if a row has no ``question`` or no ``answer``.
    """
    requests = []
    for number, row in enumerate(batch_data):
        for key in ("question", "answer"):
            if not row.get(key):
                raise RequestError("is missing or empty", row=number, field=key)
        requests.append({"prompt": row["question"], "target_new": without_end(row["answer"])})
    if not isinstance(model, EditableModel):
        texts = [text if isinstance(text, str) else "\n".join(text.values()) for text in ex_data or ()]
        model = EditableModel(model, convert_hparams(values_of(hparams)).config, tok, corpus=texts or None)
    return apply_to_model(model, tok, requests, hparams)


def apply_unke_to_model(*given: Any, **named: Any) -> Originals:
    """EasyEdit's UnKE and AnyEdit, which return the original weights alone; see `_apply`."""
    return _apply(*given, **named)[1]


def apply_ft_uns_to_model(*given: Any, **named: Any) -> tuple[EditableModel, dict[str, torch.Tensor]]:
    """EasyEdit's FT on texts, which returns by how much each weight has changed; see `_apply`."""
    model, before = _apply(*given, **named)
    return model, {name: model.get_parameter(name).detach() - value.to(model.device) for name, value in before.items()}


def apply_lora_uns_to_model(*given: Any, **named: Any) -> tuple[EditableModel, Originals]:
    """EasyEdit's LoRA on texts; see `_apply`."""
    return _apply(*given, **named)


def eval_akew_unstructured(
    result_path: str | Path, dataset_type: str, model_path: str = "dense", device: Any = None
) -> dict[str, dict[str, float]]:
    """Measure what a model wrote, from a file of rows, and write the means to standard output.

    ROUGE is recall, BLEU that of characters, as published. Both are ours: ROUGE counts words too often, which the
    reference does not, and BLEU is 0 where no four characters fit.

    Args:
        result_path: rows with ``answer``, ``original_prediction``, ``para_prediction``, ``sub_answer``, ``sub_pred``.
        dataset_type: not used; what a row has is measured.
        model_path: a sentence encoder for ``BERT Score`` (`find_retriever`); one that cannot be had is left out.
        device: not used.

    Raises:
        EvaluationError: if there is no such file, or it has no rows.
    """
    path = Path(result_path)
    rows = parse_json(path.read_bytes(), str(path), EvaluationError) if os.path.isfile(path) else None
    if not rows:
        raise EvaluationError(f"{path}: " + ("there is no such file" if rows is None else "has no rows"))
    if not isinstance(rows, list) or not all(isinstance(r, dict) and isinstance(r.get("answer"), str) for r in rows):
        raise EvaluationError(f"{path}: must be a list of rows, each with the text of its 'answer'")
    means: dict[str, dict[str, float]] = {}
    for name, key in ASKED.items():
        pairs = [(row[key], without_end(row["answer"])) for row in rows if isinstance(row.get(key), str)]
        if pairs:
            bleus = fmean(bleu(said, text, level="char") for said, text in pairs)
            means[name] = {"BLEU Score": bleus, **_overlap(pairs)}
            try:
                means[name]["BERT Score"] = fmean(
                    similarity(model_path, said, text) if said.strip() else 0.0 for said, text in pairs
                )
            except KeditError as error:
                sys.stdout.write(f"No BERT Score: {error}\n")
    details = [list(zip(row.get("sub_pred") or (), row.get("sub_answer") or (), strict=False)) for row in rows]
    if any(details):
        scores = [_overlap(pairs) for pairs in details if pairs]
        means["Sub Questions"] = {key: fmean(score[key] for score in scores) for key in scores[0]}
    sys.stdout.write(f"{dataset_type}, {len(rows)} rows: {json.dumps(means, ensure_ascii=False)}\n")
    return means


def _overlap(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Mean recalls of ROUGE over what was written and what should have been."""
    scores = [rouge(said, text) for said, text in pairs]
    return {ours: fmean(score[key]["recall"] for score in scores) for key, ours in _KEYS.items()}
