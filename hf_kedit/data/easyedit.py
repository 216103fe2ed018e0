"""Conversion from and to EasyEdit's arguments and request dicts, so that existing scripts and results carry over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import RequestError
from ..requests import EditRequest, Probe

LEGACY_TRUTH = "<|endoftext|>"
"""What older versions of EasyEdit write where no old answer is known."""

_SECTIONS = ("locality", "portability")


def from_easyedit(
    prompts: str | Sequence[str],
    target_new: str | Sequence[str],
    ground_truth: Any = None,
    rephrase_prompts: Any = None,
    locality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
    portability_inputs: Mapping[str, Mapping[str, Any]] | None = None,
    subject: str | Sequence[str | None] | None = None,
    target_neg: str | Sequence[str | None] | None = None,
) -> list[EditRequest]:
    """Build requests from the arguments of EasyEdit's ``edit``.

    Args:
        prompts: one text, or one per request.
        target_new: likewise.
        ground_truth: one old answer (or list of answers) per request; None or ``"<|endoftext|>"``: unknown.
        rephrase_prompts: one text, list of texts, or None per request.
        locality_inputs: axis → ``{"prompt": […], "ground_truth": […]}`` with one text, list of texts, or None or an
            empty text (no such probe) per request.
        portability_inputs: likewise.
        subject: one per request.
        target_neg: one answer that is to go per request, as DPO takes it.

    Returns:
        One request per prompt.

    Raises:
        RequestError: lengths differ, or a value is unusable; names the request and the field.
    """
    single = isinstance(prompts, str)
    texts = [prompts] if isinstance(prompts, str) else _sequence(prompts, "prompts")
    count = len(texts)
    targets = _per_request(target_new, count, "target_new")
    truths = _per_request(ground_truth, count, "ground_truth", single)
    rephrased = _per_request(rephrase_prompts, count, "rephrase_prompts", single)
    subjects = _per_request(subject, count, "subject")
    unwanted = _per_request(target_neg, count, "target_neg")
    sections: dict[str, list[dict[str, list[Probe]]]] = {}
    for section, inputs in zip(_SECTIONS, (locality_inputs, portability_inputs), strict=True):
        sections[section] = _probes(inputs, count, f"{section}_inputs", single)
    requests = []
    for i, prompt in enumerate(texts):
        truth = truths[i] if isinstance(truths[i], (list, tuple)) else [truths[i]]
        data = {
            "prompt": prompt,
            "target_new": targets[i],
            "subject": subjects[i],
            "ground_truth": [t for t in truth if t is not None and t != LEGACY_TRUTH],
            "rephrase_prompts": [rephrased[i]] if isinstance(rephrased[i], str) else rephrased[i],
            "locality": sections["locality"][i],
            "portability": sections["portability"][i],
        } | ({} if unwanted[i] is None else {"target_neg": unwanted[i]})
        requests.append(EditRequest.from_dict(data, row=i))
    return requests


def to_easyedit(row: Mapping[str, Any] | EditRequest, *, legacy: bool = False) -> dict[str, Any]:
    """Return EasyEdit's request dict of one row or request.

    EasyEdit knows one old answer, one rephrased prompt, and one answer per probe: the first of each is taken.

    Args:
        row: a row in the layout of ``FEATURES``, or a request.
        legacy: write ``"<|endoftext|>"`` instead of None where no old answer is known, as older versions expect.
    """
    request = row if isinstance(row, EditRequest) else EditRequest.from_dict(row)
    value: dict[str, Any] = {
        "prompt": request.filled_prompt,
        "target_new": request.target_new,
        "ground_truth": next(iter(request.ground_truth), LEGACY_TRUTH if legacy else None),
        "subject": request.subject,
        "rephrase_prompt": next(iter(request.rephrase_prompts), None),
    }
    for section in _SECTIONS:
        axes: dict[str, list[Probe]] = getattr(request, section)
        value[section] = {
            axis: {
                "prompt": [p.prompt for p in probes],
                "ground_truth": [next(iter(p.answers), None) for p in probes],
            }
            for axis, probes in axes.items()
        }
    if (unwanted := request.metadata.get("target_neg")) is not None:
        value["target_neg"] = unwanted
    return value


def to_easyedit_arguments(rows: Iterable[Mapping[str, Any] | EditRequest], *, legacy: bool = False) -> dict[str, Any]:
    """Return the keyword arguments of EasyEdit's ``edit`` for many rows; :func:`from_easyedit` reads them.

    Args:
        rows: a dataset in the layout of ``FEATURES``, or requests.
        legacy: see :func:`to_easyedit`.
    """
    return _columns([to_easyedit(row, legacy=legacy) for row in rows])


def from_easyedit_requests(requests: Iterable[Mapping[str, Any]]) -> list[EditRequest]:
    """Build requests from EasyEdit's request dicts; the inverse of :func:`to_easyedit`.

    Raises:
        RequestError: a value is unusable; names the request and the field.
    """
    values = list(requests)
    for row, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise RequestError(f"must be a dict, not {type(value).__name__}", row=row)
        for section in _SECTIONS:
            axes = value.get(section) or {}
            if not isinstance(axes, Mapping) or not all(isinstance(probes, Mapping) for probes in axes.values()):
                raise RequestError("must be a dict axis → prompt and ground_truth", row=row, field=section)
    return from_easyedit(**_columns(values))


def _columns(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Request dicts as the arguments of EasyEdit's ``edit``."""
    names = {"prompts": "prompt", "rephrase_prompts": "rephrase_prompt"}
    names |= {name: name for name in ("target_new", "ground_truth", "subject")}
    if any(v.get("target_neg") is not None for v in values):
        names["target_neg"] = "target_neg"
    arguments: dict[str, Any] = {argument: [v.get(key) for v in values] for argument, key in names.items()}
    for section in _SECTIONS:
        sections = [v.get(section) or {} for v in values]
        arguments[f"{section}_inputs"] = {
            axis: {key: [probes.get(axis, {}).get(key) for probes in sections] for key in ("prompt", "ground_truth")}
            for axis in dict.fromkeys(axis for probes in sections for axis in probes)
        }
    return arguments


