"""Experts on disk: BoSFT learns from them part by part, whatever their number.

Always true here: a file that has its name is whole; no more of it is in memory than a part and a row group.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bopo_ray.files import put
from bopo_ray.method.synthesis import Expert
from bopo_ray.records import Difficulty
from bopo_ray.store import SCHEMA, episode_row, row_episode

__all__ = ["ExpertFile"]

GROUP_STEPS = 2048
"""Steps of a row group, or one episode."""
_COUNTS = b"bopo_ray.steps"
_SCHEMA = pa.schema([*SCHEMA, ("labels", pa.list_(pa.int8())), ("difficulty", pa.string())])


class ExpertFile:
    """Experts in a Parquet file."""

    def __init__(self, path: Path) -> None:
        """Opens a file that `write` made."""
        self.path = path
        with pq.ParquetFile(path) as file:
            counts = json.loads(file.metadata.metadata[_COUNTS])
            self._groups = file.num_row_groups
            self.trajectories = file.metadata.num_rows
            """How many experts."""
        self.steps = {Difficulty(k): int(n) for k, n in counts.items()}
        """Steps of each class."""

    @classmethod
    def write(cls, path: Path, experts: Iterable[Expert]) -> ExpertFile:
        """Writes experts as they come, whole or not at all."""
        temporary, counts = path.with_suffix(".tmp"), Counter[str]()
        with pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer:
            for rows in _grouped(experts, counts):
                writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
            writer.add_key_value_metadata({_COUNTS: json.dumps(counts)})
        put(temporary, path)
        return cls(path)

    def parts(self, steps: int, rng: np.random.Generator | None = None) -> Iterator[list[Expert]]:
        """All experts, in parts of about so many steps; with `rng` the row groups in a drawn order."""
        order = np.arange(self._groups) if rng is None else rng.permutation(self._groups)
        part, size = list[Expert](), 0
        with pq.ParquetFile(self.path) as file:
            for group in order:
                for row in file.read_row_group(int(group)).to_pylist():
                    part.append(Expert(row_episode(row), tuple(row["labels"]), Difficulty(row["difficulty"])))
                    size += len(row["labels"])
                    if size >= steps:
                        yield part
                        part, size = [], 0
        if part:
            yield part


def _grouped(experts: Iterable[Expert], counts: Counter[str]) -> Iterator[list[dict[str, object]]]:
    rows, size = list[dict[str, object]](), 0
    for e in experts:
        counts[str(e.difficulty)] += len(e.labels)
        rows.append({**episode_row(e.episode), "labels": e.labels, "difficulty": str(e.difficulty)})
        size += len(e.labels)
        if size >= GROUP_STEPS:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows
