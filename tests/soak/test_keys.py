"""Keys on a cluster: they are where the run is started, and on no node."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.endpoint import Endpoint
from tests.integration.conftest import ROOT, TOY, Frontier, wait_for, write_pool
from tests.soak.test_job import answers, free_port

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
KEY = "planted-0123456789abcdef0123456789abcdef"


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """For Ray's files; its sockets want a short path."""
    with TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_a_key_reaches_the_runners_of_a_started_cluster_and_no_file(tmp_path: Path, ray_folder: Path) -> None:
    """Ray starts workers with the environment of their node, not with that of the run."""
    port = free_port()
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-cpus=2"]
    head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={ray_folder}"]
    (tmp_path / "token").write_text("token-0123456789abcdef0123456789abcdef")
    bare = {name: value for name, value in os.environ.items() if name != "MY_KEY"} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
    }
    node = subprocess.Popen([*start, *head], env=bare, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: answers(port), node)
        with Endpoint(key=KEY) as endpoint:
            pool = write_pool(tmp_path / "pool.yaml", endpoint.url, key_variable="MY_KEY")
            run = Frontier(tmp_path, (*TOY, "--models", str(pool)))
            done = subprocess.run(
                [sys.executable, "-m", "experiments.frontier", *run.arguments], cwd=ROOT, capture_output=True,
                env=bare | {"MY_KEY": KEY, "RAY_ADDRESS": f"127.0.0.1:{port}"}, text=True, timeout=600, check=False,
            )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert endpoint.bill and not endpoint.refusals
    finally:
        node.terminate()
        node.wait(60)
    files = [p for folder in (tmp_path, ray_folder) for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 20 and [p for p in files if KEY.encode() in p.read_bytes()] == []