def _sequence(value: Any, name: str) -> list[Any]:
    if isinstance(value, (Mapping, bytes)) or not isinstance(value, Sequence):
        raise RequestError(f"must be a string or a list, not {type(value).__name__}", field=name)
    return list(value)


def _per_request(value: Any, count: int, name: str, single: bool = False) -> list[Any]:
    """Return one entry per request.

    Args:
        value: None, one entry, or a list of entries.
        count: how many requests there are.
        name: for messages.
        single: the only request was given without a list, so that a list may be its several values.
    """
    if value is None:
        return [None] * count
    if isinstance(value, str):
        if count != 1:
            raise RequestError(f"is one text for {count} requests; give a list", field=name)
        return [value]
    entries = _sequence(value, name)
    if single and len(entries) != 1:
        return [entries]
    if len(entries) != count:
        raise RequestError(f"has {len(entries)} entries for {count} requests", field=name)
    return entries


def _probes(inputs: Any, count: int, name: str, single: bool) -> list[dict[str, list[Probe]]]:
    """Return axis → probes for every request."""
    rows: list[dict[str, list[Probe]]] = [{} for _ in range(count)]
    if inputs is None:
        return rows
    if not isinstance(inputs, Mapping):
        raise RequestError(f"must be a dict axis → prompts and answers, not {type(inputs).__name__}", field=name)
    for axis, value in inputs.items():
        where = f"{name}[{axis!r}]"
        if not isinstance(value, Mapping) or "prompt" not in value:
            raise RequestError("must be a dict with 'prompt' and 'ground_truth'", field=where)
        if isinstance(value["prompt"], Sequence) and not value["prompt"]:
            continue  # an axis without probes
        prompts = _per_request(value["prompt"], count, where, single)
        answers = _per_request(value.get("ground_truth"), count, where, single)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if prompt is None or prompt == "":  # what scripts fill gaps with
                continue
            several = [prompt] if isinstance(prompt, str) else _sequence(prompt, where)
            if isinstance(prompt, str):
                values = [answer]
            elif answer is None:
                values = [None] * len(several)
            else:
                values = [answer] if isinstance(answer, str) else _sequence(answer, where)
            values = [None if value == LEGACY_TRUTH else value for value in values]
            if len(several) != len(values):
                raise RequestError(f"has {len(several)} prompts for {len(values)} answers", row=i, field=where)
            probes = [
                Probe.from_value({"prompt": p, "ground_truth": a}, field_name=where, row=i)
                for p, a in zip(several, values, strict=True)
                if p is not None and p != ""
            ]
            if probes:
                rows[i][str(axis)] = probes
    return rows
