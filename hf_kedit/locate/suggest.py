"""Which layers should a method edit? Traced on the facts themselves, with the published or derived layers to fall
back on.

Methods that edit one layer (ROME) get the layer at which restoring the MLPs of a window of layers, at the last
token of the subject, brings back most of the answer (arXiv 2202.05262, section 2.2): the early site. Methods that
edit a range (MEMIT) get the layers where severing the MLPs makes a clear difference to what restoring the hidden
state does (arXiv 2210.07229, section 4.1). Tracing says where a fact is read from; it does not promise that an
edit there works best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..anatomy import profile_of
from ..config import config_class, normalise
from ..errors import ConfigError
from ..logging import get_logger
from ..requests import EditRequest
from .traces import LAST_SUBJECT, Fact, TraceReport
from .tracing import causal_trace, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..anatomy import Anatomy

logger = get_logger(__name__)
ENOUGH_FACTS = 10
_LITTLE_EFFECT = 0.1
"""Below this loss of probability, the noise does not make the model forget; nothing can be restored."""
_NO_SITE = 0.1
"""An effect of less than this share of the total effect is no site."""
_NO_GAP = 0.05
"""A gap of less than this share of the total effect is not a clear one."""
_SAME = 0.98
"""Effects above this share of the largest count as equal to it; the deepest of them is taken."""


@dataclass
class LayerSuggestion:
    """Layers for a method, and why.

    Args:
        method: ``edit_type`` of the method.
        layers: the suggestion.
        default: the layers that the method would take by itself (packaged file, or derived from the depth).
        source: ``"tracing"``, or ``"default"`` where tracing gave no answer.
        reason: one or two sentences for people.
        curves: kind of state → average indirect effect at the last token of the subject, by layer.
        report: everything that was traced.
    """

    method: str
    layers: list[int]
    default: list[int]
    source: Literal["tracing", "default"]
    reason: str
    report: TraceReport
    curves: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tables of the single facts, JSON-ready."""
        return {
            "method": self.method,
            "layers": self.layers,
            "default": self.default,
            "source": self.source,
            "reason": self.reason,
            "facts": len(self.report.traces),
            "skipped": len(self.report.skipped),
            "total_effect": None if math.isnan(self.report.total_effect) else self.report.total_effect,
            "window": self.report.window,
            "curves": {kind: [round(x, 6) for x in curve] for kind, curve in self.curves.items()},
        }

    def __str__(self) -> str:
        return f"{self.method}: layers {self.layers} ({self.source}). {self.reason}"


def suggest_layers(
    model: Any,
    requests: Sequence[Fact | EditRequest | Mapping[str, Any]],
    method: str = "rome",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    anatomy: Anatomy | None = None,
    report: TraceReport | None = None,
    default: Sequence[int] | None = None,
    **tracing: Any,
) -> LayerSuggestion:
    """Suggest the layers for a method by tracing facts that the model knows.

    Args:
        model: an `EditableModel`, or a transformers model together with its tokenizer.
        requests: facts with subject and, best, ground truth; 10 or more give a steady picture.
        method: name of a method that edits MLP layers.
        tokenizer: of a transformers model.
        anatomy: of a transformers model; ``None``: resolved here.
        report: a trace made before, instead of tracing now; it needs the kinds ``hidden`` and ``mlp``, for
            methods with a range of layers also ``hidden_without_mlp``.
        default: layers that the method would take; ``None``: those of its config.
        tracing: for `causal_trace` (``samples``, ``window``, ``seed`` …).

    Returns:
        The suggestion with its evidence; where tracing finds nothing, the method's own default.

    Raises:
        ConfigError: if the method has no layers of its own, or the report lacks a kind.
    """
    base, tokenizer, anatomy, name = unpack(model, tokenizer, anatomy)
    if anatomy.is_encoder_decoder:
        raise ConfigError("layers are suggested for decoder-only models; causal_trace works on encoder-decoders too")
    default = default or config_class(method)().complete(profile_of(base, anatomy, name)).layers
    if not default:
        raise ConfigError(f"{method} has no layers to choose by tracing; rome and memit do")
    kinds = ("hidden", "mlp") if len(default) == 1 else ("hidden", "mlp", "hidden_without_mlp")
    if report is None:
        report = causal_trace(model, requests, tokenizer, anatomy=anatomy, kinds=kinds, **tracing)
    missing = [k for k in kinds if k not in report.kinds]
    if missing:
        raise ConfigError(f"the report does not have {', '.join(missing)}: trace with kinds={kinds}")
    effects = {kind: curves[LAST_SUBJECT].mean for kind, curves in report.average().items() if LAST_SUBJECT in curves}
    possible = [layer.index for layer in anatomy.layers if layer.down is not None]
    choose = _one_layer if len(default) == 1 else _range
    layers, reason = choose(effects, report, possible) if report.traces else ([], _no_facts(report))
    if layers and len(report.traces) < ENOUGH_FACTS:
        reason += f" Only {len(report.traces)} facts were traced; {ENOUGH_FACTS} or more would be steadier."
    if not layers:
        reason += " These are the method's own layers for a model of this kind."
    return LayerSuggestion(
        method=normalise(method),
        layers=layers or list(default),
        default=list(default),
        source="tracing" if layers else "default",
        reason=reason,
        report=report,
        curves={kind: curve.tolist() for kind, curve in effects.items()},
    )


