"""The desk, on real stores and real ledgers: who pays, how often, and what is left open (nothing)."""

from __future__ import annotations

import dataclasses
import pickle
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

from bopo_ray.errors import AttemptError, ConfigError, ModelError, RefusedError, SpendLimitError, StoreError
from bopo_ray.lanes import Lanes
from bopo_ray.method.budget import Ledger
from bopo_ray.models import desk as desk_module
from bopo_ray.models.calls import CallStore, StoredCall, call_key
from bopo_ray.models.desk import Answer, BudgetSpent, Desk, RetryPolicy
from bopo_ray.models.pool import ModelSpec, PoolSpec
from bopo_ray.models.pricing import Price, Usage
from bopo_ray.models.protocol import Message, Reply, Request, Sampling
from bopo_ray.models.spend import ModelTotals, SpendLedger
from bopo_ray.rllib import open_desk as open_desk_module
from bopo_ray.rllib.open_desk import DeskConfig, open_desk

PRICE = Price(1_000_000, 500_000, 2_000_000)
"""A micro-dollar for a prompt token, half of one for a cached one, two for a completion token."""
BOUND, MAX_TOKENS = 100, 50
WORST = 200
"""Micro-dollars of BOUND prompt and MAX_TOKENS completion tokens."""
USAGE, COST = Usage(60, 10), 80
QUICK = RetryPolicy(attempts=5, first_wait_s=0.001, longest_wait_s=0.002)
LONG_S = 30.0
"""So long a test waits for a thread; the machine may be busy."""


def failed(
    kind: str = "time-out", *, retry: bool = True, billed: bool = False, after_s: float | None = None,
    cost: int | None = None,
) -> Exception:  # fmt: skip
    return AttemptError(f"failed: {kind}", kind=kind, retry=retry, billed=billed, retry_after_s=after_s, cost=cost)


class Fake:
    """A model whose attempts come out as told; the last outcome stays. With a gate, attempts wait until it opens."""

    name = "fake"
    price = PRICE
    sampling = Sampling()
    needs_plan = False

    def __init__(
        self, *outcomes: Usage | BaseException, gate: threading.Event | None = None, takes_s: float = 0
    ) -> None:
        self.outcomes, self.gate, self.takes_s = outcomes, gate, takes_s
        self.began: list[float] = []
        self.asked = 0
        self._lock = threading.Lock()

    @property
    def identity(self) -> str:
        """The desk reads it once per call: how many threads are at the desk."""
        with self._lock:
            self.asked += 1
        return "fake"

    @property
    def calls(self) -> int:
        return len(self.began)

    def bound(self, messages: tuple[Message, ...]) -> int:
        return BOUND

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    def complete(self, request: Request) -> Reply:
        with self._lock:
            n = len(self.began)
            self.began.append(time.monotonic())
        if self.gate is not None:
            assert self.gate.wait(LONG_S)
        time.sleep(self.takes_s)
        outcome = self.outcomes[min(n, len(self.outcomes) - 1)]
        if isinstance(outcome, BaseException):
            raise outcome
        return Reply(f"reply {n}", outcome, 0.25)


def request(sample: int = 0, temperature: float = 0.7) -> Request:
    return Request((Message("user", "What next?"),), sample, temperature, MAX_TOKENS, "task")


