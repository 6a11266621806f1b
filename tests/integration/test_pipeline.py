"""The main job from end to end, as a user runs it: its artefacts, their agreement, its continuation."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ray.rllib.core.rl_module import RLModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bopo_ray import History, load_router
from bopo_ray.analysis.bill import sharing
from bopo_ray.benchmarks import check_ready
from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.board import LAYOUT, board_command
from bopo_ray.pipeline.calibrate import ALL_LARGE, Tried, offsets_at
from bopo_ray.pipeline.curves import training_curves
from bopo_ray.pipeline.settings import load_settings
from experiments.audit import main as audit_main
from experiments.frontier import main
from experiments.hard_budget import main as hard_budget
from tests.integration.conftest import TOY, Frontier
from tests.toy import ID

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

SCALARS = (
    "reward/all", "success/all", "cost_usd/all", "large_calls/all", "share_large/all", "steps/all", "groups/skipped",
    "spend/cost_usd",
    "learner/kl", "learner/entropy", "learner/clip_fraction", "learner/gradient_norm", "learner/loss",
)  # fmt: skip


def strict_json(path: Path) -> Any:
    """Reads JSON that has no NaN and no Infinity."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{path} holds {name}"))


def points(out: Path) -> list[dict[str, str]]:
    with (out / "frontier.csv").open() as file:
        return list(csv.DictReader(file))


