"""Questions whose answers judge an edit, as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import RequestError, shown


@dataclass(frozen=True)
class Probe:
    """A question whose answer tells something about an edit.

    Args:
        prompt: text before the answer.
        ground_truth: groups of aliases; ``[["Rome", "Roma"]]`` is one value with two spellings.
        match: ``"any"``: one alias of one group suffices; ``"all"``: every group must be hit.
        image: path of an image relative to an image root, for multimodal models.
    """

    prompt: str
    ground_truth: list[list[str]] = field(default_factory=list)
    match: Literal["any", "all"] = "any"
    image: str | None = None

    @property
    def answers(self) -> list[str]:
        """All acceptable answers as one flat list."""
        return [alias for group in self.ground_truth for alias in group]

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
    return {**value, "image": probe.image} if probe.image else value
