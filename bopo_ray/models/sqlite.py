"""One SQLite file that many lanes, threads and processes of one machine write to, and who those processes are.

Always true here: one transaction runs at a time over all of them, and none is ever half done; an error is a StoreError
of one line; a file that was moved or deleted is never written to unseen.

Each `Database` has one connection behind a lock. A connection per thread was no faster: SQLite has one writer at a
time, and whoever finds it busy sleeps for up to 100 ms. What many lanes (see `bopo_ray.lanes`) change at the same
moment is one transaction.

Between processes a file lock beside the database (NAME-lock) is held around each transaction. Waiters are served sooner
than by SQLite's own sleeping. Above all, a commit never meets another process's checkpoint: up to SQLite 3.51.2 that
can lose committed transactions (sqlite.org/wal.html, "The WAL-reset bug"), and Python comes with whatever SQLite the
system has.

The write-ahead log with synchronous=NORMAL: a process that dies, by SIGKILL too, loses nothing that was committed, for
the system has it already. Only a power cut may take the last moments, and leaves a sound file.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import math
import os
import random
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from bopo_ray.errors import StoreError
from bopo_ray.lanes import Busy, together

__all__ = ["LEASE_S", "DamageError", "Database", "Format", "lease_clock", "lease_over", "owner_alive", "owner_id"]

LEASE_S = 900.0
"""After so many seconds a claim or a reservation no longer counts, although its owner may live."""
TIMEOUT_S = 60.0
"""So long a transaction waits for those of others."""
WAIT_S = 0.004
"""Most between two looks whether the file is free, where nothing else can be done meanwhile."""
LOG_PAGES = 4096
"""So many pages (of 4 KiB) the write-ahead log takes before it is worked into the file, with a wait for the disk that
all share: while other work keeps the disk busy, with SQLite's own 1,000 a third of a transaction's time."""

_TABLES = "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"

log = logging.getLogger(__name__)
T = TypeVar("T")


def lease_clock() -> float:
    """Seconds since the machine was started: all its processes read the same, and it does not jump as the date can."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def lease_over(since: float, lease_s: float) -> bool:
    """Whether what began at `since` by `lease_clock` no longer counts; so where that is still to come (it is of before
    the machine was started, or of another machine)."""
    return not 0 <= lease_clock() - since < lease_s


def owner_id() -> str:
    """This process: host/pid/start. Unlike a pid alone, never given again to another one."""
    return _owner(os.getpid())


def owner_alive(owner: str) -> bool:
    """Whether a process of this host still runs. True for other hosts: only a lease ends what those hold."""
    host, pid, start = owner.split("/")
    return host != socket.gethostname() or _start(int(pid)) == start


@cache
def _owner(pid: int) -> str:
    return f"{socket.gethostname()}/{pid}/{_start(pid)}"


def _start(pid: int) -> str:
    """When a process started, in ticks since boot; "" when there is none (a zombie is none); "?" where nobody knows."""
    try:
        # The name in parentheses may hold spaces; the state and the start are fields 3 and 22.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "?"


def _apart(c: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T | Exception:
    """A part of the transaction that is open; its own error undoes it alone, the file's undoes everything."""
    c.execute("SAVEPOINT change")
    try:
        found: T | Exception = work(c)
    except Exception as error:
        if not _own(error):
            raise
        found = error
        c.execute("ROLLBACK TO change")
    c.execute("RELEASE change")
    return found


def _own(error: Exception) -> bool:
    """Whether the change is at fault, not the file."""
    mine = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.DataError, sqlite3.InterfaceError)
    return isinstance(error, mine) or not isinstance(error, sqlite3.Error)


class DamageError(sqlite3.DatabaseError):
    """What was read can't be what was written."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


@dataclass(frozen=True, slots=True)
class Format:
    """What a file holds."""

    what: str
    """For messages, e.g. "call store"."""
    application: int
    """SQLite's application_id, so that one kind is never taken for another."""
    version: int
    tables: str
    """SQL that creates them."""
    check: bool
    """Whether the whole file is checked for damage when it is opened (time grows with its size)."""
    mend: str
    """What the user can do about a damaged file."""


