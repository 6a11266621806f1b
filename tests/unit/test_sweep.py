"""The sweep: its points, and which checkpoint an interrupted one goes on from."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from ray.rllib.algorithms.algorithm import Algorithm
from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial

from bopo_ray.files import write_json
from bopo_ray.pipeline import sweep as module
from bopo_ray.pipeline.baselines import Policy, specs
from bopo_ray.pipeline.calibrate import Tried, for_each_lambda, front_choice, offsets_at
from bopo_ray.pipeline.curves import keep_curves
from bopo_ray.pipeline.run import Run
from bopo_ray.pipeline.settings import Settings
from bopo_ray.pipeline.sweep import CONTENTS, Point, Sweep, _Ledger, ask, untaught
from bopo_ray.records import Budget, CostMode
from bopo_ray.rllib.bopo import BoPO, BoPOConfig
from bopo_ray.rllib.overheard import Overheard
from envs.base import Split, Task
from tests.toy import ID

POINT = Point("hybrid", 0.3, 0)


def checkpoint(folder: Path, attempt: int, number: int, updates: int) -> Path:
    """As the sweep leaves it."""
    path = folder / f"attempt-{attempt}" / POINT.name / f"checkpoint_{number:06}"
    (path / "learner").mkdir(parents=True)
    (path / "learner" / "module_state.pkl").write_bytes(bytes(1000 + number))
    (path / "updates.json").write_text(str(updates))
    sizes = {str(f.relative_to(path)): f.stat().st_size for f in path.rglob("*") if f.is_file()}
    write_json(path / CONTENTS, sizes)
    return path


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    made = Sweep.__new__(Sweep)
    made.folder = tmp_path
    return made


def chosen(sweep: Sweep) -> str | None:
    return sweep._checkpoint(POINT)


def test_the_newest_is_taken_whichever_attempt_made_it(sweep: Sweep) -> None:
    assert chosen(sweep) is None
    first = checkpoint(sweep.folder, 0, 0, 1)
    assert chosen(sweep) == str(first)
    second = checkpoint(sweep.folder, 0, 1, 2)
    checkpoint(sweep.folder, 1, 0, 1)
    assert chosen(sweep) == str(second)


@pytest.mark.parametrize(
    "damage",
    [
        lambda at: (at / "learner" / "module_state.pkl").write_bytes(b"half"),
        lambda at: (at / "learner" / "module_state.pkl").unlink(),
        lambda at: (at / CONTENTS).unlink(),
        lambda at: (at / CONTENTS).write_text('{"learner/'),
        lambda at: (at / "updates.json").write_text("?"),
        lambda at: (at / "updates.json").unlink(),
    ],
    ids=["cut short", "file gone", "killed before its list", "half a list", "no number", "no updates"],
)
def test_a_damaged_one_is_passed_over_for_the_one_before(sweep: Sweep, damage: Callable[[Path], object]) -> None:
    whole = checkpoint(sweep.folder, 0, 0, 1)
    damage(checkpoint(sweep.folder, 0, 1, 2))
    assert chosen(sweep) == str(whole)
    damage(whole)
    assert chosen(sweep) is None, "then the point begins anew"


def test_a_list_of_other_sizes_is_no_whole_checkpoint(sweep: Sweep) -> None:
    at = checkpoint(sweep.folder, 0, 0, 1)
    sizes = json.loads((at / CONTENTS).read_text())
    write_json(at / CONTENTS, sizes | {"learner/module_state.pkl": 5})
    assert chosen(sweep) is None


def test_a_point_that_ended_before_it_was_entered_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its router is kept, and its checkpoints, each of them larger, are not."""
    s = Settings(lambdas=(0.3,), advantage=("hybrid",), updates=3)
    ended = Sweep(cast(Run, SimpleNamespace(settings=s, out=tmp_path)))
    monkeypatch.setattr(module, "describe", lambda *_, **__: None)
    paths = [checkpoint(ended.folder, *at) for at in ((0, 0, 1), (1, 0, 2), (1, 1, 3))]
    other = checkpoint(ended.folder, 2, 0, 1).parent
    other = other.rename(other.with_name("bopo-hybrid_lam0.8_seed0"))
    for path in paths:
        (path / module.MODULE).mkdir(parents=True)
        (path / module.MODULE / "weights").write_text(path.name)
    ended.train(tmp_path / "bosft")
    assert (ended.policy(POINT.name) / "weights").read_text() == paths[-1].name
    assert ended.finished() == {POINT.name: {"updates": 3}}
    assert not [path for path in paths if path.exists()] and list(other.iterdir())


