"""A trained router in another program: a saved folder and what happens in an episode go in, decisions come out.

Always true here: no Ray is started; the same history, budget, mask and seed have the same decision, the one that the
run's own runners take, whatever was decided before. What a causal language model has read of an episode is kept, so
that its next step's decision reads only what is new; it moves no probability beyond rounding.
"""

from __future__ import annotations

import os
import reprlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bopo_ray.agent import Turn, budget_text, router_view
from bopo_ray.errors import ConfigError, StoreError
from bopo_ray.method.budget import affordable_mask
from bopo_ray.models.protocol import ModelPool
from bopo_ray.records import Budget, CostMode, spawn_seed
from bopo_ray.routers.decision import Decision, decide

__all__ = ["History", "RoutedEpisode", "SavedRouter", "load_router"]

EPISODES = 8
"""Episodes of which is kept what was read, the latest ones."""
PAIRS = "a pair of texts, (action, observation), for each step"


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
        if not isinstance(self.steps, Iterable):
            raise ConfigError(f"steps={reprlib.repr(self.steps)}: need {PAIRS}")
        object.__setattr__(self, "steps", tuple(map(_pair, self.steps)))

    def after(self, action: str, observation: str) -> History:
        """The history one step later. Raises ConfigError where no step is left."""
        if not self.steps_left:
            raise ConfigError(f"steps_left=0: no step is left after {len(self.steps)}; begin another episode")
        steps = (*self.steps, (action, observation))
        return History(self.task, self.first_observation, self.steps_left - 1, steps)


class SavedRouter:
    """A trained router, made by `load_router`. Its decisions may be taken in several threads at once."""

    def __init__(self, module: Any, trained: Mapping[str, Any] | None = None) -> None:
        """`module`: a RouterModule that acts; `trained`: what `router.json` says of its training, where it is there.

        Raises StoreError for a `trained` that can't be.
        """
        from bopo_ray.rllib.encode import Reader
        from bopo_ray.rllib.router_module import ROUTER_DEFAULTS

        self._module = module
        self._memory, self._lock = module.memory(EPISODES), threading.Lock()
        self._read = Reader.of(ROUTER_DEFAULTS | dict(module.model_config))
        self.n_models = int(module.action_space.n)
        """How many models it decides between; 0 is the smallest."""
        self._trained = dict(trained or {})
        self.models = _names(self._trained, self.n_models)
        """Their names, smallest first."""
        self.max_steps: int | None = _number(self._trained, "max_steps")
        """Steps of an episode that it was trained for; None: `router.json` does not say."""
        self.call_limit: int | None = _number(self._trained.get("how"), "call_limit")
        """Large calls of a task that it was evaluated with; None: no limit."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles, e.g. for an actor of one's own, without what it has read."""
        return SavedRouter, (self._module, self._trained)

    def begin(
        self, task: str, first_observation: str, *, max_steps: int | None = None, calls: int | None = None,
        seed: int | None = None,
    ) -> RoutedEpisode:  # fmt: skip
        """An episode in which it decides as a run does that evaluates it.

        Args:
            task: what the agent was asked to do: the very text that the environment gives as `task_text`.
            first_observation: what the environment said before the first step.
            max_steps: steps that may be taken; by default those that it was trained for, another number is news to it.
            calls: a cap of one's own on the large calls; where the router has a `call_limit`, the lesser holds.
            seed: None takes the most probable models; a number samples, as a run with `--decide sample` does: give each
                episode another.

        Raises:
            ConfigError: a value that can't be, or no `max_steps` where the folder does not say.
        """
        steps = self.max_steps if max_steps is None else max_steps
        if steps is None:
            raise ConfigError("max_steps=None: the router's folder does not say for how many steps it was trained")
        if calls is not None and not _whole(calls):
            raise ConfigError(f"calls={reprlib.repr(calls)}: need a whole number of large calls, or None for no cap")
        limits = [n for n in (calls, self.call_limit) if n is not None]
        budget = Budget(CostMode.CALLS, min(limits)) if limits else None
        return RoutedEpisode(self, History(task, first_observation, steps), budget, seed)

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
        flags: Any = (True,) * n if mask is None else mask
        allowed = tuple(flags) if isinstance(flags, Iterable) else (flags,)
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
    module, trained = acting_module(folder), about(folder).get("trained")
    try:
        router = SavedRouter(module, trained)
    except StoreError as error:
        raise StoreError(f"{folder}/router.json says {error}") from error
    if pool is not None and len(pool) != router.n_models:
        raise StoreError(
            f"{folder} decides between {router.n_models} models, the pool has {len(pool)}: load a router of this pool, "
            "or leave out pool="
        )
    return router


