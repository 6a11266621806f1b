"""The desk of another node: its calls and its money go through the actor that owns the files, on a simulated cluster.

The cluster is started in a process of its own: the tests' own Ray may run in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bopo_ray.models.calls import CallStore
from bopo_ray.models.pricing import Price, Usage
from bopo_ray.models.protocol import Message, Reply, Request, Sampling
from bopo_ray.models.spend import SpendLedger

ROOT = Path(__file__).parents[2]
PRICE = Price(1_000_000, 0, 1_000_000)
WORST, COST = 150, 70
"""Micro-dollars of a call: a token costs one; 100 prompt and 50 completion tokens at most, 60 and 10 used."""
CAP = 2 * COST + WORST
SAMPLES = (0, 0, 1, 2, 0, 3)
"""One after the other: three are paid, two are stored by then; for the last one the rest is too little."""


CROWD = 40


class Model:
    """Always the same usage; the text says which process answered."""

    name = identity = "model"
    price = PRICE
    sampling = Sampling()
    needs_plan = False

    def bound(self, messages: tuple[Message, ...]) -> int:
        return 100

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    def complete(self, request: Request) -> Reply:
        return Reply(f"sample {request.sample} by {os.getpid()}", Usage(60, 10), 0.1)


def request(sample: int) -> Request:
    return Request((Message("user", "What next?"),), sample, 0.7, 50, "task")


def cluster_script(folder: Path) -> None:
    """Prints what happened, as JSON."""
    import ray
    from ray.cluster_utils import Cluster

    from bopo_ray.lanes import Lanes
    from bopo_ray.rllib.open_desk import DeskConfig, _Line, borrow_environment, node_id, open_desk, serve_desk

    def call(config: DeskConfig, sample: int) -> tuple[str, str, str, bool]:
        """What came of a call, the text or the error; which process and node asked; whether through the actor."""
        remote = False
        try:
            desk = open_desk(config)
            remote = type(desk._spend).__name__ == "_Remote"
            said = desk.call(Model(), request(sample), 100).reply.text
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        return said, str(os.getpid()), node_id(), remote

    def fail(config: DeskConfig) -> None:
        open_desk(config).call(Model(), request(99), 100)

    def crowd(config: DeskConfig) -> tuple[list[str], str, list[int]]:
        """What comes of CROWD calls at the same moment and of a question that fails; how many went together."""
        sizes, send = list[int](), _Line._send
        _Line._send = lambda self, asked: [sizes.append(len(asked)), send(self, asked)][1]  # type: ignore
        desk, lanes = open_desk(config), Lanes(workers=8)
        calls = [
            lanes.submit(lambda s=s: desk.call(Model(), request(s), 100).reply.text)  # type: ignore[misc]
            for s in range(1000, 1000 + CROWD)
        ]
        assert desk._spend
        unknown = lanes.submit(lambda: desk._spend.settle(10**9, Usage(1, 1), 1))  # type: ignore[union-attr]
        return [c.result().partition(" by")[0] for c in calls], repr(unknown.exception()), sizes

    def borrowed(config: DeskConfig) -> dict[str, str | None]:
        os.environ["OWN"] = "the node's"
        borrow_environment(config)
        return {name: os.environ.get(name) for name in ("LENT", "OWN")}

    def actors() -> list[str]:
        return [a["name"] for a in ray.util.list_named_actors(all_namespaces=True)]

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=1, resources={"other": 1})
    cluster.wait_for_nodes()
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    options = {"address": cluster.address, "log_to_driver": False, "logging_level": "ERROR", "runtime_env": environment}
    try:
        ray.init(**options)
        config = DeskConfig(str(folder / "calls.db"), str(folder / "spend.db"), CAP, node=node_id(), actor="the-desk")
        actor = serve_desk(config, {"LENT": "by the driver", "OWN": "the driver's"})
        there, here = ray.remote(resources={"other": 1})(call), ray.remote(call)
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id(), soft=False)
        there_all = [ray.get(there.remote(config, sample), timeout=60) for sample in SAMPLES]
        here_one = ray.get(here.options(scheduling_strategy=strategy).remote(config, 1), timeout=60)
        try:
            ray.get(ray.remote(resources={"other": 1})(fail).remote(config), timeout=60)
            crossed = ""
        except ray.exceptions.RayTaskError as error:
            crossed = type(error.cause).__name__
        lent = ray.get(ray.remote(resources={"other": 1})(borrowed).remote(config), timeout=60)
        during = actors()
        ray.kill(actor)
        dead = ray.get(there.remote(config, 7), timeout=60)
        second = DeskConfig(str(folder / "calls.db"), str(folder / "spend.db"), None, node=node_id(), actor="second")
        absent = ray.get(there.remote(second, 0), timeout=60)
        kept = serve_desk(second)  # noqa: F841 (it ends with its handle)
        after_restart = ray.get(there.remote(second, 0), timeout=60)
        many, failed, sizes = ray.get(ray.remote(resources={"other": 1})(crowd).remote(second), timeout=60)
        head = node_id()
        ray.shutdown()  # the job ends, the cluster stays
        ray.init(**options)
        until = time.monotonic() + 60
        while actors() and time.monotonic() < until:
            time.sleep(0.1)
        left = actors()
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps({"there": there_all, "here": here_one, "crossed": crossed, "during": during, "dead": dead,
                      "absent": absent, "second": after_restart, "left": left, "head": head,
                      "many": many, "failed": failed, "sizes": sizes, "lent": lent}))  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("open_desk")


@pytest.fixture(scope="module")
def happened(folder: Path) -> dict[str, Any]:
    """The script's report."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_a_task_on_another_node_asks_the_actor(happened: dict[str, Any]) -> None:
    for _, _, node, remote in happened["there"]:
        assert node != happened["head"] and remote
    _, _, node, remote = happened["here"]
    assert node == happened["head"] and not remote


