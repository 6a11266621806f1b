"""Results in an object store or on a shared disk: a run works in a local folder and copies it there, and back.

`--out s3://bucket/run`, `gs://`, `file://`: whatever pyarrow's filesystems know. SQLite, locks and renames need a local
disk, so the run's own folder stays on one; what it has finished is copied at the end of each stage and every few
minutes, and a fresh machine that resumes fetches it first.

Always true here: what refers to other files (JSON, YAML) is copied after them, and what was deleted here goes last
there, so that a copy that was cut off is still one to go on from; a database is copied as it is at one moment; a
second machine refuses a folder that another one has copied to within the last minutes; where it can't be known which
of the two is newer, neither is written.

What a copy can't hold: the calls that were paid after it. Where the first machine is lost for good, they are not in the
ledger, and may be paid again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import re
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
from pyarrow import fs

from bopo_ray.errors import ConfigError, StoreError
from bopo_ray.files import write_json

__all__ = ["COPY_S", "SharedFolder", "is_uri", "local_folder", "shared_folder"]

log = logging.getLogger(__name__)
COPY_S = 300.0
"""Between two copies while a stage is running."""
HELD_S = 3 * COPY_S
"""So long after its last copy a machine is taken to be at work."""
AT_ONCE = 16
"""Files on their way at a time: a run has hundreds of small ones, and each waits for the store's answers."""
FLAT = ("s3", "gcs", "abfs")
"""Filesystems of pyarrow that have no folders of their own."""
OWNER, SEEN = ".owner.json", ".shared.json"
"""There: who copied last, and how often. Here: how often it had been when this folder was the same."""
DATABASES = (".db",)
LEFT_OUT = re.compile(r"\.tmp$|\.lock$|-lock$|\.db-(wal|shm)$|^\.shared\.json$")


