"""Budgets under load: 64 episodes at once over several processes, replies up to the worst case, and kills at the desk.

The model is the provider: it notes each answer that it would charge for before it is sent.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from bopo_ray.errors import AttemptError, ModelError, SpendLimitError
from bopo_ray.method.budget import Ledger
from bopo_ray.models.calls import CallStore, StoredCall, call_key
from bopo_ray.models.desk import Desk, RetryPolicy
from bopo_ray.models.pricing import Price, Usage
from bopo_ray.models.protocol import ModelPool, Reply, Request, Sampling
from bopo_ray.models.spend import SpendLedger
from bopo_ray.records import Budget, CostMode, StopReason
from tests.toy import PLANS, Scripted, routing_env

ROOT = Path(__file__).parents[2]
PRICES = {"small": Price(1_000_000, 500_000, 4_000_000), "large": Price(5_000_000, 2_500_000, 20_000_000)}
MAX_TOKENS = 40
KINDS = ("fetch", "measure", "mix")
CAP = 250_000
"""Micro-dollars of the run: less than its episodes want."""
LANES = 16
"""Episodes at once in a process."""


def note(folder: Path, *what: object) -> None:
    """A line that a killed process has written whole or not at all."""
    file = os.open(folder / "provider.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (" ".join(map(str, what)) + "\n").encode())
    os.close(file)


class Provider(Scripted):
    """A model that follows the toy's plan and charges anything up to the worst case. Now and then an attempt fails."""

    def __init__(self, name: str, folder: Path, seed: int, die_at: int = 0) -> None:
        super().__init__(name, PRICES[name], lambda step: "look", Sampling(max_completion_tokens=MAX_TOKENS))
        self.folder, self.die_at = folder, die_at
        self.random, self.lock = random.Random(seed), threading.Lock()

    def complete(self, request: Request) -> Reply:
        with self.lock:
            self.calls += 1
            if self.calls == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            fate, r = self.random.random(), random.Random(self.random.random())
        time.sleep(r.random() * 0.004)
        if fate < 0.06:
            if billed := fate < 0.04:
                note(self.folder, "lost", self.name, self.bound(request.messages))
            raise AttemptError("broke off", kind="cut", retry=True, billed=billed)
        prompt = self.bound(request.messages)
        usage = Usage(
            prompt, MAX_TOKENS if fate < 0.5 else r.randint(0, MAX_TOKENS), r.choice((0, r.randint(0, prompt)))
        )
        note(self.folder, "answer", call_key(self.identity, request), self.price.cost(usage))
        plan = PLANS[request.task.partition("/")[0]]
        step = (len(request.messages) - 2) // 2
        return Reply(f"Action: {plan[step] if step < len(plan) else self.reply(step)}", usage, 0.001)


class DiesAfterPut(CallStore):
    """The process ends between storing its n-th reply and billing it."""

    die_at = 0

    def put(self, key: str, call: StoredCall) -> None:
        super().put(key, call)
        self.die_at -= 1
        if self.die_at == 0:
            os.kill(os.getpid(), signal.SIGKILL)


# -- what the other processes do --------------------------------------------------------------------------------------


