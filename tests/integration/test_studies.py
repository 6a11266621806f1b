"""The scripts on a finished run: their files, their one line for a mistake, and caps that hold."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments import ablation, allocation, cost_inversion, hard_budget
from experiments.audit import main as audit_main
from tests.integration.conftest import Frontier, ledger

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


@pytest.mark.parametrize("script", [allocation, cost_inversion, hard_budget])
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


def test_an_ablation_is_three_runs_on_one_store_and_a_paired_comparison(
    toy_run: Frontier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def frontier(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        """As good as `experiments.frontier`, without its minutes."""
        commands.append(command)
        shutil.copytree(toy_run.out, command[-1], dirs_exist_ok=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(ablation.subprocess, "run", frontier)
    out = tmp_path / "ablation"
    assert ablation.main(["--out", str(out), "--scale", "tiny", "--lambdas=0.2"]) == 0
    for command, (folder, own) in zip(commands, ablation.RUNS.items(), strict=True):
        assert command[3:] == ["--scale", "tiny", "--lambdas=0.2", *own, "--resume", "--calls", str(out / "calls.db"),
                               "--out", str(out / folder)]  # fmt: skip
    table = pd.read_csv(out / "ablation.csv").set_index("variant")
    assert set(table.index) == {"bopo-hybrid", "grpo-vanilla", "without BoSFT", "without bonus", "boundary only"}
    for same in ("without BoSFT", "without bonus"):  # here they are the whole method's own episodes
        assert table.loc[same, "estimate"] == table.loc["bopo-hybrid", "estimate"]
        assert (table.loc[same, "less_estimate"], table.loc[same, "less_p_holm"]) == (0, 1)
    assert "without BoSFT" in (out / "ablation.html").read_text() and (out / "ablation.png").exists()

    monkeypatch.setattr(ablation.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 3))
    assert ablation.main(["--out", str(out)]) == 3, "the run's own exit code"
    capsys.readouterr()
    assert "--beta: the ablation sets it itself" in refused(capsys, ablation.main(["--out", str(out), "--beta=1"]))


def test_every_policy_under_caps(
    toy_run: Frontier, tmp_path: Path, ray_session: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Frontier(tmp_path, toy_run.options).out
    shutil.copytree(toy_run.out, out)
    command = [str(out), "--calls", "0,2", "--usd", "0.0015", "--cpus", "2"]
    assert hard_budget.main(command) == 0
    table = pd.read_csv(out / "figures" / "hard_budget.csv")
    policies = set(pd.read_csv(out / "frontier.csv")["policy"]) - {"oracle"}
    assert set(table["policy"]) == policies and len(table) == 3 * len(policies)
    assert table["overspends"].sum() == 0 and table["cap_used"].max() <= 1 and table["cap_used"].max() > 0.5
    none = table[(table["unit"] == "calls") & (table["cap"] == 0)]
    assert none["large_calls"].sum() == 0 and set(none["success"]) == set(
        table[(table["unit"] == "calls") & (table["policy"] == "always-small")]["success"]
    ), "without a large call each policy is always-small"
    large = table[(table["policy"] == "always-large") & (table["cap"] == 2)]
    assert large["large_calls"].item() == 2.0
    assert audit_main([str(out)]) == audit_main([str(out / "hard-budget")]) == 0
    assert ledger(Frontier(tmp_path)).totals() == ledger(toy_run).totals(), "the finished run's bill is as it was"

    shards = {p: p.stat().st_mtime_ns for p in (out / "hard-budget").rglob("part-*.parquet")}
    assert hard_budget.main([*command, "--policies", "bosft,first-large"]) == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "hard-budget").rglob("part-*.parquet")} == shards
    assert set(pd.read_csv(out / "figures" / "hard_budget.csv")["method"]) == {"bosft", "first-large"}
    capsys.readouterr()
    for arguments, named in (
        (["--policies", "bosft,nobody"], ["nobody", "first-large", "--policies"]),
        (["--calls", "-1"], ["-1", ">= 0", "--calls"]),
        (["--calls", "", "--usd", ""], ["none", "--usd"]),
    ):
        line = refused(capsys, hard_budget.main([str(out), *arguments]))
        assert all(part in line for part in named)
