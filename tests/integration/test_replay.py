"""A recorded run is played again with no server, no key and no spend.

The recording in tests/data is made anew, against the scripted endpoint, by `python -m tests.integration.test_replay`.
Its models stand at an address that does not exist (see RFC 2606), so that a replay that asks anybody fails; while it
is recorded, the scripted endpoint poses as the proxy on the way there.

Always true here: the recording holds each call that any router could make on the run's tasks, so that a replay finds
what it asks for although another machine's last bits may tip a choice.
"""

from __future__ import annotations

import csv
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from bopo_ray.benchmarks import select_tasks
from bopo_ray.models import build_pool
from bopo_ray.models.calls import CallStore
from bopo_ray.models.desk import Desk
from bopo_ray.models.pool import read_pool
from bopo_ray.models.pricing import price_table
from envs.base import Split
from experiments import store
from experiments.frontier import main
from tests.integration.conftest import PAIR, Frontier, Watched, ledger, write_pool
from tests.toy import ID, routing_env

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

DATA = Path(__file__).parents[1] / "data"
POOL, CALLS, FRONTIER = DATA / "replay-pool.yaml", DATA / "replay-calls.parquet", DATA / "replay-frontier.csv"
OPTIONS = (*PAIR, "--models", str(POOL), "--temperature", "0")
MAX_STEPS = 12


def points(path: Path) -> dict[str, tuple[float, ...]]:
    """Success, cost and calls by policy."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = ("success", "cost_usd", "large_calls", "score", "n_episodes")
    return {row["policy"]: tuple(float(row[n]) for n in names) for row in rows}


def test_a_recorded_run_is_played_again_without_network_and_spend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    run = Frontier(tmp_path, (*OPTIONS, "--replay", str(CALLS), "--max-spend", "0"))
    assert run.run() == 0, run.said()
    totals = ledger(run).totals().overall
    assert totals.paid_calls == totals.lost_calls == totals.spent_microusd == 0
    assert totals.saved_calls > 300
    recorded, replayed = points(FRONTIER), points(run.out / "frontier.csv")
    assert replayed.keys() == recorded.keys()
    for policy, row in recorded.items():
        assert replayed[policy] == pytest.approx(row, abs=1e-9), policy
    assert len(set(recorded.values())) > 5, "else there is little to tell apart"


def test_the_recording_is_small_and_holds_no_key() -> None:
    assert CALLS.stat().st_size < 300_000
    table = pq.read_table(CALLS)
    assert set(table["model"].to_pylist()) == {"toy-small", "toy-large"}
    assert "key_variable: ''" in POOL.read_text()


def test_a_recording_of_another_setting_is_refused_in_one_line(
    tmp_path: Path, ray_session: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = yaml.safe_load(POOL.read_text())
    for model in pool["models"]:
        model["max_completion_tokens"] = 64
    other = tmp_path / "pool.yaml"
    other.write_text(yaml.safe_dump(pool))
    out = tmp_path / "out"
    options = (*PAIR, "--models", str(other), "--temperature", "0", "--replay", str(CALLS), "--out", str(out))
    assert main(options) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert "not among the recorded ones" in line and "--replay" in line


def explore(calls: Path) -> None:
    """Makes each call that any sequence of choices could lead to, on all tasks of the run."""
    env = routing_env(
        build_pool(read_pool(POOL, price_table())), MAX_STEPS, desk=Desk(CallStore(calls)), temperature=0.0
    )
    for split, count in ((Split.TRAIN, 6), (Split.TEST, 4)):
        for task in select_tasks(ID, split, count, 0):
            known, todo = set[tuple[str, ...]](), [list[int]()]
            while todo:
                start = todo.pop()
                for choice in (0, 1):
                    env.reset(options={"task": task.name})
                    steps = [env.step(c)[4] for c in (*start, choice)]
                    replies = tuple(info["reply"] for info in steps)
                    if "stop" not in steps[-1] and replies not in known:
                        known.add(replies)
                        todo.append([*start, choice])


def record() -> None:
    """Makes the files in tests/data."""
    DATA.mkdir(exist_ok=True)
    write_pool(POOL, "http://recorded.invalid/v1")
    with Watched() as endpoint, tempfile.TemporaryDirectory() as folder:
        proxy = {"HTTP_PROXY": endpoint.url.removesuffix("/v1"), "NO_PROXY": "127.0.0.1,localhost"}
        run = Frontier(Path(folder), OPTIONS, proxy)
        if run.run():
            sys.exit(run.said())
        os.environ.update(proxy)
        explore(run.out / "calls.db")
        store.main(["export", str(run.out), str(CALLS)])
        shutil.copy(run.out / "frontier.csv", FRONTIER)


if __name__ == "__main__":
    record()
