"""Runs as processes of their own, one after the other, under one limit on the dollars of all together."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bopo_ray.analysis.finished import FinishedRun, open_finished
from bopo_ray.models.spend import SpendLedger
from bopo_ray.pipeline.command import Terminated
from bopo_ray.pipeline.preflight import studies, taken_microusd
from bopo_ray.pipeline.settings import microusd

__all__ = ["Job", "compare_runs", "end_with", "run_jobs", "run_process", "spent_usd"]

PATIENCE_S = 30.0
"""A process that was interrupted has so long to end in order."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
"""Loaded before a fork: nothing may be imported after it."""


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
        max_spend: dollars that they may spend together, what they spent or left reserved before included; infinite for
            no limit.
        among: folders of others that the limit is for as well.
    """
    folders = {job.folder for job in jobs} | set(among)
    folders |= {study for folder in list(folders) for study in studies(folder)}
    for i, job in enumerate(jobs, 1):
        name = f"{job.name}: {job.folder}" if len(jobs) == 1 else f"run {i} of {len(jobs)}, {job.name}: {job.folder}"
        if job.done():
            print(f"{name} is finished", flush=True)
            continue
        print(name, flush=True)
        limit = []
        if not math.isinf(max_spend):
            # A run counts by itself what studies in its folder have spent.
            others = taken_microusd(f for f in folders if f != job.folder and job.folder not in f.parents)
            limit = ["--max-spend", f"{max(0, microusd(max_spend) - others) / 1e6:.6f}"]
        if code := run_process([sys.executable, "-m", *job.command, *limit]):
            return code
    return 0


def compare_runs(
    out: Path, jobs: Mapping[str, Job], max_spend: float,
    write: Callable[[Path, dict[str, FinishedRun]], Sequence[Path]],
) -> int:  # fmt: skip
    """Runs the main jobs as `run_jobs` does, and has `write` compare them, by name, in `out`; prints what it wrote."""
    out.mkdir(parents=True, exist_ok=True)
    if code := run_jobs(list(jobs.values()), max_spend):
        return code
    print(*write(out, {name: open_finished(job.folder) for name, job in jobs.items()}), sep="\n")
    return 0


def run_process(command: Sequence[str]) -> int:
    """Runs a command to its end; returns its exit code.

    It never goes on, and spends, without this process: Ctrl-C reaches both, SIGTERM is handed on, and where this
    process is killed the command gets SIGTERM (on Linux). It may then end in order.
    """
    process = subprocess.Popen(command, preexec_fn=partial(end_with, os.getpid()) if _libc else None)
    try:
        return process.wait()
    except KeyboardInterrupt as stop:
        if isinstance(stop, Terminated):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
        raise


def end_with(parent: int) -> None:
    """In a new child, before it begins: it gets SIGTERM when the process `parent` ends, also if it just has."""
    assert _libc
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)  # a signal would come to this process's copy of our own handler


def spent_usd(folder: Path) -> float:
    """Dollars that the run in `folder` has spent so far."""
    ledger = folder / "spend.db"
    return SpendLedger(ledger, None).totals().overall.spent_microusd / 1e6 if ledger.exists() else 0.0