def test_a_router_of_a_training_lambda_stands_for_each_lambda(tmp_path: Path) -> None:
    s = Settings(lambdas=(0.1, 0.8), train_lambdas=(0.3,), shares=(0.5,), advantage=("hybrid",))
    points = Sweep(cast(Run, SimpleNamespace(settings=s, out=tmp_path))).points
    assert points == [POINT]
    router = Policy(POINT.name, POINT.method, lam=POINT.lam, seed=0)
    assert [(p.name, p.lam) for p in for_each_lambda(router, s)] == [
        ("bopo-hybrid_lam0.3_seed0_for0.1", 0.1), ("bopo-hybrid_lam0.3_seed0_for0.8", 0.8)
    ]  # fmt: skip
    bosft = Policy("bosft", "bosft")
    for one in (s, dataclasses.replace(s, train_lambdas=())):
        assert [(p.name, p.lam) for p in for_each_lambda(bosft, one)] == [("bosft_lam0.1", 0.1), ("bosft_lam0.8", 0.8)]
    assert for_each_lambda(router, dataclasses.replace(s, train_lambdas=())) == [router]


def test_points_whose_groups_taught_nothing_are_known(tmp_path: Path) -> None:
    other = Point("vanilla", 0.3, 0)
    assert untaught(tmp_path) == []
    for update, kl in ((1, None), (2, float("nan"))):
        learners = {} if kl is None else {"default_policy": {"kl": kl}}
        keep_curves(tmp_path, POINT, {"updates": update, "learners": learners})
        keep_curves(
            tmp_path, other, {"updates": update, "learners": {"default_policy": {"kl": 0.0}} if update == 1 else {}}
        )
    assert untaught(tmp_path) == [POINT.name]


def test_a_straight_frontier_is_shared_by_the_lambdas() -> None:
    """On a straight line each price chooses one of its ends; a front has what lies between, too."""
    small, large = (1.0, 0.2), (5.0, 0.8)
    points = {"a": (2.0, 0.4), "b": (3.0, 0.54), "c": (4.0, 0.7), "dominated": (4.5, 0.3)}
    by_price = {lam: max(points, key=lambda n: points[n][1] - lam * points[n][0]) for lam in (0.1, 0.14, 0.16, 0.3)}
    assert set(by_price.values()) == {"a", "c"}
    lambdas = (0.3, 0.1, 0.2)
    assert front_choice(points, [small, large], lambdas) == {0.1: "c", 0.2: "b", 0.3: "a"}
    # areas: a and b 0.2 + 0.4 + 2 * 0.54 = 1.68, a and c 0.2 + 2 * 0.4 + 0.7 = 1.7, b and c 2 * 0.2 + 0.54 + 0.7 = 1.64
    assert front_choice(points, [small, large], (0.2, 0.1)) == {0.1: "c", 0.2: "a"}
    # a 0.2 + 3 * 0.4 = 1.4, b 2 * 0.2 + 2 * 0.54 = 1.48, c 3 * 0.2 + 0.7 = 1.3
    assert front_choice(points, [small, large], (0.5,)) == {0.5: "b"}
    assert front_choice({"a": points["a"]}, [small, large], lambdas) == dict.fromkeys(lambdas, "a")
    # of fewer points than lambdas on the front, the others are the first of what lies behind it
    assert front_choice(points | {"too": (4.6, 0.3)}, [small, large], (0.4, *lambdas)) == {
        0.1: "dominated", 0.2: "c", 0.3: "b", 0.4: "a"
    }  # fmt: skip


def test_a_point_of_a_router_has_a_name_and_may_have_a_limit() -> None:
    assert Tried(0.0).name_of("x") == "x_offset0" and Tried(1.25, 5).name_of("x") == "x_offset1.25_calls5"
    policy = Policy("x", "bosft", calls=5)
    task = Task("ToyEnv-v0", "a", Split.DEV)
    (own,) = specs([task], policy, Settings(), None)
    assert own.budget == Budget(CostMode.CALLS, 5)
    (under,) = specs([task], policy, Settings(), Budget(CostMode.USD, 7))
    assert under.budget == Budget(CostMode.USD, 7), "a budget takes the limit's place"