class Office:
    """A store, a ledger, and all budgets given out: at the end nothing may be open."""

    def __init__(self, folder: Path, cap: int | None = None) -> None:
        self.folder = folder
        self.calls, self.spend = CallStore(folder / "calls.db"), SpendLedger(folder / "spend.db", cap)
        self.budgets: list[Ledger] = []

    def desk(self, retry: RetryPolicy = QUICK, replay: bool = False) -> Desk:
        return Desk(self.calls, self.spend, retry, replay)

    def budget(self, cap: int) -> Ledger:
        self.budgets.append(Ledger(cap))
        return self.budgets[-1]

    @property
    def bill(self) -> ModelTotals:
        return self.spend.totals().overall

    def claims(self) -> int:
        with closing(sqlite3.connect(self.folder / "calls.db")) as c:
            return int(c.execute("SELECT count(*) FROM claims").fetchone()[0])

    def close(self) -> None:
        assert self.bill.reserved_microusd == 0, "a reservation is open"
        assert self.claims() == 0, "a claim is open"
        for budget in self.budgets:
            assert budget.remaining == budget.cap - budget.spent >= 0, "a budget's reservation is open"
        self.calls.close()
        self.spend.close()


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    office = Office(tmp_path)
    yield office
    office.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def ask(desk: Desk, model: Fake, sample: int = 0, temperature: float = 0.7, budget: Ledger | None = None) -> Answer:
    return desk.call(model, request(sample, temperature), BOUND, budget)


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + LONG_S
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


# -- stored and shared calls ------------------------------------------------------------------------------------------


def test_a_stored_call_is_free_and_counted_as_saved(office: Office) -> None:
    model, budgets = Fake(USAGE), [office.budget(1000) for _ in range(3)]
    answers = [ask(office.desk(), model, budget=b) for b in budgets]
    assert model.calls == 1
    assert answers == [Answer(Reply("reply 0", USAGE, 0.25), COST, 0)] * 3
    assert [b.spent for b in budgets] == [COST] * 3  # an episode costs the same, stored or not
    bill = office.bill
    assert (bill.paid_calls, bill.paid_microusd, bill.saved_calls, bill.saved_microusd) == (1, COST, 2, 2 * COST)
    assert (bill.lost_calls, bill.prompt_tokens, bill.completion_tokens) == (0, 60, 10)


def test_a_desk_without_store_and_ledger_pays_each_time() -> None:
    model, desk = Fake(USAGE), Desk()
    assert [ask(desk, model).reply.text for _ in range(2)] == ["reply 0", "reply 1"]


def test_temperature_0_shares_samples_and_no_other_does(office: Office) -> None:
    model, desk = Fake(USAGE), office.desk()
    for sample in (0, 1, 2):
        ask(desk, model, sample, temperature=0.0)
    assert model.calls == 1
    for sample in (0, 1, 2, 1):
        ask(desk, model, sample, temperature=0.7)
    assert (model.calls, office.bill.saved_calls) == (4, 3)


def together(threads: ThreadPoolExecutor, model: Fake, desks: list[Desk]) -> list[Future[Answer]]:
    """A call at each desk at once, all of them waiting for the first attempt, which then ends."""
    assert model.gate is not None
    answers = [threads.submit(ask, desk, model) for desk in desks]
    until(lambda: model.asked == len(desks) and model.calls)
    time.sleep(0.1)  # from reading the model's identity to waiting
    assert model.calls == 1 and not any(a.done() for a in answers)
    model.gate.set()
    return answers


def test_threads_that_ask_the_same_at_once_pay_once(office: Office, threads: ThreadPoolExecutor) -> None:
    model, desk = Fake(USAGE, gate=threading.Event()), Desk(None, office.spend, QUICK)  # no store could answer later
    answers = together(threads, model, [desk] * 8)
    assert {a.result(LONG_S) for a in answers} == {Answer(Reply("reply 0", USAGE, 0.25), COST, 0)}
    assert (model.calls, office.bill.paid_calls, office.bill.saved_calls) == (1, 1, 7)


