"""Demonstrations: expert episodes that reached success within the step limit, as a model reads them.

Always true here: every demonstration was played on the real engine and succeeded; a demonstration with noise says which
of its actions are the expert's (only those are taught); a task of the router's lists is never among them; a file is
written whole or not at all, and an interrupted collection goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bopo_ray.agent import Turn, chat_messages
from bopo_ray.models.protocol import Message
from bopo_ray.store import write_table
from envs.workers import process_pool

__all__ = ["EXPERTS", "Demo", "collect", "demo_messages", "read_demos"]

EXPERTS = {"ScienceWorld-v0": "bopo_ray.executors.scienceworld", "ALFWorld-v0": "bopo_ray.executors.alfworld"}
"""Environment -> module with `jobs(limit)`, names of what is demonstrated, `demonstrate(names)`, which plays some, and
`shown(name)`, whether a listed task may be among them."""
SHARD = 24
"""Jobs per file: what a crash can cost."""


@dataclass(frozen=True, slots=True)
class Demo:
    """One expert episode of n actions."""

    task: str
    """Name; its kind stands before the last slash."""
    noisy: bool
    """Whether harmless actions that are not the expert's were mixed in."""
    task_text: str
    first_observation: str
    actions: tuple[str, ...]
    """n actions."""
    observations: tuple[str, ...]
    """n observations, each after its action."""
    taught: tuple[bool, ...]
    """n flags: which actions are the expert's."""

    @property
    def kind(self) -> str:
        """The task type."""
        return self.task.rpartition("/")[0]


_SCHEMA = pa.schema(
    [("task", pa.string()), ("noisy", pa.bool_()), ("task_text", pa.string()), ("first_observation", pa.string()),
     ("actions", pa.list_(pa.string())), ("observations", pa.list_(pa.string())), ("taught", pa.list_(pa.bool_()))]
)  # fmt: skip


def collect(env_id: str, folder: Path, processes: int, limit: int, report: Callable[[str], None]) -> list[Demo]:
    """All demonstrations of an environment's expert, from `folder` or played now.

    Args:
        env_id: one of `EXPERTS`.
        folder: of the Parquet files; jobs that have theirs are not played again.
        processes: that play at once.
        limit: jobs at most, evenly over the kinds; 0 for all.
        report: takes a line of progress.
    """
    jobs: Sequence[str] = import_module(EXPERTS[env_id]).jobs(limit)
    folder.mkdir(parents=True, exist_ok=True)
    shards = {f"part-{at // SHARD:05d}-{len(jobs)}.parquet": jobs[at : at + SHARD] for at in range(0, len(jobs), SHARD)}
    missing = {name: part for name, part in shards.items() if not (folder / name).exists()}
    started, done = time.monotonic(), 0
    with process_pool(processes) as pool:
        waiting = {pool.submit(_play, env_id, list(part), folder / name): part for name, part in missing.items()}
        for future in as_completed(waiting):
            future.result()
            done += len(waiting[future])
            spent = time.monotonic() - started
            total = sum(map(len, missing.values()))
            report(f"{env_id}: {done}/{total} tasks shown, {spent:.0f} s, {spent / done * (total - done):.0f} s left")
    return [demo for name in shards for demo in read_demos(folder / name)]


def read_demos(path: Path) -> list[Demo]:
    """The demonstrations of a file."""
    rows = pq.read_table(path).to_pylist()
    return [Demo(**row | {k: tuple(row[k]) for k in ("actions", "observations", "taught")}) for row in rows]


def _play(env_id: str, names: list[str], path: Path) -> None:
    demos: Iterable[Demo] = import_module(EXPERTS[env_id]).demonstrate(names)
    write_table(pa.Table.from_pylist([asdict(d) for d in demos], _SCHEMA), path)


def demo_messages(demo: Demo) -> tuple[Message, ...]:
    """The chat of a whole demonstration, as the harness would have sent it before one more action."""
    turns = [Turn(a, a, o) for a, o in zip(demo.actions, demo.observations, strict=True)]
    return chat_messages(demo.task_text, demo.first_observation, turns, "", 1 << 30, lambda messages: 0)