def _no_facts(report: TraceReport) -> str:
    if not report.skipped:
        return "There was nothing to trace."
    fact, why = report.skipped[0]
    return f"The model knows none of the {len(report.skipped)} facts ({fact.prompt!r}: {why})."


def _early_site(
    effects: Mapping[str, torch.Tensor], report: TraceReport, possible: Sequence[int]
) -> tuple[list[int], str]:
    """Layers at which the hidden state of the subject's last token carries the fact; or none, and why."""
    total = report.total_effect
    if total < _LITTLE_EFFECT:
        return [], (
            f"Noise on the subject lowers the probability of the answers by {total:.2f} only, so nothing can be told."
        )
    hidden = effects["hidden"]
    if float(hidden.max()) < _NO_SITE * total:
        return [], "No state at the subject's last token brings the answers back."
    return [layer for layer in possible if float(hidden[layer]) >= 0.5 * float(hidden.max())], ""


def _one_layer(
    effects: Mapping[str, torch.Tensor], report: TraceReport, possible: Sequence[int]
) -> tuple[list[int], str]:
    """The centre of the window of MLPs with the largest effect inside the early site."""
    site, reason = _early_site(effects, report, possible)
    if not site:
        return [], reason
    mlp, hidden = effects["mlp"], effects["hidden"]
    largest = max(float(mlp[layer]) for layer in site)
    if largest < _NO_SITE * report.total_effect:
        return [], "Restoring MLPs at the subject's last token brings almost nothing back."
    best = max(layer for layer in site if float(mlp[layer]) >= _SAME * largest)
    return [best], (
        f"At the subject's last token, restoring the MLPs of {_layers(report.window)} around layer {best} brings back"
        f" {float(mlp[best]):.2f} of the {report.total_effect:.2f} that the noise takes from the answers, more than"
        f" anywhere else; the hidden state there carries {float(hidden[best]):.2f}."
    )


def _range(effects: Mapping[str, torch.Tensor], report: TraceReport, possible: Sequence[int]) -> tuple[list[int], str]:
    """The unbroken run of layers around the largest gap between intact and severed MLPs, down to half of it."""
    site, reason = _early_site(effects, report, possible)
    if not site:
        return [], reason
    gap = effects["hidden"] - effects["hidden_without_mlp"]
    below = [layer for layer in possible if layer <= site[-1]]
    peak = max(below, key=lambda layer: float(gap[layer]))
    if float(gap[peak]) < _NO_GAP * report.total_effect:
        return [], "Severing the MLPs makes no clear difference at any layer."
    chosen = [peak]
    for step in (-1, 1):
        layer = peak + step
        while layer in below and float(gap[layer]) >= 0.5 * float(gap[peak]):
            chosen.append(layer)
            layer += step
    chosen.sort()
    return chosen, (
        f"At the subject's last token of layers {chosen[0]} to {chosen[-1]}, the hidden state brings back up to"
        f" {float(gap[peak]):.2f} less of the {report.total_effect:.2f} that the noise takes when the MLPs above are"
        " severed; elsewhere less than half of that."
    )


def _layers(count: int) -> str:
    return "one layer" if count == 1 else f"{count} layers"
