"""GroupEnvRunner: an RLlib EnvRunner that plays many episodes at once without lock-step.

RLlib's own runner passes no options to `reset`, so it can't be told which task to play, and steps its environments
in lock-step, so the slowest model call holds all. This one takes a list of episode specs, runs each in a lane of
its own (a thread that waits for the model and the environment), and lets the router decide for whatever lanes are
ready, in one forward pass. Episodes are handed over as they finish, and more are taken in exchange.
"""

from __future__ import annotations

import queue
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.env import INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.utils.checkpoints import Checkpointable

import envs  # noqa: F401 (registers the benchmarks)
from bopo_ray.errors import ConfigError, EngineError, ModelError
from bopo_ray.models import build_pool
from bopo_ray.models.pool import PoolSpec
from bopo_ray.models.protocol import ModelPool
from bopo_ray.recall import RecallEnv, Transcripts
from bopo_ray.records import Episode, EpisodeSpec, Step, StopReason, spawn_seed
from bopo_ray.rllib.batch import passes
from bopo_ray.rllib.encode import Reader
from bopo_ray.rllib.memory import Memory
from bopo_ray.rllib.open_desk import DeskConfig, open_desk
from bopo_ray.rllib.router_module import ROUTER_DEFAULTS
from bopo_ray.routers import LEARNED, Moment, Router, fixed_router
from bopo_ray.routers.decision import decide
from bopo_ray.routing_env import RoutingEnv
from envs.base import text_space

__all__ = ["Failure", "GroupEnvRunner", "make_routing_env"]

TRANSCRIPTS = Transcripts()
"""Of this process's episodes."""
ATTEMPTS = 3
"""So often an episode is tried when the engine or a model fails."""
HAND_IN_S = 0.05
"""So long an episode that has ended waits for others to go to the driver with, while there is more to begin with."""
PATIENCE_S = 1.0
"""After so long a runner answers its driver although nothing has ended, to be told what is new."""
PASS_TOKENS = 2048
"""Of a forward pass, padding included: more of them together no longer fit into a core's cache."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An episode that could not be played: the infrastructure's fault, never scored."""

    spec: EpisodeSpec
    reason: str


def make_routing_env(env_id: str, config: dict[str, Any]) -> RoutingEnv:
    """The routing environment over benchmark `env_id`.

    `config`: `pool` (`PoolSpec`), and optionally `env` (the benchmark's arguments), `temperature`, `desk`
    (`DeskConfig`) and `processes` (how many share the models' endpoints).
    """
    arguments = config.get("env", {})
    benchmark = gym.make(env_id, disable_env_checker=True, **arguments)
    benchmark = RecallEnv(benchmark, TRANSCRIPTS, f"{env_id} {sorted(arguments.items())}")
    desk = open_desk(config.get("desk") or DeskConfig())
    return RoutingEnv(benchmark, _pool(config), desk, temperature=config.get("temperature", 0.7))


def _pool(config: dict[str, Any]) -> ModelPool:
    if not isinstance(config.get("pool"), PoolSpec):
        raise ConfigError(f"env_config={sorted(config)}: need the models as a PoolSpec under 'pool'")
    return build_pool(config["pool"], config.get("processes", 1))


@dataclass
class _Lane:
    """One environment and the episode that it plays."""

    env: RoutingEnv | None = None
    spec: EpisodeSpec | None = None
    attempt: int = 0
    view: str = ""
    mask: tuple[bool, ...] = ()
    fixed: tuple[float, ...] = ()
    """What a router without weights says; empty for the learned one."""
    probabilities: tuple[float, ...] = ()
    router_s: float = 0.0
    first: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)


