"""The logbook of a search: what was found out, line by line, so that a killed search goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import DataError, TuneError
from ..storage.files import json_ready
from ..storage.parsing import as_mapping, parse_json

_FILE = "logbook.jsonl"


def digest_of(*values: Any) -> str:
    """A short hash of JSON-ready values."""
    return hashlib.sha256(json.dumps(json_ready(values), sort_keys=True).encode()).hexdigest()[:24]


class Logbook:
    """What was found out, by the hash of the question.

    Args:
        folder: where it lies; made if needed. ``None``: in memory only.
        fresh: begin anew, whatever is there.

    Raises:
        TuneError: if the folder cannot be made or read.
    """

    def __init__(self, folder: Path | None, *, fresh: bool = False):
        self.file = None if folder is None else folder / _FILE
        self._answers: dict[str, Any] = {}
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if fresh:
                self.file.unlink(missing_ok=True)
            lines = self.file.read_text(encoding="utf-8", errors="replace").split("\n") if self.file.exists() else []
        except OSError as error:
            raise TuneError(f"the logbook {str(self.file)!r} cannot be used: {error}") from error
        for line in lines:
            try:
                entry = as_mapping(parse_json(line, "a line", DataError), "a line", DataError)
                self._answers[str(entry["key"])] = entry["answer"]
            except (DataError, KeyError):
                continue  # the line that was being written when the process was killed: it is found out again

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def write(self, key: str, answer: Any, **about: Any) -> None:
        """Keep an answer; it is on the disk when this returns.

        Args:
            key: of the question.
            answer: JSON-ready.
            about: what the question was, for people who read the file.

        Raises:
            TuneError: if it cannot be written.
        """
        self._answers[key] = answer
        if self.file is None:
            return
        line = json.dumps(json_ready({"key": key, **about, "answer": answer}), ensure_ascii=True, allow_nan=False)
        try:
            with self.file.open("ab+") as file:
                if file.tell() and not _ends_a_line(file):
                    file.write(b"\n")  # behind a line that was cut off
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TuneError(f"the logbook {str(self.file)!r} cannot be written: {error}") from error


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
