"""The call store: each model call once, with its reply and usage, so that nothing is paid for twice.

Always true here: a key has at most one call, and it never changes; of all that ask for a missing call at once, over
threads and processes, one is told to make it; what is read is what was written (each row has a checksum), or it counts
as missing and is paid for again.

Why SQLite: it is in the standard library, and a store is one file that any SQLite tool can inspect. Its transactions
decide between processes who makes a call, and survive the death of any of them. LMDB reads faster, but wants a fixed
map size in advance, has no queries for `stats` and `prune`, and would be one more dependency; diskcache pickles, so
that opening a file from elsewhere could run code. Beside the seconds of a model call, microseconds don't matter.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import sqlite3
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bopo_ray.errors import StoreError
from bopo_ray.models.pricing import Usage
from bopo_ray.models.protocol import Request
from bopo_ray.models.sqlite import (
    Database,
    Format,
    lease_clock,
    lease_over,
    owner_alive,
    owner_id,
)
from bopo_ray.store import write_table

log = logging.getLogger(__name__)

__all__ = [
    "CLAIM_S", "CallStore", "ModelStats", "StoreStats", "StoredCall", "call_key", "owner_alive", "owner_id",
]  # fmt: skip

CLAIM_S = 240.0
"""Lease of a claim: its owner renews it in much less, unless it is gone with its machine."""
CHECK_EVERY = 64
"""Puts of a process between two looks at the size."""
_CLAIM = "INSERT INTO claims SELECT ?, ?, ? WHERE NOT EXISTS (SELECT 1 FROM calls WHERE key = ?) ON CONFLICT DO NOTHING"
"""Of a key that is neither stored nor claimed."""

_CALLS = Format(
    "call store", int.from_bytes(b"bopC"), 1,
    """
    CREATE TABLE calls (
        id INTEGER PRIMARY KEY,  -- in the order of insertion
        key TEXT NOT NULL UNIQUE,
        model TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        latency_s REAL NOT NULL,
        created REAL NOT NULL,  -- Unix time
        checksum INTEGER NOT NULL,
        text TEXT NOT NULL  -- last: what stands behind a long text is slow to reach
    );
    CREATE TABLE claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL, since REAL NOT NULL) WITHOUT ROWID
    """,
    check=False, mend="move it away: a new one is started, and its calls are paid for again",
)  # fmt: skip

_VERSION_KEY, _EXPORT_VERSION = b"bopo_ray.calls", b"1"
_COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("model", pa.string()),
        ("text", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("latency_s", pa.float64()),
        ("created", pa.float64()),
    ]
)
_NAMES = ", ".join(_COLUMNS.names)


@dataclass(frozen=True, slots=True)
class StoredCall:
    """A call that was made."""

    model: str
    """How results call the model."""
    text: str
    """The reply. A lone surrogate, which no file can hold as text, is stored as "?"."""
    usage: Usage
    """As the model reported it."""
    latency_s: float
    """Of the call that was made."""


@dataclass(frozen=True, slots=True)
class ModelStats:
    """What a store holds of one model."""

    model: str
    calls: int
    prompt_tokens: int
    """All input tokens, cached ones included."""
    cached_tokens: int
    completion_tokens: int
    oldest: float
    """When the first of them was stored, Unix time."""
    newest: float
    """When the last of them was stored, Unix time."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store holds."""

    calls: int
    bytes: int
    """Pages in use; this is what `max_bytes` bounds."""
    models: tuple[ModelStats, ...]
    """In alphabetical order."""


