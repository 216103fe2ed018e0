"""Questions whose answers judge an edit, as plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

from ..errors import RequestError, shown
from .chat import ChatFrame
from .pictures import Pictured, pictured_to_json


@dataclass(frozen=True)
class Probe:
    """A question whose answer tells something about an edit.

    Args:
        prompt: text before the answer.
        ground_truth: groups of aliases; ``[["Rome", "Roma"]]`` is one value with two spellings.
        match: ``"any"``: one alias of one group suffices; ``"all"``: every group must be hit.
        image: what the question is about, for models that see, as in `EditRequest`; ``None``: text alone.
    """

    prompt: str
    ground_truth: list[list[str]] = field(default_factory=list)
    match: Literal["any", "all"] = "any"
    image: Pictured | Sequence[Pictured] | None = None

    @property
    def answers(self) -> list[str]:
        """All acceptable answers as one flat list."""
        return [alias for group in self.ground_truth for alias in group]

    def within(self, frame: ChatFrame | None) -> Probe:
        """The probe as it is asked in a chat or of pictures."""
        return self if frame is None else replace(self, prompt=frame.text(self.prompt))

    @classmethod
    def from_value(cls, value: Any, *, field_name: str, row: int | None = None) -> Probe:
        """Build a probe from a dict with ``prompt`` and ``ground_truth`` (string, list or list of lists)."""
        if isinstance(value, Probe):
            return value
        if not isinstance(value, (dict, Mapping)):  # dict: to ask an abstract class takes time, of thousands of probes
            raise RequestError(
                f"a probe must be a dict with 'prompt' and 'ground_truth', not {type(value).__name__}",
                row=row,
                field=field_name,
            )
        prompt = value.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise RequestError("a probe needs a non-empty 'prompt'", row=row, field=field_name)
        match: Any = value.get("match") or "any"
        if match not in ("any", "all"):
            raise RequestError(f"'match' must be 'any' or 'all', not {shown(match)}", row=row, field=field_name)
        return cls(prompt, answer_groups(value.get("ground_truth"), field_name, row), match, value.get("image"))


def read_probes(
    value: Any, field_name: str, row: int | None, fail: Callable[[str, str], NoReturn]
) -> dict[str, list[Probe]]:
    """Probes by axis from a dict of axis → probe or probes, or from a list whose entries name their axis.

    Args:
        value: as a user gives it; ``None``: no probes.
        field_name: of the request, for errors.
        row: of the request, for errors.
        fail: raises what is wrong with a field.
    """
    probes: dict[str, list[Probe]] = {}
    if isinstance(value, Mapping):
        for axis, entries in value.items():
            probes[str(axis)] = _read_axis(entries, f"{field_name}[{axis!r}]", row, fail)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for entry in value:
            axis = entry.get("name") if isinstance(entry, Mapping) else None
            if not isinstance(axis, str):
                fail("a list of probes needs a 'name' (the axis) in every entry", field_name)
            probes.setdefault(axis, []).append(Probe.from_value(entry, field_name=field_name, row=row))
    elif value is not None:
        fail(f"must be a dict of axis → probes, not {type(value).__name__}", field_name)
    return probes


def _read_axis(entries: Any, name: str, row: int | None, fail: Callable[[str, str], NoReturn]) -> list[Probe]:
    if isinstance(entries, (list, Sequence)) and not isinstance(entries, str):
        return [Probe.from_value(entry, field_name=name, row=row) for entry in entries]
    if isinstance(entries, (Mapping, Probe)):
        prompts = entries.get("prompt") if isinstance(entries, Mapping) else None
        if isinstance(entries, Probe) or isinstance(prompts, str) or not isinstance(prompts, Sequence):
            return [Probe.from_value(entries, field_name=name, row=row)]
        answers = entries.get("ground_truth") or [None] * len(prompts)
        if not isinstance(answers, (list, tuple)) or len(answers) != len(prompts):
            fail("'prompt' and 'ground_truth' must be lists of the same length", name)
        pairs = [{"prompt": p, "ground_truth": answer} for p, answer in zip(prompts, answers, strict=True)]
        return [Probe.from_value(pair, field_name=name, row=row) for pair in pairs]
    fail(f"must be a probe or a list of probes, not {type(entries).__name__}", name)


def answer_groups(value: Any, field_name: str = "ground_truth", row: int | None = None) -> list[list[str]]:
    """Normalise answers to groups of aliases: ``"a"`` → ``[["a"]]``, ``["a", "b"]`` → ``[["a"], ["b"]]``.

    Nested lists stay as they are; empty strings and ``None`` are dropped.
    """
    if value is None:
        return []
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, Sequence)):
        raise RequestError(
            f"answers must be a string or a list, not {type(value).__name__}", row=row, field=field_name
        )
    groups: list[list[str]] = []
    for entry in value:
        aliases = entry if isinstance(entry, (list, tuple)) else [entry]
        try:
            kept = list(filter(str.strip, aliases))
        except TypeError as error:
            if not all(isinstance(alias, str) or alias is None for alias in aliases):
                raise RequestError("answers must be strings", row=row, field=field_name) from error
            kept = [alias for alias in aliases if alias is not None and alias.strip()]
        if kept:
            groups.append(kept)
    return groups


def probes_to_json(probes: Mapping[str, Sequence[Probe]]) -> dict[str, list[dict[str, Any]]]:
    """Probes by axis as JSON-ready dicts, from which `Probe.from_value` builds equal ones."""
    return {axis: [_probe_to_json(probe) for probe in entries] for axis, entries in probes.items()}


def _probe_to_json(probe: Probe) -> dict[str, Any]:
    value = {"prompt": probe.prompt, "ground_truth": probe.ground_truth, "match": probe.match}
    return {**value, "image": pictured_to_json(probe.image)} if probe.image else value
