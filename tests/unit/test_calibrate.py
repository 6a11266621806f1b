"""What is chosen on dev tasks: under the run's budget, in the run's unit of cost, as the router decides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bopo_ray.analysis.pareto import Reference, hypervolume, pareto_front
from bopo_ray.pipeline import calibrate
from bopo_ray.pipeline.baselines import DEFAULT_ROUTERS, Policy
from bopo_ray.pipeline.calibrate import (
    BIAS,
    SCHEDULE_STEPS,
    Tried,
    best_schedules,
    for_each_lambda,
    front_choice,
    offsets_at,
)
from bopo_ray.pipeline.run import Run
from bopo_ray.pipeline.settings import Settings
from bopo_ray.records import CostMode, Episode, EpisodeSpec, Phase
from bopo_ray.routers import ALWAYS_LARGE, ALWAYS_SMALL, parse_router
from bopo_ray.store import EpisodeStore
from envs.base import Split, Task
from tests.unit.test_baselines import played

P_LARGE = (0.3, 0.1, 0.6, 0.2)
"""Of the router as it is, at the four steps of each task."""
NEEDED = {"a": (2,), "b": (0, 2)}
"""The steps at which a task needs the large model."""
BOTH = 1.12
"""The offset with which it has half of the steps, those of b: between -log(0.3/0.7) and -log(0.2/0.8)."""
ROUTER = Policy("x", "bosft", folder=Path("policies/x"))


class Played:
    """As much of a run as chooses on dev tasks."""

    def __init__(self, folder: Path, settings: Settings, costs: tuple[int, int] = (10, 100)) -> None:
        self.folder, self.settings, self.costs = folder, settings, costs
        self.console, self.mode = Console(quiet=True), CostMode(settings.cost)

    def store(self, name: str) -> EpisodeStore:
        return EpisodeStore(self.folder / name, "prices")

    def tasks(self, split: Split, n: int) -> tuple[Task, ...]:
        return tuple(Task("T", name, split) for name in NEEDED)

    def play(self, _: str, store: EpisodeStore, specs: Sequence[EpisodeSpec], weights: Any = None) -> None:
        store.append([self._episode(spec, weights) for spec in store.missing(specs)])

    def _episode(self, spec: EpisodeSpec, weights: Any) -> Episode:
        models = list[int]()
        for wanted in self._wanted(spec.router, weights):
            models.append(int(wanted and (spec.budget is None or sum(models) < spec.budget.cap)))
        e = played(spec.policy, spec.task.name, all(models[i] for i in NEEDED[spec.task.name]), *models)
        steps = (
            dataclasses.replace(s, probabilities=(1 - p, p), cost_microusd=self.costs[s.model])
            for s, p in zip(e.steps, P_LARGE, strict=True)
        )
        return dataclasses.replace(e, spec=spec, steps=tuple(steps))

    @staticmethod
    def _wanted(router: str, weights: Any) -> Iterator[bool]:
        first, last = (int(router[len(f) + 1 : -1]) if router.startswith(f) else 0 for f in FAMILIES)
        for i, p in enumerate(P_LARGE):
            if router in (ALWAYS_SMALL, ALWAYS_LARGE) or first or last:
                yield router == ALWAYS_LARGE or i < first or i >= len(P_LARGE) - last
            else:
                yield math.log(p / (1 - p)) + weights[BIAS][1] > 0


FAMILIES = ("first-large", "last-large")


@pytest.fixture(autouse=True)
def as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no saved router: its weights hold an offset alone."""
    monkeypatch.setattr(calibrate, "load_policy", lambda *_: {BIAS: np.zeros(2, np.float32)})


def chosen(run: Played) -> dict[float | None, Tried]:
    """By lambda, what one router gets."""
    wanted = for_each_lambda(ROUTER, run.settings)
    found = calibrate._choose(cast(Run, run), wanted)
    return {p.lam: found[p.name] for p in wanted}


def test_an_offset_is_chosen_under_the_cap_that_the_evaluation_is_under(tmp_path: Path) -> None:
    """Without one, BOTH wins both tasks; under one call that is spent at the first step, and wins none."""
    free = Settings(shares=(0.5,), lambdas=(0.1,))
    capped = dataclasses.replace(free, budget_calls=1)
    assert chosen(Played(tmp_path, free)) == {0.1: Tried(BOTH)}
    again = Played(tmp_path, capped)
    assert chosen(again) == {0.1: Tried(0.0)}, "also where an older version left its episodes without a cap"
    assert chosen(Played(tmp_path / "fresh", capped)) == {0.1: Tried(0.0)}
    uncapped = [e.spec.policy for e in Played(tmp_path / "fresh", capped).store("dev").read() if e.spec.budget is None]
    assert uncapped == ["x_offset0"] * 2, "which say how often it wants to call, where no mask is in the way"


def test_a_cap_of_nothing_leaves_offsets_to_choose_from(tmp_path: Path) -> None:
    assert chosen(Played(tmp_path, Settings(shares=(0.5,), lambdas=(0.1,), budget_calls=0))) == {0.1: Tried(0.0)}