def check_results(run: Frontier, env: str) -> None:
    """All artefacts are there and agree with each other and with the stored episodes."""
    out, settings = run.out, load_settings(run.out / "settings.yaml")
    assert yaml.safe_load((out / "settings.yaml").read_text())["env"] == settings.env == env
    boundaries = pq.read_table(out / "boundaries.parquet").to_pylist()
    assert len(boundaries) == settings.train_tasks
    assert len(run.rows("boundary")) == settings.train_tasks * 2 * settings.k

    table, summary = points(out), strict_json(out / "summary.json")
    methods = {row["method"] for row in table} - {"random"}
    baselines = {"first-large", "last-large", "cascade", "task-level", "oracle"}
    assert methods == {"always-small", "always-large", "bosft", "grpo-vanilla", "bopo-hybrid"} | baselines
    learned = [(row["method"], float(row["lam"])) for row in table if row["lam"]]
    calibrated = bool(settings.shares)
    trained = ("bopo-hybrid", "grpo-vanilla", "bosft")[: 2 + calibrated]
    assert sorted(learned) == sorted((m, x) for m in trained for x in settings.lambdas)
    assert (out / "calibration.json").exists() == calibrated
    played = [*run.rows("evaluation").values(), *run.rows("oracle").values()]
    for row in table:
        own = [e for e in played if e["policy"] == row["policy"]]
        assert len(own) == settings.test_tasks * settings.eval_samples == int(row["n_episodes"])
        assert float(row["success"]) == pytest.approx(sum(e["success"] for e in own) / len(own))
        assert float(row["cost_usd"]) == pytest.approx(sum(e["cost_microusd"] for e in own) / len(own) / 1e6)
        assert float(row["success_low"]) <= float(row["success"]) <= float(row["success_high"])
    summarised = {p["policy"]: p for p in summary["points"]}
    assert summarised.keys() == {row["policy"] for row in table} and len(summarised) == len(table)
    for row in table:
        point = summarised[row["policy"]]
        assert float(row["cost_usd_low"]) == point["cost_usd_low"] <= point["cost_usd"] <= point["cost_usd_high"]
    assert {"bopo-hybrid", "grpo-vanilla", "bosft", "first-large"} <= set(summary["hypervolumes"])
    for volume in summary["hypervolumes"].values():
        assert 0 <= volume["low"] <= volume["estimate"] <= volume["high"] < math.inf
    assert all(sum(s.values()) == pytest.approx(1) for s in summary["spend_by_difficulty"].values())
    assert summary["spend_by_difficulty"].keys() == {row["method"] for row in table}
    assert sum(summary["taxonomy"].values()) == settings.train_tasks
    assert summary["taxonomy"] == {d: sum(b["difficulty"] == d for b in boundaries) for d in summary["taxonomy"]}
    stores = [run.rows(s) for s in ("boundary", "stratified", "policy", "dev", "evaluation", "oracle")]
    episodes = {k: e for rows in stores for k, e in rows.items()}
    assert len(episodes) == sum(map(len, stores)) == summary["spend"]["episodes"]
    assert sum(len(e["steps"]) for e in episodes.values()) == summary["spend"]["calls"]
    spent = sum(s["cost_microusd"] for e in episodes.values() for s in e["steps"])
    bill = summary["spend"]
    assert spent == pytest.approx(bill["cost_usd"] * 1e6, abs=0.5)
    assert bill["paid_calls"] + bill["saved_calls"] == bill["calls"] and bill["lost_calls"] == 0
    shards = out.glob("episodes/**/part-*.parquet")
    different = sharing(shards, deterministic=False, trained_for_all=bool(settings.train_lambdas))
    assert bill["paid_calls"] == different.calls < bill["calls"], "each different call is paid once"
    assert bill["one_lambda_calls"] == different.one_lambda and set(different.one_lambda) == {
        f"{lam:g}" for lam in settings.lambdas
    }
    assert 1 <= bill["sweep_to_one_lambda"] < 2 and bill["decisions"] > 0 and bill["router_ms"] > 0
    assert "calls paid" in run.said("stdout") and audit_main([str(out)]) == 0

    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (out / "frontier.svg").read_text().startswith("<svg")
    page = (out / "report.html").read_text()
    fetched = re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']?([^"'\s>]+)|url\(([^)]+)\)|@import""", page)
    assert [a or b for a, b in fetched if not (a or b).startswith(("#", "data:", "'#", '"#'))] == []
    assert "default-src 'none'" in page
    label, means = ("self-trained", "of our own") if settings.models == "embedded" else ("simulated", "Simulated")
    assert html.escape(summary["note"]).replace("&#x27;", "&#39;") in page and f"{label} pair" in page
    assert summary["label"] == f"{label} pair" and means in summary["note"]
    assert f"{label} pair" in run.said("stdout")
    for name in ("report.html", "frontier.png", "frontier.csv", "summary.json"):
        assert str(out / name) in run.said("stdout")
    assert f"TensorBoard:   {board_command(out)}\n" in run.said("stdout") and "Ray dashboard: " in run.said("stdout")
    check_scalars(out, settings.updates, settings.tasks_per_update, set(summary["taxonomy"]))


def test_an_offset_is_chosen_on_dev_tasks_and_a_seed_may_be_added_to_a_finished_run(
    tmp_path: Path, ray_session: Any
) -> None:
    options = ("--shares", "0.3,0.9", "--call-limits", "2", "--updates", "1", "--advantage", "hybrid")
    run = Frontier(tmp_path, (*TOY, *options))
    assert run.run() == 0, run.said()
    first = strict_json(run.out / "calibration.json")
    check_offsets(run, first, seeds=(0,))
    before = {store: run.rows(store) for store in ("boundary", "stratified", "policy", "dev", "evaluation")}

    assert run.run("--seeds", "0,1", "--resume") == 0, run.said()
    chosen = strict_json(run.out / "calibration.json")
    assert chosen.items() >= first.items()
    check_offsets(run, chosen, seeds=(0, 1))
    assert load_settings(run.out / "settings.yaml").seeds == (0, 1)
    after = {store: run.rows(store) for store in before}
    assert all(after[store].items() >= rows.items() for store, rows in before.items())
    assert [len(after[s]) - len(before[s]) for s in ("boundary", "stratified", "policy")] == [0, 0, 2 * 16]
    assert set(strict_json(run.out / "ledger.json")) == {
        f"bopo-hybrid_lam{lam:g}_seed{seed}" for lam in (0.2, 0.8) for seed in (0, 1)
    }

    assert hard_budget([str(run.out), "--calls", "1", "--usd", "", "--methods", "bopo-hybrid,bosft"]) == 0
    own = run.rows("../hard-budget/episodes/dev").values()
    for folder in ("bosft", *strict_json(run.out / "ledger.json")):
        met = [s["probabilities"] for s in steps(run.out, "dev", f"{folder}_offset0")]
        tried = {Tried(x).name_of(folder) for x in (0, *offsets_at(met, (0.3, 0.9)))}
        assert {e["policy"] for e in own if e["policy"].startswith(f"{folder}_offset")} == tried
    assert {(e["budget_cap"], e["large_calls"] <= 1) for e in own} == {(1, True)}
    points = pd.read_csv(run.out / "frontier.csv")
    schedules = set(points["policy"][points["method"].isin(("always-large", "first-large"))])
    assert {e["policy"] for e in own if "_offset" not in e["policy"]} == schedules
    chosen_under = pd.read_csv(run.out / "hard-budget" / "chosen.csv")
    assert len(chosen_under) == 1 + 2, "one of each training seed"
    for row in chosen_under.to_dict("records"):
        router = load_router(run.out / "hard-budget" / "policies" / row["router"])
        decides = router.decide(History("boil water", "A kitchen.", 9)).model
        if row["policy"] in schedules:  # the router is that schedule
            assert decides == 1 and row["setting"] == row["policy"]
        else:
            assert row["policy"] in {e["policy"] for e in own}
        assert router.call_limit == 1, "the cap, which all schedules are above"
        card = (run.out / "hard-budget" / "policies" / row["router"] / "README.md").read_text()
        assert "cap 1 calls" in card and "95% bootstrap intervals" in card


def check_offsets(run: Frontier, chosen: dict[str, list[Any]], seeds: tuple[int, ...]) -> None:
    """Each offset, and its limit of calls, is the best of those tried on dev tasks; the offset is in the weights of the
    router that was evaluated, and the evaluation was held to the limit."""
    points = [f"bopo-hybrid_lam{{}}_seed{seed}" for seed in seeds]
    assert chosen.keys() == {name.format(lam) for name in (*points, "bosft_lam{}") for lam in (0.2, 0.8)}
    dev = list(run.rows("dev").values())
    for name, (offset, limit) in chosen.items():
        folder, lam = name if name.startswith("bopo") else "bosft", float(name.partition("lam")[2].partition("_")[0])
        tried = {e["policy"] for e in dev if e["policy"].startswith(f"{folder}_offset")}
        as_it_is = [s["probabilities"] for s in steps(run.out, "dev", f"{folder}_offset0")]
        assert tried == {Tried(x).name_of(folder) for x in (0, *offsets_at(as_it_is, (0.3, 0.9)))} | {
            Tried(x, 2).name_of(folder) for x in (0, *offsets_at(as_it_is, (0.3, 0.9)), ALL_LARGE)
        }
        models = [[s["model"] for s in e["steps"]] for e in dev if e["policy"] == Tried(ALL_LARGE, 2).name_of(folder)]
        assert models and all(own == [int(i < 2) for i in range(len(own))] for own in models), "first-large(2)"
        limited = [e for e in dev if e["policy"] in tried and e["policy"].endswith("_calls2")]
        assert all((e["budget_cap"], e["large_calls"] <= 2) == (2, True) for e in limited)
        assert {e["large_calls"] for e in limited} >= {2}, "the limit is one"
        scores = {policy: gain(dev, policy, lam) for policy in tried}
        assert scores[Tried(offset, limit).name_of(folder)] == max(scores.values())
        policy = Tried(offset, limit).name_of(name)
        own = [e for e in run.rows("evaluation").values() if e["policy"] == policy]
        assert len(own) == 4 and {e["budget_cap"] for e in own} == {limit}
        evaluated = steps(run.out, "evaluation", policy)
        assert evaluated and all(s["model"] == np.argmax(s["probabilities"]) for s in evaluated)
        card = (run.out / "policies" / policy / "README.md").read_text()
        assert f"offset {offset:g}" in card and "95% bootstrap intervals" in card and "--shares 0.3,0.9" in card
        assert (f"call limit {limit}" in card) == (limit is not None)
        assert load_router(run.out / "policies" / policy).call_limit == limit
        before, after = (policy_of(run.out / "policies" / n) for n in (folder, policy))
        assert after["head.bias"] - before["head.bias"] == pytest.approx([0, offset])
    learned_on = {e["task"] for store in ("policy", "evaluation") for e in run.rows(store).values()}
    assert not {e["task"] for e in dev} & learned_on


def test_a_run_may_count_calls_of_the_large_model_instead_of_dollars(tmp_path: Path) -> None:
    """What BoSFT imitates, what is chosen on dev tasks, the oracle, the frontier and its hypervolume: all in calls."""
    options = ("--cost", "calls", "--shares", "0.3,0.9", "--updates", "1", "--lambdas", "0.3", "--advantage", "hybrid")
    run = Frontier(tmp_path, (*TOY, *options))
    assert run.run() == 0, run.said()
    hard = {b["task"] for b in pq.read_table(run.out / "boundaries.parquet").to_pylist() if b["difficulty"] == "hard"}
    strata, large = (
        {task: [e["large_calls"] for e in played if e["task"] == task and e["success"]] for task in hard}
        for played in (
            run.rows("stratified").values(),
            [e for e in run.rows("boundary").values() if e["policy"] == "always-large"],
        )
    )
    wins = {task: calls for task in hard if (calls := strata[task] or large[task])}
    taught = pa.concat_tables(pq.read_table(shard) for shard in (run.out / "experts").glob("*.parquet")).to_pylist()
    assert wins and {e["task"]: sum(e["labels"]) for e in taught if e["task"] in wins} == {
        task: min(calls) for task, calls in wins.items()
    }

    (update,) = training_curves(run.out).to_dict("records")
    learned_from = list(run.rows("policy").values())
    assert update["large_calls"] == pytest.approx(np.mean([e["large_calls"] for e in learned_from]))
    steps_of = {b["task"]: b["steps_large"] for b in pq.read_table(run.out / "boundaries.parquet").to_pylist()}
    reward = [
        e["outcome"] * (1.5 if e["task"] in hard else 1.0) - 0.3 * min(1.0, e["large_calls"] / steps_of[e["task"]])
        for e in learned_from
    ]
    assert update["reward"] == pytest.approx(np.mean(reward)) and {e["large_calls"] for e in learned_from} > {0}

    summary, played = strict_json(run.out / "summary.json"), list(run.rows("evaluation").values())
    large = np.mean([e["large_calls"] for e in played if e["policy"] == "always-large"])
    assert summary["reference"] == {"large_calls": pytest.approx(1.1 * large), "success": 0.0}
    assert "hypervolume (success x large calls" in run.said("stdout")
    assert "Success against large calls" in (run.out / "report.html").read_text()
    for own in run.rows("oracle").values():
        ends = [e for e in played if e["task"] == own["task"]]
        won = [e["large_calls"] for e in ends if e["success"]]
        assert own["success"] == bool(won) and own["large_calls"] == min(won or [e["large_calls"] for e in ends])
    dev = list(run.rows("dev").values())
    for name, (offset, _) in strict_json(run.out / "calibration.json").items():
        folder = name if name.startswith("bopo") else "bosft"
        scores = {p: gain(dev, p, 0.3, "large_calls") for p in {e["policy"] for e in dev if folder in e["policy"]}}
        assert scores[Tried(offset).name_of(folder)] == max(scores.values())
    assert audit_main([str(run.out)]) == 0


def steps(out: Path, store: str, policy: str) -> list[dict[str, Any]]:
    """Of a policy's stored episodes, with the router's probabilities."""
    shards = (out / "episodes" / store).rglob("part-*.parquet")
    rows = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    return [step for row in rows if row["policy"] == policy for step in row["steps"]]


def policy_of(folder: Path) -> dict[str, Any]:
    """The router's weights, by name."""
    module: Any = RLModule.from_checkpoint(str(folder.resolve()))
    return {name: value.detach().numpy() for name, value in module.policy.state_dict().items()}


