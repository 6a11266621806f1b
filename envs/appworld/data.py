"""Which tasks there are: those of the folder that APPWORLD_ROOT names, AppWorld's or ours, or else our usual ones.

A task's name is "<generator>/<number>": "82e2fac/1" is AppWorld's 82e2fac_1, "pay-contact/3" one of ours (see `own`).
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

from envs.appworld import client, own
from envs.base import Split, Task
from envs.errors import ConfigError, UnknownTaskError

__all__ = ["OFFICIAL", "OWN", "data_folder", "expert_plan", "task_id", "tasks", "world"]

OFFICIAL, OWN = "AppWorld", "AppWorld engine, own tasks"
"""How results are labelled."""
DB_VERSION = "0.1.0"
"""Of the data that the engine's version reads."""
TEST_SETS = ("test_normal", "test_challenge")


def world() -> str:
    """How results on the present tasks are labelled."""
    root = os.environ.get("APPWORLD_ROOT")
    seed = own.seed_of(Path(root)) if root else own.SEED
    return OFFICIAL if seed is None else OWN if seed == own.SEED else f"{OWN}, seed {seed}"


def tasks(split: Split) -> tuple[Task, ...]:
    """The tasks of a split; TEST is test_normal, or test_challenge where APPWORLD_TEST_SET says so."""
    test = os.environ.get("APPWORLD_TEST_SET") or TEST_SETS[0]
    if test not in TEST_SETS:
        raise ConfigError(f"APPWORLD_TEST_SET is {test!r}: it may be {' or '.join(TEST_SETS)}")
    if root := os.environ.get("APPWORLD_ROOT"):
        test = test if world() == OFFICIAL else TEST_SETS[0]  # ours have but one
        return _listed(Path(root), test if split is Split.TEST else split.value, split)
    return own.usual_tasks(split)


@functools.cache
def _listed(root: Path, name: str, split: Split) -> tuple[Task, ...]:
    data = _checked(root)
    if not (file := data / "datasets" / f"{name}.txt").exists():
        raise ConfigError(f"APPWORLD_ROOT ({root}) has no task list {file}: {_mend(root)}")
    ids = [line.partition(":")[0].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if missing := [i for i in ids if not (data / "tasks" / i / "dbs").is_dir()]:
        raise ConfigError(
            f"APPWORLD_ROOT ({root}) holds {len(ids) - len(missing)} of the {len(ids)} tasks of {name}; {missing[0]}, "
            f"for example, is missing: {_mend(root)}"
        )
    specs = json.loads((data / "tasks" / ids[0] / "specs.json").read_text(encoding="utf-8")) if ids else {}
    if ids and specs.get("db_version") != DB_VERSION:
        raise ConfigError(
            f"APPWORLD_ROOT ({root}) holds data of version {specs.get('db_version')}, and appworld {client.VERSION} "
            f"reads {DB_VERSION}: {_mend(root)}"
        )
    return tuple(Task(own.ENV_ID, i.replace("_", "/"), split) for i in ids)


def _mend(root: Path) -> str:
    return "make it anew, " + own.HOW if own.seed_of(root) is not None else "run `appworld download data` there again"


def _checked(root: Path) -> Path:
    data = root / "data"
    if not data.is_dir():
        raise ConfigError(
            f"APPWORLD_ROOT is {root}, and there is no folder {data}: run `appworld download data` in {root}, or make "
            f"tasks of our own there, {own.HOW}; or unset it to use our usual ones"
        )
    parts = ("api_docs/standard/venmo.json", "base_dbs", "datasets", "tasks")
    if lacking := [part for part in parts if not (data / part).exists()]:
        raise ConfigError(f"APPWORLD_ROOT ({root}) has no data/{lacking[0]}: {_mend(root)}")
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
    return own.usual() / "data"


def expert_plan(name: str) -> tuple[str, ...]:
    """The solution of one of our own tasks, action by action; AppWorld's own tasks come with none."""
    if world() == OFFICIAL:
        raise ConfigError(
            f"AppWorld's task {name} has no expert plan, which simulated models follow: unset APPWORLD_ROOT to use our "
            "own tasks, or name real models"
        )
    return own.plan(data_folder(), task_id(name))