def call_key(identity: str, request: Request) -> str:
    """What two calls share when one reply serves both: 32 hex digits.

    A deterministic call (temperature 0) has one reply, whatever its sample index. Task and plan count for simulated
    models only, who see them.
    """
    deterministic = request.temperature == 0
    parts = [
        identity,
        [(m.role, m.content) for m in request.messages],
        0.0 if deterministic else float(request.temperature),
        request.max_tokens,
        0 if deterministic else request.sample,
        [request.task, request.plan] if request.plan else None,
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


class CallStore:
    """The calls in one file, for all threads and processes of a machine."""

    def __init__(self, path: Path, max_bytes: int = 4 << 30, lease_s: float = CLAIM_S, repair: bool = True) -> None:
        """Opens or creates a store.

        Args:
            path: its file.
            max_bytes: bound on its size; beyond it the oldest calls are dropped.
            lease_s: a claim that was neither made nor renewed for so long is taken over, although its owner may live.
            repair: whether a damaged file is moved aside for a new one, with one warning; otherwise it is an error.

        Raises StoreError for a file that can't be used or is no call store.
        """
        self._database = Database(path, _CALLS, replace=repair)
        self._max_bytes, self._lease_s = max_bytes, lease_s
        self._puts = itertools.count()

    def close(self) -> None:
        """Frees the file."""
        self._database.close()

    def get(self, key: str) -> StoredCall | None:
        """The call stored under `key`."""
        return self._database.read(lambda c: _find(c, key))

    def claim(self, key: str, owner: str) -> StoredCall | bool:
        """The stored call; True: the caller shall make it, and then `put` or `release`; False: somebody is making it.

        False also when it is another thread of the same owner. `owner` comes from `owner_id()`.
        """

        def look(c: sqlite3.Connection) -> StoredCall | bool:
            if call := _find(c, key):
                return call
            row = c.execute("SELECT owner, since FROM claims WHERE key = ?", (key,)).fetchone()
            return row is None or lease_over(row[1], self._lease_s) or not owner_alive(row[0])

        def take(c: sqlite3.Connection) -> StoredCall | bool:
            if c.execute(_CLAIM, (key, owner, lease_clock(), key)).rowcount:
                return True
            found = look(c)  # another was quicker, or holds it no longer
            if found is True:
                c.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", (key, owner, lease_clock()))
            return found

        found = self._database.read(look)
        return self._database.write(take) if found is True else found

    def put(self, key: str, call: StoredCall) -> None:
        """Stores a call, unless there is one already, and ends the claim."""
        u = call.usage
        text = call.text.encode("utf-8", "replace").decode()
        latency_s = call.latency_s + 0.0  # as it will be read: a float, and no negative zero
        tokens = (u.prompt_tokens, u.cached_tokens, u.completion_tokens)
        row = (key, call.model, text, *tokens, latency_s, time.time())
        check = next(self._puts) % CHECK_EVERY == 0

        def work(c: sqlite3.Connection) -> None:
            if not _insert(c, row) and _find(c, key) is None:  # what is there is damaged
                c.execute("DELETE FROM calls WHERE key = ?", (key,))
                _insert(c, row)
            c.execute("DELETE FROM claims WHERE key = ?", (key,))
            if check:
                _shrink(c, self._max_bytes)

        self._database.write(work)

    def renew(self, keys: Sequence[str], owner: str) -> None:
        """Begins the lease of the owner's claims on these keys anew."""
        rows = [(lease_clock(), key, owner) for key in keys]
        self._database.write(lambda c: c.executemany("UPDATE claims SET since = ? WHERE key = ? AND owner = ?", rows))

    def release(self, key: str, owner: str) -> None:
        """Ends the owner's claim without a call."""
        self._database.write(lambda c: c.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, owner)))

    def stats(self) -> StoreStats:
        """What there is."""

        def work(c: sqlite3.Connection) -> StoreStats:
            rows = c.execute(
                "SELECT model, count(*), sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens), min(created), "
                "max(created) FROM calls GROUP BY model ORDER BY model"
            ).fetchall()
            return StoreStats(sum(r[1] for r in rows), _used(c), tuple(ModelStats(*r) for r in rows))

        return self._database.read(work)

    def prune(
        self, older_than_s: float | None = None, model: str | None = None, max_bytes: int | None = None
    ) -> int:  # fmt: skip
        """Drops calls and gives their space back to the disk; returns how many.

        Args:
            older_than_s: those stored longer ago, in seconds...
            model: ...and of this model; each alone, or both together.
            max_bytes: then the oldest, a tenth at a time, until the rest fits.
        """
        rules: dict[str, object] = {}
        if older_than_s is not None:
            rules["created < ?"] = time.time() - older_than_s
        if model is not None:
            rules["model = ?"] = model

        def work(c: sqlite3.Connection) -> int:
            dropped = 0
            if rules:
                where = " AND ".join(rules)
                dropped += c.execute(f"DELETE FROM calls WHERE {where}", tuple(rules.values())).rowcount
            return dropped if max_bytes is None else dropped + _shrink(c, max_bytes)

        dropped = self._database.write(work)
        if dropped:
            self._database.compact()
        return dropped

    def export(self, path: Path) -> int:
        """Writes all calls to one Parquet file, whole or not at all; returns how many.

        Damaged ones are left out, with a warning.
        """

        def work(c: sqlite3.Connection) -> list[pa.RecordBatch]:
            cursor, batches = c.execute(f"SELECT {_NAMES}, checksum FROM calls ORDER BY id"), []
            while rows := cursor.fetchmany(10_000):
                if sound := [row[:-1] for row in rows if _is_sound(row[:-1], row[-1])]:
                    batches.append(pa.record_batch(list(zip(*sound, strict=True)), _COLUMNS))
            return batches

        table = pa.Table.from_batches(self._database.read(work), _COLUMNS)
        write_table(table.replace_schema_metadata({_VERSION_KEY: _EXPORT_VERSION}), path)
        return int(table.num_rows)

    def load(self, path: Path) -> int:
        """Adds the calls of a file that `export` wrote, all or none; returns how many are new."""
        return self._database.write(lambda c: sum(_insert(c, row) for row in _exported(path)))


