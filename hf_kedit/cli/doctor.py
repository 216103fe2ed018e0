"""``kedit doctor``: what is installed, where things are kept, what is wrong, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config.hparams import user_hparams
from ..errors import ConfigError
from ..storage.files import cache_home
from ..storage.parsing import as_mapping, parse_yaml, read_text
from ..version import __version__
from .output import FAILURE, DebugOption, Format, FormatOption, command, emit

_NAME = "hf_kedit"
_DEVELOPERS = ("docs", "test", "dev", "real")  # extras of no use to a user, or made of others
LITTLE_ROOM = 2**30
"""Free bytes below which a cache has no room for a model."""


@command
def doctor(format: FormatOption = Format.human, debug: DebugOption = False) -> None:
    """Say what is installed, where things are kept, and what is wrong with it; exit code 1 if something is."""
    wanted = [Requirement(line) for line in importlib.metadata.requires(_NAME) or []]
    needed = [each for each in wanted if "extra" not in str(each.marker)]
    found: dict[str, Any] = {
        "versions": {"python": platform.python_version(), _NAME: __version__}
        | {each.name: _version(each.name) for each in needed},
        "device": _device(),
        "caches": _caches(),
        "extras": _extras(wanted),
    }
    found["problems"] = problems = [*_of_versions(needed, found["extras"]), *_of_caches(found["caches"]), *_of_files()]
    emit(
        format,
        found,
        human=lambda console: _show(found, console),
        quiet=[problem["command"] for problem in problems],
    )
    if problems:
        raise typer.Exit(FAILURE)


# ---------------------------------------------------------------------- what there is


def _version(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    """What models compute on."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not names and torch.backends.mps.is_available():
        names = ["Apple GPU (mps)"]
    return {"accelerators": names, "cpu_cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _caches() -> dict[str, dict[str, Any]]:
    """Name → place, bytes that lie there, bytes that are free, and whether it can be written."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from ..statistics.store import default_cache_dir

    places = {
        "models and notes": cache_home(),
        "second moments": default_cache_dir() / "stats",
        "settings found by tune": user_hparams(),
        "Hugging Face Hub": Path(HF_HUB_CACHE),
    }
    return {name: _place(path) for name, path in places.items()}


def _place(path: Path) -> dict[str, Any]:
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:  # what is not there is made when it is needed
        nearest = nearest.parent
    return {
        "path": str(path),
        "bytes": _size(path),
        "free": shutil.disk_usage(nearest).free,
        "writable": nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
    }


def _size(folder: Path) -> int:
    """Bytes of all files below a folder; what links point to is counted where it lies."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:  # another process has taken it away
                continue
    return total


def _extras(wanted: list[Requirement]) -> dict[str, dict[str, str | None]]:
    """Extra → what belongs to it → its version; ``None``: not installed."""
    extras: dict[str, dict[str, str | None]] = {}
    for name in importlib.metadata.metadata(_NAME).get_all("Provides-Extra") or []:
        if name not in _DEVELOPERS:
            own = [each for each in wanted if each.marker is not None and each.marker.evaluate({"extra": name})]
            extras[name] = {each.name: _version(each.name) for each in own if "extra" in str(each.marker)}
    return extras


# ---------------------------------------------------------------------- what is wrong


def _problem(what: str, mend: str) -> dict[str, str]:
    return {"problem": what, "command": mend}


def _of_versions(needed: list[Requirement], extras: dict[str, dict[str, str | None]]) -> list[dict[str, str]]:
    """Libraries that are missing or of a wrong version, and extras that are there in part."""
    problems = []
    for each in needed:
        version = _version(each.name)
        if version is None or not each.specifier.contains(version, prereleases=True):
            what = f"{each.name} {version}" if version else f"{each.name}, which is not installed,"
            problems.append(_problem(f"{what} is not {each.specifier}", f"pip install '{each.name}{each.specifier}'"))
    for extra, parts in extras.items():
        missing = [name for name, version in parts.items() if version is None]
        if missing and len(missing) < len(parts):
            what = f"the extra {extra!r} is there in part: {', '.join(missing)} is missing"
            problems.append(_problem(what, f"pip install '{_NAME}[{extra}]'"))
    return problems


def _of_caches(caches: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Folders that cannot be written, or have no room."""
    problems = []
    for name, place in caches.items():
        variable = "HF_HUB_CACHE" if "Hub" in name else "HF_KEDIT_CACHE" if "moments" in name else "KEDIT_HOME"
        if not place["writable"]:
            what = f"{name}: {place['path']} cannot be written"
            problems.append(_problem(what, f"export {variable}=/a/folder/of/yours"))
        elif place["free"] < LITTLE_ROOM:
            what = f"{name}: {place['free'] / 2**20:.0f} MiB are free beside {place['path']}"
            problems.append(_problem(what, f"export {variable}=/a/larger/disk"))
    return problems


def _of_files() -> list[dict[str, str]]:
    """Own hparams files that cannot be read."""
    problems = []
    for path in sorted(user_hparams().rglob("*.yaml")):
        try:
            as_mapping(parse_yaml(read_text(path, ConfigError), str(path), ConfigError), str(path), ConfigError)
        except ConfigError as error:
            problems.append(_problem(" ".join(str(error).split()), f"rm '{path}'"))
    return problems


# ---------------------------------------------------------------------- for people


def _show(found: dict[str, Any], console: Console) -> None:
    device = found["device"]
    where = ", ".join(device["accelerators"]) or "no accelerator"
    versions = (f"{name} {version or 'missing'}" for name, version in found["versions"].items())
    lines = [("versions", ", ".join(versions)), ("device", f"{where}; {device['cpu_cores']} CPU cores")]
    for name, place in found["caches"].items():
        lines.append((name, f"{place['path']}: {place['bytes'] / 2**20:,.0f} MiB"))
    for extra, parts in found["extras"].items():
        there = "installed" if all(parts.values()) else f"pip install '{_NAME}[{extra}]'"
        lines.append((f"extra {extra}", f"{there} ({', '.join(parts)})"))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for problem in found["problems"]:
        console.print(Text(f"{problem['problem']}\n").append(f"  {problem['command']}", "cyan"), soft_wrap=True)
    if not found["problems"]:
        console.print(Text("nothing is wrong", "green"))
