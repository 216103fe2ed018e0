"""What a user gets: the package list, the version, the pins, and the files inside a built wheel."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from hf_kedit.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_kedit"


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a clean copy: building in place leaves build/ behind, which later builds would pick up."""
    source = tmp_path_factory.mktemp("source")
    target = tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md", "MANIFEST.in"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
    for name in ("hf_kedit", "hparams"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    litter = source / "hf_kedit" / "embedded" / "__pycache__" / "x.cpython-311.pyc"  # the wheel must leave it out
    litter.parent.mkdir()
    litter.write_bytes(b"")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run([*command, "-w", str(target), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def _requirements(setup_cfg: configparser.ConfigParser, extra: str | None = None) -> list[Requirement]:
    """What the library, or one of its extras, asks for; extras that an extra is made of are looked up."""
    text = setup_cfg["options"]["install_requires"] if extra is None else setup_cfg["options.extras_require"][extra]
    found = []
    for requirement in map(Requirement, _lines(text)):
        if requirement.name == "hf_kedit":
            found += [r for part in sorted(requirement.extras) for r in _requirements(setup_cfg, part)]
        else:
            found.append(requirement)
    return found


def _pins() -> dict[str, Version]:
    pins = [Requirement(line) for line in _lines((ROOT / "constraints.txt").read_text(encoding="utf-8"))]
    return {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in pins}


# ---------------------------------------------------------------------- setup.cfg


def test_every_package_is_listed(setup_cfg: configparser.ConfigParser) -> None:
    listed = set(_lines(setup_cfg["options"]["packages"]))
    folders = {p.parent for p in PACKAGE.rglob("__init__.py")}
    present = {".".join(f.relative_to(ROOT).parts) for f in folders} | {"hf_kedit.hparams"}
    assert listed == present, "setup.cfg [options] packages differs from the folders with an __init__.py"


def test_every_module_is_in_a_package() -> None:
    stray = [p for p in PACKAGE.rglob("*.py") if not (p.parent / "__init__.py").is_file()]
    assert not stray, f"a folder with modules but without __init__.py is not packaged: {stray}"


def test_torch_is_a_range_for_users_and_a_pin_for_us(setup_cfg: configparser.ConfigParser) -> None:
    (torch,) = [r for r in _requirements(setup_cfg) if r.name == "torch"]
    assert not any(s.operator in ("==", "===") for s in torch.specifier)
    assert "torch" in _pins()


@pytest.mark.parametrize("extra", [None, "test"])
def test_pins_lie_in_the_ranges(setup_cfg: configparser.ConfigParser, extra: str | None) -> None:
    """What `make` installs is pinned, and setup.cfg allows it."""
    pins = _pins()
    for requirement in _requirements(setup_cfg, extra):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} is outside {requirement}"


def test_extras(setup_cfg: configparser.ConfigParser) -> None:
    extras = setup_cfg["options.extras_require"]
    assert {"eval", "harness", "retrieval", "demo", "quant", "viz", "docs", "test", "dev"} <= set(extras)
    for extra in extras:
        assert _requirements(setup_cfg, extra), f"extra {extra} is empty"


def test_errors_name_extras_that_exist(setup_cfg: configparser.ConfigParser) -> None:
    """`require_extra("package", "extra", …)` tells the user to install an extra: it must offer the package."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called == "require_extra" and all(isinstance(a, ast.Constant) for a in node.args[:2]):
                package, extra = (a.value for a in node.args[:2])
                where = f"{path.name}:{node.lineno}"
                assert extra in setup_cfg["options.extras_require"], f"{where}: there is no extra '{extra}'"
                offered = {canonicalize_name(r.name) for r in _requirements(setup_cfg, extra)}
                assert canonicalize_name(package) in offered, f"{where}: {package} is not in [{extra}]"


def test_there_is_no_project_table() -> None:
    """A [project] table, even a partial one, overrides what setup.cfg says."""
    assert "project" not in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- version


def test_version_is_written_once(setup_cfg: configparser.ConfigParser) -> None:
    assert setup_cfg["metadata"]["version"] == "attr: hf_kedit.version.__version__"
    assert str(Version(__version__)) == __version__
    for path in PACKAGE.rglob("*.py"):
        if path.name != "version.py":
            assert not re.search(r"^__version__\s*=", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_version_of_the_citation_and_the_changelog() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------- the wheel


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode("utf-8"))
    assert metadata["Name"] == "hf_kedit"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert any(n.endswith("licenses/LICENSE") for n in wheel.namelist())
    entry_points = wheel.read(name.replace("METADATA", "entry_points.txt")).decode("utf-8")
    assert "kedit = hf_kedit.cli:main" in entry_points


def test_wheel_has_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    expected = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.py")} | {"hf_kedit/py.typed"}
    assets = [p for p in (PACKAGE / "embedded").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    expected |= {p.relative_to(ROOT).as_posix() for p in assets}
    expected |= {f"hf_kedit/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "hparams").rglob("*.yaml")}
    assert assets, "there are no embedded assets"
    assert expected - set(wheel.namelist()) == set()


def test_wheel_has_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {n.split("/")[0] for n in names} == {"hf_kedit", f"hf_kedit-{__version__}.dist-info"}
    assert not [n for n in names if n.endswith(".pyc") or "__pycache__" in n]


def test_hparams_are_found_after_a_wheel_install(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        "from hf_kedit.config.hparams import find_hparams, hparams_root\n"
        "print(hparams_root(), find_hparams('rome', 'openai-community/gpt2-xl')[1]['layers'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == f"{tmp_path / 'hf_kedit' / 'hparams'} [17]"
