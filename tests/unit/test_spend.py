"""The run's ledger: hand-worked sums, and a cap that no order of events can break."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)  # fmt: skip

from bopo_ray.errors import StoreError
from bopo_ray.models.calls import CallStore
from bopo_ray.models.pricing import Usage
from bopo_ray.models.spend import ModelTotals, PaidCall, SpendLedger
from bopo_ray.models.sqlite import owner_id

ME = owner_id()
USAGE = Usage(100, 10, 40)


@pytest.fixture(scope="module")
def dead() -> str:
    """The owner string of a process that has ended."""
    code = "from bopo_ray.models.sqlite import owner_id; print(owner_id())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[SpendLedger]:
    ledger = SpendLedger(tmp_path / "spend.db", 1000)
    yield ledger
    ledger.close()


def reserved(ledger: SpendLedger, amount: int, model: str = "mini", key: str = "k", owner: str = ME) -> int:
    reservation = ledger.reserve(owner, key, model, amount)
    assert reservation is not None
    return reservation


def nothing(key: str) -> None:
    """A call store that knows no call."""


def test_a_bill_worked_by_hand(ledger: SpendLedger) -> None:
    a, b, c, d = (reserved(ledger, n, m) for n, m in ((300, "mini"), (400, "full"), (200, "mini"), (100, "full")))
    assert len({a, b, c, d}) == 4
    assert ledger.totals().overall.reserved_microusd == 1000
    assert ledger.reserve(ME, "k", "mini", 1) is None
    assert ledger.reserve(ME, "k", "mini", 0) is not None  # costs nothing
    assert ledger.settle(a, USAGE, 120) is True  # 180 given back
    ledger.lose(b)
    ledger.release(c)
    assert ledger.settle(d, Usage(7, 8), 100) is True  # all of it
    ledger.count_saved("mini", 55)
    ledger.count_saved("mini", 60, 3)
    totals = ledger.totals()
    assert totals.cap_microusd == 1000
    assert totals.models == (
        ModelTotals("full", 1, 100, 7, 0, 8, 0, 0, 1, 400, 0),
        ModelTotals("mini", 1, 120, 100, 40, 10, 4, 115, 0, 0, 0),
    )
    assert totals.overall == ModelTotals("all", 2, 220, 107, 40, 18, 4, 115, 1, 400, 0)
    assert totals.overall.spent_microusd == 620
    assert list(ledger.paid_rows()) == [PaidCall("mini", USAGE, 120), PaidCall("full", Usage(7, 8), 100)]
    assert ledger.reserve(ME, "k", "mini", 381) is None
    assert ledger.reserve(ME, "k", "mini", 380) is not None  # 620 + 380 = 1000: to the last micro-dollar


def test_a_cost_above_its_reservation_is_recorded_as_it_is(ledger: SpendLedger) -> None:
    assert ledger.settle(reserved(ledger, 900), USAGE, 901) is False
    assert ledger.settle(reserved(ledger, 50), USAGE, 200) is False
    assert ledger.totals().overall.spent_microusd == 1101
    assert ledger.reserve(ME, "k", "mini", 0) is None  # 1101 > 1000: nothing more


def test_a_reservation_is_closed_once(ledger: SpendLedger) -> None:
    closed = [reserved(ledger, 10) for _ in range(3)]
    ledger.settle(closed[0], USAGE, 1)
    ledger.lose(closed[1])
    ledger.release(closed[2])
    before = ledger.totals()
    for reservation in (*closed, 10**6):
        for close in (ledger.lose, ledger.release, lambda r: ledger.settle(r, USAGE, 1)):
            with pytest.raises(ValueError, match=f"reservation {reservation}: never made, or closed before"):
                close(reservation)
    assert ledger.totals() == before
    assert reserved(ledger, 10) > max(closed)  # no number is given twice


def test_a_reservation_that_is_told_again_is_made_once(ledger: SpendLedger) -> None:
    """Its answer was lost; the caller knows it by its own number."""
    first, lowest = -7, -(2**63)
    for own in (first, first, lowest, first):
        assert ledger.reserve(ME, "k", "mini", 400, own) == own
    assert ledger.totals().overall.reserved_microusd == 800
    assert ledger.reserve(ME, "k", "mini", 400, -8) is None  # also where it is told again, no more than the cap
    other = reserved(ledger, 10)
    assert other > 0
    ledger.release(first)
    ledger.lose(other)
    assert ledger.settle(lowest, USAGE, 100)
    with pytest.raises(ValueError, match="reservation -7: never made, or closed before"):
        ledger.release(first)
    assert ledger.reserve(ME, "k", "mini", 400, -8) == -8
    overall = ledger.totals().overall
    assert (overall.paid_microusd, overall.lost_microusd, overall.reserved_microusd) == (100, 10, 400)
    with pytest.raises(ValueError, match="own=1: need a number < 0"):
        ledger.reserve(ME, "k", "mini", 1, 1)


@pytest.mark.parametrize("amount", [-1, -(10**9)])
def test_amounts_are_not_negative(ledger: SpendLedger, amount: int) -> None:
    with pytest.raises(ValueError, match="micro-dollars >= 0"):
        ledger.reserve(ME, "k", "mini", amount)
    with pytest.raises(ValueError, match="micro-dollars >= 0"):
        ledger.settle(reserved(ledger, 5), USAGE, amount)
    assert ledger.totals().overall.reserved_microusd == 5


def test_what_was_spent_is_remembered_and_the_cap_may_change(tmp_path: Path) -> None:
    path = tmp_path / "spend.db"
    first = SpendLedger(path, 1000)
    first.settle(reserved(first, 800), USAGE, 800)
    assert first.reserve(ME, "k", "mini", 300) is None
    raised = SpendLedger(path, 1100)
    assert raised.totals().models == first.totals().models
    raised.release(reserved(raised, 300))
    assert SpendLedger(path, 500).reserve(ME, "k", "mini", 0) is None
    unlimited = SpendLedger(path, None)
    assert unlimited.totals().cap_microusd is None
    unlimited.release(reserved(unlimited, 10**15))
    assert first.reserve(ME, "k", "mini", 300) is None  # each keeps to its own


def test_recovery_closes_what_the_dead_left_and_nothing_else(ledger: SpendLedger, dead: str) -> None:
    mine, stored, lost, away = (
        reserved(ledger, 100, key=k, owner=o)
        for k, o in (("mine", ME), ("stored", dead), ("lost", dead), ("away", "elsewhere/1/1"))
    )
    ledger.recover({"stored": (USAGE, 60), "mine": (USAGE, 1), "away": (USAGE, 1)}.get)
    (mini,) = ledger.totals().models
    assert mini == ModelTotals("mini", 1, 60, 100, 40, 10, 0, 0, 1, 100, 200)
    assert list(ledger.paid_rows()) == [PaidCall("mini", USAGE, 60)]
    ledger.release(mine)
    ledger.release(away)
    with pytest.raises(ValueError, match="closed before"):
        ledger.settle(stored, USAGE, 60)
    assert ledger.totals().overall.reserved_microusd == 0
    ledger.recover(nothing)  # once is enough
    assert ledger.totals().overall.lost_calls == 1
    assert lost


def test_a_live_owner_past_its_lease_may_still_tell_the_truth(tmp_path: Path) -> None:
    ledger = SpendLedger(tmp_path / "spend.db", 1000, lease_s=0.2)
    late = [reserved(ledger, 100) for _ in range(3)]
    ledger.recover(nothing)
    assert ledger.totals().overall.reserved_microusd == 300  # too early
    time.sleep(0.25)
    ledger.recover(nothing)
    overall = ledger.totals().overall
    assert (overall.reserved_microusd, overall.lost_microusd, overall.lost_calls) == (0, 300, 3)
    assert ledger.settle(late[0], USAGE, 70) is True
    ledger.lose(late[1])
    ledger.release(late[2])
    overall = ledger.totals().overall
    assert (overall.paid_microusd, overall.lost_microusd, overall.lost_calls) == (70, 100, 1)
    assert (overall.paid_calls, overall.spent_microusd, overall.reserved_microusd) == (1, 170, 0)


def test_a_refusal_closes_what_the_dead_left_at_its_worst_case(ledger: SpendLedger, dead: str) -> None:
    reserved(ledger, 600, key="stored", owner=dead)
    reserved(ledger, 400, key="gone", owner=dead)
    assert ledger.reserve(ME, "k", "mini", 1) is None
    overall = ledger.totals().overall
    assert (overall.reserved_microusd, overall.lost_microusd, overall.lost_calls) == (0, 1000, 2)
    ledger.recover({"stored": (USAGE, 60)}.get)  # still knows what became of one
    overall = ledger.totals().overall
    assert (overall.paid_microusd, overall.lost_microusd, overall.lost_calls) == (60, 400, 1)
    assert ledger.reserve(ME, "k", "mini", 540) is not None


def test_the_call_of_another_does_not_settle_a_lost_one(ledger: SpendLedger, dead: str) -> None:
    # The dead one's reply never came; a second owner made the same call later, and that is what the store has.
    reserved(ledger, 100, owner=dead)
    second = reserved(ledger, 100)
    ledger.recover({"k": (USAGE, 60)}.get)  # the second has stored, not yet settled
    assert ledger.totals().overall.lost_microusd == 100
    ledger.settle(second, USAGE, 60)
    ledger.recover({"k": (USAGE, 60)}.get)
    overall = ledger.totals().overall
    assert (overall.paid_calls, overall.paid_microusd, overall.lost_microusd) == (1, 60, 100)


def test_two_dead_owners_of_one_call_are_one_paid_and_one_lost(ledger: SpendLedger, dead: str) -> None:
    for _ in range(2):
        reserved(ledger, 100, owner=dead)
    for _ in range(2):
        ledger.recover({"k": (USAGE, 60)}.get)
        overall = ledger.totals().overall
        assert (overall.paid_calls, overall.paid_microusd, overall.lost_microusd) == (1, 60, 100)


def test_the_bill_is_read_in_order_however_long(ledger: SpendLedger, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "spend.db") as c:
        rows = (("k", "mini", i, 0, 1, i, 0.0) for i in range(25_001))
        names = "key, model, prompt_tokens, cached_tokens, completion_tokens, cost, created"
        c.executemany(f"INSERT INTO paid ({names}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    assert [row.cost for row in ledger.paid_rows()] == list(range(25_001))


@pytest.mark.parametrize("damage", ["text", "a page", "half"])
def test_a_damaged_ledger_is_never_started_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "spend.db"
    ledger = SpendLedger(path, None)
    for i in range(300):
        ledger.settle(reserved(ledger, 10, key=f"{i:032x}"), USAGE, 5)
    ledger.close()
    raw = path.read_bytes()
    path.write_bytes({
        "text": b"not a database at all",
        "a page": raw[: len(raw) // 2] + b"\xff" * 4096 + raw[len(raw) // 2 + 4096 :],
        "half": raw[: len(raw) // 2],
    }[damage])  # fmt: skip
    with pytest.raises(StoreError, match=r"ledger is damaged .* restore it from a copy, or move it away") as caught:
        SpendLedger(path, None)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.corrupt"))


def test_a_ledger_that_is_deleted_while_it_is_used_stops_the_spending(ledger: SpendLedger, tmp_path: Path) -> None:
    (tmp_path / "spend.db").unlink()
    with pytest.raises(StoreError, match="moved or deleted"):
        ledger.reserve(ME, "k", "mini", 1)


def test_a_call_store_is_no_ledger(tmp_path: Path) -> None:
    CallStore(tmp_path / "calls.db").close()
    with pytest.raises(StoreError, match="no ledger"):
        SpendLedger(tmp_path / "calls.db", None)


class AnyOrder(RuleBasedStateMachine):
    """Two processes' objects on one file, events in any order, beside sums kept by hand."""

    open_ones: Bundle[int] = Bundle("open_ones")

    @initialize(cap=st.integers(0, 500))
    def start(self, cap: int) -> None:
        AnyOrder.runs += 1
        path = AnyOrder.folder / f"{AnyOrder.runs}.db"
        self.ledgers = [SpendLedger(path, cap, lease_s=0), SpendLedger(path, cap, lease_s=0)]
        self.cap, self.open, self.given_up = cap, dict[int, int](), dict[int, int]()
        self.paid = self.lost = 0

    runs = 0
    folder: Path

    @rule(target=open_ones, amount=st.integers(0, 200), who=st.integers(0, 1))
    def reserve(self, amount: int, who: int) -> int:
        fits = self.paid + self.lost + sum(self.open.values()) + sum(self.given_up.values()) + amount <= self.cap
        reservation = self.ledgers[who].reserve(ME, "k", "mini", amount)
        assert (reservation is not None) == fits
        if reservation is None:
            return -1
        self.open[reservation] = amount
        return reservation

    def close(self, reservation: int) -> int:
        return self.open.pop(reservation) if reservation in self.open else self.given_up.pop(reservation)

    @rule(reservation=consumes(open_ones), share=st.floats(0, 1), who=st.integers(0, 1))
    def settle(self, reservation: int, share: float, who: int) -> None:
        if reservation >= 0:
            cost = int(self.close(reservation) * share)
            assert self.ledgers[who].settle(reservation, USAGE, cost)
            self.paid += cost

    @rule(reservation=consumes(open_ones), who=st.integers(0, 1))
    def lose(self, reservation: int, who: int) -> None:
        if reservation >= 0:
            self.lost += self.close(reservation)
            self.ledgers[who].lose(reservation)

    @rule(reservation=consumes(open_ones), who=st.integers(0, 1))
    def release(self, reservation: int, who: int) -> None:
        if reservation >= 0:
            self.close(reservation)
            self.ledgers[who].release(reservation)

    @rule(who=st.integers(0, 1))
    def recover(self, who: int) -> None:
        self.ledgers[who].recover(nothing)  # all are past their lease
        self.given_up |= self.open
        self.open.clear()

    @invariant()
    def sums_agree_and_the_cap_holds(self) -> None:
        for ledger in getattr(self, "ledgers", []):
            overall = ledger.totals().overall
            assert overall.reserved_microusd == sum(self.open.values())
            assert overall.paid_microusd == self.paid == sum(row.cost for row in ledger.paid_rows())
            assert overall.lost_microusd == self.lost + sum(self.given_up.values())
            assert overall.spent_microusd + overall.reserved_microusd <= self.cap

    def teardown(self) -> None:
        for reservation in list(getattr(self, "open", ())):
            self.ledgers[0].release(reservation)
        for ledger in getattr(self, "ledgers", []):
            assert ledger.totals().overall.reserved_microusd == 0
            ledger.close()


def test_no_order_of_events_breaks_the_cap(tmp_path: Path) -> None:
    AnyOrder.folder = tmp_path
    run_state_machine_as_test(AnyOrder, settings=settings(max_examples=40, stateful_step_count=25, deadline=None))
    assert AnyOrder.runs > 20