def test_desks_that_ask_the_same_at_once_pay_once(office: Office, threads: ThreadPoolExecutor) -> None:
    model = Fake(USAGE, gate=threading.Event())
    answers = together(threads, model, [office.desk() for _ in range(4)])
    assert {a.result(LONG_S).reply.text for a in answers} == {"reply 0"}
    assert (model.calls, office.bill.paid_calls, office.bill.saved_calls) == (1, 1, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_lanes_that_ask_the_same_at_once_pay_once_with_hardly_a_thread(office: Office, workers: int) -> None:
    model, desk, lanes = Fake(USAGE, takes_s=0.05), office.desk(), Lanes(workers)
    answers = [Future[Answer]() for _ in range(8)]

    def lane(answer: Future[Answer]) -> None:
        try:
            answer.set_result(ask(desk, model))
        except ModelError as error:
            answer.set_exception(error)

    lanes.ask(lambda: [lanes.start(lambda a=a: lane(a)) for a in answers])  # type: ignore[misc]
    outcomes = [a.exception(LONG_S) or a.result() for a in answers]
    assert {str(o) for o in outcomes} == {str(Answer(Reply("reply 0", USAGE, 0.25), COST, 0))}
    assert (model.calls, office.bill.paid_calls, office.bill.saved_calls) == (1, 1, 7)
    assert lanes.close(LONG_S)


def test_mates_of_a_maker_that_failed_fail_with_it_and_the_next_tries_anew(
    office: Office, threads: ThreadPoolExecutor
) -> None:
    """One after the other they would wait for all attempts of all before them."""
    desk, model = office.desk(), Fake(failed(retry=False), USAGE, gate=threading.Event())
    outcomes = [a.exception(LONG_S) for a in together(threads, model, [desk] * 4)]
    assert [type(o) for o in outcomes] == [AttemptError] * 4
    assert (model.calls, office.bill.paid_calls) == (1, 0)
    assert ask(desk, model).reply.text == "reply 1"


def test_a_mate_whose_maker_ran_out_of_budget_tries_for_itself(office: Office, threads: ThreadPoolExecutor) -> None:
    desk, gate = office.desk(), threading.Event()
    model, small = Fake(failed(billed=True), USAGE, gate=gate), office.budget(WORST + 50)
    maker = threads.submit(ask, desk, model, budget=small)
    until(lambda: model.calls)
    mate = threads.submit(ask, desk, model)
    until(lambda: model.asked == 2)
    time.sleep(0.05)
    gate.set()
    spent = maker.exception(LONG_S)
    assert isinstance(spent, BudgetSpent) and spent.lost == WORST
    assert mate.result(LONG_S) == Answer(Reply("reply 1", USAGE, 0.25), COST, 0)
    assert (small.spent, office.bill.lost_microusd, office.bill.paid_microusd) == (WORST, WORST, COST)


# -- retries ----------------------------------------------------------------------------------------------------------


def test_retry_after_is_waited_for(office: Office) -> None:
    model = Fake(failed("429", after_s=0.3), USAGE)
    ask(office.desk(), model)
    assert model.began[1] - model.began[0] >= 0.3


def test_a_retry_after_beyond_the_age_is_not_waited_for(office: Office) -> None:
    model, began = Fake(failed("429", after_s=600.0), USAGE), time.monotonic()
    with pytest.raises(ModelError, match="429"):
        ask(office.desk(RetryPolicy(age_s=60.0)), model)
    assert model.calls == 1 and time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("kinds", "calls"),
    [
        (["500 a"], 3),  # the same three times: an answer
        (["503 a", "503 b", "503 a", "503 b", "503 a", "503 b"], 5),  # the third "503 a"
        (["500 a", "429", "500 a", "500 b", "time-out", "500 a"], 6),
        (["no-choices"], 3),  # a 200 that can't be read, and may have been charged: as the server's errors
        (["no-choices:a", "too-long", "no-choices:b", "too-long", "cut", "too-long"], 6),
        (["time-out"], 7),  # not the server's error: until attempts are used up
    ],
)
def test_the_same_server_error_is_taken_for_an_answer(office: Office, kinds: list[str], calls: int) -> None:
    model = Fake(*map(failed, kinds))
    with pytest.raises(AttemptError) as caught:
        ask(office.desk(RetryPolicy(attempts=7, identical=3, first_wait_s=0.001, longest_wait_s=0.001)), model)
    assert caught.value.kind == kinds[min(calls, len(kinds)) - 1]
    assert model.calls == calls
    assert office.bill == ModelTotals("all")


