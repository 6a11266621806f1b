"""Shared by all tests: a quiet environment, one cache of expert plans, one Ray for the tests that want it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Read by the libraries when they are imported, here and in the processes that Ray starts.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_V2_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
# The tests start a Ray of their own, also where a cluster runs, and play the games that ship with the package.
for name in ("RAY_ADDRESS", "ALFWORLD_DATA", "APPWORLD_ROOT"):
    os.environ.pop(name, None)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--env-id`: whose contract to test."""
    parser.addoption("--env-id", action="append", help="an environment for tests/integration/test_env_contract.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what stands in tests/integration, so that `-m "not integration"` leaves it out."""
    folder = Path(__file__).parent / "integration"
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session", autouse=True)
def plan_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One folder of expert plans for the session, unless BOPO_RAY_CACHE names one: they take long to make."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("BOPO_RAY_CACHE"):
            patch.setenv("BOPO_RAY_CACHE", str(tmp_path_factory.mktemp("bopo_ray_cache")))
        yield Path(os.environ["BOPO_RAY_CACHE"])


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """A local Ray with 2 CPUs for the session's tests; yields the context of `ray.init`. They must not shut it down."""
    import ray

    yield ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.shutdown()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many kilobytes."""
    folder = tmp_path / "disk"

    def make(kilobytes: int) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
        if (mounted := subprocess.run(command, capture_output=True, text=True)).returncode:
            folder.rmdir()
            pytest.skip(f"can't mount a small disk: {mounted.stderr.strip()}")
        return folder

    yield make
    if folder.exists():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # whoever failed there may have files open
