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
) -> list[EditRequest]:
    """Build requests from the arguments of EasyEdit's ``edit``.

    Args:
        prompts: one text, or one per request.
        target_new: likewise.
        ground_truth: one old answer (or list of answers) per request; None or ``"<|endoftext|>"``: unknown.
        rephrase_prompts: one text, list of texts, or None per request.
        locality_inputs: axis → ``{"prompt": […], "ground_truth": […]}`` with one text, list of texts, or None
            (no such probe) per request.
        portability_inputs: likewise.
        subject: one per request.

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
        }
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
    return value


def to_easyedit_arguments(rows: Iterable[Mapping[str, Any] | EditRequest], *, legacy: bool = False) -> dict[str, Any]:
    """Return the keyword arguments of EasyEdit's ``edit`` for many rows; :func:`from_easyedit` reads them.

    Args:
        rows: a dataset in the layout of ``FEATURES``, or requests.
        legacy: see :func:`to_easyedit`.
    """
    values = [to_easyedit(row, legacy=legacy) for row in rows]
    arguments: dict[str, Any] = {
        "prompts": [v["prompt"] for v in values],
        "target_new": [v["target_new"] for v in values],
        "ground_truth": [v["ground_truth"] for v in values],
        "rephrase_prompts": [v["rephrase_prompt"] for v in values],
        "subject": [v["subject"] for v in values],
    }
    for section in _SECTIONS:
        names = dict.fromkeys(axis for v in values for axis in v[section])
        arguments[f"{section}_inputs"] = {
            axis: {key: [v[section].get(axis, {}).get(key) for v in values] for key in ("prompt", "ground_truth")}
            for axis in names
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
    found: list[dict[str, list[Probe]]] = [{} for _ in range(count)]
    if inputs is None:
        return found
    if not isinstance(inputs, Mapping):
        raise RequestError(f"must be a dict axis → prompts and answers, not {type(inputs).__name__}", field=name)
    for axis, value in inputs.items():
        where = f"{name}[{axis!r}]"
        if not isinstance(value, Mapping) or "prompt" not in value:
            raise RequestError("must be a dict with 'prompt' and 'ground_truth'", field=where)
        prompts = _per_request(value["prompt"], count, where, single)
        answers = _per_request(value.get("ground_truth"), count, where, single)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if prompt is None:
                continue
            several = [prompt] if isinstance(prompt, str) else _sequence(prompt, where)
            if isinstance(prompt, str):
                values = [answer]
            elif answer is None:
                values = [None] * len(several)
            else:
                values = [answer] if isinstance(answer, str) else _sequence(answer, where)
            if len(several) != len(values):
                raise RequestError(f"has {len(several)} prompts for {len(values)} answers", row=i, field=where)
            probes = [
                Probe.from_value({"prompt": p, "ground_truth": a}, field_name=where, row=i)
                for p, a in zip(several, values, strict=True)
                if p is not None
            ]
            if probes:
                found[i][str(axis)] = probes
    return found
