"""What was measured of one case: plain data, and its dictionary form, which is the layout of EasyEdit's result files.

Inside the library a score is found by section (``rewrite``, ``locality`` …) and axis. In the files, and in what
`EvaluationReport.cases` hands out, it stands where users of EasyEdit look for it; `CaseResult.to_dict` and
`CaseResult.from_dict` are the only places that know these keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import DataError, shown
from ...requests import EditRequest, Probe
from ...storage.shapes import of_type
from ...text.pictures import pictures_of
from .layout import AboutLayout, Number, RecordLayout

AXES = ("locality", "locality_accuracy", "portability")
"""Sections whose scores are kept by axis."""
_SCORE, _OUTPUT = "_acc", "_output"
"""Endings of the keys that hold scores, and what the unedited model put out."""


@dataclass
class Half:
    """What was measured before an edit (``pre``), or after it (``post``).

    Args:
        scores: section → axis → scores of its probes, in [0, 1]. Sections without axes have the axis ``None``.
        outputs: axis of the locality → what the model put out, as plain data.
        numbers: section that only some protocols have (``counterfact``, ``fluency``) → key → values.
        about: section → protocol, scorer and comparable group of its numbers.
    """

    scores: dict[str, dict[str | None, list[float]]] = field(default_factory=dict)
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    numbers: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    about: dict[str, dict[str, str]] = field(default_factory=dict)

    def add_score(self, section: str, axis: str | None, score: float) -> None:
        """Note the score of one probe."""
        self.scores.setdefault(section, {}).setdefault(axis, []).append(score)

    def add_number(self, section: str, key: str, value: float) -> None:
        """Note a number that only some protocols have."""
        self.numbers.setdefault(section, {}).setdefault(key, []).append(value)

    @property
    def sections(self) -> list[str]:
        """Names of the sections that hold anything."""
        outputs = ["locality"] if self.outputs else []
        return list(dict.fromkeys([*outputs, *self.scores, *self.numbers]))

    def to_dict(self) -> dict[str, Any]:
        """The half in EasyEdit's layout."""
        result: dict[str, Any] = {}
        for name, outputs in self.outputs.items():
            result.setdefault("locality", {})[f"{name}{_OUTPUT}"] = outputs
        for section, axes in self.scores.items():
            for axis, scores in axes.items():
                if axis is None:
                    result[f"{section}{_SCORE}"] = scores
                else:
                    result.setdefault(section, {})[f"{axis}{_SCORE}"] = scores
        for section, numbers in self.numbers.items():
            result.setdefault(section, {}).update(numbers)
        about = {name: {"result_key": _result_key(name), **meta} for name, meta in self.about.items()}
        return {**result, "metric_meta": about}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Half:
        """Read what `to_dict` wrote.

        Raises:
            DataError, TypeError, ValueError, AttributeError: if it is something else.
        """
        half = cls()
        for key, entry in value.items():
            if key == "metric_meta":
                of_type(dict[str, AboutLayout], entry, key, DataError)
                half.about = {
                    name: {k: v for k, v in about.items() if k != "result_key"} for name, about in entry.items()
                }
            elif key in AXES:
                for name, values in of_type(dict[str, Any], entry, key, DataError).items():
                    if name.endswith(_OUTPUT):
                        half.outputs[name.removesuffix(_OUTPUT)] = list(values)
                    elif name.endswith(_SCORE):
                        half.scores.setdefault(key, {})[name.removesuffix(_SCORE)] = _numbers(key, values)
                    else:
                        raise ValueError(
                            f"{key!r} holds {shown(name)}, which is neither scores nor outputs of an axis"
                        )
            elif isinstance(entry, Mapping) and not key.endswith(_SCORE) and key != "per_axis":
                for name, values in entry.items():
                    half.numbers.setdefault(key, {})[name] = _numbers(key, values)
            else:  # one list; a mapping would stand where a summary has a mean
                half.scores[key.removesuffix(_SCORE)] = {None: _numbers(key, entry)}
        return half


@dataclass(frozen=True)
class Cost:
    """What making an edit took; its share of the batch that it was made in.

    Args:
        seconds: of the computation of the edit.
        share_of_call: seconds of the whole call, preparations included.
        peak_memory_bytes: largest allocation while it was made; ``None`` without an accelerator.
        extra_memory_bytes: the same without what was allocated before.
        edit: id, method, diagnostics, and number of changed weights.
    """

    seconds: float | None = None
    share_of_call: float | None = None
    peak_memory_bytes: int | None = None
    extra_memory_bytes: int | None = None
    edit: dict[str, Any] | None = None