class GroupEnvRunner(EnvRunner, Checkpointable):
    """See the module's docstring. Lanes: `config.num_envs_per_env_runner`."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        torch.set_num_threads(1)
        self._lanes = [_Lane() for _ in range(self.config.num_envs_per_env_runner)]
        self._free = list(self._lanes)
        self._ready: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        self._waiting: deque[EpisodeSpec] = deque()
        self._session = ""
        """Whose episodes are being played."""
        self._threads = ThreadPoolExecutor(len(self._lanes), thread_name_prefix="lane")
        self._routers: dict[str, Router] = {}
        self._version = -1
        self._n_models = len(_pool(self.config.env_config))
        self._read = Reader.of(ROUTER_DEFAULTS | self.config.router_shape)
        self.module: Any = None
        self._memory: Memory | None = None

    # -- RLlib's contract -------------------------------------------------------------------------------------------

    def assert_healthy(self) -> None:
        assert self._threads is not None

    def make_module(self) -> None:
        spec = self.config.get_multi_rl_module_spec(spaces=self.get_spaces(), inference_only=True)
        self.module = spec.build()[DEFAULT_MODULE_ID]
        self.module.eval()

    def get_spaces(self) -> dict[str, tuple[gym.Space, gym.Space]]:
        action = gym.spaces.Discrete(self._n_models)
        ids = gym.spaces.Box(-1 if self._read.backbone else 0, np.iinfo(np.int32).max, (self._read.context,), np.int32)
        return {INPUT_ENV_SPACES: (text_space(), action), DEFAULT_MODULE_ID: (ids, action)}

    def get_metrics(self) -> Any:
        return self.metrics.reduce()

    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        return {"version": self._version}

    def set_state(self, state: dict[str, Any]) -> None:
        if COMPONENT_RL_MODULE in state:
            weights = state[COMPONENT_RL_MODULE]
            weights = ray.get(weights) if isinstance(weights, ray.ObjectRef) else weights
            self._load(weights.get(DEFAULT_MODULE_ID, weights))

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"config": self.config}

    def get_checkpointable_components(self) -> list[tuple[str, Any]]:
        return []

    def stop(self) -> None:
        for lane in self._lanes:
            if lane.env is not None:
                lane.env.close()
                lane.env = None
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- sampling ---------------------------------------------------------------------------------------------------

    def sample(
        self, specs: Sequence[EpisodeSpec] = (), weights: Any = None, version: int = 0,
        routers: Mapping[str, Router] | None = None, **_: Any,
    ) -> list[Episode | Failure]:  # fmt: skip
        """Plays `specs`; see `exchange`."""
        return list(self.stream(specs, weights, version, routers))

    def stream(
        self, specs: Sequence[EpisodeSpec], weights: Any = None, version: int = 0,
        routers: Mapping[str, Router] | None = None,
    ) -> Iterator[Episode | Failure]:  # fmt: skip
        """Plays `specs`, yielding each episode when it ends; see `exchange`."""
        session, left = uuid.uuid4().hex, len(specs)
        try:
            while left:
                for result in self.exchange(session, specs, weights, version, routers):
                    left -= 1
                    yield result
                specs = ()
        finally:
            if left and self._session == session:
                self._abandon()

    def exchange(
        self, session: str, specs: Sequence[EpisodeSpec] = (), weights: Any = None, version: int = 0,
        routers: Mapping[str, Router] | None = None,
    ) -> list[Episode | Failure]:  # fmt: skip
        """Takes more specs to play, and returns what has ended: nothing when that takes longer than `PATIENCE_S`.

        Whoever asks again and again keeps all lanes busy: they go on while nobody asks, as far as they need no
        decision. Another `session` than that of the last call abandons what that one left in the middle.

        `weights` (a module state) with `version` are the learned router's; loaded when the version is a new one.
        `routers` are those that their names alone don't make, by name.
        A result depends on its spec and the weights, not on what runs beside it (but for the last bits of the learned
        router's probabilities, which vary with the batch and can flip a choice about once in 10^8 steps).
        """
        if session != self._session:
            self._abandon()
            self._session = session
        if weights is not None and version != self._version:
            self._load(weights)
            self._version = version
        self._routers.update(routers or {})
        self._waiting.extend(specs)
        ended: list[Episode | Failure] = []
        begun = time.monotonic()
        try:
            while (self._waiting or self._busy) and (self._waiting or not ended):
                self._fill()
                until = begun + (HAND_IN_S if ended else PATIENCE_S)
                if time.monotonic() > until:
                    break
                deciding = []
                for lane in self._next(until):
                    result = self._result(lane)
                    if result is not None:
                        ended.append(result)
                        self._free.append(lane)
                    elif lane.view:
                        deciding.append(lane)
                self._fill()
                if deciding:
                    self._decide(deciding)
        except BaseException:
            self._abandon()
            raise
        return ended

    @property
    def _busy(self) -> int:
        """Lanes that play."""
        return len(self._lanes) - len(self._free)

    def _fill(self) -> None:
        while self._free and self._waiting:
            self._begin(self._free.pop(), self._waiting.popleft())

    def _abandon(self) -> None:
        """Forgets what is being played: its threads may still hold the lanes, so gives these up."""
        self._session = ""
        self._waiting.clear()
        if self._busy:
            for lane in self._lanes:
                if lane.env is not None:
                    self._threads.submit(lane.env.close)
            self._lanes = [_Lane() for _ in self._lanes]
            self._free = list(self._lanes)
            self._ready = queue.SimpleQueue()

    def _next(self, until: float) -> list[_Lane]:
        """Whatever busy lanes are ready; waits for one, or until then."""
        try:
            lanes = [self._ready.get(timeout=max(0.0, until - time.monotonic()))]
        except queue.Empty:
            return []
        while not self._ready.empty():
            lanes.append(self._ready.get())
        return lanes

    def _make_env(self, env_id: str) -> RoutingEnv:
        return make_routing_env(env_id, self.config.env_config)

    def _begin(self, lane: _Lane, spec: EpisodeSpec, attempt: int = 0) -> None:
        lane.spec, lane.attempt, lane.steps, lane.view, lane.first = spec, attempt, [], "", {}
        self._threads.submit(self._reset, lane, self._ready)

    def _reset(self, lane: _Lane, ready: queue.SimpleQueue[_Lane]) -> None:
        spec = lane.spec
        assert spec is not None
        try:
            if lane.env is None:
                lane.env = self._make_env(spec.task.env_id)
            options = {"task": spec.task.name, "sample": spec.call_sample, "budget": spec.budget}
            lane.view, info = lane.env.reset(seed=spawn_seed(spec.seed, spec.task.name) % 2**31, options=options)
            lane.first, lane.mask = info, info["action_mask"]
            self._consult(lane)
        except Exception as error:
            lane.first = {"error": error}
        ready.put(lane)

    def _step(self, lane: _Lane, choice: int, ready: queue.SimpleQueue[_Lane]) -> None:
        assert lane.env is not None
        try:
            lane.view, outcome, _, _, info = lane.env.step(choice)
            if "reply" in info:
                fields = ("model", "reply", "action", "observation", "prompt_tokens", "cached_tokens",
                          "completion_tokens", "cost_microusd", "lost_microusd", "latency_s", "question")  # fmt: skip
                own = {"probabilities": lane.probabilities, "mask": lane.mask, "router_s": lane.router_s}
                lane.steps.append(Step(**own, **{f: info[f] for f in fields}))
            lane.mask = info["action_mask"]
            if "stop" in info:
                lane.first |= {"stop": info["stop"], "outcome": outcome, "success": info["success"],
                               "score": info["score"]}  # fmt: skip
            else:
                self._consult(lane)
        except Exception as error:
            lane.first = {"error": error}
        ready.put(lane)

    def _consult(self, lane: _Lane) -> None:
        """Asks a router without weights, in the lane's thread, since it may wait for a model."""
        spec = lane.spec
        assert spec is not None
        if spec.router != LEARNED:
            assert lane.env is not None
            moment = Moment(lane.view, len(lane.steps), self._n_models, spec.task.name, spec.member, lane.env.ask)
            lane.fixed = self._router(spec.router)(moment)
            lane.mask = lane.env.mask  # a question may have left less

    def _result(self, lane: _Lane) -> Episode | Failure | None:
        """The lane's episode when it is over, None when it goes on (or starts again after a failure)."""
        spec, first = lane.spec, lane.first
        assert spec is not None
        if "error" in first:
            error = first["error"]
            if not isinstance(error, EngineError | ModelError):
                raise error
            if lane.attempt + 1 < ATTEMPTS:
                self._begin(lane, spec, lane.attempt + 1)
                return None
            return Failure(spec, f"{type(error).__name__}: {error}")
        if "stop" not in first:
            return None
        assert lane.env is not None
        return Episode(
            spec, first["task_text"], first["first_observation"], lane.env.max_steps, tuple(lane.steps),
            float(first["outcome"]), bool(first["success"]), float(first["score"]), StopReason(first["stop"]),
        )  # fmt: skip

    def _decide(self, lanes: list[_Lane]) -> None:
        learned = [lane for lane in lanes if lane.spec is not None and lane.spec.router == LEARNED]
        started = time.perf_counter()
        by_lane = dict(zip(map(id, learned), self._probabilities(learned), strict=True))
        share_s = (time.perf_counter() - started) / max(1, len(learned))
        for lane in lanes:
            assert lane.spec is not None
            p = by_lane.get(id(lane)) or lane.fixed
            draw = None if lane.spec.greedy else spawn_seed(lane.spec.stream, len(lane.steps)) / 2**63
            decision = decide(p, lane.mask, draw)
            lane.probabilities = decision.probabilities
            lane.view = ""
            lane.router_s = share_s if id(lane) in by_lane else 0.0
            self._threads.submit(self._step, lane, decision.model, self._ready)

    def _router(self, name: str) -> Router:
        if name not in self._routers:
            self._routers[name] = fixed_router(name)
        return self._routers[name]

    def _probabilities(self, lanes: list[_Lane]) -> list[tuple[float, ...]]:
        if not lanes:
            return []
        if self.module is None:
            raise ValueError("a learned router was asked for and no weights have been given: pass weights to stream()")
        read = [self._read(lane.view) for lane in lanes]
        if self._memory is not None:
            logits = self._memory.logits(read, list(map(id, lanes)))
        else:
            lengths = np.array([int((ids != self._read.padding).sum()) for ids in read])
            logits = torch.empty(len(read), self._n_models)
            with torch.inference_mode():
                for rows in passes(lengths, PASS_TOKENS):
                    ids = torch.from_numpy(np.stack([read[i] for i in rows]))
                    logits[torch.from_numpy(rows)] = self.module.policy(ids)
        return [tuple(row) for row in torch.softmax(logits, -1).double().tolist()]

    def _load(self, weights: Any) -> None:
        if self.module is None:
            self.make_module()
        self.module.set_state(weights)
        self._memory = self.module.memory()
