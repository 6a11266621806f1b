"""Runs as processes of their own, one after the other, under one limit on the dollars of all together."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bopo_ray.models.spend import SpendLedger

__all__ = ["Job", "run_jobs", "spent_usd"]


@dataclass(frozen=True, slots=True)
class Job:
    """A command of this project that spends money, and goes on where it was stopped."""

    name: str
    """Printed when it starts."""
    folder: Path
    """Of its results and its ledger."""
    command: tuple[str, ...]
    """Module and arguments, without --max-spend."""
    done: Callable[[], bool] = lambda: False
    """Whether it need not be started: all that it makes is there."""


def run_jobs(jobs: Sequence[Job], max_spend: float, among: Iterable[Path] = ()) -> int:
    """Runs them in turn; returns the first exit code that is not 0, or 0.

    Args:
        jobs: in their order.
        max_spend: dollars that they may spend together, what they spent before included; infinite for no limit.
        among: folders of others that the limit is for as well.
    """
    folders = {job.folder for job in jobs} | set(among)
    for job in jobs:
        if job.done():
            print(f"{job.name}: {job.folder} is finished", flush=True)
            continue
        limit = []
        if not math.isinf(max_spend):
            others = sum(spent_usd(folder) for folder in folders - {job.folder})
            limit = ["--max-spend", f"{max(0.0, max_spend - others):.6f}"]
        print(f"{job.name}: {job.folder}", flush=True)
        code = subprocess.run([sys.executable, "-m", *job.command, *limit], check=False).returncode
        if code:
            return code
    return 0


def spent_usd(folder: Path) -> float:
    """Dollars that the run in `folder` has spent so far."""
    ledger = folder / "spend.db"
    return SpendLedger(ledger, None).totals().overall.spent_microusd / 1e6 if ledger.exists() else 0.0
