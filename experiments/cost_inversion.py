"""Where the small model costs more than the large one: per-task cost of the two boundary policies (figure 5).

    python -m experiments.cost_inversion results/RUN                 # of a finished experiments.frontier
    python -m experiments.cost_inversion results/A results/B results/C   # a panel for each benchmark

Expect a table of the inversions' rates on the screen, at once, and cost_inversion.html, .csv, .png and .svg in
figures/ of the first run's folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bopo_ray.analysis.finished import open_finished
from bopo_ray.analysis.page import write_study
from bopo_ray.analysis.studies import inversion_rates, inversions
from bopo_ray.analysis.study_plots import inversion_figure
from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.command import exit_code, finished_parser

__all__ = ["main"]

NOTES = (
    "A point is a training task: the mean cost of its K rollouts by each boundary policy. Below the dashed line the "
    "small model is dearer, mostly because it loops until the step limit; such points are ringed.",
    "Means of few rollouts are noisy: near the line a task may be on the wrong side.",
    "Intervals: 95% percentile bootstrap over tasks; of none or all of them, Clopper and Pearson's.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = finished_parser("cost_inversion", __doc__, several=True).parse_args(argv)

    def work() -> int:
        runs = [open_finished(folder) for folder in args.folders]
        names = [run.env for run in runs]
        if len(set(names)) < len(names):
            raise ConfigError(f"two runs of one benchmark among {', '.join(names)}: give one folder for each")
        inverted = inversions({run.env: run.boundaries for run in runs})
        rates = inversion_rates(inverted)
        label = ", ".join(sorted({run.label for run in runs}))
        print(rates.to_string(index=False, float_format="{:.2f}".format))
        written = write_study(
            args.out or runs[0].figures, "cost_inversion", "Where the small model costs more than the large one",
            f"{label}. {runs[0].summary['note']}", inverted, inversion_figure(inverted, rates, label), NOTES, rates,
        )  # fmt: skip
        print(*written, sep="\n")
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
