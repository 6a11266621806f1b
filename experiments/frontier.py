"""The main job: boundary rollouts, taxonomy, BoSFT, BoPO for each lambda, and the Pareto frontier.

    python -m experiments.frontier                          # quick: under 20 minutes on 2 cores
    python -m experiments.frontier --scale tiny             # everything once, in minutes
    python -m experiments.frontier --out results/x --resume # go on where a run was stopped
    python -m experiments.frontier --env all                # the three benchmarks, and their frontiers in one figure

Expect progress and a table on the screen, and results/<run>/: report.html, frontier.csv, .png and .svg, summary.json,
episodes as Parquet, the trained routers, and TensorBoard logs. The default pair of models was trained by this project,
AppWorld's is simulated; both are labelled so. Defaults below are ScienceWorld's at quick scale; what another benchmark
has instead stands in its run's settings.yaml.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from bopo_ray.analysis.cost_unit import cost_mode
from bopo_ray.errors import ConfigError, StoreError
from bopo_ray.models.spend import SpendLedger
from bopo_ray.pipeline.board import board_command
from bopo_ray.pipeline.command import exit_code, script_parser
from bopo_ray.pipeline.evaluate import evaluate_stage, report_stage
from bopo_ray.pipeline.jobs import Job
from bopo_ray.pipeline.preflight import studies, taken_microusd
from bopo_ray.pipeline.run import Run
from bopo_ray.pipeline.same import check_same
from bopo_ray.pipeline.settings import Settings, field_docs, load_settings, resolve
from bopo_ray.pipeline.shared import is_uri, local_folder, shared_folder
from bopo_ray.pipeline.side_by_side import ALL, run_all
from bopo_ray.pipeline.stages import bosft_stage, boundary_stage
from bopo_ray.pipeline.sweep import Sweep

__all__ = ["as_jobs", "main", "parser", "settings_for", "settings_of"]


def parser() -> argparse.ArgumentParser:
    """One option per field of `Settings`, and where to write."""
    p = script_parser("frontier", __doc__)
    p.add_argument(
        "--out", help="folder of results (default results/<env>-<models>-<scale>), or a URI such as s3://b/x"
    )
    p.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    p.add_argument("--settings", type=Path, metavar="YAML", help="file of settings; options given here win over it")
    usual = resolve(None, {})
    for field in dataclasses.fields(Settings):
        flag, doc = f"--{field.name.replace('_', '-')}", field_docs()[field.name]
        value = getattr(usual, field.name)
        default = ",".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else value
        if isinstance(field.default, bool):
            p.add_argument(flag, action="store_const", const=True, dest=field.name, help=doc)
        else:
            action = "append" if field.name == "router" else "store"
            text = f"{doc} (default: {default})" if default != "" else doc
            p.add_argument(flag, dest=field.name, metavar="VALUE", action=action, help=text)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code.

    0, 1 (the machine failed), 2 (the user's mistake), 3 (--max-spend is reached), 130 (interrupted).
    """
    console = Console(width=None if sys.stdout.isatty() else 130)
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(arguments)
    command = f"python -m experiments.frontier {shlex.join(arguments)}".strip()
    out = Path()

    def work() -> int:
        nonlocal out
        settings = settings_of(args)
        where = args.out or str(Path("results") / default_name(settings))
        if settings.env == ALL:
            return run_all(settings, arguments, local_folder(where))
        folder = Path("results") / "shared" / slug(where)
        with shared_folder(where, folder) as (out, save), Run(settings, out, args.resume, console) as run:
            started = time.monotonic()
            run.start_ray()
            console.print(f"TensorBoard:   {board_command(out)}", soft_wrap=True)
            boundaries = boundary_stage(run)
            save()
            bosft = bosft_stage(run, boundaries)
            save()
            Sweep(run).train(bosft)
            save()
            report_stage(run, evaluate_stage(run), command)
            console.print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")
        if is_uri(where):
            console.print(f"copied to {where}", soft_wrap=True)
        return 0

    again = "run the same command with --resume"
    kept = f"finished episodes and points are kept; {again}"
    return exit_code(work, spent=lambda: spent_line(out), again=again, kept=kept)


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the options of `parser` name; raises ConfigError."""
    given = {f.name: v for f in dataclasses.fields(Settings) if (v := getattr(args, f.name)) is not None}
    return resolve(args.settings, {name: ",".join(v) if isinstance(v, list) else v for name, v in given.items()})


def settings_for(script: str, options: Sequence[str], taken: Sequence[str]) -> Settings:
    """The settings of `options`, which another script passes on to runs of this one, all on one benchmark.

    Raises ConfigError for a field of `taken`, which that script sets itself.
    """
    args = parser().parse_args(options)
    for name in taken:
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: {script} sets it itself; leave it out")
    settings = settings_of(args)
    if settings.env == ALL:
        raise ConfigError(f"env={ALL!r}: {script} takes one benchmark at a time; set it with --env")
    return settings


def as_jobs(
    runs: Mapping[str, Sequence[str]], folders: Mapping[str, Path], options: Sequence[str], calls: Path
) -> dict[str, Job]:
    """This script once for each of `runs`, name -> options of its own, which win over those that all of them have; each
    in its folder and in a process of its own, with one call store. One that is finished is not run again.
    """
    return {
        name: _as_job(f"{name} ({shlex.join(own)})", folders[name], [*options, *own, "--calls", str(calls)])
        for name, own in runs.items()
    }


def _as_job(name: str, folder: Path, options: Sequence[str]) -> Job:
    arguments = [*options, "--resume", "--out", str(folder)]

    def done() -> bool:
        settings, path = settings_of(parser().parse_args(arguments)), folder / "settings.yaml"
        if not all((folder / name).is_file() for name in ("settings.yaml", "summary.json", "report.html")):
            return False
        try:
            old = load_settings(path)
            for a, b in ((old, settings), (settings, old)):  # neither has, say, a lambda that the other one has not
                check_same(a, b, path)
            judged = cost_mode(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
        except (StoreError, ValueError):
            return False  # which the run itself says in a better way
        if judged != settings.cost:
            return False  # made before a run was judged in its own unit: its report is made again
        ended = (folder / "report.html").stat().st_mtime >= path.stat().st_mtime  # it is written when a run starts
        return ended and old.router == settings.router

    return Job(name, folder, ("experiments.frontier", *arguments), done)


def default_name(settings: Settings) -> str:
    """Of the results folder: environment, models and scale."""
    models = f"{settings.small}-{settings.large}" if settings.small else Path(settings.models).stem
    return slug(f"{settings.env.rpartition(':')[2]}-{models}-{settings.scale}")


def slug(name: str) -> str:
    """Fit for a folder."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower())


def spent_line(out: Path) -> str:
    """What a run has spent, in words, and what studies of it have of the same limit."""
    totals, beside = SpendLedger(out / "spend.db", None).totals().overall, taken_microusd(studies(out)) / 1e6
    own = f"${totals.spent_microusd / 1e6:.6f} spent on {totals.paid_calls:,} calls"
    return f"{own}, and ${beside:.6f} by studies of this run" if beside else own


if __name__ == "__main__":
    sys.exit(main())
