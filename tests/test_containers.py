"""The Dockerfile and what belongs to it, read and, as far as that goes without a container, carried out."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from hf_kedit.cli import app
from tests.import_graph import ROOT

INSTRUCTIONS = set("ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM HEALTHCHECK RUN USER VOLUME WORKDIR".split())
COMMANDS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Step:
    """An instruction of a Dockerfile."""

    name: str
    rest: str


def steps(text: str) -> list[Step]:
    """The instructions of a Dockerfile, lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Step(*line.split(None, 1)) for line in joined.splitlines() if line.strip()]


DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STEPS = steps(DOCKERFILE)


def all_of(name: str) -> list[str]:
    return [step.rest for step in STEPS if step.name == name]


def copied() -> list[tuple[list[str], str]]:
    """Sources and destination of every COPY."""
    words = [shlex.split(rest) for rest in all_of("COPY")]
    return [(each[:-1], each[-1]) for each in words]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file out; the last pattern that fits decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip().lstrip("!")
        if not pattern or pattern.startswith("#"):
            continue
        parts = path.split("/")
        starts = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        anywhere = pattern.startswith("**/") and any(fnmatch.fnmatch(part, pattern[3:]) for part in parts)
        if anywhere or any(fnmatch.fnmatch(start, pattern) for start in starts):
            out = not line.strip().startswith("!")
    return out


def check_command(words: list[str]) -> None:
    """A command of `kedit` with options that it has, which other machines reach."""
    options = {name for parameter in COMMANDS[words[0]].params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options and "0.0.0.0" in words


def test_every_instruction_is_known() -> None:
    assert {step.name for step in STEPS} == INSTRUCTIONS
    assert "ADD" not in DOCKERFILE.split() and not re.search(r"(curl|wget)\s", DOCKERFILE)
    for name in ("CMD", "ENTRYPOINT"):
        assert all(isinstance(word, str) for word in json.loads(all_of(name)[0]))
    assert STEPS[0].name == "ARG" and STEPS[1].name == "FROM"


def test_it_is_built_from_the_repository_alone() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for sources, _ in copied():
        for source in sources:
            assert (ROOT / source).exists(), source
            inside = [f for f in tracked if f == source or f.startswith(f"{source}/")]
            assert inside or not tracked, f"{source} is not in the repository"
            assert not [f for f in inside if ignored(f)], f"{source}: .dockerignore keeps it out"
    assert ignored("tests/test_model.py") and ignored(".git/config") and ignored("hf_kedit/cli/__pycache__/a.pyc")


def test_what_the_build_reads_is_copied() -> None:
    """Everything that setup.cfg names, and the pins."""
    have = {source for sources, _ in copied() for source in sources}
    assert {"setup.cfg", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "hparams", "hf_kedit"} <= have
    installs = [run for run in all_of("RUN") if "pip install" in run]
    assert all("constraints.txt" in run for run in installs)
    extras = re.search(r"\.\[(.+?)\]", installs[-1])
    assert extras and {"demo", "serve"} <= set(extras[1].split(","))


def test_it_does_not_run_as_root_and_tells_its_health() -> None:
    names = [step.name for step in STEPS]
    assert all_of("USER") == ["kedit"] and "useradd" in all_of("RUN")[0]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))
    assert "/health" in all_of("HEALTHCHECK")[0]
    entry, command = json.loads(all_of("ENTRYPOINT")[0]), json.loads(all_of("CMD")[0])
    assert entry == ["kedit"]
    check_command(command)


def test_compose_starts_both_for_this_machine_only() -> None:
    found = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    assert set(found["services"]) == {"server", "ui"}
    for service in found["services"].values():
        check_command(service["command"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["build"]["context"] == "." and service["cap_drop"] == ["ALL"]
        assert set(service["build"]["args"]) <= {rest.partition("=")[0] for rest in all_of("ARG")}
        for volume in service["volumes"]:
            name, _, place = volume.partition(":")
            assert name in found["volumes"] and place in all_of("VOLUME")


def test_the_page_shows_what_is_there() -> None:
    page = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")
    for argument in re.findall(r"--build-arg (\w+)=", page + DOCKERFILE):
        assert argument in {rest.partition("=")[0] for rest in all_of("ARG")}


@pytest.mark.slow
def test_its_steps_make_a_server(tmp_path: Path) -> None:
    """All steps but those that need root, in a clean folder: what comes out answers as the container would."""
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}/venv/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": "",
    }
    environment["TORCH_INDEX"] = os.environ.get("KEDIT_TEST_TORCH_INDEX", "https://pypi.org/simple")
    place = tmp_path / "kedit"
    for step in STEPS:
        if step.name == "COPY":
            *sources, destination = shlex.split(step.rest)
            for source in sources:
                target = place / destination if destination != "./" else place / source
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    place.mkdir(exist_ok=True)
                    shutil.copy(ROOT / source, target)
        elif step.name == "RUN" and "useradd" not in step.rest:
            command = step.rest.replace("/opt/venv", f"{tmp_path}/venv")
            done = subprocess.run(command, shell=True, cwd=place, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    line: list[str] = [*json.loads(all_of("ENTRYPOINT")[0]), *json.loads(all_of("CMD")[0]), "--port", "0"]
    process: Any = subprocess.Popen(line, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        for text in process.stderr:
            said += text
            if found := re.search(r"at http://0\.0\.0\.0:(\d+)/v1 ", text):
                break
        else:
            raise AssertionError(said)
        check = json.loads(all_of("HEALTHCHECK")[0].partition("CMD ")[2])
        check[-1] = check[-1].replace(":8000/", f":{found[1]}/")
        assert subprocess.run(check, env=environment, check=False).returncode == 0
    finally:
        process.terminate()
        process.communicate(timeout=60)