class Database:
    """See the module's docstring. Thread-safe; not to be used on both sides of a fork."""

    def __init__(self, path: Path, form: Format, replace: bool = False, timeout_s: float = TIMEOUT_S) -> None:
        """Opens or creates the file.

        Args:
            path: where.
            form: what must be in it.
            replace: whether a damaged file is moved aside with a warning, and a missing one made anew.
            timeout_s: how long to wait for others.

        Raises StoreError for a file that can't be used, or holds something else.
        """
        self.path, self._form, self._replace, self._timeout_s = path, form, replace, timeout_s
        self._mutex = threading.RLock()
        self._refused = 0.0, -math.inf
        """Since when this process asks for the file in vain, and when it did so last."""
        try:
            with self._explained():
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._open()
                except UnicodeDecodeError:  # the text of an error that quotes the schema
                    self._start_anew(DamageError("its tables can't be read"))
                except sqlite3.DatabaseError as error:
                    self._start_anew(error)
        except BaseException:
            self.close()
            raise

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def close(self) -> None:
        """Frees the file; nothing is lost without it."""
        with self._mutex:
            for part in ("_connection", "_lock"):
                if opened := self.__dict__.pop(part, None):
                    opened.close()

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` returns; it only reads, and is repeated when the file had to be replaced."""
        with self._mutex, self._explained():
            try:
                return work(self._connection)
            except sqlite3.DatabaseError as error:
                self._start_anew(error)
                return work(self._connection)

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` returns, all of its changes made or none; it is repeated when the file had to be replaced.

        Lanes that write at the same moment share a transaction: to wait for other processes and to commit once for
        each would bound how many calls a second can be made. While another process has the file, other lanes have
        their turns.
        """
        return together(self._write_all, work)

    def compact(self) -> None:
        """Gives the space of deleted rows back to the disk."""
        with self._mutex, self._explained(), self._exclusive():
            self._connection.execute("VACUUM")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # -- inside -----------------------------------------------------------------------------------------------------

    def _write_all(self, works: Sequence[Callable[[sqlite3.Connection], T]]) -> list[T | Exception]:
        """What came of each; what fails for the file fails for all of them. Raises Busy while others have it."""
        with self._mutex, self._explained():
            try:
                found = self._write_together(works)
            except sqlite3.DatabaseError as error:
                self._start_anew(error)
                found = self._write_together(works)
        return [self._said(f) if isinstance(f, Exception) else f for f in found]

    def _write_together(self, works: Sequence[Callable[[sqlite3.Connection], T]]) -> list[T | Exception]:
        """One transaction; a change that fails by itself is undone alone."""
        with self._exclusive(wait=False):
            if self._inode != _inode(self.path):
                raise DamageError("it was moved or deleted while it was in use")
            c = self._connection
            c.execute("BEGIN IMMEDIATE")
            try:
                found: list[T | Exception] = []
                try:
                    found += [work(c) for work in works]
                except Exception as error:
                    if not _own(error):
                        raise
                    c.execute("ROLLBACK")  # it is rare; to guard each change against it is a quarter of all statements
                    c.execute("BEGIN IMMEDIATE")
                    found = [_apart(c, work) for work in works]
                c.execute("COMMIT")
                return found
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # on a full disk SQLite has rolled back by itself
                    c.execute("ROLLBACK")
                raise

    def _open(self) -> None:
        self.close()
        self._lock = self.path.with_name(f"{self.path.name}-lock").open("w")
        with self._exclusive():
            # Autocommit: transactions are begun and ended above.
            c = self._connection = sqlite3.connect(
                self.path, timeout=self._timeout_s, isolation_level=None, check_same_thread=False
            )
            self._inode = _inode(self.path)
            # A damaged text must reach the checksum instead of failing on its way.
            c.text_factory = lambda raw: raw.decode("utf-8", "replace")
            if not c.execute("SELECT 1 FROM sqlite_master").fetchone():
                c.executescript(
                    f"PRAGMA journal_mode=WAL; BEGIN; PRAGMA application_id={self._form.application}; "
                    f"PRAGMA user_version={self._form.version}; {self._form.tables}; COMMIT"
                )
            found, version = (c.execute(f"PRAGMA {p}").fetchone()[0] for p in ("application_id", "user_version"))
            if found != self._form.application:
                raise StoreError(f"{self.path} is a database, but no {self._form.what}; name another file")
            if version != self._form.version:
                raise StoreError(
                    f"{self.path} is a {self._form.what} of version {version}, this is version {self._form.version}; "
                    "use it with the version of bopo_ray that wrote it, or name another file"
                )
            if not _tables(self._form.tables) <= set(c.execute(_TABLES)):
                raise DamageError("its tables are not those that it was made with")
            if self._form.check and (said := c.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise DamageError(said)
            (mode,) = c.execute("PRAGMA journal_mode=WAL").fetchone()
            if mode != "wal":
                raise StoreError(f"{self.path} can't have a write-ahead log here; put it on a local disk")
            c.execute("PRAGMA synchronous=NORMAL")
            c.execute(f"PRAGMA wal_autocheckpoint={LOG_PAGES}")

    def _start_anew(self, error: sqlite3.DatabaseError) -> None:
        """Replaces the file when `error` says that it is damaged and the owner allows it; else raises `error`."""
        if not (self._replace and _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)):
            raise error
        with self._exclusive():
            # Another process may have been here before: then there is a new file already.
            if self._inode == _inode(self.path) != 0:
                self._connection.close()
                aside = next(name for name in _asides(self.path) if not name.exists())
                for end in ("", "-wal", "-shm"):
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(f"{self.path}{end}", f"{aside}{end}")
                log.warning(
                    "%s was damaged (%s); moved to %s, a new %s is started",
                    self.path,
                    " ".join(str(error).split()),
                    aside,
                    self._form.what,
                )
        self._open()

    @contextlib.contextmanager
    def _exclusive(self, wait: bool = True) -> Iterator[None]:
        """Holds the file lock: no other process has a transaction or opens the file. Raises Busy where it would have to
        `wait` and may not."""
        while not self._locked():
            if not wait:
                raise Busy
            time.sleep(WAIT_S * random.random())
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _locked(self) -> bool:
        """Whether the file lock could be taken; raises when it has been refused for too long."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            now, (since, last) = time.monotonic(), self._refused
            if now - last > self._timeout_s / 4:  # whoever asked then has given up
                since = now
            self._refused = since, now
            if now - since > self._timeout_s:
                raise sqlite3.OperationalError("database is locked") from None
            return False
        self._refused = 0.0, -math.inf
        return True

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what SQLite and the system say into a StoreError."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise self._said(error) from error

    def _said(self, error: Exception) -> Exception:
        """For people, where SQLite or the system said it."""
        if not isinstance(error, sqlite3.Error | OSError):
            return error
        code, path, said = _code(error), self.path, " ".join(str(error).split())
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return StoreError(f"{path}: this {self._form.what} is damaged ({said}); {self._form.mend}")
        if code == sqlite3.SQLITE_FULL:
            return StoreError(
                f"{path} can't be written (the disk is full); free some space, then run the same command with "
                "--resume: what was finished before is kept"
            )
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or "is locked" in said:
            return StoreError(
                f"{path} was locked by another process for {self._timeout_s:g} s; end that process (perhaps a "
                "database browser), then run the same command with --resume"
            )
        return StoreError(f"{path} can't be used ({said}); it must be a writable file on a local disk with space left")


def _asides(path: Path) -> Iterator[Path]:
    """Where a damaged file may go, one after the other: none replaces another."""
    for n in itertools.count(1):
        yield path.with_name(f"{path.name}.corrupt{f'-{n}' if n > 1 else ''}")


@cache
def _tables(sql: str) -> set[tuple[str, str]]:
    """Names and definitions of the tables that `sql` creates."""
    with contextlib.closing(sqlite3.connect(":memory:")) as c:
        c.executescript(sql)
        return set(c.execute(_TABLES))


def _code(error: BaseException) -> int:
    """SQLite's primary result code; 0 for other errors."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _inode(path: Path) -> int:
    """0 when there is no such file."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0