def _find(c: sqlite3.Connection, key: str) -> StoredCall | None:
    """The call of that key, unless it is damaged."""
    row = c.execute(f"SELECT {_NAMES}, checksum FROM calls WHERE key = ?", (key,)).fetchone()
    if row is None:
        return None
    *fields, checksum = row
    if not _is_sound(tuple(fields), checksum):
        return None
    _, model, text, prompt, cached, completion, latency_s, _ = fields
    return StoredCall(model, text, Usage(prompt, completion, cached), latency_s)


def _insert(c: sqlite3.Connection, row: tuple[object, ...]) -> int:
    """1 when it was new. Anything but a known key is an error."""
    sql = f"INSERT INTO calls ({_NAMES}, checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING"
    return c.execute(sql, (*row, _checksum(row))).rowcount


def _checksum(row: tuple[object, ...]) -> int:
    return zlib.crc32(repr(row).encode())


def _is_sound(row: tuple[object, ...], checksum: int) -> bool:
    """Whether it is as it was written; one that is not counts as missing, and the others are as good as before."""
    sound = _checksum(row) == checksum
    if not sound:
        _tell_of_damage(row[0])
    return sound


@cache
def _tell_of_damage(key: object) -> None:
    """Once for a key: whoever waits for its call reads it five times a second."""
    log.warning("stored call %s is damaged (it fails its checksum): it counts as missing and may be made again", key)


def _used(c: sqlite3.Connection) -> int:
    """Bytes of the pages in use."""
    size, pages, free = (c.execute(f"PRAGMA {p}").fetchone()[0] for p in ("page_size", "page_count", "freelist_count"))
    return int(size * (pages - free))


def _shrink(c: sqlite3.Connection, max_bytes: int) -> int:
    """Drops the oldest tenth until the rest fits; returns how many calls that were."""
    dropped = 0
    while _used(c) > max_bytes:
        first, last = c.execute("SELECT min(id), max(id) FROM calls").fetchone()
        if first is None:
            break
        # Ids follow each other, except where some were pruned by model.
        dropped += c.execute("DELETE FROM calls WHERE id <= ?", (first + (last - first) // 10,)).rowcount
    return dropped


def _exported(path: Path) -> Iterator[tuple[object, ...]]:
    """The rows of an exported file; raises StoreError when it is none."""
    mend = "name a file that python -m experiments.store export wrote"
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            version = (schema.metadata or {}).get(_VERSION_KEY)
            if version is None or (version == _EXPORT_VERSION and not schema.equals(_COLUMNS)):
                raise StoreError(f"{path} is no export of a call store; {mend}")
            if version != _EXPORT_VERSION:
                raise StoreError(
                    f"{path} is an export of version {version.decode()}, this is version {_EXPORT_VERSION.decode()}; "
                    "load it with the version of bopo_ray that wrote it"
                )
            for batch in file.iter_batches():
                if any(column.null_count for column in batch):
                    raise StoreError(f"{path} has empty fields, so it is no export of a call store; {mend}")
                yield from zip(*(column.to_pylist() for column in batch), strict=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} can't be read ({' '.join(str(error).split())}); {mend}") from error
