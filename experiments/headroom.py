"""How much can a router gain at all? What knowing each task is worth, at least and at most; beyond that is luck.

    python -m experiments.headroom results/RUN                        # of a finished experiments.frontier
    python -m experiments.headroom results/RUN --lengths 2,5,10 --tasks 100 --samples 5   # more samples: closer bounds

It plays first-large(K), for each K of --lengths, and the boundary policies on dev tasks, --samples times with other
draws of the models. Expect some minutes, two tables, one sentence, and figures/headroom.html, .csv, .png and .svg in
the run's folder. Calls come from the run's store where they are there; new ones are paid, under --max-spend. The same
command goes on where it was stopped; a run has one study at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console

from bopo_ray.analysis.cost_unit import cost_unit
from bopo_ray.analysis.finished import open_finished
from bopo_ray.analysis.headroom import KNOWN, MOST, ORACLE, SCHEDULES, headroom, headroom_figure
from bopo_ray.analysis.page import write_study
from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.command import add_max_spend, exit_code, finished_parser, whole_numbers
from bopo_ray.pipeline.hard_budget import open_run
from bopo_ray.pipeline.headroom import play_schedules

__all__ = ["main", "verdict"]

FOLDER = "headroom"
"""In the finished run's."""
NOTES = (
    "schedules: first-large(K), the same for all tasks. oracle: of each task the schedule that is best in the very "
    "episode that is counted. known tasks: the schedule that is best by the task's other episodes, drawn towards the "
    "mean over tasks as far as single episodes are luck, counted on the episode left out. Known tasks, at most: the "
    "schedule that is best by the mean of all of the task's episodes, counted on these. Best: most success less lambda "
    "times cost.",
    "What known tasks are above schedules is the least that there is to know of a task: a few plays tell less than all "
    "of it, and more samples raise it. With the most, which more samples lower, some luck is counted, too. What the "
    "oracle is above that is luck, or must be seen in the episode itself. Before its first step a router knows a task "
    "less well; it sees how its own episode goes instead.",
    "task_share: the part of the variance of single outcomes that lies between tasks (ICC); the rest is chance.",
    "Intervals: 95% bootstrap over tasks; of hypervolumes basic ones, else percentiles.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = finished_parser("headroom", __doc__)
    p.add_argument("--lengths", default="1,2,3,4,5,7,10,15,20", help="K of the schedules first-large(K)")
    p.add_argument("--tasks", type=int, default=1000, help="dev tasks, at most")
    p.add_argument("--samples", type=int, default=3, help="episodes of each schedule per task")
    add_max_spend(p)
    p.add_argument("--cpus", type=int, default=0, help="CPUs to use, 0 for all")
    args = p.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)

    def work() -> int:
        lengths = whole_numbers("lengths", args.lengths, 1)
        for name in ("tasks", "samples"):
            if getattr(args, name) < 2:
                raise ConfigError(f"{name}={getattr(args, name)}: need at least 2; set it with --{name}")
        finished = open_finished(args.folder)
        unit = cost_unit(finished.summary)
        with open_run(finished, args.max_spend, args.cpus, console, FOLDER) as run:
            run.start_ray()
            table = headroom(play_schedules(run, lengths, args.tasks, args.samples), unit)
        points = ["pick", "setting", "success", "success_low", "success_high", unit.column, "task_share"]
        print(table[points].to_string(index=False, float_format="{:.4f}".format, na_rep=""))
        volumes = [c for c in table.columns if c.startswith(("hypervolume", "more"))]
        print(table.drop_duplicates("pick")[["pick", *volumes]].to_string(index=False, float_format="{:.4f}".format))
        more = table.drop_duplicates("pick").set_index("pick")
        print(verdict(more["more"].to_dict(), more.loc[KNOWN, "more_low"]))
        label = f"{finished.label}. {finished.summary['note']}"
        figure = headroom_figure(table, unit, finished.label)
        title = f"How much of the oracle's lead is to be known: {finished.env}"
        print(*write_study(args.out or finished.figures, "headroom", title, label, table, figure, NOTES), sep="\n")
        return 0

    return exit_code(work)


def verdict(more: Mapping[str, float], least_low: float) -> str:
    """One sentence on the differences from the schedules' hypervolume, by pick; `least_low` is where the interval of
    that of `KNOWN` begins."""
    lead = more[ORACLE]
    if lead <= 0:
        return f"the oracle is not above the {SCHEDULES}: there is nothing to gain by the task"
    least, most = (min(max(0.0, more[pick]), lead) for pick in (KNOWN, MOST))
    known = f"at least {least:.3f} ({least / lead:.0%})" if least_low > 0 else "none for certain"
    return (
        f"of the oracle's lead of {lead:.3f} over the {SCHEDULES}, {known} is to be known of the tasks, as their other "
        f"episodes tell it, and at most {most:.3f} ({most / lead:.0%}); the rest, {1 - most / lead:.0%} or more, is "
        "luck, or must be seen in the episode itself"
    )


if __name__ == "__main__":
    sys.exit(main())
