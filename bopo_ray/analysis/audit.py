"""The audit: every dollar of a results folder worked out again from the raw usage, and compared with what is stored.

Always true here: nothing is taken from a stored cost; the prices are those in the folder's pool.yaml, whose hash must
be the one in every episode file. What the store saved and what was lost leave no usage behind: of these the report's
sums must be the ledger's, and the ledger's must cover every answer and every loss in the episodes. They may be more,
since an episode that was dropped or begun anew has spent, too.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from bopo_ray.errors import StoreError
from bopo_ray.models.pool import PoolSpec, read_pool
from bopo_ray.models.pricing import PriceTable, Usage
from bopo_ray.models.spend import ModelTotals, SpendLedger
from bopo_ray.routers import LEARNED
from bopo_ray.store import EpisodeStore, read_shard

__all__ = ["Audit", "Difference", "audit"]

OFFSET = "_offset"
"""In a calibrated policy's name, before what was chosen on dev tasks."""
TOLERANCE_USD = 1e-9
"""Of means that were computed in floating point."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One stored figure that is not what the raw usage says."""

    where: str
    what: str
    stored: float
    recomputed: float


@dataclass(frozen=True, slots=True)
class Audit:
    """What was looked at, and what was found."""

    episodes: int
    calls: int
    cost_microusd: int
    """Of all episodes, recomputed."""
    paid_calls: int
    paid_microusd: int
    """Of the ledger's rows, recomputed."""
    figures: int
    """Figures of the report that were compared."""
    differences: tuple[Difference, ...]


