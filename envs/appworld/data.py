"""Which tasks there are: AppWorld's own, where APPWORLD_ROOT names them, or else ours on its engine.

A task's name is "<generator>/<number>": "82e2fac/1" is AppWorld's 82e2fac_1, "pay-contact/3" one of ours. Our world is
built once for each version of its sources and kept in the cache folder; nothing of it is shipped, since the API
documents and databases in it come from AppWorld's protected part.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from envs.appworld import client
from envs.appworld.engine import kinds
from envs.base import Split, Task
from envs.cache import cache_folder
from envs.errors import ConfigError, EngineError, UnknownTaskError

__all__ = [
    "ENV_ID",
    "OFFICIAL",
    "OWN",
    "data_folder",
    "expert_plan",
    "generate",
    "own_tasks",
    "task_id",
    "tasks",
    "world",
]

ENV_ID = "AppWorld-v0"
OFFICIAL, OWN = "AppWorld", "AppWorld engine, own tasks"
"""How results are labelled."""
SEED = 0
"""Of our own world."""
VERIFIED = "b5603401675f512c1563ff5dab7e5db01af17cf33032dbe86ccc039edfccfcd6"
"""Fingerprint of the world of that seed in which `verify` has played every task: the same world needs it no more."""
DB_VERSION = "0.1.0"
"""Of the data that the engine's version reads."""
TEST_SETS = ("test_normal", "test_challenge")


def world() -> str:
    """How results on the present tasks are labelled."""
    return OFFICIAL if os.environ.get("APPWORLD_ROOT") else OWN


def tasks(split: Split) -> tuple[Task, ...]:
    """The tasks of a split; TEST is test_normal, or test_challenge where APPWORLD_TEST_SET says so."""
    test = os.environ.get("APPWORLD_TEST_SET") or TEST_SETS[0]
    if test not in TEST_SETS:
        raise ConfigError(f"APPWORLD_TEST_SET is {test!r}: it may be {' or '.join(TEST_SETS)}")
    if root := os.environ.get("APPWORLD_ROOT"):
        return _official(Path(root), test if split is Split.TEST else split.value, split)
    return own_tasks(split)


@functools.cache
def own_tasks(split: Split) -> tuple[Task, ...]:
    """Our own tasks of a split, whether or not they have been built."""
    counts = list(kinds.COUNTS.values())
    at = list(Split).index(split)
    numbers = range(1 + sum(counts[:at]), 1 + sum(counts[: at + 1]))
    return tuple(Task(ENV_ID, f"{kind}/{number}", split) for kind in kinds.KINDS for number in numbers)


