"""The scripts on a finished run: their files, their one line for a mistake, and caps that hold."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from bopo_ray import Budget, CostMode, History, load_router
from bopo_ray.pipeline import jobs
from bopo_ray.pipeline.jobs import spent_usd
from bopo_ray.pipeline.settings import load_settings, save
from bopo_ray.rllib.saved import about
from experiments import (
    ablation,
    allocation,
    cost_inversion,
    counterfactual,
    hard_budget,
    headroom,
    model_pairs,
    reproduce,
)
from experiments.audit import main as audit_main
from experiments.frontier import as_jobs, parser, settings_of
from tests.integration.conftest import ROOT, TOY, Frontier, ledger
from tests.toy import ID

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


@pytest.mark.parametrize("script", [allocation, cost_inversion, counterfactual, hard_budget, headroom])
def test_a_folder_without_a_finished_run(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, script.main([str(tmp_path)]))
    assert str(tmp_path) in line and "summary.json" in line and "--resume" in line
    assert list(tmp_path.iterdir()) == []


def test_inversions_and_allocation_of_a_run(
    toy_run: Frontier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for script, name in ((cost_inversion, "cost_inversion"), (allocation, "allocation")):
        assert script.main([str(toy_run.out), "--out", str(tmp_path)]) == 0
        assert str(tmp_path / f"{name}.html") in capsys.readouterr().out
        assert {p.suffix for p in tmp_path.glob(f"{name}.*")} == {".html", ".csv", ".png", ".svg"}
        assert "simulated pair. Simulated executors" in (tmp_path / f"{name}.html").read_text()
    inverted, shares = pd.read_csv(tmp_path / "cost_inversion.csv"), pd.read_csv(tmp_path / "allocation.csv")
    boundary = pd.DataFrame(toy_run.rows("boundary").values())
    costs = boundary.groupby(["task", "policy"])["cost_microusd"].mean().unstack() / 1e6
    for row in inverted.to_dict("records"):
        assert row["inverted"] == (costs.loc[row["task"], "always-small"] > costs.loc[row["task"], "always-large"])
    played = pd.DataFrame([*toy_run.rows("evaluation").values(), *toy_run.rows("oracle").values()])
    frontier = pd.read_csv(toy_run.out / "frontier.csv")
    dollars = played.merge(frontier[["policy", "method"]]).groupby("method")["cost_microusd"].sum() / 1e6
    assert shares.groupby("method")["spend_usd"].sum().to_dict() == pytest.approx(dollars.to_dict())
    line = refused(capsys, cost_inversion.main([str(toy_run.out), str(toy_run.out), "--out", str(tmp_path)]))
    assert "two runs of one benchmark" in line


def test_an_ablation_is_runs_on_one_store_and_a_paired_comparison(
    toy_run: Frontier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def frontier(command: list[str]) -> int:
        """As good as `experiments.frontier`, without its minutes."""
        commands.append(command)
        shutil.copytree(toy_run.out, command[-1], dirs_exist_ok=True)
        return 0

    monkeypatch.setattr(jobs, "run_process", frontier)
    out = tmp_path / "ablation"
    assert ablation.main(["--out", str(out), "--env", ID, "--lambdas=0.2"]) == 0
    own = {
        "full": ["--advantage", "hybrid,augmented,vanilla"],
        "no-bosft": ["--advantage", "hybrid", "--sft-epochs", "0"],
        "no-bonus": ["--advantage", "hybrid", "--beta", "0"],
        "absolute": ["--advantage", "hybrid", "--cost-scale", "absolute"],
    }
    for command, (folder, options) in zip(commands, own.items(), strict=True):
        assert command[3:] == ["--env", ID, "--lambdas=0.2", *options, "--calls", str(out / "calls.db"),
                               "--resume", "--out", str(out / folder)]  # fmt: skip
    table = pd.read_csv(out / "ablation.csv").set_index("variant")
    without = {"without BoSFT", "without bonus", "without normalised cost"}
    assert set(table.index) == {"bopo-hybrid", "grpo-vanilla", "boundary only"} | without
    for same in without:  # here they are the whole method's own episodes
        assert table.loc[same, "estimate"] == table.loc["bopo-hybrid", "estimate"]
        assert (table.loc[same, "less_estimate"], table.loc[same, "less_p_holm"]) == (0, 1)
    assert "without BoSFT" in (out / "ablation.html").read_text() and (out / "ablation.png").exists()

    # A benchmark that has additions of ours by default has a run without them, and without the value that routers read.
    commands.clear()
    assert ablation.main(["--out", str(tmp_path / "added"), "--env", "ALFWorld-v0", "--shares", "0.2"]) == 0
    assert commands[-1][3:] == [
        "--env", "ALFWorld-v0", "--shares", "0.2", "--advantage", "hybrid", "--strata", "10", "--schedules", "0",
        "--reliability", "0", "--sharpness", "1", "--train-lambdas", "", "--shares", "", "--call-limits", "",
        "--boundary-value", "0", "--calls", str(tmp_path / "added" / "calls.db"), "--resume", "--out",
        str(tmp_path / "added" / "paper"),
    ]  # fmt: skip
    paper = settings_of(parser().parse_args(commands[-1][3:]))
    assert (paper.schedules, paper.reliability, paper.shares) == ((0,), 0, ()) and not paper.boundary_value
    assert (paper.call_limits, paper.strata) == ((), 10)
    assert [Path(c[-1]).name for c in commands] == [*own, "no-value", "paper"]
    assert "without our additions" in (tmp_path / "added" / "ablation.html").read_text()

    monkeypatch.setattr(jobs, "run_process", lambda command: 3)
    assert ablation.main(["--out", str(out)]) == 3, "the run's own exit code"
    capsys.readouterr()
    for taken in ("--beta=1", "--cost-scale=absolute"):
        line = refused(capsys, ablation.main(["--out", str(out), taken]))
        assert f"{taken.partition('=')[0]}: the ablation sets it itself" in line
    line = refused(capsys, ablation.main(["--out", str(out), "--env", ID, "--parts", "paper"]))
    assert "--parts=paper: with these settings it may name full, no-bosft, no-bonus, absolute" in line
    assert "one benchmark at a time" in refused(capsys, ablation.main(["--out", str(out), "--env", "all"]))
    assert "lambdas=(-1.0,)" in refused(capsys, ablation.main(["--out", str(tmp_path / "no"), "--lambdas=-1"]))
    assert not (tmp_path / "no").exists()


@pytest.fixture(scope="module")
def pairs(toy_run: Frontier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where experiments.model_pairs has run on two pairs, of which the first was finished before."""
    out = tmp_path_factory.mktemp("pairs")
    shutil.copytree(toy_run.out, out / "one")
    assert model_pairs.main(["--out", str(out), *TOY, *TWO_PAIRS]) == 0
    return out


