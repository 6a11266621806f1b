"""The run's ledger: the one owner of its money, whatever the number of processes that spend it.

Always true here: what is spent plus what is reserved never grows beyond the cap by a reservation; each reservation
ends as paid, as lost (the reply never came, and may have been charged: its worst case counts as spent) or as released
(nothing was spent), also when its owner is killed; sums equal the rows they stand for, as both change in one
transaction. Amounts are integer micro-dollars.

Each change costs the same however long the run: the sums are kept, one row per model. A process crash loses nothing,
see `bopo_ray.models.sqlite`.
"""

from __future__ import annotations

import dataclasses
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bopo_ray.models.pricing import Usage
from bopo_ray.models.sqlite import LEASE_S, Database, Format, owner_alive

__all__ = ["ModelTotals", "PaidCall", "SpendLedger", "Totals"]


@dataclass(frozen=True, slots=True)
class ModelTotals:
    """What one model's calls came to."""

    model: str
    paid_calls: int = 0
    """Calls whose reply came and was billed."""
    paid_microusd: int = 0
    prompt_tokens: int = 0
    """Of the paid calls, cached ones included."""
    cached_tokens: int = 0
    """Of the paid calls."""
    completion_tokens: int = 0
    """Of the paid calls."""
    saved_calls: int = 0
    """Calls answered from the call store."""
    saved_microusd: int = 0
    """What they would have cost."""
    lost_calls: int = 0
    """Attempts whose reply never came and may have been charged."""
    lost_microusd: int = 0
    """Their worst case."""
    reserved_microusd: int = 0
    """Worst case of the calls in flight."""

    @property
    def spent_microusd(self) -> int:
        """Paid and lost."""
        return self.paid_microusd + self.lost_microusd


@dataclass(frozen=True, slots=True)
class Totals:
    """What a run came to."""

    cap_microusd: int | None
    """None: no limit."""
    models: tuple[ModelTotals, ...]
    """In alphabetical order."""

    @property
    def overall(self) -> ModelTotals:
        """All models together."""
        return ModelTotals("all", *(sum(getattr(m, name) for m in self.models) for name in _SUMS))


class PaidCall(NamedTuple):
    """A row of the bill."""

    model: str
    usage: Usage
    cost: int
    """Micro-dollars."""


_SUMS = tuple(f.name for f in dataclasses.fields(ModelTotals))[1:]

_LEDGER = Format(
    "ledger", int.from_bytes(b"bopS"), 1,
    f"""
    CREATE TABLE models (
        model TEXT PRIMARY KEY, {", ".join(f"{name} INTEGER NOT NULL DEFAULT 0 CHECK ({name} >= 0)" for name in _SUMS)}
    ) WITHOUT ROWID;
    CREATE TABLE paid (
        id INTEGER PRIMARY KEY,
        key TEXT NOT NULL,
        model TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        cost INTEGER NOT NULL,
        created REAL NOT NULL
    );
    CREATE TABLE reservations (
        id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given twice
        owner TEXT NOT NULL,
        key TEXT NOT NULL,
        model TEXT NOT NULL,
        amount INTEGER NOT NULL,
        since REAL NOT NULL,
        lost INTEGER NOT NULL DEFAULT 0  -- given up for its owner, who may yet come back with the truth
    )
    """,
    check=True,
    mend="what was spent is in it, so none is started anew: restore it from a copy, or move it away to begin at zero",
)  # fmt: skip


