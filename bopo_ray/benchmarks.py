"""Benchmarks by their Gymnasium id, and which of their tasks a run uses."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import gymnasium as gym
import numpy as np

import envs  # noqa: F401 (registers the benchmarks)
from bopo_ray.errors import ConfigError
from bopo_ray.executors.demos import EXPERTS
from bopo_ray.models.embedded import EmbeddedModel
from bopo_ray.models.protocol import ModelPool
from bopo_ray.records import spawn_seed
from envs.base import Split, Task, TextEnv

__all__ = ["check_ready", "env_class", "env_label", "fair_tasks", "select_tasks"]


def env_class(env_id: str) -> type[TextEnv]:
    """The class behind an id ("ScienceWorld-v0", or "package.module:Name-v0" for one's own).

    Raises ConfigError for an unknown id or a class without task lists.
    """
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        entry = gym.spec(name).entry_point
        if isinstance(entry, str):
            path, _, attribute = entry.partition(":")
            entry = getattr(importlib.import_module(path), attribute)
    except (gym.error.Error, ImportError, AttributeError, TypeError) as error:
        own = sorted(k for k, s in gym.registry.items() if str(s.entry_point).startswith("envs."))
        raise ConfigError(
            f"unknown environment {env_id!r} ({error}); known: {', '.join(own)}, or your own as package.module:Name-v0"
        ) from error
    if not hasattr(entry, "tasks"):
        raise ConfigError(f"environment {env_id!r} has no task lists; see envs/base.py for what an environment needs")
    return entry  # type: ignore[return-value]


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
    env_id: str, split: Split, count: int, seed: int, names: tuple[str, ...] = (),
    fair: Callable[[Task], bool] = lambda task: True,
) -> tuple[Task, ...]:  # fmt: skip
    """`count` tasks of a split, spread evenly over the kinds: each kind in turn gives one of its own shuffled list.

    The rule looks at nothing but the names. `names` picks by name instead; `fair` leaves tasks out (see `fair_tasks`).
    Raises ConfigError when nothing is left.
    """
    tasks = tuple(t for t in env_class(env_id).tasks(split) if fair(t))
    if names:
        by_name = {t.name: t for t in tasks}
        unknown = [n for n in names if n not in by_name]
        if unknown:
            raise ConfigError(f"unknown {split} task {unknown[0]!r} of {env_id}; for example {tasks[0].name!r}")
        return tuple(by_name[n] for n in names)
    if count < 1 or not tasks:
        raise ConfigError(f"{count} {split} tasks of {env_id} asked for, {len(tasks)} there; need at least 1")
    kinds: dict[str, list[Task]] = {}
    for task in tasks:
        kinds.setdefault(task.kind, []).append(task)
    for kind, members in kinds.items():
        order = np.random.default_rng(spawn_seed("select", seed, split, kind)).permutation(len(members))
        kinds[kind] = [members[i] for i in order]
    chosen: list[Task] = []
    depth = 0
    while len(chosen) < min(count, len(tasks)):
        chosen += [members[depth] for members in kinds.values() if depth < len(members)]
        depth += 1
    return tuple(chosen[:count])
