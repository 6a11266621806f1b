"""GroupEnvRunner: an RLlib EnvRunner that plays many episodes at once without lock-step.

RLlib's own runner passes no options to `reset`, so it can't be told which task to play, and steps its environments
in lock-step, so the slowest model call holds all. This one takes a list of episode specs, runs each in a lane of
its own (see `bopo_ray.lanes`), and lets the router decide for whatever lanes are ready, in one forward pass. Episodes
are handed over as they finish, and more are taken in exchange.
"""

from __future__ import annotations

import gc
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
from bopo_ray.lanes import Lanes, aside, together
from bopo_ray.models import build_pool
from bopo_ray.models.pool import PoolSpec
from bopo_ray.models.protocol import ModelPool
from bopo_ray.recall import RecallEnv, Transcripts
from bopo_ray.records import Episode, EpisodeSpec, Step, StopReason, spawn_seed
from bopo_ray.rllib.batch import passes
from bopo_ray.rllib.encode import Reader
from bopo_ray.rllib.open_desk import DeskConfig, borrow_environment, open_desk
from bopo_ray.rllib.router_module import ROUTER_DEFAULTS
from bopo_ray.routers import LEARNED, Moment, Router, fixed_router
from bopo_ray.routers.decision import decide
from bopo_ray.routing_env import RoutingEnv, Tab
from envs.base import text_space

if TYPE_CHECKING:
    from bopo_ray.rllib.memory import Memory

__all__ = ["Failure", "GroupEnvRunner", "make_routing_env"]

TRANSCRIPTS = Transcripts()
"""Of this process's episodes."""
ATTEMPTS = 3
"""So often an episode is tried when the engine or a model fails."""
HAND_IN_S = 0.15
"""So long an episode that has ended waits for others to go to the driver with, while there is more to begin with."""
PATIENCE_S = 1.0
"""After so long a runner answers its driver although nothing has ended, to be told what is new."""
GARBAGE = 100_000
"""New objects between two searches for garbage, which hundreds of lanes would otherwise cause all the time: they took a
tenth of a step's CPU time."""
GRACE_S = 5.0
"""So long a runner that is stopped waits for the calls of its lanes."""
DECISIONS = 16
"""At most so many at a time, and fewer where there are few lanes: more of them together are hardly cheaper, and those
that wait for them call no model."""
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
    if not getattr(benchmark.unwrapped, "instant", False):  # to remember would cost more than to ask again
        benchmark = RecallEnv(benchmark, TRANSCRIPTS, f"{env_id} {sorted(arguments.items())}")
    desk = open_desk(config.get("desk") or DeskConfig())
    return RoutingEnv(benchmark, _pool(config), desk, temperature=config.get("temperature", 0.7))


def _pool(config: dict[str, Any]) -> ModelPool:
    if not isinstance(config.get("pool"), PoolSpec):
        raise ConfigError(f"env_config={sorted(config)}: need the models as a PoolSpec under 'pool'")
    return build_pool(config["pool"], config.get("processes", 1))


@dataclass
class _Session:
    """Episodes that were asked for together."""

    name: str = ""
    waiting: deque[EpisodeSpec] = field(default_factory=deque)
    """To be begun; only the lanes' thread changes it."""
    lanes: int = 0
    """That play them."""
    ended: queue.SimpleQueue[Episode | Failure | BaseException] = field(default_factory=queue.SimpleQueue)
    left: int = 0
    """Results that nobody has been given yet."""
    over: bool = False
    """Whether nobody wants them any more."""


class _AbandonedError(Exception):
    """Nobody wants the episode any more."""