class RoutedEpisode:
    """A task under way, made by `SavedRouter.begin`: counts its steps and large calls, so that each decision is the one
    that the run would have taken there. Not for several threads at once."""

    def __init__(self, router: SavedRouter, history: History, budget: Budget | None, seed: int | None) -> None:
        self.history = history
        """What has happened."""
        self.budget = budget
        """What is left of the large calls; None for no limit."""
        self._router, self._seed = router, seed
        self._model: int | None = None
        """That was chosen for the next action."""

    @property
    def steps_left(self) -> int:
        """Steps that may still be taken."""
        return self.history.steps_left

    def decide(self, mask: Sequence[bool] | None = None) -> Decision:
        """Which model writes the next action; `mask` and errors as in `SavedRouter.decide`."""
        decision = self._router.decide(self.history, self.budget, mask=mask, seed=self._seed)
        self._model = decision.model
        return decision

    def after(self, action: str, observation: str, model: int | None = None) -> None:
        """Says what came of the step; its call counts, also where the reply held no action ("").

        Args:
            action: what was done.
            observation: what the environment said.
            model: which one wrote it, where it was not the one that was decided.

        Raises:
            ConfigError: nothing was decided and no `model` named, there is no such model, or no step or call is left.
        """
        wrote = self._model if model is None else model
        if wrote is None or not (_whole(wrote) and wrote < self._router.n_models):
            need = f"need one of 0 to {self._router.n_models - 1}, or decide() before"
            raise ConfigError(f"model={reprlib.repr(wrote)}: {need}")
        budget = self.budget
        if budget is not None and wrote > 0:
            if not budget.cap:
                raise ConfigError(f"model={wrote}: no large call is left in this episode; 0 was to be called")
            budget = replace(budget, cap=budget.cap - 1)
        self.history = self.history.after(action, observation)
        self.budget, self._model = budget, None


def _number(known: Any, name: str) -> int | None:
    """What `router.json`, which may come from elsewhere, says under this name."""
    value = known.get(name) if isinstance(known, Mapping) else None
    if value is not None and not _whole(value):
        raise StoreError(f"{name}={reprlib.repr(value)}: need a whole number, or none")
    return value


def _names(known: Mapping[str, Any], n: int) -> tuple[str, ...]:
    """The models' names; their numbers where `router.json` does not say."""
    models = known.get("models")
    if models is None:
        return tuple(map(str, range(n)))
    if not isinstance(models, list) or len(models) != n or not all(isinstance(m, Mapping) for m in models):
        raise StoreError(f"models={reprlib.repr(models)}: need {n}, each with its name")
    return tuple(str(m.get("name", i)) for i, m in enumerate(models))


def _is_budget(value: object) -> bool:
    return isinstance(value, Budget) and value.mode in tuple(CostMode) and _whole(value.cap)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _pair(step: object) -> tuple[str, str]:
    if not isinstance(step, tuple | list) or len(step) != 2 or not all(isinstance(text, str) for text in step):
        raise ConfigError(f"steps hold {reprlib.repr(step)}: need {PAIRS}")
    return step[0], step[1]
