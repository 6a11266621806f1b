"""How well the embedded models play alone: success by kind of task, classes, inversions, and how episodes end.

    python -m experiments.evaluate_executors --env ScienceWorld-v0                    # 60 dev tasks, K = 5
    python -m experiments.evaluate_executors --env ScienceWorld-v0 --split shown      # tasks that they were trained on
    python -m experiments.evaluate_executors --env ALFWorld-v0 --small FOLDER --large FOLDER

Plays both models alone, at the main job's temperature and step limit. Expect a table on the screen and a CSV of the
episodes in --out; a few minutes for ScienceWorld, whose engine takes most of them. Choose between models on dev; the
test tasks are for the final figures only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from bopo_ray.benchmarks import env_class, fair_tasks, select_tasks
from bopo_ray.errors import ConfigError
from bopo_ray.executors.demos import EXPERTS
from bopo_ray.executors.evaluate import Played, play_boundaries
from bopo_ray.method.taxonomy import BoundaryStats
from bopo_ray.models import build_pool
from bopo_ray.models.pool import resolve_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.pipeline.command import refused, script_parser
from bopo_ray.pipeline.settings import resolve
from envs.base import Split

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = script_parser("evaluate_executors", __doc__)
    parser.add_argument("--env", required=True)
    parser.add_argument("--split", default="dev", choices=("train", "dev", "test", "shown"))
    parser.add_argument("--tasks", type=int, default=60, help="evenly over the kinds")
    parser.add_argument("--temperature", type=float, help="of the models (default: the main job's)")
    parser.add_argument("--k", type=int, default=5, help="samples of each task and model")
    parser.add_argument("--small", default="", help="folder, instead of the shipped one")
    parser.add_argument("--large", default="", help="folder, instead of the shipped one")
    parser.add_argument("--out", type=Path, default=Path("results/executors/played.csv"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    try:
        evaluate(args)
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")


def evaluate(args: argparse.Namespace) -> None:
    """Chooses the tasks, plays them, and shows what came out. Raises ConfigError for what can't be played."""
    for name in ("k", "processes"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name}={getattr(args, name)}: need at least 1; set it with --{name}")
    env_class(args.env)
    if args.env not in EXPERTS:
        raise ConfigError(f"env={args.env!r}: no models were trained for it; there are some for {', '.join(EXPERTS)}")
    s = resolve(None, {"env": args.env, "models": "embedded"})
    shipped = resolve_pool("", f"{s.pool}-small", f"{s.pool}-large", price_table())
    models = (  # a folder, whatever its name, at the price of the one that it stands in for
        replace(m, model=f"embedded:{folder}") if folder else m
        for m, folder in zip(shipped.models, (args.small, args.large), strict=True)
    )
    spec = replace(shipped, models=tuple(models))
    with refused("out", args.out):
        args.out.parent.mkdir(parents=True, exist_ok=True)
    fair = fair_tasks(args.env, build_pool(spec))
    if args.split == "shown":
        kinds = {t.kind for t in env_class(args.env).tasks(Split.TRAIN) if fair(t)}
        tasks = select_tasks(args.env, Split.TRAIN, args.tasks, 0, fair=lambda t: not fair(t) and t.kind in kinds)
    else:
        tasks = select_tasks(args.env, Split(args.split), args.tasks, 0, fair=fair)

    temperature = s.temperature if args.temperature is None else args.temperature

    def report(done: int, total: int) -> None:
        print(f"\r{done}/{total} episodes", end="" if done < total else "\n", file=sys.stderr, flush=True)

    played = play_boundaries(
        args.env, spec, [t.name for t in tasks], args.k, args.processes, s.max_steps, temperature, report
    )
    with refused("out", args.out):
        pd.DataFrame(played).to_csv(args.out, index=False)
    show(played, f"{args.env}, {len(tasks)} {args.split} tasks, K = {args.k}, temperature {temperature:g}")


def show(played: Sequence[Played], title: str) -> None:
    """Prints what the episodes say."""
    frame = pd.DataFrame(played)
    frame["kind"] = frame.task.str.rpartition("/")[0]
    console, table = Console(), Table(title=title)
    for column in ("kind", "tasks", "success small", "success large", "steps small", "steps large"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, rows in [*frame.groupby("kind"), ("all", frame)]:
        by = rows.groupby("model")[["success", "steps"]].mean()
        table.add_row(
            str(kind), str(rows.task.nunique()), *(f"{100 * by.success[m]:.0f}%" for m in (0, 1)),
            *(f"{by.steps[m]:.1f}" for m in (0, 1)),
        )  # fmt: skip
    console.print(table)
    classes, inverted = Counter[str](), 0
    for task, rows in frame.groupby("task"):
        small, large = (rows[rows.model == m] for m in (0, 1))
        stats = BoundaryStats(
            str(task), len(small), len(large), int(small.success.sum()), int(large.success.sum()),
            float(small.cost_usd.mean()), float(large.cost_usd.mean()), float(small.outcome.mean()),
            float(large.outcome.mean()), float(large.steps.mean()),
        )  # fmt: skip
        classes[str(stats.difficulty())] += 1
        inverted += stats.cost_small > stats.cost_large
    n = frame.task.nunique()
    console.print(
        ", ".join(f"{k} {v / n:.0%}" for k, v in sorted(classes.items())), f"; small dearer on {inverted / n:.0%}"
    )
    for m, name in enumerate(("small", "large")):
        rows = frame[frame.model == m]
        ends = ", ".join(f"{k} {v:.0%}" for k, v in rows.stop.value_counts(normalize=True).items())
        console.print(
            f"{name}: ${rows.cost_usd.mean():.5f} an episode, outcome {rows.outcome.mean():.3f}, ends: {ends}; "
            f"repeats {np.mean([1 - len(set(a)) / len(a) for a in rows.actions]):.0%} of its actions"
        )


if __name__ == "__main__":
    main()
