"""All of the paper's experiments on one or several benchmarks, and one report that sets its claims beside ours.

    python -m experiments.reproduce --out results/reproduce                 # quick: hours on 2 cores, see below
    python -m experiments.reproduce --out results/reproduce --scale tiny --envs ScienceWorld-v0
    python -m experiments.reproduce --out results/reproduce --seeds 0,1,2      # any option of experiments.frontier

Per benchmark: frontier, ablation, allocation, cost_inversion, hard_budget and model_pairs, in --out/<benchmark>/; they
share one call store, and the ablation and the pairs share the frontier's run. The models are the benchmark's default
pair, or those that --models, or --small and --large, name. Expect those scripts' output, with a line like "2 of 18:
..." before each, and at the end reproduce.html, with every figure and an honest table, and reproduce.csv. The same
command goes on where it was stopped, and does nothing again that is finished. --max-spend bounds the dollars of all
runs together. ScienceWorld alone, with one seed, took 81 minutes on 2 cores that ran the tests beside, ALFWorld about
two hours beside a run as long; AppWorld was not timed.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bopo_ray.analysis import canvas, plots
from bopo_ray.analysis.claims import Claim, Results, claims_of, differences_of, table_of, tally
from bopo_ray.analysis.cost_unit import common_noun
from bopo_ray.analysis.finished import CAPPED, CHOSEN, FinishedRun, open_finished
from bopo_ray.analysis.page import Section, write_page
from bopo_ray.analysis.story import tell
from bopo_ray.benchmarks import check_ready, env_label
from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.command import exit_code, script_parser
from bopo_ray.pipeline.jobs import Job, run_jobs, spent_usd
from bopo_ray.pipeline.preflight import studies
from bopo_ray.pipeline.settings import Settings, load_settings
from bopo_ray.pipeline.side_by_side import BENCHMARKS
from experiments import ablation, allocation, cost_inversion, model_pairs
from experiments.frontier import as_jobs, settings_for
from experiments.hard_budget import CALLS

__all__ = ["Benchmark", "Step", "main"]

TAKEN = ("env", *ablation.TAKEN, "budget_calls", "budget_usd", "replay")
"""What the experiments' own options leave no choice of."""
FIGURES = (
    ("Figure 2: what each part contributes", "ablation", ""),
    ("Figure 3: where the dollars go", "allocation", "full/figures"),
    ("Figure 4: other pairs of models", "model_pairs", ""),
    ("Figure 5: cost inversion", "cost_inversion", "full/figures"),
    ("Table 1: under hard budgets", "hard_budget", "full/figures"),
)
"""Heading, the study's files, and their folder in the benchmark's."""
NOTES = (
    'Paper: the numbers of arXiv:2602.21227 that this project knows; "not known" does not mean that there is none.',
    "Ours: with 95% bootstrap intervals over held-out tasks (figure 5: training tasks), of hypervolumes basic ones, "
    "else percentiles. The paper's intervals are not known.",
    "Under caps BoPO and first-large play what was chosen for each on dev tasks under that very cap; without a cap "
    'always-large is one policy. "Without a cap" is how we read the paper\'s 125% of the cap.',
    "Figure 3 calls a held-out task Hard in hindsight, from this evaluation: where always-small mostly fails and some "
    "policy succeeds. The training tasks' taxonomy is made before, from K rollouts.",
    "The best baseline is the one with the largest hypervolume on these very tasks, which favours it.",
)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark's runs: which, where, and with what."""

    env: str
    root: Path
    """Of its folders."""
    pairs: model_pairs.Pairs
    """The first is that of all experiments."""
    options: tuple[str, ...]
    """Of experiments.frontier, for all of them."""
    settings: Settings
    calls: Path

    @property
    def runs(self) -> dict[str, Path]:
        """Folder of each run of the ablation; "full" is the frontier's."""
        return {name: self.root / name for name in ablation.runs_for(self.settings)}

    @property
    def pair_runs(self) -> dict[str, Path]:
        """Folder of each pair's run; the first is the frontier's."""
        first, *others = self.pairs
        return {first: self.runs[ablation.FULL]} | {name: self.root / f"pair-{name}" for name in others}

    def steps(self) -> list[Step]:
        """The six experiments; a run that two of them need is the same job in both."""
        variants = as_jobs(ablation.runs_for(self.settings), self.runs, self.options, self.calls)
        full = self.runs[ablation.FULL]
        others = dict(list(self.pairs.items())[1:])
        pairs = list(as_jobs(others, self.pair_runs, self.options, self.calls).values())
        return [
            Step(f"{self.env}: frontier", [variants[ablation.FULL]]),
            Step(
                f"{self.env}: ablation",
                list(variants.values()),
                lambda: _said(ablation.write(self.root, _open(self.runs))),
            ),
            Step(f"{self.env}: allocation", [], lambda: allocation.main([str(full)])),
            Step(f"{self.env}: cost_inversion", [], lambda: cost_inversion.main([str(full)])),
            Step(f"{self.env}: hard_budget", [_capped(full, self.settings.cpus)]),
            Step(f"{self.env}: model_pairs", pairs, lambda: _said(model_pairs.write(self.root, _open(self.pair_runs)))),
        ]


