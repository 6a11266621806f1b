"""The main job on several pairs of models, with other ratios of cost to capability, on the same tasks (figure 4).

    python -m experiments.model_pairs --out results/pairs                 # quick: under 40 minutes on 2 cores
    python -m experiments.model_pairs --out results/pairs --pair mine=pool.yaml --pair simulated=simulated
    python -m experiments.model_pairs --out results/pairs --scale tiny    # any option of experiments.frontier

Without --pair: the benchmark's default pair, and a second one that is simulated, at the list prices of Llama-3.1 8B and
70B. It runs experiments.frontier for each pair, into --out/NAME, with the same tasks, seeds and lambdas. Expect those
runs' output, a table, and model_pairs.html, .csv, .png and .svg in --out. The same command goes on where it was
stopped, and does no run again that is finished. --max-spend bounds the runs together.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from bopo_ray.analysis import plots
from bopo_ray.analysis.finished import FinishedRun, open_finished
from bopo_ray.analysis.page import write_study
from bopo_ray.analysis.studies import pair_row, pair_table
from bopo_ray.errors import ConfigError
from bopo_ray.models.pool import resolve_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.pipeline.command import exit_code, script_parser
from bopo_ray.pipeline.jobs import Job, run_jobs
from bopo_ray.pipeline.settings import Settings
from experiments.frontier import as_job, settings_for

__all__ = ["TAKEN", "check_pairs", "default_pairs", "jobs", "main", "parse_pairs", "write"]

TAKEN = ("models", "calls")
"""What --pair, and the one call store, leave no choice of."""
SECOND = "simulated-llama"
NOTES = (
    "Each pair has a frontier, a scale of dollars and a router of its own; tasks, seeds and lambdas are the same.",
    "Cost ratio: mean cost per task of always-large by that of always-small. The price per token differs by another "
    "factor, as the small model may take more steps.",
    "The best baseline is the one with the largest hypervolume on these very tasks, which favours it.",
    "Intervals: 95% percentile bootstrap over tasks, and training seeds where there are several.",
)


def parse_pairs(given: Sequence[str]) -> dict[str, str]:
    """Name -> what --models takes, from NAME=SPEC; raises ConfigError in one line."""
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, spec = text.partition("=")
        if not (equals and spec and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)):
            raise ConfigError(f"pair={text!r}: need NAME=SPEC, e.g. mine=pool.yaml, NAME of letters, digits, . _ and -")
        if name in pairs:
            raise ConfigError(f"pair={text!r}: a second pair of the name {name}; give each its own with --pair")
        pairs[name] = spec
    if len(pairs) == 1:
        raise ConfigError(
            f"pair={given[0]!r}: one pair is nothing to compare; give --pair twice or more, or leave it out"
        )
    return pairs


def default_pairs(settings: Settings) -> dict[str, str]:
    """The pair that the settings have, and a simulated one that is another."""
    second = SECOND if settings.models != SECOND else "simulated"
    return {_name(settings.models): settings.models, second: second}


def _name(models: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(models).stem if models.endswith((".yaml", ".yml")) else models)


def check_pairs(pairs: Mapping[str, str], settings: Settings) -> None:
    """Raises ConfigError, before anything is played, for models that there are not, or that have no price."""
    if settings.small:
        raise ConfigError(f"small={settings.small!r}: several pairs are played here; give yours as a pool file (.yaml)")
    prices = price_table(Path(settings.prices)) if settings.prices else price_table()
    for spec in pairs.values():
        resolve_pool(dataclasses.replace(settings, models=spec).pool, "", "", prices)


def jobs(pairs: Mapping[str, str], folders: Mapping[str, Path], options: Sequence[str], calls: Path) -> dict[str, Job]:
    """A run for each pair, in its folder, with these options and one call store."""
    return {
        name: as_job(
            f"pair {name} (--models {spec})", folders[name], [*options, "--models", spec, "--calls", str(calls)]
        )
        for name, spec in pairs.items()
    }


def write(out: Path, runs: Mapping[str, FinishedRun]) -> list[Path]:
    """Compares the pairs: prints the table and writes the figure's files."""
    rows = pd.DataFrame([pair_row(name, run.label, run.evaluation(), run.summary) for name, run in runs.items()])
    shown = pair_table(rows)
    print(shown.to_string(index=False))
    panels = {f"{name}: {run.label}": (run.frontier, run.summary) for name, run in runs.items()}
    env = next(iter(runs.values())).env
    labels = ", ".join(sorted({run.label for run in runs.values()}))
    figure = plots.frontiers_figure(panels, f"Pairs of models: {env}", labels)
    notes = " ".join(dict.fromkeys(str(run.summary["note"]) for run in runs.values()))
    return write_study(out, "model_pairs", f"Pairs of models: {env}", f"{labels}. {notes}", rows, figure, NOTES, shown)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = script_parser("model_pairs", __doc__, allow_abbrev=False)
    p.add_argument("--out", type=Path, required=True, help="folder of the runs and the figure")
    p.add_argument(
        "--pair", action="append", default=[], metavar="NAME=SPEC",
        help="a pair of models; SPEC as in --models of experiments.frontier: embedded, simulated, simulated-llama, "
        "embedded:FAMILY, or a pool file (.yaml); may be given several times",
    )  # fmt: skip
    args, options = p.parse_known_args(argv)

    def work() -> int:
        settings = settings_for("model_pairs", options, TAKEN)
        pairs = parse_pairs(args.pair) or default_pairs(settings)
        check_pairs(pairs, settings)
        folders = {name: args.out / name for name in pairs}
        args.out.mkdir(parents=True, exist_ok=True)
        if code := run_jobs(list(jobs(pairs, folders, options, args.out / "calls.db").values()), settings.max_spend):
            return code
        print(*write(args.out, {name: open_finished(folder) for name, folder in folders.items()}), sep="\n")
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
