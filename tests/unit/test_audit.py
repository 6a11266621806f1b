"""The bill and its audit, on a small real results folder: every figure that is tampered with is found and named."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bopo_ray.analysis.audit import Audit, audit
from bopo_ray.analysis.bill import bill
from bopo_ray.errors import StoreError
from bopo_ray.files import write_json
from bopo_ray.models import build_pool
from bopo_ray.models.calls import CallStore
from bopo_ray.models.desk import Desk
from bopo_ray.models.pool import resolve_pool, save_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.models.spend import SpendLedger, Totals
from bopo_ray.records import Budget, CostMode, Episode, EpisodeSpec, Phase
from bopo_ray.store import EpisodeStore
from experiments.audit import main
from tests.toy import play, routing_env, toy_spec

CPU_HOUR = 40_000
BUDGETS = (None, Budget(CostMode.USD, 2500), Budget(CostMode.CALLS, 2))


def specs() -> list[EpisodeSpec]:
    boundary = [
        toy_spec(task, f"always-{size}", member, phase=Phase.BOUNDARY)
        for task in ("fetch/0", "measure/1") for size in ("small", "large") for member in (0, 1)
    ]  # fmt: skip
    evaluation = [
        toy_spec(f"{kind}/200", router, budget=budget, policy=f"{router} {i}")
        for kind in ("fetch", "mix") for router in ("always-small", "random(0.5)") for i, budget in enumerate(BUDGETS)
    ]  # fmt: skip
    return boundary + evaluation


def share(spec: EpisodeSpec) -> float:
    return {"always-small": 0.0, "always-large": 1.0}.get(spec.router, 0.5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder as the pipeline writes one. Tests must leave it as it is."""
    out = tmp_path_factory.mktemp("results") / "run"
    out.mkdir()
    models = resolve_pool("simulated", "", "", price_table())
    save_pool(models, out / "pool.yaml")
    pool, ledger = build_pool(models), SpendLedger(out / "spend.db", None)
    calls = CallStore(out / "calls.db")
    desk = Desk(calls, ledger)
    episodes = [play(s, routing_env(pool, desk=desk), share(s))[0] for s in specs()]
    for phase in (Phase.BOUNDARY, Phase.EVALUATION):
        EpisodeStore(out / "episodes" / phase, pool.price_hash).append([e for e in episodes if e.spec.phase is phase])
    boundary: dict[str, dict[str, list[int]]] = {}
    points: dict[str, list[Episode]] = {}
    for e in episodes:
        if e.spec.phase is Phase.BOUNDARY:
            boundary.setdefault(e.spec.task.name, {}).setdefault(e.spec.policy, []).append(e.cost_microusd)
        else:
            points.setdefault(e.spec.policy, []).append(e)
    rows = [
        {"task": t} | {f"cost_{s}_usd": sum(c[f"always-{s}"]) / 2e6 for s in ("small", "large")}
        for t, c in boundary.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), out / "boundaries.parquet")
    frontier = [
        {"policy": p, "cost_usd": sum(e.cost_microusd for e in es) / len(es) / 1e6,
         "large_calls": sum(e.large_calls for e in es) / len(es)}
        for p, es in points.items()
    ]  # fmt: skip
    pd.DataFrame(frontier).to_csv(out / "frontier.csv", index=False)
    spend = bill((out / "episodes").rglob("part-*.parquet"), ledger.totals(), CPU_HOUR)
    write_json(out / "summary.json", {"spend": spend.to_dict()})
    calls.close()
    ledger.close()
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def audited(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, Audit]:
    """Exit code and what the command says; and the same as a record."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "-" not in p.suffix}
    code = main([str(folder)])
    said = capsys.readouterr().out
    assert before.items() <= {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}.items(), "it changed the run"
    return code, said, audit(folder)


def episode_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for shard in (folder / "episodes").rglob("part-*.parquet") for row in pq.read_table(shard).to_pylist()]


def change_episodes(folder: Path, change: Callable[[list[dict[str, Any]]], None], phase: str = "evaluation") -> None:
    (shard,) = (folder / "episodes" / phase).glob("part-*.parquet")
    table = pq.read_table(shard)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), shard)


def sql(folder: Path, statement: str) -> None:
    with closing(sqlite3.connect(folder / "spend.db")) as c, c:
        assert c.execute(statement).rowcount == 1


def change_summary(folder: Path, **changes: float) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert changes.keys() <= summary["spend"].keys()
    (folder / "summary.json").write_text(json.dumps({"spend": summary["spend"] | changes}))


# -- the bill ---------------------------------------------------------------------------------------------------------


def test_the_bill_adds_up(finished: Path) -> None:
    rows, totals = episode_rows(finished), SpendLedger(finished / "spend.db", None).totals()
    b = bill((finished / "episodes").rglob("part-*.parquet"), totals, CPU_HOUR)
    assert b.episodes == len(rows) == 20
    assert b.calls == sum(len(r["steps"]) for r in rows) > 60
    assert b.cost_microusd == sum(s["cost_microusd"] for r in rows for s in r["steps"])
    # Whoever makes a call, it costs the same: what the episodes are worth was either paid or saved.
    assert b.paid_calls + b.saved_calls == b.calls
    assert b.paid_microusd + b.saved_microusd == b.cost_microusd
    assert b.saved_calls > 5 and b.lost_calls == b.decisions == 0
    assert (b.router_ms, b.router_share) == (0.0, 0.0)
    assert b.to_dict()["paid_usd"] == b.paid_microusd / 1e6


def test_the_routers_compute_is_a_share_of_what_it_routed(tmp_path: Path) -> None:
    learned, fixed = (play(toy_spec("fetch/3", router))[0] for router in ("learned", "always-small"))
    store = EpisodeStore(tmp_path, "h")
    store.append([learned])
    store.append([fixed])

    def slow(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            for step in row["steps"]:
                step["router_s"] = 0.9 if row["router"] == "learned" else 0.0

    for shard in tmp_path.glob("part-*.parquet"):
        table = pq.read_table(shard)
        rows = table.to_pylist()
        slow(rows)
        pq.write_table(pa.Table.from_pylist(rows, table.schema), shard)
    shards = sorted(tmp_path.glob("part-*.parquet"))
    b = bill(
        [*shards, shards[0]], Totals(None, ()), 4_000_000
    )  # $4 an hour; an episode that is there twice counts once
    n = len(learned.steps)
    assert (b.episodes, b.decisions, b.calls) == (2, n, n + len(fixed.steps))
    assert b.router_s == pytest.approx(0.9 * n)
    assert b.router_ms == pytest.approx(900)
    assert b.router_microusd == pytest.approx(1000 * n)
    assert b.routed_microusd == learned.cost_microusd
    assert b.router_share == pytest.approx(1000 * n / (1000 * n + learned.cost_microusd))


def test_the_bill_of_nothing(tmp_path: Path) -> None:
    b = bill([], Totals(None, ()), CPU_HOUR)
    assert set(b.to_dict().values()) == {0}


# -- a clean run ------------------------------------------------------------------------------------------------------


def test_a_clean_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, found = audited(finished, capsys)
    assert (code, found.differences) == (0, ())
    summary = json.loads((finished / "summary.json").read_text())["spend"]
    assert (found.episodes, found.calls, found.paid_calls) == (20, summary["calls"], summary["paid_calls"])
    assert found.cost_microusd / 1e6 == summary["cost_usd"] and found.paid_microusd / 1e6 == summary["paid_usd"]
    assert found.figures > found.calls + found.paid_calls
    assert f"20 episodes, {found.calls} calls worth ${summary['cost_usd']:.6f}" in said
    assert said.endswith("0 differ\n")


def test_a_budget_bound_an_episode(finished: Path) -> None:
    """Else the audit of budgets looks at nothing."""
    rows = [r for r in episode_rows(finished) if r["budget_mode"]]
    assert {r["budget_mode"] for r in rows} == {"usd", "calls"}
    assert any(r["stop"] == "budget" for r in rows)


def test_a_run_that_is_not_finished(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("frontier.csv", "summary.json", "boundaries.parquet"):
        (run / name).unlink()
    assert audited(run, capsys)[0] == 0
    (run / "spend.db").unlink()
    shutil.rmtree(run / "episodes")
    code, said, found = audited(run, capsys)
    assert (code, found.episodes, found.figures) == (0, 0, 0) and said.startswith("0 episodes")


def test_an_episode_that_is_there_twice_counts_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = (run / "episodes" / "boundary").glob("part-*.parquet")
    shutil.copy(shard, shard.with_name("part-copy.parquet"))
    code, _, found = audited(run, capsys)
    assert (code, found.episodes) == (0, 20)


# -- tampering --------------------------------------------------------------------------------------------------------


def cheaper_step(rows: list[dict[str, Any]]) -> None:
    rows[0]["steps"][1]["cost_microusd"] -= 1


def cheaper_episode(rows: list[dict[str, Any]]) -> None:
    rows[0]["cost_microusd"] -= 1


def fewer_tokens(rows: list[dict[str, Any]]) -> None:
    rows[0]["steps"][0]["completion_tokens"] -= 5


def other_model(rows: list[dict[str, Any]]) -> None:
    rows[0]["steps"][0]["model"] = 1 - rows[0]["steps"][0]["model"]


def one_call_less(rows: list[dict[str, Any]]) -> None:
    rows[0]["calls"] -= 1


def less_than_used(rows: list[dict[str, Any]]) -> None:
    row = next(r for r in rows if r["budget_mode"] == "usd")
    row["budget_cap"] = row["cost_microusd"] - 1


def lost_beyond_the_cap(rows: list[dict[str, Any]]) -> None:
    row = next(r for r in rows if r["budget_mode"] == "usd")
    row["steps"][0]["lost_microusd"] = row["budget_cap"]


def calls_beyond_the_cap(rows: list[dict[str, Any]]) -> None:
    next(r for r in rows if r["budget_mode"] == "calls" and r["large_calls"])["budget_cap"] = 0


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (cheaper_step, {"cost of step 1, micro-dollars"}),
        (cheaper_episode, {"cost, micro-dollars"}),
        (fewer_tokens, {"cost of step 0, micro-dollars", "cost, micro-dollars"}),
        (other_model, {"cost of step 0, micro-dollars", "cost, micro-dollars", "large calls"}),
        (one_call_less, {"calls"}),
        (less_than_used, {"used of the cap"}),
        (lost_beyond_the_cap, {"used of the cap"}),
        (calls_beyond_the_cap, {"used of the cap 0, at most"}),
    ],
)
def test_an_episode_was_changed(
    change: Callable[[list[dict[str, Any]]], None], what: set[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_episodes(run, change)
    code, said, found = audited(run, capsys)
    named = [d for d in found.differences if d.where.startswith("episodes/evaluation/part-")]
    assert code == 1 and f"{len(found.differences)} differ" in said
    assert len({d.where for d in named}) == 1
    assert len(named) == len(what) and all(any(d.what.startswith(w) for d in named) for w in what)
    assert "episodes/evaluation/part-" in said
    for d in found.differences:
        assert d.stored != d.recomputed


def test_each_difference_says_both_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_episodes(run, cheaper_step)
    code, said, found = audited(run, capsys)
    (d,) = found.differences
    assert (code, d.recomputed - d.stored) == (1, 1)
    assert f"{d.stored:,.9g}" in said and f"{d.recomputed:,.9g}" in said
    assert main([str(run), "--json"]) == 1
    (again,) = json.loads(capsys.readouterr().out)["differences"]
    assert (again["where"], again["stored"], again["recomputed"]) == (d.where, d.stored, d.recomputed)


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("UPDATE paid SET cost = cost - 1 WHERE id = 3", {"cost, micro-dollars"}),
        (
            "UPDATE paid SET prompt_tokens = prompt_tokens + 10 WHERE id = 3",
            {"cost, micro-dollars", "paid micro-dollars", "paid dollars"},
        ),
        (
            "UPDATE paid SET model = 'unknown' WHERE id = 3",
            {"cost, micro-dollars", "paid micro-dollars", "paid dollars"},
        ),
        ("DELETE FROM paid WHERE id = 3", {"paid calls", "paid micro-dollars", "paid dollars"}),
        (
            "UPDATE models SET paid_microusd = paid_microusd - 1 WHERE model = 'simulated:large'",
            {"paid micro-dollars", "paid or saved micro-dollars, at least"},
        ),
        ("UPDATE models SET paid_calls = paid_calls + 1 WHERE model = 'simulated:small'", {"paid calls"}),
        (
            "UPDATE models SET saved_calls = saved_calls - 1 WHERE model = 'simulated:small'",
            {"saved calls", "paid or saved calls, at least"},
        ),
        (
            "UPDATE models SET saved_microusd = saved_microusd - 1 WHERE model = 'simulated:large'",
            {"saved dollars", "paid or saved micro-dollars, at least"},
        ),
        (
            "DELETE FROM models WHERE model = 'simulated:large'",
            {
                "paid calls",
                "paid micro-dollars",
                "saved calls",
                "saved dollars",
                "paid or saved calls, at least",
                "paid or saved micro-dollars, at least",
            },
        ),
    ],
)
def test_the_ledger_was_changed(statement: str, what: set[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql(run, statement)
    code, said, found = audited(run, capsys)
    assert code == 1 and {d.what for d in found.differences} == what
    assert any(d.where.startswith("spend.db") for d in found.differences) and "spend.db" in said


@pytest.mark.parametrize("kind", ["saved", "lost"])
def test_the_ledger_counts_more_than_the_report(kind: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The episodes alone allow it: one that was begun anew has spent, too."""
    sql(run, f"UPDATE models SET {kind}_calls = {kind}_calls + 1, {kind}_microusd = {kind}_microusd + 9 WHERE model = "
             "'simulated:small'")  # fmt: skip
    code, said, found = audited(run, capsys)
    assert (code, {(d.where, d.what) for d in found.differences}) == (
        1, {("summary.json", f"{kind} calls"), ("summary.json", f"{kind} dollars")})  # fmt: skip
    assert f"{kind} calls" in said and f"{kind} dollars" in said
    (run / "summary.json").unlink()
    assert audited(run, capsys)[0] == 0


