"""Where a process makes its model calls: the store and the ledger as files on their node, or through an actor there.

SQLite's write-ahead log works between processes of one machine, not over a network file system. So the processes on
the node where the run was started open the files themselves, which costs microseconds; those on other nodes ask an
actor on that node. A question to an actor costs half a millisecond of CPU time, so what lanes ask at the same moment
goes together.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import ActorDiedError, RayError

from bopo_ray.errors import ModelError
from bopo_ray.lanes import Lanes, aside, result, together
from bopo_ray.models.calls import CallStore
from bopo_ray.models.desk import Desk
from bopo_ray.models.pool import ACCOUNT, HUB, HUB_KEY, PoolSpec
from bopo_ray.models.spend import SpendLedger

__all__ = ["DeskConfig", "borrow_environment", "lent_environment", "node_id", "open_desk", "serve_desk"]

DEADLINE_S = 120.0
"""For the actor to answer in."""
SURE_S = 120.0
"""So long what must not be lost is told to the actor again."""
AGAIN_S = 1.0
"""Between two attempts at that."""
SURE = ("put", "settle", "lose", "release")
"""What was paid and what became of it: told twice it is as told once."""
TASKS = ("ALFWORLD_DATA", "APPWORLD_ROOT")
"""Variables that say where tasks are."""
BATCHES = 32
"""Batches of questions that a process waits for at the same time, at most."""


@dataclass(frozen=True, slots=True)
class DeskConfig:
    """Which store and ledger; with neither, calls are made and forgotten."""

    calls: str = ""
    """File of the call store."""
    spend: str = ""
    """File of the run's ledger."""
    cap_microusd: int | None = None
    """The run's limit, micro-dollars."""
    max_bytes: int = 4 << 30
    """Bound on the call store's file."""
    replay: bool = False
    """Answer from the store alone."""
    node: str = ""
    """Ray's id of the node that holds the files; empty for a run on one machine."""
    actor: str = ""
    """Name of the actor that serves them to other nodes."""


_OPENING = threading.Lock()


def open_desk(config: DeskConfig) -> Desk:
    """This process's desk, one for all its threads: each of its own would open the files once more, and hundreds that
    do not know of each other queue up before them. Raises ModelError when the actor is gone."""
    with _OPENING:
        return _open_desk(config)


@cache
def _open_desk(config: DeskConfig) -> Desk:
    if config.actor and node_id() != config.node:
        try:
            handle = ray.get_actor(config.actor)
        except ValueError:
            raise ModelError(f"the call store's actor {config.actor} is gone") from None
        line = _Line(handle)
        return Desk(_Remote(line, "calls"), _Remote(line, "spend") if config.spend else None, replay=config.replay)
    calls = CallStore(Path(config.calls), config.max_bytes) if config.calls else None
    spend = SpendLedger(Path(config.spend), config.cap_microusd) if config.spend else None
    return Desk(calls, spend, replay=config.replay)


def node_id() -> str:
    """Ray's id of this node; empty where Ray is not running."""
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


def lent_environment(pool: PoolSpec) -> dict[str, str]:
    """What a run's processes on a cluster take over from the one that starts it, as far as it is set there: the keys of
    `pool`, what models of the Hub are found by, and which tasks are played. Ray starts its workers with the environment
    of its own nodes."""
    names = {m.key_variable for m in pool.models if m.provider == "openai" and m.key_variable} | {*ACCOUNT.values()}
    paths = {name: os.path.abspath(os.environ[name]) for name in TASKS if os.environ.get(name)}
    names |= {*HUB, HUB_KEY, "APPWORLD_TEST_SET"}
    own = {name: os.environ[name] for name in sorted(names) if os.environ.get(name)}
    return own | paths


def borrow_environment(config: DeskConfig) -> None:
    """Sets here what the actor lends and this process lacks. Through it rather than by a `runtime_env`, which Ray's
    dashboard shows. Raises ModelError when the actor is gone."""
    if not config.actor:
        return
    try:
        lent: dict[str, str] = ray.get(ray.get_actor(config.actor).environment.remote(), timeout=DEADLINE_S)
    except (ValueError, RayError, TimeoutError) as error:
        raise ModelError(f"the call store's actor {config.actor} does not answer ({type(error).__name__})") from None
    for name, value in lent.items():
        os.environ.setdefault(name, value)


class _Question(NamedTuple):
    """A call of a method of the store or of the ledger."""

    part: str
    """"calls" or "spend"."""
    method: str
    args: tuple[Any, ...]


class _Served:
    """The actor: owns the two files for those that can't open them."""

    def __init__(self, config: DeskConfig, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self.calls = CallStore(Path(config.calls), config.max_bytes)
        self.spend = SpendLedger(Path(config.spend), config.cap_microusd)
        self.lanes = Lanes(workers=0)
        """What is asked at the same moment shares a transaction."""

    def environment(self) -> dict[str, str]:
        """What it lends."""
        return self._environment

    def ask(self, questions: Sequence[_Question]) -> list[Any]:
        """What came of each: its answer, or the exception that it raised."""
        asked = [self.lanes.submit(lambda q=q: getattr(getattr(self, q.part), q.method)(*q.args)) for q in questions]
        return [future.exception() or future.result() for future in asked]


def serve_desk(config: DeskConfig, environment: Mapping[str, str] | None = None) -> Any:
    """Starts the actor called `config.actor` on this node; it ends with the job, and with the handle returned here.

    It lends `environment`, see `borrow_environment`.
    """
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(config.node, soft=False)
    return (
        ray.remote(_Served)
        .options(name=config.actor, num_cpus=0, max_concurrency=64, max_restarts=-1, scheduling_strategy=strategy)
        .remote(config, environment or {})
    )


class _Line:
    """The way to the actor."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._waiting = ThreadPoolExecutor(BATCHES, thread_name_prefix="desk")

    def ask(self, question: _Question) -> Any:
        """Its answer. Raises what it raised there, and ModelError where none comes."""
        batch, i = together(self._send, question)
        try:
            answer = result(batch)[i]
        except (RayError, TimeoutError) as error:
            raise ModelError(f"the call store's actor does not answer ({type(error).__name__})") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _send(self, questions: Sequence[_Question]) -> list[tuple[Future[list[Any]], int]]:
        """For each question, what will be the answers to all of them, and which of these is its own."""
        batch = self._waiting.submit(ray.get, self._handle.ask.remote(list(questions)), timeout=DEADLINE_S)
        return [(batch, i) for i in range(len(questions))]


class _Remote:
    """The store or the ledger, seen from another node."""

    def __init__(self, line: _Line, part: str) -> None:
        self._line, self._part = line, part

    def __getattr__(self, method: str) -> Any:
        ask = self._surely if method in SURE else self._line.ask
        return lambda *args: ask(_Question(self._part, method, args))

    def reserve(self, *args: Any) -> int | None:
        """Under a number of its own: where the answer got lost, what was set aside is found again."""
        reservation: int | None = self._surely(_Question(self._part, "reserve", (*args, -1 - secrets.randbits(63))))
        return reservation

    def _surely(self, question: _Question) -> Any:
        """Asks again where no answer comes: because an actor is being restarted, no paid reply is thrown away, and no
        money is set aside for nothing."""
        until, told = time.monotonic() + SURE_S, False
        while True:
            try:
                return self._line.ask(question)
            except ModelError as error:
                if time.monotonic() > until or isinstance(error.__cause__, ActorDiedError):
                    raise
            except ValueError as error:
                if told and type(error) is ValueError:  # the reservation was closed, and the answer got lost
                    return True
                raise
            told = True
            aside(time.sleep, AGAIN_S)
