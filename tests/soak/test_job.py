"""A run as a job of a started cluster. Needs Ray's dashboard: pip install 'ray[default]'."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.integration.conftest import ROOT, TOY, Frontier, wait_for

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not find_spec("aiohttp_cors"), reason="ray job submit needs Ray's dashboard: ray[default]"),
]
TOKEN = "planted-0123456789abcdef0123456789abcdef"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """For Ray's files; its sockets want a short path."""
    with TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def cluster(tmp_path: Path, ray_folder: Path) -> Iterator[dict[str, str]]:
    """A head and a worker with a token, on this machine; yields the environment of their clients."""
    (tmp_path / "token").write_text(TOKEN)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    port, dashboard = free_port(), free_port()
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-cpus=2"]
    head = ["--head", f"--port={port}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", f"--temp-dir={ray_folder}"]  # fmt: skip
    nodes = []
    try:
        for more in (head, [f"--address=127.0.0.1:{port}"]):
            nodes.append(subprocess.Popen([*start, *more], env=environment, stdout=subprocess.DEVNULL))
            wait_for(lambda: answers(dashboard), nodes[-1])
        yield environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        for node in reversed(nodes):  # not `ray stop`, which ends every Ray of this machine
            node.terminate()
            node.wait(60)


def answers(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def job(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, to its end."""
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--", *command]
    return subprocess.run(submit, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_a_submitted_job_ends_as_the_command_does(
    cluster: dict[str, str], ray_folder: Path, toy_run: Frontier, tmp_path: Path
) -> None:
    run = Frontier(tmp_path, TOY)
    script = f"cd {ROOT} && {sys.executable} -m experiments.frontier {' '.join(run.arguments)}"
    done = job(cluster, "bash", "-c", script)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for store in ("boundary", "stratified", "policy", "evaluation"):
        assert run.rows(store) == toy_run.rows(store)
    assert (run.out / "frontier.csv").read_bytes() == (toy_run.out / "frontier.csv").read_bytes()
    assert re.search(r"Ray dashboard: http://127\.0\.0\.1:\d+", done.stdout)
    files = [p for folder in (tmp_path, ray_folder) for p in folder.rglob("*") if p.is_file()]
    assert [p for p in files if TOKEN.encode() in p.read_bytes()] == [tmp_path / "token"]

    stranger = cluster | {"RAY_AUTH_TOKEN": "another-0123456789abcdef0123456789abcdef"}
    refused = job(stranger, "true")
    assert refused.returncode != 0 and "token" in (refused.stdout + refused.stderr).lower()
