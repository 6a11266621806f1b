"""The wheel: complete, and usable without this checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = ("bopo_ray", "envs", "experiments")
LINES = (ROOT / "constraints.txt").read_text().splitlines()
PINS = {name.lower(): version for name, _, version in (line.partition("==") for line in LINES) if name[0] != "#"}


def sources() -> Iterator[Path]:
    """The files of the packages, relative to the checkout."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline from a copy: a build folder here could lend the wheel a file that is gone."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for package in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    built = subprocess.run([*command, "-w", out, copy], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_every_module_and_data_file_is_in_it_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {path.as_posix() for path in sources()}
    assert {Path(name).suffix for name in wanted} >= {".py", ".j2", ".css", ".js", ".yaml", ".json"}
    assert found == wanted


def test_its_metadata(wheel: Path, metadata: Message) -> None:
    assert wheel.name == "bopo_ray-0.1.0-py3-none-any.whl"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) >= {"test", "lint", "dev", "dashboard"}
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/LICENSE"))
        assert archive.read(name) == (ROOT / "LICENSE").read_bytes()


def test_the_pins_are_within_what_it_asks_for(metadata: Message) -> None:
    asked = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    named = [r for r in asked if r.name.lower() != "bopo_ray"]
    assert [str(r) for r in named if not r.specifier.contains(PINS[r.name.lower()])] == []
    assert not any("+" in version for version in PINS.values()), "a local version would bind everyone to one build"


def test_it_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USE, site], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tasks, tokens, prices, modules = map(int, done.stdout.split())
    assert tasks > 1000, "the benchmark's task lists are data of the package"
    assert tokens > 0, "so is the tokenizer"
    assert prices > 0, "and the price table"
    assert modules == sum(path.suffix == ".py" for path in sources())


USE = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import bopo_ray, envs, experiments
modules = [bopo_ray, envs, experiments]
for package in tuple(modules):
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        modules.append(importlib.import_module(info.name))
for module in modules:
    assert module.__file__.startswith(sys.argv[1]), module.__file__
from bopo_ray.models.pricing import price_table
from bopo_ray.models.tokens import count_tokens
from envs.scienceworld import ScienceWorldEnv
print(len(ScienceWorldEnv.tasks("test")), count_tokens("open the door"), len(price_table().prices), len(modules))
"""
