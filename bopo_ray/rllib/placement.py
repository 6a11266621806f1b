"""What runners and learners ask Ray for, so that it never puts more on a node than fits, and where they run.

Always true here: a runner's engines (a Java process, TextWorld's, AppWorld's) are its own child processes, so what a
runner asks for is for all of them, and they share its node; a learner that is not alone on its machine runs where the
run's files are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.tune import PlacementGroupFactory

from bopo_ray.benchmarks import env_class

__all__ = ["LEARNER_BYTES", "RunnerGroup", "fitting", "most_memory", "resources", "runner_bytes", "trial_request"]

MB = 1 << 20
RUNNER_BYTES, LEARNER_BYTES = 600 * MB, 700 * MB
"""Of the processes themselves: Python, torch, Ray."""


def runner_bytes(env_id: str, lanes: int) -> int:
    """Memory of an env runner with so many episodes in flight, its engines included.

    A benchmark's class says what it was measured to take in `footprint_mb`: of all engines of a process together, and
    of each on top. One that says nothing is taken for small.
    """
    shared, each = getattr(env_class(env_id), "footprint_mb", (0, 0))
    return RUNNER_BYTES + (shared + lanes * each) * MB


def fitting(nodes: Sequence[Mapping[str, Any]], cpus: int, memory: int) -> int:
    """How many runners of a CPU and `memory` bytes fit on the live `ray.nodes()`: at most `cpus`, at least 1."""
    shares = [node["Resources"] for node in nodes if node["Alive"]]
    return max(1, min(cpus, sum(int(min(r.get("CPU", 0), r.get("memory", 0) // memory)) for r in shares)))


def most_memory(nodes: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of the live node that has most."""
    return int(max((node["Resources"].get("memory", 0) for node in nodes if node["Alive"]), default=0))


def resources(nodes: Sequence[Mapping[str, Any]], node: str) -> Mapping[str, float]:
    """What the live node with Ray's id `node` has; nothing where it is not there."""
    return next((n["Resources"] for n in nodes if n["Alive"] and n["NodeID"] == node), {})


class RunnerGroup(EnvRunnerGroup):
    """RLlib's, whose runners ask for memory as well, which RLlib has no setting for."""

    def _setup(self, **kwargs: Any) -> None:
        self._remote_args["memory"] = self._remote_config.memory_per_env_runner
        super()._setup(**kwargs)


def trial_request(request: PlacementGroupFactory, home: str, runner: int, learner: int) -> PlacementGroupFactory:
    """A trial's resources as RLlib asks for them, with memory, and the first bundle (its learner) on the node `home`.

    Args:
        request: RLlib's: the main process, then the runners.
        home: Ray's id of the node with the run's files; empty for a run on one machine.
        runner, learner: bytes.
    """
    main, *others = [{}] * request.head_bundle_is_empty + request.bundles
    bundles = [main | {"memory": learner}, *(bundle | {"memory": runner} for bundle in others)]
    where: dict[str, Any] = {"bundle_label_selector": [{"ray.io/node-id": home}, *({} for _ in others)]} if home else {}
    return PlacementGroupFactory(bundles, strategy=request.strategy, **where)
