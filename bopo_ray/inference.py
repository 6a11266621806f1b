"""A trained router in another program: a saved folder, a history and a budget go in, a decision comes out.

Always true here: no Ray is started; the same history, budget, mask and seed have the same decision, the one that the
run's own runners take, whatever was decided before. What a causal language model has read of an episode is kept, so
that its next step's decision reads only what is new; it moves no probability beyond rounding.
"""

from __future__ import annotations

import os
import reprlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bopo_ray.agent import Turn, budget_text, router_view
from bopo_ray.errors import ConfigError, StoreError
from bopo_ray.method.budget import affordable_mask
from bopo_ray.models.protocol import ModelPool
from bopo_ray.records import Budget, CostMode, spawn_seed
from bopo_ray.routers.decision import Decision, decide

__all__ = ["History", "SavedRouter", "load_router"]

EPISODES = 8
"""Episodes of which is kept what was read, the latest ones."""


@dataclass(frozen=True, slots=True)
class History:
    """What has happened in an episode so far; raises ConfigError for values of another kind."""

    task: str
    """What the agent was asked to do."""
    first_observation: str
    """What the environment said before the first step."""
    steps_left: int
    """Steps that may still be taken, the next one included."""
    steps: Sequence[tuple[str, str]] = ()
    """(action, observation) of each step so far, oldest first; the action is empty where a model gave none."""

    def __post_init__(self) -> None:
        for name in ("task", "first_observation"):
            if not isinstance(value := getattr(self, name), str):
                raise ConfigError(f"{name}={reprlib.repr(value)}: need a text")
        if not _whole(self.steps_left):
            raise ConfigError(f"steps_left={reprlib.repr(self.steps_left)}: need a whole number of steps, at least 0")
        object.__setattr__(self, "steps", tuple(map(_pair, self.steps)))

    def after(self, action: str, observation: str) -> History:
        """The history one step later."""
        steps = (*self.steps, (action, observation))
        return History(self.task, self.first_observation, self.steps_left - 1, steps)


class SavedRouter:
    """A trained router, made by `load_router`. Its decisions may be taken in several threads at once."""

    def __init__(self, module: Any, call_limit: int | None = None) -> None:
        """`module`: a RouterModule that acts; `call_limit`: see there."""
        from bopo_ray.rllib.encode import Reader
        from bopo_ray.rllib.router_module import ROUTER_DEFAULTS

        self._module = module
        self._memory, self._lock = module.memory(EPISODES), threading.Lock()
        self._read = Reader.of(ROUTER_DEFAULTS | dict(module.model_config))
        self.n_models = int(module.action_space.n)
        """How many models it decides between; 0 is the smallest."""
        self.call_limit = call_limit
        """Large calls of a task that it was evaluated with: what it is given as a budget at a task's first step, and
        what is left of that later. None: no limit."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles, e.g. for an actor of one's own, without what it has read."""
        return SavedRouter, (self._module, self.call_limit)

    def decide(
        self,
        history: History,
        budget: Budget | None = None,
        *,
        mask: Sequence[bool] | None = None,
        seed: int | None = None,
    ) -> Decision:
        """Which model writes the next action.

        Args:
            history: the episode so far.
            budget: what is left of a hard budget, `cap` large calls or micro-dollars; None for no limit. Without a
                large call left the smallest model is chosen. What a call may cost in dollars only the caller knows:
                `bopo_ray.method.budget.affordable_mask` makes the mask of it.
            mask: one flag per model, False = may not be chosen; all may by default.
            seed: None takes the most probable model; a number samples, at each step of the episode anew.

        Raises:
            ConfigError: a value that can't be, or a mask and budget that leave no model.
        """
        if not isinstance(history, History):
            raise ConfigError(f"history={reprlib.repr(history)}: need a History(task, first_observation, ...)")
        if budget is not None and not _is_budget(budget):
            raise ConfigError(
                f"budget={reprlib.repr(budget)}: need None, or what is left as a Budget(CostMode.CALLS or "
                "CostMode.USD, a whole number >= 0)"
            )
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer)):
            raise ConfigError(f"seed={reprlib.repr(seed)}: need a whole number to sample, or None for the best model")
        allowed = self._allowed(budget, mask)
        draw = None if seed is None else spawn_seed(int(seed), len(history.steps)) / 2**63
        turns = [Turn("", action, observation) for action, observation in history.steps]
        view = router_view(
            history.task, history.first_observation, turns, history.steps_left, budget_text(budget, spent=0)
        )
        episode = history.task, history.first_observation
        return decide(self._probabilities(view, episode), allowed, draw)

    def _allowed(self, budget: Budget | None, mask: Sequence[bool] | None) -> tuple[bool, ...]:
        n = self.n_models
        allowed = (True,) * n if mask is None else tuple(mask)
        if not all(isinstance(flag, bool | np.bool_) for flag in allowed):
            raise ConfigError(f"mask={reprlib.repr(mask)}: need True or False for each model, smallest first")
        if len(allowed) != n:
            raise ConfigError(
                f"mask={reprlib.repr(mask)} has {len(allowed)} flags: need {n}, one for each model that this router "
                "decides between, smallest first"
            )
        if budget is not None and budget.mode is CostMode.CALLS:
            payable = affordable_mask(budget.mode, budget.cap, [0] * n)
            allowed = tuple(a and p for a, p in zip(allowed, payable, strict=True))
        if not any(allowed):
            raise ConfigError(
                f"mask={reprlib.repr(mask)} and budget={budget_text(budget, 0)} leave no model: allow one of the {n}, "
                "or end the episode here"
            )
        return allowed

    def _probabilities(self, view: str, episode: tuple[str, str]) -> tuple[float, ...]:
        import torch
        from ray.rllib.core.columns import Columns

        ids = self._read(view)
        with torch.inference_mode():
            if self._memory is not None:
                with self._lock:
                    logits = self._memory.logits([ids], [episode])
            else:
                batch = {Columns.OBS: torch.from_numpy(ids[None])}
                logits = self._module.forward_inference(batch)[Columns.ACTION_DIST_INPUTS]
        return tuple(torch.softmax(logits, -1)[0].double().tolist())