def test_no_attempt_begins_when_the_call_is_too_old(office: Office) -> None:
    model = Fake(failed(), takes_s=0.04)
    with pytest.raises(ModelError):
        ask(office.desk(RetryPolicy(attempts=10_000, age_s=0.4, first_wait_s=0.001, longest_wait_s=0.001)), model)
    assert 2 <= model.calls <= 11
    assert model.began[-1] - model.began[0] <= 2  # 0.4, and a busy machine


def test_refusals_for_the_time_being_do_not_use_up_the_attempts(office: Office) -> None:
    model = Fake(*[failed("429")] * 20, failed(), failed("429"), failed(), USAGE)
    quick = RetryPolicy(attempts=3, age_s=60, first_wait_s=0.001, longest_wait_s=0.001)
    assert ask(office.desk(quick), model).reply.text == "reply 23"
    refused = Fake(failed("429"))
    with pytest.raises(ModelError, match="429"):
        ask(office.desk(dataclasses.replace(quick, refusals=9)), refused, sample=1)
    assert refused.calls == 9


def test_a_call_that_waits_for_its_turn_grows_no_older(office: Office) -> None:
    def queued() -> Exception:
        error = failed()
        error.queued_s = 0.2  # type: ignore[attr-defined]
        return error

    model = Fake(queued(), queued(), USAGE, takes_s=0.2)
    assert ask(office.desk(RetryPolicy(age_s=0.3, first_wait_s=0.001, longest_wait_s=0.001)), model)
    assert model.calls == 3


def test_a_claim_is_renewed_as_long_as_its_call_is_made(
    office: Office, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no longer than any call should take: whoever hangs holds nobody up for good."""
    office.calls = CallStore(office.folder / "calls.db", lease_s=1.0)
    desk, model = office.desk(), Fake(USAGE, gate=threading.Event())
    asked = threads.submit(ask, desk, model)
    until(lambda: model.calls)
    key = call_key("fake", request())
    for _ in range(8):
        time.sleep(0.25)
        desk.renew_claims()
        assert office.calls.claim(key, "another-host/1/2") is False
    monkeypatch.setattr(desk_module, "LONGEST_CALL_S", 1.0)
    desk.renew_claims()
    until(lambda: office.calls.claim(key, "another-host/1/2") is True)
    model.gate.set()
    assert asked.result(LONG_S).reply.text == "reply 0"


def test_a_call_that_waits_long_for_its_turn_keeps_its_claim(
    office: Office, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process would pay for it a second time."""
    monkeypatch.setattr(desk_module, "LONGEST_CALL_S", 0.1)
    office.calls = CallStore(office.folder / "calls.db", lease_s=1.0)
    desk, model = office.desk(), Fake(USAGE, gate=threading.Event())
    model.gives_way = True  # type: ignore[attr-defined]
    asked = threads.submit(ask, desk, model)
    until(lambda: model.calls)
    for _ in range(6):
        time.sleep(0.25)
        desk.renew_claims()
        assert office.calls.claim(call_key("fake", request()), "another-host/1/2") is False
    model.gate.set()
    assert asked.result(LONG_S).reply.text == "reply 0"


def test_where_no_thread_is_to_be_had_that_renews_it_there_is_no_claim(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, model = office.desk(), Fake(USAGE)
    desk_module._renewer.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("can't start")))
        for _ in range(2):  # the second is told, too
            with pytest.raises(RuntimeError, match="can't start"):
                ask(desk, model)
            assert office.claims() == 0
    assert ask(desk, model).reply.text == "reply 0" and desk in desk_module._DESKS


def test_the_first_attempt_counts_for_the_age(office: Office) -> None:
    model = Fake(failed(), takes_s=0.2)
    with pytest.raises(ModelError):
        ask(office.desk(RetryPolicy(age_s=0.1, first_wait_s=0.001)), model)
    assert model.calls == 1


