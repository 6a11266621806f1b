"""Process pools leave nobody behind when their owner is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

OWNER = """
import os, time
from envs.workers import process_pool

if __name__ == "__main__":
    with process_pool(2) as pool:
        print(*pool.map(abs, [1, 2]), os.getpid(), flush=True)
        list(pool.map(time.sleep, [600] * 8))
"""


def test_the_workers_of_a_killed_owner_end(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    owner = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline().split()[:2] == ["1", "2"]
    workers = psutil.Process(owner.pid).children(recursive=True)
    assert len(workers) >= 2
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 60
    while any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers):
        assert time.monotonic() < deadline, [w for w in workers if w.is_running()]
        time.sleep(0.1)
