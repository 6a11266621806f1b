"""Results at a URI: what is copied, fetched and refused. Two folders stand for the disks of two machines."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from pathlib import Path

import pytest

from bopo_ray.errors import ConfigError, StoreError
from bopo_ray.models.calls import CallStore, StoredCall
from bopo_ray.models.pricing import Usage
from bopo_ray.pipeline import shared
from bopo_ray.pipeline.shared import HELD_S, OWNER, SEEN, SharedFolder, is_uri, local_folder, shared_folder

FILES = {"ledger.json": "{}", "episodes/boundary/part-1.parquet": "rows", "policies/p/weights.pkl": "w" * 9}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    """What a copy holds, but who made it."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in (OWNER, SEEN))
    return {str(p.relative_to(folder)): p.read_text() for p in files}


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


@pytest.fixture
def uri(there: Path) -> str:
    return f"file://{there}/run"


def on(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)


def seems_gone(there: Path) -> None:
    """Whoever copied last did so long ago."""
    owner = json.loads((there / "run" / OWNER).read_text())
    (there / "run" / OWNER).write_text(json.dumps(owner | {"at": time.time() - HELD_S - 1}))


@pytest.mark.parametrize("out", ["s3://bucket/run", "file:///x", "gs://b/x", "abfss://c@a/x", "S3://bucket/run"])
def test_what_is_a_uri(out: str) -> None:
    assert is_uri(out)
    with pytest.raises(ConfigError, match="need a local folder"):
        local_folder(out)


@pytest.mark.parametrize("out", ["results/x", "/tmp/x", "./a:b", "C:\\x"])
def test_what_is_none(out: str) -> None:
    assert not is_uri(out) and local_folder(out) == Path(out)


@pytest.mark.parametrize("out", ["s3:/b", "s3:b/run", "gs:", "FILE:/x"])
def test_a_uri_with_a_slash_too_few_is_no_folder(out: str, tmp_path: Path) -> None:
    says = rf"out='{out}': a URI has two slashes, as {out.partition(':')[0]}://bucket/run; or give a local folder"
    with pytest.raises(ConfigError, match=says):
        local_folder(out)
    with pytest.raises(ConfigError, match=says), shared_folder(out, tmp_path / "x"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_path_is_worked_in_directly(tmp_path: Path) -> None:
    with shared_folder(str(tmp_path / "x"), tmp_path / "y") as (folder, save):
        assert folder == tmp_path / "x"
        save()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["nosuch://bucket/run", "file://relative/run", "s3://"])