def test_waits_grow_with_jitter_up_to_the_longest(office: Office) -> None:
    model = Fake(failed())
    with pytest.raises(ModelError):
        ask(office.desk(RetryPolicy(attempts=12, first_wait_s=0.02, longest_wait_s=0.08)), model)
    waits = [b - a for a, b in zip(model.began, model.began[1:], strict=False)]
    assert len(waits) == 11 and sum(waits) > 0.08  # 0.43 in the mean
    assert len({round(w, 3) for w in waits}) > 5


def test_what_makes_no_sense_again_is_not_tried_again(office: Office) -> None:
    for error in (failed("404", retry=False), failed("500 a", retry=False), RefusedError("wrong key"), OSError("hm")):
        model = Fake(error, USAGE)
        with pytest.raises(type(error)):
            ask(office.desk(), model)
        assert model.calls == 1


# -- the bill ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    outcome: Usage | BaseException
    paid: int = 0
    lost: int = 0


@pytest.mark.parametrize(
    "case",
    [
        Case(USAGE, paid=COST),
        Case(Usage(60, 10, cached_tokens=40), paid=60),  # 20 x 1 + 40 x 0.5 + 10 x 2
        Case(Usage(0, 0)),
        Case(Usage(BOUND, MAX_TOKENS), paid=WORST),
        Case(Usage(BOUND + 20, MAX_TOKENS - 10), paid=WORST),  # what counts is the money
        Case(failed(retry=False, billed=True), lost=WORST),
        Case(failed(retry=False, billed=True, cost=COST), lost=COST),  # it said what it cost, though not what it is
        Case(failed(retry=False, billed=True, cost=WORST + 1), lost=WORST),
        Case(failed(retry=False, billed=False)),
        Case(RefusedError("no such model")),
        Case(ConfigError("a reply without usage"), lost=WORST),
        Case(ZeroDivisionError("a defect"), lost=WORST),
        Case(KeyboardInterrupt(), lost=WORST),
    ],
    ids=repr,
)
def test_what_an_outcome_costs(office: Office, case: Case) -> None:
    model, budget = Fake(case.outcome), office.budget(1000)
    if isinstance(case.outcome, BaseException):
        with pytest.raises(type(case.outcome)):
            ask(office.desk(), model, budget=budget)
        assert office.calls.stats().calls == 0
    else:
        assert ask(office.desk(), model, budget=budget).cost == case.paid
    bill = office.bill
    assert (bill.paid_microusd, bill.lost_microusd) == (case.paid, case.lost)
    assert (bill.paid_calls, bill.lost_calls) == (isinstance(case.outcome, Usage), case.lost > 0)
    assert budget.spent == case.paid + case.lost


def test_each_attempt_counts(office: Office) -> None:
    failures = failed(billed=True), failed(billed=False), failed(billed=True, cost=70)
    model, budget = Fake(*failures, USAGE), office.budget(1000)
    assert ask(office.desk(), model, budget=budget) == Answer(Reply("reply 3", USAGE, 0.25), COST, WORST + 70)
    bill = office.bill
    assert (bill.paid_microusd, bill.lost_calls, bill.lost_microusd) == (COST, 2, WORST + 70)
    assert budget.spent == COST + WORST + 70
    again = office.budget(1000)
    assert ask(office.desk(), model, budget=again).lost == 0  # from the store: nothing was lost for this one
    assert again.spent == COST


def test_a_reply_above_its_bound_is_recorded_as_it_is_and_stops_the_run(office: Office) -> None:
    above, budget = Usage(BOUND, MAX_TOKENS + 1), office.budget(WORST)
    model = Fake(above)
    with pytest.raises(ConfigError, match=r"fake reported 100 prompt and 51 completion tokens .* \$0.000200") as caught:
        ask(office.desk(), model, budget=budget)
    assert not isinstance(caught.value, RefusedError)
    assert (model.calls, office.bill.paid_microusd, office.bill.lost_calls) == (1, WORST + 2, 0)
    assert budget.spent == WORST
    assert ask(office.desk(), model).reply.usage == above  # it was paid for: never again
    assert model.calls == 1


