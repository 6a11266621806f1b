"""Every policy under hard budgets: success and the share of the cap used, in calls and in dollars (table 1).

    python -m experiments.hard_budget results/RUN                # caps of 5, 10, 15 large calls, and 3 in dollars
    python -m experiments.hard_budget results/RUN --calls 5 --usd 0.02,0.04 --policies bopo-hybrid,first-large

It evaluates the routers of a finished experiments.frontier on its test tasks, under budget-constrained decoding: a
model that the rest of the cap can't pay for is masked. Expect some minutes for a quick run and a table at the end.
Calls come from the run's call store where they are there; new ones are paid, under --max-spend. The same command goes
on where it was stopped. Written: figures/hard_budget.html, .csv, .png and .svg, and the episodes in hard-budget/, which
experiments.audit checks as it checks a run. Exit code 1 when a cap was exceeded, which must never happen.
"""

from __future__ import annotations

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
from bopo_ray.pipeline.command import exit_code, script_parser
from bopo_ray.pipeline.hard_budget import caps_of, open_run, play_caps, policies_of, usd_caps

__all__ = ["main"]

NOTES = (
    "A cap in calls counts calls of any model but the smallest; one in dollars counts measured tokens at list prices, "
    "and a router's own questions. Share used: the mean over tasks.",
    "The learned routers were trained without a cap and read what is left of it as text.",
    "Intervals: 95% percentile bootstrap over tasks. Overspends: episodes that cost more than their cap.",
)


def numbers(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    """Reads a comma-separated list."""

    def read(text: str) -> list[float]:
        return [kind(x) for x in text.split(",") if x.strip()]

    read.__name__ = f"list of {kind.__name__}s"
    return read


def cap_table(table: pd.DataFrame, finished: FinishedRun) -> Table:
    """A row per policy, a column per cap: success, and the share of the cap used."""
    caps = table[["unit", "cap"]].drop_duplicates().itertuples(index=False)
    names = {(unit, cap): f"{cap:g} calls" if unit == "calls" else f"${cap:g}" for unit, cap in caps}
    over = int(table["overspends"].sum())
    shown = Table(title=f"{finished.env} under hard budgets, {finished.label}: success at share of the cap used; "
                  f"{table['episodes'].sum():,} episodes, {over} overspends")  # fmt: skip
    for name in ("policy", *names.values()):
        shown.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    cells = table.set_index(["policy", "unit", "cap"])
    for policy in table["policy"].unique():
        own = [cells.loc[(policy, *key)] for key in names]
        shown.add_row(policy, *(f"{c['success']:.2f} at {c['cap_used']:.0%}" for c in own))
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = script_parser("hard_budget", __doc__)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="a finished run, results/RUN")
    p.add_argument("--calls", type=numbers(int), default=[5, 10, 15], help="caps in calls of the large model")
    p.add_argument("--usd", type=numbers(float), help="caps in dollars (default 25, 50, 75%% of always-large's cost)")
    p.add_argument("--policies", default="", help="only these methods or policies, e.g. bopo-hybrid,first-large")
    p.add_argument("--max-spend", type=float, default=math.inf, help="dollars that new calls may cost")
    p.add_argument("--cpus", type=int, default=0, help="CPUs to use, 0 for all")
    args = p.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)

    def work() -> int:
        finished = open_finished(args.folder)
        caps = caps_of(args.calls, usd_caps(finished) if args.usd is None else args.usd)
        policies = policies_of(finished, [x for x in args.policies.split(",") if x])
        with open_run(finished, args.max_spend, args.cpus, console) as run:
            run.start_ray()
            table = hard_budget(play_caps(run, finished, policies, caps))
        console.print(cap_table(table, finished))
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
