"""Episodes on disk: Parquet shards with one schema, written whole or not at all.

Always true here: a shard that has its final name is complete (temporary sibling, fsync, row count checked, rename), and
what was damaged afterwards is never read as something else (page checksums);
every shard names the schema version and the hash of the prices it was billed at, and a folder never mixes two;
an episode counts once, whatever the number of shards that hold it.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bopo_ray.errors import StoreError
from bopo_ray.records import Budget, CostMode, Episode, EpisodeSpec, Phase, Question, Step, StopReason
from envs.base import Split, Task

__all__ = ["SCHEMA", "SCHEMA_VERSION", "EpisodeStore", "episode_row", "read_shard", "row_episode", "write_table"]

SCHEMA_VERSION, READABLE = "3", ("2", "3")
"""Version 2 knew no routers that ask questions."""
_VERSION_KEY, _PRICE_KEY = b"bopo_ray.schema", b"bopo_ray.prices"

_QUESTION = pa.struct(
    [
        ("reply", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("cached_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("cost_microusd", pa.int64()),
        ("lost_microusd", pa.int64()),
        ("latency_s", pa.float64()),
    ]
)
_STEP = pa.struct(
    [
        ("model", pa.int8()),
        ("probabilities", pa.list_(pa.float64())),
        ("mask", pa.list_(pa.bool_())),
        ("reply", pa.string()),
        ("action", pa.string()),
        ("observation", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("cached_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("cost_microusd", pa.int64()),
        ("lost_microusd", pa.int64()),
        ("latency_s", pa.float64()),
        ("router_s", pa.float64()),
        ("question", _QUESTION),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("env_id", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("phase", pa.string()),
        ("policy", pa.string()),
        ("router", pa.string()),
        ("group", pa.int32()),
        ("member", pa.int32()),
        ("seed", pa.int64()),
        ("greedy", pa.bool_()),
        ("sample", pa.int64()),
        ("budget_mode", pa.string()),
        ("budget_cap", pa.int64()),
        ("task_text", pa.string()),
        ("first_observation", pa.string()),
        ("max_steps", pa.int32()),
        ("outcome", pa.float64()),
        ("success", pa.bool_()),
        ("score", pa.float64()),
        ("stop", pa.string()),
        ("cost_microusd", pa.int64()),
        ("calls", pa.int32()),
        ("large_calls", pa.int32()),
        ("steps", pa.list_(_STEP)),
    ]
)


class EpisodeStore:
    """A folder of episode shards. One writer at a time; any number of readers."""

    def __init__(self, folder: Path, price_hash: str) -> None:
        """Opens or creates the folder; raises StoreError for shards of another schema or price table."""
        self.folder = folder
        self._metadata = {_VERSION_KEY: SCHEMA_VERSION.encode(), _PRICE_KEY: price_hash.encode()}
        folder.mkdir(parents=True, exist_ok=True)
        self._writes = False
        self._ids: set[str] = set()
        for shard in self._shards():
            self._ids.update(self._checked(shard).column("id").to_pylist())

    def __contains__(self, spec: EpisodeSpec) -> bool:
        return spec.id in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def append(self, episodes: Sequence[Episode]) -> None:
        """Adds those episodes that are not there yet, durably."""
        new = {e.spec.id: e for e in episodes if e.spec.id not in self._ids}
        if not new:
            return
        self._write(list(new.values()))
        self._ids.update(new)

    def missing(self, specs: Iterable[EpisodeSpec]) -> list[EpisodeSpec]:
        """The specs that have no episode yet, in order."""
        return [s for s in specs if s.id not in self._ids]

    def read(self, phase: Phase | None = None, policy: str | None = None) -> Iterator[Episode]:
        """All episodes, each once, in an order that does not depend on how they were written.

        Raises StoreError for a damaged shard: what were made of the others alone would be wrong.
        """
        rows: dict[str, dict[str, object]] = {}
        filters = [(k, "=", str(v)) for k, v in (("phase", phase), ("policy", policy)) if v is not None]
        for shard in self._shards():
            for row in read_shard(shard, filters=filters or None).to_pylist():
                rows.setdefault(row["id"], row)
        for key in sorted(rows):
            yield row_episode(rows[key])

    def compact(self) -> None:
        """Merges all shards into one."""
        shards = self._shards()
        if len(shards) < 2:
            return
        self._write(list(self.read()))
        for shard in shards:
            shard.unlink()

    def _write(self, episodes: Sequence[Episode]) -> None:
        if not self._writes:  # once, since listing a folder of many shards takes long
            for left_over in self.folder.glob("*.tmp"):  # of a writer that died: there is no other one now
                left_over.unlink(missing_ok=True)
            self._writes = True
        table = pa.Table.from_pylist([episode_row(e) for e in episodes], SCHEMA).replace_schema_metadata(self._metadata)
        write_table(table, self.folder / f"part-{uuid.uuid4().hex[:12]}.parquet")

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def _checked(self, shard: Path) -> pa.Table:
        """The ids of a shard; a damaged one is set aside so that its episodes are made again."""
        try:
            schema = _schema(shard)
            metadata = schema.metadata or {}
            if metadata.get(_VERSION_KEY) == self._metadata[_VERSION_KEY] and not schema.equals(SCHEMA):
                raise pa.ArrowInvalid("its columns are not those of its version")  # the footer has no checksum
            ids = pq.read_table(shard, columns=["id"], page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            if not _is_damage(error):
                raise
            shard.rename(shard.with_suffix(".corrupt"))
            return pa.table({"id": pa.array([], pa.string())})
        for key, what, mend in (
            (_VERSION_KEY, "schema version", "read it with the version of bopo_ray that wrote it"),
            (_PRICE_KEY, "price table", "restore the prices it was made with"),
        ):
            found, wanted = metadata.get(key, b"none").decode(), self._metadata[key].decode()
            if found != wanted and not (key == _VERSION_KEY and found in READABLE):
                raise StoreError(f"{shard} has {what} {found}, this run has {wanted}; {mend}, or choose another --out")
        return ids


def read_shard(path: Path, **options: Any) -> pa.Table:
    """A Parquet file of a run, by `pyarrow.parquet.read_table`; raises StoreError when it is damaged."""
    try:
        _schema(path)
        return pq.read_table(path, page_checksum_verification=True, **options)
    except (pa.ArrowException, OSError) as error:
        if not _is_damage(error):
            raise
        raise StoreError(
            f"{path} is damaged ({' '.join(str(error).split())[:120]}); move it away and run the same command with "
            "--resume: what it held is made again, from stored calls where there are any"
        ) from error


def _schema(path: Path) -> pa.Schema:
    """A file's; a name or a type that there can't be is a flipped bit's: the footer has no checksum."""
    try:
        return pq.read_schema(path)
    except (UnicodeDecodeError, pa.ArrowNotImplementedError) as error:
        raise pa.ArrowInvalid(str(error)) from error