def test_a_reply_that_cannot_be_stored_is_billed(office: Office) -> None:
    class Full(CallStore):
        def put(self, key: str, call: StoredCall) -> None:
            raise StoreError("the disk is full")

    full, budget = Full(office.folder / "calls.db"), office.budget(1000)
    with pytest.raises(StoreError, match="full"):
        ask(Desk(full, office.spend, QUICK), Fake(USAGE), budget=budget)
    full.close()
    assert (office.bill.paid_microusd, budget.spent) == (COST, COST)


def test_a_ledger_that_is_gone_leaves_the_budget_whole(office: Office, tmp_path: Path) -> None:
    spend, budget, model = SpendLedger(tmp_path / "gone.db", 1000), office.budget(1000), Fake(USAGE)
    (tmp_path / "gone.db").unlink()
    with pytest.raises(StoreError):
        ask(Desk(office.calls, spend, QUICK), model, budget=budget)
    assert (model.calls, budget.remaining) == (0, 1000)


# -- limits -----------------------------------------------------------------------------------------------------------


def test_the_runs_limit(tmp_path: Path) -> None:
    office = Office(tmp_path, cap=COST + WORST)
    desk, model, budget = office.desk(), Fake(USAGE), office.budget(10_000)
    for sample in (0, 1):  # the second takes the last micro-dollar into account, and gives some back
        ask(desk, model, sample, budget=budget)
    with pytest.raises(SpendLimitError, match=r"fake may cost \$0.000200.*--max-spend"):
        ask(desk, model, 2, budget=budget)
    assert (model.calls, budget.spent, office.bill.spent_microusd) == (2, 2 * COST, 2 * COST)
    assert ask(desk, model, 1).cost == COST  # stored calls go on
    office.close()


