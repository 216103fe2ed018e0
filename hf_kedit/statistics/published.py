"""Second moments in the files that the published ROME and MEMIT codes leave behind (and EasyEdit, in ``stats_dir``).

    <stats_dir>/<model>/<dataset>_stats/<module>_<precision>_mom2<sample>.npz
        mom2.mom2   sum of k kᵀ over tokens, [d, d]
        mom2.count  number of tokens

They took hours, so they are read as they are. They do not say which weights they were taken on, so nothing but their
width can be checked, and the user is told.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ArtifactError, StatisticsError
from ..logging import get_logger, warn_once
from .moments import SecondMoment

logger = get_logger(__name__)
_NAME = re.compile(r"(?P<module>.+?)_(?:b?float\d+)_(?P<kinds>[^_]+)(?:_.*)?\.npz")


class PublishedMoments:
    """Files of one model.

    Args:
        folder: what the user named.
        files: module → its files.
    """

    def __init__(self, folder: Path, files: dict[str, list[Path]]):
        self.folder, self.files = folder, files

    def check(self, fingerprint: str) -> None:
        """Tell the user that the files are taken on trust."""
        warn_once(
            logger,
            f"the second moments in {self.folder} do not say which weights they belong to; they are taken for those of"
            f" this model (fingerprint {fingerprint}) before any edit",
        )

    def read(self, module: str) -> SecondMoment:
        """The moment of a module; of several samples the one with the most tokens.

        Raises:
            StatisticsError: if there is none, or there are files of several models.
            ArtifactError: if a file is damaged.
        """
        files = self.files.get(module)
        if not files:
            raise StatisticsError(
                f"{self.folder} holds no statistics of {module}; it has: {', '.join(sorted(self.files))}"
            )
        models = sorted({file.parent.parent for file in files})
        if len(models) > 1:
            raise StatisticsError(
                f"{self.folder} holds statistics of {module} in {', '.join(str(m) for m in models)}:"
                " name the folder of one model"
            )
        return _read(max(files, key=_count))


def find_published(folder: Path) -> PublishedMoments | None:
    """The files in and below a folder; ``None`` if there are none."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.npz")):
        match = _NAME.fullmatch(path.name)
        if match is not None and "mom2" in match["kinds"].split("-"):
            files.setdefault(match["module"], []).append(path)
    return PublishedMoments(folder, files) if files else None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The arrays of a file, each read when it is asked for."""
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path} is damaged, or no file of second moments: {error}") from error


def _count(path: Path) -> int:
    with _opened(path) as file:
        return int(file["mom2.count"])


def _read(path: Path) -> SecondMoment:
    with _opened(path) as file:
        total, count = torch.from_numpy(file["mom2.mom2"]).double(), int(file["mom2.count"])
    moment = SecondMoment(total, count, path.parent.name.removesuffix("_stats"))
    if fault := moment.fault():
        raise ArtifactError(f"{path} holds no second moment: {fault}")
    return moment
