"""Which tasks an update plays, by class in its share, each task in its turn; and what it draws for each group."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bopo_ray.errors import ConfigError
from bopo_ray.method.reward import CostRange
from bopo_ray.method.taxonomy import BoundaryStats
from bopo_ray.records import CostMode, Difficulty, Episode, EpisodeSpec
from bopo_ray.rllib import bopo as module
from bopo_ray.rllib.bopo import BoPO, BoPOConfig, Boundary
from envs.base import Split, Task
from tests.unit.test_method_data import episode

SUCCESSES = {"hard": (0, 3), "easy": (5, 5), "intractable": (0, 0)}


def algorithm(hard: int, easy: int, intractable: int, **settings: Any) -> Any:
    """As much of BoPO as chooses tasks, named CLASS/NUMBER."""
    made: Any = BoPO.__new__(BoPO)
    made.config, made.updates, made.promotions = BoPOConfig(), 0, {}
    made.config.update_from_dict({"tasks_per_update": 8, "seed": 0} | settings)
    numbers = {"hard": hard, "easy": easy, "intractable": intractable}
    made.boundaries = {
        name: SimpleNamespace(stats=BoundaryStats(name, 5, 5, small, large, 1.0, 2.0, small / 5, large / 5, 10.0))
        for kind, (small, large) in SUCCESSES.items()
        for name in (f"{kind}/{i}" for i in range(numbers[kind]))
    }
    return made


def chosen(bopo: Any, updates: int) -> list[list[str]]:
    out = []
    for bopo.updates in range(updates):
        out.append(bopo._choose_tasks())
    return out


def test_a_few_intractable_tasks_have_few_groups_and_hard_ones_come_in_turn() -> None:
    played = chosen(algorithm(115, 59, 6), 60)
    assert all(len(tasks) == 8 == len(set(tasks)) for tasks in played)
    tasks = Counter(name for update in played for name in update)
    classes = Counter(name.partition("/")[0] for name in tasks.elements())
    assert classes["intractable"] == pytest.approx(480 / 30, abs=2) and classes["easy"] == pytest.approx(120, abs=2)
    for kind, number in (("hard", 115), ("easy", 59), ("intractable", 6)):
        turns = [tasks[f"{kind}/{i}"] for i in range(number)]
        assert max(turns) - min(turns) <= 1, kind
    shares = [sum(name.startswith("hard") for name in update) for update in played]
    assert min(shares) >= 4, "each update has its Hard tasks"


def test_the_choice_depends_on_seed_and_update_alone() -> None:
    restored = algorithm(9, 5, 2)
    restored.updates = 6
    assert restored._choose_tasks() == chosen(algorithm(9, 5, 2), 7)[6]
    assert chosen(algorithm(9, 5, 2), 7) != chosen(algorithm(9, 5, 2, seed=1), 7)


def test_without_a_class_that_has_a_weight_nothing_can_be_played() -> None:
    with pytest.raises(ConfigError, match=r"difficulty_mix=.*none of the classes .*easy"):
        chosen(algorithm(0, 3, 0, difficulty_mix={"hard": 1}), 1)


def test_a_task_is_easy_by_the_rollouts_that_there_are() -> None:
    bopo = algorithm(1, 0, 0)
    bopo.boundaries["hard/0"].stats = BoundaryStats("hard/0", 2, 2, 2, 2, 1.0, 2.0, 1.0, 1.0, 10.0)
    assert bopo.difficulty("hard/0") is Difficulty.EASY


class Fleet:
    """Plays each episode as soon as it is asked for."""

    due: tuple[str, ...] = ()

    def __init__(self, bopo: Any) -> None:
        self.bopo, self.specs = bopo, list[EpisodeSpec]()

    def add(self, specs: Iterable[EpisodeSpec]) -> None:
        self.specs += specs

    def play(self, *_: object) -> None:
        for spec in self.specs:
            self.bopo._arrived(SimpleNamespace(spec=spec))


def test_a_task_that_comes_twice_in_an_update_has_other_draws_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same ones the second group is the first again, and counts double."""
    monkeypatch.setattr(module, "module_state", lambda _: None)
    bopo = algorithm(2, 0, 0, group_size=2, seed=3)
    for name, boundary in bopo.boundaries.items():
        boundary.task = Task("T", name, Split.TRAIN)
    bopo.updates, bopo.open, bopo.fleet = 7, {}, Fleet(bopo)
    groups = bopo._play_groups(["hard/0", "hard/1", "hard/0", "hard/0"], "p")
    assert list(groups) == [7 * 8, 7 * 8 + 1, 7 * 8 + 2, 7 * 8 + 3]
    drawn = [{(r.spec.stream, r.spec.call_sample) for r in group} for group in groups.values()]
    assert len(set.union(*drawn)) == 4 * 2
    samples = [{r.spec.sample for r in group} for group in groups.values()]
    assert samples[:2] == [{4_000_007}] * 2 and len(set.union(*samples)) == 3, "one for the members of a group"


def test_each_group_of_a_task_pulls_towards_a_boundary_rollout_of_its_own_draw() -> None:
    bopo = algorithm(0, 0, 0)
    small = [episode([0] * 4, False, member=i) for i in range(5)]
    large = [episode([1] * 2, True, member=i) for i in range(5)]
    bopo.boundaries = {"boil/1": Boundary(small, large, CostMode.USD)}
    bopo.ranges, bopo.metrics = {"boil/1": CostRange(20, 40)}, SimpleNamespace(log_value=lambda *_, **__: None)

    def pulled(nth: int) -> Episode:
        spec = dataclasses.replace(small[0].spec, sample=bopo._sample(nth))
        group = bopo._group([dataclasses.replace(e, spec=spec) for e in small[:2]], stale=False)
        ((found, _),) = group.anchors
        return found

    rng = np.random.default_rng(module.spawn_seed("anchors", 0, 0, "boil/1"))
    assert pulled(0) is large[int(rng.integers(5))]
    assert len({pulled(nth).spec.member for nth in range(9)}) > 1


def test_the_share_of_large_calls_is_one_of_all_models_but_the_smallest() -> None:
    bopo, logged = algorithm(0, 0, 0), dict[Any, float]()
    bopo.difficulty = lambda _: Difficulty.HARD
    bopo.metrics = SimpleNamespace(log_value=lambda key, value, **_: logged.setdefault(key, value))
    e = episode([0, 1, 2, 0], True)
    three = tuple(dataclasses.replace(s, probabilities=(0.4, 0.3, 0.3)) for s in e.steps)
    bopo._log_rollouts([dataclasses.replace(e, steps=three)])
    assert logged["rollouts", "share_large"] == 0.5
