"""Dynamic batching: many threads ask one at a time, one function answers as many as wait.

Always true here: nothing waits for a batch to fill, so a lone item starts at once, and batches grow while the function
is busy; an error reaches the items of its own batch and no others; no item is left without an answer.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from bopo_ray.errors import AttemptError

__all__ = ["Batcher"]

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batcher(Generic[Item, Answer]):
    """Runs `run` on a thread of its own, on up to `batch_size` waiting items at a time, first come, first served."""

    def __init__(self, run: Callable[[list[Item]], Sequence[Answer]], batch_size: int, name: str = "batcher") -> None:
        """
        Args:
            run: answers items in their order; only ever called from one thread.
            batch_size: most items per call of `run`; may be set anew at any time.
            name: of the thread.
        """
        self.batch_size = batch_size
        self._run = run
        self._waiting: deque[tuple[Item, Future[Answer]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, item: Item) -> Future[Answer]:
        """The answer to come; cancel it to give up waiting. Raises AttemptError when closed."""
        future: Future[Answer] = Future()
        with self._changed:
            if self._closed:
                raise _closed()
            self._waiting.append((item, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Fails what waits; a batch that runs still gets its answers."""
        with self._changed:
            self._closed = True
            left = [future for _, future in self._waiting if future.set_running_or_notify_cancel()]
            self._waiting.clear()
            self._changed.notify()
        for future in left:
            future.set_exception(_closed())

    def _work(self) -> None:
        while batch := self._next():
            try:
                answers = self._run([item for item, _ in batch])
                if len(answers) != len(batch):
                    raise RuntimeError(f"{len(answers)} answers to a batch of {len(batch)}: need one for each item")
            except BaseException as error:  # whoever waits must hear of it, whatever it is
                for _, future in batch:
                    future.set_exception(error)
            else:
                for (_, future), answer in zip(batch, answers, strict=True):
                    future.set_result(answer)

    def _next(self) -> list[tuple[Item, Future[Answer]]]:
        """Waits for items; empty when closed. From here on they can't be cancelled."""
        batch: list[tuple[Item, Future[Answer]]] = []
        with self._changed:
            while not batch and not self._closed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                while self._waiting and len(batch) < self.batch_size:
                    item, future = self._waiting.popleft()
                    if future.set_running_or_notify_cancel():
                        batch.append((item, future))
        return batch


def _closed() -> AttemptError:
    return AttemptError("the model was closed while a call waited", kind="closed", retry=False, billed=False)
