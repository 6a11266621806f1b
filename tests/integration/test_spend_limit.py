"""The limit on a run's money, and what ends a run: it stops in one line, within the limit, and goes on from there."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bopo_ray.records import StopReason
from experiments.frontier import main
from tests.endpoint import Ask, Fault, Kind
from tests.integration.conftest import PAIR, Frontier, Watched, audited, ledger, paid, write_pool

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

OPTIONS = (*PAIR, "--seeds", "1", "--updates", "2", "--tasks-per-update", "4")
"""Another seed than the boundary rollouts', so that the sweep has calls of its own to pay."""
CAP = 0.0009
"""Dollars per evaluation episode: the small model can be paid for some steps, the large one never."""


def paid_keys(run: Frontier) -> Counter[str]:
    """How often each call was paid."""
    with sqlite3.connect(run.out / "spend.db") as database:
        return Counter(key for (key,) in database.execute("SELECT key FROM paid"))


def paid_between(run: Frontier, after: float, before: float) -> int:
    """Micro-dollars that were paid in a stretch of Unix time."""
    with sqlite3.connect(run.out / "spend.db") as database:
        sql = "SELECT coalesce(sum(cost), 0) FROM paid WHERE created BETWEEN ? AND ?"
        return int(database.execute(sql, (after, before)).fetchone()[0])


class Trouble:
    """An endpoint's faults: some requests hang; in the sweep, one task's first question fails for a long time."""

    def __init__(self, out: Path) -> None:
        self.out, self.lock = out, threading.Lock()
        self.task, self.failed = "", 0

    def __call__(self, ask: Ask) -> Fault | None:
        if ask.n % 40 == 7:
            return Fault(Kind.HANG)
        if (self.out / "bosft.json").exists() and not (self.out / "ledger.json").exists() and len(ask.messages) == 2:
            task = ask.messages[1].content
            with self.lock:
                self.task = self.task or task
                # 9 make the group fail that asks it: 3 attempts at its episodes, of 3 equal server errors each.
                if task == self.task and self.failed < 10:
                    self.failed += 1
                    return Fault(Kind.ERROR)
        return None


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Frontier, Watched, Trouble]:
    """A run without a limit, at an endpoint in trouble, evaluated under a cap in dollars."""
    folder = tmp_path_factory.mktemp("troubled")
    trouble = Trouble(folder / "out")
    with Watched(trouble) as endpoint:
        pool = write_pool(folder / "pool.yaml", endpoint.url, timeout_s=1.0, max_completion_tokens=32)
        run = Frontier(folder, (*OPTIONS, "--models", str(pool), "--budget-usd", str(CAP)))
        assert run.run() == 0, run.said()
    return run, endpoint, trouble


def test_a_run_ends_although_requests_hang_and_episodes_fail(troubled: tuple[Frontier, Watched, Trouble]) -> None:
    run, endpoint, trouble = troubled
    assert endpoint.refusals[Kind.HANG] >= 5 and trouble.failed == 10
    totals = ledger(run).totals().overall
    assert paid(run) == endpoint.delivered and set(paid_keys(run).values()) == {1}
    assert totals.lost_calls == len(endpoint.undelivered) == endpoint.refusals[Kind.HANG]
    assert totals.paid_microusd + totals.lost_microusd >= endpoint.cost_microusd
    audited(run)
    # The group whose episodes failed was filled up.
    policy = run.rows("policy").values()
    assert Counter(e["group"] for e in policy) == dict.fromkeys(range(8), 3)
    assert len({e["group"] for e in policy if e["member"] >= 3}) == 1


def test_no_evaluation_episode_exceeds_its_cap_in_dollars(troubled: tuple[Frontier, Watched, Trouble]) -> None:
    run, _, _ = troubled
    episodes = run.rows("evaluation").values()
    cap = round(CAP * 1e6)
    charged = [sum(s["cost_microusd"] + s["lost_microusd"] for s in e["steps"]) for e in episodes]
    assert {e["budget_cap"] for e in episodes} == {cap} and max(charged) <= cap
    stops = Counter(e["stop"] for e in episodes)
    assert stops[StopReason.BUDGET] > 0 and stops[StopReason.SUCCESS] > 0
    assert max(sum(s["cost_microusd"] for s in e["steps"]) for e in run.rows("boundary").values()) > cap
    words = f"under a hard budget of ${CAP:g} per task"
    assert words in (run.out / "report.html").read_text() and words in " ".join(run.said("stdout").split())