TWO_PAIRS = ("--pair", "one=simulated", "--pair", "two=simulated-llama", "--max-spend", "50")


def test_model_pairs_are_a_run_each_under_one_limit_and_are_not_run_twice(
    pairs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (load_settings(pairs / name / "settings.yaml") for name in ("one", "two"))
    assert second.max_spend == pytest.approx(50 - spent_usd(pairs / "one")), "what the first has left"
    assert spent_usd(pairs / "one") > spent_usd(pairs / "two") > 0, "each at prices of its own"
    assert (first.models, second.models) == ("simulated", "simulated-llama")
    assert second == dataclasses.replace(
        first, models="simulated-llama", max_spend=second.max_spend, calls=str(pairs / "calls.db")
    )

    out = pairs
    table = pd.read_csv(out / "model_pairs.csv").set_index("pair")
    assert {p.suffix for p in out.glob("model_pairs.*")} == {".html", ".csv", ".png", ".svg"}
    for name, row in table.iterrows():
        summary = json.loads((out / name / "summary.json").read_text())
        points = {p["method"]: p for p in summary["operating_points"]}
        assert row["success_large"] == points["always-large"]["success"]
        assert row["cost_ratio"] == pytest.approx(
            points["always-large"]["cost_usd"] / points["always-small"]["cost_usd"]
        )
        assert row["less"] == pytest.approx(row["bopo"] - row["baseline"])
    page = (out / "model_pairs.html").read_text()
    assert "Llama-3.1-70B" in page and "GPT-4.1" in page and "two: simulated pair" not in page.partition("<svg")[0]

    capsys.readouterr()
    monkeypatch.setattr(jobs, "run_process", lambda command: pytest.fail("a finished run was started again"))
    assert model_pairs.main(["--out", str(out), *TOY, *TWO_PAIRS]) == 0
    assert f"run 2 of 2, two (--models simulated-llama): {out / 'two'} is finished" in capsys.readouterr().out


def test_a_run_is_finished_only_when_it_has_all_that_is_asked_for(toy_run: Frontier, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(toy_run.out, out)

    def done(*options: str) -> bool:
        return as_jobs({"run": options}, {"run": out}, TOY, Path(""))["run"].done()

    assert done() and done("--max-spend", "3")
    for more in (("--lambdas", "0.2,0.5,0.8"), ("--advantage", "hybrid,augmented,vanilla"), ("--router", "cascade:2")):
        assert not done(*more)
    assert not done("--lambdas", "0.2") and not done("--beta", "0"), "the run itself then says what is wrong"
    (out / "settings.yaml").touch()  # it was started again, with more, and killed before its report
    assert not done()

    summary, counts = (out / "summary.json").read_text(), ("--cost", "calls")
    save(dataclasses.replace(load_settings(out / "settings.yaml"), cost="calls"), out / "settings.yaml")
    (out / "report.html").touch()
    (out / "summary.json").write_text(summary.replace('"cost": "usd"', '"cost": "calls"'))
    assert done(*counts) and not done()
    (out / "summary.json").write_text(summary.replace('"cost": "usd",', ""))
    assert not done(*counts), "it was judged in dollars, before there was another unit"
    (out / "summary.json").write_text(summary[:99])
    assert not done(*counts)


def test_pairs_that_there_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs"
    two = ["--pair", "a=simulated", "--pair"]
    for arguments, named in (
        (["--pair", "simulated"], ["'simulated'", "NAME=SPEC"]),
        (["--pair", "../x=simulated"], ["'../x=simulated'", "NAME of letters"]),
        (["--pair", "simulated-llama=simulated"], ["pair=simulated-llama=", "a default pair", "give another"]),
        ([*two, "a=embedded"], ["second pair of the name a"]),
        ([*two, "b=gpt-9"], ["unknown models 'gpt-9'", "simulated-llama"]),
        ([*two, "b=embedded:nowhere"], ["'embedded:nowhere'"]),
        ([*two, "b=missing.yaml"], ["missing.yaml", "can't be read"]),
        ([*two, "b=simulated-llama", "--models", "simulated"], ["--models: model_pairs sets it itself"]),
        ([*two, "b=simulated-llama", "--small", "openai:a"], ["--small: model_pairs sets it itself"]),
        (["--small", "openai:a"], ["--small='openai:a' without --large"]),
        (["--small", "openai:a", "--large", "openai:b"], ["'a'", "price"]),
        (["--models", "embedded:alfworld"], ["was trained for ALFWorld-v0, not for ScienceWorld-v0"]),
        (["--env", "all"], ["one benchmark at a time"]),
    ):
        line = refused(capsys, model_pairs.main(["--out", str(out), *arguments]))
        assert all(part in line for part in named), line
    assert not out.exists()


def test_every_policy_under_caps(
    toy_run: Frontier, tmp_path: Path, ray_session: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Frontier(tmp_path, toy_run.options).out
    shutil.copytree(toy_run.out, out)
    command = [str(out), "--calls", "0,2", "--usd", "0.0015", "--cpus", "2"]
    assert hard_budget.main(command) == 0
    table = pd.read_csv(out / "figures" / "hard_budget.csv")
    methods = set(pd.read_csv(out / "frontier.csv")["method"]) - {"oracle"}
    assert set(table["method"]) == methods and len(table) == 3 * len(methods)
    assert table["overspends"].sum() == 0 and table["cap_used"].max() <= 1 and table["cap_used"].max() > 0.5
    none = table[(table["unit"] == "calls") & (table["cap"] == 0)]
    assert none["large_calls"].sum() == 0 and set(none["success"]) == set(
        table[(table["unit"] == "calls") & (table["method"] == "always-small")]["success"]
    ), "without a large call each method is always-small"
    large = table[(table["method"] == "always-large") & (table["cap"] == 2)]
    assert large["large_calls"].item() == 2.0
    assert audit_main([str(out)]) == audit_main([str(out / "hard-budget")]) == 0
    assert ledger(Frontier(tmp_path)).totals() == ledger(toy_run).totals(), "the finished run's bill is as it was"

    chosen = pd.read_csv(out / "hard-budget" / "chosen.csv")
    played = [e for f in (out / "hard-budget").rglob("part-*.parquet") for e in pq.read_table(f).to_pylist()]
    test = [e for e in played if e["phase"] == "evaluation"]
    assert {e["policy"] for e in test} == set(chosen["policy"]), "test tasks are played with what was chosen alone"
    assert {e["split"] for e in played if e["phase"] == "selection"} == {"dev"} and {e["split"] for e in test} == {
        "test"
    }
    routers = chosen.dropna(subset="router")
    assert set(routers["method"]) == set(chosen["method"]) & {"bosft", "bopo-hybrid", "grpo-vanilla"}
    for row in routers.to_dict("records"):
        folder = out / "hard-budget" / "policies" / row["router"]
        assert about(folder)["trained"]["how"]["cap"] in ("0 calls", "2 calls", "0.0015 usd")
        decision = load_router(folder).decide(History("boil water", "A kitchen.", 9), Budget(CostMode.CALLS, 2))
        assert decision.model in (0, 1)

    shards = {p: p.stat().st_mtime_ns for p in (out / "hard-budget").rglob("part-*.parquet")}
    assert hard_budget.main([*command, "--methods", "bosft,first-large"]) == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "hard-budget").rglob("part-*.parquet")} == shards
    assert set(pd.read_csv(out / "figures" / "hard_budget.csv")["method"]) == {"bosft", "first-large"}
    again, keys = pd.read_csv(out / "hard-budget" / "chosen.csv"), ["unit", "cap", "method", "policy"]
    pd.testing.assert_frame_equal(*(t.sort_values(keys, ignore_index=True) for t in (again, chosen)))
    saved = {p.name for p in (out / "hard-budget" / "policies").iterdir()}
    assert saved == set(routers["router"]), "what was chosen for other methods is kept"
    capsys.readouterr()
    for arguments, named in (
        (["--methods", "bosft,nobody"], ["nobody", "first-large", "--methods"]),
        (["--calls", "-1"], ["-1", ">= 0", "--calls"]),
        (["--calls", "", "--usd", ""], ["none", "--usd"]),
    ):
        line = refused(capsys, hard_budget.main([str(out), *arguments]))
        assert all(part in line for part in named)


def test_one_step_is_swapped_in_episodes_that_are_else_the_same(
    toy_run: Frontier, tmp_path: Path, ray_session: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Frontier(tmp_path, toy_run.options)
    shutil.copytree(toy_run.out, run.out)
    command = [str(run.out), "--base", "first-large:2", "--steps", "1,0,3", "--tasks", "4", "--samples", "2"]
    assert counterfactual.main([*command, "--cpus", "2"]) == 0
    table = pd.read_csv(run.out / "figures" / "counterfactual.csv")
    played = [e for f in (run.out / "counterfactual").rglob("part-*.parquet") for e in pq.read_table(f).to_pylist()]
    base = {(e["task"], e["member"]): e for e in played if e["policy"] == "first-large(2)"}
    assert len(base) == 8 and {e["split"] for e in played} == {"dev"}
    gains: dict[int, list[float]] = {0: [], 1: [], 3: []}
    for e in played:
        if e["policy"] == "first-large(2)":
            continue
        step, own = int(e["policy"].rpartition(" ")[2]), base[e["task"], e["member"]]
        assert e["steps"][:step] == own["steps"][:step], "until then they are one episode"
        models = [s["model"] for s in e["steps"]]
        assert models == [int((t < 2) != (t == step)) for t in range(len(models))]
        large, small = (own, e) if step < 2 else (e, own)
        gains[step].append(large["outcome"] - small["outcome"])
    assert all(len(own) == sum(len(e["steps"]) > step for e in base.values()) for step, own in gains.items())
    whole = table[table["after_failure"] == "all"].set_index("step")
    assert whole.loc["all", "episodes"] == sum(map(len, gains.values())) and len(gains[0]) == 8
    for step, own in gains.items():
        if str(step) in whole.index and len(own) == 8:  # as many episodes of each task: the mean over tasks is the mean
            assert whole.loc[str(step), "gain"] == pytest.approx(sum(own) / 8)
    capsys.readouterr()
    for arguments, named in (
        (["--base", "random:0.5"], ["random(0.5)", "first-large:K", "--base"]),
        (["--steps", "1,x"], ["1,x", "whole numbers", "--steps"]),
        (["--tasks", "1"], ["tasks=1", "at least 2", "--tasks"]),
    ):
        line = refused(capsys, counterfactual.main([str(run.out), *arguments]))
        assert all(part in line for part in named), line


def test_schedules_are_played_several_times_and_each_task_is_judged_by_its_other_episodes(
    toy_run: Frontier, tmp_path: Path, ray_session: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Frontier(tmp_path, toy_run.options)
    shutil.copytree(toy_run.out, run.out)
    command = [str(run.out), "--lengths", "3,1,999", "--tasks", "4", "--samples", "2", "--cpus", "2"]
    assert headroom.main(command) == 0
    said = capsys.readouterr().out
    assert "of the oracle's lead" in said or "nothing to gain" in said
    table = pd.read_csv(run.out / "figures" / "headroom.csv")
    played = [e for f in (run.out / "headroom").rglob("part-*.parquet") for e in pq.read_table(f).to_pylist()]
    names = ["always-small", "first-large(1)", "first-large(3)", "always-large"]  # 999 is always-large
    assert len(played) == 4 * len(names) * 2 and {e["split"] for e in played} == {"dev"}
    own = table[table["pick"] == "schedules"].set_index("setting")
    assert own.index.tolist() == names
    for name in names:
        mean = sum(e["success"] for e in played if e["policy"] == name) / 8
        assert own.loc[name, "success"] == pytest.approx(mean)
    best = sum(any(e["success"] for e in played if (e["task"], e["member"]) == key) for key in
               {(e["task"], e["member"]) for e in played}) / 8  # fmt: skip
    assert table.loc[table["pick"] == "oracle", "success"].max() <= best + 1e-9
    again = [p.stat().st_mtime_ns for p in sorted((run.out / "headroom").rglob("part-*.parquet"))]
    assert headroom.main(command) == 0, "nothing is played again"
    assert again == [p.stat().st_mtime_ns for p in sorted((run.out / "headroom").rglob("part-*.parquet"))]
    capsys.readouterr()
    for arguments, named in (
        (["--lengths", "1,x"], ["1,x", "whole numbers", "--lengths"]),
        (["--lengths", "999"], ["[999]", "need one from 1 to", "--lengths"]),
        (["--samples", "1"], ["samples=1", "at least 2", "--samples"]),
    ):
        line = refused(capsys, headroom.main([str(run.out), *arguments]))
        assert all(part in line for part in named), line


def test_everything_is_reproduced_in_one_report(
    toy_run: Frontier, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second pair is finished already, the frontier lacks an advantage; the caps are played, all else stood for."""
    out, root = tmp_path / "all", tmp_path / "all" / "toy-v0"
    shutil.copytree(toy_run.out, root / "full")
    shutil.copytree(pairs / "two", root / "pair-simulated-llama")
    commands: list[list[str]] = []

    def run(command: list[str]) -> int:
        commands.append(command[2:])
        if command[2] == "experiments.hard_budget":
            return subprocess.run(command, check=False, cwd=ROOT).returncode
        args = parser().parse_args(command[3:])
        shutil.copytree(toy_run.out, args.out, dirs_exist_ok=True)
        save(settings_of(args), Path(args.out) / "settings.yaml")
        (Path(args.out) / "report.html").touch()
        return 0

    monkeypatch.setattr(jobs, "run_process", run)
    arguments = ["--out", str(out), "--envs", ID, *TOY[2:], "--max-spend", "9"]
    assert reproduce.main(arguments) == 0
    said = capfd.readouterr().out
    for i, name in enumerate(("frontier", "ablation", "allocation", "cost_inversion", "hard_budget", "model_pairs"), 1):
        assert f"{i} of 6: {ID}: {name}\n" in said
    played = [(c[0], c[c.index("--out") + 1] if "--out" in c else c[1]) for c in commands]
    frontiers = ["full", "no-bosft", "no-bonus", "absolute"]
    assert played == [
        *(("experiments.frontier", str(root / name)) for name in frontiers),
        ("experiments.hard_budget", str(root / "full")),
    ]
    assert all(str(out / "calls.db") == c[c.index("--calls") + 1] for c in commands[:4])
    one, pair = spent_usd(toy_run.out), spent_usd(root / "pair-simulated-llama")
    limits = [float(c[-1]) for c in commands]
    assert limits == pytest.approx([9 - pair - n * one for n in range(5)]), "one limit for all"

    table = pd.read_csv(out / "reproduce.csv").set_index("claim")
    assert set(table["where"]) == {f"figure {i}" for i in range(1, 6)} | {"table 1"}
    hard = table[table["paper"] == "0.522"].iloc[0]
    shares = pd.read_csv(root / "full" / "figures" / "allocation.csv").set_index(["method", "difficulty"])
    assert hard["ours"] == shares.loc[("bopo-hybrid", "hard"), "spend_share"]
    capped = pd.read_csv(root / "full" / "figures" / "hard_budget.csv")
    best = capped[(capped["method"] == "bopo-hybrid") & (capped["cap"] == 15)]["success"].item()
    assert table.loc["success of BoPO under a cap of 15 calls", "ours"] == best
    assert table.loc["success of BoPO under a cap of 15 calls", "paper"] == "not known", "it is AppWorld's"
    assert table[table["unit"] == "count"]["ours"].tolist() == [0.0]
    assert table["differs"].str.contains("not one of the paper's").all() and table["setting"].str.contains("tiny").all()
    page = (out / "reproduce.html").read_text()
    assert page.count("<svg") == 6 and "<script" not in page and "simulated pair" in page
    assert "Only 4 held-out tasks: this run shows that everything works" in page
    assert page.count("not known") >= 10 and "52.2%" in page and "python -m experiments.reproduce" in page

    (root / "no-bonus" / "report.html").unlink()
    monkeypatch.setattr(jobs, "run_process", lambda command: 3)
    assert reproduce.main(arguments) == 3, "the run's own exit code"
    captured = capfd.readouterr()
    assert captured.err.endswith(f"stopped at 2 of 6: {ID}: ablation; the same command goes on there\n")
    assert f"run 1 of 4, full (--advantage hybrid,augmented,vanilla): {root / 'full'} is finished" in captured.out


def test_a_pair_of_ones_own_is_reproduced_beside_a_simulated_one(tmp_path: Path) -> None:
    own = ("--small", "simulated:llama-8b", "--large", "simulated:large")
    (benchmark,) = reproduce.benchmarks(ID, tmp_path, [*TOY[2:], *own])
    folders = {job.folder.name: settings_of(parser().parse_args(job.command[1:])) for s in benchmark.steps()
               for job in s.jobs if job.command[0] == "experiments.frontier"}  # fmt: skip
    second = folders.pop("pair-simulated-llama")
    assert (second.models, second.small, second.large) == ("simulated-llama", "", "")
    assert folders.keys() == {"full", "no-bosft", "no-bonus", "absolute"}
    assert {(s.small, s.large) for s in folders.values()} == {own[1::2]}
    assert list(benchmark.pairs) == ["simulated-llama-8b-simulated-large", "simulated-llama"]


def test_what_can_not_be_reproduced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "all"
    for arguments, named in (
        (["--envs", ""], ["envs=''", "ScienceWorld-v0"]),
        (["--envs", f"{ID},{ID}"], ["different benchmarks"]),
        (["--envs", "Nowhere-v0"], ["Nowhere-v0"]),
        (["--envs", ID, "--env", ID], ["--env: reproduce sets it itself"]),
        (["--envs", ID, "--budget-calls", "3"], ["--budget-calls: reproduce sets it itself"]),
        (["--envs", ID, "--models", "gpt-9"], ["'gpt-9'", "simulated-llama"]),
        (["--envs", ID, "--small", "openai:a", "--large", "openai:b"], ["'a'", "price"]),
        (
            ["--envs", f"{ID},ALFWorld-v0", "--models", "embedded:alfworld"],
            [f"was trained for ALFWorld-v0, not for {ID}"],
        ),
        (["--envs", ID, "--scale", "huge"], ["scale='huge'"]),
    ):
        line = refused(capsys, reproduce.main(["--out", str(out), *arguments]))
        assert all(part in line for part in named), line
    assert not out.exists()
