"""The desk: every model call of a run passes here. It looks up, reserves, calls, bills and stores.

Always true here: a call that is in the store is never paid again, and two that ask the same at once pay once; no
attempt is made whose worst case the run's ledger or the episode's budget can't pay; a reply is stored before it is
billed and billed before it is used; an attempt whose reply never came, and may have been charged, counts at its worst
case, or at the usage that came.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from typing import Protocol
from weakref import WeakSet

from tenacity import RetryCallState, Retrying, retry_if_exception
from tenacity.wait import wait_random_exponential

from bopo_ray.errors import AttemptError, ConfigError, RefusedError, SpendLimitError
from bopo_ray.lanes import aside, result
from bopo_ray.method.budget import Ledger
from bopo_ray.models.calls import StoredCall, call_key, owner_id
from bopo_ray.models.pricing import Usage
from bopo_ray.models.protocol import LanguageModel, Reply, Request
from bopo_ray.models.spend import Totals

log = logging.getLogger(__name__)
RENEW_S = 60.0
"""Between two renewals of the claims of this process."""
LONGEST_CALL_S = 3600.0
"""A claim is renewed for so long at most: whoever hangs in a call must not hold up everybody else for good. But not one
on a model that gives way, see `LanguageModel`: it hangs in no attempt, and may have hours to wait for its turn."""
BELIEVED = ("5", "no-choices", "too-long")
"""How the kinds of failures begin that are an endpoint's answer when they come again and again."""

