"""Taxonomy and data synthesis: tables worked by hand, and what must hold for any rollouts."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bopo_ray.analysis.studies import EASY_SHARE
from bopo_ray.errors import GateError
from bopo_ray.method.synthesis import (
    Expert,
    choose_expert,
    class_weights,
    gate,
    reliable_policies,
    stratified_shares,
    task_gate,
)
from bopo_ray.method.taxonomy import BoundaryStats, boundary_stats, class_shares, classify, counts, easy_from
from bopo_ray.records import CostMode, Difficulty, Episode, EpisodeSpec, Phase, Step, StopReason
from envs.base import Split, Task

EASY, HARD, INTRACTABLE = Difficulty.EASY, Difficulty.HARD, Difficulty.INTRACTABLE


def episode(
    models: Sequence[int],
    success: bool,
    *,
    name: str = "boil/1",
    member: int = 0,
    phase: Phase = Phase.BOUNDARY,
    microusd: int = 10,
    outcome: float | None = None,
    policy: str = "fake",
) -> Episode:
    """An episode that called `models`, each call for `microusd`."""
    spec = EpisodeSpec(Task("Fake-v0", name, Split.TRAIN), phase, policy, 0, member, seed=0)
    steps = tuple(
        Step(
            model=m,
            probabilities=(0.5, 0.5),
            mask=(True, True),
            reply="reply",
            action="action",
            observation="observation",
            prompt_tokens=1,
            cached_tokens=0,
            completion_tokens=1,
            cost_microusd=microusd,
            lost_microusd=0,
            latency_s=0.0,
            router_s=0.0,
        )
        for m in models
    )
    u = float(success) if outcome is None else outcome
    return Episode(
        spec=spec,
        task_text="Boil water.",
        first_observation="A kitchen.",
        max_steps=30,
        steps=steps,
        outcome=u,
        success=success,
        score=100 * u,
        stop=StopReason.SUCCESS if success else StopReason.STEP_LIMIT,
    )


def stats(s_small: int, s_large: int, later: int = 0, task: str = "boil/1") -> BoundaryStats:
    return BoundaryStats(task, 5, 5, s_small, s_large, 1.0, 2.0, s_small / 5, s_large / 5, 10.0, later)


@pytest.mark.parametrize(
    ("s_small", "s_large", "later", "expected"),
    [
        (3, 0, 0, EASY),  # 3 of 5 by the small model
        (5, 5, 0, EASY),
        (2, 5, 0, HARD),  # one short of Easy
        (0, 1, 0, HARD),
        (1, 0, 0, HARD),  # only the small model ever succeeded
        (0, 0, 0, INTRACTABLE),
        (0, 0, 1, HARD),  # a later rollout succeeded
        (3, 5, 7, EASY),
    ],
)
def test_difficulty_table(s_small: int, s_large: int, later: int, expected: Difficulty) -> None:
    assert stats(s_small, s_large, later).difficulty() is expected


@pytest.mark.parametrize(
    ("mix", "tasks", "expected"),
    [
        # 6 of 180 tasks are Intractable: a thirtieth of the groups and not a quarter; Easy has a third of the tasks.
        ((2, 1, 1), (115, 59, 6), (1 - 1 / 4 - 1 / 30, 1 / 4, 1 / 30)),
        ((2, 1, 1), (8, 1, 1), (0.8, 0.1, 0.1)),  # both above their share of the tasks
        ((2, 1, 1), (10, 45, 45), (0.5, 0.25, 0.25)),  # neither
        ((2, 1, 1), (5, 5, 0), (2 / 3, 1 / 3, None)),  # weights of the classes that are there
        ((2, 1, 1), (9, 0, 1), (0.9, None, 0.1)),
        ((5, 3, 0), (50, 40, 10), (5 / 8, 3 / 8, None)),  # a class without a weight has no group
        ((2, 1, 1), (0, 3, 1), (None, 0.75, 0.25)),  # without Hard tasks the rest is Easy's
        ((2, 1, 1), (0, 0, 4), (None, None, 1.0)),
        ((0, 1, 1), (8, 1, 1), (None, 0.9, 0.1)),
        ((2, 0, 0), (0, 3, 1), (None, None, None)),
    ],
)
def test_shares_of_the_classes(
    mix: tuple[float, ...], tasks: tuple[int, ...], expected: tuple[float | None, ...]
) -> None:
    classes = (HARD, EASY, INTRACTABLE)
    shares = class_shares(dict(zip(classes, mix, strict=True)), dict(zip(classes, tasks, strict=True)))
    assert shares == pytest.approx({c: x for c, x in zip(classes, expected, strict=True) if x is not None})


@given(
    mix=st.lists(st.floats(0, 9), min_size=3, max_size=3), tasks=st.lists(st.integers(0, 99), min_size=3, max_size=3)
)
def test_no_class_but_hard_has_more_than_its_share_of_the_tasks(mix: list[float], tasks: list[int]) -> None:
    classes = (HARD, EASY, INTRACTABLE)
    shares = class_shares(dict(zip(classes, mix, strict=True)), dict(zip(classes, tasks, strict=True)))
    assert not shares or sum(shares.values()) == pytest.approx(1)
    assert all(x >= 0 for x in shares.values())
    if HARD in shares:
        assert all(shares.get(c, 0) <= n / sum(tasks) + 1e-9 for c, n in zip(classes[1:], tasks[1:], strict=True))


@pytest.mark.parametrize(
    ("k", "successes", "expected"),
    [(1, 1, EASY), (1, 0, HARD), (2, 2, EASY), (2, 1, HARD), (3, 2, EASY), (10, 5, HARD)],
)
def test_a_task_is_easy_from_three_successes_of_five_however_many_rollouts_there_are(
    k: int, successes: int, expected: Difficulty
) -> None:
    """From three of any number, no task could be Easy by two rollouts."""
    own = BoundaryStats("boil/1", k, k, successes, k, 1.0, 2.0, successes / k, 1.0, 10.0)
    assert own.difficulty() is expected and classify([own]) == {"boil/1": expected}


def test_the_evaluations_classes_have_the_same_threshold() -> None:
    for k in range(1, 40):
        assert [s / k >= EASY_SHARE for s in range(k + 1)] == [s >= easy_from(k) for s in range(k + 1)], k


def test_threshold_is_an_option_and_zero_is_refused() -> None:
    assert stats(2, 5).difficulty(easy_at=2) is EASY
    with pytest.raises(ValueError, match="easy_at=0"):
        stats(0, 0).difficulty(easy_at=0)


def test_promotion_keeps_counts_and_leaves_the_original() -> None:
    before = stats(0, 0)
    after = before.promoted(0).promoted(2).promoted(1)
    assert (before.difficulty(), before.promoted(0).difficulty(), after.difficulty()) == (
        INTRACTABLE,
        INTRACTABLE,
        HARD,
    )
    assert (after.later_successes, before.later_successes) == (3, 0)
    with pytest.raises(ValueError, match="n=-1"):
        before.promoted(-1)


@pytest.mark.parametrize(("s_small", "s_large", "later"), [(6, 0, 0), (0, -1, 0), (0, 0, -1)])
def test_impossible_counts_are_refused(s_small: int, s_large: int, later: int) -> None:
    with pytest.raises(ValueError, match=r"boil/1: (successes_|later)"):
        stats(s_small, s_large, later)


def test_boundary_stats_by_hand() -> None:
    small = [episode([0] * 4, False, outcome=0.3), episode([0] * 2, True)]
    large = [episode([1] * 2, True, microusd=50), episode([1] * 3, True, microusd=50), episode([1], False, microusd=50)]
    usd = boundary_stats(small, large, CostMode.USD)
    # small: costs 40 and 20 -> 30; u 0.3 and 1 -> 0.65. large: 100, 150, 50 -> 100; u 2/3; steps (2+3+1)/3 = 2
    assert usd == BoundaryStats("boil/1", 2, 3, 1, 2, 30.0, 100.0, 0.65, 2 / 3, 2.0)
    calls = boundary_stats(small, large, CostMode.CALLS)
    assert (calls.cost_small, calls.cost_large, calls.steps_large) == (0.0, 2.0, 2.0)


def test_boundary_stats_refuses_mixed_tasks_and_missing_sides() -> None:
    one, other = episode([0], True), episode([1], True, name="melt/2")
    for small, large in (([one], [other]), ([], [one]), ([one], [])):
        with pytest.raises(ValueError, match="need one task"):
            boundary_stats(small, large, CostMode.USD)


def test_classify_and_counts() -> None:
    labels = classify([stats(4, 4, task="a"), stats(0, 3, task="b"), stats(1, 1, task="c")])
    assert labels == {"a": EASY, "b": HARD, "c": HARD}
    assert counts(labels) == {EASY: 1, HARD: 2, INTRACTABLE: 0}
    assert classify([stats(2, 4, task="a")], easy_at=2) == {"a": EASY}


def test_stratified_shares() -> None:
    assert stratified_shares(4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len(stratified_shares()) == 11
    with pytest.raises(ValueError, match="n=0"):
        stratified_shares(0)


def test_hard_expert_is_the_cheapest_success_of_the_strata() -> None:
    small = [episode([0, 0], True)]  # by luck, and cheaper than all, but it had five chances where a stratum has one
    large = [episode([1] * 6, True, microusd=50)]  # 300 micro-dollars, 6 large calls
    mixed = [
        episode([0, 1, 0], False, member=0, phase=Phase.STRATIFIED),  # cheapest of all, but a failure
        episode([0, 1, 1, 0], True, member=1, phase=Phase.STRATIFIED, microusd=20),  # 80, 2 large calls
        episode([0, 1] + [0] * 8, True, member=2, phase=Phase.STRATIFIED, microusd=20),  # 200, 1 large call
    ]
    usd = choose_expert(HARD, small, large, mixed, CostMode.USD)
    calls = choose_expert(HARD, small, large, mixed, CostMode.CALLS)
    assert usd is not None and (usd.episode, usd.labels, usd.difficulty) == (mixed[1], (0, 1, 1, 0), HARD)
    assert calls is not None and calls.episode is mixed[2]


def test_hard_expert_falls_back_to_large_then_to_intractable() -> None:
    small, failed = [episode([0, 0], False)], [episode([1, 0], False, phase=Phase.STRATIFIED)]
    large = [episode([1] * 4, True, member=0), episode([1] * 3, True, member=1), episode([1], False, member=2)]
    best = choose_expert(HARD, small, large, failed, CostMode.USD)
    assert best is not None and (best.episode, best.labels) == (large[1], (1, 1, 1))
    none = choose_expert(HARD, small, [], failed, CostMode.USD)
    assert none is not None and (none.episode, none.labels, none.difficulty) == (small[0], (0, 0), INTRACTABLE)
    lucky = [episode([0, 0], True)]
    assert choose_expert(HARD, lucky, large, failed, CostMode.USD) == best


def rollouts(policy: str, wins: int, of: int, microusd: int) -> list[Episode]:
    """One-call episodes of a policy, the first `wins` of them won."""
    return [episode([1], i < wins, member=i, microusd=microusd, policy=policy) for i in range(of)]


def test_reliable_policies_by_hand() -> None:
    # share of wins and cost: small .2 at 10, first .6 at 20, random .6 at 40 (first is as good and cheaper), half .5 at
    # 50 (beaten by first), large .8 at 90
    tried = [
        *rollouts("small", 2, 10, 10), *rollouts("first", 3, 5, 20), *rollouts("random", 3, 5, 40),
        *rollouts("half", 5, 10, 50), *rollouts("large", 8, 10, 90),
    ]  # fmt: skip
    assert reliable_policies(tried, CostMode.USD) == {"first", "large"}  # small: 0.2 < 0.5 * 0.8
    assert reliable_policies(tried, CostMode.USD, 0.25) == {"small", "first", "large"}  # 0.2 is a quarter of 0.8
    assert reliable_policies(tried, CostMode.USD, 1.0) == {"large"}
    assert reliable_policies(tried, CostMode.USD, 0.0) is None
    assert reliable_policies(reversed(tried), CostMode.USD) == {"first", "large"}
    assert reliable_policies([], CostMode.USD) == frozenset()
    same = [*rollouts("a", 1, 2, 10), *rollouts("b", 1, 2, 10)]
    assert reliable_policies(same, CostMode.USD) == {"a", "b"}  # neither beats the other
    with pytest.raises(ValueError, match=r"share=1\.5"):
        reliable_policies(tried, CostMode.USD, 1.5)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans(), st.integers(1, 9)), min_size=1), st.floats(0.01, 1.0))
def test_of_policies_with_episodes_one_at_least_is_reliable(tried: list[tuple[str, bool, int]], share: float) -> None:
    played = [episode([1], ok, member=i, microusd=c, policy=name) for i, (name, ok, c) in enumerate(tried)]
    assert reliable_policies(played, CostMode.USD, share)


def test_an_unreliable_success_is_imitated_only_where_there_is_no_other() -> None:
    lucky = episode([0, 0], True, policy="always-small")
    sound = episode([1, 0], True, policy="first-large(1)", microusd=50)
    chosen = choose_expert(HARD, [lucky], [], [sound], CostMode.USD, {"first-large(1)"})
    assert chosen is not None and chosen.episode is sound
    chosen = choose_expert(HARD, [lucky], [], [episode([1], False)], CostMode.USD, {"first-large(1)"})
    assert chosen is not None and (chosen.episode, chosen.difficulty) == (lucky, HARD)


@pytest.mark.parametrize("difficulty", [EASY, INTRACTABLE])
def test_easy_and_intractable_teach_small(difficulty: Difficulty) -> None:
    small = [episode([0] * 2, False, member=0), episode([0] * 5, True, member=1), episode([0] * 4, True, member=2)]
    large = [episode([1], True)]
    expert = choose_expert(difficulty, small, large, [], CostMode.USD)
    assert expert is not None and (expert.episode, expert.labels) == (small[2], (0, 0, 0, 0))
    assert expert.difficulty is difficulty
    assert choose_expert(difficulty, [], large, [], CostMode.USD) is None


def test_ties_go_to_fewer_steps_then_to_the_smaller_id() -> None:
    # in calls mode both cost 1; b has fewer steps than a; c equals b but for its id
    a, b, c = (
        episode([1, 0, 0], True, member=0),
        episode([1, 0], True, member=1),
        episode([0, 1], True, member=2),
    )
    for order in ([a, b, c], [c, b, a], [c, a, b]):
        expert = choose_expert(HARD, [], [], order, CostMode.CALLS)
        assert expert is not None and expert.episode is b


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=6), st.booleans()), max_size=8), st.randoms()
)
def test_no_success_is_cheaper_than_the_hard_expert(rollouts: list[tuple[list[int], bool]], rnd: object) -> None:
    pool = [episode(models, ok, member=i) for i, (models, ok) in enumerate(rollouts)]
    expert = choose_expert(HARD, [], [], pool, CostMode.CALLS)
    wins = [e.large_calls for e in pool if e.success]
    assert (expert is None) == (not wins)
    if expert is not None:
        assert expert.episode.success and expert.episode.large_calls == min(wins)
        rnd.shuffle(pool)  # type: ignore[attr-defined]
        assert choose_expert(HARD, [], [], pool, CostMode.CALLS) == expert


def test_expert_needs_a_label_for_each_step() -> None:
    with pytest.raises(ValueError, match="1 labels for 2 steps"):
        Expert(episode([0, 0], True), (0,), EASY)


def test_class_weights_by_hand() -> None:
    # 2 Hard of 10: share 0.2 < 1/3 -> Hard (1/3)/0.2 = 5/3, others (2/3)/0.8 = 5/6; Hard carries 2 * 5/3 of 10 = 1/3
    weights = class_weights({HARD: 2, EASY: 5, INTRACTABLE: 3})
    assert weights == pytest.approx({HARD: 5 / 3, EASY: 5 / 6, INTRACTABLE: 5 / 6})
    for steps in ({HARD: 2, EASY: 1}, {HARD: 1, EASY: 2}, {EASY: 2}, {HARD: 1}, {}):  # has a third already, or is all
        assert set(class_weights(steps).values()) == {1.0}, steps
    with pytest.raises(ValueError, match=r"hard_share=1\.0"):
        class_weights({HARD: 1}, hard_share=1.0)


@given(st.dictionaries(st.sampled_from(list(Difficulty)), st.integers(1, 200), min_size=1), st.floats(0, 0.95))
def test_class_weights_have_mean_one_and_hard_gets_its_share(steps: dict[Difficulty, int], share: float) -> None:
    weights, total = class_weights(steps, share), sum(steps.values())
    assert sum(n * weights[d] for d, n in steps.items()) == pytest.approx(total) and min(weights.values()) > 0
    assert weights[HARD] >= 1 - 1e-12 and weights[EASY] == weights[INTRACTABLE] <= 1 + 1e-12
    if HARD in steps:
        assert steps[HARD] * weights[HARD] >= share * total - 1e-9


def test_gate_lets_through_refuses_and_is_overridden() -> None:
    assert gate([0.05, 0.15]) == pytest.approx(0.1)
    assert gate([0.02, 0.04], override=True) == pytest.approx(0.03)
    with pytest.raises(GateError) as caught:
        gate(np.array([0.02, 0.04]))
    message = str(caught.value)
    assert "0.030" in message and "0.1" in message and "--ignore-gate" in message and "\n" not in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


@pytest.mark.parametrize(
    ("easy", "intractable", "advice"),
    [
        (32, 0, "the small model alone wins nearly all; take harder tasks, a weaker --small or fewer --max-steps, "
         "or go"),
        (0, 32, "no model wins any; take easier tasks or a stronger --large, or go"),
        (20, 12, "for the first take harder tasks, a weaker --small or fewer --max-steps, for the others easier tasks "
         "or a stronger --large, or go"),
    ],
)  # fmt: skip
def test_tasks_of_which_none_is_hard_are_refused_by_what_they_are(easy: int, intractable: int, advice: str) -> None:
    tasks = {EASY: easy, HARD: 0, INTRACTABLE: intractable}
    with pytest.raises(GateError) as caught:
        task_gate(tasks)
    said = str(caught.value)
    assert said.startswith(
        f"no Hard training task among 32 ({easy} Easy, {intractable} Intractable), so there is nothing to route: "
    )
    assert said.endswith(f"{advice} on with --ignore-gate") and "\n" not in said
    task_gate(tasks, override=True)
    task_gate(tasks | {HARD: 1})


def test_gate_without_hard_states_refuses() -> None:
    with pytest.raises(GateError, match="no Hard training state"):
        gate([])
    assert math.isnan(gate([], override=True))
