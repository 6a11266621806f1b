"""Hard budgets: tables worked by hand, and the cap under any interleaving."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bopo_ray.method.budget import Ledger, Reservation, affordable_mask
from bopo_ray.records import CostMode

amounts = st.integers(0, 60)


@pytest.mark.parametrize(
    ("mode", "left", "worst", "expected"),
    [
        (CostMode.CALLS, 1, (9, 9), (True, True)),
        (CostMode.CALLS, 0, (9, 9), (True, False)),  # SMALL is forced, and free
        (CostMode.CALLS, 0, (9, 9, 9), (True, False, False)),
        (CostMode.USD, 100, (20, 100), (True, True)),  # to the last micro-dollar
        (CostMode.USD, 99, (20, 100), (True, False)),
        (CostMode.USD, 19, (20, 100), (False, False)),  # the episode stops
        (CostMode.USD, 50, (60, 40), (False, True)),  # each model by its own worst case
    ],
)
def test_mask_table(mode: CostMode, left: int, worst: tuple[int, ...], expected: tuple[bool, ...]) -> None:
    assert affordable_mask(mode, left, worst) == expected


def test_reserve_settle_release_by_hand() -> None:
    ledger = Ledger(100)
    first, second = ledger.reserve(70), ledger.reserve(30)
    assert first is not None
    assert second is not None
    assert (ledger.remaining, ledger.reserve(1)) == (0, None)
    ledger.settle(first, 20)
    assert (ledger.spent, ledger.remaining) == (20, 50)
    ledger.release(second)
    assert (ledger.spent, ledger.remaining, ledger.cap) == (20, 80, 100)
    assert ledger.reserve(81) is None
    assert ledger.reserve(80) is not None


def test_misuse_is_refused_and_changes_nothing() -> None:
    ledger = Ledger(10)
    handle = ledger.reserve(6)
    assert handle is not None
    for actual in (7, -1):
        with pytest.raises(ValueError, match=f"actual={actual} of a reservation of 6"):
            ledger.settle(handle, actual)
    assert (ledger.spent, ledger.remaining) == (0, 4)
    ledger.settle(handle, 6)
    with pytest.raises(ValueError, match="not open"):
        ledger.settle(handle, 1)
    with pytest.raises(ValueError, match="not open"):
        ledger.release(handle)
    with pytest.raises(ValueError, match="not open"):
        ledger.release(Reservation(6))
    with pytest.raises(ValueError, match="amount=-1"):
        ledger.reserve(-1)
    with pytest.raises(ValueError, match="cap=-1"):
        Ledger(-1)
    assert (ledger.spent, ledger.remaining) == (6, 4)


@given(st.integers(0, 100), st.lists(st.tuples(amounts, st.integers(0, 2), st.integers(0, 60)), max_size=40))
def test_the_books_balance_after_each_operation(cap: int, script: list[tuple[int, int, int]]) -> None:
    ledger, open_handles, spent = Ledger(cap), list[Reservation](), 0
    for amount, what, actual in script:
        if what == 0 or not open_handles:
            left = ledger.remaining
            handle = ledger.reserve(amount)
            assert (handle is not None) == (amount <= left)
            if handle is not None:
                open_handles.append(handle)
        else:
            handle = open_handles.pop(actual % len(open_handles))
            if what == 1:
                ledger.settle(handle, min(actual, handle.amount))
                spent += min(actual, handle.amount)
            else:
                ledger.release(handle)
        assert ledger.spent == spent <= cap
        assert ledger.remaining == cap - spent - sum(h.amount for h in open_handles) >= 0


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 200),
    st.lists(st.lists(st.tuples(amounts, st.floats(0, 1), st.booleans()), max_size=12), min_size=4, max_size=4),
)
def test_the_cap_holds_when_threads_interleave(cap: int, plans: list[list[tuple[int, float, bool]]]) -> None:
    ledger, start, paid, failures = Ledger(cap), threading.Barrier(len(plans)), list[int](), list[BaseException]()

    def work(plan: list[tuple[int, float, bool]]) -> None:
        try:
            start.wait()
            for amount, share, made in plan:
                if (handle := ledger.reserve(amount)) is None:
                    continue
                time.sleep(0)
                if made:
                    ledger.settle(handle, int(amount * share))
                    paid.append(int(amount * share))
                else:
                    ledger.release(handle)
                assert 0 <= ledger.spent <= cap
                assert ledger.remaining >= 0
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert ledger.spent == sum(paid) <= cap
    assert ledger.remaining == cap - sum(paid)


def test_a_race_for_the_last_unit_has_one_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads ask while the first is between its look at the rest and its entry: without the lock all would win."""
    look = Ledger._available

    def slow_look(self: Ledger) -> int:
        left = look(self)
        time.sleep(0.01)
        return left

    monkeypatch.setattr(Ledger, "_available", slow_look)
    ledger, won = Ledger(1), list[Reservation | None]()
    threads = [threading.Thread(target=lambda: won.append(ledger.reserve(1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(handle is not None for handle in won) == 1
