"""The main job: boundary rollouts, taxonomy, BoSFT, BoPO for each lambda, and the Pareto frontier.

    python -m experiments.frontier                          # quick: under 20 minutes on 2 cores
    python -m experiments.frontier --scale tiny             # everything once, in minutes
    python -m experiments.frontier --out results/x --resume # go on where a run was stopped
    python -m experiments.frontier --env all                # the three benchmarks, and their frontiers in one figure

Expect a table on the screen and results/<run>/: report.html, frontier.png, frontier.csv, summary.json, episodes as
Parquet, the trained routers, and TensorBoard logs. The default pair of models is simulated, and labelled so.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ray.exceptions import RayTaskError
from rich.console import Console

from bopo_ray.errors import ConfigError, EngineError, ModelError, SpendLimitError
from bopo_ray.models.spend import SpendLedger
from bopo_ray.pipeline.evaluate import evaluate_stage, report_stage
from bopo_ray.pipeline.run import Run
from bopo_ray.pipeline.settings import Settings, field_docs, resolve
from bopo_ray.pipeline.side_by_side import ALL, run_all
from bopo_ray.pipeline.stages import bosft_stage, boundary_stage
from bopo_ray.pipeline.sweep import Sweep

__all__ = ["main"]


def parser() -> argparse.ArgumentParser:
    """One option per field of `Settings`, and where to write."""
    p = argparse.ArgumentParser(
        prog="python -m experiments.frontier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, help="folder of results (default results/<env>-<models>-<scale>)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    p.add_argument("--settings", type=Path, metavar="YAML", help="file of settings; options given here win over it")
    for field in dataclasses.fields(Settings):
        flag, doc = f"--{field.name.replace('_', '-')}", field_docs()[field.name]
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        if isinstance(field.default, bool):
            p.add_argument(flag, action="store_const", const=True, dest=field.name, help=doc)
        else:
            action = "append" if isinstance(field.default, tuple) else "store"
            text = f"{doc} (quick: {default})" if default != "" else doc
            p.add_argument(flag, dest=field.name, metavar="VALUE", action=action, help=text)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code.

    0, 1 (the machine failed), 2 (the user's mistake), 3 (--max-spend is reached), 130 (interrupted).
    """
    console = Console(width=None if sys.stdout.isatty() else 130)
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(arguments)
    given = {f.name: v for f in dataclasses.fields(Settings) if (v := getattr(args, f.name)) is not None}
    given = {name: ",".join(v) if isinstance(v, list) else v for name, v in given.items()}
    command = f"python -m experiments.frontier {shlex.join(arguments)}".strip()
    try:
        settings = resolve(args.settings, given)
        out = args.out or Path("results") / default_name(settings)
        if settings.env == ALL:
            return run_all(settings, arguments, out)
        with Run(settings, out, args.resume, console) as run:
            started = time.monotonic()
            run.start_ray()
            boundaries = boundary_stage(run)
            bosft = bosft_stage(run, boundaries)
            Sweep(run).train(bosft)
            report_stage(run, evaluate_stage(run), command)
            console.print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")
        return 0
    except (ConfigError, EngineError, ModelError, SpendLimitError, RayTaskError, OSError) as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        kind = 2 if isinstance(cause, ConfigError) else 1
        if isinstance(cause, SpendLimitError):
            print(f"stopped: {spent_line(out)}; {cause}. All finished is kept: give a higher --max-spend and --resume")
            return 3
        if isinstance(error, RayTaskError) and not isinstance(cause, ConfigError | EngineError | ModelError):
            raise
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            kind, cause = 2, f"{cause}; free some space and run the same command with --resume: finished parts are kept"
        print(f"error: {' '.join(str(cause).split())}", file=sys.stderr)
        return kind
    except KeyboardInterrupt:
        print("interrupted: finished episodes and points are kept; run the same command with --resume", file=sys.stderr)
        return 130


def default_name(settings: Settings) -> str:
    """Of the results folder: environment, models and scale."""
    models = f"{settings.small}-{settings.large}" if settings.small else Path(settings.models).stem
    name = f"{settings.env.rpartition(':')[2]}-{models}-{settings.scale}".lower()
    return re.sub(r"[^a-z0-9._-]+", "-", name)


def spent_line(out: Path) -> str:
    """What a run has spent, in words."""
    totals = SpendLedger(out / "spend.db", None).totals().overall
    return f"${totals.spent_microusd / 1e6:.6f} spent on {totals.paid_calls:,} calls"


if __name__ == "__main__":
    sys.exit(main())