def lost_between_two_attempts(rows: list[dict[str, Any]]) -> None:
    """As when a cap in dollars ends an episode there: a step of a call that was never answered."""
    row = next(r for r in rows if r["budget_mode"] == "usd" and r["stop"] == "budget")
    nothing = {"model": 1, "reply": "", "action": "", "observation": "", "prompt_tokens": 0, "cached_tokens": 0,
               "completion_tokens": 0, "cost_microusd": 0, "lost_microusd": 40}  # fmt: skip
    row["steps"].append(row["steps"][-1] | nothing)
    row["calls"] += 1
    row["large_calls"] += 1
    row["budget_cap"] = 10**6


@pytest.mark.parametrize(("counted", "differ"), [(39, 1), (40, 0), (41, 0)])
def test_what_the_steps_lost_is_in_the_ledger(
    counted: int, differ: int, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((run / "summary.json").read_text())["spend"]
    change_episodes(run, lost_between_two_attempts)
    sql(run, f"UPDATE models SET lost_calls = 1, lost_microusd = {counted} WHERE model = 'simulated:large'")
    change_summary(run, calls=summary["calls"] + 1, lost_calls=1, lost_usd=counted / 1e6)
    (run / "frontier.csv").unlink()
    code, said, found = audited(run, capsys)
    assert (code, len(found.differences)) == (differ, differ)
    for d in found.differences:
        assert (d.where, d.what) == ("spend.db: simulated:large", "lost micro-dollars, at least")
        assert (d.stored, d.recomputed) == (39, 40) and d.where in said and d.what in said


@pytest.mark.parametrize(
    ("column", "what"), [("cost_usd", "dollars per task"), ("large_calls", "large calls per task")]
)
def test_the_frontier_was_changed(column: str, what: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.read_csv(run / "frontier.csv")
    table.loc[1, column] += 1e-6
    table.to_csv(run / "frontier.csv", index=False)
    code, said, found = audited(run, capsys)
    (d,) = found.differences
    assert (code, d.what, d.where) == (1, what, f"frontier.csv: {table.loc[1, 'policy']}")
    assert d.where in said and what in said


@pytest.mark.parametrize("rows", [0, 2])
def test_each_evaluated_policy_has_one_row(rows: int, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.read_csv(run / "frontier.csv")
    pd.concat([table.drop(index=1)] + [table.loc[[1]]] * rows).to_csv(run / "frontier.csv", index=False)
    code, said, found = audited(run, capsys)
    (d,) = found.differences
    assert (code, d.what, d.where) == (1, "rows", f"frontier.csv: {table.loc[1, 'policy']}")
    assert (d.stored, d.recomputed) == (rows, 1) and d.where in said


def retire(folder: Path) -> None:
    """A later command has chosen another offset and share, and asked for neither of two baselines that are half played;
    what an earlier one had played stays in the store."""
    names = {"always-small 0": "r_offset-1", "always-small 1": "r_offset2", "random(0.5) 0": "random(0.4)"}

    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["policy"] == "random(0.5) 1" and row["task"].startswith("fetch"):
                row["policy"] = "one-step(0.1)"
            row["policy"] = names.get(row["policy"], row["policy"])
            if row["policy"].startswith("r_offset"):
                row["router"] = "learned"

    change_episodes(folder, change)
    table = pd.read_csv(folder / "frontier.csv").replace({"policy": names})
    gone = ["r_offset-1", "random(0.4)", "random(0.5) 1"]
    table[~table["policy"].isin(gone)].to_csv(folder / "frontier.csv", index=False)


def test_a_policy_that_a_later_command_has_left_out_is_no_difference(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    retire(run)
    code, said, found = audited(run, capsys)
    assert (code, found.differences, found.episodes) == (0, (), 20) and "0 differ" in said


def test_a_row_that_is_lacking_is_a_difference_whatever_the_policy(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learned router with no other offset in its place; and whatever the summary names."""
    retire(run)
    table = pd.read_csv(run / "frontier.csv")
    table[table["policy"] != "r_offset2"].to_csv(run / "frontier.csv", index=False)
    summary = json.loads((run / "summary.json").read_text())
    write_json(run / "summary.json", summary | {"points": [{"policy": "random(0.4)"}, {"policy": "one-step(0.1)"}]})
    code, _, found = audited(run, capsys)
    lacking = {d.where.removeprefix("frontier.csv: "): (d.what, d.stored, d.recomputed) for d in found.differences}
    names = ("r_offset-1", "r_offset2", "random(0.4)", "one-step(0.1)")
    assert code == 1 and lacking == dict.fromkeys(names, ("rows", 0, 1))


def test_a_row_of_a_policy_that_was_never_evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.read_csv(run / "frontier.csv")
    pd.concat([table, table.loc[[1]].assign(policy="nobody")]).to_csv(run / "frontier.csv", index=False)
    code, said, found = audited(run, capsys)
    (d,) = found.differences
    assert (code, d.what, d.where) == (1, "episodes", "frontier.csv: nobody") and d.where in said


def test_the_boundaries_were_changed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pq.read_table(run / "boundaries.parquet").to_pylist()
    rows[1]["cost_large_usd"] *= 1.01
    pq.write_table(pa.Table.from_pylist(rows), run / "boundaries.parquet")
    code, said, found = audited(run, capsys)
    (d,) = found.differences
    assert (code, d.what, d.where) == (1, "dollars of always-large", f"boundaries.parquet: {rows[1]['task']}")
    assert d.where in said


@pytest.mark.parametrize(
    "name",
    ["episodes", "calls", "cost_usd", "paid_calls", "paid_usd", "saved_calls", "saved_usd", "lost_calls", "lost_usd"],
)
def test_the_summary_was_changed(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((run / "summary.json").read_text())["spend"][name]
    change_summary(run, **{name: before + (1e-6 if name.endswith("_usd") else 1)})
    code, said, found = audited(run, capsys)
    (d,) = found.differences
    assert (code, d.where, d.recomputed) == (1, "summary.json", pytest.approx(before))
    assert "summary.json" in said


def test_many_differences_are_counted_on_the_screen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def all_free(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            for step in row["steps"]:
                step["cost_microusd"] = 0

    change_episodes(run, all_free)
    code, said, found = audited(run, capsys)
    assert code == 1 and len(found.differences) > 30
    assert f"... and {len(found.differences) - 20} more; see --json" in said


# -- what can't be audited --------------------------------------------------------------------------------------------


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(folder.rglob("*")) if folder.exists() else []
    assert main([str(folder)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert str(folder) in said.err
    assert [
        p for p in (sorted(folder.rglob("*")) if folder.exists() else []) if not p.name.startswith("spend.db-")
    ] == [p for p in before if not p.name.startswith("spend.db-")]
    with pytest.raises(StoreError):
        audit(folder)
    return said.err


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert "holds no run (no pool.yaml); give the folder of a run" in refused(folder, capsys)


def test_another_price(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (run / "pool.yaml").read_text()
    assert text.count("output: 8.0") == 1
    (run / "pool.yaml").write_text(text.replace("output: 8.0", "output: 8.000001"))
    line = refused(run, capsys)
    assert "price table" in line and "restore the prices it was made with" in line


def test_a_damaged_shard_stays_where_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = (run / "episodes" / "boundary").glob("part-*.parquet")
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard.name} is damaged" in refused(run, capsys)
    assert shard.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [("summary.json", "{"), ("summary.json", "{}"), ("summary.json", "[1]"), ("frontier.csv", "policy\nx"),
     ("frontier.csv", ""), ("boundaries.parquet", "no parquet"), ("spend.db", "no database" * 500)],
)  # fmt: skip
def test_a_damaged_file(name: str, text: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "frontier.csv" and text:
        text = text.replace("x", pd.read_csv(run / name)["policy"][0])
    for path in run.glob(f"{name}*"):
        path.unlink()
    (run / name).write_text(text)
    assert name in refused(run, capsys)