class SpendLedger:
    """A run's money in one file, for all threads and processes of a machine."""

    def __init__(self, path: Path, cap_microusd: int | None, lease_s: float = LEASE_S) -> None:
        """Opens or creates a ledger.

        Args:
            path: its file.
            cap_microusd: what reservations made through this object keep to; None sets no limit. It is not stored, so a
                later run may raise it; one that is below what is spent refuses each reservation.
            lease_s: `recover` closes a reservation this old, although its owner may live.

        Raises StoreError for a file that can't be used, is damaged or is no ledger.
        """
        self._database = Database(path, _LEDGER)
        self._cap, self._lease_s = cap_microusd, lease_s

    def close(self) -> None:
        """Frees the file."""
        self._database.close()

    def reserve(self, owner: str, key: str, model: str, amount: int, own: int | None = None) -> int | None:
        """Sets the worst case of a call aside; returns the reservation, or None when the cap can't pay for it.

        `own` is a number < 0 for it, of the caller's and never given twice: told again, because the answer got lost, it
        is as told once.

        Before it refuses, it closes what dead owners left open. That frees nothing, since it counts at its worst case;
        `recover` frees what the call store can prove.
        """
        if amount < 0:
            raise ValueError(f"amount={amount}: need micro-dollars >= 0")
        if own is not None and own >= 0:
            raise ValueError(f"own={own}: need a number < 0, the others are given here")

        def work(c: sqlite3.Connection) -> int | None:
            if own is not None and c.execute("SELECT 1 FROM reservations WHERE id = ?", (own,)).fetchone():
                return own
            if self._cap is not None:
                (taken,) = c.execute(
                    "SELECT coalesce(sum(paid_microusd + lost_microusd + reserved_microusd), 0) FROM models"
                ).fetchone()
                if taken + amount > self._cap:
                    _give_up(c, _open_rows(c, leased_before=None))
                    return None
            sql = "INSERT INTO reservations (id, owner, key, model, amount, since) VALUES (?, ?, ?, ?, ?, ?)"
            reservation = c.execute(sql, (own, owner, key, model, amount, time.time())).lastrowid
            _add(c, model, reserved_microusd=amount)
            return reservation

        return self._database.write(work)

    def settle(self, reservation: int, usage: Usage, cost: int) -> bool:
        """The reply came: its cost is paid, the rest given back. Returns whether it was within what was reserved.

        The true cost is recorded also when it was not: then no cap can hold, and the caller must stop the run. A
        reservation that was given up as lost in the meantime is corrected; so do `lose` and `release`.
        """
        if cost < 0:
            raise ValueError(f"cost={cost}: need micro-dollars >= 0")

        def work(c: sqlite3.Connection) -> bool:
            key, model, amount, back = _close(c, reservation)
            _pay(c, key, model, usage, cost, back)
            return cost <= amount

        return self._database.write(work)

    def lose(self, reservation: int, cost: int | None = None) -> None:
        """The reply never came and may have been charged: `cost` counts as spent, None for the worst case."""

        def work(c: sqlite3.Connection) -> None:
            _, model, amount, back = _close(c, reservation)
            _add(c, model, back, lost_calls=1, lost_microusd=amount if cost is None else cost)

        self._database.write(work)

    def release(self, reservation: int) -> None:
        """Nothing was spent."""

        def work(c: sqlite3.Connection) -> None:
            _, model, _, back = _close(c, reservation)
            _add(c, model, back)

        self._database.write(work)

    def count_saved(self, model: str, cost: int, calls: int = 1) -> None:
        """Counts calls that the call store answered, and what they would have cost together."""
        self._database.write(lambda c: _add(c, model, saved_calls=calls, saved_microusd=cost))

    def recover(self, find: Callable[[str], tuple[Usage, int] | None]) -> None:
        """Closes what dead owners, and those past their lease, left open.

        Where `find` knows the call of that key (a reply is stored before it is billed), it is settled with that usage
        and cost, else it is lost. That includes reservations that were given up before.
        """

        def work(c: sqlite3.Connection) -> list[tuple[int, str]]:
            _give_up(c, _open_rows(c, leased_before=time.time() - self._lease_s))
            return c.execute("SELECT id, key FROM reservations WHERE lost ORDER BY since DESC, id DESC").fetchall()

        for reservation, key in self._database.write(work):
            if found := find(key):
                self._database.write(lambda c, r=reservation, f=found: _correct(c, r, *f))  # type: ignore[misc]

    def totals(self) -> Totals:
        """All sums, of one moment."""
        rows = self._database.read(
            lambda c: c.execute(f"SELECT model, {', '.join(_SUMS)} FROM models ORDER BY model").fetchall()
        )
        return Totals(self._cap, tuple(ModelTotals(*row) for row in rows))

    def paid_rows(self) -> Iterator[PaidCall]:
        """The bill, call by call, in order."""
        last = 0
        sql = (
            "SELECT id, model, prompt_tokens, completion_tokens, cached_tokens, cost FROM paid WHERE id > ? "
            "ORDER BY id LIMIT 10000"
        )
        while rows := self._database.read(lambda c, n=last: c.execute(sql, (n,)).fetchall()):  # type: ignore[misc]
            for _, model, prompt, completion, cached, cost in rows:
                yield PaidCall(model, Usage(prompt, completion, cached), cost)
            last = rows[-1][0]