class GroupEnvRunner(EnvRunner, Checkpointable):
    """See the module's docstring. Lanes: `config.num_envs_per_env_runner`."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        # An episode's draws come from its own seed. RLlib's, for which PyTorch loads its compiler, would take seconds.
        config = config.copy(copy_frozen=False)
        config.seed = None
        super().__init__(config=config, **kwargs)
        torch.set_num_threads(1)
        if self.worker_index:  # a process of its own; what it has loaded by now will never be garbage
            gc.freeze()
            gc.set_threshold(GARBAGE)
        borrow_environment(self.config.env_config.get("desk") or DeskConfig())
        self._n_lanes = self.config.num_envs_per_env_runner
        self._lanes = Lanes(2 * self._n_lanes)  # those of an abandoned session may still wait for their models
        self._at_most = min(DECISIONS, max(4, self._n_lanes // 8))
        self._session = _Session()
        self._open: set[RoutingEnv] = set()
        self._free: list[RoutingEnv] = []
        self._routers: dict[str, Router] = {}
        self._version = -1
        self._steps = 0
        self._n_models = len(_pool(self.config.env_config))
        self._read = Reader.of(ROUTER_DEFAULTS | self.config.router_shape)
        self.module: Any = None
        self._memory: Memory | None = None
        self._loading = threading.Lock()
        """Held while weights are changed, or decided by."""

    # -- RLlib's contract -------------------------------------------------------------------------------------------

    def assert_healthy(self) -> None:
        assert self._lanes is not None

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
        self._session.over = True
        self._lanes.close(GRACE_S)
        while self._open:
            self._open.pop().close()

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
            if left and self._session.name == session:
                self._abandon()

    def exchange(
        self, session: str, specs: Sequence[EpisodeSpec] = (), weights: Any = None, version: int = 0,
        routers: Mapping[str, Router] | None = None,
    ) -> list[Episode | Failure]:  # fmt: skip
        """Takes more specs to play, and returns what has ended: nothing when that takes longer than `PATIENCE_S`.

        Whoever asks again and again keeps all lanes busy, and they go on while nobody asks. Another `session` than that
        of the last call abandons what that one left in the middle.

        `weights` (a module state) with `version` are the learned router's; loaded when the version is a new one.
        `routers` are those that their names alone don't make, by name.
        A result depends on its spec and the weights, not on what runs beside it (but for the last bits of the learned
        router's probabilities, which vary with the batch and can flip a choice about once in 10^8 steps).
        """
        if session != self._session.name:
            self._abandon(session)
        if weights is not None and version != self._version:
            self._load(weights)
            self._version = version
        self._routers.update(routers or {})
        mine = self._session
        if specs:
            mine.left += len(specs)
            self._lanes.start(lambda: self._enlist(mine, specs))
        ended: list[Episode | Failure] = []
        begun = time.monotonic()
        try:
            while mine.left and (mine.waiting or not ended):
                until = begun + (HAND_IN_S if ended else PATIENCE_S)
                try:
                    result = mine.ended.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if isinstance(result, BaseException):
                    raise result
                ended.append(result)
                mine.left -= 1
        except BaseException:
            self._abandon()
            raise
        return ended

    def hand_in(self, *asked: Any) -> tuple[list[Episode | Failure], int]:
        """What `exchange` returns, and how many steps this runner has made by now: nothing may end for long."""
        return self.exchange(*asked), self._steps

    def _abandon(self, name: str = "") -> None:
        """Forgets what is being played: its lanes end when they have stored and paid the call that they wait for."""
        self._session.over = True
        self._session = _Session(name)

    # -- in lanes ---------------------------------------------------------------------------------------------------

    def _enlist(self, session: _Session, specs: Sequence[EpisodeSpec]) -> None:
        session.waiting.extend(specs)
        for _ in range(min(len(specs), self._n_lanes - session.lanes)):
            session.lanes += 1
            self._lanes.start(lambda: self._play(session))

    def _play(self, session: _Session) -> None:
        """One episode after the other, as long as any wait."""
        try:
            while session.waiting and not session.over:
                session.ended.put(self._result(session, session.waiting.popleft()))
        except _AbandonedError:
            pass
        except BaseException as error:
            session.ended.put(error)
        finally:
            session.lanes -= 1

    def _an_env(self, env_id: str) -> RoutingEnv:
        if self._free:
            return self._free.pop()
        env = aside(self._make_env, env_id)
        self._open.add(env)
        return env

    def _make_env(self, env_id: str) -> RoutingEnv:
        return make_routing_env(env_id, self.config.env_config)

    def _result(self, session: _Session, spec: EpisodeSpec) -> Episode | Failure:
        """The episode, tried again after a failure; its budget is one for all tries."""
        env: RoutingEnv | None = None
        tab = Tab()
        try:
            for _ in range(ATTEMPTS):
                try:
                    env = env or self._an_env(spec.task.env_id)
                    return self._episode(session, env, spec, tab)
                except (EngineError, ModelError) as error:
                    reason = f"{type(error).__name__}: {error}"
            return Failure(spec, reason)
        finally:
            if env:
                self._free.append(env)

    def _episode(self, session: _Session, env: RoutingEnv, spec: EpisodeSpec, tab: Tab) -> Episode:
        options = {"task": spec.task.name, "sample": spec.call_sample, "budget": spec.budget, "tab": tab}
        view, info = env.reset(seed=spawn_seed(spec.seed, spec.task.name) % 2**31, options=options)
        task_text, first, steps = info["task_text"], info["first_observation"], list[Step]()
        while "stop" not in info:
            mask, router_s = info["action_mask"], 0.0
            if spec.router == LEARNED:
                p, router_s = together(self._decide, (view, id(env)), self._at_most, apart=self._read.backbone != "")
            else:
                moment = Moment(view, len(steps), self._n_models, spec.task.name, spec.member, env.ask)
                p = self._router(spec.router)(moment)
                mask = env.mask  # a question may have left less
            if session.over:
                raise _AbandonedError
            draw = None if spec.greedy else spawn_seed(spec.stream, len(steps)) / 2**63
            decision = decide(p, mask, draw)
            view, outcome, _, _, info = env.step(decision.model)
            self._steps += 1
            if "reply" in info:
                fields = ("model", "reply", "action", "observation", "prompt_tokens", "cached_tokens",
                          "completion_tokens", "cost_microusd", "lost_microusd", "latency_s", "question")  # fmt: skip
                own = {"probabilities": decision.probabilities, "mask": mask, "router_s": router_s}
                steps.append(Step(**own, **{f: info[f] for f in fields}))
        return Episode(
            spec, task_text, first, env.max_steps, tuple(steps), float(outcome), bool(info["success"]),
            float(info["score"]), StopReason(info["stop"]),
        )  # fmt: skip

    def _router(self, name: str) -> Router:
        if name not in self._routers:
            self._routers[name] = fixed_router(name)
        return self._routers[name]

    def _decide(self, asked: Sequence[tuple[str, int]]) -> list[tuple[tuple[float, ...], float]]:
        """The learned router's probabilities for each view, and its share of the seconds that this took."""
        start = time.perf_counter()
        with self._loading:
            if self.module is None:
                raise ValueError(
                    "a learned router was asked for and no weights have been given: pass weights to stream()"
                )
            read = [self._read(view) for view, _ in asked]
            if self._memory is not None:
                logits = self._memory.logits(read, [lane for _, lane in asked])
            else:
                lengths = np.array([int((ids != self._read.padding).sum()) for ids in read])
                logits = torch.empty(len(read), self._n_models)
                with torch.inference_mode():
                    for rows in passes(lengths, PASS_TOKENS):
                        ids = torch.from_numpy(np.stack([read[i] for i in rows]))
                        logits[torch.from_numpy(rows)] = self.module.policy(ids)
        rows_p = torch.softmax(logits, -1).double().tolist()
        share_s = (time.perf_counter() - start) / len(asked)
        return [(tuple(row), share_s) for row in rows_p]

    def _load(self, weights: Any) -> None:
        with self._loading:
            if self.module is None:
                self.make_module()
            self.module.set_state(weights)
            self._memory = self.module.memory()
