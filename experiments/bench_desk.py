"""Model calls per second that a call store and a ledger can look up, reserve, store and settle.

    python -m experiments.bench desk

No model takes any time here, and no call asks what another one asked: each is claimed, reserved, stored and billed.

* on the node of the files: one process with `LANES` episodes in flight; naive, one call after the other; limit, SQLite
  with the two rows that a call leaves, in transactions of as many calls as there are lanes;
* through the actor: `CLIENTS` processes as on other nodes, with as many episodes in flight together; naive, each of a
  call's questions by itself, answered with nothing; limit, what one process does on the node.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray

from bopo_ray.lanes import Lanes
from bopo_ray.models.protocol import Message, Request
from bopo_ray.rllib.open_desk import DeskConfig, node_id, open_desk, serve_desk
from experiments.bench import Row
from experiments.bench_rollouts import Slow

__all__ = ["run"]

LANES, CLIENTS = 128, 2
QUESTIONS = 4
"""That a call asks the files: a claim, a reservation, the reply, the bill."""
AT_ONCE = "0-0-0/desk"
"""A task whose models take no time, see `Clockwork`."""
TEXT = "Thought: The next one is behind this door.\nAction: open door"
"""Of about the length of theirs."""


class Client:
    """A process whose episodes make calls."""

    def __init__(self, name: str, config: DeskConfig | None = None, actor: Any = None) -> None:
        """`config`: of its desk; `actor`: who answers with nothing instead."""
        self._name, self._config, self._actor = name, config, actor
        self._made = 0

    def calls_per_second(self, lanes: int, seconds: float) -> float:
        """With so many episodes in flight, each of which makes a call when its last one has come back."""
        desk = open_desk(self._config) if self._config else None
        model, end, done = Slow("small"), time.monotonic() + seconds, [0] * lanes

        def episode(i: int) -> None:
            while time.monotonic() < end:
                if desk is None:
                    for _ in range(QUESTIONS):
                        ray.get(self._actor.nothing.remote())
                else:
                    self._made += 1
                    text = f"{self._name} {self._made}"
                    request = Request((Message("user", text),), sample=0, temperature=0.7, max_tokens=64, task=AT_ONCE)
                    desk.call(model, request, 1_000)
                done[i] += 1

        start = time.monotonic()
        if desk is None or lanes == 1:
            threads = [threading.Thread(target=episode, args=(i,)) for i in range(lanes)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            # On the files' node nothing is waited for; elsewhere, the actor's answer.
            turns = Lanes(0 if self._config and not self._config.actor else lanes)
            for i in range(lanes):
                turns.start(lambda i=i: episode(i))  # type: ignore[misc]
            turns.close(2 * seconds + 60)
        return sum(done) / (time.monotonic() - start)


class Nobody:
    """Answers with nothing."""

    def nothing(self) -> None:
        pass


def run(seconds: float = 20.0) -> Sequence[Row]:
    """Measures each way for a fifth of `seconds`."""
    span = seconds / 5
    mine = not ray.is_initialized()
    if mine:
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with TemporaryDirectory() as folder:
            here = _on_the_node(Path(folder), span)
            return [here, _through_the_actor(Path(folder), span, here.ours)]
    finally:
        if mine:
            ray.shutdown()


def _on_the_node(folder: Path, span: float) -> Row:
    client = Client("own", _files(folder / "own"))
    ours, naive = client.calls_per_second(LANES, span), client.calls_per_second(1, span)
    return Row(f"on the node, {LANES} in flight", "calls/s", ours, naive, _sqlite(folder / "bare.db", span))


def _through_the_actor(folder: Path, span: float, limit: float) -> Row:
    config = replace(_files(folder / "served"), node=node_id(), actor="bench-desk")
    keep = serve_desk(config), ray.remote(Nobody).options(num_cpus=0, max_concurrency=64).remote()
    elsewhere = replace(config, node="another")
    asking, idle = (
        [ray.remote(Client).remote(f"{what} {i}", *args) for i in range(CLIENTS)]
        for what, args in (("served", (elsewhere,)), ("nothing", (None, keep[1])))
    )
    ours, naive = (
        sum(ray.get([c.calls_per_second.remote(LANES // CLIENTS, span) for c in clients])) for clients in (asking, idle)
    )
    return Row(f"through the actor, {CLIENTS} processes, {LANES} in flight", "calls/s", ours, naive, limit)


def _files(folder: Path) -> DeskConfig:
    return DeskConfig(str(folder / "calls.db"), str(folder / "spend.db"), 10**15)


def _sqlite(file: Path, span: float) -> float:
    """Calls per second of which SQLite could keep the two rows, if nothing else were to be done."""
    c = sqlite3.connect(file, isolation_level=None)
    c.executescript(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; "
        "CREATE TABLE calls (id INTEGER PRIMARY KEY, key TEXT UNIQUE, text TEXT); "
        "CREATE TABLE paid (id INTEGER PRIMARY KEY, key TEXT, prompt INTEGER, completion INTEGER)"
    )
    start, n = time.monotonic(), 0
    while time.monotonic() < start + span:
        c.execute("BEGIN IMMEDIATE")
        for key in range(n, n + LANES):
            c.execute("INSERT INTO calls (key, text) VALUES (?, ?)", (f"{key:064x}", TEXT))
            c.execute("INSERT INTO paid (key, prompt, completion) VALUES (?, 500, 24)", (f"{key:064x}",))
        c.execute("COMMIT")
        n += LANES
    c.close()
    return n / (time.monotonic() - start)