@dataclass(frozen=True, slots=True)
class Step:
    """One experiment on one benchmark."""

    name: str
    jobs: list[Job]
    """What it plays."""
    draw: Callable[[], int] = lambda: 0
    """What it then makes of it; returns an exit code."""


def _open(folders: dict[str, Path]) -> dict[str, FinishedRun]:
    return {name: open_finished(folder) for name, folder in folders.items()}


def _said(written: Sequence[Path]) -> int:
    print(*written, sep="\n")
    return 0


def _capped(full: Path, cpus: int) -> Job:
    """experiments.hard_budget on a run; finished when its table has all methods and caps, and is not older."""
    table, run, chosen = full / "figures" / "hard_budget.csv", full / "summary.json", full / CAPPED / CHOSEN

    def done() -> bool:
        if not all(p.is_file() for p in (table, table.with_suffix(".html"), run, chosen)):
            return False
        under, methods = pd.read_csv(table), set(pd.read_csv(full / "frontier.csv")["method"]) - {"oracle"}
        calls = under[under["unit"] == "calls"].groupby("method")["cap"].agg(set)
        whole = all(set(CALLS) <= calls.get(m, set()) for m in methods)
        return whole and table.stat().st_mtime >= run.stat().st_mtime

    command = ("experiments.hard_budget", str(full), "--cpus", str(cpus))
    return Job("every method under caps", full / CAPPED, command, done)


def benchmarks(envs: str, out: Path, options: Sequence[str]) -> list[Benchmark]:
    """What is to be run; raises ConfigError, before anything is, for what can't be."""
    names = [e for e in envs.split(",") if e]
    folders = {env: out / env.rpartition(":")[2].lower() for env in names}
    if not names or len(set(folders.values())) < len(names):
        raise ConfigError(f"envs={envs!r}: need one or more different benchmarks, e.g. {','.join(BENCHMARKS)}")
    settings_for("reproduce", options, TAKEN)
    found = []
    for env, root in folders.items():
        own = (*options, "--env", env)
        settings = settings_for("reproduce", own, ())
        pairs = model_pairs.default_pairs(settings)
        check_ready(env)
        model_pairs.check_pairs("reproduce", pairs, own)
        found.append(Benchmark(env, root, pairs, own, settings, out / "calls.db"))
    return found


def results_of(benchmark: Benchmark) -> Results:
    """What its experiments left."""
    run = open_finished(benchmark.runs[ablation.FULL])
    tables = [pd.read_csv(benchmark.root / f / f"{n}.csv") for _, n, f in FIGURES if n != "cost_inversion"]
    by_name = dict(zip(("ablation", "allocation", "pairs", "hard_budget"), tables, strict=True))
    return Results(run.env, run.evaluation(), run.boundaries, run.capped(), **by_name)