@dataclass
class CaseResult:
    """One case under one protocol, at one time.

    Args:
        number: place of the case in the data set.
        id: of the request.
        request: texts of the request, in EasyEdit's layout.
        protocol: name of the protocol.
        pre: what was measured before the edit.
        post: what was measured after it.
        when: ``immediate``, ``at N`` for a checkpoint, or ``final``.
        setting: how edits followed one another.
        n_probes: section → number of probes that were scored.
        skipped: probes that were not, with the reason.
        texts: what the model wrote before and after, where the protocol lets it write.
        seconds_eval: of measuring; the case's share.
        cost: of the edit.
    """

    number: int
    id: str | None
    request: dict[str, Any]
    protocol: str
    pre: Half
    post: Half
    when: str
    setting: str | None = None
    n_probes: dict[str, int] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    seconds_eval: float | None = None
    cost: Cost = field(default_factory=Cost)

    @property
    def halves(self) -> dict[str, Half]:
        """Both halves by name."""
        return {"pre": self.pre, "post": self.post}

    @property
    def scorer(self) -> str | None:
        """Name of the scorer of its numbers."""
        return next((meta["scorer"] for name, meta in self.post.about.items() if name != "locality"), None)

    def costs(self) -> dict[str, Any]:
        """Seconds and bytes under the names that they have in files and tables."""
        return {
            "time": self.cost.share_of_call,
            "seconds_edit": self.cost.seconds,
            "seconds_eval": self.seconds_eval,
            "peak_memory_bytes": self.cost.peak_memory_bytes,
            "extra_memory_bytes": self.cost.extra_memory_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """The case in EasyEdit's layout, with what the library adds."""
        return {
            "case_id": self.number,
            "id": self.id,
            "requested_rewrite": self.request,
            "protocol": self.protocol,
            "pre": self.pre.to_dict(),
            "post": self.post.to_dict(),
            "n_probes": self.n_probes,
            "skipped": self.skipped,
            "texts": self.texts,
            "setting": self.setting,
            "when": self.when,
            **self.costs(),
            "edit": self.cost.edit,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> CaseResult:
        """Read what `to_dict` wrote, also in version 0.1.0.

        Raises:
            DataError: if it is no such case.
        """
        what = "a result"
        of_type(RecordLayout, value, what, DataError)
        try:
            halves = {name: Half.from_dict(value[name]) for name in ("pre", "post")}
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{what}: {error}") from error
        cost = Cost(
            value.get("seconds_edit"),
            value.get("time"),
            value.get("peak_memory_bytes"),
            value.get("extra_memory_bytes"),
            value.get("edit"),
        )
        return cls(
            number=value["case_id"],
            id=value.get("id"),
            request=dict(value["requested_rewrite"]),
            protocol=value["protocol"],
            when=value["when"],
            setting=value.get("setting"),
            n_probes=dict(value.get("n_probes") or {}),
            skipped=list(value.get("skipped") or ()),
            texts=list(value.get("texts") or ()),
            seconds_eval=value.get("seconds_eval"),
            cost=cost,
            **halves,
        )


def easyedit_request(request: EditRequest) -> dict[str, Any]:
    """A request in the dictionary layout of EasyEdit; what is missing is ``None`` or ``{}``.

    Of pictures, thumbnails stand there, as ``data:`` URIs.
    """

    def section(axes: Mapping[str, Sequence[Probe]]) -> dict[str, Any]:
        return {
            axis: {
                "prompt": [probe.prompt for probe in probes],
                "ground_truth": [next(iter(probe.answers), None) for probe in probes],
            }
            for axis, probes in axes.items()
        }

    return {
        "prompt": request.filled_prompt,
        "target_new": request.target_new,
        "ground_truth": next(iter(request.ground_truth), None),
        "subject": request.subject,
        "rephrase_prompt": next(iter(request.rephrase_prompts), None),
        "locality": section(request.locality),
        "portability": section(request.portability),
        **({} if request.image is None else {"image": [p.thumbnail() for p in pictures_of(request.image)]}),
    }


def _result_key(section: str) -> str:
    """The key under which EasyEdit's users look for a section."""
    return section if section.startswith("locality") else f"{section}{_SCORE}"


def _numbers(key: str, values: Any) -> list[float]:
    """A list of numbers; ``None`` stands for one that is not finite, which JSON lacks."""
    of_type(list[Number], values, key, DataError)
    return [math.nan if number is None else number for number in values]
