"""How benchmarks measure: two sides in alternation in one process, the same clock, one JSON line per row."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_kedit.logging import disable_progress_bars, set_verbosity_error


def clock(device: str) -> float:
    """Process time on a CPU, wall time after a synchronisation on a GPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Sides:
    """Two implementations, timed in alternation.

    Args:
        seconds: per side, one entry per alternation.
        peaks: per side, peak bytes of the accelerator (0 on a CPU).
        results: what the sides returned last.
    """

    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    peaks: list[int] = field(default_factory=lambda: [0, 0])
    results: list[Any] = field(default_factory=lambda: [None, None])

    def figures(self, per: int = 1) -> dict[str, Any]:
        """Medians per unit, and the ratio theirs / ours with its range over the alternations."""
        ratios = [theirs / ours for ours, theirs in zip(*self.seconds, strict=True)]
        return {
            "seconds": statistics.median(self.seconds[0]) / per,
            "seconds_reference": statistics.median(self.seconds[1]) / per,
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "peak_bytes": self.peaks[0],
            "peak_bytes_reference": self.peaks[1],
        }


def alternate(
    ours: Callable[[], Any], theirs: Callable[[], Any], *, pairs: int, device: str = "cpu", warm_up: bool = True
) -> Sides:
    """Run both sides in turn, ``pairs`` times; ours once before, so that routes are checked and kernels chosen."""
    sides = Sides()
    if warm_up:
        ours()
    for _ in range(pairs):
        for i, call in enumerate((ours, theirs)):
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            began = clock(device)
            sides.results[i] = call()
            sides.seconds[i].append(clock(device) - began)
            if device != "cpu":
                sides.peaks[i] = max(sides.peaks[i], torch.cuda.max_memory_allocated())
    return sides


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """``‖a − b‖ / ‖b‖`` in float64."""
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).norm() / b.norm())


def environment(device: str, dtype: str = "float32") -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else f"cpu, {torch.get_num_threads()} thread",
        "dtype": dtype,
        "tf32": bool(torch.backends.cuda.matmul.allow_tf32),
        "torch": torch.__version__,
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--pairs", type=int, default=3, help="alternations of the two sides")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--json", type=Path, help="append one JSON line per row to this file")
    return made


def begin(options: argparse.Namespace) -> None:
    """One thread on a CPU, and nothing printed but the table."""
    if options.device == "cpu":
        torch.set_num_threads(1)
    disable_progress_bars()
    set_verbosity_error()


class Table:
    """Prints rows as they come and writes them as JSON lines.

    Args:
        columns: (title, key, format) of every printed column; a row may hold more.
        path: where the JSON lines go.
    """

    def __init__(self, columns: Sequence[tuple[str, str, str]], path: Path | None = None):
        self.columns, self.path = columns, path
        print("  ".join(f"{title:>{self._width(title, how)}}" for title, _, how in columns), flush=True)

    @staticmethod
    def _width(title: str, how: str) -> int:
        return max(len(title), int("".join(c for c in how.split(".")[0] if c.isdigit()) or 0))

    def add(self, row: dict[str, Any]) -> None:
        """Print and write one row."""
        cells = (f"{row[key]:{how}}".rjust(self._width(title, how)) for title, key, how in self.columns)
        print("  ".join(cells), flush=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
