"""Evaluation on held-out test tasks, the same for all, greedy unless the settings say otherwise; and what is made of
it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from importlib.metadata import version
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from rich.table import Table

from bopo_ray.analysis import canvas, plots, report, tables
from bopo_ray.analysis.bill import bill, sharing
from bopo_ray.analysis.cost_unit import COST_UNITS, cost_unit
from bopo_ray.analysis.studies import interval_text, task_difficulty
from bopo_ray.benchmarks import env_label
from bopo_ray.code import code_version
from bopo_ray.files import write_json
from bopo_ray.pipeline.baselines import (
    Policy,
    asked_for,
    matched_random,
    play_oracle,
    specs,
    trained_routers,
)
from bopo_ray.pipeline.calibrate import best_schedules, calibrated
from bopo_ray.pipeline.card import refresh_cards
from bopo_ray.pipeline.curves import training_curves
from bopo_ray.pipeline.run import Run
from bopo_ray.pipeline.stages import load_policy
from bopo_ray.pipeline.sweep import learned_policies
from bopo_ray.records import Budget, CostMode, Episode, EpisodeSpec, Phase
from bopo_ray.routers import ALWAYS_LARGE, ALWAYS_SMALL, LEARNED, Kind
from bopo_ray.store import EpisodeStore
from envs.base import Task

__all__ = ["evaluate_stage", "print_tables", "report_stage"]


def evaluate_stage(run: Run) -> pd.DataFrame:
    """Plays every policy on the test tasks; returns one row per episode, see `bopo_ray.analysis.tables`.

    Learned routers decide as `Settings.decide` says, with the offset chosen on dev tasks; each random(p) matches the
    share of large calls of one policy of the headline method. A baseline that an earlier command played here stays
    among the results, but for random ones, whose shares may be nobody's by now.
    """
    s, store, names = run.settings, run.store("evaluation"), asked_for(run)
    fixed = [Policy(n, n, n) for n in (ALWAYS_SMALL, ALWAYS_LARGE)]
    fixed += [Policy(str(n), n.family, str(n)) for n in names if n.kind in (Kind.FIXED, Kind.TRAINED)]
    if any(n.family == "best-schedule" for n in names):
        fixed += best_schedules(run)
    fixed = list({p.name: p for p in fixed}.values())  # --router may name a boundary policy

    def todo(policies: Iterable[Policy]) -> list[EpisodeSpec]:
        return [spec for p in policies for spec in specs(run.test, p, s, s.budget)]

    learned = calibrated(run, learned_policies(s, run.out))
    run.play("evaluating baselines", store, todo(fixed), routers=trained_routers(run, names))
    for policy in learned:
        if store.missing(todo([policy])):
            assert policy.folder is not None
            run.play(f"evaluating {policy.name}", store, todo([policy]), load_policy(run, policy.folder))
    headline = tables.headline({p.method for p in learned})
    matched = matched_random(store.read(Phase.EVALUATION), [p.name for p in learned if p.method == headline])
    run.play("evaluating random", store, todo(matched))
    policies = {p.name: p for p in (*fixed, *learned, *matched)}
    policies |= {p.name: p for p in _played_before(store, policies, len(run.test) * s.eval_samples)}
    episodes = [e for e in store.read(Phase.EVALUATION) if e.spec.policy in policies]
    if any(n.family == "oracle" for n in names):
        policies["oracle"] = Policy("oracle", "oracle", "oracle")
        episodes += play_oracle(run, episodes, todo([policies["oracle"]]))
    run.stop_runners()
    frame = pd.DataFrame([_row(e, policies[e.spec.policy]) for e in episodes])
    return frame.assign(difficulty=frame["task"].map(task_difficulty(frame)))


def _played_before(store: EpisodeStore, known: Container[str], whole: int) -> list[Policy]:
    """Baselines that are in the store, all `whole` episodes of them, and not asked for now."""
    counts = Counter(
        (e.spec.policy, e.spec.router)
        for e in store.read(Phase.EVALUATION)
        if e.spec.router != LEARNED and e.spec.policy not in known
    )
    found = [Policy(name, name.partition("(")[0], router) for (name, router), n in counts.items() if n == whole]
    return [p for p in found if p.method != "random"]


def _row(e: Episode, policy: Policy) -> dict[str, Any]:
    task: Task = e.spec.task
    calls = [*e.steps, *(s.question for s in e.steps if s.question)]
    return {
        "policy": policy.name, "method": policy.method, "lam": policy.lam, "train_seed": policy.seed,
        "task": task.name, "kind": task.kind, "member": e.spec.member, "success": e.success, "outcome": e.outcome,
        "score": e.score, "cost_usd": e.cost_microusd / 1e6, "large_calls": e.large_calls, "steps": len(e.steps),
        "prompt_tokens": sum(c.prompt_tokens for c in calls),
        "completion_tokens": sum(c.completion_tokens for c in calls), "stop": str(e.stop),
    }  # fmt: skip


def report_stage(run: Run, evaluation: pd.DataFrame, command: str) -> dict[str, Any]:
    """frontier.csv, .png and .svg, summary.json, report.html; prints the table. Returns the summary."""
    s, out = run.settings, run.out
    how = tables.Settings(cost=run.mode)
    frontier, summary = tables.frontier(evaluation, how), tables.summary(evaluation, how)
    label = f"{run.pool.label} pair"
    name = s.env.rpartition(":")[2].removesuffix("-v0")
    title = f"{name}: success against {COST_UNITS[run.mode].noun}, {len(run.test)} held-out tasks"
    title = f"{title} {budget_words(s.budget)}".strip()
    run.settle()
    spend = bill(run.episodes.rglob("part-*.parquet"), run.ledger().totals(), run.prices.cpu_hour_microusd)
    deterministic = all(run.temperature(m) == 0 for m in run.pool.models)
    shared = sharing(run.episodes.rglob("part-*.parquet"), deterministic, bool(run.settings.train_lambdas))
    boundaries = pq.read_table(out / "boundaries.parquet").to_pandas()
    taxonomy = {str(k): int(v) for k, v in boundaries["difficulty"].value_counts().items()}
    summary |= {
        "label": label, "note": run.pool.note, "env": s.env, "scale": s.scale, "taxonomy": taxonomy,
        "spend": spend.to_dict() | {"one_lambda_calls": shared.one_lambda, "sweep_to_one_lambda": shared.ratio},
        "budget": budget_words(s.budget),
        "bosft": json.loads((out / "bosft.json").read_text()), "price_hash": run.pool.price_hash, "command": command,
        "code": code_version(),
    }  # fmt: skip
    frontier.to_csv(out / "frontier.csv", index=False)
    write_json(out / "summary.json", summary)
    curves = training_curves(out)
    figures, narrow = (
        {
            "frontier": plots.frontier_figure(
                frontier, summary, title, label, run.pool.note.partition(";")[0], narrow=phone
            ),
            "taxonomy": plots.taxonomy_figure(boundaries, label=label, narrow=phone),
        }
        | ({"curves": plots.training_curves_figure(curves, label=label, narrow=phone)} if len(curves) else {})
        for phone in (False, True)
    )
    canvas.save_png(figures["frontier"], out / "frontier.png")
    descriptions = {"frontier": title, "taxonomy": "Tasks by difficulty", "curves": "Training curves"}
    svgs = {name: canvas.to_svg(figure, descriptions[name]) for name, figure in figures.items()}
    (out / "frontier.svg").write_text(svgs["frontier"], encoding="utf-8")
    context = report.ReportContext(
        title=title,
        label=run.pool.note,
        setting=report.Setting(
            environment=f"{env_label(s.env)}: {len(run.train)} training and {len(run.test)} test tasks, "
            f"{s.max_steps} steps each",
            models=tuple(m.name for m in run.pool.models),
            scale=f"{s.scale}: {len(s.lambdas)} lambdas, {s.updates} updates of {s.tasks_per_update} x {s.group_size}",
            seeds=s.seeds,
            command=command,
            prices=tuple(
                report.Price(m.name, m.price.input / 1e6, m.price.cached_input / 1e6, m.price.output / 1e6)
                for m in run.pool.models
            ),
            prices_date=run.models.prices_date,
            prices_hash=run.pool.price_hash,
            versions={"bopo_ray": code_version()}
            | {p: version(p) for p in ("ray", "torch", "transformers", "gymnasium", "scienceworld")},
        ),
        frontier=frontier,
        summary=summary,
        bill=spend,
        sharing=shared,
        taxonomy=taxonomy,
        frontier_svg=svgs["frontier"],
        taxonomy_svg=svgs["taxonomy"],
        curves_svg=svgs.get("curves"),
        narrow_svgs={name: canvas.to_svg(figure, descriptions[name]) for name, figure in narrow.items()},
        router_tokens=0 if s.backbone else s.context,
        episodes=_examples(run, frontier),
    )
    report.write_report(out / "report.html", context)
    refresh_cards(run, summary, command)
    print_tables(run, frontier, summary)
    return summary


def bill_line(spend: dict[str, Any]) -> str:
    """The bill in three sentences."""
    lost = f", {spend['lost_calls']:,} lost (at most ${spend['lost_usd']:.2f})" if spend["lost_calls"] else ""
    return (
        f"{spend['episodes']:,} episodes, {spend['calls']:,} model calls worth ${spend['cost_usd']:.2f}: "
        f"{spend['paid_calls']:,} calls paid (${spend['paid_usd']:.2f}), {spend['saved_calls']:,} answered from the "
        f"store (${spend['saved_usd']:.2f} saved){lost}. All lambdas together need {spend['sweep_to_one_lambda']:.2f} "
        f"times the calls of one. The router took {spend['router_ms']:.2f} ms a decision, "
        f"{spend['router_share']:.3%} of its bill."
    )


def budget_words(budget: Budget | None) -> str:
    """A hard cap in words, empty for none."""
    if budget is None:
        return ""
    cap = f"{budget.cap} large calls" if budget.mode is CostMode.CALLS else f"${budget.cap / 1e6:g}"
    return f"under a hard budget of {cap} per task"


def _examples(run: Run, frontier: pd.DataFrame, count: int = 4) -> list[Episode]:
    """A few evaluation episodes of the headline's middle policy, successes and one failure, for the viewer: first
    those in which both models were called."""
    own = frontier[frontier["method"] == tables.headline(set(frontier["method"]))]
    if not len(own):
        return []
    policy = own.sort_values("lam").iloc[len(own) // 2]["policy"]
    episodes = [e for e in run.store("evaluation").read(policy=policy) if e.steps]
    episodes.sort(key=lambda e: not 0 < e.large_calls < len(e.steps))
    good, bad = [e for e in episodes if e.success], [e for e in episodes if not e.success]
    good = good[: count - min(1, len(bad))]
    return good + bad[: count - len(good)]


def print_tables(run: Run, frontier: pd.DataFrame, summary: dict[str, Any]) -> None:
    """The operating points, the comparison of methods, the bill, and where the files are; one task has no intervals."""
    cap = f", {words}" if (words := budget_words(run.settings.budget)) else ""
    title = f"{len(run.test)} held-out tasks, {run.pool.label} pair{cap}; 95% bootstrap intervals over tasks"
    table = Table(title=title)
    for name in ("method", "lambda", "seed", "success", "mean score", "cost per task, $", "large calls", "front"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    exact = cost_unit(summary).column == "large_calls"
    for _, row in frontier.iterrows():
        learned, seed = not pd.isna(row["lam"]), row["train_seed"]
        table.add_row(
            row["method"] if learned else row["policy"], f"{row['lam']:g}" if learned else "",
            "" if pd.isna(seed) else f"{seed:.0f}", interval_text(row, "success", ".2f"), f"{row['score']:.1f}",
            interval_text(row, "cost_usd", ".4f"),
            interval_text(row, "large_calls", ".1f") if exact else f"{row['large_calls']:.1f}",
            "*" if row["on_front"] else "",
        )  # fmt: skip
    run.console.print(table)
    noun = cost_unit(summary).noun
    volumes = Table(title=f"hypervolume (success x {noun}; each method together with the two boundary policies)")
    for name in ("method", "hypervolume", f"{summary['headline']} less this", "p", "p, Holm"):
        volumes.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for method, v in sorted(summary["hypervolumes"].items(), key=lambda kv: -kv[1]["estimate"]):
        d = summary["differences"].get(method)
        volumes.add_row(
            method, _estimate(v, ".4f"), _estimate(d, "+.4f") if d else "",
            *("" if d is None or d[p] is None else f"{d[p]:.3f}" for p in ("p", "p_holm")),
        )  # fmt: skip
    run.console.print(volumes)
    run.console.print(f"{bill_line(summary['spend'])} {run.pool.note}")
    for name in ("report.html", "frontier.png", "frontier.csv", "summary.json"):
        run.console.print(f"  {run.out / name}", soft_wrap=True)


def _estimate(interval: Mapping[str, Any], form: str) -> str:
    """An interval of the summary in words."""
    return interval_text({"": interval["estimate"], "_low": interval["low"], "_high": interval["high"]}, "", form)