def is_uri(out: str) -> bool:
    """Whether `--out` names something else than a local path."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", out) is not None


def local_folder(out: str) -> Path:
    """`out` as a path; raises ConfigError for a URI."""
    if is_uri(out):
        raise ConfigError(f"out={out!r}: several runs together need a local folder; give one with --out")
    return _path(out)


def _path(out: str) -> Path:
    """Raises ConfigError for what seems to be a URI; a letter and a colon is a drive."""
    if scheme := re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:", out):
        raise ConfigError(
            f"out={out!r}: a URI has two slashes, as {scheme.group()}//bucket/run; or give a local folder (put ./ "
            "before such a name)"
        )
    return Path(out)


class SharedFolder:
    """A local folder and its copy at a URI. One machine at a time."""

    def __init__(self, uri: str, local: Path) -> None:
        """Raises ConfigError for a URI that pyarrow doesn't know or that can't be reached, see also `_begin`."""
        self.uri, self.local, self._lock = uri, local, threading.Lock()
        self._known: dict[str, tuple[int, int]] = {}
        """Size and time of change of each file as it was copied."""
        try:
            self._fs, self._root = fs.FileSystem.from_uri(uri.rstrip("/"))
            owner = self._owner()
            others = not owner and bool(self._there())
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ConfigError(
                f"out={uri!r}: can't be used ({_line(error)}); give a URI that pyarrow's filesystems know and this "
                "machine has access to, such as s3://bucket/run, or a local folder"
            ) from error
        age_s = time.time() - owner.get("at", 0)
        if owner.get("open") and owner["host"] != socket.gethostname() and 0 <= age_s < HELD_S:
            raise StoreError(
                f"{uri} is in use by another run on {owner['host']}, which copied to it {age_s:.0f} s ago; wait for "
                f"it, or, if that machine is gone, {(HELD_S - age_s) / 60:.0f} minutes more, or choose another --out"
            )
        self._count = int(owner.get("count", 0))
        self._last = owner.get("host"), self._count
        """Who copied last, and how often, as far as is known here."""
        self._begin(bool(owner), others)

    def _begin(self, copied: bool, others: bool) -> None:
        """Fetches what is newer there; raises StoreError where something newer might be lost, here or there."""
        seen = self._seen()
        if others and seen < 0:
            raise StoreError(f"{self.uri} holds files of no run, which would be deleted; choose another --out")
        if copied and self._last[0] is None and seen >= 0:
            raise StoreError(
                f"{self.uri}/{OWNER} is damaged, so that it is not known whether {self.local} is older: if no other "
                f"machine has copied to {self.uri} since, delete that file; else move {self.local} away"
            )
        if copied and self._count > seen:
            self._fetch()
        self._count = max(self._count, seen)

    def save(self, last: bool = False) -> None:
        """Copies what is new or has changed; raises StoreError when that fails, or another machine has taken over."""
        with self._lock:
            try:
                self._save(last)
            except (OSError, sqlite3.Error, pa.ArrowException) as error:
                raise StoreError(
                    f"the results can't be copied to {self.uri} ({_line(error)}); they are in {self.local}: mend it "
                    "and run the same command with --resume"
                ) from error

    def _save(self, last: bool) -> None:
        here = {str(p.relative_to(self.local)): p for p in self.local.rglob("*") if p.is_file()}
        here = {name: path for name, path in here.items() if not LEFT_OUT.search(path.name)}
        self._check_owner()
        self._count += 1
        self._note(self._count)  # first here: a copy that is cut off is older than this folder
        self._write_owner(True)
        with ThreadPoolExecutor(AT_ONCE) as threads:
            for _, names in groupby(sorted(here, key=_order), _order):
                list(threads.map(lambda name: self._copy(here[name], name), names))
        for name in self._there() - here.keys() - {OWNER}:
            self._fs.delete_file(f"{self._root}/{name}")
        self._write_owner(not last)

    def _check_owner(self) -> None:
        """Nobody may have taken over: what they wrote would be deleted here."""
        owner = self._owner()
        host, count = owner.get("host"), int(owner.get("count", 0))
        if host and (host, count) != self._last and not (host == socket.gethostname() and count <= self._count):
            raise StoreError(
                f"{self.uri} was taken over by {host} while this machine could not copy to it; what was finished here "
                f"is in {self.local}: end this run, and go on there or with another --out"
            )

    def _copy(self, source: Path, name: str) -> None:
        """Puts it there if it has changed."""
        if (state := _state(source)) is None or self._known.get(name) == state:
            return
        with TemporaryDirectory() as scratch:
            whole = _snapshot(source, Path(scratch) / "database") if source.suffix in DATABASES else source
            if self._put(whole, name):
                self._known[name] = state

    def _put(self, source: Path, name: str) -> bool:
        """Copies a file; False when it is gone meanwhile."""
        try:
            with source.open("rb") as data, self._writing(name) as out:
                shutil.copyfileobj(data, out, 1 << 20)
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def _writing(self, name: str) -> Iterator[pa.NativeFile]:
        """A file of the copy, which is there when all of it is written."""
        target = f"{self._root}/{name}"
        whole = f"{target}.tmp" if isinstance(self._fs, fs.LocalFileSystem) else target  # object stores show it whole
        self._make_dir(target.rpartition("/")[0])
        with self._fs.open_output_stream(whole) as out:
            yield out
        if whole != target:
            self._fs.move(whole, target)

    def _make_dir(self, folder: str) -> None:
        """Where there are folders: an object store would keep an empty object for each."""
        if self._fs.type_name not in FLAT:
            self._fs.create_dir(folder, recursive=True)

    def _fetch(self) -> None:
        """Makes the local folder what the copy is; raises StoreError when that fails, and then the next one goes on."""
        if not (self.local / SEEN).exists() and any(not LEFT_OUT.search(p.name) for p in self.local.glob("*")):
            raise StoreError(f"{self.local} is no copy of {self.uri}, which is to be fetched there; move it away")
        try:
            there = self._there() - {OWNER}
            self._note(-1)
            for path in [p for p in self.local.rglob("*") if p.is_file()]:
                if str(path.relative_to(self.local)) not in there and path.name != SEEN:
                    path.unlink()
            with ThreadPoolExecutor(AT_ONCE) as threads:
                list(threads.map(self._get, there))
            self._note(self._count)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(
                f"{self.uri} can't be fetched to {self.local} ({_line(error)}); mend it and run the same command again"
            ) from error

    def _get(self, name: str) -> None:
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        whole = target.with_name(f"{target.name}.tmp")
        with self._fs.open_input_stream(f"{self._root}/{name}") as data, whole.open("wb") as out:
            shutil.copyfileobj(data, out, 1 << 20)
        whole.replace(target)

    def _there(self) -> set[str]:
        """Names of the files of the copy."""
        found = self._fs.get_file_info(fs.FileSelector(self._root, recursive=True, allow_not_found=True))
        names = {f.path.removeprefix(self._root).lstrip("/") for f in found if f.type == fs.FileType.File}
        return {name for name in names if not name.endswith(".tmp")}

    def _owner(self) -> dict[str, Any]:
        """Nothing where there is none; where its writing was cut off, a count above any that it can have been."""
        if self._fs.get_file_info(f"{self._root}/{OWNER}").type != fs.FileType.File:
            return {}
        with self._fs.open_input_stream(f"{self._root}/{OWNER}") as file:
            data = file.read()
        try:
            return dict(json.loads(data))
        except ValueError:
            return {"count": int(time.time())}

    def _write_owner(self, is_open: bool) -> None:
        owner = {"host": socket.gethostname(), "at": time.time(), "count": self._count, "open": is_open}
        with self._writing(OWNER) as file:
            file.write(json.dumps(owner).encode())
        self._last = owner["host"], self._count

    def _note(self, count: int) -> None:
        self.local.mkdir(parents=True, exist_ok=True)
        write_json(self.local / SEEN, {"uri": self.uri, "count": count})

    def _seen(self) -> int:
        """How often it had been copied when this folder was the same; -1: never, or not all of it has been fetched.

        Raises StoreError where that can't be known, and for a copy of something else.
        """
        path = self.local / SEEN
        try:
            seen = json.loads(path.read_bytes())
            uri, count = seen["uri"], int(seen["count"])
        except FileNotFoundError:
            return -1
        except (OSError, ValueError, KeyError, TypeError) as error:
            newest = json.dumps({"uri": self.uri, "count": self._count})
            raise StoreError(
                f"{path} is damaged, so that it is not known whether {self.local} is older: if no other machine has "
                f"copied to {self.uri} since, write {newest} to that file; else move {self.local} away"
            ) from error
        if uri != self.uri:
            raise StoreError(f"{self.local} is a copy of {uri}, not of {self.uri}; move it away")
        return count


@contextmanager
def shared_folder(out: str, local: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yields the folder to work in and a function that copies it to where `out` says, if that is a URI.

    It is copied every few minutes as well, and at the end, however that comes.
    """
    if not is_uri(out):
        yield _path(out), lambda: None
        return
    folder, ended = SharedFolder(out, local), threading.Event()

    def again() -> None:
        while not ended.wait(COPY_S):
            try:
                folder.save()
            except Exception as error:  # the next copy may succeed: this thread must live
                log.warning("%s", _line(error))

    thread = threading.Thread(target=again, name="shared folder", daemon=True)
    thread.start()
    try:
        yield local, folder.save
    finally:
        ended.set()
        thread.join()
        if local.exists():
            folder.save(last=True)


def _order(name: str) -> int:
    """What is referred to before what refers to it."""
    return 2 if name.endswith((".json", ".yaml")) else 1 if name.endswith(DATABASES) else 0


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time of change, also of a database's log; None when it is gone."""
    try:
        stats = [p.stat() for p in (path, path.with_name(f"{path.name}-wal")) if p == path or p.exists()]
    except FileNotFoundError:
        return None
    return sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)


def _snapshot(database: Path, target: Path) -> Path:
    """A copy of a database as it is now.

    Those who write to it wait while it is opened and closed, see `bopo_ray.models.sqlite`, and not while it is copied.
    """
    target.unlink(missing_ok=True)
    with database.with_name(f"{database.name}-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with closing(sqlite3.connect(database, isolation_level=None)) as source:
            source.execute("BEGIN")
            source.execute("SELECT 1 FROM sqlite_master").fetchone()  # from here on it sees the file of this moment
            fcntl.flock(lock, fcntl.LOCK_UN)
            try:
                with closing(sqlite3.connect(target)) as copy:
                    source.backup(copy)
            finally:
                fcntl.flock(lock, fcntl.LOCK_EX)
    return target


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