@functools.cache
def _official(root: Path, name: str, split: Split) -> tuple[Task, ...]:
    data = _checked(root)
    if not (file := data / "datasets" / f"{name}.txt").exists():
        raise ConfigError(f"APPWORLD_ROOT ({root}) has no task list {file}: download the data again")
    ids = [line.partition(":")[0].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if missing := [i for i in ids if not (data / "tasks" / i / "dbs").is_dir()]:
        raise ConfigError(
            f"APPWORLD_ROOT ({root}) holds {len(ids) - len(missing)} of the {len(ids)} tasks of {name}; {missing[0]}, "
            "for example, is missing: run `appworld download data` there again"
        )
    specs = json.loads((data / "tasks" / ids[0] / "specs.json").read_text(encoding="utf-8")) if ids else {}
    if ids and specs.get("db_version") != DB_VERSION:
        raise ConfigError(
            f"APPWORLD_ROOT ({root}) holds data of version {specs.get('db_version')}, and appworld {client.VERSION} "
            f"reads {DB_VERSION}: run `appworld download data` there again"
        )
    return tuple(Task(ENV_ID, i.replace("_", "/"), split) for i in ids)


def _checked(root: Path) -> Path:
    data = root / "data"
    if not data.is_dir():
        raise ConfigError(
            f"APPWORLD_ROOT is {root}, and there is no folder {data}: run `appworld download data` in {root}, or unset "
            "APPWORLD_ROOT to use our own tasks"
        )
    parts = ("api_docs/standard/venmo.json", "base_dbs", "datasets", "tasks")
    if lacking := [part for part in parts if not (data / part).exists()]:
        raise ConfigError(f"APPWORLD_ROOT ({root}) has no data/{lacking[0]}: run `appworld download data` there again")
    return data


def task_id(name: object) -> str:
    """ "pay-contact/3" -> "pay-contact_3".

    Raises:
        UnknownTaskError: no such task here.
    """
    if name in _names():
        return str(name).replace("/", "_")
    example = tasks(Split.TRAIN)[0].name
    raise UnknownTaskError(
        f"{world()} has no task {name!r}: a task is '<generator>/<number>', as in {example!r} (all: AppWorldEnv.tasks)"
    )


def _names() -> frozenset[object]:
    root = os.environ.get("APPWORLD_ROOT")
    return _known(root, os.environ.get("APPWORLD_TEST_SET"))


@functools.cache
def _known(_root: str | None, _test: str | None) -> frozenset[object]:
    return frozenset(task.name for split in Split for task in tasks(split))


def data_folder() -> Path:
    """Where the data are; builds our own world where it is needed and not there."""
    if root := os.environ.get("APPWORLD_ROOT"):
        return _checked(Path(root)).resolve()
    return generate() / "data"


def expert_plan(name: str) -> tuple[str, ...]:
    """The solution of one of our own tasks, action by action; AppWorld's own tasks come with none."""
    if os.environ.get("APPWORLD_ROOT"):
        raise ConfigError(
            f"AppWorld's task {name} has no expert plan, which simulated models follow: unset APPWORLD_ROOT to use our "
            "own tasks, or name real models"
        )
    return _plan(data_folder(), task_id(name), "right")


def _plan(data: Path, task: str, which: str) -> tuple[str, ...]:
    file = data / "tasks" / task / "ground_truth" / "plan.json"
    return tuple(json.loads(file.read_text(encoding="utf-8"))[which])


@functools.cache
def _version() -> str:
    digest = hashlib.sha256(f"{client.VERSION} {SEED}".encode())
    for file in ("build.py", "check.py", "kinds.py"):
        digest.update((client.ENGINE / file).read_bytes())
    return digest.hexdigest()[:12]


def generate() -> Path:
    """Our own world's folder; built (half a minute) unless it is there. It holds verified tasks only.

    Processes that ask at once wait for the one that builds.
    """
    root = cache_folder("appworld")
    target = root / _version()
    if target.is_dir():
        return target
    client.find_python()
    if "memory" in str(root):
        raise ConfigError(f"AppWorld takes no folder with 'memory' in its name ({root}): set BOPO_RAY_CACHE to another")
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            print(f"Building AppWorld tasks of our own in {target} (once, half a minute)", file=sys.stderr)
            making = Path(tempfile.mkdtemp(prefix=".making-", dir=root))
            try:
                client.build(making / "world", SEED)
                if fingerprint(making / "world" / "data") != VERIFIED:
                    print("They differ from those that were verified, so each is played (minutes)", file=sys.stderr)
                    verify(making / "world" / "data")
                os.replace(making / "world", target)
            finally:
                shutil.rmtree(making, ignore_errors=True)
    return target


def fingerprint(data: Path) -> str:
    """SHA-256 over the tasks of a world: what they say, start from and are judged by."""
    digest = hashlib.sha256()
    for file in sorted(file for part in ("datasets", "tasks") for file in (data / part).rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(data)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def verify(data: Path, numbers: range | None = None) -> None:
    """Play each task (or only those with these numbers) on the engine, on as many processes as there are cores.

    Raises:
        EngineError: a right solution failed, or a wrong one or doing nothing succeeded.
    """
    ids = [task.name.replace("/", "_") for split in Split for task in own_tasks(split)]
    if numbers is not None:
        ids = [i for i in ids if int(i.rpartition("_")[2]) in numbers]
    with closing(client.Server(data)) as server, ThreadPoolExecutor(os.cpu_count()) as pool:
        for task, verdict in zip(ids, pool.map(lambda i: _verdict(server, data, i), ids), strict=True):
            if verdict != (False, True, False):
                raise EngineError(
                    f"our task {task} is wrong: doing nothing, the right and a wrong solution succeed {verdict}"
                )


def _verdict(server: client.Server, data: Path, task: str) -> tuple[bool, bool, bool]:
    with closing(client.Session(server, task, 60)) as session:
        nothing = session.evaluate()[0]
        right = _play(session, _plan(data, task, "right"))
    with closing(client.Session(server, task, 60)) as session:
        return nothing, right, _play(session, _plan(data, task, "wrong"))


def _play(session: client.Session, plan: tuple[str, ...]) -> bool:
    completed = [session.execute(line)[1] for line in plan]
    return completed == [False] * (len(plan) - 1) + [True] and session.evaluate()[0]