@pytest.mark.parametrize("costs", [(0, 0), (100, 10)], ids=["free models", "a dear small model"])
def test_a_front_is_one_of_calls_where_calls_are_the_cost(tmp_path: Path, costs: tuple[int, int]) -> None:
    """In dollars the first would have no width, and in the second the larger lambda would get the more calls."""
    s = Settings(cost="calls", share_rule="front", shares=(0.5,), lambdas=(0.1, 0.8), train_lambdas=(0.3,))
    assert chosen(Played(tmp_path, s, costs)) == {0.1: Tried(BOTH), 0.8: Tried(0.0)}


def test_a_front_of_models_that_cost_nothing_has_some_width(tmp_path: Path) -> None:
    s = Settings(share_rule="front", shares=(0.5,), lambdas=(0.1,), train_lambdas=(0.3,))
    assert chosen(Played(tmp_path, s, (0, 0))) == {0.1: Tried(BOTH)}


POINT = st.tuples(st.integers(0, 12), st.integers(0, 8)).map(lambda p: (float(p[0]), p[1] / 8))


@given(st.lists(POINT, min_size=1, max_size=12), POINT, POINT, st.integers(1, 4))
def test_a_front_choice_is_the_first_of_the_best_of_all_sets(
    drawn: list[tuple[float, float]], small: tuple[float, float], large: tuple[float, float], size: int
) -> None:
    """Of coarse points, in whole eighths, many sets are as good."""
    points = {f"p{i}": p for i, p in enumerate(drawn)}
    front = sorted(pareto_front(*zip(*drawn, strict=True)).tolist())
    if len(front) < size:
        return
    reference = Reference(max(small[0], large[0]) or 1.0)

    def volume(chosen: tuple[int, ...]) -> float:
        return hypervolume(*zip(small, large, *(drawn[i] for i in chosen), strict=True), reference)

    best = max(combinations(front, size), key=volume)
    dearest_first = sorted(best, key=lambda i: drawn[i], reverse=True)
    found = front_choice(points, [small, large], range(size))
    assert found == {lam: f"p{i}" for lam, i in enumerate(dearest_first)}


def test_a_front_of_many_points_is_chosen_from_at_once_and_once_for_each_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of these there are 5e11 sets."""
    points = {f"p{i}": (i / 60, math.sqrt(i / 60)) for i in range(1, 61)}
    lambdas = [i / 10 for i in range(10)]
    assert len(set(front_choice(points, [(0.0, 0.0), (1.0, 1.0)], lambdas).values())) == 10
    asked = list[int]()
    monkeypatch.setattr(calibrate, "front_choice", lambda *a: asked.append(len(a[0])) or front_choice(*a))
    s = Settings(share_rule="front", shares=(0.5,), lambdas=(0.1, 0.3, 0.8), train_lambdas=(0.3,))
    chosen(Played(tmp_path, s))
    assert asked == [2]


def test_a_router_that_draws_is_tried_with_the_offsets_for_that(tmp_path: Path) -> None:
    run = Played(tmp_path, Settings(decide="sample", shares=(0.5,), lambdas=(0.1,)))
    chosen(run)
    p_N2 = np.stack([1 - np.array(P_LARGE), P_LARGE], 1)
    (offset,) = offsets_at(p_N2, (0.5,), greedy=False)
    names = {e.spec.policy for e in run.store("dev").read(Phase.SELECTION)} - {ALWAYS_SMALL, ALWAYS_LARGE}
    assert names == {"x_offset0", Tried(offset).name_of("x")} and offset != BOTH


@pytest.mark.parametrize(("cap", "best"), [(None, "always-large"), (1, "last-large(2)")])
def test_the_best_schedule_is_the_best_under_the_cap_of_the_evaluation(
    tmp_path: Path, cap: int | None, best: str
) -> None:
    """Task a needs LARGE at its third step, b at its first, too: with one call only who waits wins one of them."""
    run = Played(tmp_path, Settings(max_steps=4, lambdas=(0.1,), budget_calls=cap))
    assert [p.router for p in best_schedules(cast(Run, run))] == [best]
    assert {e.spec.budget for e in run.store("dev").read()} == {run.settings.budget}


def test_the_best_schedules_are_chosen_by_the_rule_of_routers_and_among_their_limits(tmp_path: Path) -> None:
    """By price both lambdas would have the same; LARGE at the third step alone wins a, at the first three b as well."""
    s = Settings(max_steps=4, lambdas=(0.1, 0.3), shares=(0.5,), share_rule="front", call_limits=(3,))
    front = [p.router for p in best_schedules(cast(Run, Played(tmp_path / "front", s)))]
    assert front == ["first-large(3)", "last-large(2)"]
    by_price = dataclasses.replace(s, share_rule="price")
    assert len({p.router for p in best_schedules(cast(Run, Played(tmp_path / "price", by_price)))}) == 1


def test_the_schedules_of_each_evaluation_are_among_those_that_the_best_are_chosen_from() -> None:
    """Else the fairest of the baselines is weaker than its own family."""
    for name in map(parse_router, DEFAULT_ROUTERS):
        if name.family in SCHEDULE_STEPS:
            assert name.argument in SCHEDULE_STEPS[name.family], name