def test_offsets_are_those_that_call_the_larger_models_on_a_share_of_the_steps() -> None:
    p_large = np.array([0.02, 0.1, 0.3, 0.4, 0.45, 0.6, 0.9, 0.95, 0.98, 0.999])
    p_N2 = np.stack([1 - p_large, p_large], 1)
    by_hand = [x + 0.0 for x in np.round(np.quantile(np.log((1 - p_large) / p_large), [0.2, 0.5, 0.8]), 2)]
    assert offsets_at(p_N2, (0.5, 0.2, 0.8)) == by_hand
    for share, offset in zip((0.2, 0.5, 0.8), by_hand, strict=True):
        calls = np.argmax(np.log(p_N2) + offset * np.arange(2), 1)
        assert np.mean(calls > 0) == pytest.approx(share, abs=0.1)
    assert offsets_at(p_N2, (0.5, 0.5001)) == [by_hand[1]], "each once"
    # of three models the one that needs least: from 0.8 to 0.15 takes log(16/3), to 0.05 in two steps log(16)/2 each
    assert offsets_at([[0.8, 0.15, 0.05]], (0.5,)) == [round(min(np.log(16 / 3), np.log(16) / 2), 2)]
    assert offsets_at([[1.0, 0.0]], (0.5,))[0] > 700, "a router that is certain has an offset, too"


def test_offsets_of_a_router_that_draws_are_those_with_which_it_calls_them_so_often_in_the_mean() -> None:
    """With the greedy one's for 0.08, for one step in twelve, it would call the large at a third."""
    p_large = np.array([0.02, 0.1, 0.15, 0.2, 0.22, 0.25, 0.27, 0.3, 0.31, 0.33, 0.35, 0.4])
    logit_N, p_N2 = np.log(p_large / (1 - p_large)), np.stack([1 - p_large, p_large], 1)

    def drawn(offset: float) -> float:
        return float(np.mean(1 / (1 + np.exp(-logit_N - offset))))

    shares = (0.08, 0.3, 0.82)
    assert [drawn(x) for x in offsets_at(p_N2, shares, greedy=False)] == pytest.approx(shares, abs=0.002)
    assert drawn(offsets_at(p_N2, (0.08,))[0]) > 0.3
    assert offsets_at([[0.8, 0.2]], (0.5,), greedy=False) == [round(np.log(4), 2)]
    # of three models 0.15 y + 0.05 y^2 = 0.8 at one half, with y = exp(offset)
    assert offsets_at([[0.8, 0.15, 0.05]], (0.5,), greedy=False) == [round(np.log((0.1825**0.5 - 0.15) / 0.1), 2)]
    assert offsets_at([[1.0, 0.0]], (0.5,), greedy=False)[0] > 700


# -- what a trial asks for -------------------------------------------------------------------------------------------

MAIN, RUNNER = 700 << 20, 1000 << 20


def asked(
    nodes: list[dict[str, float]], points: int, cpus: int, gpus: float = 0, learners: int = 0, gpus_each: float = 0,
    home: bool = True,
) -> tuple[BoPOConfig, list[dict[str, float]]]:  # fmt: skip
    """A trial's settings and bundles; the first of the nodes is the run's."""
    cfg = BoPOConfig().environment(ID, env_config={}).learning(learners, gpus_each, 1, 0.0, 1.0)
    cfg.memory_for_main_process, cfg.memory_per_env_runner, cfg.home = MAIN, RUNNER, "0" if home else ""
    live = [{"NodeID": str(i), "Alive": True, "Resources": r} for i, r in enumerate(nodes)]
    ask(cfg, points, cpus, gpus, live)
    return cfg, BoPO.default_resource_request(cfg.to_dict()).bundles


def node(cpus: float, gigabytes: float = 1000, gpus: float = 0) -> dict[str, float]:
    return {"CPU": cpus, "memory": gigabytes * 2**30, "GPU": gpus}


@pytest.mark.parametrize(
    ("points", "cpus", "runners", "each"),
    [(6, 2, 1, 0.5), (1, 2, 1, 0.5), (1, 4, 3, 1), (2, 8, 3, 1), (6, 64, 9, 1)],
)
def test_on_one_machine_the_points_share_its_cpus(points: int, cpus: int, runners: int, each: float) -> None:
    _, (main, *others) = asked([node(cpus)], points, cpus, home=False)
    assert main["CPU"] == 0.5 and [b["CPU"] for b in others] == [each] * runners


