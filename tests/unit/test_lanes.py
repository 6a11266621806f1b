"""Lanes take turns on one thread: who waits, who goes on, what is shared, and where an error arrives."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from bopo_ray import lanes as module
from bopo_ray.lanes import Busy, Lanes, aside, finish, result, together


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    made = Lanes(workers=8)
    yield made
    assert made.close(10)


def play(lanes: Lanes, *work: Callable[[], object]) -> list[object]:
    """What came of each, all begun before any of them goes on."""
    done: list[Future[object]] = [Future() for _ in work]

    def run(i: int) -> None:
        try:
            done[i].set_result(work[i]())
        except BaseException as error:
            done[i].set_exception(error)

    lanes.ask(lambda: [lanes.start(lambda i=i: run(i)) for i in range(len(work))])  # type: ignore[misc]
    return [future.exception(10) or future.result() for future in done]


def double(items: Sequence[int]) -> list[int]:
    BATCHES.append(list(items))
    return [2 * item for item in items]


BATCHES: list[list[int]] = []


@pytest.fixture(autouse=True)
def afresh() -> None:
    BATCHES.clear()
    module._LOAD.begin()


def test_outside_of_a_lane_they_just_call() -> None:
    assert aside(threading.get_ident) == threading.get_ident()
    assert together(double, 4) == 8 and BATCHES == [[4]]
    with pytest.raises(ZeroDivisionError):
        aside(divmod, 1, 0)
    with pytest.raises(KeyError, match="one"):
        together(lambda _: [KeyError("one")], 1)


def test_all_lanes_are_on_one_thread_and_what_takes_its_time_is_not(lanes: Lanes) -> None:
    def work() -> tuple[int, int, int]:
        return threading.get_ident(), aside(threading.get_ident), threading.get_ident()

    seen = play(lanes, *[work] * 5)
    (own,) = {before for before, _, _ in seen}  # type: ignore[misc]
    assert {after for _, _, after in seen} == {own} and own != threading.get_ident()  # type: ignore[misc]
    assert all(elsewhere not in (own, threading.get_ident()) for _, elsewhere, _ in seen)  # type: ignore[misc]


def test_a_lane_that_waits_holds_nobody(lanes: Lanes) -> None:
    order: list[str] = []
    free = threading.Event()

    def slow() -> None:
        aside(free.wait, 10)
        order.append("slow")

    def quick() -> None:
        aside(time.sleep, 0.001)
        order.append("quick")
        free.set()

    play(lanes, slow, quick)
    assert order == ["quick", "slow"]


def test_what_is_wanted_at_the_same_moment_is_one_call(lanes: Lanes) -> None:
    answers = play(lanes, *[lambda i=i: together(double, i) for i in range(6)])
    assert answers == [0, 2, 4, 6, 8, 10] and BATCHES == [[0, 1, 2, 3, 4, 5]]


def test_of_a_bounded_call_the_first_are_on_their_way_before_the_next(lanes: Lanes) -> None:
    def work(i: int) -> int:
        return together(double, 100 + together(double, i, at_most=2))

    answers = play(lanes, *[lambda i=i: work(i) for i in range(5)])
    assert answers == [2 * (100 + 2 * i) for i in range(5)]
    assert BATCHES == [[0, 1], [100, 102], [2, 3], [104, 106], [4], [108]]


def test_where_the_thread_is_busy_more_share_a_bounded_call(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_S", 60.0)
    monkeypatch.setattr(module, "CROWD", 3)
    module._LOAD.busy = 0.75  # half way from 1 to 3 times 2
    answers = play(lanes, *[lambda i=i: together(double, i, at_most=2) for i in range(5)])
    assert answers == [0, 2, 4, 6, 8] and BATCHES == [[0, 1, 2, 3], [4]]


def test_where_the_thread_is_busy_a_bounded_call_waits_a_little_for_more(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW_S", 60.0)
    monkeypatch.setattr(module, "GATHER_S", 30.0)
    free = threading.Event()

    def soon() -> int:
        answer = together(double, 0, at_most=9)
        free.set()
        return answer

    def late() -> int:
        aside(free.wait, 0.2)
        return together(double, 1, at_most=9)

    assert play(lanes, soon, late) == [0, 2]
    assert BATCHES == [[0], [1]]  # it has time, and waits for nobody
    free.clear()
    module._LOAD.busy = 1.0
    assert play(lanes, soon, late) == [0, 2]
    assert BATCHES[2:] == [[0, 1]]  # at once when no lane is left that could come
    free.clear()
    monkeypatch.setattr(module, "GATHER_S", 0.01)
    module._LOAD.busy = 0.75
    assert play(lanes, lambda: together(double, 0, at_most=9), late) == [0, 2]
    assert BATCHES[3:] == [[0], [1]]


def test_where_the_thread_is_busy_a_bounded_call_of_enough_waits_for_nobody(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW_S", 60.0)
    monkeypatch.setattr(module, "GATHER_S", 30.0)
    free = threading.Event()
    module._LOAD.busy = 1.0

    def soon(i: int) -> int:
        answer = together(double, i, at_most=2)
        free.set()
        return answer

    def late() -> int:
        assert aside(free.wait, 20)
        return together(double, 2, at_most=2)

    assert play(lanes, lambda: soon(0), lambda: soon(1), late) == [0, 2, 4]
    assert BATCHES == [[0, 1], [2]]


def test_the_thread_sees_how_busy_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    load, seen = module._Load(), []
    for work_s in (0.1, 0.1, 0.8, 0.0):
        before, now = now, now + 0.2  # so long nothing is to be done
        load.waited(before)
        seen.append(load.busy)
        now += work_s
    # Windows end when a quarter of a second is over: 0.4 of 0.5 s idle, 0.2 of 0.3, 0.2 of 1.0.
    assert seen == pytest.approx([0.0, 0.2, 1 / 3, 0.8])


class InUse:
    """Refuses its first calls."""

    def __init__(self, times: int) -> None:
        self.left, self.asked = times, list[list[int]]()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.asked.append(list(items))
        if self.left:
            self.left -= 1
            raise Busy
        return double(items)


@pytest.mark.parametrize("at_most", [0, 2])
def test_while_what_they_want_is_in_use_other_lanes_have_their_turns(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch, at_most: int
) -> None:
    monkeypatch.setattr(module, "PAUSE_S", (0.2, 0.2))
    monkeypatch.setattr(module.random, "random", lambda: 1.0)
    shared, order = InUse(times=1), list[str]()

    def wants(item: int) -> int:
        found = together(shared, item, at_most)
        order.append(f"has {found}")
        return found

    def other() -> None:
        aside(time.sleep, 0.02)
        order.append("other")
        together(shared, 7, at_most)

    assert play(lanes, lambda: wants(1), lambda: wants(2), other)[:2] == [2, 4]
    assert order == ["other", "has 2", "has 4"]
    assert shared.asked[0] == [1, 2] and [item for asked in shared.asked[1:] for item in asked] == [1, 2, 7]
    assert len(shared.asked) == (2 if not at_most else 3), "who comes meanwhile joins, up to the bound"


def test_what_is_in_use_for_long_is_asked_for_less_and_less_often(lanes: Lanes) -> None:
    shared, begun = InUse(times=6), time.monotonic()
    assert play(lanes, lambda: together(shared, 1)) == [2]
    assert len(shared.asked) == 7 and time.monotonic() - begun < 5
    shared = InUse(times=3)
    assert together(shared, 4) == 8 and len(shared.asked) == 4, "outside of a lane it waits on the spot"


def test_pauses_grow_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.random, "random", lambda: 1.0)
    assert [module._pause(times) for times in (1, 2, 3, 10**6)] == pytest.approx([1e-4, 2e-4, 4e-4, 4e-3])


def test_errors_arrive_where_the_lane_waits(lanes: Lanes) -> None:
    def some(items: Sequence[int]) -> list[int | Exception]:
        return [ValueError(item) if item % 2 else item for item in items]

    def none(items: Sequence[int]) -> list[int]:
        raise OSError("the file's")

    def caught() -> str:
        try:
            aside(divmod, 1, 0)
        except ZeroDivisionError:
            return "caught"
        return "missed"

    def left() -> None:
        aside(exit, 3)

    work = [caught, left, *(lambda i=i: together(some, i) for i in range(4)), *[lambda: together(none, 1)] * 2]
    found = play(lanes, *work)
    assert found[0] == "caught" and isinstance(found[1], SystemExit)
    assert found[2:6:2] == [0, 2] and all(isinstance(e, ValueError) for e in found[3:6:2])
    assert all(isinstance(e, OSError) for e in found[6:])
    assert play(lanes, lambda: 5) == [5]  # and the others live on


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lane_may_wait_for_another_however_few_threads_there_are(workers: int) -> None:
    lanes, given = Lanes(workers), Future[int]()

    def gives() -> int:
        given.set_result(together(double, aside(divmod, 9, 2)[0]))
        return 0

    assert play(lanes, *[lambda: result(given)] * 5, gives) == [8] * 5 + [0]
    assert lanes.close(10)
    broken = Future[int]()
    broken.set_exception(KeyError("x"))
    for where in (result, lambda f: Lanes(workers).ask(lambda: result(f))):
        with pytest.raises(KeyError):
            where(broken)


def test_without_workers_all_is_done_on_the_spot() -> None:
    lanes = Lanes(workers=0)
    own, elsewhere = play(lanes, threading.get_ident, lambda: aside(threading.get_ident))
    assert own == elsewhere != threading.get_ident()
    assert lanes.close(10)


def test_it_is_closed_when_the_last_lane_has_ended() -> None:
    lanes, free = Lanes(workers=1), threading.Event()
    ended = Future[int]()
    lanes.start(lambda: ended.set_result(aside(free.wait, 10) + 1))
    assert not lanes.close(0.05)
    free.set()
    assert lanes.close(10) and ended.result(0) == 2
    assert Lanes(workers=3).close(0)  # one that never had a lane


def test_threads_are_as_many_as_are_waited_for_but_no_more_than_allowed_and_end_with_the_lanes() -> None:
    lanes, gate, inside, before = Lanes(workers=3), threading.Event(), list[str](), set(threading.enumerate())

    def threads() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t not in before and t.name.startswith("aside ")]

    def wait() -> str:
        inside.append(threading.current_thread().name)
        gate.wait(10)
        return threading.current_thread().name

    lanes.ask(lambda: [aside(lambda: None) for _ in range(5)])
    assert len(threads()) == 1  # one lane, so one at a time
    begun = [lanes.submit(lambda: aside(wait)) for _ in range(6)]
    until(lambda: len(inside) == 3)
    assert not any(future.done() for future in begun) and len(threads()) == 3
    gate.set()
    assert len({future.result(10) for future in begun}) <= 3 and len(inside) == 6
    assert lanes.close(10)
    until(lambda: not threads())


async def doubled(item: int, seen: list[int]) -> int:
    await asyncio.sleep(0.01 * item)
    seen.append(threading.get_ident())
    return 2 * item


async def fails() -> None:
    await asyncio.sleep(0)
    raise KeyError("x")


def test_coroutines_run_on_the_thread_of_the_lanes_and_others_have_their_turns(lanes: Lanes) -> None:
    seen: list[int] = []
    works = [lambda i=i: (finish(doubled(i, seen)), threading.get_ident()) for i in (3, 2, 1)]
    answers = play(lanes, *works)
    assert [value for value, _ in answers] == [6, 4, 2]  # type: ignore[misc]
    assert {own for _, own in answers} == set(seen) and len(set(seen)) == 1  # type: ignore[misc]
    assert finish(doubled(2, seen)) == 4 and set(seen) == {seen[0]}, "for other threads, too"


def test_what_a_coroutine_raises_arrives_where_it_is_waited_for(lanes: Lanes) -> None:
    (found,) = play(lanes, lambda: finish(fails()))
    assert isinstance(found, KeyError)
    with pytest.raises(KeyError):
        finish(fails())


def test_whoever_is_interrupted_drops_the_coroutine(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = threading.Event()

    async def hangs() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            dropped.set()

    def interrupted(self: Future[object], timeout: float | None = None) -> object:
        time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish(hangs())
    assert dropped.wait(10)


def test_lanes_of_several_owners_share_the_thread() -> None:
    mine, yours = Lanes(workers=2), Lanes(workers=0)
    assert mine.ask(threading.get_ident) == yours.ask(threading.get_ident)
    assert mine.close(10) and yours.ask(lambda: 5) == 5 and yours.close(10)


def until(true: Callable[[], bool]) -> None:
    """Waits for it; fails where it does not come."""
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
