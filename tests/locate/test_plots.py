"""Heat maps: what is drawn, and what happens without matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_kedit.errors import MissingExtraError, RequestError
from hf_kedit.locate import TRACE_KINDS, Fact, Trace, TraceReport, plot_average, plot_trace, save_figure

TOKENS = [" The", " Eif", "fel", " Tower", " is", " in"]


def report(kinds: tuple[str, ...] = TRACE_KINDS[:3], layers: int = 4) -> TraceReport:
    generator = torch.Generator().manual_seed(0)
    scores = {kind: 0.1 + 0.05 * torch.rand(6, layers, generator=generator) for kind in kinds}
    scores[kinds[0]][3, 1] = 0.8
    scores[kinds[-1]][5, 0] = 0.02  # below the corrupted run: negative effect
    trace = Trace(Fact("The Eiffel Tower is in", "Eiffel Tower", (4, 16)), TOKENS, (1, 4), " Paris", 0.9, 0.1, scores)
    return TraceReport([trace, trace], [], kinds, 2, 5, 0.1, 1, "tiny", layers)


def test_one_fact() -> None:
    pytest.importorskip("matplotlib")
    made = report()
    for figure in (plot_trace(made.traces[0], made), made.traces[0].plot(made.window)):
        panels = [a for a in figure.axes if a.get_title(loc="left")]
        heads = [a.get_title(loc="left").splitlines() for a in panels]
        assert [head[0] for head in heads] == ["hidden state", "MLP output, 2 layers", "attention output, 2 layers"]
        assert heads[0][1] == "at most 0.80, layer 1"
        assert [t.get_text() for t in panels[0].get_yticklabels()] == ["The", "Eif*", "fel*", "Tower*", "is", "in"]
        for axis, kind in zip(panels, made.kinds, strict=True):
            image = axis.images[0]
            assert np.allclose(image.get_array(), made.traces[0].scores[kind].numpy())
            assert image.get_clim() == (pytest.approx(0.1), pytest.approx(0.8))  # one scale for all panels
        (frame,) = panels[0].patches
        assert (frame.get_x(), frame.get_y()) == (0.5, 2.5)  # around the largest cell: token 3, layer 1
        assert figure._suptitle.get_text() == "What carries it: The Eiffel Tower is in → Paris"  # type: ignore[attr-defined]


def test_averages() -> None:
    pytest.importorskip("matplotlib")
    made = report(TRACE_KINDS)
    for figure in (plot_average(made), made.plot()):
        panels = [a for a in figure.axes if a.get_title(loc="left")]
        assert len(panels) == 5 and len({a.images[0].get_clim() for a in panels}) == 1
        labels = [t.get_text() for t in panels[0].get_yticklabels()]
        assert labels == ["first subject", "middle subject", "last subject", "first after", "last"]
        assert float(panels[0].images[0].get_array()[2, 1]) == pytest.approx(0.7)
        assert float(panels[-1].images[0].get_array().min()) == 0.0
    made.traces.pop()
    assert "The Eiffel Tower" in made.plot()._suptitle.get_text()  # type: ignore[attr-defined]  # of one fact, its tokens


def test_files_are_png_and_fit_deep_models(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = report(layers=48)
    path = save_figure(plot_average(made), tmp_path / "new" / "average.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 10_000
    ticks = plot_trace(made.traces[0], made).axes[0].get_xticks()
    assert len(ticks) <= 12


def test_nothing_to_draw() -> None:
    empty = report()
    empty.traces = []
    with pytest.raises(RequestError, match="no traced facts"):
        plot_average(empty)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hf_kedit.drawing.picture", raising=False)
    with pytest.raises(MissingExtraError, match=r"hf_kedit\[viz\]"):
        plot_average(report())