def test_what_can_not_be_used_is_refused_in_one_line(out: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out=.*can't be used.*give a URI") as error:
        SharedFolder(out, tmp_path / "here")
    assert "\n" not in str(error.value)


def test_new_and_changed_files_are_copied_and_deleted_ones_go(tmp_path: Path, uri: str, there: Path) -> None:
    here = tmp_path / "here"
    write(here, FILES | {"half.tmp": "x", ".lock": "", "calls.db-lock": ""})
    folder = SharedFolder(uri, here)
    folder.save()
    assert read(there / "run") == FILES
    untouched = (there / "run/policies/p/weights.pkl").stat().st_mtime_ns
    (here / "episodes/boundary/part-1.parquet").rename(here / "episodes/boundary/part-2.parquet")
    write(here, {"ledger.json": "{1}"})
    folder.save()
    assert read(there / "run") == {
        "ledger.json": "{1}", "episodes/boundary/part-2.parquet": "rows", "policies/p/weights.pkl": "w" * 9
    }  # fmt: skip
    assert (there / "run/policies/p/weights.pkl").stat().st_mtime_ns == untouched


def test_another_machine_fetches_it_and_the_first_one_its_work(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, FILES)
    on("one", monkeypatch)
    SharedFolder(uri, one).save(last=True)
    on("two", monkeypatch)
    second = SharedFolder(uri, two)
    assert read(two) == FILES
    write(two, {"ledger.json": "{2}", "report.html": "r"})
    (two / "policies/p/weights.pkl").unlink()
    second.save(last=True)
    on("one", monkeypatch)
    SharedFolder(uri, one)
    assert read(one) == read(two) == {
        "ledger.json": "{2}", "report.html": "r", "episodes/boundary/part-1.parquet": "rows"
    }  # fmt: skip


def test_the_machine_that_was_killed_keeps_what_was_not_copied(tmp_path: Path, uri: str) -> None:
    here = tmp_path / "here"
    write(here, FILES)
    SharedFolder(uri, here).save()
    write(here, {"ledger.json": "newer"})
    assert SharedFolder(uri, here).local == here and read(here)["ledger.json"] == "newer"


def test_a_copy_that_is_cut_off_refers_to_nothing_that_is_not_there(
    tmp_path: Path, uri: str, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    write(here, FILES)
    SharedFolder(uri, here).save()
    write(here, {"policies/q/weights.pkl": "q", "episodes/e.parquet": "e", "ledger.json": '{"q": 1}'})
    (here / "episodes/boundary/part-1.parquet").unlink()
    put = SharedFolder._put
    for after in range(4):
        done: list[str] = []

        def cut(self: SharedFolder, source: Path, name: str, after: int = after, done: list[str] = done) -> bool:
            if len(done) == after:
                raise OSError("the line is cut")
            done.append(name)
            return put(self, source, name)

        folder = SharedFolder(uri, here)
        with monkeypatch.context() as patch, pytest.raises(StoreError, match=r"the line is cut.*--resume"):  # noqa: PT012
            patch.setattr(SharedFolder, "_put", cut)
            folder.save()
        copy = read(there / "run")
        assert "q" not in copy["ledger.json"] and "episodes/boundary/part-1.parquet" in copy
        assert read(here)["ledger.json"] == '{"q": 1}'
    SharedFolder(uri, here).save()
    assert read(there / "run") == read(here)


def test_a_database_is_copied_as_it_is_at_one_moment(tmp_path: Path, uri: str, there: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    store = CallStore(here / "calls.db")
    call = StoredCall("m", "text", Usage(1, 1), 0.1)
    store.put("a", call)
    folder = SharedFolder(uri, here)
    folder.save()
    assert not (there / "run/calls.db-wal").exists()
    store.put("b", call)  # it is in the log alone
    folder.save()
    assert CallStore(there / "run/calls.db").get("b") == store.get("b") == call
    before = (there / "run/calls.db").stat().st_mtime_ns
    folder.save()
    assert (there / "run/calls.db").stat().st_mtime_ns == before, "unchanged, so not copied again"
    with sqlite3.connect(there / "run/calls.db") as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_second_machine_is_refused_while_the_first_is_at_work(
    tmp_path: Path, uri: str, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "one", FILES)
    on("one", monkeypatch)
    first = SharedFolder(uri, tmp_path / "one")
    first.save()
    on("two", monkeypatch)
    with pytest.raises(StoreError, match="in use by another run on one, which copied to it 0 s ago"):
        SharedFolder(uri, tmp_path / "two")
    assert not (tmp_path / "two").exists()
    on("one", monkeypatch)
    SharedFolder(uri, tmp_path / "one")  # itself, after a kill
    seems_gone(there)
    on("two", monkeypatch)
    assert read(SharedFolder(uri, tmp_path / "two").local) == FILES  # the first one is gone
    first.save(last=True)
    SharedFolder(uri, tmp_path / "three")  # ended in order


def test_a_machine_that_was_cut_off_does_not_delete_what_its_successor_wrote(
    tmp_path: Path, uri: str, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "one", FILES)
    on("one", monkeypatch)
    first = SharedFolder(uri, tmp_path / "one")
    first.save()
    seems_gone(there)
    on("two", monkeypatch)
    second = SharedFolder(uri, tmp_path / "two")
    write(tmp_path / "two", {"episodes/boundary/part-9.parquet": "new"})
    second.save()
    on("one", monkeypatch)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"taken over by two while .* go on there or with another --out"):
            first.save()
    assert read(there / "run") == read(tmp_path / "two")
    on("two", monkeypatch)
    second.save(last=True)


@pytest.mark.parametrize("left", ["", '{"host": "o', None])
def test_an_owners_file_that_was_cut_off_or_deleted_is_written_anew(
    tmp_path: Path, uri: str, there: Path, left: str | None
) -> None:
    write(tmp_path / "one", FILES)
    folder = SharedFolder(uri, tmp_path / "one")
    folder.save()
    (there / "run" / OWNER).unlink()
    if left is not None:
        (there / "run" / OWNER).write_text(left)
    folder.save()
    assert json.loads((there / "run" / OWNER).read_text())["count"] == 2


def test_a_copy_that_failed_half_way_is_made_by_the_next(
    tmp_path: Path, uri: str, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "one", FILES)
    folder = SharedFolder(uri, tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr(folder, "_copy", lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("disk I/O error")))
        with pytest.raises(StoreError, match="can't be copied"):
            folder.save()
    folder.save()
    assert read(there / "run") == FILES


def test_a_database_that_can_not_be_copied_does_not_end_the_copying(
    tmp_path: Path, uri: str, there: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared, "COPY_S", 0.05)
    with shared_folder(uri, tmp_path / "here") as (folder, _):
        write(folder, {"calls.db": "no database" * 500})
        end = time.monotonic() + 20
        while not caplog.records:
            assert time.monotonic() < end
            time.sleep(0.01)
        (folder / "calls.db").unlink()
        write(folder, {"a.txt": "1"})
        while not (there / "run/a.txt").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
    assert "can't be copied" in caplog.text


def test_calls_are_stored_while_a_large_database_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the copy is of the moment at which it was begun."""
    store, call = CallStore(tmp_path / "calls.db"), StoredCall("m", "text", Usage(1, 1), 0.1)
    store.put("before", call)

    class Slow(sqlite3.Connection):
        def backup(self, target: sqlite3.Connection, **_: object) -> None:  # type: ignore[override]
            store.put("meanwhile", call)
            super().backup(target)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=Slow, **k))
    shared._snapshot(tmp_path / "calls.db", tmp_path / "copy.db")
    monkeypatch.undo()
    copy = CallStore(tmp_path / "copy.db")
    assert copy.get("before") == store.get("meanwhile") == call
    assert copy.get("meanwhile") is None


def test_a_folder_with_another_run_is_not_overwritten(tmp_path: Path, uri: str) -> None:
    write(tmp_path / "one", FILES)
    SharedFolder(uri, tmp_path / "one").save(last=True)
    write(tmp_path / "two", {"mine.txt": "mine"})
    with pytest.raises(StoreError, match="is no copy of"):
        SharedFolder(uri, tmp_path / "two")
    assert read(tmp_path / "two") == {"mine.txt": "mine"}


def test_a_copy_for_which_the_disk_is_full_loses_nothing_that_is_newer_here(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    write(here, FILES)
    folder = SharedFolder(uri, here)
    folder.save()
    newer = {"ledger.json": "newer", "episodes/boundary/part-2.parquet": "more"}
    write(here, newer)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="No space left"):  # noqa: PT012
        patch.setattr(os, "fsync", full)
        folder.save()
    SharedFolder(uri, here).save()
    assert read(here) == FILES | newer


@pytest.mark.parametrize("left", ["", '{"uri": ', '{"count": 3}', "[]", "\0\0"])
def test_a_folder_whose_age_is_not_known_is_neither_copied_nor_fetched(
    tmp_path: Path, uri: str, there: Path, left: str
) -> None:
    here = tmp_path / "here"
    write(here, FILES)
    SharedFolder(uri, here).save()
    write(here, {"ledger.json": "newer", SEEN: left})
    with pytest.raises(StoreError, match=rf"{SEEN} is damaged.*move {here} away") as error:
        SharedFolder(uri, here)
    assert read(here) == FILES | {"ledger.json": "newer"} and read(there / "run") == FILES
    said = str(error.value)
    write(here, {SEEN: said[said.index("write ") + 6 : said.index(" to that file")]})
    SharedFolder(uri, here).save()
    assert read(here) == read(there / "run") == FILES | {"ledger.json": "newer"}


@pytest.mark.parametrize("left", ["", '{"host": "o', "\0\0"])
def test_an_owners_file_that_was_cut_off_locks_nobody_out(
    tmp_path: Path, uri: str, there: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, FILES)
    on("one", monkeypatch)
    for _ in range(3):
        SharedFolder(uri, one).save()
    (there / "run" / OWNER).write_text(left)
    write(one, {"ledger.json": "newer"})
    with pytest.raises(StoreError, match=rf"{OWNER} is damaged.*delete that file; else move {one} away"):
        SharedFolder(uri, one)
    on("two", monkeypatch)
    second = SharedFolder(uri, two)
    assert read(two) == FILES
    write(two, {"report.html": "r"})
    second.save(last=True)
    on("one", monkeypatch)
    SharedFolder(uri, one)
    assert read(one) == FILES | {"report.html": "r"}, "the second machine's first copy is newer than the third of this"


def test_the_first_machine_goes_on_where_the_owners_file_is_deleted(tmp_path: Path, uri: str, there: Path) -> None:
    here = tmp_path / "here"
    write(here, FILES)
    SharedFolder(uri, here).save()
    (there / "run" / OWNER).unlink()
    write(here, {"ledger.json": "newer"})
    SharedFolder(uri, here).save()
    assert read(there / "run")["ledger.json"] == "newer"
    assert json.loads((there / "run" / OWNER).read_text())["count"] == 2


def test_an_owners_file_is_there_whole_or_not_at_all(
    tmp_path: Path, uri: str, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, dumps = tmp_path / "here", json.dumps
    write(here, FILES)
    folder = SharedFolder(uri, here)
    folder.save()

    def cut(value: dict[str, object], **how: int) -> str:
        if "host" in value:
            raise OSError("the line is cut")
        return dumps(value, **how)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="the line is cut"):  # noqa: PT012
        patch.setattr(json, "dumps", cut)
        folder.save()
    assert json.loads((there / "run" / OWNER).read_text())["count"] == 1
    SharedFolder(uri, here).save()


def test_a_first_fetch_that_breaks_off_is_gone_on_with(
    tmp_path: Path, uri: str, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "one", FILES)
    SharedFolder(uri, tmp_path / "one").save(last=True)
    get = SharedFolder._get

    def cut(self: SharedFolder, name: str) -> None:
        if name == "ledger.json":
            raise OSError(5, "the line is cut")
        get(self, name)

    with monkeypatch.context() as patch, pytest.raises(StoreError, match=r"can't be fetched.*again"):  # noqa: PT012
        patch.setattr(SharedFolder, "_get", cut)
        SharedFolder(uri, tmp_path / "two")
    SharedFolder(uri, tmp_path / "two").save()
    assert read(tmp_path / "two") == read(there / "run") == FILES


def test_half_a_fetch_does_not_replace_the_copy_whose_owner_is_lost(tmp_path: Path, uri: str, there: Path) -> None:
    write(there / "run", FILES)
    write(tmp_path / "here", {"ledger.json": "{}", SEEN: json.dumps({"uri": uri, "count": -1})})
    with pytest.raises(StoreError, match="would be deleted"):
        SharedFolder(uri, tmp_path / "here")


def test_a_place_with_other_files_is_not_emptied(tmp_path: Path, uri: str, there: Path) -> None:
    write(there / "run", {"thesis.txt": "mine"})
    with pytest.raises(StoreError, match=r"holds files of no run, which would be deleted; choose another --out"):
        SharedFolder(uri, tmp_path / "here")
    assert read(there / "run") == {"thesis.txt": "mine"}


def test_a_copy_of_another_place_is_not_overwritten(tmp_path: Path, uri: str) -> None:
    """Names that differ in their case alone have one local folder."""
    write(tmp_path / "one", FILES)
    SharedFolder(uri, tmp_path / "one").save(last=True)
    write(tmp_path / "two", {"mine.txt": "mine"})
    SharedFolder(f"{uri}-2", tmp_path / "two").save(last=True)
    with pytest.raises(StoreError, match=rf"is a copy of {uri}-2, not of {uri}; move it away"):
        SharedFolder(uri, tmp_path / "two")
    assert read(tmp_path / "two") == {"mine.txt": "mine"}


def test_it_is_copied_now_and_then_and_at_the_end_however_that_comes(
    tmp_path: Path, uri: str, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "COPY_S", 0.05)
    with pytest.raises(KeyboardInterrupt), shared_folder(uri, tmp_path / "here") as (folder, _):  # noqa: PT012
        write(folder, {"a.txt": "1"})
        end = time.monotonic() + 20
        while not (there / "run/a.txt").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        write(folder, {"b.json": "2"})
        os.utime(folder / "a.txt")
        raise KeyboardInterrupt
    assert read(there / "run") == {"a.txt": "1", "b.json": "2"}
    assert json.loads((there / "run" / OWNER).read_text())["open"] is False