def load_router(path: str | os.PathLike[str], pool: ModelPool | None = None) -> SavedRouter:
    """The router that a run saved in `path`, its `policies/NAME` folder, with the weights that the run evaluated.

    Starts no Ray. A folder from elsewhere is read as data; no code in it runs.

    Args:
        path: the folder; `router.json` in it says what the router chooses between.
        pool: the models that it is to choose between, as `bopo_ray.models.load_pool` gives them; None: not checked.

    Raises:
        StoreError: a folder that is no router's, or a damaged one, or one of other models or prices than `pool`.
    """
    from bopo_ray.rllib.saved import about, acting_module, check_pair

    folder = Path(path).expanduser()
    if pool is not None:
        names = [m.name for m in pool.models]
        check_pair(folder, names, pool.price_hash, "load a router of this pool, or leave out pool=")
    router = SavedRouter(acting_module(folder), _call_limit(folder, about(folder)))
    if pool is not None and len(pool) != router.n_models:
        raise StoreError(
            f"{folder} decides between {router.n_models} models, the pool has {len(pool)}: load a router of this pool, "
            "or leave out pool="
        )
    return router


def _call_limit(folder: Path, known: dict[str, Any]) -> int | None:
    """The limit of calls that `router.json` says; it may come from elsewhere."""
    how = known.get("trained", {}).get("how", {})
    limit = how.get("call_limit") if isinstance(how, dict) else None
    if limit is not None and not _whole(limit):
        raise StoreError(
            f"{folder}/router.json says call_limit={reprlib.repr(limit)}: need a whole number of large calls, or none"
        )
    return limit


def _is_budget(value: object) -> bool:
    return isinstance(value, Budget) and value.mode in tuple(CostMode) and _whole(value.cap)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _pair(step: object) -> tuple[str, str]:
    if not isinstance(step, tuple | list) or len(step) != 2 or not all(isinstance(text, str) for text in step):
        raise ConfigError(
            f"steps hold {reprlib.repr(step)}: need a pair of texts, (action, observation), for each step"
        )
    return step[0], step[1]