def check_stopped(run: Frontier, endpoint: Watched, code: int, limit: int) -> int:
    """One line, nothing above the limit, nothing left open; returns the micro-dollars spent."""
    assert code == 3, run.said() + run.said("stdout")
    lines = run.said("stdout").splitlines()
    totals = ledger(run).totals().overall
    assert [line for line in lines if "stopped" in line] == lines[-1:]
    assert f"${totals.spent_microusd / 1e6:.6f} spent on {totals.paid_calls} calls" in lines[-1]
    assert "--max-spend" in lines[-1] and "--resume" in lines[-1] and "Traceback" not in run.said()
    assert totals.reserved_microusd == 0
    assert 0 < endpoint.cost_microusd <= totals.spent_microusd <= limit
    assert not endpoint.delivered - paid(run) - Counter(lost(endpoint, run))
    return totals.spent_microusd


def lost(endpoint: Watched, run: Frontier) -> dict[Any, int]:
    """Calls that the server delivered to a process that was being stopped: they count as lost."""
    more = endpoint.delivered - paid(run)
    assert more.total() <= ledger(run).totals().overall.lost_calls
    return dict(more)


def test_a_run_stops_within_its_limit_and_goes_on_with_a_higher_one(
    troubled: tuple[Frontier, Watched, Trouble], tmp_path: Path
) -> None:
    whole = troubled[0].out
    collected, swept = ((whole / name).stat().st_mtime for name in ("bosft.json", "ledger.json"))
    collection, sweep = paid_between(troubled[0], 0, collected), paid_between(troubled[0], collected, swept)
    assert sweep > 6_000, "else the limit below is not in the sweep"
    with Watched(delay_s=0.02) as endpoint:
        pool = write_pool(tmp_path / "pool.yaml", endpoint.url, max_completion_tokens=32)
        run = Frontier(tmp_path, (*OPTIONS, "--models", str(pool)))
        first = collection // 2
        spent = check_stopped(run, endpoint, run.run("--max-spend", f"{first / 1e6:.6f}"), first)
        assert not (run.out / "bosft.json").exists()
        episodes = len(run.rows("boundary"))

        second = collection + (2 * sweep) // 3
        spent_more = check_stopped(run, endpoint, run.run("--max-spend", f"{second / 1e6:.6f}", "--resume"), second)
        assert (run.out / "bosft.json").exists() and not (run.out / "ledger.json").exists()
        assert spent_more > max(spent, collection) and len(run.rows("boundary")) == 24 > episodes

        assert run.run("--max-spend", "5", "--resume") == 0, run.said()
        totals = ledger(run).totals().overall
        assert totals.spent_microusd > spent_more and totals.reserved_microusd == 0
        assert endpoint.delivered == paid(run) + Counter(lost(endpoint, run))
        assert set(paid_keys(run).values()) == {1}
        spend = json.loads((run.out / "summary.json").read_text())["spend"]
        assert (spend["paid_calls"], spend["lost_calls"]) == (totals.paid_calls, totals.lost_calls)
        assert spend["paid_usd"] == totals.paid_microusd / 1e6
        audited(run)


@pytest.mark.parametrize(
    ("mend", "named"),
    [
        (lambda e: setattr(e, "models", ("toy-large",)), ["'toy-small'", "404", "check the model's name"]),
        (lambda e: setattr(e, "faults", lambda ask: Fault(Kind.NO_USAGE)), ["no token usage", "price: 0"]),
    ],
    ids=["wrong name", "no usage"],
)
def test_an_endpoint_that_can_never_do_stops_the_run_in_one_line(
    mend: Callable[[Watched], None], named: list[str], tmp_path: Path, ray_session: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with Watched() as endpoint:
        mend(endpoint)
        pool = write_pool(tmp_path / "pool.yaml", endpoint.url)
        assert main([*PAIR, "--train-tasks", "40", "--models", str(pool), "--out", str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1
        assert all(part in line for part in named), line
        assert len(endpoint.bill) < 100  # of the 80 episodes of the large model, which would have gone on


def test_a_key_that_is_revoked_in_the_sweep_stops_the_run_in_one_line(tmp_path: Path) -> None:
    key = "planted-Hc5wRj9TnB2sVx4Lq7Gm"

    def revoked(ask: Ask) -> Fault | None:
        return Fault(Kind.ECHO_401) if (tmp_path / "out" / "bosft.json").exists() else None

    with Watched(revoked, key=key) as endpoint:
        pool = write_pool(tmp_path / "pool.yaml", endpoint.url, key_variable="TOY_KEY")
        run = Frontier(tmp_path, (*PAIR, "--models", str(pool)), {"TOY_KEY": key})
        assert run.run() == 2, run.said()
    line = run.said().splitlines()[-1]
    assert line.startswith("error: ") and "401" in line and "[hidden]" in line and "TOY_KEY" in line
    assert (
        "Traceback" not in run.said() and "Unhandled" not in run.said() and key not in run.said() + run.said("stdout")
    )
    assert endpoint.refusals[Kind.ECHO_401] <= 8
