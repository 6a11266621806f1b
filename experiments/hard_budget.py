"""Every method under hard budgets: success and the share of the cap used, in calls and in dollars (table 1).

    python -m experiments.hard_budget results/RUN                # caps of 5, 10, 15 large calls, and 3 in dollars
    python -m experiments.hard_budget results/RUN --calls 5 --usd 0.02,0.04 --methods bopo-hybrid,first-large

It evaluates the methods of a finished experiments.frontier under budget-constrained decoding: a model that the rest of
the cap can't pay for is masked. What a method plays under a cap (a router's offset, a schedule's length) is chosen by
its success on dev tasks under that cap; test tasks are played with that alone. Expect some minutes for a quick run and
two tables at the end. Calls come from the run's call store where they are there; new ones are paid, under --max-spend.
The same command goes on where it was stopped; a run has one study at a time. Written: figures/hard_budget.html, .csv,
.png and .svg, and in hard-budget/ the episodes, which experiments.audit checks as it checks a run, and a router to
deploy for each method and cap, policies/METHOD..._under-CAP... Exit code 1 when a cap was exceeded, which must never
happen.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from bopo_ray.analysis.finished import FinishedRun, open_finished
from bopo_ray.analysis.page import write_study
from bopo_ray.analysis.studies import hard_budget
from bopo_ray.analysis.study_plots import hard_budget_figure
from bopo_ray.pipeline.command import add_max_spend, exit_code, script_parser
from bopo_ray.pipeline.hard_budget import candidates, caps_of, open_run, play_caps, usd_caps

__all__ = ["CALLS", "main"]

CALLS = (5, 10, 15)
"""Caps in calls of the large model, as in the paper's table."""
NOTES = (
    "A cap in calls counts calls of any model but the smallest; one in dollars counts measured tokens at list prices, "
    "and a router's own questions. Share used: the mean over tasks.",
    "Setting: what a method plays under a cap, chosen by success on dev tasks under that cap, one for all training "
    "seeds. A share: the offset with which the router calls a larger model at that share of the steps of dev tasks. A "
    "learned router plays a schedule where no offset of its own is better there by more than a standard error.",
    "The learned routers were trained without a cap and read what is left of it as text.",
    "Intervals: 95% percentile bootstrap over tasks, and over training seeds. Less: the headline method's success less "
    "the row's; p, Holm: corrected for the methods under one cap. Overspends: episodes that cost more than their cap.",
)


def numbers(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    """Reads a comma-separated list."""

    def read(text: str) -> list[float]:
        try:
            return [kind(x) for x in text.split(",") if x.strip()]
        except ValueError:
            what = "whole numbers with commas, e.g. 5,10" if kind is int else "numbers with commas, e.g. 0.01,0.02"
            raise argparse.ArgumentTypeError(f"{text!r}: need {what}") from None

    return read


def cap_tables(table: pd.DataFrame, episodes: int, finished: FinishedRun) -> list[Table]:
    """A row per method, a column per cap: success and the share of the cap used; and how much more the headline has."""
    caps = table[["unit", "cap"]].drop_duplicates().itertuples(index=False)
    names = {(unit, cap): f"{cap:g} calls" if unit == "calls" else f"${cap:g}" for unit, cap in caps}
    over, headline = int(table["overspends"].sum()), finished.summary["headline"]
    titles = (
        f"{finished.env} under hard budgets, {finished.label}: success at share of the cap used; "
        f"{episodes:,} episodes, {over} overspends",
        f"{headline} less each method, in points of success",
    )
    cells = table.set_index(["method", "unit", "cap"])
    shown = []
    for title, cell in zip(titles, (_success, _less), strict=True):
        grid = Table(title=title)
        for name in ("method", *names.values()):
            grid.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
        for method in table["method"].unique():
            grid.add_row(method, *(cell(cells.loc[(method, *key)]) for key in names))
        shown.append(grid)
    return shown


def _success(row: pd.Series) -> str:
    return f"{row['success']:.0%} at {row['cap_used']:.0%}"


def _less(row: pd.Series) -> str:
    if math.isnan(row["less"]):
        return ""
    less, low, high = (round(100 * row[f"less{end}"], 1) + 0.0 for end in ("", "_low", "_high"))  # 0.0, not -0.0
    return f"{less:+.1f} [{low:.1f}, {high:.1f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = script_parser("hard_budget", __doc__)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="a finished run, results/RUN")
    p.add_argument("--calls", type=numbers(int), default=list(CALLS), help="caps in large calls (default 5,10,15)")
    p.add_argument(
        "--usd", type=numbers(float),
        help="caps in dollars (default 25, 50, 75%% of always-large's cost; needed where the run itself had a cap)",
    )  # fmt: skip
    p.add_argument("--methods", default="", help="only these, e.g. bopo-hybrid,first-large (default: all of the run)")
    p.add_argument("--dev-tasks", type=int, default=0, help="dev tasks to choose by (default the run's)")
    add_max_spend(p)
    p.add_argument("--cpus", type=int, default=0, help="CPUs to use, 0 for all")
    args = p.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)

    def work() -> int:
        finished = open_finished(args.folder)
        caps = caps_of(args.calls, usd_caps(finished) if args.usd is None else args.usd)
        with open_run(finished, args.max_spend, args.cpus, console) as run:
            found = candidates(run, finished, [x for x in args.methods.split(",") if x])
            run.start_ray()
            played = play_caps(run, finished, found, caps, args.dev_tasks)
        table = hard_budget(played, finished.summary["headline"])
        console.print(*cap_tables(table, played["id"].nunique(), finished))
        written = write_study(
            finished.figures, "hard_budget", f"Under hard budgets: {finished.env}",
            f"{finished.label}. {finished.summary['note']}", table, hard_budget_figure(table, finished.label), NOTES,
        )  # fmt: skip
        console.print(*written, sep="\n", soft_wrap=True)
        over = int(table["overspends"].sum())
        if over:
            print(f"error: {over} episodes cost more than their cap; please report this", file=sys.stderr)
        return int(bool(over))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
