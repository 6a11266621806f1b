"""Lanes take turns on one thread: who waits, who goes on, what is shared, and where an error arrives."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

from bopo_ray import lanes as module
from bopo_ray import loop
from bopo_ray.lanes import Busy, Lanes, aside, finish, result, together
from bopo_ray.loop import LOAD


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
    LOAD.begin()


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
    monkeypatch.setattr(loop, "WINDOW_S", 60.0)
    monkeypatch.setattr(module, "CROWD", 3)
    LOAD.busy = 0.75  # half way from 1 to 3 times 2
    answers = play(lanes, *[lambda i=i: together(double, i, at_most=2) for i in range(5)])
    assert answers == [0, 2, 4, 6, 8] and BATCHES == [[0, 1, 2, 3], [4]]


def test_where_the_thread_is_busy_a_bounded_call_waits_a_little_for_more(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "WINDOW_S", 60.0)
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
    LOAD.busy = 1.0
    assert play(lanes, soon, late) == [0, 2]
    assert BATCHES[2:] == [[0, 1]]  # at once when no lane is left that could come
    free.clear()
    monkeypatch.setattr(module, "GATHER_S", 0.01)
    LOAD.busy = 0.75
    assert play(lanes, lambda: together(double, 0, at_most=9), late) == [0, 2]
    assert BATCHES[3:] == [[0], [1]]


def test_where_the_thread_is_busy_a_bounded_call_of_enough_waits_for_nobody(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "WINDOW_S", 60.0)
    monkeypatch.setattr(module, "GATHER_S", 30.0)
    free = threading.Event()
    LOAD.busy = 1.0

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
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now))
    load, seen = loop.Load(), []
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


def test_a_call_that_takes_long_is_made_apart_one_at_a_time_while_others_have_their_turns(lanes: Lanes) -> None:
    begun, free = threading.Event(), threading.Event()
    on: list[int] = []

    def slow(items: Sequence[int]) -> list[int]:
        on.append(threading.get_ident())
        begun.set()
        assert free.wait(10)
        return double(items)

    def late(item: int) -> int:
        assert aside(begun.wait, 10)
        return together(slow, item, at_most=4, apart=True)

    def other() -> int:
        assert aside(begun.wait, 10)
        aside(time.sleep, 0.05)  # the late ones have come
        free.set()
        return threading.get_ident()

    first = [lambda i=i: together(slow, i, at_most=4, apart=True) for i in (0, 1)]
    *answers, own = play(lanes, *first, *[lambda i=i: late(i) for i in (2, 3)], other)
    assert answers == [0, 2, 4, 6] and [sorted(b) for b in BATCHES] == [[0, 1], [2, 3]]
    assert own not in on and len(on) == 2


def test_an_error_of_a_call_apart_arrives_and_one_in_use_is_asked_again(lanes: Lanes) -> None:
    def fails(items: Sequence[int]) -> list[int]:
        raise OSError("the file's")

    shared = InUse(times=2)
    assert play(lanes, *[lambda i=i: together(shared, i, 3, True) for i in range(3)]) == [0, 2, 4]
    assert shared.left == 0
    found = play(lanes, *[lambda: together(fails, 1, 3, True)] * 2)
    assert all(isinstance(e, OSError) for e in found)
    assert Lanes(workers=0).ask(lambda: together(double, 4, 3, True)) == 8


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A system that has no more of them for what is done aside, until this is undone."""
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith("aside "):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    return monkeypatch


def test_where_no_thread_is_to_be_had_each_lane_is_told_and_later_ones_go_on(
    lanes: Lanes, no_threads: pytest.MonkeyPatch
) -> None:
    found = play(lanes, *[lambda i=i: together(double, i, 2, True) for i in range(3)], lambda: aside(divmod, 9, 2))
    assert [str(e) for e in found] == ["can't start new thread"] * 4
    no_threads.undo()
    assert play(lanes, lambda: together(double, 4, 2, True), lambda: aside(divmod, 9, 2)) == [8, (4, 1)]


def test_where_no_more_threads_are_to_be_had_work_waits_for_those_that_there_are(
    lanes: Lanes, request: pytest.FixtureRequest
) -> None:
    assert lanes.ask(lambda: aside(divmod, 9, 2)) == (4, 1)
    request.getfixturevalue("no_threads")
    work = [lambda: aside(divmod, 9, 2), lambda: together(double, 4, 2, True), lambda: together(double, 5, 0, True)]
    assert play(lanes, *work) == [(4, 1), 8, 10]


class Panic(BaseException):
    """As those of extensions in Rust."""


def test_whatever_a_call_together_does_no_lane_waits_for_ever(lanes: Lanes) -> None:
    def panics(items: Sequence[int]) -> list[int]:
        raise Panic

    found = play(lanes, *[lambda: together(panics, 1)] * 2, *[lambda: together(lambda items: [1], 1)] * 2)
    assert [type(e) for e in found] == [Panic, Panic, int, int]

    def short(items: Sequence[int]) -> list[int]:
        return [1]

    found = play(lanes, *[lambda: together(short, 1)] * 3)
    assert all(isinstance(e, ValueError) and "1 answers for 3 items" in str(e) for e in found)
    assert lanes.ask(lambda: 5) == 5


def test_an_answer_that_nobody_wants_any_more_holds_nobody() -> None:
    lanes, free, seen = Lanes(workers=1), threading.Event(), list[int]()
    lanes.start(lambda: free.wait(10) and None)
    unwanted = lanes.submit(lambda: seen.append(1))
    assert unwanted.cancel()
    free.set()
    assert lanes.ask(lambda: 5) == 5 and lanes.close(10) and not seen


def test_a_lane_that_breaks_takes_no_turn_from_others(caplog: pytest.LogCaptureFixture) -> None:
    lanes, free = Lanes(workers=1), threading.Event()
    lanes.start(lambda: free.wait(10) and None)
    lanes.start(lambda: 1 // 0)  # against the rules
    free.set()
    assert lanes.ask(lambda: 5) == 5 and lanes.close(10)
    assert "ZeroDivisionError" in caplog.text


def test_the_loop_never_waits_for_itself() -> None:
    lanes = Lanes(workers=1)
    with pytest.raises(RuntimeError, match="by ask: it has result and submit"):
        lanes.ask(lambda: lanes.ask(lambda: 5))

    async def asks() -> None:
        finish(fails())

    with pytest.raises(RuntimeError, match="can't wait for itself"):
        finish(asks())
    assert lanes.close(10)


def test_the_child_of_a_fork_has_a_loop_of_its_own() -> None:
    script = (
        "import os; from bopo_ray.lanes import Lanes\n"
        "assert Lanes(1).ask(lambda: 5) == 5\n"
        "pid = os.fork()\n"
        "if not pid: os._exit(Lanes(1).submit(lambda: 7).result(20))\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    root = Path(module.__file__).parents[1]
    said = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert said.stdout == "7\n", said.stderr


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
