"""What a continuation must have in common with the run in its folder: settings, models and tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bopo_ray.benchmarks import env_label
from bopo_ray.errors import StoreError
from bopo_ray.models.pool import PoolSpec
from bopo_ray.pipeline.settings import Settings
from envs.base import Task

__all__ = ["check_same", "check_same_models", "check_same_tasks", "task_lists"]

_NOT_RESULTS = {
    "cpus", "lanes", "ignore_gate", "max_spend", "calls", "router", "num_learners", "num_gpus_per_learner",
    "pass_tokens",
}  # fmt: skip
"""Fields that may differ between a run and its continuation."""
_MAY_GROW = ("lambdas", "seeds", "advantage")
"""Fields to which a continuation may add: more points of the same sweep."""
_MEANT = {"sft_lr": "bosft_lr"}
"""Fields whose default is another field's to say: what they mean counts, not how it was written."""


def check_same(old: Settings, new: Settings, path: Path) -> None:
    """Raises StoreError when a continuation would mix two settings in one folder.

    It may add lambdas, seeds and advantages to a sweep: what they share with the others is there already.
    """
    for f in fields(Settings):
        name = _MEANT.get(f.name, f.name)
        a, b = getattr(old, name), getattr(new, name)
        if f.name in _MAY_GROW and set(a) <= set(b):
            continue
        if a != b and f.name not in _NOT_RESULTS:
            raise StoreError(
                f"{path.parent} holds a run with {f.name}={a!r}, this one has {b!r}; "
                "give the same settings to continue it, or choose another --out"
            )


def check_same_models(old: PoolSpec, new: PoolSpec, out: Path) -> None:
    """Raises StoreError when a continuation would mix two pools in one folder; limits and key variables may differ."""
    for a, b in zip(old.models, new.models, strict=False):
        for field in ("model", "label", "base_url", "extra_body", "query", "temperature", "max_completion_tokens",
                      "max_prompt_tokens", "price"):  # fmt: skip
            if getattr(a, field) != getattr(b, field):
                raise StoreError(
                    f"{out} holds a run whose model {a.label} has {field}={getattr(a, field)!r}, now it is "
                    f"{getattr(b, field)!r}; restore it to continue, or choose another --out"
                )
    if len(old.models) != len(new.models):
        raise StoreError(
            f"{out} holds a run of {len(old.models)} models, now there are {len(new.models)}; choose another --out"
        )


def task_lists(env_id: str, train: Sequence[Task], test: Sequence[Task]) -> dict[str, Any]:
    """Which tasks a run is about, as its folder keeps them."""
    return {"source": env_label(env_id), "train": [t.name for t in train], "test": [t.name for t in test]}


def check_same_tasks(path: Path, new: dict[str, Any]) -> None:
    """Raises StoreError when a continuation would mix tasks of two sources: what names them (ALFWORLD_DATA,
    APPWORLD_ROOT) is no setting, and with the same settings chooses others. The file is missing in older folders."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        only_one_has = sorted({*old["train"], *old["test"]} ^ {*new["train"], *new["test"]})
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} can't be read ({type(error).__name__}: {error}); choose another --out") from error
    if old != new:
        odd = f"; {only_one_has[0]!r} is a task of one of them" if only_one_has else ""
        raise StoreError(
            f"{path.parent} holds a run on tasks of {old.get('source')}, these are of {new['source']}{odd}; set what "
            "names them, such as ALFWORLD_DATA, as it was, or choose another --out"
        )
