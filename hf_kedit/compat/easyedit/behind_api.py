"""EasyEdit's DeepEdit on top of `EditableModel.from_backend`: questions of several hops to a model behind an API."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ...config import normalise
from ...data.mquake import mquake_rows
from ...data.normalise import Record
from ...data.report import LoadReport
from ...errors import ConfigError, RequestError
from ...evaluation.measures.metrics import answer_scorer
from ...logging import get_logger
from ...model import EditableModel
from ...remote.backend import OpenAICompatibleBackend
from ...requests import EditRequest, load_requests
from .extras import ENDPOINT, key_variable
from .facts import Facts

logger = get_logger(__name__)
_METHOD = "deepedit-api"
_USED = ("alg_name", "model_name", "api_key", "api_base")


def is_behind_api(values: Mapping[str, Any]) -> bool:
    """Whether hyperparameters are DeepEdit's."""
    return normalise(str(values.get("alg_name"))) == _METHOD


def model_behind_api(values: Mapping[str, Any]) -> EditableModel:
    """The model that DeepEdit's hyperparameters describe; nothing is asked yet.

    Args:
        values: ``model_name`` at the server ``api_base`` (OpenAI's without it); ``api_key``: the *name* of the
            environment variable that holds the key. Prompts and retriever are the library's.

    Raises:
        ConfigError: if no model is named, or ``api_key`` is a key.
        BackendError: if the address cannot be used.
    """
    name, key = values.get("model_name"), values.get("api_key")
    if not name:
        raise ConfigError("the hyperparameters name no model (model_name)")
    for other in sorted(values.keys() - set(_USED)):
        logger.info("%s: ignored: the library's own prompts and retriever are used", other)
    address = str(values.get("api_base") or ENDPOINT)
    return EditableModel.from_backend(OpenAICompatibleBackend(address, str(name), key_variable(key) if key else None))


def answers_by_hops(model: EditableModel, datasets: Facts | Sequence[Mapping[str, Any]]) -> list[str]:
    """Edit the model for each case, ask the case's first question by hops, and take the edits back.

    Args:
        model: behind an API.
        datasets: an `MQuAKEDataset`, or records in the layout of MQuAKE.

    Returns:
        The share of right answers so far, in words, after each case; and once more at the end.

    Raises:
        RequestError: for an unusable case, or one without a question.
        BackendError: if the model cannot be asked.
    """
    equal, right, lines = answer_scorer("exact"), 0, list[str]()
    for number, requests in enumerate(_cases(datasets), 1):
        asked = requests[-1].portability.get("Multi_Hop", ())
        if not asked:
            raise RequestError("a case has no question with an answer", row=number - 1, field="questions")
        made = model.edit(requests, show_progress=False)
        try:
            answer = model.answer_by_hops(asked[0].prompt).answer
        finally:
            model.rollback(made.ids)
        right += any(equal(answer, accepted) >= 1.0 for accepted in asked[0].answers)
        lines.append(f"Multi-hop acc = {right / number} ({right} / {number})")
    return [*lines, *lines[-1:]]


def _cases(datasets: Facts | Sequence[Mapping[str, Any]]) -> list[list[EditRequest]]:
    """The edits of each case."""
    if isinstance(datasets, Facts):
        requests = datasets.requests()
    else:
        report = LoadReport("mquake/cf", "test")
        records = (Record(value, number, report) for number, value in enumerate(datasets))
        rows = (row for record in records for row in mquake_rows(record, dataset="mquake/cf", split="test"))
        requests = load_requests([{k: v for k, v in row.items() if k != "id"} for row in rows])
    keyed = itertools.groupby(enumerate(requests), lambda pair: pair[1].metadata.get("group_id") or pair[0])
    return [[request for _, request in members] for _, members in keyed]
