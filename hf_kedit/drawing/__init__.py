"""Pictures: one look, and the few kinds of marks that all of them are made of. Knows no edit and no model.

Needs matplotlib (the extra ``viz``) when something is drawn, not when it is imported. Whoever has numbers draws them
with these marks: `EvaluationReport.plot`, `Comparison.plot`, `EditResult.plot`, `Trace.plot`, `TraceReport.plot`.
"""
