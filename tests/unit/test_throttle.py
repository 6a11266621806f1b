"""The throttle, on an event loop whose clock only moves when nothing else can happen."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bopo_ray.models import throttle as module
from bopo_ray.models.throttle import MAX_PAUSE_S, Throttle, retry_after_s


class Clock(asyncio.SelectorEventLoop):
    """Jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        self.now, inner = 0.0, selectors.SelectSelector()
        select = inner.select

        def jump(timeout: float | None = None) -> Any:
            assert timeout is not None, "everything waits and nothing is due: a call was forgotten"
            self.now += timeout
            self.selects += 1
            return select(0)

        inner.select = jump  # type: ignore[method-assign]
        self.selects = 0
        super().__init__(inner)

    def time(self) -> float:
        return self.now


def run(work: Coroutine[Any, Any, Any]) -> Any:
    loop = Clock()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


def now() -> float:
    return asyncio.get_running_loop().time()


class Load:
    """Calls that note when they began and how many were under way."""

    def __init__(self, throttle: Throttle) -> None:
        self.throttle, self.begun, self.order, self.most = throttle, list[float](), list[int](), 0
        self.under_way = 0

    async def call(self, i: int, seconds: float = 1.0, refused: bool = False) -> None:
        async with self.throttle.slot() as began_s:
            self.begun.append(began_s)
            self.order.append(i)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            await asyncio.sleep(seconds)
            self.under_way -= 1
            self.throttle.refused(began_s) if refused else self.throttle.succeeded()

    async def calls(self, n: int, **more: Any) -> None:
        await asyncio.gather(*(self.call(i, **more) for i in range(n)))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start is at the begin of its gap."""
    monkeypatch.setattr(module.random, "random", lambda: 0.0)


def test_it_bounds_the_calls_in_flight_and_keeps_their_order() -> None:
    async def work() -> Load:
        load = Load(Throttle(3))
        await load.calls(10)
        return load

    load = run(work())
    assert load.most == 3
    assert load.order == list(range(10))
    assert load.begun == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_a_minute_holds_no_more_starts_than_allowed() -> None:
    async def work() -> Load:
        load = Load(Throttle(100, per_minute=20))
        await load.calls(6, seconds=0.1)
        return load

    assert run(work()).begun == pytest.approx([0, 3, 6, 9, 12, 15])


@pytest.mark.parametrize("limits", [[(100, 20)], [(100, 0), (4, 20)]], ids=["one model", "two of an endpoint"])
def test_the_first_start_is_somewhere_in_the_gap(
    monkeypatch: pytest.MonkeyPatch, limits: list[tuple[int, float]]
) -> None:
    """Else as many calls as there are processes would go out in the first second, and again after each gap."""
    monkeypatch.setattr(module.random, "random", lambda: 0.5)

    async def work() -> list[float]:
        await asyncio.sleep(10)
        throttle = Throttle(*limits[0])
        for limit in limits:
            throttle.tighten(*limit)
        load = Load(throttle)
        await load.calls(3, seconds=0.1)
        await asyncio.sleep(60)
        await load.calls(1)
        return load.begun

    assert run(work()) == pytest.approx([11.5, 14.5, 17.5, 77.6]), "and only the first one"


def test_waiting_costs_no_polling() -> None:
    async def work() -> int:
        throttle = Throttle(1, per_minute=1)
        await Load(throttle).calls(3)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Clock) and loop.now >= 120
        return loop.selects

    assert run(work()) < 30


def test_a_storm_of_refusals_cuts_once_per_round_trip() -> None:
    async def work() -> list[int]:
        throttle = Throttle(32)
        limits = []
        for _ in range(7):
            await Load(throttle).calls(throttle.limit, refused=True)
            limits.append(throttle.limit)
        return limits

    assert run(work()) == [16, 8, 4, 2, 1, 1, 1]


def test_refusals_of_calls_begun_before_the_cut_change_nothing() -> None:
    async def work() -> int:
        throttle = Throttle(32)
        old = Load(throttle)
        slow = asyncio.gather(*(old.call(i, seconds=50, refused=True) for i in range(8)))
        await Load(throttle).call(0, refused=True)  # the cut, at 1 s
        await slow
        return throttle.limit

    assert run(work()) == 16


def test_it_grows_by_one_for_as_many_successes_as_the_limit_up_to_the_maximum() -> None:
    async def work() -> list[int]:
        throttle = Throttle(4)
        throttle.refused(now())
        limits = [throttle.limit]
        for _ in range(9):
            throttle.succeeded()
            limits.append(throttle.limit)
        return limits

    assert run(work()) == [2, 2, 3, 3, 3, 4, 4, 4, 4, 4]


def test_after_a_cut_nothing_begins_until_the_flight_is_small_enough() -> None:
    async def work() -> list[float]:
        throttle = Throttle(8)
        load = Load(throttle)
        first = [asyncio.ensure_future(load.call(i, seconds=i + 1, refused=True)) for i in range(8)]
        await asyncio.sleep(0.5)
        throttle.refused(now())
        late = asyncio.ensure_future(load.call(8))
        await asyncio.gather(*first, late)
        return load.begun

    assert run(work())[-1] == 5  # five of the eight have ended; what they say of the old limit counts no more


def test_a_pause_holds_new_calls_back_and_is_capped() -> None:
    async def work() -> list[float]:
        throttle = Throttle(8)
        load = Load(throttle)
        throttle.pause(5)
        throttle.pause(2)  # a shorter wish does not shorten it
        await load.calls(2)
        throttle.pause(1e9)
        await load.calls(1)
        return load.begun

    assert run(work()) == [5, 5, 6 + MAX_PAUSE_S]


def test_two_models_of_an_endpoint_get_the_stricter_limits() -> None:
    async def work() -> Load:
        throttle = Throttle(8, per_minute=0)
        throttle.tighten(2, 60)
        throttle.tighten(4, 0)
        load = Load(throttle)
        await load.calls(4, seconds=10)
        return load

    load = run(work())
    assert load.most == 2
    assert load.begun == [0, 1, 10, 11]


@settings(max_examples=60, deadline=None)
@given(
    limit=st.integers(1, 4),
    calls=st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 3), st.sampled_from("sfc")), max_size=25),
)
def test_nothing_leaks_whatever_is_cancelled_or_refused(limit: int, calls: list[tuple[float, float, str]]) -> None:
    """Each call asks at some time, lasts a while, and succeeds, is refused, or is cancelled after half a second."""

    async def one(load: Load, at: float, lasts: float, end: str) -> None:
        await asyncio.sleep(at)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5 if end == "c" else None):
                await load.call(0, seconds=lasts, refused=end == "f")

    async def work() -> None:
        throttle = Throttle(limit)
        load = Load(throttle)
        await asyncio.gather(*(one(load, *call) for call in calls))
        assert throttle.in_flight == 0
        assert 1 <= throttle.limit <= limit
        await asyncio.wait_for(load.call(0), 100)  # it still works

    run(work())


def test_a_waiter_cancelled_just_as_it_gets_its_turn_gives_it_back() -> None:
    async def work() -> list[int]:
        throttle = Throttle(1)
        load = Load(throttle)
        async with throttle.slot():
            second, third = (asyncio.ensure_future(load.call(i)) for i in (2, 3))
            await asyncio.sleep(0.5)
        second.cancel()  # its turn is granted, and it has not run yet
        await third
        return [*load.order, throttle.in_flight]

    assert run(work()) == [3, 0]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "7", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "7", "retry-after-ms": "x"}, 7),
        ({"retry-after": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 -0000"}, 0),
    ],
)
def test_retry_after(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(headers) == expected


def test_retry_after_a_date_to_come() -> None:
    wait_s = retry_after_s({"retry-after": "Fri, 21 Oct 2499 07:28:00 GMT"})
    assert wait_s is not None and wait_s > 1e9
