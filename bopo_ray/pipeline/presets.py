"""Defaults of a run by scale and by benchmark: what each changes of those of `Settings`."""

from __future__ import annotations

from typing import Any

from bopo_ray.method.synthesis import FIRST_LARGE
from bopo_ray.models.pool import EMBEDDED

__all__ = ["BENCHMARKS", "EMBEDDED_POOLS", "SCALES", "embedded_pool"]

SCALES: dict[str, dict[str, Any]] = {
    "tiny": {
        "lambdas": (0.2, 0.8), "train_tasks": 6, "test_tasks": 4, "k": 2, "strata": 3, "sft_epochs": 20,
        "sft_lr": 2e-3, "updates": 2, "tasks_per_update": 3, "group_size": 3, "eval_samples": 1,
        "lanes": 4, "max_steps": 20,
    },
    "quick": {},
    "paper": {
        "lambdas": (0.1, 0.2, 0.3, 0.5, 0.8), "train_lambdas": (), "seeds": (0, 1, 2),
        "train_tasks": 2120, "test_tasks": 200, "tasks_per_update": 32, "updates": 100, "eval_samples": 1, "lanes": 32,
    },
}  # fmt: skip
"""What each scale changes."""
_CALIBRATED: dict[str, Any] = {
    "shares": (0.08, 0.18, 0.3, 0.45, 0.62, 0.82), "share_rule": "front",
}  # fmt: skip
_SELF_TRAINED: dict[str, Any] = _CALIBRATED | {
    "models": EMBEDDED, "context": 160, "strata": 5, "schedules": FIRST_LARGE, "reliability": 0.5,
}  # fmt: skip
BENCHMARKS: dict[str, dict[str, Any]] = {
    "ScienceWorld-v0": _SELF_TRAINED | {
        "train_tasks": 48, "test_tasks": 48, "lambdas": (0.03, 0.1, 0.3, 0.5, 0.8), "train_lambdas": (0.3,),
        "updates": 8, "sharpness": 2.5,
    },
    "ALFWorld-v0": _SELF_TRAINED | {
        "max_steps": 30, "train_tasks": 180, "test_tasks": 120, "lambdas": (0.03, 0.1, 0.3, 0.8, 1.5),
        "train_lambdas": (0.3,), "updates": 24, "boundary_value": 0.01,
    },
    "AppWorld-v0": _CALIBRATED | {
        "updates": 6, "tasks_per_update": 6, "lambdas": (0.03, 0.1, 0.3, 0.8), "train_lambdas": (0.3,),
    },
}  # fmt: skip
"""What each benchmark changes: real models, where there are some; the paper's step limits, where they are not the
default; and, since all must fit into the same minutes, more of everything where the engine is fast, less where it is
slow. Dev tasks choose how much of the large model a lambda wants, and whether at most on half of a task's steps; with
real models BoSFT begins with routings that win reliably. Observations are long: with fewer tokens the router does not
see what lies on a table, and learns to play always-small. What its router reads, a value and a step, is more than it
learns from the text; on ScienceWorld it is not. Chosen on dev tasks, ALFWorld's."""


def embedded_pool(env: str) -> str:
    """The spec of the self-trained pair of an environment, whether there is one or not."""
    return f"{EMBEDDED}:{env.partition('-')[0].lower()}"


EMBEDDED_POOLS = {embedded_pool(env) for env, own in BENCHMARKS.items() if own.get("models") == EMBEDDED}
"""Those that there are."""