def _add(c: sqlite3.Connection, model: str, back: Mapping[str, int] | None = None, **changes: int) -> None:
    """Adds `changes` to the sums of a model, together with what `_close` said of a reservation of it, `back`."""
    back = back or {}
    total = {name: changes.get(name, 0) + back.get(name, 0) for name in {**changes, **back}}
    sql = f"UPDATE models SET {', '.join(f'{name} = {name} + ?' for name in total)} WHERE model = ?"
    if not c.execute(sql, (*total.values(), model)).rowcount:
        c.execute("INSERT INTO models (model) VALUES (?)", (model,))
        c.execute(sql, (*total.values(), model))


def _pay(c: sqlite3.Connection, key: str, model: str, usage: Usage, cost: int, back: Mapping[str, int]) -> None:
    """Enters a call in the bill; `back` is what its reservation had added to the sums, negative."""
    tokens = (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
    sql = (
        "INSERT INTO paid (key, model, prompt_tokens, cached_tokens, completion_tokens, cost, created) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)"
    )
    c.execute(sql, (key, model, *tokens, cost, time.time()))
    names = ("prompt_tokens", "cached_tokens", "completion_tokens")
    _add(c, model, back, paid_calls=1, paid_microusd=cost, **dict(zip(names, tokens, strict=True)))


def _close(c: sqlite3.Connection, reservation: int) -> tuple[str, str, int, dict[str, int]]:
    """Ends a reservation: its key, model and amount, and what must now be added to the model's sums."""
    row = c.execute("SELECT key, model, amount, lost FROM reservations WHERE id = ?", (reservation,)).fetchone()
    if row is None:
        raise ValueError(f"reservation {reservation}: never made, or closed before")
    key, model, amount, lost = row
    c.execute("DELETE FROM reservations WHERE id = ?", (reservation,))
    back = {"lost_calls": -1, "lost_microusd": -amount} if lost else {"reserved_microusd": -amount}
    return key, model, amount, back


def _open_rows(c: sqlite3.Connection, leased_before: float | None) -> list[int]:
    """Open reservations of the dead, and those made before `leased_before`."""
    rows = c.execute("SELECT id, owner, since FROM reservations WHERE NOT lost").fetchall()
    dead = {owner for owner in {row[1] for row in rows} if not owner_alive(owner)}
    return [i for i, owner, since in rows if owner in dead or (leased_before is not None and since <= leased_before)]


def _give_up(c: sqlite3.Connection, reservations: list[int]) -> None:
    """Counts reservations as lost, and keeps them for whoever learns what became of them."""
    for reservation in reservations:
        model, amount = c.execute("SELECT model, amount FROM reservations WHERE id = ?", (reservation,)).fetchone()
        c.execute("UPDATE reservations SET lost = 1 WHERE id = ?", (reservation,))
        _add(c, model, reserved_microusd=-amount, lost_calls=1, lost_microusd=amount)


def _correct(c: sqlite3.Connection, reservation: int, usage: Usage, cost: int) -> None:
    """Turns lost into paid, unless the stored call may be another's who asked the same afterwards."""
    row = c.execute("SELECT key, since FROM reservations WHERE id = ? AND lost", (reservation,)).fetchone()
    if row is None:
        return
    if c.execute("SELECT 1 FROM reservations WHERE key = ? AND NOT lost", row[:1]).fetchone():
        return
    if c.execute("SELECT 1 FROM paid WHERE key = ? AND created >= ?", row).fetchone():
        return
    key, model, _, back = _close(c, reservation)
    _pay(c, key, model, usage, cost, back)
