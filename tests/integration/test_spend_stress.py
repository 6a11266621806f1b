"""The call store and the ledger under real processes, real threads and real kills."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from bopo_ray.models.calls import CallStore, StoredCall, owner_id
from bopo_ray.models.pricing import Usage
from bopo_ray.models.spend import SpendLedger

ROOT = Path(__file__).parents[2]
KEYS = [f"{i:032x}" for i in range(150)]
WORST, CAP = 1000, 3_000_000
"""Micro-dollars: the worst case of a call, and what all may spend; some five thousand calls fit in."""


def start(role: str, folder: Path, seeds: Iterable[int] = (0,)) -> list[subprocess.Popen[str]]:
    """Other processes of this file, which begin together."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, role, str(folder), str(seed)], env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for seed in seeds
    ]  # fmt: skip
    for p in processes:
        assert p.stdout is not None and p.stdout.readline() == "ready\n"
    for p in processes:
        assert p.stdin is not None
        p.stdin.write("go\n")
        p.stdin.flush()
    return processes


def ended(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each said; fails when one failed."""
    said = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes)
    return said


# -- what the other processes do --------------------------------------------------------------------------------------


def make_calls(folder: Path, seed: int) -> None:
    """Asks for all keys in an order of its own, makes those it shall make, and notes them."""
    store, owner, r = CallStore(folder / "calls.db"), owner_id(), random.Random(seed)
    todo = r.sample(KEYS, len(KEYS))
    while todo:
        key = todo.pop(0)
        found = store.claim(key, owner)
        if found is True:
            print(key)
            time.sleep(0.001)  # the model writes
            store.put(key, StoredCall("mini", f"made by {seed}", Usage(1, 1), 0.1))
        elif found is False:
            todo.append(key)
            time.sleep(0.001)


def spend(folder: Path, seed: int) -> None:
    """64 threads that call until the cap refuses; every reply costs up to the worst case."""
    ledger, owner, count = SpendLedger(folder / "spend.db", CAP), owner_id(), Counter[str]()
    mutex = threading.Lock()

    def episode(number: int) -> None:
        r, refused = random.Random(seed * 1000 + number), 0
        while refused < 3:
            reservation = ledger.reserve(owner, "k", f"model-{number % 2}", WORST)
            if reservation is None:
                refused += 1
                time.sleep(0.005)
                continue
            time.sleep(r.random() * 0.003)
            if (fate := r.random()) < 0.05:
                ledger.lose(reservation)
            elif fate < 0.1:
                ledger.release(reservation)
            else:
                cost = WORST if fate < 0.5 else r.randrange(WORST + 1)
                assert ledger.settle(reservation, Usage(cost, 1), cost)
                ledger.count_saved(f"model-{number % 2}", 1)
                with mutex:
                    count["paid"] += cost
                    count["calls"] += 1

    threads = [threading.Thread(target=episode, args=(n,)) for n in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(count["calls"], count["paid"])


def hold(folder: Path, seed: int) -> None:
    """Claims, reserves, and waits to be killed; the second call is stored, but not settled."""
    store, ledger, owner = CallStore(folder / "calls.db"), SpendLedger(folder / "spend.db", CAP), owner_id()
    for key in KEYS[:2]:
        assert store.claim(key, owner) is True
        assert ledger.reserve(owner, key, "mini", WORST) is not None
    store.put(KEYS[1], StoredCall("mini", "stored", Usage(70, 8), 0.1))
    print("holding", flush=True)
    sys.stdin.read()


def open_damaged(folder: Path, seed: int) -> None:
    """Opens a damaged store and puts a call there."""
    CallStore(folder / "calls.db").put(KEYS[seed], StoredCall("mini", "new", Usage(1, 1), 0.1))


# -- the tests --------------------------------------------------------------------------------------------------------


def test_eight_processes_make_each_call_once(tmp_path: Path) -> None:
    made = [said.split() for said in ended(start("make_calls", tmp_path, range(8)))]
    counts = Counter(key for keys in made for key in keys)
    assert set(counts) == set(KEYS) and set(counts.values()) == {1}
    assert sum(map(bool, made)) > 1, "one process made all calls: nothing was tested"
    store = CallStore(tmp_path / "calls.db")
    makers = {key: f"made by {seed}" for seed, keys in enumerate(made) for key in keys}
    assert {key: call.text for key in KEYS if (call := store.get(key))} == makers


def test_eight_processes_that_find_a_damaged_store_replace_it_once(tmp_path: Path) -> None:
    (tmp_path / "calls.db").write_bytes(b"no database" * 5000)
    ended(start("open_damaged", tmp_path, range(8)))
    store = CallStore(tmp_path / "calls.db")
    assert all(store.get(key) for key in KEYS[:8])
    assert (tmp_path / "calls.db.corrupt").read_bytes() == b"no database" * 5000  # not replaced by a second, sound one


def test_the_cap_holds_to_the_micro_dollar(tmp_path: Path) -> None:
    watcher = SpendLedger(tmp_path / "spend.db", None)
    processes = start("spend", tmp_path, range(3))
    most = looks = 0
    while any(p.poll() is None for p in processes):
        overall = watcher.totals().overall
        most, looks = max(most, overall.spent_microusd + overall.reserved_microusd), looks + 1
        assert most <= CAP
        time.sleep(0.005)
    said = [tuple(map(int, text.split())) for text in ended(processes)]
    totals = watcher.totals()
    rows = list(watcher.paid_rows())
    assert looks > 20 and most > CAP - WORST, "the cap was never reached: nothing was tested"
    assert CAP - WORST < totals.overall.spent_microusd <= CAP
    assert totals.overall.reserved_microusd == 0 and totals.overall.lost_calls > 10
    assert totals.overall.lost_microusd == WORST * totals.overall.lost_calls
    assert (len(rows), sum(r.cost for r in rows)) == (sum(n for n, _ in said), sum(paid for _, paid in said))
    assert all(calls > 50 for calls, _ in said), "one process spent all"
    for m in totals.models:
        mine = [r for r in rows if r.model == m.model]
        assert (m.paid_calls, m.paid_microusd) == (len(mine), sum(r.cost for r in mine))
        assert m.prompt_tokens == sum(r.usage.prompt_tokens for r in mine)
        assert m.completion_tokens == m.saved_calls == m.saved_microusd == len(mine)


def test_a_killed_owner_leaks_neither_claim_nor_money(tmp_path: Path) -> None:
    (process,) = start("hold", tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "holding\n"
    store, ledger = CallStore(tmp_path / "calls.db"), SpendLedger(tmp_path / "spend.db", CAP)

    def find(key: str) -> tuple[Usage, int] | None:
        call = store.get(key)
        return (call.usage, 30) if call else None

    ledger.recover(find)  # it lives: all stays as it is
    assert store.claim(KEYS[0], owner_id()) is False
    assert ledger.totals().overall.reserved_microusd == 2 * WORST
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie yet
    assert store.claim(KEYS[0], owner_id()) is True
    assert isinstance(store.claim(KEYS[1], owner_id()), StoredCall)
    ledger.recover(find)
    overall = ledger.totals().overall
    assert (overall.paid_calls, overall.paid_microusd, overall.prompt_tokens) == (1, 30, 70)
    assert (overall.lost_calls, overall.lost_microusd, overall.reserved_microusd) == (1, WORST, 0)
    process.communicate()


def test_processes_killed_at_any_moment_leave_sums_that_agree(tmp_path: Path) -> None:
    """Many kills in the middle of it all; then the ledger is whole, and the rest can be spent."""
    ledger = SpendLedger(tmp_path / "spend.db", CAP)
    for turn in range(4):
        (process,) = start("spend", tmp_path, (turn,))
        before = ledger.totals().overall.paid_calls
        while ledger.totals().overall.paid_calls < before + 60:
            time.sleep(0.002)
            assert process.poll() is None
        process.kill()
        process.communicate()
    ledger.close()
    ledger = SpendLedger(tmp_path / "spend.db", CAP)  # checks the file
    ledger.recover(lambda key: None)
    overall, rows = ledger.totals().overall, list(ledger.paid_rows())
    assert overall.reserved_microusd == 0 and overall.lost_calls >= 4
    assert (overall.paid_calls, overall.paid_microusd) == (len(rows), sum(r.cost for r in rows))
    assert overall.spent_microusd + WORST < CAP
    ended(start("spend", tmp_path, (9,)))
    assert CAP - WORST < ledger.totals().overall.spent_microusd <= CAP


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    {f.__name__: f for f in (make_calls, spend, hold, open_damaged)}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
