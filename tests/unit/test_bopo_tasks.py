"""Which tasks an update plays: by class in its share, each task in its turn."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from bopo_ray.errors import ConfigError
from bopo_ray.method.taxonomy import BoundaryStats
from bopo_ray.rllib.bopo import BoPO, BoPOConfig

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
