"""What the two algorithms and their configurations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from bopo_ray.rllib.encode import Reader
from bopo_ray.rllib.router_module import ROUTER_DEFAULTS, RouterModule
from bopo_ray.rllib.runner import GroupEnvRunner

__all__ = ["RouterAlgorithmConfig", "ask_learners"]

T = TypeVar("T")


def ask_learners(group: LearnerGroup, ask: Callable[[Any], T], first: bool = False) -> list[T]:
    """What `ask` gives of each learner, or of the first alone. Raises what it raised there: RLlib would go on without
    that learner, and say nothing."""
    found = group.foreach_learner(ask, healthy_only=False, remote_actor_ids=[0] if first else None)
    answers: list[T] = group._get_results(found)
    return answers


class RouterAlgorithmConfig(AlgorithmConfig):
    """Runners, router and the settings of RLlib whose defaults hurt here."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)
        self.router_shape: dict[str, Any] = dict(ROUTER_DEFAULTS)
        """The router's shape, see `ROUTER_DEFAULTS`."""
        self.start = ""
        """Folder of the saved RouterModule to start from; empty: from random weights."""
        self.memory_per_env_runner, self.memory_for_main_process = 0, 0
        """Bytes that Ray sets aside, see `placement`; 0 asks for none."""
        self.home = ""
        """Ray's id of the node that holds the run's files, where trials learn; empty for a run on one machine."""
        self.tokens_per_pass = 1 << 14
        """Most tokens of a forward and backward pass, padding included; a minibatch takes as many as it needs."""
        self.warmup, self.lr_end = 0.0, 1.0
        """The learning rate rises over this share of the training, and falls to this share of itself at its end."""
        self.api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
        self.env_runners(
            env_runner_cls=GroupEnvRunner, num_env_runners=1, num_envs_per_env_runner=8, create_local_env_runner=False,
            sample_timeout_s=None,
        )  # fmt: skip
        self.fault_tolerance(restart_failed_env_runners=True, max_num_env_runner_restarts=1000)
        self.learners(num_learners=0)
        self.framework("torch")
        self.grad_clip, self.grad_clip_by = 1.0, "global_norm"
        self.reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=0)

    def router(self, **shape: Any) -> RouterAlgorithmConfig:
        """Sets the router's shape."""
        self.router_shape = ROUTER_DEFAULTS | shape
        return self

    def learning(
        self, num_learners: int, num_gpus_per_learner: float, tokens_per_pass: int, warmup: float, lr_end: float
    ) -> RouterAlgorithmConfig:
        """Sets who learns, by RLlib's names, and how; learners on CPUs share cores with the runner they wait for."""
        cpus = 0.5 if num_learners and not num_gpus_per_learner else 0
        self.learners(num_learners=num_learners, num_gpus_per_learner=num_gpus_per_learner, num_cpus_per_learner=cpus)
        self.tokens_per_pass, self.warmup, self.lr_end = tokens_per_pass, warmup, lr_end
        return self

    def start_from(self, folder: str) -> RouterAlgorithmConfig:
        """Starts from a saved RouterModule instead of random weights."""
        self.start = folder
        return self

    @property
    def reader(self) -> Reader:
        """How the router reads its view."""
        return Reader.of(self.router_shape)

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        return RLModuleSpec(
            module_class=RouterModule, model_config=self.router_shape, load_state_path=self.start or None
        )
