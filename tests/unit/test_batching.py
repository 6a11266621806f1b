"""The batcher under threads: batches grow under load, errors stay in their batch, nobody is left waiting."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest

from bopo_ray.errors import AttemptError
from bopo_ray.models.batching import Batcher

PATIENCE_S = 10.0


class Gate:
    """Answers each item with its square, once opened; remembers the batches. A negative item fails its batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.started, self.open = threading.Event(), threading.Event()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.started.set()
        assert self.open.wait(PATIENCE_S)
        if min(items) < 0:
            raise ValueError(f"bad item in {items}")
        return [i * i for i in items]

    def hold(self, batcher: Batcher[int, int], item: int = 0) -> Future[int]:
        """Submits an item and returns when it is being worked on, so that what comes next must wait."""
        future = batcher.submit(item)
        assert self.started.wait(PATIENCE_S)
        return future


def test_a_lone_item_starts_at_once_and_those_that_wait_meanwhile_share_batches() -> None:
    gate = Gate()
    batcher = Batcher(gate, 4)
    futures = [gate.hold(batcher), *(batcher.submit(i) for i in range(1, 7))]
    gate.open.set()
    assert [f.result(PATIENCE_S) for f in futures] == [0, 1, 4, 9, 16, 25, 36]
    assert gate.batches == [[0], [1, 2, 3, 4], [5, 6]]
    batcher.close()


def test_sixteen_threads_share_few_batches_and_each_gets_its_own_answer() -> None:
    gate = Gate()
    batcher = Batcher(gate, 16)
    held = gate.hold(batcher)
    with ThreadPoolExecutor(16) as threads:
        answers = [threads.submit(lambda i=i: batcher.submit(i).result(PATIENCE_S)) for i in range(16)]
        while len(batcher._waiting) < 16:
            pass
        gate.open.set()
        assert [a.result(PATIENCE_S) for a in answers] == [i * i for i in range(16)]
    assert held.result(PATIENCE_S) == 0
    assert [len(b) for b in gate.batches] == [1, 16]
    batcher.close()


def test_an_error_reaches_its_own_batch_only() -> None:
    gate = Gate()
    batcher = Batcher(gate, 2)
    futures = [gate.hold(batcher), *(batcher.submit(i) for i in (1, -1, 2, 3))]
    gate.open.set()
    for future in futures[1:3]:
        with pytest.raises(ValueError, match=r"bad item in \[1, -1\]"):
            future.result(PATIENCE_S)
    assert [futures[i].result(PATIENCE_S) for i in (0, 3, 4)] == [0, 4, 9]
    batcher.close()


def test_answers_that_do_not_match_the_items_are_an_error_not_a_wait() -> None:
    batcher: Batcher[int, int] = Batcher(lambda items: items[1:], 4)
    with pytest.raises(RuntimeError, match="0 answers to a batch of 1"):
        batcher.submit(1).result(PATIENCE_S)
    batcher.close()


def test_closing_fails_what_waits_and_lets_the_running_batch_end() -> None:
    gate = Gate()
    batcher = Batcher(gate, 1)
    running, waiting = gate.hold(batcher, 3), batcher.submit(1)
    batcher.close()
    for call in (lambda: waiting.result(PATIENCE_S), lambda: batcher.submit(2)):
        with pytest.raises(AttemptError, match="closed") as caught:
            call()
        assert (caught.value.retry, caught.value.billed) == (False, False)
    gate.open.set()
    assert running.result(PATIENCE_S) == 9
    assert gate.batches == [[3]]


def test_the_thread_ends_when_closed() -> None:
    batcher: Batcher[int, int] = Batcher(lambda items: items, 2, name="a batcher to close")
    assert batcher.submit(7).result(PATIENCE_S) == 7
    (thread,) = (t for t in threading.enumerate() if t.name == "a batcher to close")
    batcher.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_who_gave_up_is_not_answered() -> None:
    gate = Gate()
    batcher = Batcher(gate, 4)
    held, gone, kept = gate.hold(batcher), batcher.submit(1), batcher.submit(2)
    assert gone.cancel()
    gate.open.set()
    assert (held.result(PATIENCE_S), kept.result(PATIENCE_S)) == (0, 4)
    assert gate.batches == [[0], [2]]
    with pytest.raises(CancelledError):
        gone.result(PATIENCE_S)
    batcher.close()
