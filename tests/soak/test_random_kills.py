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

PAUSE_S = (4.0, 20.0)
"""Between two kills."""
CALM_S = 60 * MINUTES / 6
"""At the end nothing is killed for so long, and the memory of each process is watched."""
OLD_S = 120.0
"""So old a process must be at the middle of the calm for its memory to be compared: a younger one is still loading."""
GROWTH = 1.1
"""At the end of the calm it takes at most so many times what it took at the middle."""


def family(run: Frontier) -> list[psutil.Process]:
    try:
        return psutil.Process(run.started[-1].pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def memory(run: Frontier) -> dict[int, tuple[float, int]]:
    """Age in seconds and resident bytes of each process of the run."""
    found = {}
    for process in (psutil.Process(run.started[-1].pid), *family(run)):
        try:
            found[process.pid] = time.time() - process.create_time(), process.memory_info().rss
        except psutil.Error:
            continue
    return found


def test_random_kills_lose_nothing_and_leak_nothing(frontier: Frontier) -> None:
    rng = random.Random(8)
    frontier.options = (*TOY, "--updates", "100000", "--advantage", "hybrid", "--lambdas", "0.2,0.8")
    kept: dict[str, dict[str, object]] = {}
    kills: dict[str, int] = defaultdict(int)
    end = time.monotonic() + 60 * MINUTES - CALM_S
    process = frontier.start()
    while time.monotonic() < end:
        wait_for(lambda p=process: frontier.actors("GroupEnvRunner") or p.poll() is not None)
        time.sleep(rng.uniform(*PAUSE_S))
        assert process.poll() is None, frontier.said()  # it has more updates to make than time
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
    assert kept and sum(kills.values()) >= MINUTES / 6  # a start after a kill may take a minute
    wait_for(lambda: frontier.actors("GroupEnvRunner") or process.poll() is not None)  # not while it is being loaded
    time.sleep(CALM_S / 2)
    before = memory(frontier)
    time.sleep(CALM_S / 2)
    after, last = memory(frontier), family(frontier)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, frontier.said()
    wait_for(lambda: not [p for p in last if alive(p)])
    assert ledger(frontier).keys() <= {f"bopo-hybrid_lam{lam:g}_seed0" for lam in (0.2, 0.8)}
    old = [pid for pid, (age, _) in before.items() if age > OLD_S and pid in after]
    for pid in old:
        sizes = f"{before[pid][1] / 1e6:.0f} MB, {after[pid][1] / 1e6:.0f} MB {CALM_S / 2:.0f} s later"
        print(f"a process of {before[pid][0]:.0f} s: {sizes}")
    assert old or MINUTES < 20
    assert all(after[pid][1] < GROWTH * before[pid][1] for pid in old)
