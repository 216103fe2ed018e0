"""Where a model keeps a fact: causal tracing, the logit lens, attribution to neurons, and which layers to edit."""

from __future__ import annotations

from ..drawing.style import save_figure
from .attribution import Attribution, attribute_neurons
from .lens import LensReading, logit_lens
from .suggest import LayerSuggestion, suggest_layers
from .traces import TRACE_KINDS, Fact, Trace, TraceReport, plot_average, plot_trace
from .tracing import causal_trace

__all__ = [
    "TRACE_KINDS",
    "Attribution",
    "Fact",
    "LayerSuggestion",
    "LensReading",
    "Trace",
    "TraceReport",
    "attribute_neurons",
    "causal_trace",
    "logit_lens",
    "plot_average",
    "plot_trace",
    "save_figure",
    "suggest_layers",
]
