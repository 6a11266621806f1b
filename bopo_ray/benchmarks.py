"""Benchmarks by their Gymnasium id, and which of their tasks a run uses."""

from __future__ import annotations

import difflib
import importlib
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np

import envs  # noqa: F401 (registers the benchmarks)
from bopo_ray.errors import ConfigError, EngineError
from bopo_ray.executors.demos import EXPERTS
from bopo_ray.models.embedded import EmbeddedModel
from bopo_ray.models.protocol import ModelPool
from bopo_ray.records import spawn_seed
from envs.base import Split, Task, TextEnv

__all__ = ["check_ready", "env_class", "env_label", "fair_tasks", "select_tasks", "task_list"]


def env_class(env_id: str) -> type[TextEnv]:
    """The class behind an id ("ScienceWorld-v0", or "package.module:Name-v0" for one's own).

    Raises ConfigError for an unknown id or a class without task lists.
    """
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            _import(module, env_id)
        entry = gym.spec(name).entry_point
        if isinstance(entry, str):
            path, _, attribute = entry.partition(":")
            entry = getattr(_import(path, env_id), attribute)
    except ConfigError:
        raise
    except (gym.error.Error, ImportError, AttributeError, TypeError) as error:
        own = sorted(k for k, s in gym.registry.items() if str(s.entry_point).startswith("envs."))
        close = difflib.get_close_matches(name, list(gym.registry), 1)
        meant = f"; did you mean {env_id.removesuffix(name)}{close[0]}?" if close else ""
        why = meant if isinstance(error, gym.error.Error) else f" ({error})"
        raise ConfigError(
            f"unknown environment {env_id!r}{why}; known: {', '.join(own)}, or your own as package.module:Name-v0; set "
            "it with --env"
        ) from error
    if not hasattr(entry, "tasks"):
        raise ConfigError(f"environment {env_id!r} has no task lists; see envs/base.py for what an environment needs")
    return entry  # type: ignore[return-value]


def _import(module: str, env_id: str) -> ModuleType:
    """The module; raises ImportError where there is none of that name, ConfigError in one line where it is faulty."""
    if module.startswith("."):
        raise ImportError(f"{module} is relative")
    try:
        return importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"environment {env_id!r}: its module {module} can't be imported: {_own_error(error)}"
        ) from error


def _own_error(error: Exception) -> str:
    """An error of the user's code in one line: its type, what it says, and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, SyntaxError) else f" ({Path(frame.filename).name}, line {frame.lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def task_list(env_id: str, split: Split) -> tuple[Task, ...]:
    """All tasks of a split; raises ConfigError in one line where the class fails to list them."""
    listing = env_class(env_id).tasks
    try:
        return tuple(listing(split))
    except (ConfigError, EngineError):
        raise
    except Exception as error:
        raise ConfigError(
            f"environment {env_id!r}: its tasks({str(split)!r}) fails: {_own_error(error)}; see envs/base.py for "
            "what it must return"
        ) from error


def check_ready(env_id: str) -> None:
    """Raises ConfigError when what the environment needs is not installed, for a class that can tell."""
    ready = getattr(env_class(env_id), "ready", None)
    if ready is not None:
        ready()


def env_label(env_id: str) -> str:
    """The id, and in brackets what the class says about its tasks, e.g. that they are not the published ones."""
    label = getattr(env_class(env_id), "label", None)
    return f"{env_id} ({label()})" if label else env_id


def fair_tasks(env_id: str, pool: ModelPool) -> Callable[[Task], bool]:
    """Which tasks are a fair question for the pool: all; or, where models of it were trained by this project, those of
    kinds that they were shown, less those that they were shown themselves.

    Raises ConfigError for models that were trained for another environment.
    """
    trained = [m for m in pool.models if isinstance(m, EmbeddedModel)]
    for model in trained:
        if model.env != env_id:
            raise ConfigError(
                f"model {model.name!r} was trained for {model.env}, not for {env_id}; choose another with --models, or "
                f"play {model.env}"
            )
    if not trained:
        return lambda task: True
    kinds = frozenset.intersection(*(m.kinds for m in trained))
    if env_id not in EXPERTS:  # an environment of the user's, whose lists the models' maker chose from
        return lambda task: task.kind in kinds
    shown = importlib.import_module(EXPERTS[env_id]).shown
    return lambda task: task.kind in kinds and not shown(task.name)


def select_tasks(
    env_id: str, split: Split, count: int, seed: int, fair: Callable[[Task], bool] = lambda task: True,
    without: Collection[str] = (),
) -> tuple[Task, ...]:  # fmt: skip
    """`count` tasks of a split, spread evenly over the kinds: each kind in turn gives one of its own shuffled list.

    The rule looks at nothing but the names. `fair` leaves tasks out (see `fair_tasks`), as does `without`, by name: the
    next ones of their kinds take their places, and all others stay.
    Raises ConfigError when nothing is left.
    """
    tasks = tuple(t for t in task_list(env_id, split) if fair(t))
    if count < 1 or not tasks:
        raise ConfigError(f"{count} {split} tasks of {env_id} asked for, {len(tasks)} there; need at least 1")
    kinds: dict[str, list[Task]] = {}
    for task in tasks:
        kinds.setdefault(task.kind, []).append(task)
    for kind, members in kinds.items():
        order = np.random.default_rng(spawn_seed("select", seed, split, kind)).permutation(len(members))
        kinds[kind] = [members[i] for i in order if members[i].name not in without]
    there = sum(map(len, kinds.values()))
    if not there:
        raise ConfigError(f"without_tasks={','.join(without)}: no {split} task of {env_id} is left")
    chosen: list[Task] = []
    depth = 0
    while len(chosen) < min(count, there):
        chosen += [members[depth] for members in kinds.values() if depth < len(members)]
        depth += 1
    return tuple(chosen[:count])