def gain(episodes: list[dict[str, Any]], policy: str, lam: float, cost: str = "cost_microusd") -> float:
    """Mean of u - lambda * C_norm of a policy, worked out from the stored rows."""

    def mean(name: str, task: str, figure: str) -> float:
        own = [float(e[figure]) for e in episodes if e["policy"] == name and e["task"] == task]
        return sum(own) / len(own)

    tasks = sorted({e["task"] for e in episodes})
    bounds = {t: sorted(mean(b, t, cost) for b in ("always-small", "always-large")) for t in tasks}
    least = 0.1 * median(high for _, high in bounds.values())
    total = 0.0
    for task, (low, high) in bounds.items():
        share = (mean(policy, task, cost) - low) / max(high - low, least)
        total += mean(policy, task, "outcome") - lam * min(1.0, max(0.0, share))
    return total / len(tasks)


def check_scalars(out: Path, updates: int, groups: int, classes: set[str]) -> None:
    """TensorBoard finds every promised curve of every point, over all updates, and how to lay them out."""
    points = json.loads((out / "ledger.json").read_text())
    assert sorted(p.name for p in (out / "tensorboard").iterdir()) == sorted(points)
    assert not list((out / "tune").rglob("events.out.tfevents.*")), "one place for TensorBoard's logs"
    seen: set[str] = set()
    skipped: list[float] = []
    for name in points:
        events = EventAccumulator(str(out / "tensorboard" / name))
        events.Reload()
        tags = set(events.Tags()["scalars"])
        seen |= tags
        for tag in SCALARS[:8]:
            assert [e.step for e in events.Scalars(tag)] == list(range(1, updates + 1)), tag
        skipped += [e.value for e in events.Scalars("groups/skipped")]
        assert "custom_scalars__config__" in events.Tags()["tensors"]
    # A point whose groups all came out alike takes no gradient step and logs none.
    learned = min(skipped) < groups
    assert set(SCALARS if learned else SCALARS[:8]) <= seen
    shown = {c for c in classes if f"success/{c}" in seen}
    assert "hard" in shown
    for c in shown:
        assert {f"{measure}/{c}" for measure in ("success", "cost_usd", "large_calls", "share_large")} <= seen
    charted = {tag.strip("^$") for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags}
    assert seen - charted == {tag for tag in seen if tag.startswith(("spend/", "steps/"))}


