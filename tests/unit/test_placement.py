"""What is asked of Ray, worked by hand."""

from __future__ import annotations

import pytest
from ray.tune import PlacementGroupFactory

from bopo_ray.rllib.bopo import BoPO, BoPOConfig
from bopo_ray.rllib.placement import MB, RUNNER_BYTES, fitting, most_memory, resources, runner_bytes, trial_request
from tests.toy import ID, Toy

GB = 1000 * MB


def node(cpus: float, memory: float, alive: bool = True) -> dict[str, object]:
    return {"Alive": alive, "Resources": {"CPU": cpus, "memory": memory}}


def test_a_runner_takes_its_own_memory_and_its_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runner_bytes(ID, 8) == RUNNER_BYTES
    monkeypatch.setattr(Toy, "footprint_mb", (300, 40), raising=False)
    assert runner_bytes(ID, 8) == RUNNER_BYTES + 620 * MB
    assert runner_bytes(ID, 16) - runner_bytes(ID, 8) == 320 * MB


@pytest.mark.parametrize("env_id", ["ScienceWorld-v0", "ALFWorld-v0", "AppWorld-v0"])
def test_each_benchmark_says_what_it_takes(env_id: str) -> None:
    assert runner_bytes(env_id, 8) >= RUNNER_BYTES + 200 * MB


@pytest.mark.parametrize(
    ("nodes", "cpus", "runners"),
    [
        ([node(8, 100 * GB)], 8, 8),  # the CPUs decide
        ([node(8, 100 * GB)], 4, 4),  # or --cpus
        ([node(8, 3.9 * GB)], 8, 3),  # the memory decides
        ([node(2, 1.9 * GB), node(2, 1.9 * GB)], 4, 2),  # node by node: 3.8 GB in one place would hold 3
        ([node(2, 9 * GB), node(64, 90 * GB, alive=False)], 66, 2),  # not what is gone
        ([node(2, 0.5 * GB)], 2, 1),  # one, whatever there is
    ],
)
def test_runners_fit_node_by_node(nodes: list[dict[str, object]], cpus: int, runners: int) -> None:
    assert fitting(nodes, cpus, int(GB)) == runners


def test_the_most_that_a_node_has() -> None:
    assert most_memory([node(1, 3 * GB), node(1, 5 * GB), node(1, 9 * GB, alive=False)]) == 5 * GB
    assert most_memory([]) == 0


def test_a_trial_asks_for_memory_and_learns_where_the_files_are() -> None:
    asked = PlacementGroupFactory([{"CPU": 0.5}, {"CPU": 1}, {"CPU": 1}], strategy="PACK")
    made = trial_request(asked, "", 7, 5)
    assert made.bundles == [{"CPU": 0.5, "memory": 5}, {"CPU": 1, "memory": 7}, {"CPU": 1, "memory": 7}]
    assert made._bound.kwargs == {}
    there = trial_request(asked, "abc", 7, 5)
    assert there._bound.kwargs == {"bundle_label_selector": [{"ray.io/node-id": "abc"}, {}, {}]}


def test_a_main_process_without_a_cpu_is_asked_for_all_the_same() -> None:
    """Ray Tune drops a first bundle that asks for nothing."""
    made = trial_request(PlacementGroupFactory([{"CPU": 0}, {"CPU": 1}], strategy="PACK"), "abc", 7, 5)
    assert made.bundles == [{"memory": 5}, {"CPU": 1, "memory": 7}]
    assert made._bound.kwargs == {"bundle_label_selector": [{"ray.io/node-id": "abc"}, {}]}


def test_what_a_node_has() -> None:
    nodes = [node(1, 3) | {"NodeID": "a"}, node(2, 5, alive=False) | {"NodeID": "b"}]
    assert resources(nodes, "a") == {"CPU": 1, "memory": 3} and not resources(nodes, "b") and not resources(nodes, "")


def test_bopo_asks_so() -> None:
    cfg = BoPOConfig().environment(ID, env_config={}).env_runners(num_env_runners=2, num_cpus_per_env_runner=1)
    cfg.memory_per_env_runner, cfg.memory_for_main_process, cfg.home = 7 * MB, 5 * MB, "abc"
    made = BoPO.default_resource_request(cfg.to_dict())
    assert [bundle["memory"] for bundle in made.bundles] == [5 * MB, 7 * MB, 7 * MB]
    assert made._bound.kwargs["bundle_label_selector"][0] == {"ray.io/node-id": "abc"}
