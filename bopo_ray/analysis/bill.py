"""The bill of a run: what its episodes are worth at list prices, what was paid for them, and what the store saved.

Always true here: an episode costs what its calls cost whoever makes them; what was paid is the ledger's, which counts
each call once, however many episodes used it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from bopo_ray.models.spend import Totals
from bopo_ray.records import spawn_seed
from bopo_ray.store import read_shard

__all__ = ["Bill", "Sharing", "bill", "sharing"]

_LAMBDA = re.compile(r"[(_]lam=?([0-9.e-]+)")
_SUITED = re.compile(r"_for([0-9.e-]+)")
"""The lambda that a router suits, where it was trained at another."""


@dataclass(frozen=True, slots=True)
class Bill:
    """Micro-dollars and calls; see the module's docstring."""

    episodes: int
    """Distinct episodes."""
    calls: int
    """Model calls in them."""
    cost_microusd: int
    """What those calls cost, whether paid or saved."""
    paid_calls: int
    """Calls that were made."""
    paid_microusd: int
    saved_calls: int
    """Calls that were answered from the store."""
    saved_microusd: int
    lost_calls: int
    """Attempts whose reply never came and which may have been charged."""
    lost_microusd: int
    """Their worst case; it counts against the limit."""
    decisions: int
    """Of learned routers."""
    router_s: float
    """Seconds of CPU that those took."""
    router_microusd: float
    """The same at the nominal price of a CPU."""

    @property
    def router_ms(self) -> float:
        """Mean milliseconds per decision of a learned router."""
        return 1000 * self.router_s / self.decisions if self.decisions else 0.0

    @property
    def router_share(self) -> float:
        """The router's compute as a share of the bill of the episodes that it routed and of itself."""
        whole = self.routed_microusd + self.router_microusd
        return self.router_microusd / whole if whole else 0.0

    routed_microusd: int = 0
    """Cost of the calls in learned routers' episodes."""

    def to_dict(self) -> dict[str, Any]:
        """For summary.json, dollars for people beside the counts."""
        fields = asdict(self)
        money = {k.replace("_microusd", "_usd"): v / 1e6 for k, v in fields.items() if k.endswith("_microusd")}
        counts = {k: v for k, v in fields.items() if not k.endswith("_microusd")}
        return counts | money | {"router_ms": self.router_ms, "router_share": self.router_share}


def bill(shards: Iterable[Path], totals: Totals, cpu_hour_microusd: int) -> Bill:
    """Adds up the episodes of `shards`, each once, and the ledger's `totals`."""
    rows: dict[str, tuple[int, int, float, bool]] = {}
    for shard in shards:
        table = read_shard(shard, columns=["id", "router", "calls", "cost_microusd", "steps"])
        for batch in table.to_batches():
            steps = batch.column("steps")
            seconds = dict.fromkeys(range(len(batch)), 0.0)
            flat = pc.struct_field(pc.list_flatten(steps), "router_s").to_pylist()
            for i, s in zip(pc.list_parent_indices(steps).to_pylist(), flat, strict=True):
                seconds[i] += s
            names = ("id", "router", "calls", "cost_microusd")
            for i, row in enumerate(batch.select(names).to_pylist()):
                rows[row["id"]] = row["calls"], row["cost_microusd"], seconds[i], row["router"] == "learned"
    ledger = totals.overall
    router_s = math.fsum(s for _, _, s, _ in rows.values())
    return Bill(
        episodes=len(rows),
        calls=sum(c for c, _, _, _ in rows.values()),
        cost_microusd=sum(c for _, c, _, _ in rows.values()),
        paid_calls=ledger.paid_calls,
        paid_microusd=ledger.paid_microusd,
        saved_calls=ledger.saved_calls,
        saved_microusd=ledger.saved_microusd,
        lost_calls=ledger.lost_calls,
        lost_microusd=ledger.lost_microusd,
        decisions=sum(c for c, _, _, learned in rows.values() if learned),
        router_s=router_s,
        router_microusd=router_s / 3600 * cpu_hour_microusd,
        routed_microusd=sum(c for _, c, _, learned in rows.values() if learned),
    )


@dataclass(frozen=True, slots=True)
class Sharing:
    """How many different calls a sweep needs, beside one of its lambdas alone."""

    calls: int
    """Different calls of all episodes: what a run pays that nothing interrupts."""
    one_lambda: dict[str, int]
    """By lambda: different calls of boundary and stratified rollouts, fixed baselines, and this lambda's trials and
    evaluation. Without random baselines, whose shares depend on the sweep: so the ratio errs on the high side."""

    @property
    def ratio(self) -> float:
        """`calls` over the mean of `one_lambda`; 1 means that further lambdas cost nothing."""
        return self.calls * len(self.one_lambda) / max(1, sum(self.one_lambda.values()))


def sharing(shards: Iterable[Path], deterministic: bool, trained_for_all: bool = False) -> Sharing:
    """Counts the different calls of the episodes in `shards`.

    A call is told by its model, the episode's history so far and, unless the models are `deterministic` (temperature
    0), its sample index. Where routers are `trained_for_all` lambdas (`Settings.train_lambdas`), each needs their
    trials.
    """
    shared: set[int] = set()
    random: set[int] = set()
    own: dict[str, set[int]] = defaultdict(set)
    for shard in shards:
        table = read_shard(shard, columns=["task", "policy", "member", "sample", "first_observation", "steps"])
        for row in table.to_pylist():
            if row["policy"] == "oracle":  # which repeats others' calls
                continue
            suited = _SUITED.search(row["policy"])
            found = suited or _LAMBDA.search(row["policy"])
            if trained_for_all and not suited and not row["policy"].startswith("bosft"):
                found = None
            evaluated = row["policy"].startswith("random") and "evaluation" in shard.parts
            calls = own[found.group(1)] if found else random if evaluated else shared
            sample = row["member"] if row["sample"] is None else row["sample"]
            history = spawn_seed(row["task"], row["first_observation"], 0 if deterministic else sample)
            for step in row["steps"]:
                if step.get("question"):
                    calls.add(spawn_seed(history, "question"))
                calls.add(spawn_seed(history, step["model"]))
                history = spawn_seed(history, step["reply"], step["observation"])
    everything = shared.union(random, *own.values())
    return Sharing(len(everything), {lam: len(shared | calls) for lam, calls in sorted(own.items())})
