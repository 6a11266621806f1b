"""Which runner an episode waits for."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bopo_ray.records import EpisodeSpec
from bopo_ray.rllib import collect
from bopo_ray.rllib.collect import Fleet, Lines
from tests.toy import toy_spec


def specs(tasks: int, members: int) -> list[EpisodeSpec]:
    """Group after group."""
    return [toy_spec(f"fetch/{task}", member=m) for task in range(tasks) for m in range(members)]


def shared(runners: list[int], waiting: list[EpisodeSpec]) -> Lines:
    lines = Lines()
    lines.share_among(runners)
    lines.extend(waiting)
    return lines


def in_turns(lines: Lines, runners: list[int], count: int = 1) -> dict[int, list[EpisodeSpec]]:
    """What each has taken when nothing is left."""
    taken: dict[int, list[EpisodeSpec]] = {runner: [] for runner in runners}
    while lines:
        for runner in runners:
            taken[runner] += lines.take(count, runner)
    return taken


def test_without_runners_it_is_one_queue() -> None:
    lines, waiting = Lines(), specs(3, 2)
    lines.extend(waiting)
    assert lines.take(4) == waiting[:4] and len(lines) == 2
    lines.extend(waiting[:1])
    assert lines.take(99) == [*waiting[4:], waiting[0]] and not lines.take(1)


def test_a_task_is_one_runners_while_all_have_work() -> None:
    runners, waiting = [1, 2, 3, 4], specs(200, 8)
    taken = in_turns(shared(runners, waiting), runners, 8)
    tasks = Counter((runner, s.task.name) for runner, own in taken.items() for s in own)
    assert sorted(s.id for own in taken.values() for s in own) == sorted(s.id for s in waiting)
    assert {len(own) for own in taken.values()} == {400}  # by stealing, in eights
    assert len(tasks) < 200 * 1.05  # a task that two have played is a rare one


def test_the_next_time_a_task_is_the_same_runners() -> None:
    first, second = (shared([1, 2], specs(50, 1)) for _ in range(2))
    assert first.take(20, 1) == second.take(20, 1)
    assert first.take(20, 2) == second.take(20, 2)


def test_a_line_is_played_in_the_order_that_it_came_and_others_take_from_its_end() -> None:
    lines = shared([7], waiting := specs(4, 3))
    assert lines.take(2, 8) == [waiting[-1], waiting[-2]]  # 8 is not known yet: it has no line
    assert lines.take(99, 7) == waiting[:-2]


def test_who_comes_takes_only_what_becomes_its_own_and_who_goes_leaves_the_others_theirs() -> None:
    waiting = specs(100, 1)
    two, three = ([shared(runners, []).owner(s) for s in waiting] for runners in ([1, 2], [3, 1, 2]))
    assert all(after in (before, 3) for before, after in zip(two, three, strict=True))
    assert set(two) == {1, 2} and set(three) == {1, 2, 3}
    lines = shared([1, 2], waiting)
    lines.share_among([1, 2, 3])
    assert lines.take(5, 3) == [s for s, owner in zip(waiting, three, strict=True) if owner == 3][:5]
    lines.share_among([2, 1])
    left = [s for s, owner in zip(waiting, two, strict=True) if owner == 1]
    assert lines.take(1, 1)[0] in left


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=40),
    st.lists(st.sets(st.integers(1, 5)), max_size=6),
)
def test_nothing_is_lost_or_given_twice_whoever_comes_and_goes(
    takes: list[tuple[int, int]], changes: list[set[int]]
) -> None:
    lines, waiting, taken = Lines(), specs(5, 3), list[EpisodeSpec]()
    lines.extend(waiting)
    for i, (count, runner) in enumerate(takes):
        if i < len(changes):
            lines.share_among(changes[i])
        taken += lines.take(count, runner)
        if taken and i % 7 == 6:
            lines.extend([taken.pop()])
    taken += lines.take(99)
    assert sorted(s.id for s in taken) == sorted(s.id for s in waiting) and not lines


def test_that_no_runner_is_there_is_said_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray looks for room without an end and without a word."""
    actor, clock = SimpleNamespace(), [1000.0]
    group = SimpleNamespace(
        num_remote_env_runners=lambda: 1,
        _worker_manager=SimpleNamespace(actors=lambda: {1: actor}),
        _remote_config=SimpleNamespace(num_envs_per_env_runner=4),
    )
    monkeypatch.setattr(collect.time, "monotonic", lambda: clock[0])
    fleet = Fleet(group, lambda result: None)  # type: ignore[arg-type]
    fleet.add(specs(3, 1))

    def told(seconds: float) -> int:
        caplog.clear()
        for _ in range(int(seconds / 5)):
            clock[0] += 5
            fleet._tell_of_absence()
        return len(caplog.records)

    assert (told(60), told(10), told(600)) == (0, 1, 9)
    assert "no env runner is there, and 3 episodes wait" in caplog.text and "ray status" in caplog.text
    fleet.seats[1].session = "alive"
    assert told(600) == 0
