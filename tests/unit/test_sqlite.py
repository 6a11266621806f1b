"""Changes of many lanes in one transaction, and of threads: each is made once, or none of it, whatever others do."""

from __future__ import annotations

import sqlite3
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from bopo_ray.errors import StoreError
from bopo_ray.lanes import Busy, Lanes
from bopo_ray.models.sqlite import Database, Format

FORM = Format("list", 77, 1, "CREATE TABLE rows (id INTEGER PRIMARY KEY, thread INTEGER)", False, "mend it")


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "list.db", FORM, timeout_s=0.3)


def insert(c: sqlite3.Connection, row: int, thread: int = 0) -> int:
    c.execute("INSERT INTO rows VALUES (?, ?)", (row, thread))
    return row


def rows(database: Database) -> list[int]:
    return [row for (row,) in database.read(lambda c: c.execute("SELECT id FROM rows ORDER BY id").fetchall())]


def test_each_change_is_made_once_and_answers_its_own_thread(database: Database) -> None:
    def work(thread: int) -> list[int]:
        return [database.write(lambda c, i=i: insert(c, 100 * thread + i)) for i in range(20)]  # type: ignore[misc]

    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(work, range(32)))
    assert answers == [[100 * thread + i for i in range(20)] for thread in range(32)]
    assert rows(database) == sorted(row for answer in answers for row in answer)


def together(database: Database, work: list[object]) -> list[object]:
    """What came of each of `work`, which lanes write at the same moment."""
    done: list[Future[object]] = [Future() for _ in work]

    def run(i: int) -> None:
        try:
            done[i].set_result(database.write(work[i]))  # type: ignore[arg-type]
        except Exception as error:
            done[i].set_exception(error)

    lanes = Lanes(workers=0)
    lanes.ask(lambda: [lanes.start(partial(run, i)) for i in range(len(work))])
    return [future.exception() or future.result() for future in done]


def test_they_share_a_transaction_and_one_that_fails_is_undone_alone(database: Database) -> None:
    commits: list[str] = []
    database._connection.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)

    def fails(c: sqlite3.Connection) -> None:
        insert(c, 50)
        raise ValueError("no")

    work = [*(lambda c, i=i: insert(c, i) for i in range(8)), fails, lambda c: insert(c, 50), lambda c: insert(c, 50)]
    done = together(database, work)
    assert commits == ["COMMIT"]
    assert done[:8] == list(range(8)) and isinstance(done[8], ValueError)
    assert done[9:].count(50) == 1 and sum(isinstance(d, StoreError) for d in done[9:]) == 1  # one came second
    assert rows(database) == [*range(8), 50]


def test_what_fails_for_the_file_fails_for_all_and_nothing_is_left(database: Database) -> None:
    def full(c: sqlite3.Connection) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    done = together(database, [lambda c: insert(c, 1), full, lambda c: insert(c, 2)])
    assert all(isinstance(d, StoreError) and "disk I/O error" in str(d) for d in done)
    assert rows(database) == []
    assert database.write(lambda c: insert(c, 3)) == 3


def test_a_lock_that_is_not_given_back_fails_all_that_wait(database: Database, tmp_path: Path) -> None:
    other = Database(tmp_path / "list.db", FORM)
    with other._exclusive():
        done = together(database, [lambda c, i=i: insert(c, i) for i in range(4)])
    assert all(isinstance(d, StoreError) and "locked by another process for 0.3 s" in str(d) for d in done)
    assert database.write(lambda c: insert(c, 9)) == 9 and rows(database) == [9]


def test_while_another_process_has_the_file_other_lanes_go_on(tmp_path: Path) -> None:
    database, other = (Database(tmp_path / "list.db", FORM, timeout_s=30) for _ in range(2))
    went_on, written = threading.Event(), Future[int]()
    lanes = Lanes(workers=2)
    with other._exclusive():
        lanes.start(lambda: written.set_result(database.write(lambda c: insert(c, 1))))
        lanes.start(went_on.set)
        assert went_on.wait(10) and not written.done()
    assert written.result(10) == 1 and rows(other) == [1]


def test_it_gives_up_when_nobody_of_the_process_got_the_file_for_so_long(database: Database, tmp_path: Path) -> None:
    other = Database(tmp_path / "list.db", FORM)
    with other._exclusive(), pytest.raises(Busy):
        database._write_all([lambda c: insert(c, 0)])
    time.sleep(0.4)  # it has given up, and does not count for the next one
    for row in (1, 2):  # nor does a wait that has ended well
        with other._exclusive():
            waiting = ThreadPoolExecutor(1).submit(database.write, lambda c, row=row: insert(c, row))  # type: ignore[misc]
            time.sleep(0.2)
        assert waiting.result(10) == row


def test_an_interrupted_change_is_undone(database: Database) -> None:
    def interrupted(c: sqlite3.Connection) -> None:
        insert(c, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        database.write(interrupted)
    assert rows(database) == []
    database.write(lambda c: insert(c, 1))
    assert rows(database) == [1]
