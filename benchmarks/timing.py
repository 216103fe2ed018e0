"""How benchmarks measure: two sides in alternation in one process, the same clock, one JSON line per row."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def reset_peak(device: str) -> int:
    """Forget earlier peaks of memory and return the bytes in use now; 0 where the system cannot say."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed must not count as in use
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return 0
    return _resident("VmRSS")


def peak(device: str) -> int:
    """Largest number of bytes in use since `reset_peak`: of the accelerator, or resident in memory."""
    return int(torch.cuda.max_memory_allocated()) if device != "cpu" else _resident("VmHWM")


def _resident(name: str) -> int:
    """A line of Linux' account of this process, in bytes; 0 on other systems."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


class Stages:
    """Seconds that a run spends inside some functions, each counted without those called from it.

    Args:
        places: stage → (object that holds the function, its name).
        device: where the run is.
    """

    def __init__(self, places: Mapping[str, tuple[Any, str]], device: str):
        self.places, self.device = places, device
        self.seconds = dict.fromkeys(places, 0.0)
        self._inside: list[float] = []  # per open call, the seconds of the calls inside it

    @contextlib.contextmanager
    def watching(self) -> Iterator[dict[str, float]]:
        """Count inside the block; the seconds are complete behind it, ``everything else`` included."""
        began = clock(self.device)
        with contextlib.ExitStack() as stack:
            for stage, (holder, name) in self.places.items():
                original = getattr(holder, name)
                setattr(holder, name, self._counted(stage, original))
                stack.callback(setattr, holder, name, original)
            yield self.seconds
        rest = clock(self.device) - began - sum(self.seconds.values())
        self.seconds["everything else"] = rest

    def _counted(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            began = clock(self.device)
            try:
                return function(*args, **kwargs)
            finally:
                whole = clock(self.device) - began
                self.seconds[stage] += whole - self._inside.pop()
                if self._inside:
                    self._inside[-1] += whole

        return call


@dataclass
class Sides:
    """Two implementations, timed in alternation.

    Args:
        seconds: per side, one entry per alternation.
        peaks: per side, by how many bytes the memory in use grew at its peak (0 where the system cannot say).
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
            before = reset_peak(device)
            began = clock(device)
            sides.results[i] = call()
            sides.seconds[i].append(clock(device) - began)
            if before:
                sides.peaks[i] = max(sides.peaks[i], peak(device) - before)
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
        "commit": _commit(),
    }


@functools.cache
def _commit() -> str | None:
    """Short hash of the checked-out commit, with a plus sign if files differ from it; ``None`` outside a checkout."""
    here = Path(__file__).parent
    try:
        known = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return known.stdout.strip() or None


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

    def measured(self, **same: Any) -> list[dict[str, Any]]:
        """The rows that the file holds already and that have these values, such as ``commit``."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path and self.path.exists() else []
        return [row for row in map(json.loads, lines) if same.items() <= row.items()]

    def show(self, row: dict[str, Any]) -> None:
        """Print one row; what it lacks is a dash."""
        cells = (
            ("–" if row.get(key) is None else f"{row[key]:{how}}").rjust(self._width(title, how))
            for title, key, how in self.columns
        )
        print("  ".join(cells), flush=True)

    def add(self, row: dict[str, Any]) -> None:
        """Print and write one row."""
        self.show(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
