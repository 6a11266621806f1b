"""What a finished run left in its folder, as tables; nothing is written there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bopo_ray.errors import StoreError
from bopo_ray.records import CostMode
from bopo_ray.store import read_shard

__all__ = ["CAPPED", "CHOSEN", "FinishedRun", "open_finished"]

CAPPED = "hard-budget"
"""In a finished run's folder: the run of experiments.hard_budget."""
CHOSEN = "chosen.csv"
"""In that: which policy plays for each method under each cap."""


@dataclass(frozen=True, slots=True, eq=False)
class FinishedRun:
    """A run that has its summary."""

    folder: Path
    summary: dict[str, Any]
    """Of summary.json."""
    frontier: pd.DataFrame
    """Of frontier.csv: one row per policy."""
    boundaries: pd.DataFrame
    """Of boundaries.parquet: one row per training task."""

    @property
    def env(self) -> str:
        """The benchmark's id."""
        return str(self.summary["env"])

    @property
    def label(self) -> str:
        """What the models are, e.g. "simulated pair"."""
        return str(self.summary["label"])

    @property
    def figures(self) -> Path:
        """Where scripts put what they make of it."""
        return self.folder / "figures"

    def evaluation(self) -> pd.DataFrame:
        """The evaluation's episodes, a row each, as `bopo_ray.analysis.tables` takes them, with the router's name.

        Those of policies that frontier.csv does not list are left out.
        """
        keys = self.frontier[["policy", "method", "lam", "train_seed"]]
        own = self._read(self.folder / "episodes", ("evaluation", "oracle"))
        return own.merge(keys, on="policy").sort_values("id", ignore_index=True)

    def capped(self) -> pd.DataFrame:
        """The test episodes of experiments.hard_budget under caps in calls, like `evaluation`, and their cap: "cap".

        Of each method and training seed those of the policy that was chosen for it under that cap.
        """
        own = self._read(self.folder / CAPPED / "episodes", ("evaluation",))
        own = own[own["budget_mode"] == str(CostMode.CALLS)].rename(columns={"budget_cap": "cap"})
        chosen = pd.read_csv(self.folder / CAPPED / CHOSEN)
        chosen = chosen[chosen["unit"] == str(CostMode.CALLS)].astype({"cap": int})
        keys = chosen[["policy", "cap", "method", "train_seed"]]
        return own.astype({"cap": int}).merge(keys, on=["policy", "cap"]).sort_values("id", ignore_index=True)

    def _read(self, folder: Path, stores: tuple[str, ...]) -> pd.DataFrame:
        columns = ["id", "policy", "router", "task", "member", "success", "outcome", "score", "cost_microusd",
                   "large_calls", "stop", "budget_mode", "budget_cap"]  # fmt: skip
        tables = []
        for shard in sorted(folder.rglob("part-*.parquet")):
            if shard.parent.name in stores:
                table = read_shard(shard, columns=[*columns, "steps"])
                steps = pc.list_value_length(table.column("steps"))
                tables.append(table.select(columns).append_column("steps", steps))
        if not tables:
            raise StoreError(f"{folder} holds no episodes of {' or '.join(stores)}; run what makes them again")
        frame = pa.concat_tables(tables).to_pandas().drop_duplicates("id")
        frame["cost_usd"] = frame["cost_microusd"] / 1e6
        return frame


def open_finished(folder: Path) -> FinishedRun:
    """Reads the folder of a finished run; raises StoreError in one line when it is none, or damaged."""
    missing = [n for n in ("summary.json", "frontier.csv", "boundaries.parquet") if not (folder / n).is_file()]
    if missing:
        raise StoreError(
            f"{folder} holds no finished run (no {missing[0]}); give the folder of one, or finish it first with "
            "python -m experiments.frontier --out FOLDER --resume"
        )
    try:
        return FinishedRun(
            folder,
            json.loads((folder / "summary.json").read_text(encoding="utf-8")),
            pd.read_csv(folder / "frontier.csv"),
            pq.read_table(folder / "boundaries.parquet").to_pandas(),
        )
    except (ValueError, OSError, pa.ArrowException) as error:
        raise StoreError(
            f"{folder} can't be read ({' '.join(str(error).split())}); make its report again with "
            "python -m experiments.frontier --out FOLDER --resume"
        ) from error
