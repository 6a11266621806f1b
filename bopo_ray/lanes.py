"""Lanes: many episodes that take turns on one thread, each written as plain code that waits.

An episode waits for a model most of its time, and then works for a millisecond. With a thread for each, hundreds of
them wake each other and fight over the interpreter, and a step takes twice the CPU time that it takes alone. On one
thread they never meet, and what several want at the same moment (a change of the ledger, the router's decision) is done
for all of them at once.

The thread is the one of the process's event loop, so that a reply of an endpoint wakes nobody else on its way to the
lane that waits for it. Code that runs in a lane waits in four ways: `aside`, `together`, `result` and `finish`. Outside
of a lane they just call, so that the same desk and the same environment serve a program with one episode, or with
threads of its own.

Always true here: a lane gives way in these four and nowhere else; what was raised there is raised where the lane waits;
the event loop never waits for a lane.

The turns are greenlets: with coroutines, whatever waits somewhere below must be written twice, for programs with an
event loop and without.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar, cast

from greenlet import getcurrent, greenlet

from bopo_ray.loop import LOAD, event_loop, on_the_loop

__all__ = ["Busy", "Lanes", "aside", "finish", "result", "together"]

GATHER_S = 0.003
"""So long a call of few together waits for more where the thread is always busy; the less, the more time it has, and
not at all where it has half of it. The larger calls save a quarter of a step's CPU time (50 ms models, 16 lanes), and
the wait costs an eighth of the steps where nobody lacks that time."""
CROWD = 8
"""So many times as many share a bounded call where the thread is always busy: its lanes wait in any case."""
PAUSE_S = 0.0001, 0.004
"""Longest wait after the first `Busy`, which doubles with each that follows, and the bound on it; a loop that has
nothing else to do counts whole milliseconds."""
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Busy(Exception):  # noqa: N818 (not an error: others have their turn)
    """What a call together needs is in use elsewhere: nothing was done, and it is asked again a little later."""


def aside(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What `function` returns, which may take its time: from a lane it is called in another thread."""
    lane = getcurrent()
    if isinstance(lane, _Lane):
        return cast(R, lane.lanes._aside(lane, lambda: function(*args, **kwargs)))
    return function(*args, **kwargs)


def result(future: Future[R]) -> R:
    """What comes of a future that somebody else fulfils, perhaps another lane."""
    lane = getcurrent()
    if isinstance(lane, _Lane):
        lane.lanes._wait(lane, future)
    return future.result()


def finish(work: Coroutine[Any, Any, R]) -> R:
    """What a coroutine returns, which runs on the process's event loop; whoever is interrupted meanwhile drops it."""
    lane = getcurrent()
    if isinstance(lane, _Lane):
        return lane.lanes._finish(lane, work)
    if on_the_loop():
        work.close()
        raise RuntimeError("the event loop can't wait for itself: what it runs is to await, and a lane to finish")
    future = asyncio.run_coroutine_threadsafe(work, event_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def together(
    function: Callable[[Sequence[T]], Sequence[R | Exception]], item: T, at_most: int = 0, apart: bool = False
) -> R:
    """What `function` answers for `item`; lanes that ask it at the same moment share a call.

    Args:
        function: answers each of several items, in their order, by a value or by an exception to raise. Where it
            raises `Busy`, other lanes have their turns, and may join, before it is asked again.
        item: one of them.
        at_most: so many of them in one call, whose lanes are on their way again before the next one, so that not all of
            them march in step. A busy thread waits for them for up to `GATHER_S`, and takes up to `CROWD` times as many
            where they are there. 0: as many as there are, at once, and first.
        apart: the call takes so long that it is made in another thread, one at a time; who comes meanwhile shares the
            next one.
    """
    lane = getcurrent()
    if isinstance(lane, _Lane):
        return cast(R, lane.lanes._together(lane, (at_most, function, apart), item))
    for refused in itertools.count(1):
        try:
            (answer,) = function([item])
            break
        except Busy:
            time.sleep(_pause(refused))
    if isinstance(answer, Exception):
        raise answer
    return answer


def _pause(refused: int) -> float:
    """Seconds to wait after so many times `Busy`, drawn, so that processes that want the same don't march in step."""
    first_s, most_s = PAUSE_S
    return random.random() * float(min(first_s * 2 ** min(refused - 1, 10), most_s))


class _Lane(greenlet):
    """Work that takes turns with others."""

    def __init__(self, lanes: Lanes, work: Callable[[], object]) -> None:
        super().__init__(work)
        self.lanes = lanes


class Lanes:
    """Lanes that take turns on the event loop's thread."""

    def __init__(self, workers: int) -> None:
        """`workers`: most threads for what is done `aside`; with none, it is done on the spot."""
        self._workers, self._threads, self._away = workers, 0, 0
        """Most threads, how many there are, and lanes that wait for them."""
        self._aside_jobs: SimpleQueue[Callable[[], Callable[[], None]] | None] = SimpleQueue()
        """What they do; it returns the turn that can be taken then."""
        self._ready: deque[Callable[[], None]] = deque()
        """Turns that other threads have made possible ..."""
        self._awake = False
        """... and whether the loop has been told of them."""
        self._batches: dict[Hashable, list[tuple[_Lane, Any]]] = {}
        """Who waits for a call together, by (at_most, function, apart)."""
        self._apart: set[Hashable] = set()
        """Those that are being made in another thread."""
        self._since: dict[Hashable, float] = {}
        """Since when, where that is bounded."""
        self._refused: dict[Hashable, tuple[int, float]] = {}
        """Calls that were `Busy`: how often, and until when they wait."""
        self._turns = 0
        """That were taken since the batches were looked at last."""
        self._looking: asyncio.Handle | None = None
        """When they are looked at next."""
        self._alive = 0
        self._begun = self._closing = False
        self._ended = threading.Event()
        self._hub: greenlet | None = None

    def start(self, work: Callable[[], object]) -> None:
        """A new lane, from any thread. `work` raises nothing."""
        self._begun = True
        self._put(partial(self._begin, work))

    def ask(self, work: Callable[[], R]) -> R:
        """What a lane of its own returns, or raises; the calling thread waits for it, so no lane may ask."""
        if on_the_loop():
            raise RuntimeError("a lane can't wait for another one by ask: it has result and submit")
        return self.submit(work).result()

    def submit(self, work: Callable[[], R]) -> Future[R]:
        """What a lane of its own will return, or raise."""
        answer = Future[R]()

        def lane() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(work())
            except BaseException as error:
                answer.set_exception(error)

        self.start(lane)
        return answer

    def close(self, timeout_s: float) -> bool:
        """Waits so long for the lanes to end, and says whether they have; threads for what is done aside end with the
        last of them."""
        if not self._begun:
            return True

        def closing() -> None:
            self._closing = True
            self._end()

        self._put(closing)
        return self._ended.wait(timeout_s)

    # -- from any thread --------------------------------------------------------------------------------------------

    def _put(self, turn: Callable[[], None]) -> None:
        """A turn that can be taken."""
        self._ready.append(turn)
        if not self._awake:  # to wake the loop costs as much as a short turn
            try:
                self._awake = True
                event_loop().call_soon_threadsafe(self._take)
            except BaseException:  # Ctrl-C: the next turn wakes it
                self._awake = False
                raise

    # -- on the loop's thread ---------------------------------------------------------------------------------------

    def _take(self) -> None:
        """All turns that can be taken."""
        while True:
            while self._ready:
                try:
                    self._turn(self._ready.popleft())
                except BaseException:
                    asyncio.get_running_loop().call_soon(self._take)
                    raise
            self._awake = False
            if not self._ready:  # who puts one from now on sees that nobody is awake
                return
            self._awake = True

    def _turn(self, turn: Callable[[], object]) -> None:
        """One of them, after which a batch may be complete."""
        self._hub = getcurrent()
        turn()
        self._turns += 1
        if self._batches:
            self._look(0.0)

    def _look(self, wait_s: float) -> None:
        """So long from now, looks at who waits for a call together."""
        loop = asyncio.get_running_loop()
        if isinstance(self._looking, asyncio.TimerHandle):
            self._looking.cancel()
            self._looking = None
        if self._looking is None:
            self._looking = loop.call_later(wait_s, self._see) if wait_s else loop.call_soon(self._see)

    def _see(self) -> None:
        """Calls one batch, unless lanes still have their turns, or may come."""
        self._looking = None
        if self._turns:
            self._turns = 0
            self._look(0.0)
        elif due := self._due():
            if wait_s := self._patience(due):
                self._look(wait_s)
            else:
                self._call(due)
                if self._batches:
                    self._look(0.0)

    def _due(self) -> Any:
        """The batch to call when no turn can be taken; None where none waits."""
        keys = self._batches.keys() - self._apart if self._apart else self._batches
        return min(keys, key=self._rank, default=None)

    def _rank(self, key: Any) -> tuple[float, int]:
        return self._refused.get(key, (0, 0.0))[1], key[0]

    @property
    def _hurry(self) -> float:
        """0 where the thread has half of its time or more, 1 where it has none."""
        return max(0.0, 2 * LOAD.busy - 1)

    def _room(self, key: Any) -> int:
        """So many lanes share this call; 0: all."""
        return int(key[0] * (1 + (CROWD - 1) * self._hurry))

    def _patience(self, key: Any) -> float:
        """Seconds until the batch is called although more lanes may yet come to it; 0 when enough are there."""
        if key in self._refused:
            return max(0.0, self._refused[key][1] - time.monotonic())
        enough = min(key[0], self._alive)
        if not self._workers or not self._hurry or len(self._batches[key]) >= enough:
            return 0.0
        return max(0.0, self._since[key] + self._hurry * GATHER_S - time.monotonic())

    def _call(self, key: Any) -> None:
        waiting = self._batches.pop(key)
        if room := self._room(key):
            self._since.pop(key, None)
            if len(waiting) > room:
                waiting, self._batches[key] = waiting[:room], waiting[room:]
                self._since[key] = 0.0
        if not (key[2] and self._workers):
            self._resume(key, waiting, self._answers(key, waiting))
            return
        try:
            self._elsewhere(lambda: partial(self._land, key, waiting, self._answers(key, waiting)))
        except Exception as error:  # as in `_answers`, nobody may wait for ever
            self._resume(key, waiting, [error] * len(waiting))
        else:
            self._apart.add(key)

    def _answers(self, key: Any, waiting: Sequence[tuple[_Lane, Any]]) -> Sequence[Any] | Busy:
        try:
            answers: Sequence[Any] = key[1]([item for _, item in waiting])
            if len(answers) != len(waiting):
                raise ValueError(f"{len(answers)} answers for {len(waiting)} items")
            return answers
        except Busy as busy:
            return busy
        except BaseException as error:  # whatever it is, nobody may wait for ever
            return [error] * len(waiting)

    def _land(self, key: Any, waiting: list[tuple[_Lane, Any]], answers: Sequence[Any] | Busy) -> None:
        self._away -= 1
        self._apart.discard(key)
        self._resume(key, waiting, answers)

    def _resume(self, key: Any, waiting: list[tuple[_Lane, Any]], answers: Sequence[Any] | Busy) -> None:
        """The lanes go on with what came of their call."""
        if isinstance(answers, Busy):
            times = self._refused.get(key, (0, 0.0))[0] + 1
            self._refused[key] = times, time.monotonic() + _pause(times)
            self._batches[key] = waiting + self._batches.get(key, [])
            if key[0]:
                self._since[key] = 0.0
            return
        self._refused.pop(key, None)
        for (lane, _), answer in zip(waiting, answers, strict=True):
            if isinstance(answer, BaseException):
                lane.throw(answer)
            else:
                lane.switch(answer)

    def _begin(self, work: Callable[[], object]) -> None:
        self._alive += 1
        _Lane(self, lambda: self._live(work)).switch()

    def _live(self, work: Callable[[], object]) -> None:
        try:
            work()
        finally:
            self._alive -= 1
            self._end()

    def _end(self) -> None:
        if self._closing and not self._alive:
            for _ in range(self._threads):
                self._aside_jobs.put(None)
            self._threads = 0
            self._ended.set()

    # -- on threads of their own ------------------------------------------------------------------------------------

    def _work(self) -> None:
        """As an executor's worker, at half the CPU time: no future, and no lock that both sides take."""
        while job := self._aside_jobs.get():
            self._put(job())
            del job  # nothing is kept alive by a thread that waits

    # -- in a lane --------------------------------------------------------------------------------------------------

    def _aside(self, lane: _Lane, function: Callable[[], Any]) -> Any:
        if not self._workers:
            return function()
        self._elsewhere(lambda: _made(lane, function))
        assert self._hub is not None
        try:
            return self._hub.switch()
        finally:
            self._away -= 1

    def _elsewhere(self, job: Callable[[], Callable[[], None]]) -> None:
        """Has another thread do it; `_away` is one more until it is done.

        Raises RuntimeError where the system gives no thread; with one or more there, the job waits for those.
        """
        if self._threads < min(self._away + 1, self._workers):
            try:
                threading.Thread(target=self._work, name=f"aside {self._threads + 1}", daemon=True).start()
                self._threads += 1
            except RuntimeError:
                if not self._threads:
                    raise
        self._away += 1
        self._aside_jobs.put(job)

    def _wait(self, lane: _Lane, future: Future[Any]) -> None:
        future.add_done_callback(lambda _: self._put(lane.switch))
        assert self._hub is not None
        self._hub.switch()

    def _finish(self, lane: _Lane, work: Coroutine[Any, Any, R]) -> R:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(lambda _: self._turn(lane.switch))
        assert self._hub is not None
        self._hub.switch()
        return task.result()

    def _together(self, lane: _Lane, key: tuple[int, Any, bool], item: Any) -> Any:
        if key[0]:
            self._since.setdefault(key, time.monotonic())
        self._batches.setdefault(key, []).append((lane, item))
        assert self._hub is not None
        return self._hub.switch()


def _made(lane: _Lane, function: Callable[[], Any]) -> Callable[[], None]:
    """The turn of a lane that waits for `function`."""
    try:
        return partial(lane.switch, function())
    except BaseException as error:
        return partial(lane.throw, error)
