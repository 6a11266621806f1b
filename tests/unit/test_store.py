"""The episode store: what goes in comes out, once, and nothing half-written ever counts."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bopo_ray import store as store_module
from bopo_ray.errors import StoreError
from bopo_ray.records import Budget, CostMode, Episode, Phase, Question
from bopo_ray.rllib.bopo import BoPO, BoPOConfig
from bopo_ray.store import SCHEMA, EpisodeStore, read_shard, write_table
from tests.toy import play, toy_spec

BUDGETS = (
    None,
    Budget(CostMode.CALLS, 0),
    Budget(CostMode.CALLS, 3),
    Budget(CostMode.USD, 0),
    Budget(CostMode.USD, 9000),
)
EPISODES = [
    play(toy_spec(name, f"random({p})", member, budget), p_large=p)[0]
    for p in (0.0, 0.3)
    for member, budget in enumerate(BUDGETS)
    for name in ("fetch/0", "mix/1")
]
BY_ID = {e.spec.id: e for e in EPISODES}


def by_id(store: EpisodeStore, **filters: str) -> dict[str, Episode]:
    found = list(store.read(**filters))
    assert len({e.spec.id for e in found}) == len(found)
    return {e.spec.id: e for e in found}


def test_episodes_come_back_equal(tmp_path: Path) -> None:
    assert len(BY_ID) == len(EPISODES) and any(not e.steps for e in EPISODES)  # also one that no call could be paid for
    store = EpisodeStore(tmp_path / "new" / "folder", "p1")
    store.append(EPISODES)
    for reader in (store, EpisodeStore(store.folder, "p1")):
        assert by_id(reader) == BY_ID and len(reader) == len(BY_ID)
    again = next(iter(by_id(store).values()))
    assert isinstance(again.spec.phase, Phase) and isinstance(again.steps, tuple)


def test_a_routers_question_is_kept_and_counted(tmp_path: Path) -> None:
    first, *others = EPISODES[1].steps
    asked = dataclasses.replace(first, question=Question("LARGE", 9, 3, 1, 40, 5, 0.5))
    episode = dataclasses.replace(EPISODES[1], steps=(asked, *others))
    EpisodeStore(tmp_path, "p1").append([episode])
    (shard,) = tmp_path.iterdir()
    assert list(EpisodeStore(tmp_path, "p1").read()) == [episode]
    (row,) = pq.read_table(shard).to_pylist()
    assert row["calls"] == EPISODES[1].calls + 1 and row["cost_microusd"] == EPISODES[1].cost_microusd + 40
    assert asked.charged_microusd == first.charged_microusd + 45


def test_episodes_from_before_there_were_questions_are_read_and_added_to(tmp_path: Path) -> None:
    EpisodeStore(tmp_path, "p1").append(EPISODES[:3])
    (shard,) = tmp_path.iterdir()
    rows = pq.read_table(shard).to_pylist()
    for row in rows:
        for step in row["steps"]:
            del step["question"]
    old = pa.Table.from_pylist(rows)
    pq.write_table(old.replace_schema_metadata({b"bopo_ray.schema": b"2", b"bopo_ray.prices": b"p1"}), shard)
    store = EpisodeStore(tmp_path, "p1")
    assert by_id(store) == {e.spec.id: e for e in EPISODES[:3]}
    store.append(EPISODES)
    store.compact()
    assert by_id(EpisodeStore(tmp_path, "p1")) == BY_ID


def test_a_sample_index_of_any_seed_is_kept(tmp_path: Path) -> None:
    config = BoPOConfig().debugging(seed=4_000_000)
    sample = BoPO._sample(SimpleNamespace(config=config, updates=7))
    episode = dataclasses.replace(EPISODES[0], spec=dataclasses.replace(EPISODES[0].spec, sample=sample))
    store = EpisodeStore(tmp_path, "p1")
    store.append([episode])
    assert sample > 2**31 and by_id(store) == {episode.spec.id: episode}


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@settings(max_examples=25, deadline=None)
@given(reply=TEXT, policy=TEXT, p=st.floats(0, 1), latency=st.floats(0, 1e6), cost=st.integers(0, 2**40))
def test_any_text_and_any_number_come_back_equal(
    tmp_path_factory: pytest.TempPathFactory, reply: str, policy: str, p: float, latency: float, cost: int
) -> None:
    step = dataclasses.replace(
        EPISODES[0].steps[0], reply=reply, probabilities=(1 - p, p), latency_s=latency, cost_microusd=cost
    )
    spec = dataclasses.replace(EPISODES[0].spec, policy=policy, seed=2**62)
    episode = dataclasses.replace(EPISODES[0], spec=spec, steps=(step,) * 2, score=-p, outcome=p)
    store = EpisodeStore(tmp_path_factory.mktemp("any"), "p1")
    store.append([episode])
    assert list(store.read()) == [episode]


def test_an_episode_is_stored_once(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path, "p1")
    store.append(EPISODES[:3])
    store.append(EPISODES[:3])
    store.append([EPISODES[3], EPISODES[3]])
    store.append([])
    assert len(store) == 4 and len(list(tmp_path.iterdir())) == 2
    assert sum(pq.read_metadata(shard).num_rows for shard in tmp_path.iterdir()) == 4


def test_two_shards_with_the_same_episode_count_once(tmp_path: Path) -> None:
    one, two = EpisodeStore(tmp_path, "p1"), EpisodeStore(tmp_path, "p1")  # neither knows of the other's episodes
    one.append(EPISODES[:4])
    two.append(EPISODES[2:6])
    store = EpisodeStore(tmp_path, "p1")
    assert len(store) == 6 and list(by_id(store)) == sorted(e.spec.id for e in EPISODES[:6])


def test_the_order_does_not_depend_on_the_writing(tmp_path: Path) -> None:
    for name, order in (("a", EPISODES), ("b", EPISODES[::-1])):
        store = EpisodeStore(tmp_path / name, "p1")
        for episode in order:
            store.append([episode])
    assert list(EpisodeStore(tmp_path / "a", "p1").read()) == list(EpisodeStore(tmp_path / "b", "p1").read())


def test_what_is_missing_comes_in_order(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path, "p1")
    specs = [e.spec for e in EPISODES]
    assert store.missing(specs) == specs
    store.append([EPISODES[1], EPISODES[4]])
    assert store.missing(specs) == [specs[0], *specs[2:4], *specs[5:]]
    assert specs[1] in store and specs[0] not in store


def test_reading_by_phase_and_policy(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path, "p1")
    store.append(EPISODES)
    store.append([dataclasses.replace(EPISODES[0], spec=dataclasses.replace(EPISODES[0].spec, phase=Phase.BOUNDARY))])
    assert len(by_id(store, phase=Phase.BOUNDARY)) == 1
    assert len(by_id(store, phase=Phase.EVALUATION)) == len(EPISODES)
    half = by_id(store, phase=Phase.EVALUATION, policy="random(0.3)")
    assert half == {k: e for k, e in BY_ID.items() if e.spec.policy == "random(0.3)"} and half
    assert by_id(store, policy="none") == {}


@pytest.mark.parametrize("keep", [0, 3, 0.5, -1], ids=["empty", "magic", "half", "one byte short"])
def test_a_truncated_shard_is_set_aside_and_its_episodes_are_missing_again(tmp_path: Path, keep: float) -> None:
    store = EpisodeStore(tmp_path, "p1")
    store.append(EPISODES[:2])
    (first,) = tmp_path.glob("part-*.parquet")
    store.append(EPISODES[2:5])
    (second,) = set(tmp_path.glob("part-*.parquet")) - {first}
    data = second.read_bytes()
    second.write_bytes(data[: int(len(data) * keep) if keep == 0.5 else int(keep)])
    again = EpisodeStore(tmp_path, "p1")
    assert again.missing([e.spec for e in EPISODES[:5]]) == [e.spec for e in EPISODES[2:5]]
    assert set(by_id(again)) == {e.spec.id for e in EPISODES[:2]}
    assert sorted(tmp_path.iterdir()) == sorted([first, second.with_suffix(".corrupt")])
    again.append(EPISODES[2:5])
    assert by_id(EpisodeStore(tmp_path, "p1")) == {e.spec.id: e for e in EPISODES[:5]}


def test_a_flipped_bit_is_never_read_as_another_value(tmp_path: Path) -> None:
    """Wherever it is: the shard is set aside, or named in one line, or the bit meant nothing."""
    EpisodeStore(tmp_path / "sound", "p1").append(EPISODES)
    (shard,) = (tmp_path / "sound").glob("part-*.parquet")
    data, came_to = shard.read_bytes(), Counter[str]()
    for at in range(0, len(data), len(data) // 97):
        folder = tmp_path / str(at)
        folder.mkdir()
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        (folder / shard.name).write_bytes(flipped)
        try:
            store = EpisodeStore(folder, "p1")
            found = by_id(store)
        except StoreError as error:
            came_to["named" if str(folder / shard.name) in str(error) else "unnamed"] += 1
        else:
            assert found in ({}, BY_ID), f"byte {at}"
            assert len(store) == len(found)
            came_to["set aside" if not found else "harmless"] += 1
    assert came_to["named"] > 40 and came_to["set aside"] > 10 and not came_to["unnamed"], came_to


@pytest.mark.parametrize("wrong", [UnicodeDecodeError, pa.ArrowNotImplementedError])
def test_a_footer_with_a_name_or_a_type_that_there_cannot_be_is_damaged(tmp_path: Path, wrong: type[Exception]) -> None:
    EpisodeStore(tmp_path, "p1").append(EPISODES[:2])
    (shard,) = tmp_path.glob("part-*.parquet")
    data, types = shard.read_bytes(), shard.read_bytes().index(b"ARROW:schema")
    flipped = (data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] for at in range(types, len(data)))
    for damaged in [data.replace(b"env_id", b"\xffnv_id")] if wrong is UnicodeDecodeError else flipped:
        shard.write_bytes(damaged)
        try:
            pq.read_schema(shard)
        except wrong:
            break
        except Exception:  # damaged in another way
            continue
    else:
        pytest.fail("no such damage")
    with pytest.raises(StoreError, match=rf"{shard.name} is damaged"):
        read_shard(shard)
    assert len(EpisodeStore(tmp_path, "p1")) == 0
    assert [p.suffix for p in tmp_path.iterdir()] == [".corrupt"]


@pytest.mark.parametrize(
    "error",
    [pa.ArrowMemoryError("malloc of size 1048576 failed"), MemoryError(), pa.ArrowCancelled("cancelled"),
     pa.ArrowNotImplementedError("Support for codec 'zstd' not built"), OSError(errno.EIO, "Input/output error"),
     PermissionError(errno.EACCES, "Permission denied")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_shard_that_this_machine_fails_to_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    EpisodeStore(tmp_path, "p1").append(EPISODES[:2])
    (shard,) = tmp_path.iterdir()

    def fails(*_: object, **__: object) -> pa.Table:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(store_module.pq, "read_table", fails)
        for read in (lambda: EpisodeStore(tmp_path, "p1"), lambda: read_shard(shard)):
            with pytest.raises(type(error)):
                read()
    assert list(tmp_path.iterdir()) == [shard] and len(EpisodeStore(tmp_path, "p1")) == 2


def test_a_damaged_shard_is_named_when_it_is_read(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path, "p1")
    store.append(EPISODES)
    (shard,) = tmp_path.glob("part-*.parquet")
    column = pq.ParquetFile(shard).metadata.row_group(0).column(SCHEMA.get_field_index("outcome"))
    damaged = bytearray(shard.read_bytes())
    damaged[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(
        StoreError, match=rf"{shard.name} is damaged .*move it away and run the same command with --res"
    ):
        by_id(store)
    shard.unlink()
    assert EpisodeStore(tmp_path, "p1").missing([e.spec for e in EPISODES]) == [e.spec for e in EPISODES]


def test_a_file_that_was_being_written_is_not_read_and_goes_with_the_next_write(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path, "p1")
    store.append(EPISODES[:2])
    (shard,) = tmp_path.glob("*.parquet")
    left_over = tmp_path / "part-0123456789ab.12345678.tmp"
    left_over.write_bytes(shard.read_bytes()[:100])
    reader = EpisodeStore(tmp_path, "p1")
    assert len(reader) == len(by_id(reader)) == 2
    assert left_over.exists()  # a reader must not take it from a writer that is alive
    reader.append(EPISODES[2:3])
    assert not left_over.exists() and len(by_id(reader)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [("prices", r"has price table p1, this run has p2; restore the prices"),
     ("schema", r"has schema version 3, this run has 4; read it with the version of bopo_ray that wrote it"),
     ("foreign", r"has schema version none, this run has 3")],
)  # fmt: skip
def test_shards_of_another_version_or_price_table_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, message: str
) -> None:
    EpisodeStore(tmp_path, "p1").append(EPISODES[:1])
    if change == "schema":
        monkeypatch.setattr(store_module, "SCHEMA_VERSION", "4")
        monkeypatch.setattr(store_module, "READABLE", ("4",))
    if change == "foreign":
        pq.write_table(pa.table({"id": ["x"]}), tmp_path / "part-foreign.parquet")
    with pytest.raises(StoreError, match=message) as error:
        EpisodeStore(tmp_path, "p2" if change == "prices" else "p1")
    assert str(tmp_path) in str(error.value) and "--out" in str(error.value) and "\n" not in str(error.value)


def test_compaction_keeps_the_set(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path, "p1")
    store.compact()  # nothing to do
    for episode in EPISODES:
        store.append([episode])
    EpisodeStore(tmp_path / "other", "p1").append(EPISODES[:2])
    (shard,) = (tmp_path / "other").iterdir()
    shard.rename(tmp_path / "part-again.parquet")  # a shard that repeats two of them
    (tmp_path / "other").rmdir()
    store.compact()
    assert len(list(tmp_path.iterdir())) == 1
    assert by_id(store) == by_id(EpisodeStore(tmp_path, "p1")) == BY_ID
    store.append(EPISODES)
    assert len(list(tmp_path.iterdir())) == 1


def _noise(i: int) -> Episode:
    step = dataclasses.replace(EPISODES[0].steps[0], reply=os.urandom(50_000).hex())  # 50 kB that don't compress
    return dataclasses.replace(EPISODES[0], spec=toy_spec(member=100 + i), steps=(step,))


def test_a_full_disk_leaves_what_was_there(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(64)
    store = EpisodeStore(disk, "p1")
    store.append(EPISODES[:2])
    before = sorted(disk.iterdir())
    for _ in range(2):  # the first failure takes no space from the second
        with pytest.raises(StoreError, match=r"can't be written \(No space left on device\); free some space") as error:
            store.append([_noise(0)])
        assert "--resume" in str(error.value) and "\n" not in str(error.value)
        assert sorted(disk.iterdir()) == before
    assert len(store) == 2 and store.missing([_noise(0).spec])
    assert by_id(EpisodeStore(disk, "p1")) == {e.spec.id: e for e in EPISODES[:2]}
    store.append(EPISODES[2:3])  # and a small one still goes in
    assert len(by_id(EpisodeStore(disk, "p1"))) == 3


def test_a_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no small disk can be mounted: the flush to the disk fails."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    store = EpisodeStore(tmp_path, "p1")
    store.append(EPISODES[:1])
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left on device"):
            store.append(EPISODES[1:2])
    assert sorted(tmp_path.iterdir()) == before and EPISODES[1].spec not in store


def test_a_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file or directory"):
        write_table(pa.table({"a": [1]}), tmp_path / "gone" / "part-1.parquet")