__all__ = ["Answer", "BudgetSpent", "Calls", "Desk", "RetryPolicy", "Spend"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to give an attempt up."""

    attempts: int = 8
    """At most so many attempts at a call, besides those that were refused for the time being (429)."""
    refusals: int = 40
    """At most so many of those: a quota of a minute passes."""
    age_s: float = 300.0
    """No attempt begins so many seconds after the first one did; while it waits for its turn a call grows no older."""
    identical: int = 3
    """So often the same server error (5xx with the same body), or a 200 without a choice, is taken for an answer."""
    first_wait_s: float = 0.5
    """Longest wait before the second attempt; doubles each time. Each wait is drawn between 0 and that."""
    longest_wait_s: float = 30.0
    """Bound on a wait that the endpoint did not ask for."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply and what it means for the bill."""

    reply: Reply
    cost: int
    """Micro-dollars of its usage at the model's price: what the call costs whoever makes it, stored or not."""
    lost: int
    """Micro-dollars, worst case where no usage came, of attempts at this call whose reply never did."""


class BudgetSpent(Exception):  # noqa: N818 (not an error: the episode's cap did its work)
    """What is left of the episode's budget can't pay for another attempt."""

    def __init__(self, lost: int = 0) -> None:
        """`lost`: micro-dollars, worst case, of this call's attempts before, whose reply never came."""
        super().__init__(lost)
        self.lost = lost


class Calls(Protocol):
    """What the desk asks of a call store, see `bopo_ray.models.calls.CallStore`."""

    def claim(self, key: str, owner: str) -> StoredCall | bool: ...
    def put(self, key: str, call: StoredCall) -> None: ...
    def renew(self, keys: Sequence[str], owner: str) -> None: ...
    def release(self, key: str, owner: str) -> None: ...


class Spend(Protocol):
    """What the desk asks of a run's ledger, see `bopo_ray.models.spend.SpendLedger`."""

    def reserve(self, owner: str, key: str, model: str, amount: int) -> int | None: ...
    def settle(self, reservation: int, usage: Usage, cost: int) -> bool: ...
    def lose(self, reservation: int, cost: int | None = None) -> None: ...
    def release(self, reservation: int) -> None: ...
    def count_saved(self, model: str, cost: int, calls: int = 1) -> None: ...
    def recover(self, find: Callable[[str], tuple[Usage, int] | None]) -> None: ...
    def totals(self) -> Totals: ...


class Desk:
    """One per process, shared by its episodes. Thread-safe."""

    def __init__(
        self, calls: Calls | None = None, spend: Spend | None = None, retry: RetryPolicy | None = None,
        replay: bool = False,
    ) -> None:  # fmt: skip
        """
        Args:
            calls: the store; None keeps no call.
            spend: the run's ledger; None spends without a limit or a record.
            retry: when to give up.
            replay: answer from the store alone; a call that is not there is an error.
        """
        self._calls, self._spend, self._replay = calls, spend, replay
        self._retry = retry or RetryPolicy()
        self._owner = owner_id()
        self._lock = threading.Lock()
        self._in_flight: dict[str, list[Future[StoredCall]]] = {}
        """Calls that are being made, and who else waits for each: mostly nobody."""
        self._claimed: dict[str, float] = {}
        """Keys of those that are claimed in the store, and since when they may hang, by `time.monotonic`."""

    def call(self, model: LanguageModel, request: Request, prompt_bound: int, budget: Ledger | None = None) -> Answer:
        """The model's reply to `request`, from the store or paid for.

        Args:
            model: who is asked.
            request: what.
            prompt_bound: at least the prompt tokens that it will be billed for.
            budget: the episode's, in micro-dollars.

        Raises:
            BudgetSpent: the episode can't pay for an attempt.
            SpendLimitError: the run can't.
            ModelError: no usable answer came, attempts are used up.
            ConfigError: no such call can ever succeed (RefusedError), or its reply can't be billed.
        """
        key = call_key(model.identity, request)
        while True:
            with self._lock:
                mates = self._in_flight.get(key)
                if mates is None:
                    self._in_flight[key] = []
                    break
                mates.append(made := Future[StoredCall]())
            try:
                return self._saved(model, result(made), budget)
            except BudgetSpent:
                continue  # the mate's budget: this one has another
        try:
            stored = self._claim(key, model)
            if stored is not None:
                answer = self._saved(model, stored, budget)
            else:
                answer = self._pay(key, model, request, prompt_bound, budget)
        except BaseException as error:
            for mate in self._landed(key):
                mate.set_exception(error)
            raise
        r = answer.reply
        for mate in self._landed(key):
            mate.set_result(StoredCall(model.name, r.text, r.usage, r.latency_s))
        return answer

    def _landed(self, key: str) -> list[Future[StoredCall]]:
        """Who waits for the call, which is in flight no longer."""
        with self._lock:
            self._claimed.pop(key, None)
            return self._in_flight.pop(key)

    def _claim(self, key: str, model: LanguageModel) -> StoredCall | None:
        """The stored call, or None with the right to make it; waits while another process makes it."""
        if self._calls is None:
            return None
        _keep_renewing(self)  # before there is a claim: the system may give no thread
        pause_s = 0.005
        while True:
            claim = self._calls.claim(key, self._owner)
            if isinstance(claim, StoredCall):
                return claim
            if claim:
                if self._replay:
                    self._calls.release(key, self._owner)
                    raise ConfigError(
                        f"a call of {model.name} is not among the recorded ones: the recording is of another run, "
                        "model or setting; give the settings that it was made with, or leave out --replay"
                    )
                self._claimed[key] = math.inf if getattr(model, "gives_way", False) else time.monotonic()
                return None
            aside(time.sleep, pause_s)
            pause_s = min(2 * pause_s, 0.2)

    def renew_claims(self) -> None:
        """Begins the lease of all claims anew, but for those of calls that take longer than any should."""
        since = time.monotonic() - LONGEST_CALL_S
        if self._calls is not None and (keys := [k for k, began in list(self._claimed.items()) if began > since]):
            self._calls.renew(keys, self._owner)

    def _saved(self, model: LanguageModel, call: StoredCall, budget: Ledger | None) -> Answer:
        cost = model.price.cost(call.usage)
        if budget is not None:
            handle = budget.reserve(cost)
            if handle is None:
                raise BudgetSpent
            budget.settle(handle, cost)
        if self._spend is not None:
            self._spend.count_saved(model.name, cost)
        return Answer(Reply(call.text, call.usage, call.latency_s), cost, 0)

    def _pay(
        self, key: str, model: LanguageModel, request: Request, prompt_bound: int, budget: Ledger | None
    ) -> Answer:
        worst = model.price.cost(Usage(prompt_bound, request.max_tokens))
        lost, stored = 0, False

        def once() -> Answer:
            nonlocal lost
            try:
                reply = self._attempt(key, model, request, worst, budget)
            except AttemptError as error:
                lost += _lost(error, worst) or 0
                raise
            except BudgetSpent:
                raise BudgetSpent(lost) from None
            return Answer(reply, model.price.cost(reply.usage), lost)

        begun = time.monotonic()
        try:
            try:
                answer = once()
            except AttemptError as error:
                answer = self._again(once, error, time.monotonic() - begun)
            stored = True
            return answer
        finally:
            if not stored and self._calls is not None:
                self._calls.release(key, self._owner)

    def _again(self, once: Callable[[], Answer], failed: AttemptError, took_s: float) -> Answer:
        """The answer of a later attempt than the first, which `failed` after `took_s`.

        Most calls succeed at once, and to prepare for more attempts is a seventh of the harness's work at a step.
        """
        seen, first, queued_s = Counter[str](), [failed], 0.0

        def again(error: BaseException) -> bool:
            nonlocal queued_s
            if not isinstance(error, AttemptError) or not error.retry:
                return False
            seen[error.kind] += 1
            queued_s += error.queued_s
            return not error.kind.startswith(BELIEVED) or seen[error.kind] < self._retry.identical

        def attempt() -> Answer:
            if first:
                raise first.pop()
            return once()

        p = self._retry

        def over(state: RetryCallState) -> bool:
            age_s = took_s + state.seconds_since_start + state.upcoming_sleep - queued_s  # type: ignore[operator]
            refused = seen["429"]
            return state.attempt_number - refused >= p.attempts or refused >= p.refusals or age_s >= p.age_s

        retrying = Retrying(
            stop=over, wait=_Wait(p), retry=retry_if_exception(again), reraise=True,
            sleep=lambda s: aside(time.sleep, s),
        )  # fmt: skip
        return retrying(attempt)

    def _attempt(self, key: str, model: LanguageModel, request: Request, worst: int, budget: Ledger | None) -> Reply:
        """Reserves, calls, stores and settles."""
        handle = budget.reserve(worst) if budget is not None else None
        if budget is not None and handle is None:
            raise BudgetSpent
        try:
            reservation = self._reserve(key, model.name, worst)
            if self._spend is not None and reservation is None:
                raise SpendLimitError(
                    f"the next call of {model.name} may cost ${worst / 1e6:.6f}, more than is left of --max-spend"
                )
        except BaseException:
            if budget is not None and handle is not None:
                budget.release(handle)
            raise
        try:
            # A thread that only waits for another one costs as much as the call itself.
            gives_way = getattr(model, "gives_way", False)
            reply = model.complete(request) if gives_way else aside(model.complete, request)
        except BaseException as error:
            lost = _lost(error, worst)
            if budget is not None and handle is not None:
                budget.settle(handle, lost or 0)
            if self._spend is not None and reservation is not None:
                self._spend.release(reservation) if lost is None else self._spend.lose(reservation, lost)
            raise
        cost = model.price.cost(reply.usage)
        try:
            if self._calls is not None:
                self._calls.put(key, StoredCall(model.name, reply.text, reply.usage, reply.latency_s))
        finally:  # it is billed also where it can't be stored
            if budget is not None and handle is not None:
                budget.settle(handle, min(cost, worst))
            if self._spend is not None and reservation is not None:
                self._spend.settle(reservation, reply.usage, cost)
        if cost > worst:
            u = reply.usage
            raise ConfigError(
                f"{model.name} reported {u.prompt_tokens} prompt and {u.completion_tokens} completion tokens where at "
                f"most {request.max_tokens} completion tokens and ${worst / 1e6:.6f} were possible: no budget can "
                "hold; is max_tokens_field right for this endpoint?"
            )
        return reply

    def _reserve(self, key: str, model: str, worst: int) -> int | None:
        """A reservation in the run's ledger, or None when there is no ledger or the limit is reached.

        What others have reserved will mostly come back: it is waited for before giving up.
        """
        if self._spend is None:
            return None
        pause_s = 0.02
        while True:
            reservation = self._spend.reserve(self._owner, key, model, worst)
            if reservation is not None:
                return reservation
            self._spend.recover(_unknown)  # of the dead; the run's start and end look up what was paid after all
            if not self._spend.totals().overall.reserved_microusd:
                return self._spend.reserve(self._owner, key, model, worst)
            aside(time.sleep, pause_s)
            pause_s = min(2 * pause_s, 1.0)


_DESKS: WeakSet[Desk] = WeakSet()
"""Whose claims this process renews."""


def _keep_renewing(desk: Desk) -> None:
    """From now on the desk's claims are renewed."""
    if desk not in _DESKS:
        _renewer(os.getpid())
        _DESKS.add(desk)


@cache
def _renewer(pid: int) -> threading.Thread:
    """The thread of this process that renews claims: a call may wait for its turn longer than a lease."""

    def renew() -> None:
        while True:
            time.sleep(RENEW_S)
            try:
                for desk in list(_DESKS):
                    desk.renew_claims()
            except Exception as error:  # the next time may succeed, and a lease is several times as long
                log.warning("claims could not be renewed: %s", error)

    thread = threading.Thread(target=renew, name="claims", daemon=True)
    thread.start()
    return thread


def _lost(error: BaseException, worst: int) -> int | None:
    """What an attempt that failed counts at; None where nothing can have been charged."""
    if isinstance(error, AttemptError):
        known = worst if error.cost is None else min(error.cost, worst)
        return known if error.billed else None
    return None if isinstance(error, RefusedError) else worst


def _unknown(key: str) -> None:
    """No stored call."""


class _Wait(wait_random_exponential):
    """Full jitter, and never less than what the endpoint asked for."""

    def __init__(self, policy: RetryPolicy) -> None:
        super().__init__(multiplier=policy.first_wait_s, max=policy.longest_wait_s)

    def __call__(self, retry_state: RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        asked = error.retry_after_s if isinstance(error, AttemptError) and error.retry_after_s else 0.0
        return max(asked, super().__call__(retry_state))