def test_it_stores_and_is_answered_from_the_store(happened: dict[str, Any], folder: Path) -> None:
    (first, maker, *_), (again, *_), (one, *_), (two, *_), (third, *_), _ = happened["there"]
    assert first == again == third == f"sample 0 by {maker}"
    assert one.startswith("sample 1 by ") and two.startswith("sample 2 by ")
    assert happened["here"][0] == one  # the same store, opened as a file
    assert CallStore(folder / "calls.db").stats().calls == 3 + CROWD


def test_the_ledger_on_the_head_counts_it(happened: dict[str, Any], folder: Path) -> None:
    bill = SpendLedger(folder / "spend.db", None).totals().overall
    paid = 3 + CROWD
    assert (bill.paid_calls, bill.paid_microusd, bill.prompt_tokens) == (paid, paid * COST, paid * 60)
    assert (bill.saved_calls, bill.saved_microusd) == (4, 4 * COST)  # two there, one here, one through the second actor
    assert (bill.lost_calls, bill.reserved_microusd) == (0, 0)


def test_the_limit_crosses_the_cluster(happened: dict[str, Any]) -> None:
    assert happened["there"][-1][0].startswith("SpendLimitError: the next call of model may cost $0.000150")
    assert happened["crossed"] == "SpendLimitError"


def test_what_a_crowd_asks_goes_together_and_fails_alone(happened: dict[str, Any]) -> None:
    assert happened["many"] == [f"sample {s}" for s in range(1000, 1000 + CROWD)]
    assert happened["failed"].startswith("ValueError('reservation 1000000000: never made")
    sizes = happened["sizes"]
    assert sum(sizes) == 4 * CROWD + 1 and max(sizes) > 10  # a claim, a reservation, a reply and a bill for each


def test_a_node_takes_over_what_it_lacks_of_the_drivers_environment(happened: dict[str, Any]) -> None:
    """As Ray starts workers with the environment of their node, keys would have to be on each before it is started."""
    assert happened["lent"] == {"LENT": "by the driver", "OWN": "the node's"}


def test_an_actor_that_is_gone_fails_the_episode_only(happened: dict[str, Any]) -> None:
    assert happened["dead"][0].startswith("ModelError: the call store's actor does not answer (")
    assert happened["absent"][0] == "ModelError: the call store's actor second is gone"
    assert happened["second"][0] == happened["there"][0][0]


def test_the_actor_ends_with_its_job(happened: dict[str, Any]) -> None:
    assert [a for a in happened["during"] if a == "the-desk"] == ["the-desk"]
    assert happened["left"] == []


def test_the_bench_measures_both_ways_to_the_files() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench", "desk", "--seconds", "1", "--json"], cwd=ROOT,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout[done.stdout.index("[\n") :])
    assert [row["name"].partition(",")[0] for row in rows] == ["on the node", "through the actor"]
    assert all(row[way] > 0 for row in rows for way in ("ours", "naive", "limit"))


if __name__ == "__main__":
    cluster_script(Path(sys.argv[1]))