def play_all(folder: Path, seed: int, die_in_call: int = 0, die_after_put: int = 0) -> None:
    """Episodes in all lanes, until the run's limit is reached; prints each one's budget and what it charged."""
    calls, spend = DiesAfterPut(folder / "calls.db"), SpendLedger(folder / "spend.db", CAP)
    calls.die_at = die_after_put
    desk = Desk(calls, spend, RetryPolicy(attempts=4, first_wait_s=0.001, longest_wait_s=0.002))
    models = tuple(Provider(n, folder, seed * 7 + i, die_in_call) for i, n in enumerate(PRICES))
    pool = ModelPool(models, "stress", "", "")
    lines, mutex = list[str](), threading.Lock()

    def lane(number: int) -> None:
        r = random.Random(seed * 1000 + number)
        for _ in range(50):
            # Half of the episodes are asked for by every process, the others are its own.
            sample = r.randrange(20) if r.random() < 0.5 else 1000 * seed + r.randrange(1000)
            budget = Budget(CostMode.USD, r.choice((300, 1000, 3000, 10_000)))
            env = routing_env(pool, desk=desk)
            env.reset(options={"task": f"{r.choice(KINDS)}/{sample % 3}", "sample": sample, "budget": budget})
            charged, stop = 0, ""
            try:
                while not stop:
                    info = env.step(r.randrange(2))[4]
                    charged += info.get("cost_microusd", 0) + info.get("lost_microusd", 0)
                    stop = str(info.get("stop", ""))
            except ModelError:
                stop = "failed"
            except SpendLimitError:
                stop = "limit"
            ledger: Ledger | None = env._ledger
            assert ledger is not None and ledger.remaining == ledger.cap - ledger.spent
            with mutex:
                lines.append(json.dumps([stop, ledger.cap, ledger.spent, charged]))
            if stop == "limit":
                return

    threads = [threading.Thread(target=lane, args=(n,)) for n in range(LANES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("\n".join(lines))


def worker(folder: Path, seed: int) -> None:
    play_all(folder, seed)


def dies_in_a_call(folder: Path, seed: int) -> None:
    """Between reserving and the reply."""
    play_all(folder, seed, die_in_call=20)


def dies_after_storing(folder: Path, seed: int) -> None:
    """Between storing the reply and settling."""
    play_all(folder, seed, die_after_put=25)


# -- the test ---------------------------------------------------------------------------------------------------------


def start(role: Callable[[Path, int], None], folder: Path, seeds: Iterable[int]) -> list[subprocess.Popen[str]]:
    """Other processes of this file, ready to begin."""
    command = [sys.executable, __file__, role.__name__, str(folder)]
    return [
        subprocess.Popen(
            [*command, str(seed)], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )
        for seed in seeds
    ]  # fmt: skip


def test_no_cap_is_exceeded_by_one_micro_dollar(tmp_path: Path) -> None:
    workers = start(worker, tmp_path, range(4))
    doomed = start(dies_in_a_call, tmp_path, (10,)) + start(dies_after_storing, tmp_path, (20,))
    watcher = SpendLedger(tmp_path / "spend.db", None)
    for p in workers + doomed:
        assert p.stdin is not None and p.stdout is not None
        assert p.stdout.readline() == "ready\n"
    for p in workers + doomed:
        assert p.stdin is not None
        p.stdin.write("go\n")
        p.stdin.flush()
    most = looks = 0
    while any(p.poll() is None for p in workers):
        overall = watcher.totals().overall
        most, looks = max(most, overall.spent_microusd + overall.reserved_microusd), looks + 1
        assert most <= CAP
        time.sleep(0.01)
    said = [p.communicate(timeout=60)[0] for p in workers + doomed]
    assert [p.returncode for p in workers + doomed] == [0] * 4 + [-signal.SIGKILL] * 2
    assert looks > 10

    # Each episode's cap holds, and its budget has what its steps say; some were bound by it, and the run by its own.
    episodes = [json.loads(line) for text in said[:4] for line in text.splitlines()]
    stops = Counter(stop for stop, *_ in episodes)
    assert stops["limit"] == 4 * LANES and stops[StopReason.BUDGET] > 20 and stops[StopReason.SUCCESS] > 20
    for stop, cap, spent, charged in episodes:
        assert charged <= spent <= cap
        assert spent == charged or stop in ("failed", "limit")

    # As a run does at its end: what the dead left is paid when it is stored, else lost.
    calls, ledger = CallStore(tmp_path / "calls.db"), SpendLedger(tmp_path / "spend.db", CAP)

    def find(key: str) -> tuple[Usage, int] | None:
        call = calls.get(key)
        return (call.usage, PRICES[call.model].cost(call.usage)) if call else None

    before = ledger.totals().overall
    worst = max(price.cost(Usage(1000, MAX_TOKENS)) for price in PRICES.values())
    assert CAP - worst < before.spent_microusd + before.reserved_microusd <= CAP
    ledger.recover(find)
    overall = ledger.totals().overall
    assert overall.reserved_microusd == 0
    assert overall.paid_calls > before.paid_calls, "nobody died after storing: nothing was tested"
    assert overall.spent_microusd < before.spent_microusd + before.reserved_microusd

    # No call is paid twice, each stored one is paid, and the provider never charged more than was counted.
    with closing(sqlite3.connect(tmp_path / "spend.db")) as c:
        paid = dict(c.execute("SELECT key, cost FROM paid").fetchall())
        (rows,) = c.execute("SELECT count(*) FROM paid").fetchone()
    with closing(sqlite3.connect(tmp_path / "calls.db")) as c:
        stored = {key for (key,) in c.execute("SELECT key FROM calls")}
    assert rows == len(paid) == overall.paid_calls > 200
    assert set(paid) == stored
    assert overall.saved_calls > 50 and overall.paid_microusd == sum(paid.values())
    log = [line.split() for line in (tmp_path / "provider.log").read_text().splitlines()]
    answers = [(key, int(cost)) for kind, key, cost in log if kind == "answer"]
    lost = [PRICES[name].cost(Usage(int(prompt), MAX_TOKENS)) for kind, name, prompt in log if kind == "lost"]
    assert sum(cost for _, cost in answers) + sum(lost) <= overall.spent_microusd
    of_the_dead = overall.lost_calls - len(lost)
    assert 1 <= of_the_dead <= 2 * LANES
    assert len(answers) - len(paid) <= of_the_dead
    assert all(cost in {c for k, c in answers if k == key} for key, cost in paid.items())


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    {f.__name__: f for f in (worker, dies_in_a_call, dies_after_storing)}[sys.argv[1]](
        Path(sys.argv[2]), int(sys.argv[3])
    )
