"""The call store: a call is stored once, made once, never wrong; and its file is bounded, copied and mended."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import resource
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bopo_ray.errors import StoreError
from bopo_ray.models import calls as calls_module
from bopo_ray.models.calls import CallStore, ModelStats, StoredCall, call_key, owner_alive, owner_id
from bopo_ray.models.pricing import Usage
from bopo_ray.models.protocol import Message, Request
from bopo_ray.models.spend import SpendLedger
from bopo_ray.models.sqlite import Database
from experiments.store import main

CALL = StoredCall("mini", "Action: look around", Usage(120, 7, 100), 0.25)
ME = owner_id()
KEYS = [f"{i:032x}" for i in range(2000)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CallStore]:
    store = CallStore(tmp_path / "calls.db")
    yield store
    store.close()


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    """Damage is told once per process, and tests damage the same keys."""
    calls_module._tell_of_damage.cache_clear()


def dead_owner() -> str:
    """Of a process that has just ended."""
    code = "from bopo_ray.models.sqlite import owner_id; print(owner_id())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# -- keys -------------------------------------------------------------------------------------------------------------

REQUEST = Request((Message("system", "ab"), Message("user", "c")), 3, 0.7, 128, "boil/1")


def changed(**fields: object) -> Request:
    return dataclasses.replace(REQUEST, **fields)  # type: ignore[arg-type]


def test_a_key_is_the_same_today_and_tomorrow() -> None:
    # What is hashed, by hand; another encoding would make every store worthless.
    text = '["id", [["system", "ab"], ["user", "c"]], 0.7, 128, 3, null]'
    assert call_key("id", REQUEST) == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    assert len(call_key("id", REQUEST)) == 32


def test_each_part_of_a_key_matters() -> None:
    requests = [
        REQUEST,
        changed(messages=REQUEST.messages[:1]),
        changed(messages=REQUEST.messages[::-1]),
        changed(messages=(Message("user", "ab"), Message("user", "c"))),
        changed(messages=(Message("system", "a"), Message("user", "bc"))),
        changed(messages=(Message("system", 'ab"], ["user", "c'),)),
        changed(temperature=0.8),
        changed(max_tokens=129),
        changed(sample=4),
        changed(plan=("open door",)),
        changed(plan=("open", "door")),
        changed(plan=("open door",), task="boil/2"),
        changed(temperature=0.0),
    ]
    keys = [call_key("id", r) for r in requests] + [call_key("id2", REQUEST)]
    assert len(set(keys)) == len(keys)


def test_what_does_not_matter_to_a_reply_does_not_matter_to_its_key() -> None:
    assert call_key("id", changed(task="other")) == call_key("id", REQUEST)  # a real model never sees it
    deterministic = {
        call_key("id", changed(temperature=t, sample=s)) for t in (0, 0.0, -0.0) for s in (0, 3)
    }  # fmt: skip
    assert len(deterministic) == 1
    assert call_key("id", changed(temperature=1)) == call_key("id", changed(temperature=1.0))
    assert call_key("id", changed(messages=(Message("user", "\ud83d"),)))  # half an emoji has a key too


# -- calls and claims -------------------------------------------------------------------------------------------------


def test_a_call_comes_back_equal_and_the_first_one_stays(store: CallStore, tmp_path: Path) -> None:
    assert store.get(KEYS[0]) is None
    store.put(KEYS[0], CALL)
    store.put(KEYS[0], dataclasses.replace(CALL, text="another"))
    assert store.get(KEYS[0]) == CALL == CallStore(tmp_path / "calls.db").get(KEYS[0])
    assert store.get(KEYS[1]) is None


@settings(max_examples=50, deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8")),
    tokens=st.integers(0, 2**40),
    latency=st.floats(0, 1e6) | st.integers(0, 9),
)
def test_any_reply_comes_back_equal(
    tmp_path_factory: pytest.TempPathFactory, text: str, tokens: int, latency: float
) -> None:
    store = CallStore(tmp_path_factory.mktemp("any") / "calls.db")
    call = StoredCall(text, text, Usage(tokens, tokens // 3, tokens // 2), latency)
    store.put("k", call)
    assert store.get("k") == call
    store.close()


def test_half_a_character_is_stored_as_a_question_mark(store: CallStore) -> None:
    store.put("k", dataclasses.replace(CALL, text="a\ud83db", latency_s=-0.0))
    assert store.get("k") == dataclasses.replace(CALL, text="a?b", latency_s=0.0)


def test_one_of_those_that_ask_makes_the_call(store: CallStore, tmp_path: Path) -> None:
    other = CallStore(tmp_path / "calls.db")
    assert store.claim("k", ME) is True
    assert store.claim("k", ME) is False  # another thread
    assert other.claim("k", "elsewhere/1/1") is False
    assert other.claim("k2", ME) is True
    store.put("k", CALL)
    assert store.claim("k", ME) == CALL == other.claim("k", ME)
    assert other.claim("k2", ME) is False  # its claim was not ended by the other's
    store.prune(model="mini")
    assert other.claim("k", ME) is True  # the put has ended the claim


def test_a_released_claim_is_free_and_only_its_owner_can_release_it(store: CallStore) -> None:
    assert store.claim("k", ME) is True
    store.release("k", "elsewhere/1/1")
    assert store.claim("k", ME) is False
    store.release("k", ME)
    assert store.claim("k", "elsewhere/1/1") is True


def test_a_claim_of_the_dead_is_taken_over(store: CallStore) -> None:
    dead = dead_owner()
    assert store.claim("k", dead) is True
    assert store.claim("k", ME) is True
    store.release("k", dead)  # says a ghost
    assert store.claim("k", ME) is False


def test_an_old_claim_is_taken_over_although_its_owner_lives(tmp_path: Path) -> None:
    store = CallStore(tmp_path / "calls.db", lease_s=0.2)
    assert store.claim("k", "elsewhere/1/1") is True
    assert store.claim("k", ME) is False
    time.sleep(0.25)
    assert store.claim("k", ME) is True
    assert store.claim("k", "elsewhere/1/1") is False  # the lease is the new owner's


def test_a_date_that_jumps_neither_ends_nor_prolongs_a_claim(store: CallStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.claim("k", "elsewhere/1/1") is True
    now = time.time()
    for jump_s in (86_400.0, -86_400.0):
        monkeypatch.setattr(time, "time", lambda jump_s=jump_s: now + jump_s)
        assert store.claim("k", ME) is False, "the call would be paid twice"
    # One made before the machine was started anew, or by a version that went by the date, holds nobody up.
    sql = "UPDATE claims SET since = ?"
    store._database.write(lambda c: c.execute(sql, (now,)))
    assert store.claim("k", ME) is True


def test_who_is_alive(tmp_path: Path) -> None:
    host, pid, start = ME.split("/")
    assert (host, pid) == (socket.gethostname(), str(os.getpid()))
    assert owner_alive(ME)
    assert not owner_alive(f"{host}/{pid}/{int(start) - 1}")  # the same pid, given to another process
    assert not owner_alive(dead_owner())
    assert owner_alive("another-host/1/1")
    code = "from bopo_ray.models.sqlite import *; print(owner_id(), flush=True)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    owner = child.stdout.readline().strip()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not owner_alive(owner)  # a zombie, not waited for yet
    child.communicate()


# -- size -------------------------------------------------------------------------------------------------------------


def test_the_oldest_tenth_goes_when_the_file_is_too_big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "CHECK_EVERY", 1)
    bound, big = 400_000, dataclasses.replace(CALL, text="x" * 1000)
    store = CallStore(tmp_path / "calls.db", max_bytes=bound)
    kept = []
    for i, key in enumerate(KEYS[:1000]):
        store.put(key, big)
        assert store.stats().bytes <= bound
        kept.append(store.stats().calls)
        if i == 100:
            assert kept == list(range(1, 102))  # nothing goes before it must
    drops = [(a, b) for a, b in itertools.pairwise(kept) if b <= a]
    assert len(drops) > 10
    for before, after in drops:
        assert before + 1 - after == -(-(before + 1) // 10)  # a tenth, rounded up
    assert [store.get(k) is not None for k in KEYS[:1000]] == [False] * (1000 - kept[-1]) + [True] * kept[-1]
    # The space is used again: the file itself hardly grows beyond the bound.
    store.close()
    assert (tmp_path / "calls.db").stat().st_size < bound * 1.1


def test_a_lower_bound_takes_effect_with_the_first_put(tmp_path: Path) -> None:
    store = CallStore(tmp_path / "calls.db")
    for key in KEYS[:300]:
        store.put(key, dataclasses.replace(CALL, text="x" * 1000))
    assert store.stats().bytes > 300_000
    lower = CallStore(tmp_path / "calls.db", max_bytes=100_000)
    assert lower.stats().calls == 300
    lower.put("new", CALL)
    assert lower.stats().bytes <= 100_000 and lower.get("new") == CALL and lower.stats().calls > 20


def test_a_bound_below_an_empty_file_ends(tmp_path: Path) -> None:
    store = CallStore(tmp_path / "calls.db", max_bytes=1)
    store.put("k", CALL)
    assert store.stats().calls == 0


def test_stats(store: CallStore) -> None:
    assert store.stats().calls == 0 and store.stats().models == ()
    began = time.time()
    store.put("a", CALL)
    store.put("b", StoredCall("full", "x", Usage(10, 2, 4), 0.1))
    store.put("c", StoredCall("mini", "y", Usage(1, 1, 0), 0.1))
    full, mini = store.stats().models
    assert dataclasses.replace(mini, oldest=0, newest=0) == ModelStats("mini", 2, 121, 100, 8, 0, 0)
    assert dataclasses.replace(full, oldest=0, newest=0) == ModelStats("full", 1, 10, 4, 2, 0, 0)
    assert began <= mini.oldest <= full.oldest <= mini.newest <= time.time()
    assert store.stats().calls == 3


def test_prune(store: CallStore, tmp_path: Path) -> None:
    for key in KEYS[:400]:
        store.put(key, dataclasses.replace(CALL, text="x" * 2000))
    time.sleep(0.05)
    middle = time.time()
    for i, key in enumerate(KEYS[400:500]):
        store.put(key, StoredCall("full" if i % 2 else "mini", "y", Usage(1, 1), 0.1))
    assert store.prune() == 0
    assert store.prune(model="none") == 0
    assert store.prune(older_than_s=time.time() - middle, model="full") == 0  # old ones are all mini
    assert store.prune(model="full") == 50
    big = store.stats().bytes
    assert store.prune(older_than_s=time.time() - middle) == 400
    assert store.stats().calls == 50 and store.get(KEYS[400]) is not None
    assert store.stats().bytes < big / 10 and (tmp_path / "calls.db").stat().st_size < big / 10
    assert store.prune(older_than_s=0) == 50
    for key in KEYS[:200]:
        store.put(key, dataclasses.replace(CALL, text="x" * 2000))
    dropped = store.prune(max_bytes=200_000)
    assert 0 < dropped < 200 and store.stats().bytes <= 200_000
    assert store.get(KEYS[dropped - 1]) is None and store.get(KEYS[dropped]) is not None


# -- export and load --------------------------------------------------------------------------------------------------


def test_an_export_brings_all_calls_elsewhere_and_old_ones_stay(store: CallStore, tmp_path: Path) -> None:
    for i, key in enumerate(KEYS[:100]):
        store.put(key, dataclasses.replace(CALL, text=f"reply {i} \0 é 😀", latency_s=i / 7))
    file = tmp_path / "out.parquet"
    assert store.export(file) == 100
    table = pq.read_table(file)
    assert table.column_names == [
        "key", "model", "text", "prompt_tokens", "cached_tokens", "completion_tokens", "latency_s", "created",
    ]  # fmt: skip
    assert table.slice(0, 1).to_pylist()[0] | {"created": 0} == {
        "key": KEYS[0], "model": "mini", "text": "reply 0 \0 é 😀", "prompt_tokens": 120, "cached_tokens": 100,
        "completion_tokens": 7, "latency_s": 0.0, "created": 0,
    }  # fmt: skip
    other = CallStore(tmp_path / "other.db")
    other.put(KEYS[5], CALL)
    assert other.load(file) == 99
    assert other.load(file) == 0
    assert [other.get(k) for k in KEYS[:100] if k != KEYS[5]] == [store.get(k) for k in KEYS[:100] if k != KEYS[5]]
    assert other.get(KEYS[5]) == CALL
    assert other.stats().models[0].oldest == store.stats().models[0].oldest


def test_an_empty_store_exports_and_loads(store: CallStore, tmp_path: Path) -> None:
    assert store.export(tmp_path / "none.parquet") == 0
    assert store.load(tmp_path / "none.parquet") == 0


def test_what_is_no_export_is_refused_in_one_line_and_adds_nothing(store: CallStore, tmp_path: Path) -> None:
    for key in KEYS[:50]:
        store.put(key, CALL)
    good = tmp_path / "good.parquet"
    store.export(good)
    table, raw = pq.read_table(good), good.read_bytes()
    version = dict(table.schema.metadata)
    bad: dict[str, pa.Table | bytes | None] = {
        "missing": None,
        "empty": b"",
        "text": b"key,model\n",
        "half": raw[: len(raw) // 2],
        "unmarked": table.replace_schema_metadata({}),
        "a later version": table.replace_schema_metadata(dict.fromkeys(version, b"2")),
        "a column less": table.drop_columns(["latency_s"]),
        "a null": table.set_column(2, "text", pa.array(["x", None] * 25)),
    }
    other = CallStore(tmp_path / "other.db")
    for name, content in bad.items():
        file = tmp_path / f"{name}.parquet"
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content is not None:
            pq.write_table(content, file)
        with pytest.raises(StoreError) as caught:
            other.load(file)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value), name
        assert ("version 2" in str(caught.value)) == (name == "a later version")
        assert other.stats().calls == 0
    assert other.load(good) == 50  # it still works


# -- damage -----------------------------------------------------------------------------------------------------------


def fill(path: Path, n: int = 300) -> None:
    store = CallStore(path)
    for key in KEYS[:n]:
        store.put(key, dataclasses.replace(CALL, text=f"reply of {key} " * 20))
    store.close()


@pytest.mark.parametrize("damage", ["header", "text", "schema", "half"])
def test_a_damaged_store_is_set_aside_and_a_new_one_started(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "calls.db"
    fill(path)
    raw = path.read_bytes()
    path.write_bytes({
        "header": b"\0" * 100 + raw[100:],
        "text": b"not a database at all",
        "schema": raw[:100] + b"\xff" * 3996 + raw[4096:],
        "half": raw[: len(raw) // 2],
    }[damage])  # fmt: skip
    damaged = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        store = CallStore(path)
        found = [store.get(k) for k in KEYS[:300]]
        store.put("new", CALL)
        assert store.get("new") == CALL
    assert None in found and all(
        c is None or c.text == f"reply of {k} " * 20 for k, c in zip(KEYS, found, strict=False)
    )
    assert (tmp_path / "calls.db.corrupt").read_bytes() == damaged
    assert len(caplog.records) == 1 and "calls.db.corrupt" in caplog.text
    store.close()
    path.write_bytes(damaged)
    with pytest.raises(StoreError, match=r"damaged .* paid for again"):  # noqa: PT012 (some damage is seen later)
        opened = CallStore(path, repair=False)
        [opened.get(k) for k in KEYS[:300]]
    assert path.read_bytes() == damaged


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_give_a_wrong_reply(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("flip") / "calls.db"
    fill(path, 60)
    raw = bytearray(path.read_bytes())
    flips = data.draw(st.dictionaries(st.integers(0, len(raw) - 1), st.integers(1, 255), min_size=1, max_size=8))
    for place, bits in flips.items():
        raw[place] ^= bits
    path.write_bytes(raw)
    try:
        store = CallStore(path)
        for key in KEYS[:60]:
            assert (call := store.get(key)) is None or call.text == f"reply of {key} " * 20
        store.put("new", CALL)
        assert store.get("new") == CALL
        store.close()
    except StoreError:
        assert min(flips) < 100  # in the header, where a flip may make it a database of another kind or version


def test_one_damaged_call_is_made_again_and_the_others_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, bad = tmp_path / "calls.db", KEYS[7]
    fill(path)
    raw = path.read_bytes()
    assert raw.count(f"reply of {bad} ".encode()) == 20
    path.write_bytes(raw.replace(f"reply of {bad} ".encode(), f"reply oF {bad} ".encode(), 1))
    store = CallStore(path)
    assert [k for k in KEYS[:300] if store.get(k) is None] == [bad]
    assert "fails its checksum" in caplog.text and "made again" in caplog.text and bad in caplog.text
    assert store.claim(bad, "elsewhere/1/1") is True
    assert [store.claim(bad, ME) for _ in range(5)] == [False] * 5  # as who waits for it looks again and again
    store.release(bad, "elsewhere/1/1")
    assert len(caplog.records) == 1, "it is told once"
    assert store.export(tmp_path / "sound.parquet") == 299
    assert store.claim(bad, ME) is True
    again = dataclasses.replace(CALL, text="made again")
    store.put(bad, again)
    assert store.get(bad) == again and store.stats().calls == 300
    assert not list(tmp_path.glob("*.corrupt*"))


def test_a_second_damaged_store_does_not_replace_the_first(tmp_path: Path) -> None:
    path = tmp_path / "calls.db"
    for text in (b"first", b"second"):
        path.unlink(missing_ok=True)
        path.write_bytes(text * 1000)
        CallStore(path).close()
    asides = (tmp_path / "calls.db.corrupt", tmp_path / "calls.db.corrupt-2")
    assert [a.read_bytes()[:5] for a in asides] == [b"first", b"secon"]


def test_a_store_that_is_damaged_while_two_use_it_is_replaced_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "calls.db"
    fill(path)
    one, two = CallStore(path), CallStore(path)
    raw = path.read_bytes()
    with path.open("r+b") as file:  # an in-place overwrite, as a bad disk would do
        file.write(b"\xff" * len(raw))
    for store in (one, two):
        assert [store.get(k) for k in KEYS[:300]].count(None) > 0
    one.put("new", CALL)
    assert two.get("new") == CALL and two.claim("new", ME) == CALL
    assert len(caplog.records) == 1


def test_a_store_that_is_deleted_while_it_is_used_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "calls.db"
    store = CallStore(path)
    store.put("a", CALL)
    for file in tmp_path.iterdir():
        file.unlink()
    store.put("b", CALL)
    assert CallStore(path).get("b") == CALL


def test_another_kind_of_file_or_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    SpendLedger(tmp_path / "spend.db", None).close()
    with pytest.raises(StoreError, match="no call store"):
        CallStore(tmp_path / "spend.db")
    with sqlite3.connect(tmp_path / "foreign.db") as c:
        c.execute("CREATE TABLE calls (key)")
    with pytest.raises(StoreError, match="no call store"):
        CallStore(tmp_path / "foreign.db")
    CallStore(tmp_path / "calls.db").close()
    with sqlite3.connect(tmp_path / "calls.db") as c:
        c.execute("PRAGMA user_version=2")
    with pytest.raises(StoreError, match="version 2, this is version 1"):
        CallStore(tmp_path / "calls.db")
    with pytest.raises(StoreError, match="can't be used"):
        CallStore(tmp_path)  # a folder
    assert not list(tmp_path.glob("*.corrupt"))


def test_a_locked_store_says_so(tmp_path: Path) -> None:
    path = tmp_path / "calls.db"
    CallStore(path).close()
    browser = sqlite3.connect(path, isolation_level=None)
    browser.execute("BEGIN IMMEDIATE")
    database = Database(path, calls_module._CALLS, timeout_s=0.2)
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"locked by another process for 0.2 s"):
        database.write(lambda c: c.execute("DELETE FROM claims"))
    assert time.monotonic() - began < 2
    browser.execute("COMMIT")
    database.write(lambda c: c.execute("DELETE FROM claims"))
    with database._exclusive(), pytest.raises(StoreError, match="locked by another process"):
        Database(path, calls_module._CALLS, timeout_s=0.2)


def test_a_full_disk_says_so_and_what_was_stored_stays(tmp_path: Path) -> None:
    store = CallStore(tmp_path / "calls.db")
    store.put("a", CALL)
    store._database.read(lambda c: c.execute("PRAGMA max_page_count=12").fetchone())
    with pytest.raises(StoreError, match=r"the disk is full\); free some space"):  # noqa: PT012
        for key in KEYS:
            store.put(key, CALL)
    assert store.get("a") == CALL and store.claim("a", ME) == CALL
    store._database.read(lambda c: c.execute("PRAGMA max_page_count=1000000").fetchone())
    store.put("b", CALL)  # goes on when there is space
    assert store.get("b") == CALL


def test_a_limit_on_files_says_so_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "calls.db"
    code = (
        "import sys; from pathlib import Path; from bopo_ray.models.calls import *\n"
        "from bopo_ray.models.pricing import Usage\n"
        "store = CallStore(Path(sys.argv[1]))\n"
        "for i in range(2000): store.put(str(i), StoredCall('m', 'x' * 500, Usage(1, 1), 0.1)); print(i)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)),
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("bopo_ray.errors.StoreError")
    made = len(done.stdout.splitlines())
    store = CallStore(path)
    assert made > 50 and all(store.get(str(i)) for i in range(made))  # what was said to be stored is


# -- the command ------------------------------------------------------------------------------------------------------


def test_stats_export_and_prune_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "calls.db", 100)
    assert main(["stats", str(tmp_path)]) == 0
    assert "100 calls" in (said := capsys.readouterr().out) and "12,000" in said
    assert main(["stats", str(tmp_path / "calls.db"), "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["calls"] == 100 and stats["models"][0]["completion_tokens"] == 700
    assert main(["export", str(tmp_path), str(tmp_path / "x.parquet")]) == 0
    assert "100 calls" in capsys.readouterr().out and pq.read_metadata(tmp_path / "x.parquet").num_rows == 100
    assert main(["prune", str(tmp_path), "--older-than", "1"]) == 0
    assert capsys.readouterr().out == "0 calls dropped\n"
    assert main(["prune", str(tmp_path), "--max-mb", "0.05"]) == 0
    assert CallStore(tmp_path / "calls.db").stats().bytes <= 50_000
    assert main(["prune", str(tmp_path), "--model", "mini"]) == 0
    assert CallStore(tmp_path / "calls.db").stats().calls == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["stats", "nowhere"], "no call store at nowhere"),
        (["stats", "."], "no call store at calls.db"),
        (["stats", "damaged.db"], "is damaged"),
        (["stats", "spend.db"], "is a database, but no call store"),
        (["prune", "good.db"], "nothing says what to drop"),
        (["prune", "good.db", "--older-than", "-1"], "--older-than=-1"),
        (["prune", "good.db", "--max-mb", "nan"], "--max-mb=nan"),
        (["prune", "good.db", "--model", "gpt"], "the store has mini"),
        (["export", "good.db", "no/such/folder/x.parquet"], "x.parquet can't be written"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(Path("good.db"), 3)
    Path("damaged.db").write_bytes(b"nothing" * 1000)
    SpendLedger(Path("spend.db"), None).close()
    before = {p.name for p in tmp_path.iterdir()}
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert "--out" not in error and "--resume" not in error, "of which this script has none"
    made = {p.name.removesuffix("-lock") for p in tmp_path.iterdir()} - before
    assert not made