def test_what_others_have_reserved_is_waited_for(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    office = Office(tmp_path, cap=WORST + COST)
    desk, gate = office.desk(), threading.Event()
    first, second = Fake(USAGE, gate=gate), Fake(USAGE)
    one = threads.submit(ask, desk, first, 1)
    until(lambda: first.calls)
    two = threads.submit(ask, office.desk(), second, 2)
    time.sleep(0.3)
    assert not two.done() and second.calls == 0
    gate.set()
    assert one.result(LONG_S).cost == two.result(LONG_S).cost == COST
    assert office.bill.paid_microusd == 2 * COST
    office.close()


def test_waiting_ends_when_what_came_back_is_too_little(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    office, gate = Office(tmp_path, cap=WORST + COST - 1), threading.Event()
    first, second = Fake(USAGE, gate=gate), Fake(USAGE)
    one = threads.submit(ask, office.desk(), first, 1)
    until(lambda: first.calls)
    two = threads.submit(ask, office.desk(), second, 2)
    time.sleep(0.1)
    gate.set()
    assert one.result(LONG_S).cost == COST
    assert isinstance(two.exception(LONG_S), SpendLimitError) and second.calls == 0
    office.close()


@pytest.mark.parametrize(("cap", "enough"), [(0, False), (WORST - 1, False), (WORST, True)])
def test_an_episodes_budget_pays_the_worst_case_or_nothing(office: Office, cap: int, enough: bool) -> None:
    model, budget = Fake(USAGE), office.budget(cap)
    if enough:
        assert ask(office.desk(), model, budget=budget).cost == budget.spent == COST
    else:
        with pytest.raises(BudgetSpent):
            ask(office.desk(), model, budget=budget)
        assert (model.calls, budget.spent, office.bill) == (0, 0, ModelTotals("all"))


@pytest.mark.parametrize("billed", [(), (True,), (True, False, True)])
def test_a_spent_budget_says_what_was_lost_before(office: Office, billed: tuple[bool, ...]) -> None:
    lost = sum(billed) * WORST
    model, budget = Fake(*(failed(billed=b) for b in billed), USAGE), office.budget(lost + WORST - 1)
    with pytest.raises(BudgetSpent) as caught:
        ask(office.desk(), model, budget=budget)
    assert (model.calls, caught.value.lost, budget.spent, office.bill.lost_microusd) == (len(billed), lost, lost, lost)
    assert pickle.loads(pickle.dumps(caught.value)).lost == lost


def test_a_stored_call_needs_its_cost_only(office: Office) -> None:
    model, desk = Fake(USAGE), office.desk()
    ask(desk, model)
    assert ask(desk, model, budget=office.budget(COST)).cost == COST
    with pytest.raises(BudgetSpent):
        ask(desk, model, budget=office.budget(COST - 1))
    assert (model.calls, office.bill.saved_calls) == (1, 1)


def test_replay_answers_from_the_store_alone(office: Office) -> None:
    model = Fake(USAGE)
    ask(office.desk(), model)
    replay, budget = office.desk(replay=True), office.budget(1000)
    assert ask(replay, model, budget=budget).reply.text == "reply 0"
    for _ in range(2):  # a claim left behind would make the second wait for ever
        with pytest.raises(ConfigError, match=r"call of fake is not among the recorded ones.*--replay"):
            ask(replay, model, 1, budget=budget)
        assert office.claims() == 0
    assert (model.calls, budget.spent, office.bill.paid_calls) == (1, COST, 1)


# -- anything may happen ----------------------------------------------------------------------------------------------

USAGES = st.builds(
    lambda prompt, completion, cached: Usage(prompt, completion, cached * prompt // 100),
    st.one_of(st.just(BOUND), st.integers(0, BOUND)), st.one_of(st.just(MAX_TOKENS), st.integers(0, MAX_TOKENS)),
    st.integers(0, 100),
)  # fmt: skip
FAILURES = st.one_of(
    st.builds(
        lambda kind, retry, billed: failed(kind, retry=retry, billed=billed),
        st.sampled_from(("500 a", "429", "time-out")), st.booleans(), st.booleans(),
    ),
    st.sampled_from((RefusedError("refused"), ConfigError("no usage"), OSError("a defect"))),
)  # fmt: skip
CALLS = st.tuples(
    st.lists(st.one_of(USAGES, FAILURES), min_size=1, max_size=4), st.integers(0, 5), st.sampled_from((None, 0, 1))
)
"""Outcomes of the attempts, sample, and whose budget."""


def check_any_calls(
    calls: list[tuple[list[Usage | Exception], int, int | None]], cap: int, caps: tuple[int, int], n_threads: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(n_threads) as threads:
        office, at_once = Office(Path(folder), cap), RetryPolicy(attempts=4, first_wait_s=0, longest_wait_s=0)
        desk, budgets, paid = office.desk(at_once), [office.budget(c) for c in caps], list[int]()

        def one(outcomes: list[Usage | Exception], sample: int, whose: int | None) -> None:
            model = Fake(*outcomes)
            try:
                answer = ask(desk, model, sample, budget=None if whose is None else budgets[whose])
            except (ModelError, ConfigError, OSError, SpendLimitError, BudgetSpent):
                pass
            else:
                assert answer.cost == PRICE.cost(answer.reply.usage)
                paid.extend([answer.cost] if model.calls else [])
            bill = office.bill
            assert bill.spent_microusd + bill.reserved_microusd <= cap
            assert all(b.spent <= b.cap for b in budgets)

        for done in [threads.submit(one, *call) for call in calls]:
            done.result()
        bill = office.bill
        assert bill.paid_calls == len(paid) == office.calls.stats().calls
        assert bill.paid_microusd == sum(paid)
        office.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(CALLS, max_size=12), st.integers(0, 1200), st.tuples(st.integers(0, 600), st.integers(0, 600)))
def test_no_order_of_calls_breaks_a_cap(
    calls: list[tuple[list[Usage | Exception], int, int | None]], cap: int, caps: tuple[int, int]
) -> None:
    check_any_calls(calls, cap, caps, n_threads=1)


@settings(max_examples=20, deadline=None)
@given(st.lists(CALLS, min_size=4, max_size=16), st.integers(0, 1500), st.tuples(*[st.integers(0, 900)] * 2))
def test_no_calls_at_once_break_a_cap(
    calls: list[tuple[list[Usage | Exception], int, int | None]], cap: int, caps: tuple[int, int]
) -> None:
    check_any_calls(calls, cap, caps, n_threads=4)


class Lossy:
    """The way to an actor that is restarted now and then: some questions are lost, of others only the answer."""

    def __init__(self, office: Office, lose: str) -> None:
        self.office, self.lose, self.asked = office, iter(lose), list[str]()

    def ask(self, question: Any) -> Any:
        self.asked.append(question.method)
        how = next(self.lose, ".")
        if how == "q":
            raise ModelError("the actor does not answer")
        answer = getattr(getattr(self.office, question.part), question.method)(*question.args)
        if how == "a":
            raise ModelError("the actor does not answer")
        return answer


@pytest.mark.parametrize("lose", ["..q", "..a", "..aq", "...q", "...a", "..qa.aqa"])
def test_a_paid_reply_outlives_the_restart_of_the_desks_actor(
    office: Office, lose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """claim, reserve, put and settle: the first is told once, the others until they are heard."""
    monkeypatch.setattr(open_desk_module, "AGAIN_S", 0.001)
    line, model = Lossy(office, lose), Fake(USAGE)
    desk = Desk(open_desk_module._Remote(line, "calls"), open_desk_module._Remote(line, "spend"), QUICK)  # type: ignore[arg-type]
    assert ask(desk, model).reply.text == ask(desk, model).reply.text == "reply 0"
    assert (model.calls, office.bill.paid_calls, office.bill.paid_microusd) == (1, 1, COST)
    assert line.asked.count("claim") == 2 and line.asked.count("reserve") == 1


def test_an_actor_that_is_gone_for_good_is_not_waited_for(office: Office) -> None:
    class Gone(Lossy):
        def ask(self, question: Any) -> Any:
            self.asked.append(question.method)
            raise ModelError("the actor does not answer") from ActorDiedError()

    line = Gone(office, "")
    with pytest.raises(ModelError):
        open_desk_module._Remote(line, "calls").put("key", None)  # type: ignore[arg-type]
    assert line.asked == ["put"]


def test_the_threads_of_a_process_share_one_desk(tmp_path: Path) -> None:
    """Of hundreds that each had their own, the last waited for a minute before the file and gave up."""
    config = DeskConfig(str(tmp_path / "calls.db"), str(tmp_path / "spend.db"))
    together = threading.Barrier(64)

    def opened(_: int) -> Desk:
        together.wait(LONG_S)
        return open_desk(config)

    with ThreadPoolExecutor(64) as threads:
        assert len({id(desk) for desk in threads.map(opened, range(64))}) == 1


def test_the_processes_of_a_cluster_are_lent_the_keys_in_use_and_where_the_tasks_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"MY_KEY": "k", "OPENAI_ORG_ID": "o", "ALFWORLD_DATA": "more", "OTHER_KEY": "x"}.items():
        monkeypatch.setenv(name, value)
    for name in ("OPENAI_PROJECT_ID", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    hub = {"HF_TOKEN": "t", "HF_HOME": "~/hub"}
    for name, value in hub.items():
        monkeypatch.setenv(name, value)
    models = tuple(
        ModelSpec(f"openai:{n}", price=PRICE, base_url="http://127.0.0.1:1/v1", key_variable=key)
        for n, key in (("a", "MY_KEY"), ("b", ""))
    )
    lent = open_desk_module.lent_environment(PoolSpec(models))
    assert lent == hub | {"MY_KEY": "k", "OPENAI_ORG_ID": "o", "ALFWORLD_DATA": str(tmp_path / "more")}
