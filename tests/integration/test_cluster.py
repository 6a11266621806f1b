"""Several nodes, simulated on this machine: one is removed in mid-iteration, one is added, one's object store is full.

The cluster is started in a process of its own: the tests' own Ray may run in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bopo_ray.models.pool import resolve_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.records import Episode, EpisodeSpec
from bopo_ray.rllib.bopo import BoPOConfig
from tests.processes import ask_runners
from tests.toy import ID, toy_spec

ROOT = Path(__file__).parents[2]
SPECS = [toy_spec(f"{kind}/{n}", member=m) for kind in ("fetch", "measure", "mix") for n in range(4) for m in range(4)]
STORE_BYTES = 80 << 20


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def config(runners: int) -> BoPOConfig:
    made = BoPOConfig().environment(ID, env_config={"pool": resolve_pool("simulated", "", "", price_table())})
    made.env_runners(num_env_runners=runners, num_envs_per_env_runner=2, num_cpus_per_env_runner=1)
    made.router(width=16, layers=1)
    made.memory_per_env_runner = 1 << 20
    return made


def cluster_script(folder: Path) -> None:
    """Prints what happened, as JSON."""
    import numpy as np
    import ray
    from ray.cluster_utils import Cluster
    from ray.tune import PlacementGroupFactory
    from ray.util import placement_group_table

    from bopo_ray.rllib.collect import collect
    from bopo_ray.rllib.placement import RunnerGroup, trial_request

    def where(home: str) -> list[str]:
        """Nodes of a trial's bundles."""
        asked = PlacementGroupFactory([{"CPU": 0.01}, {"CPU": 0.01}], strategy="PACK")
        group = trial_request(asked, home, 1 << 20, 1 << 20).to_placement_group()
        ray.get(group.ready(), timeout=60)
        nodes = placement_group_table(group)["bundles_to_node_id"]
        ray.util.remove_placement_group(group)
        return [nodes[i] for i in range(2)]

    hold = folder / "hold"
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES},
    )
    doomed = cluster.add_node(num_cpus=2, resources={"doomed": 1})
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "TOY_HOLD": str(hold)}}
    try:
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
        homes = {node: where(node)[0] for node in nodes}
        group = RunnerGroup(config=config(3), local_env_runner=False)
        asked = [r.get("memory", 0) for r in nodes.values()]
        free = ray.available_resources()

        # Each of three runners waits after three episodes; the node of two of them goes, another comes.
        hold.write_text("3")
        first: list[Any] = []
        thread = threading.Thread(target=lambda: first.extend(collect(group, SPECS)))
        thread.start()
        until(lambda: len([p for p in folder.iterdir() if p.name.isdigit()]) == 3)
        cluster.remove_node(doomed, allow_graceful=False)
        cluster.add_node(num_cpus=2, resources={"fresh": 1})
        hold.unlink()
        thread.join(200)
        players = ask_runners(group, lambda _: ray.get_runtime_context().get_node_id())

        # More objects than the store holds.
        full = [ray.put(np.random.default_rng(i).random(STORE_BYTES // 32)) for i in range(8)]
        second = collect(group, SPECS[:8], weights=None)
        whole = sum(float(ray.get(ref)[0]) == float(np.random.default_rng(i).random()) for i, ref in enumerate(full))
        alive = {n["NodeID"]: sorted(n["Resources"]) for n in ray.nodes() if n["Alive"]}
    finally:
        ray.shutdown()
        cluster.shutdown()
    report = {
        "homes": homes, "memory": sum(asked) - free.get("memory", 0), "first": steps(first), "second": steps(second),
        "players": players, "alive": alive, "whole": whole,
    }  # fmt: skip
    print(json.dumps(report))


def steps(results: list[Any]) -> dict[str, Any]:
    """What each episode did, by id; a failure's reason."""
    return {
        r.spec.id: [[s.model, s.reply, s.observation] for s in r.steps] if isinstance(r, Episode) else str(r.reason)
        for r in results
    }


@pytest.fixture(scope="module")
def happened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The script's report."""
    folder = tmp_path_factory.mktemp("cluster")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    report["said"] = done.stderr
    return report


def alone(specs: list[EpisodeSpec]) -> dict[str, Any]:
    """The same episodes in this process."""
    runner = config(0).env_runner_cls(config=config(0))
    try:
        return steps(runner.sample(specs))
    finally:
        runner.stop()


def test_a_node_removed_in_the_middle_changes_no_result(happened: dict[str, Any]) -> None:
    assert "episodes go back to the queue" in happened["said"]
    assert happened["first"] == alone(SPECS)


def test_its_runners_go_on_where_there_is_room(happened: dict[str, Any]) -> None:
    fresh = [node for node, resources in happened["alive"].items() if "fresh" in resources]
    assert len(fresh) == 1 and not any("doomed" in resources for resources in happened["alive"].values())
    assert happened["players"].count(fresh[0]) == 2 and set(happened["players"]) == set(happened["alive"])


def test_a_full_object_store_loses_nothing(happened: dict[str, Any]) -> None:
    assert happened["second"] == alone(SPECS[:8])
    assert happened["whole"] == 8


def test_a_trial_learns_on_the_node_that_it_is_told(happened: dict[str, Any]) -> None:
    assert len(happened["homes"]) == 2
    assert all(home == node for node, home in happened["homes"].items())


def test_runners_set_memory_aside(happened: dict[str, Any]) -> None:
    assert happened["memory"] == 3 * (1 << 20)


if __name__ == "__main__":
    cluster_script(Path(sys.argv[1]))