@pytest.mark.parametrize(
    ("nodes", "how", "runners"),
    [
        ([node(8), *[node(16)] * 10], {}, 160 // 16 - 1),  # 16 main processes of half a CPU on the run's node
        ([node(8, 3.5), *[node(16)] * 10], {}, 160 // 5 - 1),  # 5 by its memory
        ([node(8)], {}, 160 // 16 - 1),  # the other nodes are still to come
        ([node(8, gpus=1), *[node(16)] * 10], {"gpus": 1, "gpus_each": 1}, 160 - 1),  # one at a time
        ([node(8, gpus=1), *[node(16, gpus=1)] * 10], {"gpus": 11, "gpus_each": 1}, 160 - 1),  # it learns on that node
        ([node(8, gpus=1), *[node(16, gpus=1)] * 10], {"gpus": 11, "learners": 1, "gpus_each": 1}, 160 // 11 - 1),
        ([node(8, gpus=2), *[node(16)] * 10], {"gpus": 2, "gpus_each": 0.5}, 160 // 4 - 1),
        ([node(0), *[node(16)] * 10], {}, 160 // 27 - 1),
    ],
)
def test_a_clusters_cpus_are_shared_by_the_trials_that_run_at_once(
    nodes: list[dict[str, float]], how: dict[str, Any], runners: int
) -> None:
    _, bundles = asked(nodes, 27, 160, **how)
    assert len(bundles) - how.get("learners", 0) == 1 + max(1, runners)


def test_no_cpu_is_asked_of_a_head_that_has_none() -> None:
    _, (main, *_) = asked([node(0, 1), node(4, 9)], 2, 4)
    assert main == {"memory": MAIN}


@pytest.mark.parametrize("home", [False, True])
@pytest.mark.parametrize("learners", [0, 2])
@pytest.mark.parametrize("gigabytes", [0.5, 2, 3, 5, 20])
def test_a_trial_fits_into_the_memory_that_there_is(gigabytes: float, learners: int, home: bool) -> None:
    _, bundles = asked([node(8, gigabytes)], 1, 8, learners=learners, home=home)
    assert sum(b["memory"] for b in bundles) <= gigabytes * 2**30
    assert gigabytes < 5 or [b["memory"] for b in bundles] == [MAIN, *[RUNNER] * (len(bundles) - 1)]


def test_a_main_process_fits_on_the_node_of_the_run() -> None:
    _, (main, *others) = asked([node(8, 0.25), node(8, 16)], 1, 16)
    assert main["memory"] == 2**28 and {b["memory"] for b in others} == {RUNNER}


def test_that_no_trial_finds_room_is_said_once_a_minute(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray looks for room without an end, and Tune without a word."""
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    made = _Ledger(sweep, None)
    request = PlacementGroupFactory([{"CPU": 0.5, "memory": 7e8}, {"CPU": 2, "memory": 3e9}])
    trials = [
        SimpleNamespace(status=Trial.PENDING, PENDING=Trial.PENDING, RUNNING=Trial.RUNNING,
                        placement_group_factory=request, config={"home": "abc"})
        for _ in range(2)
    ]  # fmt: skip

    def told(seconds: float) -> int:
        caplog.clear()
        for _ in range(int(seconds / 5)):
            clock[0] += 5
            made.on_step_begin(0, trials)
        return len(caplog.records)

    assert told(60) == 0 and told(60) == 1
    assert "no trial has started, and 2 wait: one asks Ray for 2.5 CPU, 3.7 GB, of it 0.5 CPU, 0.7 GB on" in caplog.text
    trials[0].status = Trial.RUNNING
    assert told(600) == 0, "the other one has its turn later"
    trials[0].status = Trial.TERMINATED
    assert told(60) == 0 and told(60) == 1
    trials[1].status = Trial.TERMINATED
    assert told(600) == 0


def test_an_attempt_never_takes_the_name_of_another(sweep: Sweep) -> None:
    assert sweep._attempt() == "attempt-0"
    for number in (1, 10):
        checkpoint(sweep.folder, number, 0, 1)
    assert sweep._attempt() == "attempt-11", "attempt-0 was deleted"


def test_what_a_trial_warns_of_is_said_where_a_user_reads_it(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Algorithm, "step", lambda self: {"updates": 1, "spend_limit": 1})
    trial = BoPO.__new__(BoPO)
    trial.refused, trial.overheard = "", Overheard()
    logging.getLogger("bopo_ray.rllib.collect").warning("env runner %d: gone", 2)
    logging.getLogger("bopo_ray.rllib.bopo").info("nothing to worry about")
    first, second = trial.step(), trial.step()
    trial.overheard.close()
    logging.getLogger("bopo_ray.rllib.collect").warning("of another process")
    assert first["warned"] == "env runner 2: gone" and "warned" not in second
    assert not trial.overheard.take()
    caplog.clear()
    sweep.refused = ""
    for result in (first, second):
        _Ledger(sweep, lambda: None).on_trial_result(1, [], "bopo-hybrid_lam0.3_seed0", result)
    assert caplog.messages == ["bopo-hybrid_lam0.3_seed0: env runner 2: gone"]
