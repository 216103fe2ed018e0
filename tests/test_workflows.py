"""The workflows of GitHub Actions: they run the commands that people run, with no more rights than they need."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_kedit import __version__
from tests.import_graph import ROOT

FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> dict[str, Any]:
    """A workflow; YAML takes its key ``on`` for a truth value."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    found["on"] = found.pop(True)
    return found


def commands(workflow: dict[str, Any]) -> list[str]:
    """All that its steps run."""
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def test_there_are_three() -> None:
    assert [path.stem for path in FILES] == ["ci", "docs", "release"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_workflow_is_well_formed(path: Path) -> None:
    workflow = read(path)
    assert workflow["name"] == path.stem and workflow["on"] and workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["runs-on"] == "ubuntu-latest", name
        for needed in [job.get("needs", [])]:
            assert set([needed] if isinstance(needed, str) else needed) <= set(workflow["jobs"])
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            assert re.fullmatch(r"[\w.-]+(/[\w.-]+)+@[\w./-]+", step.get("uses", "a/b@c")), step
    assert "secrets." not in path.read_text(encoding="utf-8")


def test_ci_runs_what_people_run() -> None:
    """The lines of .ci/run, each in one of the workflows, and nothing else; every target is in the Makefile."""
    ours = re.findall(r"^make .*$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    theirs = [*commands(read(FILES[0])), *commands(read(FILES[1]))]
    assert sorted(theirs) == sorted(ours)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {line.split()[1] for line in theirs} <= targets | {"test"}
    written = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8") + (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("make lint", "make test", "make docs"):
        assert command in written and command in theirs


def test_ci_tests_every_python_that_is_promised() -> None:
    tested = read(FILES[0])["jobs"]["test"]["strategy"]["matrix"]["python"]
    promised = re.findall(r"Python :: (3\.\d+)$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE)
    assert tested == promised


def test_a_release_is_trusted_and_has_the_version_of_its_tag(tmp_path: Path) -> None:
    workflow = read(FILES[2])
    assert workflow["on"] == {"push": {"tags": ["v*"]}}
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["environment"] == "pypi"
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    check = next(line for line in commands(workflow) if "GITHUB_REF_NAME" in line)
    for tag, code in ((f"v{__version__}", 0), ("v9.9.9", 1)):
        done = subprocess.run(["bash", "-c", check], cwd=ROOT, env={"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"})
        assert done.returncode == code