def setting_of(benchmark: Benchmark, run: FinishedRun) -> list[str]:
    """What was run, and what differs from the paper's setting: a sentence each."""
    s = load_settings(run.folder / "settings.yaml")
    pairs = ", ".join(f"{name} ({r.label})" for name, r in _open(benchmark.pair_runs).items())
    return [
        f"Setting: {env_label(run.env)}; pairs {pairs}; scale {s.scale}, lambdas {', '.join(map(str, s.lambdas))}, "
        f"training seeds {', '.join(map(str, s.seeds))}; prices {run.summary['price_hash']}.",
        f"Command of its frontier: {run.summary['command']}",
        *differences_of(run.env, env_label(run.env), str(run.summary["note"]), len(run.boundaries),
                        int(run.summary["n_tasks"]), s.max_steps, s.seeds),
    ]  # fmt: skip


def report(out: Path, done: Sequence[Benchmark], command: str, folders: Sequence[Path]) -> list[Path]:
    """Writes reproduce.html and reproduce.csv."""
    runs = {b.env: open_finished(b.runs[ablation.FULL]) for b in done}
    sections, rows = [], []
    for b in done:
        claims, setting = claims_of(results_of(b)), setting_of(b, runs[b.env])
        caution = tell(runs[b.env].summary).caution
        told = [tally(claims), *([caution] if caution else []), *setting]
        sections.append(Section(f"{b.env}: the paper's claims", told, (), table_of(claims)))
        rows += [_csv_row(b.env, claim, setting) for claim in claims]
    panels = {f"{env}: {run.label}": (run.frontier, run.summary) for env, run in runs.items()}
    labels = ", ".join(sorted({run.label for run in runs.values()}))
    noun = common_noun(run.summary for run in runs.values())
    frontiers = plots.frontiers_figure(panels, f"Success against {noun} on held-out tasks", labels)
    sections[-1] = dataclasses.replace(sections[-1], notes=NOTES)
    sections.append(Section(f"Figure 1: success against {noun}", (), [canvas.to_svg(frontiers, "frontiers")]))
    for heading, name, folder in FIGURES:
        svgs = [(b.root / folder / f"{name}.svg").read_text(encoding="utf-8") for b in done]
        sections.append(Section(heading, [", ".join(b.env for b in done)], svgs))
    paid = {*folders, *(study for folder in folders for study in studies(folder))}
    spent = f"All runs together have spent ${sum(map(spent_usd, paid)):.2f}."
    sections.append(Section("How to run it again", [f"Command: {command}", spent]))
    played = [run for b in done for run in _open(b.pair_runs).values()]
    notes = " ".join(dict.fromkeys(str(run.summary["note"]) for run in played))
    pd.DataFrame(rows).to_csv(out / "reproduce.csv", index=False)
    title = "Budget-aware agentic routing: the paper's claims and ours"
    return [write_page(out / "reproduce.html", title, f"{labels}. {notes}", sections), out / "reproduce.csv"]


def _csv_row(env: str, claim: Claim, setting: Sequence[str]) -> dict[str, object]:
    return {
        "benchmark": env, "where": claim.source, "claim": claim.text, "unit": str(claim.unit),
        "paper": "not known" if claim.paper is None else claim.paper, "ours": claim.ours.estimate,
        "ours_low": claim.ours.low, "ours_high": claim.ours.high, "reading": claim.reading,
        "setting": " ".join(setting[:2]), "differs": " ".join(setting[2:]),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    p = script_parser("reproduce", __doc__, allow_abbrev=False)
    p.add_argument("--out", type=Path, default=Path("results/reproduce"), help="folder of all runs and the report")
    p.add_argument("--envs", default=",".join(BENCHMARKS), help="benchmarks, by commas (default: all three)")
    args, options = p.parse_known_args(arguments)

    def work() -> int:
        todo = benchmarks(args.envs, args.out, options)
        steps = [step for benchmark in todo for step in benchmark.steps()]
        folders = list(dict.fromkeys(job.folder for step in steps for job in step.jobs))
        args.out.mkdir(parents=True, exist_ok=True)
        for i, step in enumerate(steps, 1):
            print(f"{i} of {len(steps)}: {step.name}", flush=True)
            if code := run_jobs(step.jobs, todo[0].settings.max_spend, folders) or step.draw():
                print(f"stopped at {i} of {len(steps)}: {step.name}; the same command goes on there", file=sys.stderr)
                return code
        command = f"python -m experiments.reproduce {shlex.join(arguments)}".strip()
        return _said(report(args.out, todo, command, folders))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