def test_toy_from_end_to_end(toy_run: Frontier) -> None:
    check_results(toy_run, ID)


def test_what_is_taught_and_learned_hears_other_draws_than_what_made_a_task_hard(toy_run: Frontier) -> None:
    """By those of always-small's failures the small model would look worse than it is."""
    boundary, stratified, policy = (
        {(e["task"], e["member"] if e["sample"] is None else e["sample"]) for e in toy_run.rows(store).values()}
        for store in ("boundary", "stratified", "policy")
    )
    assert boundary and stratified and policy
    assert not (boundary & stratified or boundary & policy or stratified & policy)


def test_a_finished_run_is_not_played_again(
    toy_run: Frontier, tmp_path: Path, ray_session: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    again = Frontier(tmp_path, toy_run.options)
    shutil.copytree(toy_run.out, again.out)
    episodes = {p: p.stat().st_mtime_ns for p in again.out.glob("episodes/**/*.parquet")}
    assert main([*again.arguments, "--resume"]) == 0
    assert {p: p.stat().st_mtime_ns for p in again.out.glob("episodes/**/*.parquet")} == episodes
    assert len(list(again.out.glob("tune/attempt-*"))) == 1 and not list(again.out.glob("tune/*/*/checkpoint_*"))
    wanted, found = strict_json(toy_run.out / "summary.json"), strict_json(again.out / "summary.json")
    assert "--resume" in found.pop("command") and "--resume" not in wanted.pop("command")
    assert found == wanted
    assert (again.out / "frontier.csv").read_bytes() == (toy_run.out / "frontier.csv").read_bytes()
    capsys.readouterr()

    # An episode that two shards hold counts once.
    shard = next(again.out.glob("episodes/boundary/part-*.parquet"))
    shutil.copy(shard, shard.with_name("part-000000000000.parquet"))
    assert main([*again.arguments, "--resume"]) == 0
    assert strict_json(again.out / "summary.json")["spend"] == wanted["spend"]


def test_routers_are_added_to_a_finished_run(
    toy_run: Frontier, tmp_path: Path, ray_session: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    again = Frontier(tmp_path, toy_run.options)
    shutil.copytree(toy_run.out, again.out)
    more = ("--router", "prompted,one-step", "--router", "task-knn:3,best-schedule,always-small", "--max-spend", "1")
    assert main([*again.arguments, "--resume", *more]) == 0
    added = {"prompted", "one-step(0.2)", "task-knn(3)", "best-schedule(0.2)", "best-schedule(0.8)"}
    before, after = ({row["policy"]: row for row in points(r.out)} for r in (toy_run, again))
    assert after.keys() == before.keys() | added
    same = before.keys() - {"oracle"}  # which knows more now
    measured = ("success", "cost_usd", "large_calls")
    assert all(after[p][m] == before[p][m] for p in same for m in measured)
    assert float(after["oracle"]["success"]) == max(float(row["success"]) for row in after.values())
    questions = [s["question"] for e in again.rows("evaluation").values() for s in e["steps"] if s["question"]]
    assert questions and {e["split"] for e in again.rows("dev").values()} == {"dev"}
    assert audit_main([str(again.out)]) == 0, capsys.readouterr().out
    # without asking for them again they stay
    assert main([*again.arguments, "--resume"]) == 0
    assert {row["policy"] for row in points(again.out)} == after.keys()


def test_a_folder_that_holds_another_run_is_refused(toy_run: Frontier, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in toy_run.out.rglob("*") if p.name != ".lock"}
    for more, named in (
        ((), ("holds a run already", "--resume")),
        (("--resume", "--lambdas", "0.5"), ("lambdas=(0.2, 0.8)", "(0.5,)", "choose another --out")),
    ):
        assert main([*toy_run.arguments, *more]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1
        for part in (*named, str(toy_run.out)):
            assert part in line
    assert {p: p.stat().st_mtime_ns for p in toy_run.out.rglob("*") if p.name != ".lock"} == before


def test_the_gate_refuses_a_router_that_never_asks_the_large_model(
    toy_run: Frontier, tmp_path: Path, ray_session: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    again = Frontier(tmp_path, toy_run.options)
    shutil.copytree(toy_run.out, again.out)
    figures = json.loads((again.out / "bosft.json").read_text())
    (again.out / "bosft.json").write_text(json.dumps(figures | {"p_large_hard": 0.004}))
    assert main([*again.arguments, "--resume"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert "0.004" in line and "--ignore-gate" in line


def test_the_gate_can_be_ignored_as_its_line_says(toy_run: Frontier, tmp_path: Path, ray_session: Any) -> None:
    again = Frontier(tmp_path, toy_run.options)
    shutil.copytree(toy_run.out, again.out)
    assert main([*again.arguments, "--resume", "--ignore-gate"]) == 0


@pytest.mark.parametrize(
    ("env", "label"),
    [
        ("ScienceWorld-v0", "ScienceWorld-v0"),
        ("ALFWorld-v0", "ALFWorld-v0 (ALFWorld engine, own layouts)"),
        ("AppWorld-v0", "AppWorld-v0 (AppWorld engine, own tasks)"),
    ],
)
def test_each_benchmark_from_end_to_end(env: str, label: str, tmp_path: Path) -> None:
    try:
        check_ready(env)
    except ConfigError as error:
        pytest.skip(str(error))
    run = Frontier(tmp_path, ("--scale", "tiny", "--env", env, "--lambdas", "0.2", "--cpus", "2"))
    assert run.run() == 0, run.said()
    check_results(run, env)
    scores = {e["score"] for e in run.rows("boundary").values()}
    assert len(scores) > 1
    assert f"{label}: 6 training and 4 test tasks" in (run.out / "report.html").read_text()