def _is_damage(error: Exception) -> bool:
    """Whether the file is at fault, not the disk, the user's rights, or what this machine and its pyarrow can do."""
    if isinstance(error, MemoryError | NotImplementedError | pa.ArrowCancelled):
        return False
    return getattr(error, "errno", None) in (None, errno.EINVAL)


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a Parquet file whole or not at all; raises StoreError when the disk is full."""
    temporary = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            # Without page checksums a flipped bit is read as another value, unseen; nothing guards statistics, by which
            # rows are left out.
            pq.write_table(table, file, compression="zstd", write_page_checksum=True, write_statistics=False)
            file.flush()
            os.fsync(file.fileno())
        if pq.read_metadata(temporary).num_rows != table.num_rows:
            raise OSError(errno.EIO, "row count differs after writing")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(
            f"{path} can't be written ({error.strerror or error}); free some space or choose another --out, then run "
            "the same command with --resume: what was finished before is kept"
        ) from error


def episode_row(episode: Episode) -> dict[str, object]:
    """An episode as a row of `SCHEMA`."""
    spec = episode.spec
    return {
        "id": spec.id,
        "env_id": spec.task.env_id,
        "task": spec.task.name,
        "split": str(spec.task.split),
        "phase": str(spec.phase),
        "policy": spec.policy,
        "router": spec.router,
        "group": spec.group,
        "member": spec.member,
        "seed": spec.seed,
        "greedy": spec.greedy,
        "sample": spec.sample,
        "budget_mode": str(spec.budget.mode) if spec.budget else None,
        "budget_cap": spec.budget.cap if spec.budget else None,
        "task_text": episode.task_text,
        "first_observation": episode.first_observation,
        "max_steps": episode.max_steps,
        "outcome": episode.outcome,
        "success": episode.success,
        "score": episode.score,
        "stop": str(episode.stop),
        "cost_microusd": episode.cost_microusd,
        "calls": episode.calls,
        "large_calls": episode.large_calls,
        "steps": [
            {f: getattr(s, f) for f in Step.__dataclass_fields__} | {"question": s.question and asdict(s.question)}
            for s in episode.steps
        ],
    }


def row_episode(row: dict) -> Episode:  # type: ignore[type-arg]
    """What `episode_row` made."""
    budget = Budget(CostMode(row["budget_mode"]), row["budget_cap"]) if row["budget_mode"] else None
    spec = EpisodeSpec(
        Task(row["env_id"], row["task"], Split(row["split"])), Phase(row["phase"]), row["policy"], row["group"],
        row["member"], row["seed"], row["greedy"], budget, row["router"],
        row["sample"],
    )  # fmt: skip
    steps = tuple(
        Step(**{**s, "probabilities": tuple(s["probabilities"]), "mask": tuple(s["mask"]),
                "question": Question(**q) if (q := s.get("question")) else None})
        for s in row["steps"]
    )  # fmt: skip
    return Episode(
        spec, row["task_text"], row["first_observation"], row["max_steps"], steps, row["outcome"], row["success"],
        row["score"], StopReason(row["stop"]),
    )  # fmt: skip