class _Auditor:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "pool.yaml").is_file():
            raise StoreError(f"{folder} holds no run (no pool.yaml); give the folder of a run, e.g. results/<run>")
        self.pool: PoolSpec = read_pool(folder / "pool.yaml", PriceTable("", (), ()))
        self.found: list[Difference] = []
        self.costs: dict[str, list[int]] = defaultdict(list)
        """Evaluation episodes' costs, by policy."""
        self.routers: dict[str, str] = {}
        """Who decides in them, by policy."""
        self.large: dict[str, list[int]] = defaultdict(list)
        self.boundary: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.answers, self.worth, self.lost = Counter[str](), Counter[str](), Counter[str]()
        """In all episodes, by model: calls that were answered, their cost, and what was lost."""
        self.ledger = ModelTotals("all")
        self.episodes = self.calls = self.total = self.figures = self.paid_calls = self.paid = 0

    def compare(self, where: str, what: str, stored: float, recomputed: float, tolerance: float = 0.0) -> None:
        self.figures += 1
        if not abs(stored - recomputed) <= tolerance:
            self.found.append(Difference(where, what, stored, recomputed))

    def audit_episodes(self) -> None:
        seen: set[str] = set()
        shards = sorted((self.folder / "episodes").rglob("part-*.parquet"))
        for shard in shards:
            read_shard(shard, columns=["id"])  # raises when it is damaged; `EpisodeStore` would set it aside
        for folder in sorted({shard.parent for shard in shards}):
            EpisodeStore(folder, self.pool.price_hash)  # raises when its prices are others
        for shard in shards:
            for row in read_shard(shard).to_pylist():
                if row["id"] not in seen:
                    seen.add(row["id"])
                    self._episode(row, f"{shard.relative_to(self.folder)}: {row['id']}")
        self.episodes = len(seen)

    def _episode(self, row: dict[str, Any], where: str) -> None:
        cost = lost = large = questions = 0
        for t, step in enumerate(row["steps"]):
            usage = Usage(step["prompt_tokens"], step["completion_tokens"], step["cached_tokens"])
            model = self.pool.models[step["model"]]
            own = model.price.cost(usage)
            self.answers[model.label] += bool(step["reply"] or step["observation"])
            self.worth[model.label] += own
            self.lost[model.label] += step["lost_microusd"]
            self.compare(where, f"cost of step {t}, micro-dollars", step["cost_microusd"], own)
            if asked := step.get("question"):
                questions += 1
                own += self._question(asked, f"{where}: question of step {t}")
                lost += asked["lost_microusd"]
            cost, lost, large = cost + own, lost + step["lost_microusd"], large + (step["model"] > 0)
        self.compare(where, "cost, micro-dollars", row["cost_microusd"], cost)
        self.compare(where, "calls", row["calls"], len(row["steps"]) + questions)
        self.compare(where, "large calls", row["large_calls"], large)
        if row["budget_mode"] is not None:
            used = cost + lost if row["budget_mode"] == "usd" else large
            self.compare(where, f"used of the cap {row['budget_cap']}, at most", min(used, row["budget_cap"]), used)
        self.calls += len(row["steps"]) + questions
        self.total += cost
        if row["phase"] == "evaluation":
            self.costs[row["policy"]].append(cost)
            self.large[row["policy"]].append(large)
            self.routers[row["policy"]] = row["router"]
        if row["phase"] == "boundary":
            self.boundary[row["task"], row["policy"]].append(cost)

    def _question(self, asked: dict[str, Any], where: str) -> int:
        """Micro-dollars of a router's question to the smallest model."""
        model = self.pool.models[0]
        usage = Usage(asked["prompt_tokens"], asked["completion_tokens"], asked["cached_tokens"])
        own = model.price.cost(usage)
        self.answers[model.label] += bool(asked["reply"])
        self.worth[model.label] += own
        self.lost[model.label] += asked["lost_microusd"]
        self.compare(where, "cost, micro-dollars", asked["cost_microusd"], own)
        return own

    def _left_out(self, policy: str, rows: Iterable[str]) -> bool:
        """Whether a later command of the run may have left an evaluated policy out of the report's rows.

        The store keeps the episodes of all: of a router with the offset that it had before others were chosen, of
        random(p) at a share that is nobody's by now, and of a baseline that was not played whole.
        """
        if self.routers[policy] == LEARNED:
            router = policy.rpartition(OFFSET)[0]
            return bool(router) and any(row.rpartition(OFFSET)[0] == router for row in rows)
        return policy.startswith("random(") or len(self.costs[policy]) < max(map(len, self.costs.values()))

    def audit_report(self) -> None:
        path, summary = self.folder / "frontier.csv", self.folder / "summary.json"
        report = json.loads(summary.read_text()) if summary.exists() else {}
        if path.exists():
            table = pd.read_csv(path)
            rows, named = Counter(table["policy"]), {point["policy"] for point in report.get("points", ())}
            for policy in self.costs:
                if policy in rows or policy in named or not self._left_out(policy, rows):
                    self.compare(f"frontier.csv: {policy}", "rows", rows[policy], 1)
            for row in table.to_dict("records"):
                costs, large = self.costs.get(row["policy"]), self.large[row["policy"]]
                if costs:
                    where = f"frontier.csv: {row['policy']}"
                    self.compare(where, "dollars per task", row["cost_usd"], _mean(costs) / 1e6, TOLERANCE_USD)
                    self.compare(where, "large calls per task", row["large_calls"], _mean(large), TOLERANCE_USD)
                else:
                    self.compare(f"frontier.csv: {row['policy']}", "episodes", math.nan, 0)
        path = self.folder / "boundaries.parquet"
        if path.exists():
            for row in pq.read_table(path).to_pylist():
                for size in ("small", "large"):
                    own = _mean(self.boundary[row["task"], f"always-{size}"] or [0]) / 1e6
                    what = f"dollars of always-{size}"
                    self.compare(f"{path.name}: {row['task']}", what, row[f"cost_{size}_usd"], own, TOLERANCE_USD)
        path = summary
        if path.exists():
            spend = report["spend"]
            self.compare(path.name, "episodes", spend["episodes"], self.episodes)
            self.compare(path.name, "calls", spend["calls"], self.calls)
            self.compare(path.name, "dollars of all episodes", spend["cost_usd"], self.total / 1e6, TOLERANCE_USD)
            self.compare(path.name, "paid calls", spend["paid_calls"], self.paid_calls)
            self.compare(path.name, "paid dollars", spend["paid_usd"], self.paid / 1e6, TOLERANCE_USD)
            saved, lost = self.ledger.saved_microusd / 1e6, self.ledger.lost_microusd / 1e6
            self.compare(path.name, "saved calls", spend["saved_calls"], self.ledger.saved_calls)
            self.compare(path.name, "saved dollars", spend["saved_usd"], saved, TOLERANCE_USD)
            self.compare(path.name, "lost calls", spend["lost_calls"], self.ledger.lost_calls)
            self.compare(path.name, "lost dollars", spend["lost_usd"], lost, TOLERANCE_USD)

    def audit_ledger(self) -> None:
        path = self.folder / "spend.db"
        if not path.exists():
            return
        ledger = SpendLedger(path, None)
        prices = {m.label: m.price for m in self.pool.models}
        for i, (model, usage, cost) in enumerate(ledger.paid_rows()):
            own = prices[model].cost(usage) if model in prices else -1
            self.compare(f"{path.name}: paid call {i} of {model}", "cost, micro-dollars", cost, own)
            self.paid_calls, self.paid = self.paid_calls + 1, self.paid + own
        totals = ledger.totals()
        self.ledger = totals.overall
        self.compare(path.name, "paid calls", self.ledger.paid_calls, self.paid_calls)
        self.compare(path.name, "paid micro-dollars", self.ledger.paid_microusd, self.paid)
        by_model = {m.model: m for m in totals.models}
        for name in prices:
            m = by_model.get(name, ModelTotals(name))
            for what, counted, found in (
                ("paid or saved calls", m.paid_calls + m.saved_calls, self.answers[name]),
                ("paid or saved micro-dollars", m.paid_microusd + m.saved_microusd, self.worth[name]),
                ("lost micro-dollars", m.lost_microusd, self.lost[name]),
            ):
                self.compare(f"{path.name}: {name}", f"{what}, at least", counted, max(counted, found))


def audit(folder: Path) -> Audit:
    """Recomputes a finished or unfinished run; raises StoreError when the folder holds none, or a damaged one."""
    a = _Auditor(folder)
    for part, work in (
        ("episodes/", a.audit_episodes),
        ("spend.db", a.audit_ledger),
        ("frontier.csv, boundaries.parquet or summary.json", a.audit_report),
    ):
        try:
            work()
        except (pa.ArrowException, OSError, LookupError, AttributeError, TypeError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(
                f"{folder}: {part} can't be read ({type(error).__name__}: {error}); "
                "restore it from a copy, or make it again with --resume"
            ) from error
    return Audit(a.episodes, a.calls, a.total, a.paid_calls, a.paid, a.figures, tuple(a.found))


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)
