"""Random kills for as long as BOPO_RAY_SOAK_MINUTES says (3 by default; an hour before a release)."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict

import pytest
from ray.thirdparty_files import psutil

from tests.integration.conftest import TOY, Frontier, wait_for
from tests.soak.test_faults import alive, kill_run, ledger

MINUTES = float(os.environ.get("BOPO_RAY_SOAK_MINUTES", "3"))
pytestmark = [pytest.mark.integration, pytest.mark.timeout(60 * MINUTES + 1200)]

PAUSE_S = (4.0, max(20.0, 2 * MINUTES))
"""Between two kills; the longer the soak, the older a process may get."""
OLD_S = 120.0
"""So old a process must be for its memory to be compared."""
GROWTH = 1.25
"""It takes at most so many times what it took when it was half as old."""


def family(run: Frontier) -> list[psutil.Process]:
    try:
        return psutil.Process(run.started[-1].pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def memory(process: psutil.Process) -> tuple[float, int] | None:
    """Age in seconds and resident bytes."""
    try:
        return time.time() - process.create_time(), process.memory_info().rss
    except psutil.Error:
        return None


def test_random_kills_lose_nothing_and_leak_nothing(frontier: Frontier) -> None:
    rng = random.Random(8)
    frontier.options = (*TOY, "--updates", "100000", "--advantage", "hybrid", "--lambdas", "0.2,0.8")
    kept: dict[str, dict[str, object]] = {}
    kills: dict[str, int] = defaultdict(int)
    grown: dict[str, list[tuple[float, int]]] = defaultdict(list)
    end = time.monotonic() + 60 * MINUTES
    process = frontier.start()
    while time.monotonic() < end:
        wait_for(lambda p=process: frontier.actors("GroupEnvRunner") or p.poll() is not None)
        quiet = min(end, time.monotonic() + rng.uniform(*PAUSE_S))
        while time.monotonic() < quiet and process.poll() is None:
            time.sleep(0.5)
            for pid in (process.pid, *(a.pid for a in frontier.actors("BoPO") + frontier.actors("GroupEnvRunner"))):
                if found := memory(psutil.Process(pid)) if psutil.pid_exists(pid) else None:
                    grown[str(pid)].append(found)
        if process.poll() is not None:
            assert process.returncode == 0, frontier.said()
            break
        who = rng.choice(("GroupEnvRunner", "GroupEnvRunner", "BoPO", "driver", "interrupt"))
        if who == "driver":
            kill_run(process)
        elif who == "interrupt":
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 130, frontier.said()
        elif victims := frontier.actors(who):
            rng.choice(victims).kill()
        kills[who] += 1
        if who in ("driver", "interrupt"):
            rows = frontier.rows("boundary") | frontier.rows("policy")
            assert all(rows[key] == row for key, row in kept.items())
            kept = rows
            process = frontier.start("--resume")
    print(f"{sum(kills.values())} kills {dict(kills)}, {len(kept)} episodes kept")
    assert kept and sum(kills.values()) >= MINUTES / 6  # a start after a kill may take half a minute, a pause two
    wait_for(lambda: frontier.actors("GroupEnvRunner") or process.poll() is not None)  # not while it is being loaded
    last = family(frontier)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    wait_for(lambda: not [p for p in last if alive(p)])
    assert ledger(frontier).keys() <= {f"bopo-hybrid_lam{lam:g}_seed0" for lam in (0.2, 0.8)}
    compared = []
    for seen in grown.values():
        age, size = seen[-1]
        if age > OLD_S:
            compared.append((age, next(s for a, s in seen if a >= age / 2), size))
    for age, half, size in compared:
        print(f"a process of {age:.0f} s: {half / 1e6:.0f} MB at half that age, {size / 1e6:.0f} MB at the end")
    assert compared or MINUTES < 10
    assert all(size < GROWTH * half for _, half, size in compared)
